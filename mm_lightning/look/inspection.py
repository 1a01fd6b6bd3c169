"""Which layers of a module can be mixed, and which ``layers="auto"`` chooses: ``mm_lightning.inspect``."""

from __future__ import annotations

import html
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from mm_lightning.look.eligible import Proofs, choose_places
from mm_lightning.look.look import Look, check_batch_dim
from mm_lightning.look.rows_of_interpolation import unfit
from mm_lightning.mixup import INPUT, Layer, MixPoint
from mm_lightning.mixup.batch import check_batch_size
from mm_lightning.mixup.plan import Interpolation
from mm_lightning.namespaces import LightningModule, package_of

__all__ = ["Inspection", "LayerReport", "inspect"]


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
    """What was found; ``str`` of it is the table, which a notebook shows as one.

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
        rows = self._rows()
        widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
        lines = ["  ".join([*map(str.ljust, row[:-1], widths), row[-1]]).rstrip() for row in rows]
        return "\n".join([*lines, "", self._choice()])

    def _repr_html_(self) -> str:
        """Return the table as notebooks show it."""
        heading, *rows = ([html.escape(cell) for cell in row] for row in self._rows())
        head = "".join(f"<th>{cell}</th>" for cell in heading)
        body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>\n" for row in rows)
        table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"
        return f"{table}\n<p>{html.escape(self._choice())}</p>"

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [("layer", "type", "output shape", "depth", "auto", "safe to mix")]
        for layer in self.layers:
            shape = "-" if layer.shape is None else "x".join(map(str, layer.shape)) or "scalar"
            depth = f"{layer.depth:.2f}" if layer.safe else ""
            rows.append((layer.name, layer.type, shape, depth, "*" if layer.chosen else "", _yes_or_no(layer)))
        return rows

    def _choice(self) -> str:
        return f'layers="auto" mixes at {", ".join(map(repr, self.chosen)) or "nothing"}.'


def inspect(
    module: LightningModule,
    batch: Any,
    *,
    batch_dim: int | Mapping[str, int] | None = None,
    batch_size: int | None = None,
    interpolation: Interpolation | None = None,
    per_sample: bool = False,
) -> Inspection:
    """Look at one training step and report where the batch may be mixed.

    ``training_step`` runs as it would before the first batch of a fit: as it is, with the batch's rows in another
    order, and once for each layer that no way was seen to lead around, with that layer's rows in another order.
    Weights, buffers, metrics, gradients, modes and random states are put back, and nothing is logged.

    Args:
        module: A LightningModule, with or without a trainer.
        batch: A batch as ``training_step`` takes it, on the module's device.
        batch_dim: Dimension of the layers' outputs that holds the batch; or a dict of it for some. None learns it.
        batch_size: Number of rows. None tells it by the batch.
        interpolation: Whose fit to the layers is judged, too; None is the linear one, which fits all.
        per_sample: Whether rows have weights of their own.

    Returns:
        The report.

    Raises:
        TypeError: If ``module`` is no LightningModule, ``batch_dim`` or ``batch_size`` no integer, or the batch has no
            tensors.
        ValueError: If ``batch_dim`` is negative or names no layer, or ``batch_size`` is below 1.
        LookFailed: If ``training_step`` fails. It is of the class of what the step raised, too.

    Example:
        >>> print(mm_lightning.inspect(module, next(iter(loader))))  # doctest: +SKIP
    """
    if not isinstance(module, LightningModule):
        raise TypeError(f"inspect takes a LightningModule, got {type(module).__name__}.")
    check_batch_dim(batch_dim)
    if batch_size is not None:
        check_batch_size(batch_size)
    with _with_a_trainer(module):
        arguments = _arguments(module, batch)
        look = Look(module, module.training_step, arguments, {}, batch_dim=batch_dim, batch_size=batch_size)
        proofs = Proofs(look, per_sample)

        def problem_of(layer: Layer) -> str:
            place = look.places[layer.name]
            found = place.problem or place.way_around or _problem_of(proofs, layer)
            return found or unfit(look, layer, interpolation, per_sample)

        problems = {name: problem_of(Layer(name, (part,))) for name, part in look.modules.items()}
        input_problem = look.entries.problem or _problem_of(proofs, look.input_layer)
        input_problem = input_problem or unfit(look, look.input_layer, interpolation, per_sample)
    points = {name for name, part in look.modules.items() if isinstance(part, MixPoint)}
    auto = choose_places(list(look.places.values()), lambda place: not problems[place.name])
    fitting = {name for name in points if not (input_problem if name == INPUT else problems[name])}
    chosen = fitting if points else {place.name for place in auto}
    embedded = ", ".join(call.name for call in look.entries.embeddings)
    reports = [
        LayerReport(
            INPUT,
            f"the batch (after {embedded})" if embedded else "the batch",
            look.input_shape,
            not input_problem,
            input_problem,
            (INPUT in points or not points) and not input_problem,
            0.0,
        )
    ]
    for name, place in look.places.items():
        if name != INPUT:
            kind = type(look.modules[name]).__name__
            safe = not problems[name]
            depth = place.depth if safe else 0.0
            reports.append(LayerReport(name, kind, place.shape, safe, problems[name], name in chosen, depth))
    return Inspection(tuple(reports))


def _problem_of(proofs: Proofs, layer: Layer) -> str:
    proof = proofs.of(layer)
    return proofs.explain(proof) if proof.problem else ""


def _arguments(module: LightningModule, batch: Any) -> tuple[Any, ...]:
    """What Lightning calls ``training_step`` with."""
    takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    return (batch, 0) if takes_index else (batch,)


@contextmanager
def _with_a_trainer(module: LightningModule) -> Iterator[None]:
    """Lend the module a trainer, if it has none: training steps ask it for the global step and the like."""
    if module._trainer is not None:  # the property raises
        yield
        return
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        module.trainer = package_of(module).Trainer(
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
