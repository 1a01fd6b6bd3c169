"""What flows where in one run of a training step: from the batch through calls of modules to the loss.

No function is known by name. Every result is taken to come from all tensors that went into it; what a module returns
comes from its call. Numbers that leave the tensors are lost, so what is found here is a proposal: the proof decides.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from mm_lightning.look.nodes import Call, Inside, Leaf, Node, Result, Weights, closure, merged
from mm_lightning.look.reordering import RowSamples
from mm_lightning.mixup.batch import Path, leaves_of
from mm_lightning.mixup.layers import Layer
from mm_lightning.mixup.masks import masks_in
from mm_lightning.mixup.trees import map_tensors, tensors_in
from mm_lightning.step.replay import RandomState, called_by

__all__ = ["Flow"]


@dataclass(frozen=True, eq=False)
class _Watched:
    name: str
    module: nn.Module


class Flow(TorchFunctionMode):
    """Follows one run.

    Args:
        sample: Keeps some rows of the tensors that a call returns.

    Attributes:
        leaves: The tensors of the batch.
        calls: Calls of modules, in the order in which they began.
        losses: For each loss what it comes from.
        outputs: The tensors that calls in no other call returned.
        loses_values: Whether numbers of the batch have left the tensors.
        hooks: Where gradients were hooked.
    """

    def __init__(self, sample: Callable[[list[Tensor]], RowSamples]) -> None:
        super().__init__()
        self.sample = sample
        self.follows = False
        self.outputs: list[tuple[Call, list[Tensor]]] = []
        self.loses_values = False
        self.hooks: list[Node] = []
        self.leaves: list[Leaf] = []
        self.calls: list[Call] = []
        self.losses: list[dict[Node, bool]] = []
        self._labels = WeakTensorKeyDictionary()
        self._born = WeakTensorKeyDictionary()
        self._weights = WeakTensorKeyDictionary()
        self._vectors = WeakTensorKeyDictionary()  # views of such weights, as (1, 1, K)
        self._returned_by = WeakTensorKeyDictionary()
        self._hooks = WeakTensorKeyDictionary()
        self._hooked: list[tuple[Call, Tensor]] = []
        self._current: Call | None = None
        self._counts: dict[int, int] = {}  # by identity: a metric's hash changes with its state
        self._clock = 0
        self._marked: set[Node] = set()
        self._layer: Layer | None = None
        self._move: Callable[[Tensor], Tensor] | None = None
        self._targets: Collection[Path] = ()

    def follow(self, batch: Any) -> None:
        """Follow the tensors of a batch from now on. Else only the rows of what calls return are kept."""
        self.follows = True
        found = [(path, leaf) for path, leaf in leaves_of(batch) if isinstance(leaf, Tensor)]
        for path, tensor in found:
            leaf = Leaf(tensor, path)
            self.leaves.append(leaf)
            self._labels[tensor] = {leaf: not _is_mask(tensor, [other for _, other in found])}

    def end_in(self, loss: Tensor) -> None:
        """Note what is trained on."""
        self.losses.append(self._from([loss]) if loss in self._labels else {})

    @property
    def loss_nodes(self) -> list[Node]:
        """What the losses come from."""
        return [node for loss in self.losses for node in loss]

    @contextmanager
    def watching(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Note what modules do, until the end of the ``with`` block."""
        watched = [_Watched(name, part) for name, part in modules.items()]
        if not self.follows:
            with called_by(self._call, watched):
                yield
            return
        function = torch.autograd.Function
        original = vars(function)["apply"]

        def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:  # of which no mode is told
            result = original.__get__(None, cls)(*args, **kwargs)  # a function of Python or, from torch 2.14 on, of C
            with torch._C.DisableTorchFunction():
                operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
                known = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t in self._labels]
                labels = [self._labels[tensor] for tensor in known]
                self._note(operands, [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)], [])
                for tensor, label in zip(known, labels, strict=True):
                    # What was seen inside says where values come from; all that was given may tell in the gradient.
                    self._labels[tensor] = merged(dict.fromkeys(self._labels[tensor], False), label)
            return result

        function.apply = classmethod(apply)  # type: ignore[method-assign, assignment]
        try:
            with called_by(self._call, watched), self:
                yield
        finally:
            function.apply = original  # type: ignore[method-assign]

    def exchange_masks(
        self, layer: Layer, inputs: Collection[Path], targets: Collection[Path], move: Callable[[Tensor], Tensor]
    ) -> None:
        """Permute masks where they meet what comes from a layer, as they must move along with its rows.

        Args:
            layer: The layer.
            inputs: Paths of the batch's tensors that are mixed themselves.
            targets: Paths of those that stay: what the loss compares with is no mask.
            move: Permutes a mask.
        """
        self._layer, self._targets, self._move = layer, targets, move
        self._marked = {leaf for leaf in self.leaves if leaf.path in inputs}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call ``func`` and note where its results come from."""
        kwargs = kwargs or {}
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if self._marked:
            args, kwargs = self._with_masks_moved(operands, args, kwargs)
        versions = [_version(tensor) for tensor in operands]
        result = func(*args, **kwargs)
        written = [t for t, version in zip(operands, versions, strict=True) if _version(t) != version]
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if isinstance(result, (np.ndarray, list, float, int)) and not isinstance(result, bool) and not results:
            self.loses_values |= any(tensor in self._labels for tensor in operands) and not _is_of_the_shape(
                result, func, args, kwargs
            )
        for tensor in operands:
            count = len(tensor._backward_hooks or ())
            if count > self._hooks.get(tensor, 0):
                self._hooks[tensor] = count
                self._hooked.append((self._current, tensor)) if self._current is not None else self._note_hook(tensor)
        if (
            func is torch.autograd.grad
        ):  # a gradient comes from what is differentiated: by what only names a place in it
            operands = _differentiated(*args, **kwargs)
        if results or written:
            values = [t for t in operands if any(self._labels.get(t, {}).values())]
            meets_mask = bool(values) and not written and any(map(self._is_only_mask, operands))
            self._note(operands, results, written, meets_mask and _puts_beside(func, args, kwargs, values))
        return result

    def _note_hook(self, tensor: Tensor) -> None:
        """The step has hooked the gradient of a tensor, which may be done with targets."""
        if (call := self._returned_by.get(tensor)) is not None:
            call.is_hooked = True
        if tensor in self._labels:
            hook = Node(self._labels[tensor])
            self.hooks.append(hook)
            self._labels[tensor] = {hook: True}

    def _note(
        self, operands: list[Tensor], results: list[Tensor], written: list[Tensor], all_are_values: bool = False
    ) -> None:
        weights = [t for t in operands if self._is_weight(t)]
        labelled = [t for t in operands if t in self._labels]
        if not labelled:
            for tensor in results if weights else ():
                if not any(tensor is operand for operand in operands):
                    self._weights[tensor] = any(weight.requires_grad for weight in weights)
                    if not any(map(self._is_matrix, weights)) and sum(size > 1 for size in tensor.shape) < 2:
                        self._vectors[tensor] = True
            return
        parents = dict.fromkeys(self._from(labelled), True) if all_are_values else self._from(labelled)
        matrices = [t for t in weights if self._is_matrix(t)]
        if matrices:
            is_lookup = not any(t.is_floating_point() or t.is_complex() for t in labelled)
            is_trained = any(t.requires_grad for t in matrices)
            parents = {Weights(parents, self._current, is_lookup, is_trained): True}
        for tensor in results:
            if not (tensor in self._labels and any(tensor is operand for operand in operands)) or any(
                tensor is t for t in written
            ):
                self._label(tensor, parents)
        for tensor in written:
            for part in (tensor, tensor._base):
                if part is not None:
                    self._label(part, parents | self._labels.get(part, {}))
                    if (call := self._returned_by.get(part)) is not None:
                        call.is_changed = True

    def _from(self, tensors: Iterable[Tensor]) -> dict[Node, bool]:
        parents: dict[Node, bool] = {}
        for tensor in tensors:
            label = self._labels[tensor]
            born = self._born.get(tensor)
            if born is not None and born.end:  # a call's own, taken out after its end
                born.inside = born.inside or Inside(born)
                born.inside.parents = merged(born.inside.parents, label)
                label = {born.inside: any(label.values())}
            parents = merged(parents, label)
        return parents

    def _label(self, tensor: Tensor, parents: dict[Node, bool]) -> None:
        if tensor.dtype == torch.bool:  # a comparison: it selects
            parents = dict.fromkeys(parents, False)
        self._labels[tensor] = parents
        self._born[tensor] = self._current

    def _is_weight(self, tensor: Tensor) -> bool:
        return isinstance(tensor, nn.Parameter) or tensor in self._weights

    def _is_matrix(self, weight: Tensor) -> bool:
        return weight.dim() > 1 and weight not in self._vectors

    def _call(self, watched: _Watched, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            noted = self._begin(watched.name, watched.module, args, kwargs)
        output = call(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            return self._end(noted, (args, kwargs), output)

    def _begin(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        self._clock += 1
        number = self._counts[id(module)] = self._counts.get(id(module), -1) + 1
        call = Call(name, module, number, self._current, self._clock)
        if self._current is not None:
            self._current.inner.append(call)
        self.calls.append(call)
        if self.follows:
            call.masks = masks_in(name, module, args, kwargs, self._is_only_mask)
        self._current = call
        return call

    def _end(self, call: Call, given: Any, output: Any) -> Any:
        self._clock += 1
        call.end = self._clock
        self._current = call.within
        if not self.follows:
            call.samples = self.sample(tensors_in(output))
            return output

        def leave(tensor: Tensor) -> Tensor:
            if self._born.get(tensor) is not call and tensor.layout is torch.strided and not tensor.is_nested:
                left = tensor.view_as(tensor)  # what came in goes out: the call's result must be told from it
                if tensor in self._labels:
                    self._labels[left] = self._labels[tensor]
                if self._is_weight(tensor):
                    self._weights[left] = self._weights.get(tensor, tensor.requires_grad)
                    if not self._is_matrix(tensor):
                        self._vectors[left] = True
                return left
            return tensor

        output = map_tensors(leave, output)
        tensors = tensors_in(output)
        for within, hooked in self._hooked:  # but for what a module hooks before it returns it, as FSDP does
            if within is call and not any(hooked is tensor for tensor in tensors):
                self._note_hook(hooked)
        self._hooked = [(within, hooked) for within, hooked in self._hooked if within is not call]
        call.shapes, call.dtypes = [tuple(t.shape) for t in tensors], [t.dtype for t in tensors]
        call.samples = self.sample(tensors)
        if call.within is None:
            self.outputs.append((call, tensors))
        labels = self._labels_of(call, given, tensors)
        for tensor in tensors:
            self._returned_by[tensor] = call
            self._hooks[tensor] = len(tensor._backward_hooks or ())  # of its own, as FSDP has them
            if (parents := labels.get(id(tensor))) is not None:
                result = Result(call, parents)
                call.results.append(result)
                self._labels[tensor] = {result: tensor.dtype != torch.bool and any(parents.values())}
                self._born[tensor] = call.within
        if self._layer is not None and any(call.module is part for part in self._layer.modules):
            self._marked.update(call.results)
        return output

    def _labels_of(self, call: Call, given: Any, tensors: list[Tensor]) -> dict[int, dict[Node, bool]]:
        """What each tensor that a call returns comes from, by identity."""
        labels = {id(t): self._label_within(call, t) for t in tensors if t in self._labels}
        if labels or not any(t.is_floating_point() for t in tensors):
            return labels
        # Nothing was seen of a scripted function, say: what it returns comes from what it was given.
        taken = merged(*[self._labels[t] for t in tensors_in(given) if t in self._labels])
        parameters = list(call.module.parameters())
        if taken and any(parameter.dim() > 1 for parameter in parameters):
            taken = {Weights(taken, call, False, any(p.requires_grad for p in parameters)): True}
        return {id(t): taken for t in tensors} if taken else {}

    def _label_within(self, call: Call, tensor: Tensor) -> dict[Node, bool]:
        """The label of what a call returns; what was born in it goes out in the right way."""
        if self._born.get(tensor) is call:
            return self._labels[tensor]
        return self._from([tensor])

    def _is_only_mask(self, tensor: Tensor) -> bool:
        label = self._labels.get(tensor)
        return bool(label) and not any(label.values())

    def _with_masks_moved(self, operands: list[Tensor], args: Any, kwargs: Any) -> tuple[Any, Any]:
        comes_from_layer = [t for t in operands if t in self._labels and self._descends(self._labels[t])]
        masks = [
            t
            for t in operands
            if self._is_only_mask(t) and all(t is not other for other in comes_from_layer) and not self._is_target(t)
        ]
        if not comes_from_layer or not masks:
            return args, kwargs
        assert self._move is not None
        moved = {id(mask): self._move(mask) for mask in masks}
        for mask in masks:
            self._labels[moved[id(mask)]] = self._labels[mask]
        return map_tensors(lambda t: moved.get(id(t), t), (args, kwargs))

    def _descends(self, label: dict[Node, bool]) -> bool:
        return not closure(label).isdisjoint(self._marked)

    def _is_target(self, tensor: Tensor) -> bool:
        leaves = [node for node in closure(self._labels[tensor]) if isinstance(node, Leaf)]
        return any(leaf.path in self._targets for leaf in leaves)


def _is_of_the_shape(number: Any, func: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    """Whether a function gives a number without looking at values: it gives the same of tensors that have none."""

    def emptied(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")

    try:
        args, kwargs = map_tensors(emptied, (args, kwargs))
        return bool(func(*args, **kwargs) == number)
    except Exception:  # whatever is raised where there are no values
        return False


def _puts_beside(func: Callable[..., Any], args: Any, kwargs: Any, values: list[Tensor]) -> bool:
    """Whether a function puts other numbers beside values: a category, not a mask that selects or scales them.

    Then some of what it gives does not depend on them, and is not one number that fills gaps.
    """
    unknown = {id(t): torch.full_like(t, float("nan")) for t in values if t.is_floating_point() or t.is_complex()}
    random_state = RandomState()
    try:
        args, kwargs = map_tensors(lambda t: unknown.get(id(t), t.detach().clone()), (args, kwargs))
        found = tensors_in(func(*args, **kwargs))
    except Exception:  # whatever it has against such numbers
        return False
    finally:
        random_state.restore()
    known = [t.detach()[~t.isnan()] for t in found if t.is_floating_point() or t.is_complex()]
    return any(t.numel() and bool((t != t.flatten()[0]).any()) for t in known)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _differentiated(outputs: Any, inputs: Any, grad_outputs: Any = None, *_: Any, **__: Any) -> list[Tensor]:
    return tensors_in((outputs, grad_outputs))


def _is_mask(tensor: Tensor, all_tensors: Sequence[Tensor]) -> bool:
    """Whether a tensor of the batch selects or scales, rather than being a value: labels, lengths, masks.

    Of floating point numbers, 0 and 1 alone may be features. They are a mask where another tensor has more to say of
    each of their places: (N, T) beside (N, T, D) or beside integers (N, T).
    """
    if tensor.dtype == torch.bool:
        return True
    if tensor.is_complex() or tensor.layout is not torch.strided or tensor.is_nested:
        return False
    if not tensor.is_floating_point() and tensor.dim() <= 1:
        return True
    if not bool(((tensor == 0) | (tensor == 1)).all()):
        return False
    if not tensor.is_floating_point():
        return tensor.numel() != len(tensor)  # of one column, a category
    others = [other for other in all_tensors if other is not tensor]
    return tensor.dim() > 1 and any(
        other.shape[: tensor.dim()] == tensor.shape
        and (other.dim() > tensor.dim() or not (other.is_floating_point() or other.is_complex()))
        for other in others
    )
