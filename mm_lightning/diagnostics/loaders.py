"""The loaders of a run while it is not them that run: of validation and training data during a test."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DistributedSampler

from mm_lightning.diagnostics.training_rows import pass_over
from mm_lightning.namespaces import LightningModule, Trainer, package_of

__all__ = ["Loader", "loader_of", "loaders_of_fit"]

_STAGES = {"train": "fit", "val": "validate"}


class Loader(NamedTuple):
    """A loader, and how it is gone through.

    Attributes:
        batches: Of the first one, if there are several.
        length: So many batches at most.
        is_shared: Whether each process sees rows of its own, not all of them.
    """

    batches: CombinedLoader
    length: float
    is_shared: bool

    def show(self, trainer: Trainer, module: LightningModule, see: Callable[[Any], bool]) -> None:
        """Show the batches to ``see``, as :func:`pass_over` does."""
        pass_over(trainer, module, self.batches, self.length, see)


def loaders_of_fit(trainer: Trainer) -> dict[str, Any]:
    """Return the loaders that a fit has used, by split; the trainer forgets them when it tests."""
    return {"train": trainer.train_dataloader, "val": trainer.val_dataloaders}


def loader_of(
    trainer: Trainer, module: LightningModule, split: str, data: Any = None, of_fit: Mapping[str, Any] | None = None
) -> Loader | None:
    """Return the loader of a split: of ``data``, of the ``fit`` before, of the data module, or of the module.

    Args:
        trainer: It tests.
        module: The module.
        split: ``"train"`` or ``"val"``.
        data: A data module, or anything that has ``train_dataloader`` or ``val_dataloader``.
        of_fit: What :func:`loaders_of_fit` returned.

    Returns:
        The loader, None if there is none.
    """
    held = (of_fit or {}).get(split)
    if data is not None or held is None:
        held = _made(trainer, module, split, data)
    if isinstance(held, Sequence) and not len(held):
        held = None
    if held is None:
        return None
    first = held[0] if split == "val" and isinstance(held, (list, tuple)) else held
    limit = trainer.limit_val_batches if split == "val" else trainer.limit_train_batches
    loader = CombinedLoader(first, "min_size")
    shared = [isinstance(getattr(one, "sampler", None), DistributedSampler) for one in loader.flattened]
    return Loader(loader, _length(first, limit), all(shared))


def _made(trainer: Trainer, module: LightningModule, split: str, data: Any) -> Any:
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    hook = f"{split}_dataloader"
    is_overridden = package_of(trainer).utilities.model_helpers.is_overridden
    for source in (data,) if data is not None else (datamodule, module):
        if source is None or not hasattr(source, hook):
            continue
        is_of_lightning = source is datamodule or source is module or hasattr(source, "prepare_data")
        if is_of_lightning and not is_overridden(hook, source):
            continue
        if source is not module and hasattr(source, "setup"):
            source.setup(_STAGES[split])
        return getattr(source, hook)()
    return None


def _length(loader: Any, limit: float) -> float:
    if isinstance(limit, int):
        return limit
    try:
        return math.inf if limit == 1.0 else int(len(loader) * limit)
    except TypeError:  # of a loader without length
        return math.inf
