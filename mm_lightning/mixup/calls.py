"""One function call on pairs: what it gives for both halves, and what it cannot give."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from mm_lightning.mixup.expression import (
    Expression,
    RandomState,
    is_by_row,
    is_in_place,
    is_independent,
    is_linear,
    is_network,
    is_random,
    keeps_rows,
    memory_of,
)
from mm_lightning.mixup.layers import INPUT
from mm_lightning.mixup.pair import Pair, become_pair, input_of, lam_of, own_of, partner_of, value_of
from mm_lightning.mixup.rows import compare_rows, functions_of
from mm_lightning.mixup.trees import map_tensors, tensors_in

__all__ = ["PairCall"]

# How Python code reads numbers out of a tensor. What becomes of them cannot be followed.
_DECISIONS = frozenset({"__bool__", "__index__"})
_READS = frozenset({"item", "tolist", "numpy", "__array__", "__int__", "__float__"})
_COPIES = frozenset({"__reduce_ex__"})


_SIZES = frozenset({"__len__", "size", "numel", "nelement"})
_MASKING = frozenset({"__getitem__", "masked_select", "nonzero", "unique", "argwhere"})
# Losses whose mean is not that of their rows.
_NORMALISED = frozenset({"cross_entropy", "nll_loss", "ctc_loss"})


class PairCall:
    """One function call in which at least one operand is a pair."""

    def __init__(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.name = getattr(func, "__name__", str(func))
        self.tensors = tensors_in((args, kwargs))
        self.pairs = [tensor for tensor in self.tensors if isinstance(tensor, Pair)]
        self.plan, self.mixer = self.pairs[0].plan, self.pairs[0].mixer
        self.has_mixed_operand = any(pair.is_mixed for pair in self.pairs)
        self._noise: RandomState | None = None

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
            self._refuse_sizes_that_differ(own)
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
        self.mixer.is_in_named_loss = True
        try:
            mixed = self._interpolated(self._run(own_of))
        finally:
            self.mixer.is_in_named_loss = False
        if len(self.mixer.ran) > runs:
            raise RuntimeError(
                f"loss={self.name} runs the network itself, so evaluating it on both target sets would run it twice. "
                "Name the function that compares its output with the targets."
            )
        self.mixer.losses.append(self.name)
        return mixed

    def _run(self, side: Callable[[Tensor], Tensor]) -> Any:
        args, kwargs = map_tensors(side, (self.args, self.kwargs))
        with self._noise_of_the_call():
            return self.func(*args, **kwargs)

    def _on_mixed(self) -> Any:
        if is_network(self.name, [tensor for tensor in self.tensors if not isinstance(tensor, Pair)]):
            raise RuntimeError(
                f"'{self.name}' takes what was computed from the batch's targets further through the network. Targets "
                "can be mixed in the loss only."
            )
        value = self._run(value_of)
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        if not tensors:
            self._refuse_sizes_that_differ(value)
            return value  # what is asked of a loss is asked of the mixed one
        if self._is_linear() and all(tensor.is_floating_point() for tensor in tensors):
            return self._derived(value, is_mixed=True)  # of interpolations it is the interpolation
        return self._interpolated(self._run(own_of), value)

    def _is_linear(self) -> bool:
        mixed = all(pair.is_mixed and not pair.is_ragged for pair in self.pairs)
        return mixed and is_linear(self.name, self.pairs, self.args, self.kwargs)

    def _derived(self, result: Any, is_mixed: bool = False) -> Any:
        """Pairs whose partner's half is the same call on the partner's halves, made if it is asked for."""
        lost = self._reason_to_lose()
        by_row = is_by_row(self.name) and not is_mixed
        expression = Expression(self.func, self.args, self.kwargs, self.tensors)
        partners = None
        if is_random(self.name) and not by_row and lost is None:
            partners = [leaf for leaf in tree_leaves(self._run(partner_of)) if isinstance(leaf, Tensor)]

        def derive(value: Tensor, index: int) -> Pair:
            has_rows = value.dim() > 0 and value.shape[0] == self.plan.batch_size
            is_input = any(pair.is_input for pair in self.pairs)
            pair = self._pair(
                value,
                is_mixed=is_mixed,
                is_pure=not is_mixed and all(_is_pure(tensor) for tensor in self.tensors),
                is_input=is_input,
                lost=lost,
                expression=None if by_row and has_rows and not is_input else expression,
                index=index,
            )
            pair._partner = None if partners is None else partners[index]
            return pair

        return _map_with_index(derive, result)

    def _interpolated(self, own: Any, shown: Any = None) -> Any:
        """Pairs of the result and the same call on the partners' halves.

        Args:
            own: The result for the own halves.
            shown: The result for the values, for what cannot be interpolated.
        """
        if self.plan.lam.stride(0) != 0 and isinstance(own, Tensor) and own.dim() == 0:
            return self._sum_over_rows()
        partners = [leaf for leaf in tree_leaves(self._run(partner_of)) if isinstance(leaf, Tensor)]
        values = [leaf for leaf in tree_leaves(own if shown is None else shown) if isinstance(leaf, Tensor)]
        if self.name.startswith("embedding"):
            self.mixer.looked_up.update(t.grad_fn for t in (own, *partners) if t.grad_fn is not None)

        def interpolate(half: Tensor, index: int) -> Pair:
            other = partners[index]
            is_ragged = half.shape != other.shape or not half.is_floating_point()
            if is_ragged:
                pair = self._pair(values[index], is_mixed=True, is_ragged=True)
            else:
                weight = lam_of(self.plan, half, self._keeps_rows(half), self.name)
                pair = self._pair(weight * half + (1 - weight) * other, is_mixed=True)
            pair._halves, pair._partner = (half, other), other
            return pair

        return _map_with_index(interpolate, own)

    def _sum_over_rows(self) -> Pair:
        """A loss function's mean or sum with one lam per sample: each row's loss is weighted before."""
        try:
            bound = inspect.signature(self.func).bind(*self.args, **self.kwargs)
            bound.apply_defaults()
            reduction, weight = bound.arguments["reduction"], bound.arguments.get("weight")
        except (KeyError, TypeError, ValueError):
            raise RuntimeError(
                f"'{self.name}' sums over rows, so that one lam per sample cannot be told apart. Use per_sample=False."
            ) from None
        has_own_normaliser = self.name in _NORMALISED or (weight is not None and "binary" not in self.name)
        if reduction == "mean" and has_own_normaliser:
            raise RuntimeError(
                f"The mean of '{self.name}' is not that of its rows, so targets cannot be mixed in it with one lam "
                "per sample. Use per_sample=False."
            )
        kwargs = {**bound.arguments, "reduction": "none"}
        rows = PairCall(self.func, (), kwargs)
        losses = rows._interpolated(rows._run(own_of)).value
        total = losses.mean() if reduction == "mean" else losses.sum()
        return self._pair(total / self.plan.batch_size if reduction == "batchmean" else total, is_mixed=True)

    def _pair(self, value: Tensor, **settings: Any) -> Pair:
        return self.pairs[0].derive(value, is_aligned=self._keeps_rows(value), **settings)

    def _keeps_rows(self, value: Tensor) -> bool:
        """Whether row i of the result belongs to row i of the batch; asked for one lam per sample alone."""
        if self.plan.lam.stride(0) == 0:
            return True
        if not all(pair.is_aligned or pair.value.dim() == 0 for pair in self.pairs):
            return False
        return keeps_rows(self.name, self.args, self.kwargs, value, self.plan.batch_size)

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
        self._settle(value_of(base))
        if is_mixed and is_pair:
            self._refuse_to_change_a_part(changed)
        if is_mixed and self.plan.lam.stride(0) != 0:
            return self._in_place_per_sample(changed)
        own = self._changed_half(own_of, changed, base) if is_mixed else None
        partner = self._changed_half(partner_of, changed, base)
        whole = value_of(base)
        if own is not None and whole.is_floating_point():
            lam = self.plan.lam[0].to(whole.dtype)
            whole.copy_(lam * own[0] + (1 - lam) * partner[0])
            result = changed
        else:
            result = self._run(value_of)
        is_ragged = own is not None and not whole.is_floating_point()
        for tensor, index in {id(base): (base, 0), id(changed): (changed, 1)}.values():
            pair = self._adopt(tensor, is_mixed=is_mixed, is_ragged=is_ragged)
            pair._partner = partner[index]
            pair._halves = None if own is None else (own[index], partner[index])
        return None if result is None else changed

    def _in_place_per_sample(self, changed: Tensor) -> Any:
        """With one lam per sample: what stays an interpolation, such as a sum of losses."""
        is_plain = not isinstance(changed, Pair)
        others = [pair for pair in self.pairs if pair is not changed]
        is_mixed = is_plain or (isinstance(changed, Pair) and changed.is_mixed)
        if not (all(pair.is_mixed and not pair.is_ragged for pair in others) and is_mixed):
            raise RuntimeError(f"'{self.name}' cannot be mixed in place with one lam per sample. Use per_sample=False.")
        if not is_linear(self.name, others, self.args, self.kwargs):
            raise RuntimeError(f"'{self.name}' cannot be mixed in place with one lam per sample. Use per_sample=False.")
        self._run(value_of)
        self._adopt(changed, is_mixed=True)
        return changed

    def _refuse_to_change_a_part(self, changed: Pair) -> None:
        for reference in self.mixer.pairs:
            pair = reference()
            if not isinstance(pair, Pair) or not pair.is_mixed or any(pair is operand for operand in self.pairs):
                continue
            if memory_of(pair.value) == memory_of(changed.value):
                raise RuntimeError(
                    f"'{self.name}' changes a part of what was computed from the batch's targets in place, which "
                    "cannot be followed. Use torch.where, or assign by index to the whole."
                )

    def _adopt(self, tensor: Tensor, **settings: Any) -> Pair:
        """Let a tensor of the user's become a pair, with the object that user code holds."""
        alias = value_of(tensor) if isinstance(tensor, Pair) else tensor.as_subclass(Tensor)
        tensor.__class__ = type(self.pairs[0])
        self.mixer.written.add(memory_of(alias))
        pair: Pair = become_pair(tensor, alias, self.plan, self.mixer, is_pure=False, **settings)
        return pair

    def _changed_half(self, side: Callable[[Tensor], Tensor], changed: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
        """What the changed tensor becomes with one half of its operands: the whole that it is part of, and itself."""
        half = side(base)
        keeps_identity = isinstance(base, Pair) and side is partner_of and not base.is_mixed
        whole = half if keeps_identity else half.clone()
        part = whole
        if changed is not base:
            part = whole.as_strided(changed.size(), changed.stride(), changed.storage_offset())

        def exchanged(tensor: Tensor) -> Tensor:
            return part if tensor is changed else side(tensor)

        args, kwargs = map_tensors(exchanged, (self.args, self.kwargs))
        with self._noise_of_the_call():
            self.func(*args, **kwargs)
        return whole, part

    def _noise_of_the_call(self) -> AbstractContextManager[None]:
        """The user's call moves the random state once; made again, it draws the same noise."""
        if not is_random(self.name):
            return nullcontext()
        if self._noise is None:
            self._noise = RandomState()
            return nullcontext()
        return self._noise.again()

    def _settle(self, changed: Tensor) -> None:
        """Find the partner's half of whatever was computed from a tensor before it changes."""
        for reference in list(self.mixer.pairs):
            pair = reference()
            if isinstance(pair, Pair) and pair._expression is not None and pair._expression.reads(changed):
                if pair.is_mixed:
                    pair._both()
                elif pair._partner is None and pair.lost is None:
                    pair._partner = pair.partner

    def _is_input_use(self) -> bool:
        return (
            self.mixer.planned == INPUT
            and any(pair.is_input for pair in self.pairs)
            and torch.is_grad_enabled()
            and is_network(self.name, [tensor for tensor in self.tensors if not isinstance(tensor, Pair)])
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
        for tensor in self.tensors:
            if tensor.grad_fn is not None and not isinstance(tensor, Pair):
                self.mixer.check_path(tensor, self.name)

    def _reason_to_lose(self) -> str | None:
        lost = next((pair.lost for pair in self.pairs if pair.lost), None)
        if lost is None and self.mixer.is_watched and compare_rows(self.name, self.pairs):
            lost = (
                f"'{self.name}' compares the targets of different rows with each other, as contrastive and triplet "
                "losses do. Such a loss cannot be mixed; train it without the callback, or leave this part of it "
                "unmixed by naming the losses to mix: ManifoldMixupCallback(loss=...)."
            )
        return lost

    def _refuse_sizes_that_differ(self, result: Any) -> None:
        """A number of rows that a mask leaves is one of the own half alone."""
        is_size = isinstance(result, torch.Size) or self.name in _SIZES
        if not is_size or not torch.is_grad_enabled() or not self.mixer.has_mixed or self.mixer.is_explicit:
            return
        for pair in self.pairs:
            is_masked = pair.lost is None and (pair.is_ragged or functions_of(pair) & _MASKING)
            if is_masked and pair.own.shape != pair.partner.shape:
                raise RuntimeError(
                    f"'{self.name}' of what a mask leaves of the batch's targets differs from that of their partners, "
                    "so it cannot be mixed. Count with tensor operations, mask.sum() for example."
                )

    def _note_read(self) -> None:
        """Numbers that leave the tensors may come back in a loss, which nobody would see."""
        if self.name not in _DECISIONS | _READS or not torch.is_grad_enabled() or not self.mixer.has_mixed:
            return
        pair = self.pairs[0]
        if self.mixer.is_explicit or self.mixer.is_verified or not pair.is_pure:
            return
        if pair.lost is None and torch.equal(pair.value, pair.partner):
            return
        if self.name in _DECISIONS:
            raise RuntimeError(
                f"training_step decides by the class of single rows ('{self.name}' of a target), so partners' targets "
                "would go the same way. Compute the loss with tensor operations, or under torch.no_grad() if it is no "
                "part of the loss."
            )
        self.mixer.reads.add(self.name)


def _is_pure(tensor: Tensor) -> bool:
    return tensor.is_pure if isinstance(tensor, Pair) else tensor.dim() == 0


def _map_with_index(derive: Callable[[Tensor, int], Pair], result: Any) -> Any:
    """Replace the tensors of a result, each with its place among them."""
    indices = iter(range(len(tree_leaves(result)) + 1))
    return tree_map_only(Tensor, lambda value: derive(value, next(indices)), result)
