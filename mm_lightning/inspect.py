"""Which layers of a module can be mixed, and which ``layers="auto"`` chooses.

In Python ``mm_lightning.inspect(module, batch)``; for a configured experiment
``python -m mm_lightning.inspect +experiment=mnist_bottleneck``, which takes what ``mm_lightning.train`` takes.
"""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from mm_lightning import failure
from mm_lightning.mixup import INPUT, MixPoint, named_layers
from mm_lightning.mixup.choice import choose_places
from mm_lightning.probe import look_at
from mm_lightning.step import batch_size_of

__all__ = ["Inspection", "LayerReport", "inspect", "main"]


@dataclass(frozen=True)
class LayerReport:
    """One layer of a module.

    Attributes:
        name: The name that ``layers`` takes.
        type: Class of the module.
        shape: Shape of its output, of the first if it returns several tensors; None if it did not run.
        safe: Whether every path from the batch to the loss runs through its output.
        reason: Why not; empty if it is safe.
        chosen: Whether ``layers="auto"`` mixes here.
        depth: Share of the weighted layers that the batch has passed at its end, in [0, 1].
    """

    name: str
    type: str
    shape: tuple[int, ...] | None
    safe: bool
    reason: str
    chosen: bool
    depth: float


@dataclass(frozen=True)
class Inspection:
    """What was found; ``str`` of it is the table.

    Attributes:
        layers: Every layer, ``"input"`` first, in the order of ``named_modules``.
    """

    layers: tuple[LayerReport, ...]

    @property
    def chosen(self) -> tuple[str, ...]:
        """The layers of ``layers="auto"``."""
        return tuple(layer.name for layer in self.layers if layer.chosen)

    @property
    def safe(self) -> tuple[str, ...]:
        """The layers that the whole computation runs through."""
        return tuple(layer.name for layer in self.layers if layer.safe)

    def __str__(self) -> str:
        rows = [("layer", "type", "output shape", "depth", "auto", "safe to mix")]
        for layer in self.layers:
            shape = "-" if layer.shape is None else "x".join(map(str, layer.shape)) or "scalar"
            depth = f"{layer.depth:.2f}" if layer.safe else ""
            rows.append((layer.name, layer.type, shape, depth, "*" if layer.chosen else "", _yes_or_no(layer)))
        widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
        lines = ["  ".join([*map(str.ljust, row[:-1], widths), row[-1]]).rstrip() for row in rows]
        chosen = ", ".join(map(repr, self.chosen)) or "nothing"
        return "\n".join([*lines, "", f'layers="auto" mixes at {chosen}.'])


def inspect(module: pl.LightningModule, batch: Any, *, batch_dim: int | dict[str, int] = 0) -> Inspection:
    """Look at one training step and report where the batch may be mixed.

    ``training_step`` runs once, as it would for the first batch of a fit; weights, buffers, metrics, gradients, modes
    and random states are put back and nothing is logged.

    Args:
        module: A LightningModule, with or without a trainer.
        batch: A batch as ``training_step`` takes it, on the module's device.
        batch_dim: Dimension of the layers' outputs that holds the batch; or a dict of the layers for which it is not 0.

    Returns:
        The report.

    Raises:
        TypeError: If ``module`` is no LightningModule, or the batch has no tensors.
        Exception: What ``training_step`` raises.

    Example:
        >>> print(mm_lightning.inspect(module, next(iter(loader))))  # doctest: +SKIP
    """
    if not isinstance(module, pl.LightningModule):
        raise TypeError(f"inspect takes a LightningModule, got {type(module).__name__}.")
    modules = named_layers(module)
    with _with_a_trainer(module):
        view = look_at(module, module.training_step, _arguments(module, batch), {}, batch_size_of(batch), batch_dim)
    points = {name for name, part in modules.items() if isinstance(part, MixPoint)}
    chosen = points or {place.name for place in choose_places(view.places)}
    is_input_chosen = INPUT in points or not points
    embedded = f" (after {', '.join(view.embeddings)})" if view.embeddings else ""
    reports = [
        LayerReport(
            INPUT,
            f"the batch{embedded}",
            view.input_shape,
            not view.input_problem,
            view.input_problem,
            is_input_chosen and not view.input_problem,
            0.0,
        )
    ]
    for place in view.places:
        if place.name != INPUT:
            kind = type(modules[place.name]).__name__
            reports.append(
                LayerReport(
                    place.name, kind, place.shape, place.is_safe, place.reason, place.name in chosen, place.depth
                )
            )
    return Inspection(tuple(reports))


def main(overrides: Sequence[str] | None = None) -> None:
    """Run the command line: print the table for the first training batch of a configured experiment."""
    from mm_lightning.train import CONF, quieten  # the command, not the function, needs the configuration

    with failure.as_one_line():
        try:
            quieten()
            with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
                config = compose("train", overrides=list(sys.argv[1:] if overrides is None else overrides))
            pl.seed_everything(config.seed, verbose=False)
            data: pl.LightningDataModule = instantiate(config.data)
            module: pl.LightningModule = instantiate(config.model)
            data.prepare_data()
            data.setup("fit")
            print(inspect(module, next(iter(data.train_dataloader()))))
        except Exception as error:
            raise failure.JobFailed(error) from error


def _arguments(module: pl.LightningModule, batch: Any) -> tuple[Any, ...]:
    """What Lightning calls ``training_step`` with."""
    takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    return (batch, 0) if takes_index else (batch,)


@contextmanager
def _with_a_trainer(module: pl.LightningModule) -> Iterator[None]:
    """Lend the module a trainer, if it has none: training steps ask it for the global step and the like."""
    if module._trainer is not None:  # the property raises
        yield
        return
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        module.trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        yield
    finally:
        module.trainer = None
        log.setLevel(level)


def _yes_or_no(layer: LayerReport) -> str:
    return "yes" if layer.safe else f"no: {layer.reason}"


class _CallableModule(types.ModuleType):
    """``mm_lightning.inspect`` names this module, for ``python -m``, and the function in it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Inspection:
        return inspect(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    main()
