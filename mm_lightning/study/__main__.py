"""The command ``python -m mm_lightning.study``."""

from mm_lightning.command.scripts import study

if __name__ == "__main__":
    study()
