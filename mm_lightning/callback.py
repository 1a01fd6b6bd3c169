"""WHEN: the Lightning callback that plans, mixes, proves and logs."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from mm_lightning.mixup import BetaRatio, LayerSpec, Mixer, MixPlan, PlanSource, resolve_layers
from mm_lightning.mixup.plan import Pairing, check_probability, check_seed
from mm_lightning.step import batch_size_of, is_compiled, run_mixed_step

__all__ = ["ManifoldMixupCallback"]


class ManifoldMixupCallback(pl.Callback):
    """Trains an unmodified LightningModule with manifold mixup (Verma et al., ICML 2019).

    In every training step one eligible layer is drawn, its output is mixed row by row with a partner's,
    ``lam * h + (1 - lam) * h[partner]``, and every ``F.cross_entropy`` or ``nn.CrossEntropyLoss`` on the batch's class
    indices becomes ``lam * loss(targets) + (1 - lam) * loss(targets[partner])``. Validation, test and prediction are
    left alone. A step that would mix only one of the two raises an error instead.

    Plans depend on (seed, epoch, batch index, rank) and nothing else: no random state is read or moved, a resumed run
    continues the sequence, ranks share the layer and draw their own partners and ``lam``.

    Logged, where a logger is attached, at the trainer's rate:

    ============== =====================================================================================
    key            meaning
    ============== =====================================================================================
    mixup/lam      mean weight of the rows themselves in this batch, in [0, 1]; 1 for an unmixed batch
    mixup/layer    index of the mixed layer in ``callback.layer_names``; -1 for an unmixed batch
    ============== =====================================================================================

    Args:
        alpha: Parameter of ``lam ~ Beta(alpha, alpha)``, >= 0. 0 switches mixing off.
        layers: The eligible layers. ``"auto"`` means the module's MixPoints; ``"input"`` the batch itself; a dotted
            module name (``*`` for any text without a dot), a module class or a module object means the output of that
            module; or a list of these. Choose places that the whole computation runs through, such as the end of a
            residual stage: a skip connection around the layer would carry unmixed features past it.
        per_sample: Draw a ``lam`` for each row instead of one for the batch.
        probability: Share of the training batches that is mixed, in [0, 1].
        seed: Seed of the plans, in [0, 2**64). None takes the one given to ``seed_everything``, or 0.
        pairing: Draws the partners; :class:`RandomPermutation` (default) or :class:`Roll`.
        layer_weights: Probability of each eligible layer up to a factor, in the order of ``layer_names``.

    Attributes:
        plan: The current batch's :class:`MixPlan`; None before the first.
        layer_names: Names of the eligible layers; empty before fit.

    Raises:
        ValueError: At construction, if ``alpha``, ``probability`` or ``seed`` is out of range. At the start of fit, if
            ``layers`` names something that is not there.
        RuntimeError: In the first training step, if features and targets would not be mixed alike.

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
        self.plan: MixPlan | None = None
        self.layer_names: tuple[str, ...] = ()
        self._source: PlanSource | None = None
        self._mixer: Mixer | None = None
        self._patched: tuple[pl.LightningModule, Any] | None = None
        self._is_armed = False
        self._warned_of_single_row = False
        self._lam = 1.0
        self._settings: dict[str, Any] = {}
        self._restored: dict[str, Any] = {}

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
        self._attach(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hook them for the tuner, too, which trains before fit has started."""
        if self._mixer is None:
            self._attach(pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look closely at the first mix of each layer in each epoch."""
        if self._mixer is not None:
            self._mixer.accept_anew()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Draw the batch's plan."""
        if self._source is None or self.ratio.alpha == 0 or self.probability == 0:
            return
        batch_size = batch_size_of(batch)
        plan = self._source.draw(
            batch_size, epoch=trainer.current_epoch, batch_index=batch_idx, rank=trainer.global_rank
        )
        if batch_size == 1 and not self._warned_of_single_row:
            self._warned_of_single_row = True
            rank_zero_warn("A batch of one row has no partner to mix with; it trains unmixed.")
        self._lam = float(plan.lam.mean())  # before it is moved: reading it from a device would wait for the device
        self.plan = plan.to(pl_module.device)
        self._is_armed = True

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Let forward passes that activation checkpointing recomputes repeat the mix."""
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
        self._is_armed = False
        every = max(trainer.log_every_n_steps, 1)  # type: ignore[attr-defined]
        if self.plan is None or not trainer.loggers or trainer.global_step % every:
            return
        layer = -1 if self.plan.layer is None else self.layer_names.index(self.plan.layer)
        pl_module.log_dict({"mixup/lam": self._lam, "mixup/layer": float(layer)}, on_step=True, on_epoch=False)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put everything back."""
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Put everything back."""
        self._release()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put everything back."""
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """Return the settings that a resumed run is compared with. Plans need no state."""
        return self._settings or self._restored

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the checkpoint's settings until fit starts."""
        self._restored = state_dict

    def _attach(self, pl_module: pl.LightningModule) -> None:
        layers = resolve_layers(pl_module, self.layers)
        self.layer_names = tuple(layer.name for layer in layers)
        self._source = PlanSource(
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
            "seed": self._source.seed,
            "layers": list(self.layer_names),
            "layer_weights": None if self.layer_weights is None else list(self.layer_weights),
            "pairing": repr(self._source.pairing),
        }
        self._warn_if_resumed_differently()
        self._mixer = Mixer(layers)
        self._mixer.attach()
        self._wrap_training_step(pl_module, self._mixer)

    def _warn_if_resumed_differently(self) -> None:
        now, then = self._settings, self._restored
        changes = [f"{key}={now[key]!r} (was {then[key]!r})" for key in now if key in then and then[key] != now[key]]
        if changes:
            rank_zero_warn(f"Manifold mixup resumes with other settings than the checkpoint's: {', '.join(changes)}.")
        self._restored = {}

    def _wrap_training_step(self, pl_module: pl.LightningModule, mixer: Mixer) -> None:
        original = pl_module.training_step
        watched = not is_compiled(pl_module)  # the compiler would trace the watch, and compile every graph twice

        may_skip = pl_module.automatic_optimization

        @functools.wraps(original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            # Not armed: a validation_step that calls training_step, or a loop that the tuner runs.
            if not self._is_armed or self.plan is None or not self.plan.mixes:
                return original(*args, **kwargs)
            return run_mixed_step(original, args, kwargs, self.plan, mixer, watched=watched, may_skip=may_skip)

        # On the instance, where it also stands behind the redirection that DDP and FSDP call training_step through.
        self._patched = (pl_module, pl_module.__dict__.get("training_step"))
        pl_module.training_step = training_step  # type: ignore[method-assign]

    def _release(self) -> None:
        """Remove the hooks and the wrapper. Safe to call at any time, any number of times."""
        self._is_armed = False
        self._source = None
        if self._mixer is not None:
            self._mixer.detach()
            self._mixer = None
        if self._patched is not None:
            pl_module, replaced = self._patched
            self._patched = None
            del pl_module.training_step
            if replaced is not None:
                pl_module.training_step = replaced  # type: ignore[method-assign]


def _global_seed() -> int:
    """The seed given to ``seed_everything``, which Lightning keeps in the environment for all its processes, or 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))
