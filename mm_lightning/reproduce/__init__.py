"""The command that reproduces the paper's claims on small data: ``python -m mm_lightning.reproduce``."""
