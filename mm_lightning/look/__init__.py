"""Before the first step: where may the batch be mixed? Proved by reordering rows."""
