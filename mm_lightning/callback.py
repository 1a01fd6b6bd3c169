"""WHEN: the Lightning callback that plans, mixes, proves and logs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from inspect import signature
from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from mm_lightning.arguments import plain
from mm_lightning.draws import AUTO, Draws, check_changeable, has_end, place_of, shown
from mm_lightning.fit import Batch, Fit, Settings
from mm_lightning.mixup import BetaRatio, LayerSpec, MixPlan
from mm_lightning.mixup.pairing import Pairing
from mm_lightning.mixup.plan import Interpolation
from mm_lightning.mixup.ratio import Ratio, alpha_of, is_by_row, with_alpha
from mm_lightning.mixup.schedule import ScheduleSpec
from mm_lightning.mixup.seen import LOGITS
from mm_lightning.namespaces import CallbackOfBoth, LightningModule, Trainer, classes, version_of
from mm_lightning.step.named_losses import LossSpec
from mm_lightning.step.run import loss_of, with_loss
from mm_lightning.summary import Summary

__all__ = ["ManifoldMixupCallback"]

UNMIXED = "unmixed"
"""Key of the summary for batches that were not mixed."""


class ManifoldMixupCallback(CallbackOfBoth):
    """Trains an unmodified LightningModule with manifold mixup (Verma et al., ICML 2019).

    In every training step one eligible layer is drawn, its output is mixed row by row with a partner's,
    ``lam * h + (1 - lam) * h[partner]``, and the loss that ``training_step`` returns, however it is computed, becomes
    ``lam * loss(targets) + (1 - lam) * loss(targets[partner])``. Validation, test and prediction are left alone. A step
    that would mix only one of the two raises an error instead.

    That is computed as it says: the step runs on its own targets, and then again on the partners', with the outputs of
    the mixed network replayed and every effect put back.

    Before the first training step, ``training_step`` is run without training: on the first batch as it is, with its
    rows in another order, and once for each eligible layer with that layer's rows in another order. Mixing there is
    allowed if and only if loss and gradients are those of the plain step. Weights, buffers, metrics and random states
    are as they were afterwards. The proof is repeated for each new kind of batch and, for one layer, now and then.

    Plans depend on (seed, epoch, batch index, rank) and nothing else: no random state is read or moved, a resumed run
    continues the sequence, ranks share the layer and draw their own partners and ``lam``.

    Logged, where a logger is attached, at the trainer's rate:

    ================ ===================================================================================
    key              meaning
    ================ ===================================================================================
    mixup/lam        mean weight of the rows themselves in this batch, in [0, 1]; 1 for an unmixed batch
    mixup/layer      index of the mixed layer in ``callback.layer_names``; -1 for an unmixed batch
    mixup/acc_mixed  accuracy on the mixed targets (:func:`mixed_accuracy`), of a cross-entropy on
                     class indices (N,); nan for an unmixed batch
    mixup/loss_floor their entropy in nats, below which that loss cannot fall
                     (:func:`mixed_target_entropy`)
    ================ ===================================================================================

    TensorBoard gets histograms of ``lam`` and the layer over each epoch.

    Args:
        alpha: Parameter of ``lam ~ Beta(alpha, alpha)``, >= 0. 0 switches mixing off. None is 2.0, or what ``ratio``
            says.
        layers: The eligible layers. ``"auto"`` means the module's MixPoints; where there are none, the input and up to
            three ends of early stages that the whole computation runs through. ``"input"`` means the batch itself, or
            the embeddings of its integers; a dotted module name (``*`` for any text without a dot), a module class or a
            module object means the output of that module; or a list of these. A skip connection around a layer would
            carry unmixed features past it, of which a warning tells: ``mm_lightning.inspect(module, batch)`` lists the
            layers without one.
        per_sample: Draw a ``lam`` for each row instead of one for the batch.
        probability: Share of the training batches that is mixed, in [0, 1].
        seed: Seed of the plans, in [0, 2**64). None takes the one given to ``seed_everything``, or 0.
        pairing: Draws the partners; :class:`RandomPermutation` (default), :class:`Roll`, :class:`SameClass`,
            :class:`LabelDistance` and so on, or a function of a generator and the number of rows. One with a parameter
            called ``targets``, ``hidden`` (states of the mixed layer), ``logits`` (of the unmixed batch, at the cost of
            a forward pass) or ``batch`` is handed these.
        layer_weights: Probability of each eligible layer up to a factor, in the order of ``layer_names``.
        loss: Names the losses to mix, where others must stay unmixed: an attribute's name
            (``"criterion"``), a module or a function, or a list of these. Such a loss is evaluated on the targets and
            on the partners' and interpolated, whatever it is; everything else that ``training_step`` computes from the
            targets is left as it is.
        batch_dim: Dimension of the layers' outputs that holds the batch; or a dict of it for some layers. None learns
            it by reordering the batch.
        batch_size: Number of rows of every batch; None tells it by the batch.
        union_masks: Give a mixed row the tokens of both its parents: from the mixed layer on, modules that are handed a
            mask of padded sequences get the union of both rows' masks. Without masks it changes nothing.
        strict: Refuse layers that a path leads around, instead of warning of them.
        ratio: Draws ``lam`` in the place of ``alpha`` and ``per_sample``: :class:`BetaRatio`, :class:`UniformRatio`,
            :class:`FixedRatio`, :class:`FoldedRatio`, :class:`SimilarityRatio`, or a function as for ``pairing``, which
            may ask for ``partner``, too.
        interpolation: Mixes rows with their partners: :class:`CutMix`, :class:`PatchUp`, :class:`NoisyFeatures`,
            :class:`TokenMix`, :class:`ChannelMix`, or a function of hidden states (N, ...) and the plan that returns
            mixed ones and the weight of the row itself, (N,). None is the linear one of the paper.
        schedule: Factor of ``probability`` as a function of the share of training that lies behind: :class:`Until`,
            :class:`WarmUp`, :class:`LinearSchedule`, :class:`CosineSchedule`, :class:`Alternating`; or a dict of such
            functions by what they are of: ``"alpha"``, ``"probability"`` or the name of a layer, for its weight. None
            is the paper's: all the time. ``"auto"`` is ``Until(0.8)``, which was better or no worse on most tasks that
            were tried (``docs/evidence.md``); where it is not known how long training is, it is None.
        clean_weight: Adds the loss of the unmixed batch with this weight, >= 0 (RegMixup, Pinto et al., NeurIPS 2022),
            for which the network runs a second time in every mixed step. A batch that is not mixed, by ``probability``
            or a schedule, has its own loss alone, so that its gradient is the smaller one.
        targets: Where in the batch the targets are that a pairing asks for, such as ``"labels"`` or ``"1"``. None takes
            what the loss compares with, if that is one part of the batch.

    ``alpha``, ``ratio``, ``probability``, ``pairing``, ``layer_weights``, ``schedule``, ``clean_weight`` and ``seed``
    may be set during a fit, with effect from the next batch on. Lists and mappings
    are taken of any kind, OmegaConf's say.

    Attributes:
        plan: The current batch's :class:`MixPlan`; None before the first. Once it was mixed, with the partners that
            were settled and the weights that the interpolation gave.
        layer_names: Names of the eligible layers; empty before fit.

    Raises:
        TypeError: At construction, if an argument is of a wrong type; one that may change during a fit, also when it is
            next used.
        ValueError: So, too, if it has a wrong value. At the start of fit, if ``layers`` names something that is not
            there.
        ValueError: In the first training step, if ``layers="auto"`` finds no place to mix, or with ``strict`` if a path
            leads around a layer.
        RuntimeError: In a training step, if features and targets would not be mixed alike.

    Example:
        >>> trainer = Trainer(callbacks=[ManifoldMixupCallback(layers=["input", "layer1", "layer2"])])
    """

    def __init__(
        self,
        alpha: float | None = None,
        layers: LayerSpec = "auto",
        per_sample: bool = False,
        probability: float = 1.0,
        seed: int | None = None,
        *,
        pairing: Pairing | None = None,
        layer_weights: Sequence[float] | None = None,
        loss: LossSpec | None = None,
        batch_dim: int | Mapping[str, int] | None = None,
        batch_size: int | None = None,
        union_masks: bool = True,
        strict: bool = False,
        ratio: Ratio | None = None,
        interpolation: Interpolation | None = None,
        schedule: ScheduleSpec | str | None = AUTO,
        clean_weight: float = 0.0,
        targets: str | int | None = None,
    ) -> None:
        super().__init__()
        if ratio is not None and (alpha is not None or per_sample is not False):
            given = f"alpha={alpha!r}" if alpha is not None else f"per_sample={per_sample!r}"
            raise ValueError(f"{given} and ratio={ratio!r} are both given. Leave one of them out.")
        self.ratio: Ratio = BetaRatio(2.0 if alpha is None else alpha, per_sample) if ratio is None else ratio
        self._by_row: tuple[Ratio, bool] | None = None
        self.interpolation = interpolation
        self.schedule = schedule if callable(schedule) else plain(schedule)
        self.clean_weight = clean_weight
        self.targets = targets
        self.layers = plain(layers)
        self.probability = probability
        self.seed = seed
        self.pairing = pairing
        self.layer_weights = plain(layer_weights)
        self.loss = plain(loss)
        self.batch_dim = plain(batch_dim)
        self.batch_size = batch_size
        self.union_masks = union_masks
        self.strict = strict
        check_changeable(self)
        self._fixed_settings()
        self._fit: Fit | None = None
        self._batch: Batch | None = None
        self._summary = Summary()
        self._draws = Draws()

    @property
    def alpha(self) -> float | None:
        """Parameter of ``lam ~ Beta(alpha, alpha)``, which may be set during a fit; None of another ratio."""
        return alpha_of(self.ratio)

    @alpha.setter
    def alpha(self, alpha: float) -> None:
        self.ratio = with_alpha(self.ratio, alpha)

    @property
    def per_sample(self) -> bool:
        """Whether each row has a weight of its own."""
        if self._by_row is None or self._by_row[0] is not self.ratio:  # for a function of the user's is tried
            self._by_row = (self.ratio, is_by_row(self.ratio))
        return self._by_row[1] or bool(getattr(self.interpolation, "per_sample", False))

    @property
    def plan(self) -> MixPlan | None:
        """The current batch's plan; None before the first."""
        return None if self._batch is None else self._batch.used or self._batch.plan

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Names of the eligible layers; empty before fit."""
        return self._summary.layers

    def summary(self) -> dict[str, int]:
        """How many training batches of this or the last fit were mixed at each layer, and how many at none."""
        counts = self._summary.counts
        return {name: counts[name] for name in (*self._summary.layers, UNMIXED)}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a second callback of this kind: the batch would be mixed twice."""
        count = sum(isinstance(callback, ManifoldMixupCallback) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if count > 1:
            raise ValueError(
                f"The trainer has {count} ManifoldMixupCallbacks, which would mix every batch more than once."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook the eligible layers. Here, because the module is complete now and nothing has run or compiled yet."""
        self._release()
        self._summary.begin()
        place_of(trainer, 0, self)

        def agree(says_so: bool) -> bool:
            return trainer.strategy.reduce_boolean_decision(says_so) if trainer.world_size > 1 else says_so

        self._fit = Fit(pl_module, self._fixed_settings(), agree)
        self._fit.attach(self._step)
        if self._fit.layers:
            self._take_over(self._fit)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what of the default is not to be had, and where the trainer itself resumes a batch too early."""
        if self.schedule == AUTO and not has_end(trainer):
            rank_zero_warn(
                "All batches are mixed: to leave the last fifth of training unmixed, as schedule='auto' does, it must "
                "be known how long training is. Give the Trainer max_epochs or max_steps, or schedule=None here."
            )
        progress = trainer.fit_loop.epoch_loop.batch_progress.current
        if version_of(trainer) < (2, 5) and progress.ready > progress.completed:
            rank_zero_warn(
                "lightning before 2.5 counts one batch too few when it resumes within an epoch, so a plan is drawn "
                "twice and a batch trained twice. For an exact resume update lightning, or save at the end of epochs."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Draw the batch's plan. Of the first batch's layers one may not know yet: see :class:`Fit`."""
        fit, self._batch = self._fit, None
        if fit is None:
            return
        self._batch = Batch(place_of(trainer, batch_idx, self), size=1)
        if fit.layers:
            self._take_over(fit)
        if self.alpha == 0 or self.probability == 0:
            self._batch.plan = MixPlan.unmixed(1) if fit.layers else None
            return
        if fit.settings.differ(self):
            raise RuntimeError(
                "layers, per_sample, interpolation, targets, loss, batch_dim, batch_size, union_masks and strict of "
                "ManifoldMixupCallback must not change during a fit; alpha, ratio, probability, pairing, "
                "layer_weights, schedule, clean_weight and seed may."
            )
        self._batch.size = fit.rows_of(batch)
        self._batch.is_armed = True
        if self._batch.size == 1:
            fit.warn_once("A batch of one row has no partner to mix with; it trains unmixed.")
            self._batch.plan = MixPlan.unmixed(1)
        elif fit.layers:
            self._draw(fit)
        self._batch.is_measured = _is_logged(trainer, steps_ahead=1)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Let forward passes that activation checkpointing recomputes repeat the mix."""
        batch = self._batch
        if batch is not None and batch.has_no_loss:
            _refuse_unseen_loss()
        if self._fit is not None and batch is not None and batch.is_mixed and batch.plan is not None:
            self._fit.begin_backward()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End what :meth:`on_before_backward` began."""
        if self._fit is not None and self._batch is not None and self._batch.plan is not None:
            self._fit.end_backward()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the plan, in the steps that reach the loggers: Lightning's log costs more than drawing the plan."""
        fit, current = self._fit, self._batch
        if fit is None or current is None or current.plan is None:
            return
        was_armed, current.is_armed = current.is_armed, False
        self._summary.count(current.plan.layer or UNMIXED)
        if not was_armed:
            return
        layer = -1 if current.plan.layer is None else self.layer_names.index(current.plan.layer)
        fit.epoch.append((current.lam, layer))
        if _is_logged(trainer):
            # Lightning writes a key again with its last value: what was not measured now is no number.
            fit.measured |= current.measured.keys()
            measured = dict.fromkeys(fit.measured, float("nan")) | current.measured
            values: dict[str, Any] = {"lam": current.lam, "layer": float(layer), **measured}
            keyed = {f"mixup/{name}": value for name, value in values.items()}
            pl_module.log_dict(keyed, on_step=True, on_epoch=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give TensorBoard the histograms of the epoch's ``lam`` and layers."""
        if self._batch is not None:
            self._batch.is_armed = False  # also where a hook ended the epoch before its batch
        if self._fit is None:
            return
        for logger in trainer.loggers:
            if isinstance(logger, classes("loggers.TensorBoardLogger")) and self._fit.epoch:
                epoch = [(float(lam), layer) for lam, layer in self._fit.epoch]  # lam may be on a device
                for name, values in zip(("lam", "layer"), np.array(epoch, dtype=float).T, strict=True):
                    logger.experiment.add_histogram(f"mixup/{name}_of_epoch", values, trainer.global_step)
        self._fit.epoch.clear()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put everything back."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put everything back."""
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put everything back."""
        self._release()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the settings that a resumed run is compared with. Plans need no state.

        Not as the callback's state: of two callbacks with one, Lightning would say that their keys must differ.
        """
        checkpoint["mm_lightning"] = self._draws.settings or self._draws.restored

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember the checkpoint's settings until fit starts."""
        self._draws.restored = checkpoint.get("mm_lightning", {})

    def __repr__(self) -> str:
        """The call that makes such a callback: alpha, layers, and what is not at its default."""
        defaults = {name: p.default for name, p in signature(ManifoldMixupCallback.__init__).parameters.items()}
        values = {name: getattr(self, name) for name in defaults if name != "self"}
        values["alpha" if type(self.ratio) is not BetaRatio or self.ratio.beta is not None else "ratio"] = None
        values["per_sample"] = values["ratio"] is None and is_by_row(self.ratio)
        parts = [
            f"{name}={shown(value)}"
            for name, value in values.items()
            if value is not None and (name in ("alpha", "layers") or value != defaults[name])
        ]
        return f"{type(self).__name__}({', '.join(parts)})"

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to a running fit."""
        return {**self.__dict__, "_fit": None, "_batch": None}

    def _step(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What runs in the place of ``training_step``."""
        fit, batch = self._fit, self._batch
        assert fit is not None
        if batch is None or not batch.is_armed:  # a validation_step that calls training_step, or a tuner's loop
            return fit.run_unmixed(original, args, kwargs)
        if batch.size == 1:
            return fit.run_unmixed(original, args, kwargs)
        if not batch.has_no_loss and not fit.ready(original, args, kwargs, batch):
            batch.has_no_loss = True
            batch.plan = None
            output = fit.run_unmixed(original, args, kwargs)
            if output is not None:
                _refuse_unseen_loss()
            return output
        plan = batch.plan
        is_drawn = plan is not None and plan.batch_size == batch.size
        if not is_drawn or (plan is not None and plan.mixes and plan.layer not in fit.layer_names):
            self._take_over(fit)
            self._draw(fit)
        assert batch.plan is not None
        if not batch.plan.mixes:
            return fit.run_unmixed(original, args, kwargs)
        batch.is_mixed = True
        asks = batch.plan.asks_for
        clean = None
        if self.clean_weight or LOGITS in asks:
            clean = fit.run_clean(original, args, kwargs, batch, bool(self.clean_weight), LOGITS in asks)
        if asks:
            look = partial(fit.look, original, args, kwargs)
            batch.plan = fit.see(batch.plan, args[0], batch.signature, clean, look)
            batch.lam = batch.plan.lam.mean() if batch.plan.shared_lam is None else batch.plan.shared_lam
        output = fit.run(original, args, kwargs, batch)
        loss = loss_of(output)
        if clean is None or clean.loss is None or loss is None:
            return output
        return with_loss(output, loss + float(self.clean_weight) * clean.loss)

    def _draw(self, fit: Fit) -> None:
        batch = self._batch
        assert batch is not None
        plan = self._draws.draw(batch.size, batch.place)
        # Before it is moved: reading it from a device would wait for the device.
        batch.lam = float(plan.lam.mean()) if plan.shared_lam is None else plan.shared_lam
        batch.plan = plan.to(fit.module.device)

    def _take_over(self, fit: Fit) -> None:
        """Draw for the layers, and as settings say that were changed."""
        if fit.layer_names is not self._summary.layers:
            self._summary.layers = fit.layer_names
        self._draws.take_over(self, fit.layer_names)

    def _fixed_settings(self) -> Settings:
        return Settings(**{field.name: getattr(self, field.name) for field in fields(Settings)})

    def _release(self) -> None:
        """Remove the hooks and the wrapper. Safe to call at any time, any number of times."""
        if self._batch is not None:
            self._batch.is_armed = False
        if self._fit is not None:
            self._fit.release()
            self._summary.end()
        self._fit = None
        self._draws.forget()


def _refuse_unseen_loss() -> None:
    raise RuntimeError(
        "training_step returned no loss when it was looked at, but does now, for the same batch. It must do the same "
        "when it is run again, or manifold mixup would leave the batch unmixed."
    )


def _is_logged(trainer: Trainer, steps_ahead: int = 0) -> bool:
    """Whether what is logged after this step, or so many steps ahead, reaches a logger."""
    if not trainer.loggers:
        return False
    return (trainer.global_step + steps_ahead) % max(trainer.log_every_n_steps, 1) == 0  # type: ignore[attr-defined]
