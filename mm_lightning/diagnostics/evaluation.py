"""What a classifier is worth beyond its own test: scores, also after temperature scaling, and a closer look."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from mm_lightning.arguments import check_count, check_flag, refusal
from mm_lightning.diagnostics.choices import chosen
from mm_lightning.diagnostics.classified import Classifier, OverheardLogits
from mm_lightning.diagnostics.closer_look import CloserLook, Found
from mm_lightning.diagnostics.evaluated import evaluated, of_groups
from mm_lightning.diagnostics.loaders import loader_of, loaders_of_fit
from mm_lightning.diagnostics.occasions import is_last_validation
from mm_lightning.diagnostics.temperature_pass import Fitted, fitted_by_a_pass
from mm_lightning.diagnostics.training_rows import run_on_first_entry
from mm_lightning.evaluation.bounds import InputBounds
from mm_lightning.evaluation.neighbours import Neighbours
from mm_lightning.evaluation.scores import Reliability
from mm_lightning.evaluation.temperature import TemperatureFit, TemperatureScaling
from mm_lightning.namespaces import CallbackOfBoth, LightningModule, Trainer

__all__ = ["Evaluation"]


class Evaluation(CallbackOfBoth):
    """Measure how good and how sure a classifier is, and what temperature scaling makes of it, without drawing.

    The scores (:func:`mm_lightning.evaluation.scores`) are those of the last validation of ``fit``, also where it stops
    early, of every ``trainer.validate`` and of every ``trainer.test``. The logits are overheard while the module's own
    steps run, without a further forward pass; where a step does not run the layer, ``forward`` is called. Of several
    dataloaders the first is used. Rows with the target -100 are left out.

    With ``temperature`` a test begins with a pass over the validation data, with the weights that are tested, and
    :class:`mm_lightning.evaluation.TemperatureScaling` is fitted to their logits. A temperature that they hardly
    determine, or none, is warned about with its interval or the reason. The validation data are those of ``data``, of
    ``fit`` before, of the data module (its ``setup("validate")`` is called) or of the module; none where the data
    module says that they are the test data (``validates_on_test``).

    The other groups are measured in a test alone, on the first ``extra_points`` rows, and each costs what it says:

    - ``attacks``: one forward and one backward pass for each step of an attack, and a forward pass.
    - ``deformations``, ``shifts``: a forward pass for each. Deformations are for images (N, C, H, W).
    - ``neighbours``: a forward pass over so many training rows, as the training loader gives them, and the distances.
    - ``spectra``: what :func:`mm_lightning.evaluation.class_spectrum` says.

    Bounds of the inputs, and the unit of an epsilon, are those of pixels where the data module has a ``normalization``
    (mean and deviation of each channel of images in [0, 1]); else what the first ``extra_points`` training rows show,
    10,000 at most.

    Where the module is no classifier a warning says why, once, and nothing is logged. With several processes the rows
    of all are gathered; where a sampler repeats rows to give each process as many, so do they count.

    =============================================================== ==================================================
    log key                                                         what it is
    =============================================================== ==================================================
    ``val/evaluation/acc``, ``test/...``                            accuracy, in [0, 1]
    ``val/evaluation/nll``, ``test/...``                            negative log likelihood, nats
    ``val/evaluation/ece``, ``test/...``                            expected calibration error, in [0, 1]
    ``val/evaluation/mce``, ``test/...``                            maximum calibration error, in [0, 1]
    ``val/evaluation/brier``, ``test/...``                          Brier score over all classes, in [0, 2]
    ``val/evaluation/overconfidence``, ``test/...``                 mean confidence - accuracy, in [-1, 1]
    ``test/evaluation/temperature``                                 T; above 1 the classifier was too sure
    ``test/evaluation/temperature_low``, ``..._high``               ends of its 95 % interval; the upper one if finite
    ``test/evaluation/nll_scaled``; so for ``ece``, ``brier``       scores of the logits divided by T
    and ``overconfidence``
    ``test/evaluation/fgsm_0.0314/acc``, ``.../nll``, ...           ``acc``, ``nll``, ``ece`` and ``brier`` of changed
                                                                    inputs, by the name of attack, deformation, shift
    ``test/evaluation/neighbours/acc``                              accuracy of the nearest training rows
    ``test/evaluation/spectrum/LAYER/largest``, ...                 see :func:`mm_lightning.evaluation.spectrum_numbers`
    =============================================================== ==================================================

    After a test ``scaling`` is the fitted module, ``fitted`` what its fit has found; ``scores`` and ``bins`` (the
    reliability) hold what there is by ``"plain"`` and ``"scaled"``, ``groups`` the other numbers by group, ``settings``
    what they were measured with, ``logged`` all that was logged, and ``remarks`` what was warned about.

    Args:
        layer: Where the logits are, (N, K), or (N,) or (N, 1) for the logit of class 1 of two: the dotted name of a
            submodule, or ``"output"`` for the module's own ``forward``.
        temperature: Whether temperature scaling is fitted in a test.
        attacks: Attacks, such as ``FGSM(epsilon=0.1)`` of ``mm_lightning.evaluation``; True is FGSM with 2/255 and
            8/255 and PGD with 8/255.
        deformations: Deformations; True are the paper's 17.
        shifts: Shifts; True is noise, blur and contrast at five strengths, noise alone where inputs are no images.
        neighbours: ``Neighbours(k=5)``, or True for that.
        spectra: Layers whose spectra are measured; True is what comes into the last Linear layer.
        num_bins: Bins of the calibration errors, of equal width between 0 and 1.
        probabilities: Whether the layer gives probabilities, not logits.
        max_points: Only the first so many rows of a validation or test epoch are seen, on each process. Of scores it
            says so if there were more; a temperature is fitted to no more than these, too.
        extra_points: Only the first so many rows of test and training data are seen by the groups, on each process.
        bounds: Of the inputs; default asks the data.
        seed: Of all that is drawn.
        targets: Finds the class indices, integer, (N,), in a batch; default takes the last integer tensor with one
            entry per row.
        forward: Runs the module on a batch; default hands the batch, or the first entry of a tuple, a list or a dict,
            to ``forward``.
        data: Data module, or anything with ``val_dataloader``, that a test takes its validation and training data
            from.
        name: Part of the log keys; of two evaluations each needs its own.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If a number is outside its range.
    """

    def __init__(
        self,
        layer: str = "output",
        *,
        temperature: bool = True,
        attacks: bool | Sequence[Any] = False,
        deformations: bool | Sequence[Any] = False,
        shifts: bool | Sequence[Any] = False,
        neighbours: bool | Neighbours = False,
        spectra: bool | str | Sequence[str] = False,
        num_bins: int = 15,
        probabilities: bool = False,
        max_points: int = 100_000,
        extra_points: int = 10_000,
        bounds: InputBounds | None = None,
        seed: int = 0,
        targets: Callable[[Any], Tensor] | None = None,
        forward: Callable[[LightningModule, Any], Any] | None = None,
        data: Any = None,
        name: str = "evaluation",
    ) -> None:
        check_flag("temperature", temperature, "False leaves it out.")
        check_count("num_bins", num_bins, 1, "15 is usual.")
        check_flag("probabilities", probabilities, "False takes the layer's output for logits.")
        check_count("max_points", max_points, 1, "100_000 keeps as many rows.")
        check_count("extra_points", extra_points, 1, "10_000 keeps as many rows.")
        check_count("seed", seed, 0, "0 is one.")
        if bounds is not None and not isinstance(bounds, InputBounds):
            raise refusal("bounds", bounds, "InputBounds", "Make them by bounds_of_images or bounds_of_rows.")
        if not isinstance(name, str):
            raise refusal("name", name, "a text", "It is part of the log keys.")
        groups: dict[str, Any] = {"attacks": attacks, "deformations": deformations, "shifts": shifts}
        groups |= {"neighbours": neighbours, "spectra": spectra}
        self.choice = {group: chosen(group, value) for group, value in groups.items()}
        self.classifier = Classifier(layer, forward or run_on_first_entry, targets, bool(probabilities))
        self.temperature = bool(temperature)
        self.num_bins = num_bins
        self.max_points = max_points
        self.extra_points = extra_points
        self.bounds = bounds
        self.seed = seed
        self.data = data
        self.name = name
        self.is_quiet = False  # whether remarks are kept alone, not warned about
        self.scaling: TemperatureScaling | None = None
        self.fitted: TemperatureFit | None = None
        self.scores: dict[str, dict[str, float]] = {}
        self.bins: dict[str, Reliability] = {}
        self.logged: dict[str, float] = {}
        self.groups: Found = {}
        self.settings: dict[str, Any] = {}
        self.remarks: list[str] = []
        self._logits = OverheardLogits(self.classifier, max_points)
        self._temperature: Fitted | str | None = None  # of the test that runs, or why there is none
        self._closer: CloserLook | None = None
        self._of_fit: dict[str, Any] = {}  # its loaders
        self._is_pending = False  # a validation of fit is kept that was not known to be the last

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to overhear."""
        self._is_pending = False
        if not trainer.sanity_checking:
            self._logits.open(pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit the temperature, and begin to overhear."""
        self.scores, self.bins, self.groups, self.remarks, self._closer = {}, {}, {}, [], None
        self.settings = {"num_bins": self.num_bins, "max_points": self.max_points}
        self._temperature = None
        if self.temperature:
            self._temperature = self._fitted_to_validation(trainer, pl_module)
        self.scaling, self.fitted = self._temperature if isinstance(self._temperature, Fitted) else (None, None)
        self._logits.open(pl_module)
        if any(self.choice.values()):
            self.settings["extra_points"] = self.extra_points
            look = partial(CloserLook, bounds=self.bounds, max_rows=self.extra_points, num_bins=self.num_bins)
            self._closer = look(self.choice, self.classifier, seed=self.seed, data=self.data, of_fit=self._of_fit)
            self._closer.begin(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the logits of this batch beside its targets."""
        if dataloader_idx == 0 and self._logits.is_open:
            may_run = trainer.state.fn != TrainerFn.FITTING or is_last_validation(trainer)
            self._logits.keep(trainer, pl_module, batch, may_run)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the logits of this batch beside its targets, and take the closer look."""
        self.on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        if dataloader_idx == 0 and self._closer is not None and self._logits.obstacle is None:
            with self._logits.paused():
                self._closer.see(trainer, pl_module, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the scores; those of a validation that an early stop may make the last one are kept until then."""
        if not self._logits.is_open:
            return
        if trainer.state.fn == TrainerFn.FITTING and not is_last_validation(trainer):
            self._is_pending = True
            return
        pl_module.log_dict(self._measured(pl_module, "val"), sync_dist=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the loaders, and log the scores of the last validation if training has ended earlier than foreseen."""
        self._of_fit = loaders_of_fit(trainer)
        if not self._is_pending:
            return
        self._is_pending = False
        found = self._measured(pl_module, "val")
        # Lightning's log() is over when training ends
        trainer.callback_metrics.update({key: torch.tensor(number) for key, number in found.items()})
        for logger in trainer.loggers:
            logger.log_metrics(found, step=trainer.global_step)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the scores, also after temperature scaling, and what the closer look has found."""
        self.logged = self._measured(pl_module, "test")
        if self.logged and self._closer is not None:
            self.groups = self._closer.measured(pl_module)
            self.settings |= self._closer.settings
            for remark in self._closer.remarks:
                self.say(remark)
            self.logged |= {f"test/{self.name}/{key}": number for key, number in of_groups(self.groups).items()}
        pl_module.log_dict(self.logged, sync_dist=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the hooks off."""
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the hooks off."""
        self._close()

    def say(self, remark: str) -> None:
        """Warn, once until the next test."""
        if remark not in self.remarks:
            self.remarks.append(remark)
            if not self.is_quiet:
                rank_zero_warn(f"Evaluation: {remark}")

    def _close(self) -> None:
        self._logits.close()
        self._is_pending = False
        if self._closer is not None:
            self._closer.close()

    def _fitted_to_validation(self, trainer: Trainer, module: LightningModule) -> Fitted | str:
        data = trainer.datamodule if self.data is None else self.data  # type: ignore[attr-defined]
        if getattr(data, "validates_on_test", False):
            return "no temperature is fitted: validation sees the test rows. Train with rows set aside for validation."
        loader = loader_of(trainer, module, "val", self.data, self._of_fit)
        return fitted_by_a_pass(trainer, module, self.classifier, loader, self.max_points)

    def _measured(self, module: LightningModule, split: str) -> dict[str, float]:
        rows, is_cut = self._logits.rows(module), self._logits.is_cut
        self._logits.close()
        if isinstance(rows, str):
            self.say(f"the module is taken for no classifier, and nothing is logged: {rows}.")
            return {}
        if module.trainer.strategy.reduce_boolean_decision(is_cut, all=False):  # rows are of all processes, or of none
            self.say(f"{split} scores are of the first {self.max_points:,} rows of each process: max_points.")
        fitted = self._temperature if split == "test" else None
        if isinstance(fitted, str):
            self.say(fitted)
        elif fitted is not None and fitted.fit.is_uncertain:
            self.say(f"{fitted.fit}.")
        self.scores, self.bins, logged = evaluated(rows, self.num_bins, None if isinstance(fitted, str) else fitted)
        return {f"{split}/{self.name}/{quantity}": number for quantity, number in logged.items()}
