"""One look at a training step before anything trains: which tensors are targets, and where the batch may be mixed."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from mm_lightning.apart import OptimizerReached, apart
from mm_lightning.mixup import INPUT, Layer, Mixer, MixPlan, TargetPair, named_layers
from mm_lightning.mixup.graph import Place, find_places
from mm_lightning.mixup.masks import MaskSite, sites_after
from mm_lightning.mixup.recording import CatchBackward, trace_modules
from mm_lightning.mixup.trace import Trace

__all__ = ["Roles", "View", "check_losses", "look_at", "map_indexed", "signature_of"]

Signature = tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Roles:
    """What the tensors of a batch are for; indices count its tensors of one dimension or more.

    Attributes:
        targets: Those that the loss compares with.
        inputs: Those that are computed through.
        masks: Integers that select or scale hidden states.
    """

    targets: frozenset[int]
    inputs: frozenset[int]
    masks: frozenset[int]

    def is_plain(self, index: int) -> bool:
        """Whether it is no target, nor might become one when the step does something else."""
        return index not in self.targets and (index in self.inputs or index in self.masks)


@dataclass(frozen=True, eq=False)
class View:
    """What a training step was seen to do with a batch.

    Attributes:
        roles: What the tensors of the batch are for.
        places: Every module as a place to mix at, in the order of ``named_modules``.
        embeddings: The modules at whose output integers of the batch become floating point numbers.
        input_problem: Why the batch itself cannot be mixed; empty if it can.
        input_shape: Shape of the first tensor that is computed through.
        has_loss: Whether there is anything to train on.
        masks: Arguments in which modules take masks of the batch.
        ends: When each module ended, on the clock of ``masks``.
    """

    roles: Roles
    places: tuple[Place, ...]
    embeddings: tuple[str, ...]
    input_problem: str
    input_shape: tuple[int, ...] | None
    has_loss: bool
    masks: tuple[MaskSite, ...] = ()
    ends: Mapping[str, int] = field(default_factory=dict)

    def masks_after(self, layers: Sequence[Layer], root: nn.Module) -> dict[str, list[tuple[nn.Module, MaskSite]]]:
        """For each layer the modules that take a mask after it, and in which argument."""
        modules = named_layers(root)
        names = {layer.name: [name for name in modules if modules[name] in layer.modules] for layer in layers}
        return {
            layer.name: [
                (modules[site.name], site)
                for site in sites_after(layer, self.masks, self.ends, names[layer.name])
                if site.name not in names[layer.name]
            ]
            for layer in layers
        }

    def input_layer(self, root: nn.Module) -> Layer:
        """The layer ``"input"``: the batch, and the embeddings of its integers."""
        modules = named_layers(root)
        return Layer(INPUT, tuple(modules[name] for name in self.embeddings))


def look_at(
    module: pl.LightningModule,
    step: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batch_size: int,
    batch_dim: int | dict[str, int] = 0,
    describe: Callable[[str], bool] = lambda name: True,
) -> View:
    """Run ``training_step`` without training, and follow the batch through it.

    Weights, buffers, metrics, other attributes, gradients and random states are put back; nothing is logged; optimizers
    and backward passes do not run. It costs one forward pass and a walk over its graph, and the memory of a copy of the
    module's tensors while it lasts.

    Args:
        module: The module. Its modes (train or eval) are left as they are.
        step: Its ``training_step``.
        args: The step's arguments, the batch first. Not changed.
        kwargs: Its keyword arguments.
        batch_size: Number of rows.
        batch_dim: Dimension of layers' outputs that holds the batch.
        describe: Names of the modules to find a path around, where there is one.

    Raises:
        Exception: What ``training_step`` raises.
    """
    trace = Trace(trained=list(module.parameters()))
    tensors: list[Tensor] = []

    def follow(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0:
            return tensor
        tensors.append(tensor)
        return trace.follow(tensor)

    modules = named_layers(module)
    with apart(module, trace) as stack:
        stack.callback(trace.close)
        traced = apply_to_collection(args[0], Tensor, follow)
        stack.enter_context(trace_modules(modules, trace))
        _run(step, (traced, *args[1:]), kwargs, trace)
    places = find_places(trace, modules, batch_size, batch_dim, describe)
    return _view(trace, tuple(places), tensors)


def check_losses(
    module: pl.LightningModule,
    step: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    roles: Roles,
    batch_size: int,
    mixer: Mixer,
) -> None:
    """Prove that the partners' loss which pairs compute is the loss of the partners' targets.

    The step runs on unmixed inputs twice: on a batch with the partners' targets, and on pairs of targets with all
    weight on the partners'. What leaves the tensors (numbers, numpy, scripted functions) makes the two differ.

    Raises:
        RuntimeError: If they do.
    """
    partner = torch.arange(batch_size).roll(1)
    last = mixer.layers[-1].name  # where most of the step is before the mix
    plan = MixPlan(last, partner, torch.zeros(1).expand(batch_size), partner.argsort()).to(module.device)
    if roles.targets & roles.inputs:
        return  # what the network sees would be exchanged, too
    mixer.is_verified = True
    found: list[list[float]] = []
    for is_pair in (False, True):

        def exchange(tensor: Tensor, index: int, is_pair: bool = is_pair) -> Tensor:
            if roles.is_plain(index) or len(tensor) != batch_size:
                return tensor
            return TargetPair.wrap(tensor, plan, mixer) if is_pair else tensor.index_select(0, plan.partner)

        trace = Trace(trained=list(module.parameters()))
        with apart(module, trace) as stack:
            stack.callback(mixer.stop)
            if is_pair:
                mixer.rehearse(plan)
            stack.enter_context(CatchBackward(trace))
            _run(step, (map_indexed(exchange, args[0]), *args[1:]), kwargs, trace)
            lost = next((loss.lost for loss in trace.loss_tensors if isinstance(loss, TargetPair) and loss.lost), None)
            if lost is not None:
                raise RuntimeError(lost)
            found.append([float(loss.detach()) for loss in trace.loss_tensors])
    wanted, got = (torch.tensor(losses, dtype=torch.float64) for losses in found)
    is_close = wanted.shape == got.shape and torch.allclose(got, wanted, rtol=_tolerance(module), equal_nan=True)
    if not is_close:
        raise RuntimeError(
            f"The loss of training_step cannot be followed: with the partners' targets it is {found[0]}, but the same "
            f"step on targets that know their partners' gives {found[1]}. Some of it is computed from the batch's "
            "targets in a way that nobody can see into: before the network runs, from Python numbers (tolist, item, "
            "numpy), from torch.tensor(targets) or by a scripted function. Compute it from the batch's tensors after "
            "the network has run, or name the losses to mix: ManifoldMixupCallback(loss=...)."
        )


def _tolerance(module: nn.Module) -> float:
    """How far the same loss may be from itself, relative: by the least precise numbers it is computed with."""
    dtypes = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda") or dtypes & {torch.half, torch.bfloat16}:
        return 2e-2
    return 1e-4 if torch.float32 in dtypes else 1e-9


def map_indexed(function: Callable[[Tensor, int], Tensor], batch: Any) -> Any:
    """Rebuild a batch from its tensors of one dimension or more, each with its number."""
    if type(batch) in (list, tuple) and all(isinstance(part, Tensor) and part.dim() for part in batch):
        return type(batch)([function(tensor, number) for number, tensor in enumerate(batch)])  # as most batches are
    numbers = itertools.count()
    return apply_to_collection(
        batch, Tensor, lambda tensor: function(tensor, next(numbers)) if tensor.dim() else tensor
    )


def signature_of(batch: Any) -> Signature:
    """What batches have in common whose tensors are for the same: structure, names, types and dimensions."""
    if isinstance(batch, Tensor):
        return (batch.dtype, batch.dim())
    if isinstance(batch, Mapping):
        return tuple((key, signature_of(value)) for key, value in batch.items())
    if isinstance(batch, (list, tuple)):
        return tuple(signature_of(value) for value in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return tuple((item.name, signature_of(getattr(batch, item.name, None))) for item in dataclasses.fields(batch))
    return (type(batch),)


def _run(step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], trace: Trace) -> None:
    output = None
    with suppress(OptimizerReached):
        output = step(*args, **kwargs)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if isinstance(loss, Tensor):
        trace.end_in(loss)


def _view(trace: Trace, places: tuple[Place, ...], tensors: list[Tensor]) -> View:
    inputs: set[int] = set()
    modulating: set[int] = set()
    embeddings: list[str] = []
    problem = ""
    for entry in trace.entries:
        if not entry.is_input:
            continue
        origins = frozenset().union(*(trace.origins[parent] for parent in entry.parents))
        (inputs if entry.is_value else modulating).update(origins)
        values = frozenset().union(*(trace.values[parent] for parent in entry.parents)) if entry.is_value else ()
        at = [place.name for place in places if entry.node in place.embeds]
        if all(trace.is_integer[index] for index in origins) and at:
            embeddings.append(at[0])
        elif any(trace.is_integer[index] for index in values) and not problem:
            problem = (
                f"integers of the batch enter the network in '{entry.name}', not in a module such as nn.Embedding at "
                "whose output they could be mixed"
            )
    if not inputs:  # the graph does not tell, as with tensor parallelism: what is no target is taken for the input
        floats = [index for index, is_integer in enumerate(trace.is_integer) if not is_integer]
        inputs = set(floats) - trace.targets
        problem = "" if inputs else "nothing of the batch reaches the loss through weights that are trained"
    unusable = {place.name for place in places if place.verdict == "unusable"}
    return View(
        Roles(frozenset(trace.targets), frozenset(inputs), frozenset(modulating - inputs - trace.targets)),
        places,
        tuple(dict.fromkeys(embeddings)),
        problem,
        next((tuple(tensors[i].shape) for i in sorted(inputs)), None),
        bool(trace.losses),
        tuple(mask for mask in trace.masks if mask.name not in unusable),  # a loss module takes targets so
        {name: call.end for name, call in trace.calls.items()},
    )
