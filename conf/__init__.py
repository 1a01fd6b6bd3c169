"""The configuration that Hydra composes; in another application ``hydra.searchpath: [pkg://mm_lightning.conf]``."""
