"""The command ``python -m mm_lightning.reproduce``, which reproduces the paper's claims on small data."""

from mm_lightning.command.scripts import reproduce as main

__all__ = ["main"]

if __name__ == "__main__":
    main()
