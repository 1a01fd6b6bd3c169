"""A tensor that stands for two: its state, and how each half is found."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from mm_lightning.mixup.expression import Expression
from mm_lightning.mixup.hook import Mixer
from mm_lightning.mixup.plan import MixPlan

__all__ = ["Pair", "become_pair", "input_of", "lam_of", "one_lam", "own_of", "partner_of", "value_of"]


class Pair(Tensor):
    """A tensor that stands for two: what it is for the batch's own targets, and what it is for their partners'.

    To user code the pair of the batch's targets is the batch's own tensor: same values, dtype, device and storage, and
    metrics see just that. What is computed from it is a pair again. The partner's half is computed when it is needed,
    which is where the targets meet the mixed hidden state: from there on, the tensor's value is the interpolation of
    both halves, and it is that value which is logged, returned and differentiated.

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
            self._partner = self._expression.evaluate(partner_of)[self._index]
        return self._partner

    @property
    def mixed_input(self) -> Tensor:
        """What the tensor is if the input of the network is mixed."""
        if self._expression is None:
            return self.mixer.mix_input(self.value)
        return self._expression.evaluate(input_of)[self._index]

    def lose(self, value: Tensor, reason: str) -> Pair:
        """A pair of the same step whose partner's half is not known; a loss that asks for it raises ``reason``."""
        return self.derive(value, is_pure=False, lost=reason)

    def __copy__(self) -> Any:
        """A pair of the same memory."""
        return self.view_as(self)

    def __deepcopy__(self, memo: Any) -> Any:
        """A pair of memory of its own."""
        return self.clone()

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
                self._expression.evaluate(own_of)[self._index],
                self._expression.evaluate(partner_of)[self._index],
            )
        return self._halves

    def derive(self, value: Tensor, **settings: Any) -> Pair:
        """Make a pair of the same step; the settings are its attributes."""
        return become_pair(value.as_subclass(type(self)), value, self.plan, self.mixer, **settings)


def become_pair(
    pair: Any,
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
) -> Any:
    """Set the state of ``pair``, whose class is a :class:`Pair` already. It ends with the step."""
    pair.__dict__.update(  # one call: setting attributes one by one costs ten times as much in every step
        value=value,
        plan=plan,
        mixer=mixer,
        is_mixed=is_mixed,
        is_ragged=is_ragged,
        is_aligned=is_aligned,
        is_pure=is_pure,
        is_input=is_input,
        lost=lost,
        _expression=expression,
        _index=index,
        _halves=None,
        _partner=None,
    )
    mixer.pairs.append(weakref.ref(pair))
    return pair


def value_of(tensor: Tensor) -> Tensor:
    """What user code sees of a pair; a plain tensor itself."""
    return tensor.value if isinstance(tensor, Pair) else tensor


def own_of(tensor: Tensor) -> Tensor:
    """The half for the batch's own targets; a plain tensor is the same for both."""
    return tensor.own if isinstance(tensor, Pair) else tensor


def partner_of(tensor: Tensor) -> Tensor:
    """The half for the partners' targets."""
    return tensor.partner if isinstance(tensor, Pair) else tensor


def input_of(tensor: Tensor) -> Tensor:
    """What the network gets for the layer ``"input"``."""
    return tensor.mixed_input if isinstance(tensor, Pair) else tensor


def lam_of(plan: MixPlan, value: Tensor, is_aligned: bool, name: str) -> Tensor:
    """``lam`` in a shape that multiplies ``value``."""
    if plan.lam.stride(0) != 0 and is_aligned and value.dim() > 0 and value.shape[0] == plan.batch_size:
        return plan.lam.to(value.dtype).view(-1, *[1] * (value.dim() - 1))  # (N,) -> (N, 1, ...)
    return one_lam(plan.lam, value, name)[0].to(value.dtype)


def one_lam(lam: Tensor, value: Tensor, name: str) -> Tensor:
    """The batch's only ``lam``, (1,)."""
    if lam.stride(0) != 0:
        raise RuntimeError(
            f"With one lam per sample the targets must keep the batch in dimension 0, but '{name}' got them in shape "
            f"{tuple(value.shape)} for {lam.shape[0]} rows. Use per_sample=False."
        )
    return lam[:1]
