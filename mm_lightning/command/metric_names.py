"""What a metric's name says: whether it is of a validation, and whether more or less of it is better."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["direction_of", "found_metric", "is_of_regression", "unfit_split"]

_VALIDATION = {"val", "valid", "validation", "dev"}
# What a metric's name says, the most telling first; the same metric per step is not what an epoch is judged by.
_HIGHER = ("acc", "accuracy", "top1", "acc1", "f1", "auroc", "auc", "map", "miou", "iou", "dice", "r2", "score")
_LOWER = ("loss", "nll", "error", "err", "mse", "rmse", "mae", "perplexity", "ppl", "wer", "cer", "fid", "ece", "brier")
_OF_REGRESSION = {"mse", "rmse", "mae", "r2"}


def found_metric(logged: Iterable[str]) -> str | None:
    """Return the key that tells best how good a model is: an accuracy of the validation rather than a loss, or None.

    Example:
        >>> found_metric(["train_loss", "val_loss", "val_acc"])
        'val_acc'
    """
    ranks = {key: _rank(key) for key in logged}
    known = [(rank, key) for key, rank in ranks.items() if rank is not None]
    return min(known)[1] if known else None


def direction_of(key: str) -> str | None:
    """Return whether more (``"max"``) or less (``"min"``) of a metric is better, or None if its name does not tell."""
    words = _words(key)
    return "max" if words & set(_HIGHER) else "min" if words & set(_LOWER) else None


def is_of_regression(logged: Iterable[str]) -> bool:
    """Return whether any key names an error of numbers, which no classifier logs."""
    return any(_words(key) & _OF_REGRESSION for key in logged)


def unfit_split(key: str) -> str | None:
    """Return ``"test"`` or ``"training"`` if a metric is of such data, by which nothing may be chosen; else None."""
    words = _words(key)
    return "test" if "test" in words else "training" if words & {"train", "training"} else None


def _rank(key: str) -> tuple[int, int] | None:
    words = _words(key)
    if not words & _VALIDATION or "step" in words or unfit_split(key):
        return None
    places = [place for place, name in enumerate((*_HIGHER, *_LOWER)) if name in words]
    return (min(places), len(words)) if places else None


def _words(key: str) -> set[str]:
    apart = re.sub(r"([a-z])([A-Z])", r"\1 \2", key)  # valLoss
    return {word for word in re.split(r"[^a-z0-9]+", apart.lower()) if word}
