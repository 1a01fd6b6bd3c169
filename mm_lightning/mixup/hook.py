"""The hooks that mix inside a forward pass, and the switch they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mm_lightning.mixup.layers import Hook, Layer
from mm_lightning.mixup.masks import MaskSite, UnionHook
from mm_lightning.mixup.mixing import Mixing
from mm_lightning.mixup.plan import MixPlan
from mm_lightning.mixup.trees import map_tensors

__all__ = ["Mixer"]

Dims = tuple[int | None, ...]


class Mixer:
    """Mixes the output of the planned layer while it is on.

    The plan decides, never the number of calls: a recomputed forward pass (activation checkpointing) repeats the mix.
    Each hook reads plain attributes of its own only, so it traces into a compiled graph if attached before its first
    call, and causes no more graphs than there are plans to tell apart.

    Args:
        layers: The eligible layers, S.
        dims: For some of their modules, which dimension of each tensor that they return holds the batch, None for one
            without rows. Of others it is dimension 0 of every floating point tensor that has as many rows there.
        masks: For each layer's name the arguments of later modules that take masks, with the modules.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        dims: Mapping[nn.Module, Dims] | None = None,
        masks: Mapping[str, Sequence[tuple[nn.Module, MaskSite]]] | None = None,
    ) -> None:
        self.layers = tuple(layers)
        self._hooks = [[_MixHook(layer.name, (dims or {}).get(m)) for m in layer.modules] for layer in self.layers]
        self._index = {layer.name: i for i, layer in enumerate(self.layers)}
        sites: dict[nn.Module, dict[int, list[MaskSite]]] = {}
        for name, found in (masks or {}).items():
            for module, site in found:
                sites.setdefault(module, {}).setdefault(self._index[name], []).append(site)
        self._mask_hooks = {module: UnionHook(found) for module, found in sites.items()}
        self._handles: list[RemovableHandle] = []
        self._in_step = False
        self._mixing: Mixing | None = None

    @property
    def mixing(self) -> Mixing:
        """What is mixed since :meth:`start`."""
        assert self._mixing is not None
        return self._mixing

    @property
    def plan(self) -> MixPlan:
        """The plan as targets are mixed by it, once the planned layer has run."""
        return self.mixing.for_loss

    def attach(self) -> None:
        """Hook every eligible layer, once."""
        self.detach()
        for layer, hooks in zip(self.layers, self._hooks, strict=True):
            for module, hook in zip(layer.modules, hooks, strict=True):
                # The hook comes last, so that it mixes what the module's user made of the output.
                self._handles.append(module.register_forward_hook(hook))
        for module, mask_hook in self._mask_hooks.items():
            self._handles.append(module.register_forward_pre_hook(mask_hook, with_kwargs=True))

    def detach(self) -> None:
        """Remove every hook. Nothing is mixed any more."""
        self.stop()
        while self._handles:
            self._handles.pop().remove()

    def start(self, plan: MixPlan, keep: bool = False) -> None:
        """Mix every forward pass from now on, as planned, and count the runs of each layer.

        Args:
            plan: The plan.
            keep: Keep what the layer returns, for :meth:`repeat`. A compiled network would compute it beside the rest.
        """
        for hook in self._all_hooks:
            hook.runs = 0
            hook.keeps = keep
            hook.made.clear()
        self._mixing = Mixing(plan)
        self._switch_on(counting=True)
        self._in_step = True

    def mix_input(self, rows: Tensor) -> Tensor:
        """Mix the batch itself, the layer ``"input"``, in a loop of one's own. Integers stay, their embeddings mix."""
        return self.mixing.mix(rows) if rows.is_floating_point() or rows.is_complex() else rows

    def repeat(self, again: bool) -> None:
        """Return what the planned layer has returned since :meth:`start`, in this order, if kept; or go on to mix."""
        for hook in self._all_hooks:
            hook.repeating = 0 if again else None

    def stop(self) -> None:
        """Mix nothing from now on."""
        for hook in self._all_hooks:
            hook.mixing = hook.repeating = None
            hook.counting = False
            hook.made.clear()
        for mask_hook in self._mask_hooks.values():
            mask_hook.mixing = None
        self._in_step = False

    def begin_backward(self, unmixed_until: int = -1) -> None:
        """Mix without counting: activation checkpointing recomputes forward passes during the backward pass.

        Args:
            unmixed_until: Number in autograd's sequence of the last node that an unmixed run of the batch has made,
                whose forward passes are recomputed as they were.
        """
        self._switch_on(counting=False)
        for hook in self._all_hooks:
            hook.unmixed_until = unmixed_until

    def end_backward(self) -> None:
        """End what :meth:`begin_backward` began; in manual optimization it was a part of the step."""
        if self._in_step:
            self._switch_on(counting=True)
        else:
            self.stop()

    def times_mixed(self, layer: str) -> list[int]:
        """How often each module of a layer has run since :meth:`start`."""
        return [hook.runs for hook in self._hooks[self._index[layer]]]

    def _switch_on(self, *, counting: bool) -> None:
        index = self._index.get(self.mixing.plan.layer or "", -1)
        for hook in self._all_hooks:
            hook.counting = counting
            hook.mixing = None
        for hook in self._hooks[index] if index >= 0 else ():
            hook.mixing = self._mixing
        for mask_hook in self._mask_hooks.values():
            mask_hook.switch_on(index, self.mixing)

    @property
    def _all_hooks(self) -> list[_MixHook]:
        return [hook for hooks in self._hooks for hook in hooks]


class _MixHook(Hook):
    """The forward hook of one layer; a class, not a closure, so that a hooked module stays picklable.

    Attributes:
        mixing: What to mix by; None if another layer is planned, or none.
        counting: Whether to count the runs.
        runs: How often the layer has run.
        keeps: Whether to keep what it returns.
        made: What it returned since the step began, for the partners' half.
        repeating: The next of these to return; None while the own half runs.
        unmixed_until: Number of the last node of autograd whose forward pass was not mixed.
    """

    def __init__(self, name: str, dims: Dims | None = None) -> None:
        self.name, self.dims = name, dims
        self.mixing: Mixing | None = None
        self.counting = False
        self.runs = 0
        self.keeps = False
        self.made: list[Any] = []
        self.repeating: int | None = None
        self.unmixed_until = -1

    def __deepcopy__(self, memo: Any) -> _MixHook:
        return _MixHook(self.name)  # a copied module, an averaged teacher say, is never mixed

    def __reduce__(self) -> Any:
        return _MixHook, (self.name,)  # nor is a loaded one

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        mixing = self.mixing
        if self.repeating is not None and self.keeps:
            if mixing is None or self.repeating >= len(self.made):
                return None
            self.repeating += 1
            return self.made[self.repeating - 1]
        if self.counting and self.repeating is None:
            self.runs += 1
        if mixing is None or not (self.counting or self._recomputes_a_mix()):
            return None
        mixed = self._mixed(output, mixing)
        if self.keeps and self.counting:
            self.made.append(mixed)
        return mixed

    def _recomputes_a_mix(self) -> bool:
        """Whether a forward pass around the backward pass is a mixed one again, and neither unmixed nor of a metric."""
        if not torch.is_grad_enabled():
            return False
        node = torch._C._current_autograd_node()
        return node is None or node._sequence_nr() > self.unmixed_until

    def _mixed(self, output: Any, mixing: Mixing) -> Any:
        rows = mixing.plan.batch_size
        if isinstance(output, Tensor):
            dim = 0 if self.dims is None else self.dims[0]
            if _has_rows(output, dim, rows):
                return _mix(output, dim, mixing)
        else:
            found: list[Tensor] = []
            dims = iter(self.dims) if self.dims is not None else None

            def mix_if_batch(tensor: Tensor) -> Tensor:
                dim = 0 if dims is None else next(dims, None)
                if not _has_rows(tensor, dim, rows):
                    return tensor
                found.append(tensor)
                return _mix(tensor, dim, mixing)

            mixed = map_tensors(mix_if_batch, output)
            if found:
                return mixed
        raise self._refusal(output, rows)

    def _refusal(self, output: Any, rows: int) -> Exception:
        if isinstance(output, Tensor):
            what = f"the output has shape {tuple(output.shape)} and type {output.dtype}"
        else:
            what = f"no tensor of its {type(output).__name__} is that"
        dim = next((dim for dim in self.dims or () if dim is not None), 0)
        return ValueError(
            f"Layer {self.name!r} cannot be mixed: the batch of {rows} rows must be in dimension "
            f"{dim} of a floating point output, but {what}. Choose another layer, or name the dimension with batch_dim."
        )


def _has_rows(tensor: Tensor, dim: int | None, rows: int) -> bool:
    is_number = tensor.is_floating_point() or tensor.is_complex()
    return dim is not None and is_number and tensor.dim() > dim and tensor.shape[dim] == rows


def _mix(hidden: Tensor, dim: int | None, mixing: Mixing) -> Tensor:
    return mixing.mix(hidden) if not dim else mixing.mix(hidden.movedim(dim, 0)).movedim(0, dim)
