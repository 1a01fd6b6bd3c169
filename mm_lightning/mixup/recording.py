"""Watching a forward pass from outside: what each module does, and where backward passes would begin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mm_lightning.mixup.layers import WRAPPED
from mm_lightning.mixup.masks import MaskSite, is_mask, keep_value
from mm_lightning.mixup.trace import Call, Trace, Traced, node_of
from mm_lightning.mixup.trees import map_tensors, tensors_in

__all__ = ["CatchBackward", "trace_modules"]


@contextmanager
def trace_modules(modules: dict[str, nn.Module], trace: Trace) -> Iterator[None]:
    """Record what the modules do until the end of the ``with`` block."""
    began: dict[str, list[tuple[int, list[MaskSite]]]] = {name: [] for name in modules}

    def begin(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            with torch._C.DisableTorchFunctionSubclass():
                began[name].append((trace.tick(), _masks_in(name, module, args, kwargs)))

        return note

    def watch(name: str) -> Callable[[nn.Module, Any, Any, Any], Any]:
        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            call = trace.calls.pop(name, None)
            # A module that returns its input itself must not be taken for the module before it, nor may a function that
            # changes the output in place take its node from the graph.
            output = map_tensors(lambda tensor: tensor.clone() if tensor.is_floating_point() else tensor, output)
            with torch._C.DisableTorchFunctionSubclass():
                tensors = tensors_in(output)
                trace.calls[name] = Call(
                    [node_of(tensor) for tensor in tensors],
                    [tuple(tensor.shape) for tensor in tensors],
                    [tensor.dtype for tensor in tensors],
                    _applies_weights(module, args, kwargs),
                    1 if call is None else call.count + 1,
                    trace.tick(),
                )
                begin, masks = began[name].pop()
                trace.masks += [replace(mask, begin=begin, end=trace.clock) for mask in masks]
            return output

        return note

    # Scripted modules take no hooks; what they do is seen from outside.
    modules = {name: part for name, part in modules.items() if not isinstance(part, torch.jit.ScriptModule)}
    handles = [module.register_forward_hook(watch(name), with_kwargs=True) for name, module in modules.items()]
    handles += [module.register_forward_pre_hook(begin(name), with_kwargs=True) for name, module in modules.items()]
    try:
        with CatchBackward(trace):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _masks_in(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[MaskSite]:
    """Tensors made of the batch's integers that the module takes beside hidden states."""
    items: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    masks = [(key, item) for key, item in items if isinstance(item, Traced) and item.is_of_integers and item.dim() > 1]
    hidden = [item for _, item in items if isinstance(item, Tensor) and item.is_floating_point()]
    if not any(all(item is not mask for _, mask in masks) for item in hidden):
        return []
    kept = [(key, keep_value(mask.value, module, key)) for key, mask in masks if is_mask(mask.value, module, key)]
    return [MaskSite(name, key, keep, 0, 0) for key, keep in kept if keep is not None]


def _applies_weights(module: nn.Module, args: Any, kwargs: Any) -> bool:
    for wrapped in WRAPPED:
        module = getattr(module, wrapped, module)
    if not any(parameter.dim() > 1 for parameter in module.parameters(recurse=False)):
        return False
    return any(tensor.is_floating_point() for tensor in tensors_in((args, kwargs)))


class CatchBackward(TorchFunctionMode):
    """A backward pass ends a loss and is not run."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.backward:
            self.trace.end_in(args[0])
            self.trace.give_gradients()
            return None
        return func(*args, **(kwargs or {}))
