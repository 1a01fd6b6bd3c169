"""WHEN: the Lightning callback that plans, mixes, proves and logs."""

from __future__ import annotations

import copy
import functools
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from mm_lightning.losses import LossSite, LossSpec, find_losses, mixed_at
from mm_lightning.metrics import show_own_targets
from mm_lightning.mixup import (
    INPUT,
    BetaRatio,
    Layer,
    LayerSpec,
    Mixer,
    MixPlan,
    PlanSource,
    has_auto,
    resolve_layers,
)
from mm_lightning.mixup.choice import choose_places
from mm_lightning.mixup.plan import Pairing, PlansAhead, check_probability, check_seed
from mm_lightning.probe import Roles, View, check_losses, look_at, signature_of
from mm_lightning.step import batch_size_of, is_compiled, run_mixed_step

__all__ = ["ManifoldMixupCallback"]

UNMIXED = "unmixed"
"""Key of the summary for batches that were not mixed."""


class ManifoldMixupCallback(pl.Callback):
    """Trains an unmodified LightningModule with manifold mixup (Verma et al., ICML 2019).

    In every training step one eligible layer is drawn, its output is mixed row by row with a partner's,
    ``lam * h + (1 - lam) * h[partner]``, and the loss that ``training_step`` returns, however it is computed, becomes
    ``lam * loss(targets) + (1 - lam) * loss(targets[partner])``. Validation, test and prediction are left alone. A step
    that would mix only one of the two raises an error instead.

    Before the first training step, ``training_step`` is run once without training on the first batch, to see which of
    its tensors are targets and which layers the whole computation runs through. Weights, buffers, metrics and random
    states are as they were afterwards.

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
        alpha: Parameter of ``lam ~ Beta(alpha, alpha)``, >= 0. 0 switches mixing off.
        layers: The eligible layers. ``"auto"`` means the module's MixPoints; where there are none, the input and up to
            three ends of early stages that the whole computation runs through. ``"input"`` means the batch itself, or
            the embeddings of its integers; a dotted module name (``*`` for any text without a dot), a module class or a
            module object means the output of that module; or a list of these. A skip connection around a layer would
            carry unmixed features past it, of which a warning tells: ``mm_lightning.inspect(module, batch)`` lists the
            layers without one.
        per_sample: Draw a ``lam`` for each row instead of one for the batch.
        probability: Share of the training batches that is mixed, in [0, 1].
        seed: Seed of the plans, in [0, 2**64). None takes the one given to ``seed_everything``, or 0.
        pairing: Draws the partners; :class:`RandomPermutation` (default) or :class:`Roll`.
        layer_weights: Probability of each eligible layer up to a factor, in the order of ``layer_names``.
        loss: Names the losses to mix, where they cannot be followed or others must stay unmixed: an attribute's name
            (``"criterion"``), a module or a function, or a list of these. Such a loss is evaluated on the targets and
            on the partners' and interpolated, whatever it is; everything else that ``training_step`` computes from the
            targets is left as it is.
        batch_dim: Dimension of the layers' outputs that holds the batch, 1 for sequence-first networks; or a dict of
            the layers for which it is not 0.
        union_masks: Give a mixed row the tokens of both its parents: from the mixed layer on, modules that are handed a
            mask of padded sequences get the union of both rows' masks. Without masks it changes nothing.
        strict: Refuse layers that a path leads around, instead of warning of them.

    Attributes:
        plan: The current batch's :class:`MixPlan`; None before the first.
        layer_names: Names of the eligible layers; empty before fit.

    Raises:
        ValueError: At construction, if ``alpha``, ``probability`` or ``seed`` is out of range. At the start of fit, if
            ``layers`` names something that is not there.
        ValueError: In the first training step, if ``layers="auto"`` finds no place to mix, or with ``strict`` if a path
            leads around a layer.
        RuntimeError: In a training step, if features and targets would not be mixed alike.

    Example:
        >>> trainer = pl.Trainer(callbacks=[ManifoldMixupCallback(layers=["input", "layer1", "layer2"])])
    """

    def __init__(
        self,
        alpha: float = 2.0,
        layers: LayerSpec = "auto",
        per_sample: bool = False,
        probability: float = 1.0,
        seed: int | None = None,
        *,
        pairing: Pairing | None = None,
        layer_weights: Sequence[float] | None = None,
        loss: LossSpec | None = None,
        batch_dim: int | dict[str, int] = 0,
        union_masks: bool = True,
        strict: bool = False,
    ) -> None:
        super().__init__()
        self.ratio = BetaRatio(alpha, per_sample)
        check_probability(probability)
        if seed is not None:
            check_seed(seed)
        self.layers = layers
        self.probability = probability
        self.seed = seed
        self.pairing = pairing
        self.layer_weights = layer_weights
        self.loss = loss
        self.batch_dim = batch_dim
        self.union_masks = union_masks
        self.strict = strict
        self.plan: MixPlan | None = None
        self.layer_names: tuple[str, ...] = ()
        self._plans: PlansAhead | None = None
        self._mixer: Mixer | None = None
        self._views: dict[Any, View] = {}
        self._roles: Roles | None = None
        self._losses: list[LossSite] = []
        self._handles: list[RemovableHandle] = []
        self._patched: tuple[pl.LightningModule, Any] | None = None
        self._is_armed = False
        self._has_no_loss = False
        self._warned_of: set[str] = set()
        self._lam = 1.0
        self._batch_size = 0
        self._place: dict[str, int] = {}
        self._rank = 0
        self._measures = False
        self._measured: dict[str, float] = {}
        self._epoch: list[tuple[float, int]] = []
        self._counts: Counter[str] = Counter()
        self._settings: dict[str, Any] = {}
        self._restored: dict[str, Any] = {}

    def summary(self) -> dict[str, int]:
        """How many training batches of this or the last fit were mixed at each layer, and how many at none."""
        return {name: self._counts[name] for name in (*self.layer_names, UNMIXED)}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a second callback of this kind: the batch would be mixed twice."""
        count = sum(isinstance(callback, ManifoldMixupCallback) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if count > 1:
            raise ValueError(
                f"The trainer has {count} ManifoldMixupCallbacks, which would mix every batch more than once."
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hook the eligible layers. Here, because the module is complete now and nothing has run or compiled yet."""
        self._release()
        self._counts.clear()
        self._rank = _data_rank(trainer)
        self._wrap_training_step(pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look closely at the first mix of each layer in each epoch."""
        if self._mixer is not None:
            self._mixer.accept_anew()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Draw the batch's plan. Of the first batch's layers one may not know yet: see :meth:`_ready`."""
        self._is_armed = False
        self._has_no_loss = False
        if self._patched is None or self.ratio.alpha == 0 or self.probability == 0:
            return
        batch_size = batch_size_of(batch)
        if batch_size == 1:
            self._warn_once("A batch of one row has no partner to mix with; it trains unmixed.")
        self._place = {"epoch": trainer.current_epoch, "batch_index": batch_idx, "rank": self._rank}
        self._batch_size = batch_size
        self._is_armed = True
        self.plan = None
        if self._plans is not None:
            self._draw(pl_module)
        self._measures = _is_logged(trainer, steps_ahead=1)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Let forward passes that activation checkpointing recomputes repeat the mix."""
        self._refuse_unseen_loss(loss)
        if self._is_armed and self._mixer is not None and self.plan is not None:
            self._mixer.begin_backward(self.plan, loss)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End what :meth:`on_before_backward` began."""
        if self._mixer is not None:
            self._mixer.end_backward()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the plan, in the steps that reach the loggers: Lightning's log costs more than drawing the plan."""
        if not self._is_armed or self.plan is None or self._mixer is None:
            return
        self._is_armed = False
        self._mixer.retire()
        self._counts[self.plan.layer or UNMIXED] += 1
        layer = -1 if self.plan.layer is None else self.layer_names.index(self.plan.layer)
        self._epoch.append((self._lam, layer))
        if self._mixer.reads:
            self._warn_once(
                f"training_step takes targets of single rows out of tensors ({', '.join(sorted(self._mixer.reads))}). "
                "What a metric makes of them is right; a loss computed from them would not be mixed. Under "
                "torch.no_grad() this is not said."
            )
        if _is_logged(trainer):
            # Lightning writes a key again with its last value: what was not measured now is no number.
            self._measured |= dict.fromkeys(self._mixer.measured, float("nan"))
            measured = self._mixer.measured if self.plan.mixes else {}
            values: dict[str, Any] = {"lam": self._lam, "layer": float(layer), **self._measured, **measured}
            keyed = {f"mixup/{name}": value for name, value in values.items()}
            pl_module.log_dict(keyed, on_step=True, on_epoch=False)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give TensorBoard the histograms of the epoch's ``lam`` and layers."""
        self._is_armed = False  # also where a hook ended the epoch before its batch
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and self._epoch:
                for name, values in zip(("lam", "layer"), np.array(self._epoch).T, strict=True):
                    logger.experiment.add_histogram(f"mixup/{name}_of_epoch", values, trainer.global_step)
        self._epoch.clear()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put everything back."""
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Put everything back."""
        self._release()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put everything back."""
        self._release()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the settings that a resumed run is compared with. Plans need no state.

        Not as the callback's state: of two callbacks with one, Lightning would say that their keys must differ.
        """
        checkpoint["mm_lightning"] = self._settings or self._restored

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remember the checkpoint's settings until fit starts."""
        self._restored = checkpoint.get("mm_lightning", {})

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to a running fit."""
        fresh: dict[str, Any] = {
            "_mixer": None,
            "_patched": None,
            "_is_armed": False,
            "_views": {},
            "_losses": [],
            "_plans": None,
            "_handles": [],
        }
        return {**self.__dict__, **fresh}

    def _draw(self, pl_module: pl.LightningModule) -> None:
        assert self._plans is not None
        plan = self._plans.draw(self._batch_size, **self._place)
        # Before it is moved: reading it from a device would wait for the device.
        self._lam = float(plan.lam.mean()) if plan.shared_lam is None else plan.shared_lam
        self.plan = plan.to(pl_module.device)

    def _ready(self, pl_module: pl.LightningModule, step: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """See what the step does with such a batch, if none was seen before; then whether to mix this one."""
        if not self._is_armed:  # a validation_step that calls training_step, or a loop that the tuner runs
            return False
        signature = signature_of(args[0])
        if signature not in self._views:
            view = self._look(pl_module, step, args, kwargs)
            if view is None:
                self._has_no_loss = True
                self._is_armed = False
                if not pl_module.automatic_optimization:
                    self._warn_once(
                        "No loss was seen in training_step, so such batches train unmixed. In manual optimization call "
                        "self.manual_backward(loss)."
                    )
                return False
            self._views[signature] = view
        if self.plan is None:
            self._draw(pl_module)
        assert self._mixer is not None
        assert self.plan is not None
        self._roles = self._views[signature].roles
        self._mixer.measures = self._measures
        return self.plan.mixes

    def _look(
        self, pl_module: pl.LightningModule, step: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> View | None:
        """See what the step does with such a batch; the first time, settle the layers. None if it trains on nothing."""
        named = [] if self._mixer is None else [layer.name for layer in self._mixer.layers]
        size = self._batch_size
        view = look_at(pl_module, step, args, kwargs, size, self.batch_dim, named.__contains__)
        if not view.has_loss:
            return None
        if not self._views:
            self._settle(pl_module, view)
        if self.loss is None and size > 1:
            assert self._mixer is not None
            check_losses(pl_module, step, args, kwargs, view.roles, size, self._mixer)
        return view

    def _settle(self, pl_module: pl.LightningModule, view: View) -> None:
        """Decide on the layers by the first batch's view."""
        if has_auto(pl_module, self.layers):
            chosen = [place.name for place in choose_places(view.places)]
            chosen = chosen if view.input_problem else [INPUT, *chosen]
            layers = resolve_layers(pl_module, self.layers, chosen)
            if not layers:
                raise ValueError(
                    f"layers='auto' found no layer of {type(pl_module).__name__} that everything runs through "
                    f"({view.input_problem}). mm_lightning.inspect(module, batch) tells why; name the layers."
                )
            if is_compiled(pl_module):
                torch.compiler.reset()  # hooks are ignored where a validation was compiled before they were attached
        else:
            layers = self._mixer.layers if self._mixer is not None else resolve_layers(pl_module, self.layers)
            self._judge(layers, view)
        if any(layer.name == INPUT for layer in layers):
            layers = (view.input_layer(pl_module), *layers[1:])
        self._attach(
            layers,
            tolerated=[place.name for place in view.places if place.verdict == "bypassed"],
            masks=view.masks_after(layers, pl_module) if self.union_masks else {},
        )
        self._warn_if_resumed_differently()
        embedded = f" ('input' means after {', '.join(view.embeddings)})" if view.embeddings else ""
        rank_zero_info(f"Manifold mixup mixes at {', '.join(map(repr, self.layer_names))}{embedded}.")

    def _judge(self, layers: Sequence[Layer], view: View) -> None:
        """Refuse layers that cannot be mixed, and warn of those that a path leads around."""
        places = {place.name: place for place in view.places}
        see = "mm_lightning.inspect(module, batch) lists the layers that can be mixed."
        for layer in layers:
            if layer.name == INPUT:
                if view.input_problem:
                    raise ValueError(f"Layer 'input' cannot be mixed: {view.input_problem}. {see}")
                continue
            place = places[layer.name]
            if place.verdict == "unusable" or (self.strict and not place.is_safe):
                raise ValueError(f"Layer {layer.name!r} cannot be mixed: {place.reason}. {see}")
            if place.verdict == "bypassed":
                self._warn_once(
                    f"Layer {layer.name!r} is mixed, but {place.reason}, which carries unmixed features to the mixed "
                    f"targets. {see}"
                )

    def _attach(self, layers: Sequence[Layer], **found: Any) -> None:
        self.layer_names = tuple(layer.name for layer in layers)
        source = PlanSource(
            self.layer_names,
            ratio=self.ratio,
            weights=self.layer_weights,
            probability=self.probability,
            seed=_global_seed() if self.seed is None else int(self.seed),
            **({} if self.pairing is None else {"pairing": self.pairing}),
        )
        self._settings = {
            "alpha": float(self.ratio.alpha),
            "per_sample": self.ratio.per_sample,
            "probability": self.probability,
            "seed": source.seed,
            "layers": list(self.layer_names),
            "layer_weights": None if self.layer_weights is None else list(self.layer_weights),
            "pairing": repr(source.pairing),
        }
        self._plans = PlansAhead(source)
        if self._mixer is not None:
            self._mixer.detach()
        self._mixer = Mixer(layers, batch_dim=self.batch_dim, **found, is_explicit=self.loss is not None)
        self._mixer.attach()

    def _warn_if_resumed_differently(self) -> None:
        now, then = self._settings, self._restored
        changes = [f"{key}={now[key]!r} (was {then[key]!r})" for key in now if key in then and then[key] != now[key]]
        if changes:
            rank_zero_warn(f"Manifold mixup resumes with other settings than the checkpoint's: {', '.join(changes)}.")
        self._restored = {}

    def _warn_once(self, message: str) -> None:
        if message not in self._warned_of:
            self._warned_of.add(message)
            rank_zero_warn(message)

    def _wrap_training_step(self, pl_module: pl.LightningModule) -> None:
        if self.loss is not None:
            self._losses = find_losses(pl_module, self.loss)
        if not has_auto(pl_module, self.layers):
            self._attach(resolve_layers(pl_module, self.layers))
        original = pl_module.training_step
        watched = not is_compiled(pl_module)  # the compiler would trace the watch, and compile every graph twice
        may_skip = pl_module.automatic_optimization

        def step(*args: Any, **kwargs: Any) -> Any:
            if not self._ready(pl_module, original, args, kwargs):
                output = original(*args, **kwargs)
                self._refuse_unseen_loss(output)
                return output
            plan, mixer, roles = self.plan, self._mixer, self._roles
            assert plan is not None
            assert mixer is not None
            assert roles is not None
            with mixed_at(self._losses, mixer) if self._losses else nullcontext():
                return run_mixed_step(original, args, kwargs, plan, mixer, roles, watched=watched, may_skip=may_skip)

        training_step = _MixedStep(original, step)
        # On the instance, where it also stands behind the redirection that DDP and FSDP call training_step through.
        self._handles = show_own_targets(pl_module)
        self._patched = (pl_module, pl_module.__dict__.get("training_step"))
        pl_module.training_step = training_step  # type: ignore[method-assign]

    def _refuse_unseen_loss(self, loss: Any) -> None:
        if self._has_no_loss and loss is not None:
            raise RuntimeError(
                "training_step returned no loss when it was looked at, but does now, for the same batch. It must do "
                "the same when it is run again, or the batch would train unmixed."
            )

    def _release(self) -> None:
        """Remove the hooks and the wrapper. Safe to call at any time, any number of times."""
        self._is_armed = False
        self._has_no_loss = False
        self._plans = None
        self._views.clear()
        self._losses = []
        while self._handles:
            self._handles.pop().remove()
        if self._mixer is not None:
            self._mixer.detach()
            self._mixer = None
        if self._patched is not None:
            pl_module, replaced = self._patched
            self._patched = None
            del pl_module.training_step
            if replaced is not None:
                pl_module.training_step = replaced  # type: ignore[method-assign]


class _MixedStep:
    """Stands in for a training_step. A class, not a function, so that a copied module gets its own step."""

    def __init__(self, original: Callable[..., Any], step: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original, updated=())
        self._step = step

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._step(*args, **kwargs)

    def __deepcopy__(self, memo: Any) -> Any:
        return copy.deepcopy(self.__wrapped__, memo)  # type: ignore[attr-defined]

    def __reduce__(self) -> Any:
        return _itself, (self.__wrapped__,)  # type: ignore[attr-defined]


def _itself(step: Any) -> Any:
    return step


def _data_rank(trainer: pl.Trainer) -> int:
    """Which part of the data this process trains on: processes that share a forward pass must share the plan."""
    settings = trainer.distributed_sampler_kwargs or {}
    return int(settings.get("rank", trainer.global_rank))


def _is_logged(trainer: pl.Trainer, steps_ahead: int = 0) -> bool:
    """Whether what is logged after this step, or so many steps ahead, reaches a logger."""
    if not trainer.loggers:
        return False
    return (trainer.global_step + steps_ahead) % max(trainer.log_every_n_steps, 1) == 0  # type: ignore[attr-defined]


def _global_seed() -> int:
    """The seed given to ``seed_everything``, which Lightning keeps in the environment for all its processes, or 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))
