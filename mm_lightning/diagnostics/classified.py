"""A module taken for a classifier: where its logits are, and what was overheard of them, or why it is none."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from mm_lightning.diagnostics.hidden_states import HiddenStates, first_floats, last_integers
from mm_lightning.diagnostics.training_rows import first_entry, run_on_first_entry
from mm_lightning.evaluation.modes import evaluating
from mm_lightning.evaluation.rows import IGNORED, check_targets, class_logits
from mm_lightning.namespaces import LightningModule, Trainer

__all__ = ["Classified", "Classifier", "OverheardLogits"]


class Classifier(NamedTuple):
    """How a module is taken for a classifier.

    Attributes:
        layer: Where the logits are: the dotted name of a submodule, or ``"output"``.
        forward: Runs the module on a batch.
        targets: Finds the class indices in a batch; None takes the last integer tensor with one entry per row.
        probabilities: Whether the layer gives probabilities, not logits.
    """

    layer: str
    forward: Callable[[LightningModule, Any], Any]
    targets: Callable[[Any], Tensor] | None
    probabilities: bool

    def inputs_of(self, batch: Any) -> Tensor | None:
        """Return the first floating point tensor of what ``forward`` runs on, itself; None if there is none."""
        return first_floats(first_entry(batch) if self.forward is run_on_first_entry else batch)

    def targets_of(self, batch: Any, rows: int) -> Tensor:
        """Return the class indices of a batch, (rows,).

        Raises:
            ValueError: If there are none.
        """
        return self.targets(batch) if self.targets else last_integers(batch, rows)


class Classified(NamedTuple):
    """Rows of a classifier, of all processes, on the CPU."""

    logits: Tensor  # (N, K), float64
    targets: Tensor  # class indices, int64, (N,)


class OverheardLogits:
    """Collects the logits of a classifier beside the targets of the same rows.

    Args:
        classifier: Where they are.
        max_rows: Only the first so many rows are kept, on each process.

    Attributes:
        obstacle: Why the module is no classifier, as the end of a sentence; None while it may be one.
    """

    def __init__(self, classifier: Classifier, max_rows: int) -> None:
        self.classifier = classifier
        self.obstacle: str | None = None
        self._states = HiddenStates([classifier.layer], max_rows, classifier.targets)

    @property
    def is_open(self) -> bool:
        """Whether it listens."""
        return self._states.is_open

    @property
    def is_cut(self) -> bool:
        """Whether there were more rows than are kept."""
        return self._states.is_cut

    @property
    def is_done(self) -> bool:
        """Whether no further batch would be kept."""
        return self._states.is_full or self.obstacle is not None

    def open(self, module: LightningModule) -> None:
        """Begin to listen, and forget what was kept before.

        Raises:
            ValueError: If there is no such layer.
        """
        self.obstacle = None
        self._states.open(module)

    def close(self) -> None:
        """Take the hooks off, and forget what was kept."""
        self._states.close()

    def paused(self) -> AbstractContextManager[None]:
        """Overhear nothing for a while."""
        return self._states.paused()

    def keep(self, trainer: Trainer, module: LightningModule, batch: Any, may_run: bool) -> None:
        """Keep the logits of a batch; with ``may_run`` by a call of ``forward`` where the step ran no such layer."""
        if self.obstacle is not None:
            return
        try:
            try:
                self._states.keep(batch)
            except RuntimeError:  # the step did not run the layer
                if not may_run:
                    raise
                with isolate_rng(), evaluating(module), torch.no_grad(), trainer.precision_plugin.forward_context():
                    self.classifier.forward(module, batch)
                self._states.keep(batch)
        except (RuntimeError, TypeError, ValueError) as error:
            self.obstacle = str(error).rstrip(".")

    def rows(self, module: LightningModule, gather: bool = True) -> Classified | str:
        """Return the rows of all processes, or why they are none of a classifier. To be called by every process.

        Args:
            module: The module.
            gather: Whether each process has rows of its own.
        """
        if self.obstacle is not None:
            self._states.close()  # without rows here, no process gets any, and all of them log the same
        collected = self._states.collected(module, gather)
        if self.obstacle is not None or collected is None:
            return self.obstacle or "no rows were seen"
        layer = self.classifier.layer
        outputs, targets = collected[0][layer], collected[1].long()
        if len(shape := self._states.row_shapes[layer]) > 1:
            return f"{layer!r} gives {shape} for a row, not a logit for each class"
        kept = targets != IGNORED
        outputs, targets = outputs[kept], targets[kept]
        if not len(targets):
            return f"all targets are {IGNORED}"
        if not outputs.isfinite().all():
            return f"{layer!r} has values that are not finite"
        try:
            logits = class_logits(outputs.double(), len(outputs), self.classifier.probabilities)
            check_targets(targets, logits.shape[1])
        except (TypeError, ValueError) as error:
            return str(error).rstrip(".")
        return Classified(logits, targets)
