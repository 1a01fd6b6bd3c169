"""One mixed training step: the user's own, then again on the partners' targets with the network replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

from torch import Tensor, nn

from mm_lightning.mixup import INPUT, Mixer, MixPlan
from mm_lightning.mixup.targets import halves
from mm_lightning.step.attach import compiled_with
from mm_lightning.step.batches import Batches
from mm_lightning.step.host import Host, Logged
from mm_lightning.step.inputs import mixed_entries
from mm_lightning.step.logs import between, interpolated
from mm_lightning.step.loss_modes import Fusing, LossMode, Measuring, RowWeights, paused
from mm_lightning.step.named_losses import NamedLosses
from mm_lightning.step.replay import Replay
from mm_lightning.step.way import Way

__all__ = ["MixedStep", "loss_of", "with_loss"]


class MixedStep:
    """Runs training steps with hidden state and targets mixed as planned.

    The loss is ``lam * L(targets) + (1 - lam) * L(targets[partner])`` on one and the same output of the mixed network.

    Args:
        host: The LightningModule around the step.
        named: The losses that the user named; the rest of the step is then left on its own targets.
        backward: Takes the mixed losses of manual optimization; None lets the module go back from them.
        observe: Told of each replayed call, and with None of the beginning of the partners' half.

    Attributes:
        fuses: Whether the loss may be nothing but a cross-entropy. False once it was not.
        by_row: Whether rows may have weights of their own.
        hides_calls: Whether a call that was to be taken over was not seen, as within a compiled function.
        own_losses: The losses of the last step, on its own targets.
        losses: The mixed losses of the last step.
        replay: The record of the network in the last step.
    """

    def __init__(
        self,
        host: Host,
        named: NamedLosses | None = None,
        backward: Callable[..., Any] | None = None,
        observe: Callable[[nn.Module | None, int], None] | None = None,
    ) -> None:
        self.host, self.named, self.backward, self.observe = host, named, backward, observe
        self.compiled = compiled_with(host.module)
        self.fuses = False
        self.by_row = False
        self.hides_calls = False
        self.own_losses: list[Tensor] = []
        self.losses: list[Tensor] = []
        self.replay: Replay | None = None

    def run(
        self,
        step: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        plan: MixPlan,
        mixer: Mixer,
        way: Way,
        measuring: Measuring | None = None,
    ) -> tuple[Any, list[Logged]]:
        """Run one step.

        Args:
            step: The user's ``training_step``, taking the batch first.
            args: Its arguments, the batch first. The batch is rebuilt, not changed.
            kwargs: Its keyword arguments.
            plan: A plan that mixes.
            mixer: Attached to the eligible layers.
            way: How.
            measuring: Measures the loss.

        Returns:
            What ``training_step`` returns on its own targets, with the mixed loss in the place of the loss; and what it
            logs, interpolated likewise.

        Raises:
            RuntimeError: If the planned layer did not run as often as it should.
        """
        mixer.start(plan, keep=self.hides_calls or way.calls_layer)
        try:
            batches = Batches(args[0], mixer.mixing, way)
            run = _Run(self, lambda batch: step(batch, *args[1:], **kwargs), batches, mixer, way, measuring)
            self.own_losses, self.losses, self.replay = run.own_losses, run.losses, run.replay
            try:
                return run.result()
            finally:
                self.hides_calls = self.hides_calls or not run.replay.is_complete
        finally:
            mixer.stop()


class _Run:
    """One step, from top to bottom: its own half, the partners', their interpolation."""

    def __init__(
        self,
        mixed_step: MixedStep,
        step: Callable[[Any], Any],
        batches: Batches,
        mixer: Mixer,
        way: Way,
        measuring: Measuring | None,
    ) -> None:
        self.mixed_step, self.step, self.batches = mixed_step, step, batches
        self.mixing, self.mixer, self.way = mixer.mixing, mixer, way
        self.host, self.named = mixed_step.host, mixed_step.named
        self.own_losses: list[Tensor] = []
        self.losses: list[Tensor] = []
        self.rows = RowWeights(self.mixing) if mixed_step.by_row else None
        fusing = partial(Fusing, self.mixing, batches.has_target, self.has_mixed, self.rows)
        self.fusing = fusing() if mixed_step.fuses else None
        if measuring is not None:
            measuring.mixing = self.mixing
        self.modes: list[LossMode] = [mode for mode in (self.rows, self.fusing, measuring) if mode is not None]
        around = partial(paused, self.modes) if self.modes else None
        self.replay = Replay(way.calls, way.effects.draws, around, mixed_step.compiled)
        self.replay.observe = mixed_step.observe

    def result(self) -> tuple[Any, list[Logged]]:
        """What the step returns and logs."""
        self.started = self.way.effects.start()
        with ExitStack() as stack:
            if self.mixing.plan.layer == INPUT and self.way.entries:
                stack.enter_context(mixed_entries(self.way.entries, self.mixing, self.way.layout))
            if self.named is not None:
                stack.enter_context(self.named.half(False))
            halves.begin(self.mixing)
            stack.callback(halves.end)
            logged = stack.enter_context(self.host.own_half(self.at_backward))
            stack.enter_context(self.replay.recording())
            for mode in self.modes:
                stack.enter_context(mode)
            output = self.step(self.batches.own)
            own = loss_of(output)
            if not self.host.module.automatic_optimization:
                return output, self.mixed_logs(logged)
            if own is None:
                return output, logged
            total, logs = self.mixed(own, None, logged)
        self.own_losses.append(own)
        self.losses += [] if total is None else [total]
        return output if total is own else with_loss(output, total), logs

    def at_backward(self, loss: Tensor, *more: Any, **options: Any) -> None:
        """Stands in for ``manual_backward``: goes back from the mixed loss."""
        total, _ = self.mixed(loss, len(self.losses), [])
        if total is None:
            raise RuntimeError(
                "training_step calls manual_backward less often on the partners' targets than on its own, so that they "
                "cannot be mixed. Let the number of backward passes not depend on the targets."
            )
        self.own_losses.append(loss)
        self.losses.append(total)
        (self.mixed_step.backward or self.host.backward)(total, *more, **options)

    def mixed(self, own: Tensor, upto: int | None, logged: list[Logged]) -> tuple[Tensor | None, list[Logged]]:
        """A loss of the own half, mixed, and the logged values."""
        self.check_layer()
        if self.is_fused(own, logged):
            return own, logged
        if self.fusing is not None:
            self.mixed_step.fuses = self.fusing.is_wanted = False
            if self.fusing.losses:  # they are a part of something else, so that the own half was not own
                half = self.again(False, upto)
                assert half.loss is not None
                own, logged = half.loss, half.logged
        half = self.again(True, upto)
        if self.named is not None:  # those losses are interpolated, and the rest sees its own targets
            with self.named.interpolating(self.ratio):
                half = self.again(False, upto)
            return half.loss, half.logged
        total = None if half.loss is None else between(own, half.loss, self.ratio)
        return total, interpolated(logged, half.logged, self.ratio)

    @property
    def ratio(self) -> Any:
        """The weight of the own half.

        Raises:
            RuntimeError: If rows have weights of their own, and it was not said before that they may.
        """
        plan = self.mixing.for_loss
        if self.rows is None and plan.shared_lam is None and plan.lam.stride(0) != 0:
            raise RuntimeError(
                f"{plan.interpolation or 'ratio'!r} gives each row a weight of its own, which it must say: give it an "
                "attribute per_sample = True."
            )
        return plan.ratio

    def mixed_logs(self, logged: list[Logged]) -> list[Logged]:
        """What is logged in manual optimization."""
        if not logged or self.is_fused(None, logged):
            return logged
        own = self.again(False, None).logged if self.fusing is not None and self.fusing.losses else logged
        return interpolated(own, self.again(True, None).logged, self.ratio)

    def again(self, on_partners: bool, upto: int | None) -> _Half:
        """The step once more, with the network replayed, up to its ``upto``-th backward pass."""
        half = _Half(upto)
        with ExitStack() as stack:
            # First back to where the step began, when no call was recorded; then what stands in for calls.
            for context in (self.started.put_back(), self.replay.replaying(), half.catching(self.host)):
                stack.enter_context(context)
            halves.repeat(True)
            stack.callback(halves.repeat, False)
            self.mixer.repeat(True)
            stack.callback(self.mixer.repeat, False)
            if self.fusing is not None:
                stack.enter_context(self.fusing.off())
            if self.rows is not None and on_partners:
                stack.enter_context(self.rows.of_partners())
            if self.named is not None:
                stack.enter_context(self.named.half(on_partners))
            with suppress(_Enough):
                half.output = self.step(self.batches.partners if on_partners else self.batches.begun())
        if self.replay.drew:
            self.way.effects.draws = True  # so that from now on both halves draw alike
        return half

    def is_fused(self, own: Tensor | None, logged: list[Logged]) -> bool:
        """Whether a loss, and all that is logged, are mixed already."""
        if self.fusing is None:
            return False
        return (own is None or self.fusing.has(own)) and all(self.fusing.has(value) for _, value, *_ in logged)

    def has_mixed(self, tensor: Tensor) -> bool:
        """Whether the mixed network has returned it."""
        return self.replay.has_returned(tensor)

    def check_layer(self) -> None:
        """Raise RuntimeError if the planned layer did not run once."""
        layer = self.mixing.plan.layer
        assert layer is not None
        if layer != INPUT and (runs := self.mixer.times_mixed(layer)) != [1]:
            raise RuntimeError(
                f"Layer {layer!r} ran {runs[0]} times in one training_step, so its mix would not match the targets'. "
                "Choose a layer that runs exactly once, and keep other forward passes out of training_step."
            )


def loss_of(output: Any) -> Tensor | None:
    """The loss in what a step returns."""
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return loss if isinstance(loss, Tensor) else None


def with_loss(output: Any, loss: Tensor | None) -> Any:
    """What a step returns, with another loss."""
    if isinstance(output, Tensor) or loss is None:
        return loss
    return type(output)({**output, "loss": loss})


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
