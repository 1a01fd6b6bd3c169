"""Before the first step: where the batch may be mixed, proved by reordering rows, and what a step does with its targets."""
