"""What a test asks of a classifier beyond scores: changed inputs, neighbours and spectra of hidden states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from mm_lightning.diagnostics.choices import GROUPS, fitting
from mm_lightning.diagnostics.classified import Classifier
from mm_lightning.diagnostics.hidden_states import INPUT, HiddenStates, first_floats
from mm_lightning.diagnostics.loaders import loader_of
from mm_lightning.diagnostics.perturbed import Perturbed
from mm_lightning.evaluation.bounds import InputBounds, bounds_of_images, bounds_of_rows
from mm_lightning.evaluation.rows import IGNORED
from mm_lightning.evaluation.spectrum import class_spectrum, spectrum_numbers
from mm_lightning.namespaces import LightningModule, Trainer

__all__ = ["CloserLook", "Found"]

_ROWS = 10_000  # on which bounds are measured
Found = dict[str, dict[str, dict[str, float]]]  # numbers by group and by what they are of


class CloserLook:
    """Takes a closer look in one test, batch by batch. What is not possible is left out, and ``remarks`` say why.

    Args:
        choice: By group, ``attacks``, ``deformations``, ``shifts``, ``neighbours`` and ``spectra``: what :func:`chosen`
            returns.
        classifier: Where inputs, logits and targets are.
        bounds: Of the inputs; None asks the data module or else the training data.
        max_rows: Only the first so many rows of test and training data are seen, on each process.
        num_bins: Of the calibration error.
        seed: Of the draws.
        data: Data module that training data are taken from; None is the trainer's.
        of_fit: Loaders of the fit before, by split.

    Attributes:
        settings: What was chosen, for a file.
    """

    def __init__(
        self,
        choice: dict[str, Any],
        classifier: Classifier,
        *,
        bounds: InputBounds | None,
        max_rows: int,
        num_bins: int,
        seed: int,
        data: Any,
        of_fit: dict[str, Any],
    ) -> None:
        self.choice = choice
        self.classifier = classifier
        self.bounds = bounds
        self.max_rows = max_rows
        self.num_bins = num_bins
        self.seed = seed
        self.data = data
        self.of_fit = of_fit
        self.remarks: list[str] = []
        self.settings: dict[str, Any] = {}
        self._perturbed: Perturbed | None = None
        self._hidden = HiddenStates([], max_rows, classifier.targets)
        self._bank: tuple[Tensor, Tensor] | None = None
        self._neighbour_layer = ""
        self._spectrum_layers: list[str] = []

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        """Look at the training data as far as they are needed, and begin to overhear."""
        if (self.choice["attacks"] or self.choice["shifts"]) and self.bounds is None:
            self.bounds = self._bounds(trainer, module)
        neighbours, spectra = self.choice["neighbours"], self.choice["spectra"]
        if neighbours:
            self._neighbour_layer = neighbours.layer or self._before_the_head(module, "neighbours")
        if self._neighbour_layer:
            self._bank = self._training_states(trainer, module, self._neighbour_layer)
        if spectra:
            before = [] if spectra is not True else [self._before_the_head(module, "spectra")]
            self._spectrum_layers = [layer for layer in before or spectra if layer]
        layers = [*self._spectrum_layers, *([self._neighbour_layer] if self._bank else [])]
        self._hidden = HiddenStates(list(dict.fromkeys(layers)), self.max_rows, self.classifier.targets)
        if layers:
            self._hidden.open(module)

    def see(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        """Keep the hidden states of a batch of the test, and run the module on changed copies of it."""
        if self._hidden.is_open:
            try:
                self._hidden.keep(batch)
            except (RuntimeError, TypeError, ValueError) as error:
                self._hidden.close()
                self._leave_out(self._asked("neighbours", "spectra"), str(error))
        if not any(self.choice[group] for group in GROUPS):
            return
        if self._perturbed is None:
            self._perturbed = self._perturbations(batch)
        with self._hidden.paused():
            self._perturbed.see(trainer, module, batch)

    def measured(self, module: LightningModule) -> Found:
        """Return the numbers by group and what they are of. To be called by every process."""
        found: Found = {}
        if self._perturbed is not None and any(self._perturbed.perturbations.values()):
            of_changed = self._perturbed.measured(module, self.num_bins)
            if isinstance(of_changed, str):
                self._leave_out(" and ".join(self._perturbed.perturbations), of_changed)
            else:
                found |= of_changed
        if self._hidden.layers:
            found |= self._of_hidden(module)
        return found

    def close(self) -> None:
        """Take the hooks off."""
        self._hidden.close()

    def _of_hidden(self, module: LightningModule) -> Found:
        collected = self._hidden.collected(module)
        self._hidden.close()
        if collected is None:
            return {}
        kept = collected[1] != IGNORED
        hidden, targets = {layer: rows[kept] for layer, rows in collected[0].items()}, collected[1][kept]
        found: Found = {}
        try:
            for layer in self._spectrum_layers:
                numbers: dict[str, float] = {}
                for ending, centred in (("", False), ("_centred", True)):
                    values, _ = class_spectrum(hidden[layer], targets, centred)
                    numbers |= {f"{name}{ending}": value for name, value in spectrum_numbers(values).items()}
                found.setdefault("spectra", {})[layer] = numbers
            if self._bank is not None:
                acc = self.choice["neighbours"](*self._bank, hidden[self._neighbour_layer], targets)
                found["neighbours"] = {self._neighbour_layer: {"acc": acc}}
        except ValueError as error:
            self._leave_out(self._asked("neighbours", "spectra"), str(error))
        return found

    def _perturbations(self, batch: Any) -> Perturbed:
        """Those that fit the inputs of a batch."""
        inputs = self.classifier.inputs_of(batch)
        shape = () if inputs is None else tuple(inputs.shape[1:])
        are_images = inputs is None or len(shape) == 3  # without inputs all of it is refused together
        groups: dict[str, list[Any]] = {}
        for group in filter(self.choice.get, GROUPS):
            possible, impossible = fitting(group, self.choice[group], are_images)
            if impossible:
                self._leave_out(impossible, f"inputs are {shape} a row, not images")
            if possible and (group == "deformations" or self.bounds is not None):
                groups[group] = possible
                self.settings[group] = [{"name": one.name, **asdict(one)} for one in possible]
        if self.bounds is not None and groups:
            self.settings["unit"] = self.bounds.words
        self.settings["seed"] = self.seed
        return Perturbed(groups, self.classifier, self.bounds, self.max_rows, self.seed)

    def _bounds(self, trainer: Trainer, module: LightningModule) -> InputBounds | None:
        data = trainer.datamodule if self.data is None else self.data  # type: ignore[attr-defined]
        if (known := getattr(data, "normalization", None)) is not None:
            try:
                return bounds_of_images(*known)
            except (TypeError, ValueError):
                must = f"the normalization of {type(data).__name__} must be (means, deviations), a number a channel"
                self._leave_out(self._asked("attacks", "shifts"), f"{must}, got {known!r}")
                return None
        states = HiddenStates([INPUT], min(self.max_rows, _ROWS), lambda batch: _rows(batch))

        def see(batch: Any) -> bool:
            states.keep(batch)
            return states.is_full

        found = self._pass(trainer, module, states, see, self._asked("attacks", "shifts"))
        if found is None:
            return None
        rows = found[0][INPUT]
        return bounds_of_rows(rows.reshape(len(rows), *states.row_shapes[INPUT]))

    def _training_states(self, trainer: Trainer, module: LightningModule, layer: str) -> tuple[Tensor, Tensor] | None:
        states = HiddenStates([layer], self.max_rows, self.classifier.targets)

        def see(batch: Any) -> bool:
            self.classifier.forward(module, batch)
            states.keep(batch)
            return states.is_full

        found = self._pass(trainer, module, states, see, "neighbours")
        if found is None:
            return None
        kept = found[1] != IGNORED
        settings = asdict(self.choice["neighbours"])
        self.settings["neighbours"] = {**settings, "layer": layer, "rows": int(kept.sum())}
        return found[0][layer][kept], found[1][kept]

    def _pass(
        self, trainer: Trainer, module: LightningModule, states: HiddenStates, see: Callable[[Any], bool], what: str
    ) -> tuple[dict[str, Tensor], Tensor] | None:
        loader = loader_of(trainer, module, "train", self.data, self.of_fit)
        if loader is None:
            self._leave_out(what, "there are no training data; pass data=, or test with a data module")
            return None
        states.open(module)
        try:
            loader.show(trainer, module, see)
            found = states.collected(module, loader.is_shared)
        except (RuntimeError, TypeError, ValueError) as error:
            self._leave_out(what, str(error))
            return None
        finally:
            states.close()
        if found is None:
            self._leave_out(what, "no training rows were seen")
        return found

    def _before_the_head(self, module: nn.Module, what: str) -> str:
        linear = [name for name, one in module.named_modules() if isinstance(one, nn.Linear)]
        if not linear:
            self._leave_out(what, f"{type(module).__name__} has no Linear layer; name a layer")
        return f"{linear[-1]}:input" if linear else ""

    def _asked(self, *groups: str) -> str:
        return " and ".join(filter(self.choice.get, groups))

    def _leave_out(self, what: str, why: str) -> None:
        self.remarks.append(f"{what}: left out, for {why.rstrip('.')}.")


def _rows(batch: Any) -> Tensor:
    inputs = first_floats(batch)
    return torch.zeros(0 if inputs is None else len(inputs), dtype=torch.int64)
