"""The proof of a layer: mixed with ``lam = 0``, a step's loss and gradients must be those of the plain step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mm_lightning.look.flow import Flow
from mm_lightning.look.look import Look
from mm_lightning.look.nodes import Result, closure
from mm_lightning.look.reordering import RowSamples, are_close, mover, order_of
from mm_lightning.look.ways import Ways
from mm_lightning.look.without_trace import Watched, Writes, without_trace
from mm_lightning.mixup import INPUT, Layer, Mixer, MixPlan
from mm_lightning.mixup.batch import Path
from mm_lightning.namespaces import LightningModule
from mm_lightning.step.host import OptimizerReached
from mm_lightning.step.run import MixedStep
from mm_lightning.step.way import Way

__all__ = ["Proof", "Prover"]


@dataclass(frozen=True, eq=False)
class Proof:
    """What came of mixing at a layer with ``lam = 0``, where it only reorders rows.

    Attributes:
        way: How a step mixed there is run.
        problem: What went wrong; empty if loss and gradients were those of the plain step.
        has_power: Whether the loss would have been another one, had the targets not moved along.
        error: What the step raised, if it did.
    """

    way: Way | None
    problem: str = ""
    has_power: bool = True
    error: Exception | None = None


class Prover:
    """Mixes at layers with ``lam = 0``, which only puts rows into another order.

    Args:
        look: The look at the step, with what its plain run gave.
    """

    def __init__(self, look: Look) -> None:
        self.look = look

    def prove(self, layer: Layer, per_sample: bool = False) -> Proof:
        """Mix at a layer with ``lam = 0``: loss and gradients must be those of the plain step.

        Args:
            layer: The layer, which runs once.
            per_sample: Draw ``lam`` for each row: it is 1 for some and 0 for others, who change places.
        """
        look = self.look
        ways = Ways(look.graph, look.nodes(layer))
        calls, runs = ways.replayed()
        if layer.name == INPUT and not {id(c.module) for c in look.entries.calls} <= {id(m) for m, _ in calls}:
            return Proof(None, "the input is a target too, and enters the network where targets enter it as such")
        proof = self._try(layer, calls, runs, ways, per_sample)
        if not look.agree(not proof.problem):  # something is not as it seemed: take over no more than is mixed
            others = self._try(layer, ways.only_the_layer(), list(look.module.modules()), ways, per_sample)
            proof = others if look.agree(not others.problem) else replace(proof, problem=proof.problem or "elsewhere")
        return proof

    def explain(self, proof: Proof) -> str:
        """Say what the failure of a proof means."""
        look = self.look
        if look.is_symmetric or look.reordered_losses is None or proof.error is not None:
            return proof.problem
        return (
            f"{proof.problem}, and so it is for the same batch in another order: the step shuffles, samples or mixes "
            "rows itself"
        )

    def _try(self, layer: Layer, calls: Any, runs: list[nn.Module], ways: Ways, per_sample: bool) -> Proof:
        look = self.look
        plan = _plan_of(layer.name, order_of(look.rows), per_sample, look.module)
        order = torch.where(plan.lam == 0, plan.partner, torch.arange(look.rows, device=plan.lam.device)).cpu()
        is_input = layer.name == INPUT
        wanted = look.reordered_losses if is_input and look.reordered_losses is not None else look.losses
        collected: list[Tensor] = []
        mixer = Mixer([layer], dims=look.dims_of(layer))
        moves_noise = is_input and not layer.modules and look.reordered_losses is not None  # else behind the embeddings
        try:
            with without_trace(look.host, look.args[0], look.into(collected)) as writes:
                watched = Watched(look.outside(calls, runs), writes)
                switch = self._noise_switch(writes, ways, moves_noise, order)
                step = MixedStep(look.host, look.named, look.into(collected), switch)
                step.by_row = per_sample
                way = look.way(layer, calls, watched)
                with self._mixing(mixer, layer, writes, moves_noise, ways, order):
                    step.run(
                        look.step,
                        (self._with_masks_moved(ways, order), *look.args[1:]),
                        look.kwargs,
                        plan,
                        mixer,
                        way,
                    )
                assert step.replay is not None
                watched.found.draws = step.replay.drew
                losses, own = look.compared(step.losses, True), look.compared(step.own_losses)
                differs, moves = (False, False) if per_sample else self._compare_gradients(step, ways)
        except OptimizerReached:
            return Proof(None, "training_step steps an optimizer that is not one of self.optimizers()")
        except Exception as error:
            return Proof(None, f"mixing there fails with {type(error).__name__}: {error}", error=error)
        way = replace(way, effects=watched.found)
        if watched.problem:
            return Proof(None, watched.problem)
        if not are_close(losses, wanted, look.tolerance):
            numbers = f"{_shown(losses)} instead of {_shown(wanted)}"
            return Proof(way, f"with its rows and the targets' in another order, the loss is {numbers}")
        if differs:
            return Proof(way, "with its rows and the targets' in another order, the loss has another gradient")
        has_power = per_sample or moves or not are_close(own, wanted, look.tolerance)
        if is_input and not look.is_symmetric:
            # What it was compared with is no plain step: see that all of the batch was moved along.
            if rowless := look.without_rows(layer):
                return Proof(way, rowless)
            if not has_power:
                return Proof(way, "its loss is the same whether the targets move along with the rows or not")
        return Proof(way, "", has_power)

    def _compare_gradients(self, step: MixedStep, ways: Ways) -> tuple[bool, bool]:
        """Whether the gradient of what the network returned is another one than the plain, and whether the own is.

        Of what the outermost calls returned, so that going back costs no more than the loss.
        """
        look = self.look
        assert step.replay is not None
        after = {(id(call.module), call.number) for call in look.flow.calls if not ways.after.isdisjoint(call.results)}
        outputs = [
            (key, tensor)
            for key in look.gradients
            if key in after and isinstance(tensor := step.replay.output(*key), Tensor) and tensor.requires_grad
        ]
        if not outputs or not step.losses or not look.is_symmetric or look.named is not None:
            return False, False
        total, own = sum(step.losses), sum(step.own_losses)
        tensors = [tensor for _, tensor in outputs]
        mixed = torch.autograd.grad(total, tensors, retain_graph=True, allow_unused=True)  # type: ignore[arg-type]
        others = torch.autograd.grad(own, tensors, allow_unused=True)  # type: ignore[arg-type]
        return (
            not all(self._is_plain_gradient(key, grad) for (key, _), grad in zip(outputs, mixed, strict=True)),
            not all(self._is_plain_gradient(key, grad) for (key, _), grad in zip(outputs, others, strict=True)),
        )

    def _is_plain_gradient(self, key: tuple[int, int], grad: Tensor | None) -> bool:
        """Whether it is the plain run's in the new order, if it has rows at all."""
        look = self.look
        if grad is None or look.rows not in grad.shape:
            return True
        return look.gradients[key].dims(RowSamples([grad], {look.rows}, is_reordered=True))[0] is not None

    @contextmanager
    def _mixing(self, mixer: Mixer, layer: Layer, writes: Writes, moves_noise: bool, ways: Ways, order: Tensor) -> Any:
        """Attach the mixer, and let masks and noise that come after the layer move along with its rows."""
        look = self.look
        with ExitStack() as stack:
            mixer.attach()
            stack.callback(mixer.detach)
            if moves_noise:
                writes.move = mover(order)
            for module in layer.modules if not moves_noise else ():
                handle = module.register_forward_hook(lambda *_: setattr(writes, "move", mover(order)))
                stack.callback(handle.remove)
            if ways.meets_masks:
                flow = Flow(lambda tensors: None)  # type: ignore[arg-type, return-value]
                flow.follow(look.args[0])
                stack.enter_context(flow.watching(look.watched))
                targets = {leaf.path for leaf in ways.targets} | self._lone_masks(ways)
                flow.exchange_masks(layer, look.mixed_inputs(layer), targets, mover(order))
            yield

    def _lone_masks(self, ways: Ways) -> set[Path]:
        """Masks and lengths of the batch that nothing but what comes after the layer looks at."""
        look = self.look
        before, after = closure(ways.layer), closure(ways.below & look.graph.upstream)
        leaves = [leaf for leaf in look.flow.leaves if leaf in after and leaf not in ways.targets | before]
        return {leaf.path for leaf in leaves if leaf not in closure(look.graph.weights, by_values=True)}

    def _with_masks_moved(self, ways: Ways, order: Tensor) -> Any:
        """The batch with those in the layer's new order."""
        look = self.look
        lone = self._lone_masks(ways)
        moved = {id(leaf.tensor) for leaf in look.flow.leaves if leaf.path in lone}
        return look.layout.permuted(look.args[0], order, skip=lambda t: id(t) not in moved) if moved else look.args[0]

    def _noise_switch(self, writes: Writes, ways: Ways, always: bool, order: Tensor) -> Callable[[Any, Any], None]:
        """In the partners' half, noise moves along from the first replayed call on that ended after the layer."""
        look = self.look
        end = max((node.call.end for node in ways.layer if isinstance(node, Result)), default=0)

        def switch(module: nn.Module | None, number: int) -> None:
            if module is None:  # the half begins
                writes.move = mover(order) if always else None
            elif any(run.number == number and run.end >= end for run in look.graph.runs_of(module)):
                writes.move = mover(order)

        return switch


def _plan_of(layer: str, order: Tensor, per_sample: bool, module: LightningModule) -> MixPlan:
    rows = len(order)
    if not per_sample:
        return MixPlan(layer, order, torch.zeros(1).expand(rows), order.argsort(), 0.0).to(module.device)
    # The first half of the rows change places among themselves, and the others stay.
    half = max(2, rows // 2)
    partner = torch.cat([order_of(half), torch.arange(half, rows)])
    lam = (torch.arange(rows) >= half).float()
    return MixPlan(layer, partner, lam, partner.argsort()).to(module.device)


def _shown(losses: list[Tensor]) -> str:
    return ", ".join(f"{float(loss):.6g}" for loss in losses) or "none"
