"""One mixed training step: the user's own, then again on the partners' targets with the network replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from torch import Tensor, nn

from mm_lightning.mixup import INPUT, Mixer, MixPlan
from mm_lightning.mixup.batch import Layout, Path, leaves_of, map_leaves, tensors_of
from mm_lightning.mixup.interpolation import mix_rows
from mm_lightning.mixup.targets import halves
from mm_lightning.step.effects import Effects
from mm_lightning.step.host import Host, Logged
from mm_lightning.step.inputs import mixed_entries
from mm_lightning.step.loss_modes import Fusing, LossMode, Measuring, RowWeights, paused
from mm_lightning.step.named import NamedLosses
from mm_lightning.step.replay import Replay, TakenOver

__all__ = ["MixedStep", "Way", "loss_of"]


@dataclass(frozen=True, eq=False)
class Way:
    """How a step is run that is mixed at one layer, as the look found it.

    Attributes:
        calls: Calls of modules that the partners' half takes over.
        effects: What that half changes in the module.
        layout: Where the rows of the batch are.
        inputs: For the layer ``"input"``, the tensors of the batch that are mixed.
        entries: And the modules that take a tensor which is a target too, and mix it where it enters them.
    """

    calls: tuple[tuple[nn.Module, TakenOver], ...]
    effects: Effects | Any
    layout: Layout
    inputs: frozenset[Path] = frozenset()
    entries: tuple[nn.Module, ...] = ()


@dataclass(eq=False)
class MixedStep:
    """Runs a training step with hidden state and targets mixed as planned.

    The loss is ``lam * L(targets) + (1 - lam) * L(targets[partner])`` on one and the same output of the mixed network.

    Args:
        step: The user's ``training_step``, taking the batch first.
        host: The LightningModule around it.
        mixer: Attached to the eligible layers.
        named: The losses that the user named; the rest of the step is then left on its own targets.
        backward: Takes the mixed losses of manual optimization.
        compiled: Wraps a module's call where the whole step was compiled.
        measuring: Measures the loss of the own half.
        fuses: Whether to try if the loss is nothing but a cross-entropy; False afterwards if it is not.

    Attributes:
        own_losses: The losses on the own targets.
        losses: The mixed losses.
        replay: The record of the network.
        observe: Told of each replayed call, and with None of the beginning of the partners' half.
    """

    step: Callable[..., Any]
    host: Host
    mixer: Mixer
    named: NamedLosses | None = None
    backward: Callable[..., Any] | None = None
    compiled: Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]] | None = None
    measuring: Measuring | None = None
    fuses: bool = False
    own_losses: list[Tensor] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    replay: Replay | None = None
    observe: Callable[[nn.Module | None, int], None] | None = None

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], plan: MixPlan, way: Way) -> tuple[Any, list[Logged]]:
        """Run one step.

        Args:
            args: Arguments of the step, the batch first. The batch is rebuilt, not changed.
            kwargs: Its keyword arguments.
            plan: A plan that mixes.
            way: How.

        Returns:
            What ``training_step`` returns on its own targets, with the mixed loss in the place of the loss; and what it
            logs, interpolated likewise.

        Raises:
            RuntimeError: If the planned layer did not run as often as it should.
        """
        batches = _Batches(args[0], plan, way)
        rows = None if plan.shared_lam is not None or plan.lam.stride(0) == 0 else RowWeights(plan)
        weighing = [] if rows is None else [rows]
        fusing = Fusing(plan, batches.targets, lambda t: replay.has_returned(t), weighing) if self.fuses else None
        modes: list[LossMode] = [mode for mode in (rows, fusing, self.measuring) if mode is not None]
        replay = Replay(way.calls, way.effects.draws, partial(paused, modes) if modes else None, self.compiled)
        replay.observe = self.observe
        self.own_losses, self.losses, self.replay = [], [], replay
        ratio = plan.ratio

        def again(on_partners: bool, upto: int | None) -> _Half:
            """The step once more, with the network replayed, up to its ``upto``-th backward pass."""
            half = _Half(upto)
            self.mixer.repeat(True)
            wanted, wants = fusing, fusing is not None and fusing.is_wanted
            if wanted is not None:
                wanted.is_wanted = False
            try:
                with ExitStack() as stack:
                    for context in (replay.replaying(), way.effects.put_back(), half.catching(self.host)):
                        stack.enter_context(context)
                    stack.enter_context(halves.partners())
                    if rows is not None and on_partners:
                        stack.enter_context(rows.of_partners())
                    if self.named is not None:
                        stack.enter_context(self.named.half(on_partners))
                    batch = batches.partners if on_partners else batches.own
                    half.output = self.step(batch, *args[1:], **kwargs)
            except _Enough:
                pass
            finally:
                self.mixer.repeat(False)
                if wanted is not None:
                    wanted.is_wanted = wants
            return half

        def mixed(own: Tensor, upto: int | None, logged: list[Logged]) -> tuple[Tensor | None, list[Logged]]:
            """A loss of the own half, mixed, and the logged values."""
            if fusing is not None and fusing.has(own) and all(fusing.has(value) for _, value, *_ in logged):
                return own, logged
            if fusing is not None:
                self.fuses = fusing.is_wanted = False
                if fusing.losses:  # they are a part of something else, so that the own half was not own
                    half = again(False, upto)
                    assert half.loss is not None
                    own, logged = half.loss, half.logged
            half = again(True, upto)
            if self.named is not None:  # those losses are interpolated, and the rest sees its own targets
                with self.named.interpolating(ratio):
                    half = again(False, upto)
                return half.loss, half.logged
            total = None if half.loss is None else _between(own, half.loss, ratio)
            return total, _interpolated(logged, half.logged, ratio)

        def at_backward(loss: Tensor, *more: Any, **options: Any) -> None:
            self._check(plan)
            total, _ = mixed(loss, len(self.losses), [])
            if total is None:
                raise RuntimeError(
                    "training_step calls manual_backward less often on the partners' targets than on its own, so that "
                    "they cannot be mixed. Let the number of backward passes not depend on the targets."
                )
            self.own_losses.append(loss)
            self.losses.append(total)
            (self.backward or self.host.backward)(total, *more, **options)

        def mixed_logs(logged: list[Logged]) -> list[Logged]:
            if not logged or (fusing is not None and all(fusing.has(value) for _, value, *_ in logged)):
                return logged
            own = again(False, None).logged if fusing is not None and fusing.losses else logged
            return _interpolated(own, again(True, None).logged, ratio)

        self.mixer.start(plan)
        try:
            with ExitStack() as stack:
                stack.enter_context(halves.own(plan))
                logged = stack.enter_context(self.host.own_half(at_backward))
                stack.enter_context(replay.recording())
                if plan.layer == INPUT and way.entries:
                    stack.enter_context(mixed_entries(way.entries, plan, way.layout))
                for mode in modes:
                    stack.enter_context(mode)
                if self.named is not None:
                    stack.enter_context(self.named.half(False))
                output = self.step(batches.own, *args[1:], **kwargs)
                own = loss_of(output)
                if not self.host.module.automatic_optimization:
                    return output, mixed_logs(logged)
                if own is None:
                    return output, logged
                self._check(plan)
                total, logs = mixed(own, None, logged)
            self.own_losses, self.losses = [own], [] if total is None else [total]
            return output if total is own else _with_loss(output, total), logs
        finally:
            self.mixer.stop()

    def _check(self, plan: MixPlan) -> None:
        assert plan.layer is not None
        runs = self.mixer.times_mixed(plan.layer)
        if plan.layer != INPUT and runs != [1]:
            raise RuntimeError(
                f"Layer {plan.layer!r} ran {runs[0]} times in one training_step, so its mix would not match the "
                "targets'. Choose a layer that runs exactly once, and keep other forward passes out of training_step."
            )


def loss_of(output: Any) -> Tensor | None:
    """The loss in what a step returns."""
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return loss if isinstance(loss, Tensor) else None


class _Enough(BaseException):
    """The partners' half has come to the backward pass that it was run for."""


class _Half:
    """What one run on the partners' targets gave."""

    def __init__(self, upto: int | None) -> None:
        self.upto = upto
        self.output: Any = None
        self.losses: list[Tensor] = []
        self.logged: list[Logged] = []

    @property
    def loss(self) -> Tensor | None:
        """The loss asked for."""
        if self.upto is None:
            return loss_of(self.output)
        return self.losses[self.upto] if self.upto < len(self.losses) else None

    @contextmanager
    def catching(self, host: Host) -> Iterator[None]:
        """Keep what the module logs and what it would go back from."""

        def backward(loss: Tensor, *_: Any, **__: Any) -> None:
            self.losses.append(loss)
            if self.upto is not None and len(self.losses) > self.upto:
                raise _Enough

        grads = [] if host.module.automatic_optimization else [(p, p.grad) for p in host.module.parameters()]
        try:
            with host.silent(backward) as self.logged:
                yield
        finally:
            for parameter, grad in grads:
                parameter.grad = grad


class _Batches:
    """The batch of the own half, and that of the partners'."""

    def __init__(self, batch: Any, plan: MixPlan, way: Way) -> None:
        self._plan, self._way = plan, way
        self._mixed: dict[int, Tensor] = {}
        if plan.layer == INPUT:
            for path, tensor in leaves_of(batch):
                if path in way.inputs:
                    self._mixed[id(tensor)] = self._mix(tensor)
        self.own = map_leaves(lambda leaf: self._mixed.get(id(leaf), leaf), batch) if self._mixed else batch

    @property
    def targets(self) -> list[Tensor]:
        """Tensors that may be targets, with their rows in dimension 0."""
        rows, dim_of = self._plan.batch_size, self._way.layout.dim_of
        return [tensor for tensor in tensors_of(self.own) if dim_of(tensor, rows) == 0]

    @cached_property
    def partners(self) -> Any:
        """Everything in the partners' order, but for what was mixed."""
        mixed = {id(tensor) for tensor in self._mixed.values()}
        return self._way.layout.permuted(self.own, self._plan.partner, skip=lambda tensor: id(tensor) in mixed)

    def _mix(self, tensor: Tensor) -> Tensor:
        dim = self._way.layout.dim_of(tensor, self._plan.batch_size)
        if dim is None:
            raise ValueError(
                f"The input of shape {tuple(tensor.shape)} has no row for each of the {self._plan.batch_size} rows of "
                "the batch, so it cannot be mixed."
            )
        return mix_rows(tensor.movedim(dim, 0), self._plan).movedim(0, dim)


def _interpolated(own: list[Logged], partners: list[Logged], ratio: Any) -> list[Logged]:
    """Interpolate each value that both halves logged under a name."""
    waiting: dict[str, list[Any]] = {}
    for name, value, *_ in partners:
        waiting.setdefault(name, []).append(value)
    result = []
    for name, value, args, kwargs in own:
        values = waiting.get(name)
        if values:
            value = _between(value, values.pop(0), ratio)
        result.append((name, value, args, kwargs))
    return result


def _between(own: Any, partner: Any, ratio: Any) -> Any:
    if isinstance(own, Mapping) and isinstance(partner, Mapping):
        return {key: _between(value, partner.get(key, value), ratio) for key, value in own.items()}
    numbers = (Tensor, int, float)
    if not isinstance(own, numbers) or not isinstance(partner, numbers) or isinstance(own, bool):
        return own  # a metric, which has seen the batch's own targets
    if not isinstance(own, Tensor) and not isinstance(partner, Tensor) and own == partner:
        return own
    if isinstance(ratio, Tensor) and isinstance(own, Tensor) and own.is_floating_point():
        ratio = ratio.to(own.dtype)
    return ratio * own + (1 - ratio) * partner  # not lerp: of two infinite losses it is no number


def _with_loss(output: Any, loss: Tensor | None) -> Any:
    if isinstance(output, Tensor) or loss is None:
        return loss
    return type(output)({**output, "loss": loss})
