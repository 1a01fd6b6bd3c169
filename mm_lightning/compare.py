"""The command ``python -m mm_lightning.compare``."""

from mm_lightning.command.compare import compare, main, markdown

__all__ = ["compare", "main", "markdown"]

if __name__ == "__main__":
    main()
