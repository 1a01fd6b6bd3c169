"""What one fit knows: the layers, how a step mixed at each is run, and what was proved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from mm_lightning.arguments import check_flag
from mm_lightning.look.eligible import Proofs, check, judge, settle_auto
from mm_lightning.look.look import Look, check_batch_dim
from mm_lightning.look.proof import Proof
from mm_lightning.look.rows_of_interpolation import unfit
from mm_lightning.mixup import INPUT, Layer, LayerSpec, Mixer, MixPlan, has_auto, resolve_layers
from mm_lightning.mixup.batch import (
    Layout,
    Path,
    check_batch_size,
    check_leaf_name,
    guess_layout,
    leaf_at,
    leaf_named,
    signature_of,
)
from mm_lightning.mixup.layers import check_layers, names_beside_auto
from mm_lightning.mixup.plan import Interpolation, check_interpolation
from mm_lightning.mixup.seen import BATCH, LOGITS, TARGETS
from mm_lightning.namespaces import LightningModule
from mm_lightning.step.attach import Attached, is_compiled
from mm_lightning.step.clean import Clean, clean_run
from mm_lightning.step.effects import Effects, merged
from mm_lightning.step.host import Host
from mm_lightning.step.loss_modes import Measuring
from mm_lightning.step.named_losses import LossSpec, NamedLosses, check_loss
from mm_lightning.step.run import MixedStep
from mm_lightning.step.way import Way

__all__ = ["Batch", "Fit", "Settings"]

_STEPS_BETWEEN_PROOFS = 100
_TRIES_FOR_POWER = 5


@dataclass(frozen=True)
class Settings:
    """Settings of the callback that must not change during a fit, by the names of its arguments.

    Raises:
        TypeError: If one is of a wrong type.
        ValueError: If one is of a wrong value.
    """

    layers: LayerSpec
    per_sample: bool
    interpolation: Interpolation | None
    targets: str | int | None
    loss: LossSpec | None
    batch_dim: int | Mapping[str, int] | None
    batch_size: int | None
    union_masks: bool
    strict: bool

    def __post_init__(self) -> None:
        check_layers(self.layers)
        if self.loss is not None:
            check_loss(self.loss)
        check_interpolation(self.interpolation)
        if self.targets is not None:
            check_leaf_name("targets", self.targets, "None finds the only ones.")
        check_batch_dim(self.batch_dim)
        if self.batch_size is not None:
            check_batch_size(self.batch_size)
        check_flag("union_masks", self.union_masks, "False leaves masks as they are.")
        check_flag("strict", self.strict, "False warns of layers that a path leads around.")

    def differ(self, owner: Any) -> bool:
        """Whether an attribute of the callback is another object now."""
        return any(getattr(owner, name) is not value for name, value in vars(self).items())


@dataclass
class Batch:
    """The current batch; written by the callback.

    Attributes:
        place: Epoch, index, rank and, with a schedule, progress, by which the plan is drawn.
        size: Number of rows.
        is_armed: Whether a training step that runs now is this batch's.
        plan: Its plan, once it is drawn; settled, once it was mixed.
        used: The plan as its loss was mixed.
        is_mixed: Whether it was mixed.
        lam: The mean of its ``lam``, as the loss was mixed.
        is_measured: Whether its loss will be logged.
        measured: Accuracy and floor of its loss, if they were measured.
        has_no_loss: Whether the look saw that it trains on nothing.
        signature: What it has in common with batches that are used alike.
    """

    place: dict[str, Any]
    size: int
    is_armed: bool = False
    plan: MixPlan | None = None
    used: MixPlan | None = None
    lam: float | Tensor = 1.0
    is_mixed: bool = False
    is_measured: bool = False
    measured: dict[str, Tensor] = field(default_factory=dict)
    has_no_loss: bool = False
    signature: Any = None


class Fit:
    """One fit of one module: looks at its steps, mixes them, and puts everything back.

    Args:
        module: The module.
        settings: Those of the callback.
        agree: Whether all processes that train together say so.

    Attributes:
        layers: The eligible layers; none before the first batch was looked at, where they depend on it.
        layer_names: Their names.
        is_settled: Whether that is done.
        epoch: Mean ``lam`` and layer of each batch of the epoch.
        measured: Names of what was measured in this fit.
    """

    def __init__(self, module: LightningModule, settings: Settings, agree: Callable[[bool], bool]) -> None:
        self.module, self.settings, self.agree = module, settings, agree
        self.host = Host(module)
        self.named = NamedLosses(module, settings.loss) if settings.loss is not None else None
        self.layers: tuple[Layer, ...] = ()
        self.layer_names: tuple[str, ...] = ()
        self.is_settled = False
        self.epoch: list[tuple[float | Tensor, int]] = []
        self.measured: set[str] = set()
        self._mixer: Mixer | None = None
        self._layout: Layout | None = None
        self._ways: dict[Any, dict[str, Way]] = {}
        self._targets: dict[tuple[Any, str], tuple[Path, ...]] = {}
        self._whole: Effects | None = None
        self._clean_seen: set[Any] = set()
        self._unmixed_until = -1
        self._unproved: dict[str, int] = {}
        self._steps = 0
        self._last_look = 0
        self._epoch_of_last_look = 0
        self._bypassed: set[str] = set()
        self._warned_of: set[str] = set()
        self._mixed = MixedStep(self.host, self.named)
        self._mixed.fuses = self.named is None
        self._mixed.by_row = settings.per_sample
        self._attached: Attached | None = None
        if not has_auto(module, settings.layers):
            self._mix_at(resolve_layers(module, settings.layers))

    def attach(self, run: Callable[..., Any]) -> None:
        """Let ``run`` stand in for ``training_step``."""
        self._attached = Attached(self.module, run)

    def release(self) -> None:
        """Remove the hooks, and put the step back. Safe to call any number of times."""
        if self._mixer is not None:
            self._mixer.detach()
        if self._attached is not None:
            self._attached.release()
            self._attached = None

    def rows_of(self, batch: Any) -> int:
        """Number of rows of a batch."""
        layout = guess_layout(batch, self.settings.batch_size) if self._layout is None else self._layout
        return layout.rows_of(batch)

    def ready(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], batch: Batch) -> bool:
        """Look at what the step does with such a batch, if that was not done; whether it has a loss."""
        signature = batch.signature = signature_of(args[0])
        if signature in self._ways and self.is_settled:
            return True
        look = self.look(step, args, kwargs)
        if not look.has_loss:
            if not self.module.automatic_optimization:
                self.warn_once(
                    "No loss was seen in training_step, so such batches train unmixed. In manual optimization call "
                    "self.manual_backward(loss)."
                )
            return False
        self._layout = look.layout
        batch.size = look.rows
        proofs = Proofs(look, bool(self.settings.per_sample))
        if not self.is_settled:
            self._settle(proofs)
        known = next(iter(self._ways.values()), {})
        ways = {}
        for layer in self.layers:
            proof = proofs.made(layer)
            way = look.way_of(layer) if proof is None or proof.way is None else proof.way
            is_known = layer.name in known and (proof is None or proof.way is None)
            ways[layer.name] = replace(way, effects=known[layer.name].effects) if is_known else way
        self._ways[signature] = ways
        return True

    def run(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], batch: Batch) -> Any:
        """Run a mixed step; :meth:`ready` has seen such a batch."""
        plan = batch.plan
        assert plan is not None
        assert plan.layer is not None
        assert self._mixer is not None
        self._steps += 1
        self._prove_again(step, args, kwargs, plan.layer, batch)
        measuring = Measuring() if batch.is_measured else None
        way = self._ways[batch.signature][plan.layer]
        output, logged = self._mixed.run(step, args, kwargs, plan, self._mixer, way, measuring)
        if plan.interpolation is not None or plan.pending is not None:  # which the layer has settled
            batch.plan, batch.used = self._mixer.mixing.plan, self._mixer.plan
            batch.lam = batch.used.lam.detach().mean()
        batch.measured = {} if measuring is None else measuring.measured
        if logged:
            self.host.log(logged)
        return output

    def run_unmixed(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the step as it is; what was compiled whole goes on compiled."""
        context = getattr(self.module, "_compiler_ctx", None)
        return (step if context is None else context["dynamo_ctx"](step))(*args, **kwargs)

    def begin_backward(self) -> None:
        """Let forward passes that activation checkpointing recomputes repeat the mix."""
        if self._mixer is not None:
            self._mixer.begin_backward(self._unmixed_until)

    def end_backward(self) -> None:
        """End what :meth:`begin_backward` began."""
        if self._mixer is not None:
            self._mixer.end_backward()

    def run_clean(
        self,
        step: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        batch: Batch,
        keeps_graph: bool,
        wants_logits: bool,
    ) -> Clean:
        """Run the step on the unmixed batch, so that nothing but its loss is left of it.

        Args:
            step: The user's.
            args: Its arguments.
            kwargs: Its keyword arguments.
            batch: The current batch.
            keeps_graph: Whether the loss is trained on.
            wants_logits: Whether the scores are to be seen.

        Raises:
            RuntimeError: In manual optimization, where the loss could not be added to another one.
        """
        if keeps_graph and not self.module.automatic_optimization:
            raise RuntimeError(
                f"{type(self.module).__name__} optimizes manually, so that clean_weight has no loss to add to. Use "
                "automatic optimization, or clean_weight=0."
            )
        if self._whole is None or batch.signature not in self._clean_seen:
            self._whole = merged(self._whole, self.look(step, args, kwargs).effects_of_step())
            self._clean_seen.add(batch.signature)
        written = next(iter(self._ways[batch.signature].values())).written
        clean = clean_run(self.host, self._whole, step, args, kwargs, written, keeps_graph, wants_logits)
        if clean.loss is not None and clean.loss.grad_fn is not None:
            self._unmixed_until = clean.loss.grad_fn._sequence_nr()
        return clean

    def see(self, plan: MixPlan, batch: Any, signature: Any, clean: Clean | None, look: Callable[[], Look]) -> MixPlan:
        """Let the plan see what it asks for, but hidden states.

        Args:
            plan: The plan.
            batch: The batch as ``training_step`` gets it.
            signature: Of the batch.
            clean: The run on the unmixed batch, if the plan asks for logits.
            look: Makes a look at the step.

        Raises:
            ValueError: If targets or logits cannot be told.
        """
        seen: dict[str, Any] = {BATCH: batch}
        if TARGETS in plan.asks_for:
            seen[TARGETS] = self._targets_of(plan, batch, signature, look)
        if LOGITS in plan.asks_for:
            assert clean is not None
            seen[LOGITS] = clean.checked_logits(plan.batch_size)
        return plan.settled(**seen)

    def _targets_of(self, plan: MixPlan, batch: Any, signature: Any, look: Callable[[], Look]) -> Tensor:
        name, layer = self.settings.targets, plan.layer
        assert layer is not None
        if name is not None:
            found = leaf_named(batch, name, "targets")
        else:
            if (signature, layer) not in self._targets:
                seen = look()
                for other in self.layers:
                    self._targets[signature, other.name] = seen.targets_of(other)
            paths = self._targets[signature, layer]
            if len(paths) != 1:
                names = ", ".join(repr(".".join(map(str, path))) for path in paths) or "none"
                raise ValueError(
                    f"The pairing or the ratio asks for the targets, but the loss compares with {len(paths)} parts of "
                    f"the batch: {names}. Say which: ManifoldMixupCallback(targets=...)."
                )
            found = leaf_at(batch, paths[0])
        tensor = torch.as_tensor(found)
        dim = self._layout.dim_of(tensor, plan.batch_size) if self._layout is not None else 0
        if dim is None:
            raise ValueError(
                f"The targets of shape {tuple(tensor.shape)} have no row for each of the {plan.batch_size} rows."
            )
        return tensor.movedim(dim, 0)

    def warn_once(self, message: str) -> None:
        """Warn, if that was not said in this fit."""
        if message not in self._warned_of:
            self._warned_of.add(message)
            rank_zero_warn(message)

    def look(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Look:
        """Look at the step."""
        self._last_look = self._steps
        settings = self.settings
        return Look(
            self.module,
            step,
            args,
            kwargs,
            batch_dim=settings.batch_dim,
            batch_size=settings.batch_size,
            named=self.named,
            agree=self.agree,
        )

    def _settle(self, proofs: Proofs) -> None:
        if has_auto(self.module, self.settings.layers):
            layers = settle_auto(proofs, self.settings.layers, partial(self._unfit, proofs.look))
            if is_compiled(self.module):
                torch.compiler.reset()  # hooks are ignored where a validation was compiled before they were attached
        else:
            layers = self.layers
            named = names_beside_auto(self.module, self.settings.layers)  # of others, what does not fit is passed over
            fit = [layer for layer in layers if layer.name in named or not self._unfit(proofs.look, layer)]
            layers = tuple(fit) or layers
        self.layers = judge(proofs, layers, strict=self.settings.strict, warn=self.warn_once)
        for layer in self.layers:
            if problem := self._unfit(proofs.look, layer):
                raise ValueError(f"Layer {layer.name!r} cannot be mixed: {problem}. Name other layers.")
        self._bypassed = {layer.name for layer in self.layers if proofs.made(layer) is None}
        self._mix_at(self.layers, proofs.look)
        self.is_settled = True
        self._unproved = {layer.name: 1 for layer in self.layers if not (proofs.made(layer) or _PROVED).has_power}
        if self._unproved:
            self._say_unproved()
        embeddings = ", ".join(call.name for call in proofs.look.entries.embeddings)
        is_embedded = embeddings and self.layers[0].name == INPUT
        embedded = f" ('input' means after {embeddings})" if is_embedded else ""
        rank_zero_info(f"Manifold mixup mixes at {', '.join(repr(layer.name) for layer in self.layers)}{embedded}.")

    def _unfit(self, look: Look, layer: Layer) -> str:
        return unfit(look, layer, self.settings.interpolation, self.settings.per_sample)

    def _mix_at(self, layers: tuple[Layer, ...], look: Look | None = None) -> None:
        self.layers = layers
        self.layer_names = tuple(layer.name for layer in layers)
        dims = {} if look is None else {m: d for layer in layers for m, d in look.dims_of(layer).items()}
        masks = {layer.name: look.masks_after(layer) for layer in layers} if look and self.settings.union_masks else {}
        if self._mixer is not None:
            self._mixer.detach()
        self._mixer = Mixer(layers, dims=dims, masks=masks)
        self._mixer.attach()

    def _prove_again(self, step: Any, args: Any, kwargs: Any, name: str, batch: Batch) -> None:
        """Prove a layer at the second step, where a proof had no power, and now and then when an epoch begins."""
        since, epoch = self._steps - self._last_look, batch.place["epoch"]
        is_second = self._steps == 2  # which may use what the first has kept
        is_new_epoch = epoch != self._epoch_of_last_look and since >= _STEPS_BETWEEN_PROOFS
        tries = self._unproved.get(name, 0)
        if (
            not is_second
            and not is_new_epoch
            and not (0 < tries <= _TRIES_FOR_POWER or (tries and since >= _STEPS_BETWEEN_PROOFS))
        ):
            return
        self._epoch_of_last_look = epoch
        layer = next(layer for layer in self.layers if layer.name == name)
        proofs = Proofs(self.look(step, args, kwargs), bool(self.settings.per_sample))
        if not proofs.look.has_loss:
            return
        place = None if name == INPUT else proofs.look.places.get(name)  # a module may be called so
        if place is not None and (problem := place.problem or place.way_around):
            if place.problem or name not in self._bypassed:
                raise RuntimeError(f"Layer {name!r} cannot be mixed any more: {problem}. Choose another layer.")
            return
        check(proofs, layer)
        proof = proofs.of(layer)
        if proof.way is not None:
            self._ways[batch.signature][name] = proof.way
        if tries:
            self._unproved[name] += 1
            if proof.has_power:
                del self._unproved[name]

    def _say_unproved(self) -> None:
        names = ", ".join(map(repr, self._unproved))
        rank_zero_info(
            f"Manifold mixup at {names} is not proved by the first batch: its loss would be the same, had the targets "
            "not moved along (they may all be alike). It is proved by one of the next."
        )


_PROVED = Proof(None)
