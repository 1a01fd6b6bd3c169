"""The hidden states of layers, overheard beside the batches' targets while the module is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchmetrics.utilities.distributed import gather_all_tensors

from mm_lightning.mixup import resolve_layers
from mm_lightning.mixup.batch import tensors_of
from mm_lightning.namespaces import LightningModule

INPUT, OUTPUT = "input", "output"
_BEFORE = ":input"  # ending of a name that means what comes into a layer


class HiddenStates:
    """Collects what layers put out, and the targets of the same rows.

    The layers have hooks only between :meth:`open` and :meth:`close`, and no forward pass is made for them. A layer
    that runs several times per batch gives its last output.

    Args:
        layers: The layers' dotted names, or what else ``resolve_layers`` takes for one layer. ``"input"`` is the
            batch's first floating point tensor, ``"output"`` what the module's own ``forward`` returns,
            ``"NAME:input"`` what comes first into the layer of that name.
        max_rows: Only the first so many rows are kept, on each process.
        targets: Finds the class indices, integer (N,), in a batch. Default: the last integer tensor of the batch with
            one entry per row.
    """

    def __init__(self, layers: Sequence[str], max_rows: int, targets: Callable[[Any], Tensor] | None = None) -> None:
        self.layers = list(layers)
        self.max_rows = max_rows
        self.targets = targets
        self.is_open = False
        self.row_shapes: dict[str, tuple[int, ...]] = {}  # of a row before it was flattened, by layer
        self.is_cut = False  # whether there were more rows than are kept
        self._is_paused = False
        self._handles: list[RemovableHandle] = []
        self._room = max_rows
        self._outputs: dict[str, Tensor] = {}  # of the batch that runs
        self._hidden: dict[str, list[Tensor]] = {}
        self._targets: list[Tensor] = []

    @property
    def is_full(self) -> bool:
        """Whether ``max_rows`` rows are kept already."""
        return self._room == 0

    def find(self, module: nn.Module) -> dict[str, nn.Module]:
        """Return the modules of the layers, by name, but for the input.

        Raises:
            ValueError: If a name means no layer of ``module``, or several.
        """
        return {layer: _find(module, layer) for layer in self.layers if layer != INPUT}

    def open(self, module: nn.Module) -> None:
        """Hook the layers and forget what was collected before."""
        self.close()
        for layer, found in self.find(module).items():
            if layer == OUTPUT:
                self._handles.append(found.register_forward_pre_hook(self._await_output))
            if layer.endswith(_BEFORE):
                self._handles.append(found.register_forward_pre_hook(partial(self._overhear_input, layer)))
            else:
                self._handles.append(found.register_forward_hook(partial(self._overhear, layer)))
        self.is_open = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Overhear nothing for a while: what runs is none of the batches that are kept."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def close(self) -> None:
        """Take the hooks off and forget what was collected."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._outputs, self._targets = [], {}, []
        self._hidden = {layer: [] for layer in self.layers}
        self._room = self.max_rows
        self.is_open = self.is_cut = False

    def keep(self, batch: Any) -> None:
        """Keep the layers' outputs for this batch beside the batch's targets.

        Raises:
            RuntimeError: If a layer did not run.
            ValueError: If the targets are not one class index per row, or the layers differ in their number of rows.
        """
        self.is_cut |= self.is_open and self.is_full
        if not self.is_open or self.is_full:
            return
        outputs = {layer: self._output(layer, batch) for layer in self.layers}
        first, length = self.layers[0], len(outputs[self.layers[0]])
        for layer, output in outputs.items():
            if len(output) != length:
                raise ValueError(f"Layer {layer!r} has {len(output)} rows, layer {first!r} has {length}.")
        targets = self.targets(batch) if self.targets else last_integers(batch, length)
        if targets.shape != (length,):
            raise ValueError(f"targets must be ({length},), a class per row, got {tuple(targets.shape)}.")
        rows = min(self._room, length)
        self.is_cut |= rows < length
        self._targets.append(targets[:rows].detach().cpu().clone())
        for layer, output in outputs.items():
            self.row_shapes[layer] = tuple(output.shape[1:])
            # the batch is not ours: the loader may hand out views of its data, or use the memory again
            self._hidden[layer].append(output[:rows].reshape(rows, -1).to("cpu", copy=layer == INPUT))
        self._room -= rows

    def collected(self, module: LightningModule, gather: bool = True) -> tuple[dict[str, Tensor], Tensor] | None:
        """Return hidden states (N, D) by layer and targets (N,) of all processes, on the CPU.

        To be called by every process. None if any of them has no rows: the others would wait for it. Without ``gather``
        they are this process's own.
        """
        if not module.trainer.strategy.reduce_boolean_decision(bool(self._targets), all=True):
            return None
        hidden, targets = {layer: torch.cat(parts) for layer, parts in self._hidden.items()}, torch.cat(self._targets)
        if gather and module.trainer.world_size > 1:
            hidden = {layer: gathered(states, module) for layer, states in hidden.items()}
            targets = gathered(targets, module)
        return hidden, targets

    def _output(self, layer: str, batch: Any) -> Tensor:
        output = first_floats(batch) if layer == INPUT else self._outputs.pop(layer, None)
        if output is None:
            raise RuntimeError(_absent(layer))
        return output.detach()

    def _await_output(self, module: nn.Module, args: Any) -> None:
        if not self._is_paused:
            self._outputs.pop(OUTPUT, None)

    def _overhear_input(self, layer: str, module: nn.Module, args: Any) -> None:
        self._overhear(layer, module, (), args[0] if args else None)

    def _overhear(self, layer: str, module: nn.Module, args: Any, output: Any) -> None:
        if self.is_full or self._is_paused:
            return
        # with several processes Lightning calls the steps through forward too: the call inside is the module's own
        if layer == OUTPUT and (OUTPUT in self._outputs or not _has_rows(output)):
            return
        if not _has_rows(output):
            raise TypeError(f"Layer {layer!r} must return a tensor with rows to be looked at, got {_kind(output)}.")
        self._outputs[layer] = output.detach().clone()  # the next layer may work in place


def first_floats(batch: Any) -> Tensor | None:
    """Return the first floating point tensor of a batch that has rows, itself; the layer ``"input"`` stands for it."""
    return next((leaf for leaf in tensors_of(batch) if leaf.is_floating_point() and leaf.ndim), None)


def gathered(rows: Tensor, module: LightningModule) -> Tensor:
    """Return the rows of all processes, on the CPU. To be called by every process."""
    return torch.cat(gather_all_tensors(rows.to(module.device))).cpu()


def last_integers(batch: Any, length: int) -> Tensor:
    """Return the last integer tensor of a batch with one entry per row, which are taken for its targets.

    Raises:
        ValueError: If there is none.
    """
    leaves = [leaf for leaf in tensors_of(batch) if leaf.shape[:1] == (length,) and leaf.numel() == length]
    leaves = [leaf for leaf in leaves if not leaf.is_floating_point() and leaf.dtype != torch.bool]
    if not leaves:
        raise ValueError(f"No integer tensor with {length} entries is in the batch. Pass targets=batch -> Tensor.")
    return leaves[-1].reshape(-1)


def _find(module: nn.Module, layer: str) -> nn.Module:
    if layer == OUTPUT:
        return module
    found = resolve_layers(module, layer.removesuffix(_BEFORE))
    if len(found) != 1 or len(found[0].modules) != 1:
        raise ValueError(f"layer must name one module, got {layer!r}, which names {[x.name for x in found]}.")
    return found[0].modules[0]


def _has_rows(output: Any) -> bool:
    return isinstance(output, Tensor) and output.ndim > 0


def _kind(output: Any) -> str:
    return "a single number" if isinstance(output, Tensor) else type(output).__name__


def _absent(layer: str) -> str:
    if layer == OUTPUT:
        return (
            "The module's own forward() returned no tensor in this batch. "
            "Name the layer that makes the logits, which every evaluation step runs, and do not compile it."
        )
    if layer == INPUT:
        return "The batch holds no floating point tensor, which the layer 'input' stands for."
    return (
        f"Layer {layer!r} did not run in this batch, or was compiled before it was hooked. "
        "Choose a layer that every evaluation step runs, and do not compile it."
    )
