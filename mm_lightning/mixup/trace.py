"""How a batch becomes a loss: one forward pass followed from each tensor of the batch to what is trained on."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves, tree_map_only

from mm_lightning.mixup.expression import is_in_place, is_independent, is_network
from mm_lightning.mixup.masks import MaskSite

__all__ = ["Call", "Entry", "Trace", "Traced", "node_of"]

# Functions that hand their operands' values on, rather than select or scale by them, as masks do.
_JOINS = frozenset({"cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack"})


@dataclass(eq=False)
class Entry:
    """A place where tensors of the batch enter what is trained: the autograd graph.

    Attributes:
        node: The node of the autograd graph.
        parents: What entered: tensors of the batch, or what was computed from them without gradient.
        is_input: Whether the result went through weights later, so that the batch was an input here and not a target.
        is_value: Whether values entered. Integers that only select or scale, such as masks, do not count as input.
        name: The function.
    """

    node: Hashable
    parents: tuple[Hashable, ...]
    is_input: bool
    is_value: bool
    name: str


@dataclass(eq=False)
class Call:
    """What a module was seen to do.

    Attributes:
        nodes: Where its output tensors are in the graph; None for one that nothing is trained through.
        shapes: Their shapes.
        dtypes: Their types.
        has_weights: Whether it applied weights of two or more dimensions of its own to floating point numbers.
        count: How often it ran.
        end: When it ended, counted in calls of modules.
    """

    nodes: list[Hashable | None]
    shapes: list[tuple[int, ...]]
    dtypes: list[torch.dtype]
    has_weights: bool
    count: int = 1
    end: int = 0


@dataclass(eq=False)
class Trace:
    """The record of one forward pass.

    Attributes:
        leaves: Node of each tensor of the batch, in order.
        is_integer: Whether it holds integers or booleans.
        is_discrete: Whether it holds integers, booleans or nothing but 0 and 1, as masks do.
        parents: Parents of nodes that are not of the autograd graph.
        origins: The tensors of the batch that each such node was computed from.
        values: Those of them whose values it hands on; others selected or scaled them.
        entries: Where they entered the autograd graph.
        calls: What each module did, by name, in the order in which they ended.
        losses: Nodes of what is trained on.
        masks: Arguments in which modules took masks.
        trained: The module's parameters.
        loss_tensors: What is trained on.
        targets: Indices of the tensors of the batch that the losses compare with, rather than being computed through.
    """

    leaves: list[Hashable] = field(default_factory=list)
    is_integer: list[bool] = field(default_factory=list)
    is_discrete: list[bool] = field(default_factory=list)
    parents: dict[Hashable, tuple[Hashable, ...]] = field(default_factory=dict)
    origins: dict[Hashable, frozenset[int]] = field(default_factory=dict)
    values: dict[Hashable, frozenset[int]] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    calls: dict[str, Call] = field(default_factory=dict)
    losses: list[Hashable] = field(default_factory=list)
    targets: set[int] = field(default_factory=set)
    loss_tensors: list[Tensor] = field(default_factory=list)
    masks: list[MaskSite] = field(default_factory=list)
    clock: int = 0
    trained: list[nn.Parameter] = field(default_factory=list)
    made: list[weakref.ref[Tensor]] = field(default_factory=list)

    def close(self) -> None:
        """Leave plain tensors wherever user code kept traced ones."""
        for reference in self.made:
            tensor = reference()
            if isinstance(tensor, Traced):
                tensor.retire()

    def give_gradients(self) -> None:
        """What follows a backward pass may read gradients, which the look does not compute."""
        for parameter in self.trained:
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def tick(self) -> int:
        """The time, which passes with every call."""
        self.clock += 1
        return self.clock

    def follow(self, tensor: Tensor, *, discrete: bool | None = None) -> Tensor:
        """Begin to follow a tensor of the batch, which is not changed. Sparse and nested ones stay plain.

        Args:
            tensor: The tensor.
            discrete: Whether a floating point tensor is a mask; None looks at its values.
        """
        node = object()
        index = len(self.leaves)
        self.leaves.append(node)
        is_integer = not (tensor.is_floating_point() or tensor.is_complex())
        is_followed = tensor.layout is torch.strided and not tensor.is_nested
        if discrete is None:
            discrete = is_followed and not is_integer and bool(((tensor == 0) | (tensor == 1)).all())
        self.is_integer.append(is_integer)
        self.is_discrete.append(is_integer or discrete)
        self.parents[node] = ()
        self.origins[node] = self.values[node] = frozenset({index})
        if not is_followed:
            return tensor
        return _traced(tensor.detach(), self, node, frozenset({index}))

    def end_in(self, loss: Tensor) -> None:
        """Note that ``loss`` is trained on."""
        if isinstance(loss, Traced):
            self.targets |= loss.origins
        self.loss_tensors.append(loss)
        node = node_of(loss)
        if node is not None and node not in self.losses:
            self.losses.append(node)


class Traced(Tensor):
    """A tensor that knows which tensors of the batch it was computed from, until weights are applied to it."""

    value: Tensor
    record: Trace
    node: Hashable | None
    origins: frozenset[int]
    entries: frozenset[Entry]

    @property
    def is_of_integers(self) -> bool:
        """Whether it was computed, without gradient, from integers of the batch alone."""
        return self.node is not None and all(self.record.is_discrete[index] for index in self.origins)

    def retire(self) -> None:
        """Become a plain tensor."""
        self.__dict__.clear()
        self.__class__ = Tensor  # type: ignore[assignment]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Apply ``func`` to the values and note where they go."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return func(*tree_map_only(Traced, _value_of, args), **tree_map_only(Traced, _value_of, kwargs))
        name = getattr(func, "__name__", str(func))
        leaves = tree_leaves((args, kwargs))
        traced = [leaf for leaf in leaves if isinstance(leaf, Traced)]
        if any(isinstance(leaf, Tensor) and _has_own_rules(leaf) for leaf in leaves):
            # Of another class with rules of its own, such as targets of a mixed step: those come first.
            values, named_values = tree_map_only(Traced, _value_of, (args, kwargs))
            return func(*values, **named_values)
        with torch._C.DisableTorchFunctionSubclass():
            for tensor in traced:
                _enter_through_function(tensor)
            if name in ("requires_grad_", "__set__"):  # of the tensor that user code holds and asks for gradients
                result = func(*args, **kwargs)
                args[0].value = args[0].as_subclass(Tensor)
                return result
            values, named_values = tree_map_only(Traced, _value_of, (args, kwargs))
            result = func(*values, **named_values)
            tensors = [leaf.value if isinstance(leaf, Traced) else leaf for leaf in leaves if isinstance(leaf, Tensor)]
            if is_independent(name) or name == "grad":  # a gradient comes from what it is the gradient of
                return result
            if is_in_place(name, kwargs):
                return _changed(kwargs.get("out", args[0] if args else None), name, traced, tensors, result)
            first = args[0] if args else None
            return tree_map_only(Tensor, lambda value: _result_of(value, name, traced, tensors, first), result)


def _value_of(tensor: Traced) -> Tensor:
    return tensor.value


def _has_own_rules(tensor: Tensor) -> bool:
    """Whether the tensor's class intercepts functions, as targets of a mixed step do, and sharded tensors do not."""
    rule = type(tensor).__torch_function__
    plain = (torch._C._disabled_torch_function_impl, Tensor.__torch_function__)
    return not isinstance(tensor, Traced) and rule not in plain and getattr(rule, "__func__", rule) is not _DEFAULT_RULE


_DEFAULT_RULE = Tensor.__torch_function__.__func__  # type: ignore[attr-defined]


def node_of(tensor: Tensor) -> Hashable | None:
    """Where the tensor is in the graph."""
    if isinstance(tensor, Traced):
        return tensor.value.grad_fn or tensor.node
    return tensor.grad_fn


def _traced(
    value: Tensor,
    trace: Trace,
    node: Hashable | None,
    origins: frozenset[int],
    entries: frozenset[Entry] = frozenset(),
    tensor: Any = None,
) -> Traced:
    tensor = value.as_subclass(Traced) if tensor is None else tensor
    tensor.value, tensor.record, tensor.node, tensor.origins, tensor.entries = value, trace, node, origins, entries
    trace.made.append(weakref.ref(tensor))
    return tensor


def _result_of(
    value: Tensor, name: str, traced: Sequence[Traced], tensors: Sequence[Tensor], first: Any, into: Any = None
) -> Tensor:
    """Note what became of traced tensors in one call, and follow the result where it may still be a target."""
    trace = traced[0].record
    origins = frozenset().union(*(tensor.origins for tensor in traced))
    entries = frozenset().union(*(tensor.entries for tensor in traced))
    parents = tuple(tensor.node for tensor in traced if tensor.node is not None)
    if not value.requires_grad:
        node = object()
        trace.parents[node] = parents
        trace.origins[node] = origins
        trace.values[node] = _handed_on(name, traced)
        return _traced(value, trace, node, origins, entries, into)
    # An embedding may belong to the network (of words) or to the loss (of class centres): what follows will tell.
    plain = [tensor for tensor in tensors if not any(tensor is other.value for other in traced)]
    is_layer = is_network(name, plain) and not name.startswith("embedding")
    if parents:
        is_discrete = all(trace.is_discrete[index] for node in parents for index in trace.origins[node])
        meets_weights = any(tensor.is_leaf and tensor.requires_grad for tensor in tensors)
        is_applied_to = getattr(first, "node", None) in parents if is_layer else meets_weights
        entry = Entry(value.grad_fn, parents, False, not is_discrete or is_applied_to or name in _JOINS, name)
        trace.entries.append(entry)
        entries |= {entry}
    if not is_layer:
        return _traced(value, trace, None, origins, entries, into)
    for entry in entries:
        entry.is_input = True
    return value


def _handed_on(name: str, traced: Sequence[Traced]) -> frozenset[int]:
    """The tensors of the batch whose values a result has: discrete operands beside others select or scale."""
    handing = [tensor for tensor in traced if tensor.node is not None]
    if name not in _JOINS:
        handing = [tensor for tensor in handing if not tensor.is_of_integers] or handing
    return frozenset().union(*(tensor.record.values[tensor.node] for tensor in handing))


def _enter_through_function(tensor: Traced) -> None:
    """A ``torch.autograd.Function`` that took a traced tensor returned it with a gradient: take it for a layer."""
    if tensor.requires_grad and not tensor.value.requires_grad and tensor.grad_fn is not None:
        node = tensor.grad_fn
        is_layer = node.name() == "CheckpointFunctionBackward" or not _is_of_hidden_states(node)
        if not is_layer:  # a loss perhaps: that it is no more followed must not pass for "no target"
            tensor.record.targets |= tensor.origins
        elif tensor.origins:
            tensor.record.entries.append(Entry(node, (tensor.node,), True, True, node.name()))
        tensor.value = tensor.as_subclass(Tensor)
        tensor.node, tensor.origins, tensor.entries = None, frozenset(), frozenset()


def _is_of_hidden_states(node: Node) -> bool:
    parents = [parent for parent, _ in node.next_functions if parent is not None]
    return any(parent.name() != "torch::autograd::AccumulateGrad" for parent in parents)


def _changed(changed: Any, name: str, traced: Sequence[Traced], tensors: Sequence[Tensor], result: Any) -> Any:
    """Follow a tensor that was changed in place, and the one that it is a part of."""
    if isinstance(changed, Tensor):
        value = changed.value if isinstance(changed, Traced) else changed
        for tensor in {id(changed): changed, id(value._base): value._base}.values():
            if tensor is not None:
                alias = tensor.value if isinstance(tensor, Traced) else tensor.as_subclass(Tensor)
                tensor.__class__ = Traced
                _result_of(alias, name, traced, tensors, None, tensor)
    return None if result is None else changed
