"""The commands, and what a run of them leaves."""
