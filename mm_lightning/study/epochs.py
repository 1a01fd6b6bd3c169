"""How many epochs a run has: one number, wherever it was said."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig

__all__ = ["one_number_of_epochs"]


def one_number_of_epochs(config: DictConfig, overrides: Sequence[str]) -> None:
    """Let ``max_epochs`` and ``trainer.max_epochs`` be one number, in place.

    ``trainer=smoke`` has one of its own, which gives way to a ``max_epochs`` that was typed.

    Args:
        config: The composed configuration of a run.
        overrides: What was typed, as Hydra lists it.

    Raises:
        ValueError: If both were typed and differ.
    """
    trainer = config.get("trainer")
    if "max_epochs" not in config or not trainer or "max_epochs" not in trainer:
        return
    own, of_trainer = config.max_epochs, trainer.max_epochs
    if own == of_trainer and type(own) is type(of_trainer):
        return
    typed = {word.split("=")[0].lstrip("+") for word in overrides}
    if {"max_epochs", "trainer.max_epochs"} <= typed:
        raise ValueError(f"max_epochs is {own} and trainer.max_epochs is {of_trainer}. Say max_epochs alone.")
    if "max_epochs" in typed:
        trainer.max_epochs = own
    else:
        config.max_epochs = of_trainer
