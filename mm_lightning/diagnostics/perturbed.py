"""A classifier on changed inputs, attacked, deformed or worse, while it is tested."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from mm_lightning.diagnostics.classified import Classifier
from mm_lightning.diagnostics.hidden_states import OUTPUT, HiddenStates, gathered
from mm_lightning.evaluation.bounds import InputBounds
from mm_lightning.evaluation.modes import evaluating
from mm_lightning.evaluation.rows import IGNORED, check_targets, class_logits
from mm_lightning.evaluation.scores import scores
from mm_lightning.mixup.batch import map_leaves
from mm_lightning.namespaces import LightningModule, Trainer

__all__ = ["Perturbed"]

_LOGGED = ("acc", "nll", "ece", "brier")
_SEED_STRIDE = 1_000_003  # between the processes
ByPerturbation = dict[str, dict[str, dict[str, float]]]


class Perturbed:
    """Runs the module on changed copies of the test batches, and keeps the logits.

    The inputs are the first floating point tensor of what ``forward`` runs on. Each perturbation draws from a generator
    of its own, with the same seed, so that what one draws does not depend on which others there are.

    Args:
        perturbations: By group: ``attacks``, ``deformations`` and ``shifts``.
        classifier: Where inputs, logits and targets are.
        bounds: Of the inputs, which deformations alone do without.
        max_rows: Only the first so many rows are changed, on each process.
        seed: Of the draws.

    Attributes:
        obstacle: Why this is not possible, as the end of a sentence; None while it is.
    """

    def __init__(
        self,
        perturbations: Mapping[str, Sequence[Any]],
        classifier: Classifier,
        bounds: InputBounds | None,
        max_rows: int,
        seed: int,
    ) -> None:
        self.perturbations = {group: list(each) for group, each in perturbations.items()}
        self.classifier = classifier
        self.bounds = bounds
        self.seed = seed
        self.obstacle: str | None = None
        self._room = max_rows
        self._rngs: dict[str, torch.Generator] = {}
        self._logits: dict[str, list[Tensor]] = {}
        self._targets: list[Tensor] = []

    def see(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        """Run the module on each changed copy of a batch."""
        if self.obstacle is not None or self._room == 0:
            return
        # neither in the loop's inference mode, where nothing can be differentiated, nor with tensors made in it
        with isolate_rng(), torch.inference_mode(False), torch.no_grad(), evaluating(module):
            copy = map_leaves(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, batch)
            try:
                self._see(trainer, module, copy)
            except (RuntimeError, TypeError, ValueError) as error:
                self.obstacle = str(error).rstrip(".")

    def measured(self, module: LightningModule, num_bins: int) -> ByPerturbation | str:
        """Return the scores by group and perturbation, or why there are none. To be called by every process."""
        has_rows = self.obstacle is None and bool(self._targets)
        if not module.trainer.strategy.reduce_boolean_decision(has_rows, all=True):
            return self.obstacle or "no rows were seen"
        targets = self._whole(self._targets, module)
        kept = targets != IGNORED
        found: ByPerturbation = {}
        for group, perturbations in self.perturbations.items():
            for one in perturbations:
                logits = self._whole(self._logits[one.name], module)[kept].double()
                if not len(logits) or not logits.isfinite().all():
                    return f"all targets are {IGNORED}" if not len(logits) else f"{one.name} makes logits infinite"
                numbers = scores(logits.log_softmax(dim=1), targets[kept], num_bins)
                found.setdefault(group, {})[one.name] = {name: numbers[name] for name in _LOGGED}
        return found

    def _see(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        inputs = self.classifier.inputs_of(batch)
        if inputs is None:
            raise ValueError("forward runs on no floating point tensor of the batch, which could be changed")
        targets = self.classifier.targets_of(batch, len(inputs))
        rows = min(self._room, len(inputs))

        def logits_of(changed: Tensor) -> Tensor:
            replaced = map_leaves(lambda leaf: changed if leaf is inputs else leaf, batch)
            with trainer.precision_plugin.forward_context():
                output = _run(module, self.classifier, replaced)
            logits = class_logits(output, len(changed), self.classifier.probabilities)
            check_targets(targets, logits.shape[1])
            return logits

        for group, perturbations in self.perturbations.items():
            for one in perturbations:
                changed = self._changed(group, one, logits_of, inputs, targets.long(), trainer.global_rank)
                self._logits.setdefault(one.name, []).append(logits_of(changed)[:rows].float().cpu())
        self._targets.append(targets[:rows].long().cpu())
        self._room -= rows

    def _changed(
        self, group: str, one: Any, logits_of: Callable[[Tensor], Tensor], inputs: Tensor, targets: Tensor, rank: int
    ) -> Tensor:
        fresh = torch.Generator().manual_seed(self.seed + _SEED_STRIDE * rank)
        rng = self._rngs.setdefault(one.name, fresh)
        if group == "attacks":
            return one(logits_of, inputs, targets, self.bounds, rng)
        return one(inputs, self.bounds, rng) if group == "shifts" else one(inputs, rng)

    @staticmethod
    def _whole(parts: list[Tensor], module: LightningModule) -> Tensor:
        own = torch.cat(parts)
        return gathered(own, module) if module.trainer.world_size > 1 else own


def _run(module: LightningModule, classifier: Classifier, batch: Any) -> Any:
    """What the layer puts out for a batch, with its graph."""
    layer, outputs = classifier.layer, []

    def overhear(one: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output)

    handle = HiddenStates([layer], 1).find(module)[layer].register_forward_hook(overhear)
    try:
        returned = classifier.forward(module, batch)
    finally:
        handle.remove()
    if not outputs and layer != OUTPUT:
        raise RuntimeError(f"layer {layer!r} did not run in forward")
    return outputs[-1] if outputs else returned
