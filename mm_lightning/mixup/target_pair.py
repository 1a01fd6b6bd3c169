"""Targets that know their partners': how a loss that was not written for mixing becomes the mixed loss.

A loss is a function of targets. Evaluated on a pair, each of its steps is evaluated for the batch's own targets and for
the partners', and the two results are interpolated: ``lam * loss(own) + (1 - lam) * loss(partner)``, whatever it is.
"""

from __future__ import annotations

import inspect
import weakref
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
from mm_lightning.mixup.hook import Mixer
from mm_lightning.mixup.layers import INPUT
from mm_lightning.mixup.plan import MixPlan
from mm_lightning.mixup.targets import cross_entropy_of_pair
from mm_lightning.mixup.trees import map_tensors, tensors_in

__all__ = ["TargetPair", "mix_loss", "mixed_accuracy", "mixed_target_entropy"]

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


class TargetPair(Tensor):
    """A tensor that stands for two: what it is for the batch's own targets, and what it is for their partners'.

    To user code the pair of the batch's targets is the batch's own tensor: same values, dtype, device and storage, and
    metrics see just that. What is computed from it is a pair again. The partner's half is computed when it is needed,
    which is where the targets meet the mixed hidden state in the backward pass: from there on, the tensor's value is the
    interpolation of both halves, and it is that value which is logged, returned and differentiated.

    A pair lives as long as its training step. Kept longer, it becomes a plain tensor of its value.

    Attributes:
        value: What user code sees, a plain tensor.
        plan: The plan that the batch is mixed by.
        mixer: Records what was computed on mixed targets.
        is_mixed: Whether ``value`` is the interpolation of both halves (a loss, or what it is made of) rather than the
            own half (targets, and metrics of them).
        is_ragged: Whether the halves could not be interpolated (they have different shapes, or are not floating point),
            so that ``value`` is the own half although the pair is mixed.
        is_aligned: Whether row i belongs to row i of the batch, as one lam per sample needs it.
        is_pure: Whether it is made of targets alone, not of predictions.
    """

    value: Tensor
    plan: MixPlan
    mixer: Mixer
    is_mixed: bool
    is_ragged: bool = False
    is_aligned: bool = True
    is_pure: bool = False
    is_input: bool = False
    lost: str | None = None
    _halves: tuple[Tensor, Tensor] | None = None
    _partner: Tensor | None = None
    _expression: Expression | None = None
    _index: int = 0

    @classmethod
    def wrap(cls, targets: Tensor, plan: MixPlan, mixer: Mixer, *, is_input: bool = False) -> TargetPair:
        """Pair the targets (N, ...) of a batch with their partners'. ``targets`` is not changed.

        Args:
            targets: The batch's own.
            plan: A plan that mixes.
            mixer: The mixer that was started with it.
            is_input: Whether the tensor is the network's input too: for the layer ``"input"`` the network sees it mixed.
        """
        return _pair(targets, plan, mixer, is_input=is_input)

    @property
    def own(self) -> Tensor:
        """What the tensor is for the batch's own targets."""
        if not self.is_mixed or (self.is_ragged and self._halves is None):
            return self.value
        return self._both()[0]

    @property
    def partner(self) -> Tensor:
        """What the tensor is for the partners' targets. RuntimeError if that cannot be known."""
        if self.lost is not None:
            raise RuntimeError(self.lost)
        if self._partner is not None:
            return self._partner
        if self.is_mixed and not (self.is_ragged and self._halves is None):
            return self._both()[1]
        if self._expression is None:  # row by row: the batch's own tensors, and what a frozen network makes of them
            self._partner = self.value.index_select(0, self.plan.partner)
        else:
            self._partner = self._expression.evaluate(_partner_of)[self._index]
        return self._partner

    @property
    def mixed_input(self) -> Tensor:
        """What the tensor is if the input of the network is mixed."""
        if self._expression is None:
            return self.mixer.mix_input(self.value)
        return self._expression.evaluate(_input_of)[self._index]

    def lose(self, value: Tensor, reason: str) -> TargetPair:
        """A pair of the same step whose partner's half is not known; a loss that asks for it raises ``reason``."""
        return _pair(value, self.plan, self.mixer, is_pure=False, lost=reason)

    def retire(self) -> None:
        """Become a plain tensor."""
        self.__dict__.clear()
        self.__class__ = Tensor  # type: ignore[assignment]

    def _both(self) -> tuple[Tensor, Tensor]:
        if self._halves is None:
            if self._expression is None:
                raise RuntimeError(
                    "With one lam per sample only a loss that is a sum over rows can be mixed, but the mean over rows "
                    "was transformed further. Use per_sample=False."
                )
            self._halves = (
                self._expression.evaluate(_own_of)[self._index],
                self._expression.evaluate(_partner_of)[self._index],
            )
        return self._halves

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Apply ``func`` to the values and see to it that the result is a pair where its operands are."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return _compiled_call(func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.cross_entropy and (loss := _fused_cross_entropy(*args, **kwargs)) is not None:
                return loss
            return _Call(func, args, kwargs).result()


def mixed_accuracy(logits: Tensor, targets: Tensor, plan: MixPlan | None = None) -> Tensor:
    """Accuracy on a mixed batch: ``lam`` for a hit on the row's own class, ``1 - lam`` for one on its partner's.

    It is not comparable with accuracy on unmixed data: where partners are of other classes, a perfect network reaches
    ``E[max(lam, 1 - lam)]``, which is 0.69 for ``lam ~ Beta(2, 2)``.

    Args:
        logits: Scores, (N, K) or (N, K, ...).
        targets: Class indices, (N, ...). Inside a ``training_step`` under ``ManifoldMixupCallback`` the batch's targets
            know their partners, so that ``plan`` is not needed.
        plan: The plan the batch was mixed with.

    Returns:
        float32 scalar in [0, 1]: the plain accuracy if the batch is not mixed.

    Raises:
        RuntimeError: If the targets went through a function that cannot be followed.
    """
    predicted = logits.detach().argmax(dim=1)
    mixed = _own_and_partner(targets, plan)
    if mixed is None:
        return (predicted == targets).float().mean()
    own, partner, lam = mixed
    lam = lam.view(-1, *[1] * (own.dim() - 1))  # (N,) -> (N, 1, ...)
    return (lam * (predicted == own) + (1 - lam) * (predicted == partner)).mean()


def mixed_target_entropy(targets: Tensor, plan: MixPlan | None = None) -> Tensor:
    """Mean entropy of mixed targets: the floor under the cross-entropy of a mixed batch.

    A row of two classes has the entropy ``-lam * log(lam) - (1 - lam) * log(1 - lam)``, a row of one class none. No
    network brings the loss below the mean of it, so a training loss that stays high is no sign of a poor fit.

    Args:
        targets: Class indices (N, ...), as for :func:`mixed_accuracy`.
        plan: The plan the batch was mixed with; not needed inside a ``training_step`` under ``ManifoldMixupCallback``.

    Returns:
        float32 scalar in nats, at most log 2; 0 if the batch is not mixed.

    Raises:
        RuntimeError: If the targets went through a function that cannot be followed.
    """
    mixed = _own_and_partner(targets, plan)
    if mixed is None:
        return torch.zeros((), device=targets.device)
    own, partner, lam = mixed
    entropy = -torch.xlogy(lam, lam) - torch.xlogy(1 - lam, 1 - lam)
    return (entropy.view(-1, *[1] * (own.dim() - 1)) * (own != partner)).mean()


def mix_loss(loss: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> Any:
    """Evaluate any loss on the batch's targets and on their partners', and interpolate.

    Args:
        loss: A function of targets and of what the network made of the mixed batch.
        name: What to call it in messages.
        args: Its arguments. Outside of a mixed step, ``loss`` is called as it is.
        kwargs: Its keyword arguments.

    Returns:
        ``lam * loss(own) + (1 - lam) * loss(partner)``, for every tensor that ``loss`` returns.

    Raises:
        RuntimeError: If it is called before the planned layer has run, or cannot be interpolated.
    """
    if not any(isinstance(tensor, TargetPair) for tensor in tensors_in((args, kwargs))):
        return loss(*args, **kwargs)
    call = _Call(loss, args, kwargs)
    call.name = name
    return call.mixed_explicitly()


def _own_and_partner(targets: Tensor, plan: MixPlan | None) -> tuple[Tensor, Tensor, Tensor] | None:
    if isinstance(targets, TargetPair):
        own, partner, lam = targets.own, targets.partner, targets.plan.lam
        return own, partner, lam if len(own) == len(lam) else _one_lam(lam, own, "mixed_accuracy").expand(len(own))
    return None if plan is None else (targets, targets[plan.partner], plan.lam)


class _Call:
    """One function call in which at least one operand is a pair."""

    def __init__(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.name = getattr(func, "__name__", str(func))
        self.tensors = tensors_in((args, kwargs))
        self.pairs = [tensor for tensor in self.tensors if isinstance(tensor, TargetPair)]
        self.plan, self.mixer = self.pairs[0].plan, self.pairs[0].mixer
        self.has_mixed_operand = any(pair.is_mixed for pair in self.pairs)

    def result(self) -> Any:
        """What user code gets."""
        if self.name in _COPIES or is_independent(self.name):
            return self._run(_value_of)
        self._refuse_what_cannot_be_followed()
        if is_in_place(self.name, self.kwargs):
            return self._in_place()
        if self.has_mixed_operand:
            return self._on_mixed()
        if self._is_input_use():
            return self._run(_input_of)
        own = self._run(_value_of)
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
            return self._run(_own_of)  # of a first look, or of a part of the batch that is not mixed
        for tensor in self.tensors:
            if tensor.grad_fn is not None and not isinstance(tensor, TargetPair):
                self.mixer.check_path(tensor, self.name)
        runs = len(self.mixer.ran)
        mixed = self._interpolated(self._run(_own_of))
        if len(self.mixer.ran) > runs:
            raise RuntimeError(
                f"loss={self.name} runs the network itself, so evaluating it on both target sets would run it twice. "
                "Name the function that compares its output with the targets."
            )
        self.mixer.losses.append(self.name)
        return mixed

    def _run(self, side: Callable[[TargetPair], Tensor]) -> Any:
        args, kwargs = map_tensors(
            lambda tensor: side(tensor) if isinstance(tensor, TargetPair) else tensor, (self.args, self.kwargs)
        )
        return self.func(*args, **kwargs)

    def _on_mixed(self) -> Any:
        if is_network(self.name, self.tensors):
            raise RuntimeError(
                f"'{self.name}' takes what was computed from the batch's targets further through the network. Targets "
                "can be mixed in the loss only."
            )
        value = self._run(_value_of)
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        if all(tensor.dim() == 0 and not tensor.is_floating_point() for tensor in tensors):
            return value  # what is asked of a loss is asked of the mixed one
        is_linear_in_pairs = is_linear(self.name, self.pairs, self.args)
        if is_linear_in_pairs and all(pair.is_mixed and not pair.is_ragged for pair in self.pairs):
            return self._derived(value, is_mixed=True)  # of interpolations it is the interpolation
        return self._interpolated(self._run(_own_of))

    def _derived(self, result: Any, is_mixed: bool = False) -> Any:
        """Pairs whose partner's half is the same call on the partner's halves, made if it is asked for."""
        lost = self._reason_to_lose()
        by_row = is_by_row(self.name) and not is_mixed
        expression = Expression(self.func, self.args, self.kwargs, self.tensors)

        def derive(value: Tensor, index: int) -> TargetPair:
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
        partner = self._run(_partner_of)
        partners = [leaf for leaf in tree_leaves(partner) if isinstance(leaf, Tensor)]
        if self.name.startswith("embedding"):
            self.mixer.looked_up.update(t.grad_fn for t in (own, partner) if t.grad_fn is not None)

        def interpolate(value: Tensor, index: int) -> TargetPair:
            other = partners[index]
            is_ragged = value.shape != other.shape or not value.is_floating_point()
            pair = self._pair(value, is_mixed=True, is_ragged=is_ragged)
            if not is_ragged:
                weight = _lam_of(self.plan, value, pair.is_aligned, self.name)
                pair = self._pair(weight * value + (1 - weight) * other, is_mixed=True)
            pair._halves, pair._partner = (value, other), other
            return pair

        return _map_with_index(interpolate, own)

    def _sum_over_rows(self) -> TargetPair:
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
        rows = _Call(self.func, (), kwargs)._interpolated(self.func(**tree_map_only(TargetPair, _own_of, kwargs)))
        if self.name == "nll_loss" and reduction == "mean":
            raise RuntimeError(
                "nll_loss with its mean cannot be mixed with one lam per sample. Use cross_entropy or per_sample=False."
            )
        total = rows.value.mean() if reduction == "mean" else rows.value.sum()
        if reduction == "batchmean":
            total = total / self.plan.batch_size
        return self._pair(total, is_mixed=True)

    def _pair(self, value: Tensor, **settings: Any) -> TargetPair:
        is_aligned = self.plan.lam.stride(0) == 0 or (
            all(pair.is_aligned or pair.value.dim() == 0 for pair in self.pairs)
            and keeps_rows(self.name, self.args, value, self.plan.batch_size)
        )
        return _pair(value, self.plan, self.mixer, is_aligned=is_aligned, **settings)

    def _in_place(self) -> Any:
        """Change both halves; for a plain tensor, make it a pair of what it becomes with each."""
        changed = self.kwargs["out"] if self.kwargs.get("out") is not None else self.args[0]
        wants_grad = torch.is_grad_enabled() and any(_value_of(tensor).requires_grad for tensor in self.tensors)
        is_pair = isinstance(changed, TargetPair)
        if (wants_grad and not self.mixer.has_mixed) or (self.mixer.is_explicit and not is_pair):
            return self._run(_value_of)
        if self.has_mixed_operand and not wants_grad and not is_pair:
            return self._run(_value_of)  # a metric of losses
        if wants_grad and not self.has_mixed_operand:
            self._check_operands()
            self.mixer.losses.append(self.name)
        is_mixed = wants_grad or self.has_mixed_operand
        base = changed if is_pair or changed._base is None else changed._base
        own = self._changed_half(_own_of, changed, base) if is_mixed else None
        partner = self._changed_half(_partner_of, changed, base)
        result = self._run(_value_of)
        for tensor, index in {id(base): (base, 0), id(changed): (changed, 1)}.values():
            alias = tensor.value if isinstance(tensor, TargetPair) else tensor.as_subclass(Tensor)
            tensor.__class__ = TargetPair
            is_linear_change = is_linear(self.name, self.pairs, self.args)
            ragged = is_mixed and not is_linear_change
            _pair(alias, self.plan, self.mixer, is_mixed=is_mixed, is_ragged=ragged, is_pure=False, pair=tensor)
            tensor._partner = partner[index]
            tensor._halves = None if own is None else (own[index], partner[index])
        return None if result is None else changed

    def _changed_half(
        self, side: Callable[[TargetPair], Tensor], changed: Tensor, base: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the changed tensor becomes with one half of its operands: the whole that it is part of, and itself."""
        half = _side_of(side, base)
        keeps_identity = isinstance(base, TargetPair) and side is _partner_of and not base.is_mixed
        whole = half if keeps_identity else half.clone()
        part = whole
        if changed is not base:
            part = whole.as_strided(changed.size(), changed.stride(), changed.storage_offset())
        swap: Callable[[Any], Any] = lambda tensor: part if tensor is changed else _side_of(side, tensor)  # noqa: E731
        args, kwargs = map_tensors(swap, (self.args, self.kwargs))
        self.func(*args, **kwargs)
        return whole, part

    def _is_input_use(self) -> bool:
        return (
            self.mixer.planned == INPUT
            and any(pair.is_input for pair in self.pairs)
            and torch.is_grad_enabled()
            and is_network(self.name, self.tensors)
            and any(tensor.requires_grad for tensor in self.tensors if not isinstance(tensor, TargetPair))
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
            if tensor.grad_fn is not None and not isinstance(tensor, TargetPair):
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


def _pair(
    value: Tensor,
    plan: MixPlan,
    mixer: Mixer,
    *,
    is_mixed: bool = False,
    is_ragged: bool = False,
    is_aligned: bool = True,
    is_pure: bool = True,
    is_input: bool = False,
    lost: str | None = None,
    expression: Expression | None = None,
    index: int = 0,
    pair: Any = None,
) -> TargetPair:
    pair = value.as_subclass(TargetPair) if pair is None else pair
    pair.value, pair.plan, pair.mixer, pair.is_mixed, pair.is_ragged = value, plan, mixer, is_mixed, is_ragged
    pair.is_aligned, pair.is_pure, pair.is_input, pair.lost = is_aligned, is_pure, is_input, lost
    pair._expression, pair._index, pair._halves, pair._partner = expression, index, None, None
    mixer.pairs.append(weakref.ref(pair))
    return pair


def _compiled_call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call while a region is compiled: both halves at once, in few and plain operations that trace without a break."""
    name = getattr(func, "__name__", str(func))
    first, *_ = pairs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, TargetPair)]
    if is_in_place(name, kwargs) or is_random(name):
        raise RuntimeError(f"'{name}' on the batch's targets cannot be followed in a compiled training_step.")
    if all(pair.is_mixed for pair in pairs) and is_linear(name, pairs, args):
        value = func(*tree_map_only(TargetPair, _value_of, args), **tree_map_only(TargetPair, _value_of, kwargs))
        if first.plan.lam.stride(0) != 0:
            return _compiled_pair(value, first, True, None)
    own = func(*tree_map_only(TargetPair, _compiled_own, args), **tree_map_only(TargetPair, _compiled_own, kwargs))
    if not isinstance(own, Tensor):
        return own
    if own.requires_grad and (first.mixer.is_explicit or not first.mixer.has_mixed):
        return own
    partner = func(
        *tree_map_only(TargetPair, _compiled_partner, args), **tree_map_only(TargetPair, _compiled_partner, kwargs)
    )
    if not own.requires_grad and not any(pair.is_mixed for pair in pairs):
        return _compiled_pair(own, first, False, (own, partner))
    first.mixer.losses.append(name)
    lam = first.plan.lam[0] if first.plan.lam.stride(0) == 0 else first.plan.lam
    if lam.dim() == 0:
        return _compiled_pair(lam.to(own.dtype) * own + (1 - lam.to(own.dtype)) * partner, first, True, (own, partner))
    if func is F.cross_entropy and len(pairs) == 1:
        return _compiled_pair(_compiled_cross_entropy(first, lam, *args, **kwargs), first, True, None)
    if own.dim() == 0 or own.shape[0] != lam.shape[0]:
        raise RuntimeError(f"'{name}' cannot be mixed with one lam per sample in a compiled training_step.")
    lam = lam.to(own.dtype).view(-1, *[1] * (own.dim() - 1))  # (N,) -> (N, 1, ...)
    return _compiled_pair(lam * own + (1 - lam) * partner, first, True, (own, partner))


def _compiled_cross_entropy(
    pair: TargetPair,
    lam: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    own, partner = _compiled_own(pair), _compiled_partner(pair)
    return cross_entropy_of_pair(logits, own, partner, lam, weight, ignore_index, reduction, label_smoothing)


def _compiled_pair(value: Tensor, like: TargetPair, is_mixed: bool, halves: tuple[Tensor, Tensor] | None) -> TargetPair:
    pair = value.as_subclass(TargetPair)
    pair.value, pair.plan, pair.mixer, pair.is_mixed = value, like.plan, like.mixer, is_mixed
    pair._halves, pair._partner = halves, None if halves is None else halves[1]
    return pair


def _compiled_own(pair: TargetPair) -> Tensor:
    if pair._halves is None and pair.is_mixed:
        raise RuntimeError("The mean of losses with one lam per sample cannot be transformed further.")
    return pair.value if pair._halves is None else pair._halves[0]


def _compiled_partner(pair: TargetPair) -> Tensor:
    if pair._partner is None:
        return pair.value.index_select(0, pair.plan.partner)
    return pair._partner


def _fused_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> TargetPair | None:
    """``F.cross_entropy`` with its own signature in one pass over the logits; None where it is no plain case."""
    if not isinstance(target, TargetPair) or isinstance(logits, TargetPair) or isinstance(weight, TargetPair):
        return None
    mixer, lam = target.mixer, target.plan.lam
    is_loss = torch.is_grad_enabled() and logits.requires_grad and mixer.has_mixed and not mixer.is_explicit
    if not is_loss or target.is_mixed or size_average is not None or reduce is not None:
        return None
    own, partner = target.own, target.partner
    if logits.grad_fn is not None:
        mixer.check_path(logits, "cross_entropy")
    if own.shape != partner.shape:
        return None
    if own.shape[:1] != lam.shape or not target.is_aligned:
        lam = _one_lam(lam, own, "cross_entropy").expand(own.shape[0])  # flattened targets, say
    loss = cross_entropy_of_pair(logits, own, partner, lam, weight, ignore_index, reduction, label_smoothing)
    mixer.losses.append("cross_entropy")
    if mixer.measures and not mixer.measured and own.dim() == 1 and not own.is_floating_point():
        mixer.measured = {"acc_mixed": mixed_accuracy(logits, target), "loss_floor": mixed_target_entropy(target)}
    expression = None
    if lam.stride(0) == 0 or reduction == "none":
        args = (logits, target, weight, None, ignore_index, None, reduction, label_smoothing)
        expression = Expression(F.cross_entropy, args, {}, [logits, target])
    return _pair(loss, target.plan, mixer, is_mixed=True, is_pure=False, expression=expression)


def _lam_of(plan: MixPlan, value: Tensor, is_aligned: bool, name: str) -> Tensor:
    """``lam`` in a shape that multiplies ``value``."""
    if plan.lam.stride(0) != 0 and is_aligned and value.dim() > 0 and value.shape[0] == plan.batch_size:
        return plan.lam.to(value.dtype).view(-1, *[1] * (value.dim() - 1))  # (N,) -> (N, 1, ...)
    return _one_lam(plan.lam, value, name)[0].to(value.dtype)


def _one_lam(lam: Tensor, value: Tensor, name: str) -> Tensor:
    """The batch's only ``lam``, (1,)."""
    if lam.stride(0) != 0:
        raise RuntimeError(
            f"With one lam per sample the targets must keep the batch in dimension 0, but '{name}' got them in shape "
            f"{tuple(value.shape)} for {lam.shape[0]} rows. Use per_sample=False."
        )
    return lam[:1]


def _places_of_rows(pair: TargetPair) -> set[int] | None:
    """Dimensions, counted from the last, along which the pair holds the batch; None if it is the same for partners."""
    own, partner = pair.value, pair.partner
    if own.shape == partner.shape and torch.equal(own, partner):
        return None
    rows = pair.plan.partner
    sized = [dim for dim in range(own.dim()) if own.shape[dim] == len(rows)]
    return {dim - own.dim() for dim in sized if torch.equal(own.index_select(dim, rows), partner)}


def _is_pure(tensor: Tensor) -> bool:
    return tensor.is_pure if isinstance(tensor, TargetPair) else tensor.dim() == 0


def _map_with_index(derive: Callable[[Tensor, int], TargetPair], result: Any) -> Any:
    """Replace the tensors of a result, each with its place among them."""
    indices = iter(range(len(tree_leaves(result)) + 1))
    return tree_map_only(Tensor, lambda value: derive(value, next(indices)), result)


def _value_of(pair: Tensor) -> Tensor:
    return pair.value if isinstance(pair, TargetPair) else pair


def _side_of(side: Callable[[TargetPair], Tensor], tensor: Tensor) -> Tensor:
    return side(tensor) if isinstance(tensor, TargetPair) else tensor


def _own_of(pair: TargetPair) -> Tensor:
    return pair.own


def _partner_of(pair: TargetPair) -> Tensor:
    return pair.partner


def _input_of(pair: TargetPair) -> Tensor:
    return pair.mixed_input
