"""Runs over seeds: which, running them, their numbers, pictures and verdicts, and one page that shows them."""
