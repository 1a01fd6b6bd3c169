"""The command ``python -m mm_lightning.evaluate``, which tests a trained model again."""

from mm_lightning.command.evaluate import evaluate, main

__all__ = ["evaluate", "main"]

if __name__ == "__main__":
    main()
