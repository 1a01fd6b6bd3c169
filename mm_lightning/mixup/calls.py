"""One function call on pairs: what it gives for both halves, and what it cannot give."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from mm_lightning.mixup.expression import (
    Expression,
    is_by_row,
    is_in_place,
    is_independent,
    is_linear,
    is_network,
    is_random,
    keeps_rows,
)
from mm_lightning.mixup.layers import INPUT
from mm_lightning.mixup.pair import Pair, become_pair, input_of, lam_of, own_of, partner_of, value_of
from mm_lightning.mixup.trees import map_tensors, tensors_in

__all__ = ["PairCall"]

# How Python code reads numbers out of a tensor. What becomes of them cannot be followed.
_DECISIONS = frozenset({"__bool__", "__index__"})
_READS = frozenset({"item", "tolist", "numpy", "__array__", "__int__", "__float__"})
_COPIES = frozenset({"__deepcopy__", "__reduce_ex__"})
# Functions of two operands, row by row, or of all rows with all rows.
_COMPARISONS = frozenset(
    """
    eq ne lt gt le ge sub add mul div where minimum maximum logical_and logical_or logical_xor matmul mm outer cdist
    __eq__ __ne__ __lt__ __gt__ __le__ __ge__ __sub__ __rsub__ __add__ __radd__ __mul__ __rmul__ __truediv__ __matmul__
    __rmatmul__ __and__ __or__ __xor__ isin
    """.split()
)


class PairCall:
    """One function call in which at least one operand is a pair."""

    def __init__(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.name = getattr(func, "__name__", str(func))
        self.tensors = tensors_in((args, kwargs))
        self.pairs = [tensor for tensor in self.tensors if isinstance(tensor, Pair)]
        self.plan, self.mixer = self.pairs[0].plan, self.pairs[0].mixer
        self.has_mixed_operand = any(pair.is_mixed for pair in self.pairs)

    def result(self) -> Any:
        """What user code gets."""
        if self.name in _COPIES or is_independent(self.name):
            return self._run(value_of)
        self._refuse_what_cannot_be_followed()
        if is_in_place(self.name, self.kwargs):
            return self._in_place()
        if self.has_mixed_operand:
            return self._on_mixed()
        if self._is_input_use():
            return self._run(input_of)
        own = self._run(value_of)
        tensors = [leaf for leaf in tree_leaves(own) if isinstance(leaf, Tensor)]
        if not tensors:
            self._note_read()
            return own
        if not any(tensor.requires_grad for tensor in tensors):
            return self._derived(own)
        if not self.mixer.has_mixed:  # the network's input, which the planned layer will mix
            self._refuse_early_loss(tensors)
            return own
        if self.mixer.is_explicit:
            return own  # the user has named the losses to mix; this is none of them
        self._check_operands()
        self.mixer.losses.append(self.name)
        return self._interpolated(own)

    def mixed_explicitly(self) -> Any:
        """The user has named this function as a loss to be mixed."""
        if not self.mixer.has_mixed:
            return self._run(own_of)  # of a first look, or of a part of the batch that is not mixed
        for tensor in self.tensors:
            if tensor.grad_fn is not None and not isinstance(tensor, Pair):
                self.mixer.check_path(tensor, self.name)
        runs = len(self.mixer.ran)
        mixed = self._interpolated(self._run(own_of))
        if len(self.mixer.ran) > runs:
            raise RuntimeError(
                f"loss={self.name} runs the network itself, so evaluating it on both target sets would run it twice. "
                "Name the function that compares its output with the targets."
            )
        self.mixer.losses.append(self.name)
        return mixed

    def _run(self, side: Callable[[Pair], Tensor]) -> Any:
        args, kwargs = map_tensors(
            lambda tensor: side(tensor) if isinstance(tensor, Pair) else tensor, (self.args, self.kwargs)
        )
        return self.func(*args, **kwargs)

    def _on_mixed(self) -> Any:
        if is_network(self.name, self.tensors):
            raise RuntimeError(
                f"'{self.name}' takes what was computed from the batch's targets further through the network. Targets "
                "can be mixed in the loss only."
            )
        value = self._run(value_of)
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        if all(tensor.dim() == 0 and not tensor.is_floating_point() for tensor in tensors):
            return value  # what is asked of a loss is asked of the mixed one
        is_linear_in_pairs = is_linear(self.name, self.pairs, self.args)
        if is_linear_in_pairs and all(pair.is_mixed and not pair.is_ragged for pair in self.pairs):
            return self._derived(value, is_mixed=True)  # of interpolations it is the interpolation
        return self._interpolated(self._run(own_of))

    def _derived(self, result: Any, is_mixed: bool = False) -> Any:
        """Pairs whose partner's half is the same call on the partner's halves, made if it is asked for."""
        lost = self._reason_to_lose()
        by_row = is_by_row(self.name) and not is_mixed
        expression = Expression(self.func, self.args, self.kwargs, self.tensors)

        def derive(value: Tensor, index: int) -> Pair:
            has_rows = value.dim() > 0 and value.shape[0] == self.plan.batch_size
            is_input = any(pair.is_input for pair in self.pairs)
            return self._pair(
                value,
                is_mixed=is_mixed,
                is_pure=not is_mixed and all(_is_pure(tensor) for tensor in self.tensors),
                is_input=is_input,
                lost=lost if not (by_row and has_rows) else None,
                expression=None if by_row and has_rows and not is_input else expression,
                index=index,
            )

        return _map_with_index(derive, result)

    def _interpolated(self, own: Any) -> Any:
        """Pairs of the result and the same call on the partners' halves."""
        lam = self.plan.lam
        if lam.stride(0) != 0 and isinstance(own, Tensor) and own.dim() == 0:
            return self._sum_over_rows()
        partner = self._run(partner_of)
        partners = [leaf for leaf in tree_leaves(partner) if isinstance(leaf, Tensor)]
        if self.name.startswith("embedding"):
            self.mixer.looked_up.update(t.grad_fn for t in (own, partner) if t.grad_fn is not None)

        def interpolate(value: Tensor, index: int) -> Pair:
            other = partners[index]
            is_ragged = value.shape != other.shape or not value.is_floating_point()
            pair = self._pair(value, is_mixed=True, is_ragged=is_ragged)
            if not is_ragged:
                weight = lam_of(self.plan, value, pair.is_aligned, self.name)
                pair = self._pair(weight * value + (1 - weight) * other, is_mixed=True)
            pair._halves, pair._partner = (value, other), other
            return pair

        return _map_with_index(interpolate, own)

    def _sum_over_rows(self) -> Pair:
        """A loss function's mean or sum with one lam per sample: each row's loss is weighted before."""
        kwargs = dict(self.kwargs)
        try:
            bound = inspect.signature(self.func).bind(*self.args, **self.kwargs)
            bound.apply_defaults()
            reduction = bound.arguments["reduction"]
            if bound.arguments.get("weight") is not None and self.name == "nll_loss":
                raise KeyError("weight")
        except (KeyError, TypeError, ValueError):
            raise RuntimeError(
                f"'{self.name}' sums over rows, so that one lam per sample cannot be told apart. Use per_sample=False."
            ) from None
        bound.arguments["reduction"] = "none"
        kwargs = dict(bound.arguments)
        rows = PairCall(self.func, (), kwargs)._interpolated(self.func(**tree_map_only(Pair, own_of, kwargs)))
        if self.name == "nll_loss" and reduction == "mean":
            raise RuntimeError(
                "nll_loss with its mean cannot be mixed with one lam per sample. Use cross_entropy or per_sample=False."
            )
        total = rows.value.mean() if reduction == "mean" else rows.value.sum()
        if reduction == "batchmean":
            total = total / self.plan.batch_size
        return self._pair(total, is_mixed=True)

    def _pair(self, value: Tensor, **settings: Any) -> Pair:
        is_aligned = self.plan.lam.stride(0) == 0 or (
            all(pair.is_aligned or pair.value.dim() == 0 for pair in self.pairs)
            and keeps_rows(self.name, self.args, value, self.plan.batch_size)
        )
        return self.pairs[0].derive(value, is_aligned=is_aligned, **settings)

    def _in_place(self) -> Any:
        """Change both halves; for a plain tensor, make it a pair of what it becomes with each."""
        changed = self.kwargs["out"] if self.kwargs.get("out") is not None else self.args[0]
        wants_grad = torch.is_grad_enabled() and any(value_of(tensor).requires_grad for tensor in self.tensors)
        is_pair = isinstance(changed, Pair)
        if (wants_grad and not self.mixer.has_mixed) or (self.mixer.is_explicit and not is_pair):
            return self._run(value_of)
        if self.has_mixed_operand and not wants_grad and not is_pair:
            return self._run(value_of)  # a metric of losses
        if wants_grad and not self.has_mixed_operand:
            self._check_operands()
            self.mixer.losses.append(self.name)
        is_mixed = wants_grad or self.has_mixed_operand
        base = changed if is_pair or changed._base is None else changed._base
        own = self._changed_half(own_of, changed, base) if is_mixed else None
        partner = self._changed_half(partner_of, changed, base)
        result = self._run(value_of)
        for tensor, index in {id(base): (base, 0), id(changed): (changed, 1)}.values():
            alias = tensor.value if isinstance(tensor, Pair) else tensor.as_subclass(Tensor)
            tensor.__class__ = type(self.pairs[0])
            is_linear_change = is_linear(self.name, self.pairs, self.args)
            ragged = is_mixed and not is_linear_change
            become_pair(tensor, alias, self.plan, self.mixer, is_mixed=is_mixed, is_ragged=ragged, is_pure=False)
            tensor._partner = partner[index]
            tensor._halves = None if own is None else (own[index], partner[index])
        return None if result is None else changed

    def _changed_half(self, side: Callable[[Pair], Tensor], changed: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
        """What the changed tensor becomes with one half of its operands: the whole that it is part of, and itself."""
        half = side(base)
        keeps_identity = isinstance(base, Pair) and side is partner_of and not base.is_mixed
        whole = half if keeps_identity else half.clone()
        part = whole
        if changed is not base:
            part = whole.as_strided(changed.size(), changed.stride(), changed.storage_offset())
        swap: Callable[[Any], Any] = lambda tensor: part if tensor is changed else side(tensor)  # noqa: E731
        args, kwargs = map_tensors(swap, (self.args, self.kwargs))
        self.func(*args, **kwargs)
        return whole, part

    def _is_input_use(self) -> bool:
        return (
            self.mixer.planned == INPUT
            and any(pair.is_input for pair in self.pairs)
            and torch.is_grad_enabled()
            and is_network(self.name, self.tensors)
            and any(tensor.requires_grad for tensor in self.tensors if not isinstance(tensor, Pair))
        )

    def _refuse_what_cannot_be_followed(self) -> None:
        for pair in self.pairs:
            if not pair.is_mixed and pair.requires_grad and not pair.value.requires_grad:
                raise RuntimeError(
                    f"'{self.name}' got what a torch.autograd.Function made of the batch's targets, which cannot be "
                    "followed. Name the loss that it belongs to: ManifoldMixupCallback(loss=...)."
                )
        if self.name in ("__set__", "requires_grad_") or self.kwargs.get("inplace") is True:
            raise RuntimeError(f"'{self.name}' changes the batch's targets in a way that cannot be followed.")

    def _refuse_early_loss(self, results: Sequence[Tensor]) -> None:
        if not self.mixer.is_explicit and (self.func is F.cross_entropy or all(t.dim() == 0 for t in results)):
            raise RuntimeError(
                f"{self.name} was computed before layer {self.mixer.planned!r} mixed the batch: the forward pass does "
                "not reach that layer, or reaches it later. Choose layers that every forward pass runs through."
            )

    def _check_operands(self) -> None:
        """The mixed targets may meet what comes from the mixed layer only."""
        if is_random(self.name):
            raise RuntimeError(f"'{self.name}' draws random numbers for the batch's targets, which cannot be mixed.")
        for tensor in self.tensors:
            if tensor.grad_fn is not None and not isinstance(tensor, Pair):
                self.mixer.check_path(tensor, self.name)

    def _reason_to_lose(self) -> str | None:
        lost = next((pair.lost for pair in self.pairs if pair.lost), None)
        if lost is None and is_random(self.name):
            lost = (
                f"The batch's targets went through '{self.name}', which draws random numbers, so they cannot be mixed. "
                "Compute them in the data loader instead."
            )
        if lost is None and self.mixer.is_watched and self.name in _COMPARISONS and self._compares_rows():
            lost = (
                f"'{self.name}' compares the targets of different rows with each other, as contrastive and triplet "
                "losses do. Such a loss cannot be mixed; train it without the callback, or leave this part of it "
                "unmixed by naming the losses to mix: ManifoldMixupCallback(loss=...)."
            )
        return lost

    def _compares_rows(self) -> bool:
        """Whether two operands hold the batch in different places, seen from their last dimension."""
        pure = [pair for pair in self.pairs if pair.is_pure and not pair.is_mixed and not pair.lost]
        places = [_places_of_rows(pair) for pair in pure] if len(pure) > 1 else []
        places = [place for place in places if place is not None]
        return len(places) > 1 and not set.intersection(*places)

    def _note_read(self) -> None:
        """Numbers that leave the tensors may come back in a loss, which nobody would see."""
        if self.name not in _DECISIONS | _READS or not torch.is_grad_enabled() or not self.mixer.has_mixed:
            return
        pair = self.pairs[0]
        if self.mixer.is_explicit or not pair.is_pure or pair.lost or torch.equal(pair.value, pair.partner):
            return
        if self.name in _DECISIONS:
            raise RuntimeError(
                f"training_step decides by the class of single rows ('{self.name}' of a target), so partners' targets "
                "would go the same way. Compute the loss with tensor operations, or under torch.no_grad() if it is no "
                "part of the loss."
            )
        self.mixer.reads.add(self.name)


def _places_of_rows(pair: Pair) -> set[int] | None:
    """Dimensions, counted from the last, along which the pair holds the batch; None if it is the same for partners."""
    own, partner = pair.value, pair.partner
    if own.shape == partner.shape and torch.equal(own, partner):
        return None
    rows = pair.plan.partner
    sized = [dim for dim in range(own.dim()) if own.shape[dim] == len(rows)]
    return {dim - own.dim() for dim in sized if torch.equal(own.index_select(dim, rows), partner)}


def _is_pure(tensor: Tensor) -> bool:
    return tensor.is_pure if isinstance(tensor, Pair) else tensor.dim() == 0


def _map_with_index(derive: Callable[[Tensor, int], Pair], result: Any) -> Any:
    """Replace the tensors of a result, each with its place among them."""
    indices = iter(range(len(tree_leaves(result)) + 1))
    return tree_map_only(Tensor, lambda value: derive(value, next(indices)), result)
