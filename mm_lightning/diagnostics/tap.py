"""Overhearing a layer: its outputs, beside the batches' targets, while the module is evaluated anyway."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchmetrics.utilities.distributed import gather_all_tensors

from mm_lightning.mixup import resolve_layers


class LayerTap:
    """Collects the hidden states of one layer and the targets of the same rows.

    The layer has a hook only between :meth:`open` and :meth:`close`, and no forward pass is made for it. A layer that
    runs several times per batch gives its last output.

    Args:
        layer: The layer's dotted name, or what else ``resolve_layers`` takes for one layer.
        max_rows: Only the first so many rows are kept, on each process.
        targets: Finds the class indices, integer (N,), in a batch. Default: the last integer tensor of the batch with
            one entry per row.
    """

    def __init__(self, layer: str, max_rows: int, targets: Callable[[Any], Tensor] | None = None) -> None:
        self.layer = layer
        self.max_rows = max_rows
        self.targets = targets
        self._handle: RemovableHandle | None = None
        self._output: Tensor | None = None
        self._hidden: list[Tensor] = []
        self._targets: list[Tensor] = []

    @property
    def is_open(self) -> bool:
        """Whether the layer is hooked."""
        return self._handle is not None

    def find(self, module: nn.Module) -> nn.Module:
        """Return the layer.

        Raises:
            ValueError: If the name means no layer of ``module``, or several, or the batch.
        """
        found = resolve_layers(module, self.layer)
        if len(found) != 1 or len(found[0].modules) != 1:
            raise ValueError(f"layer must name one module, got {self.layer!r}, which names {[x.name for x in found]}.")
        return found[0].modules[0]

    def open(self, module: nn.Module) -> None:
        """Hook the layer and forget what was collected before."""
        self.close()
        self._handle = self.find(module).register_forward_hook(self._overhear)

    def close(self) -> None:
        """Take the hook off and forget what was collected."""
        if self._handle is not None:
            self._handle.remove()
        self._handle, self._output = None, None
        self._hidden, self._targets = [], []

    def keep(self, batch: Any) -> None:
        """Keep the layer's output for this batch beside the batch's targets.

        Raises:
            RuntimeError: If the layer did not run.
            ValueError: If the targets are not one class index per row.
        """
        room = self.max_rows - sum(map(len, self._targets))
        if self._handle is None or room <= 0:
            return
        if self._output is None:
            raise RuntimeError(
                f"Layer {self.layer!r} did not run in this batch, or was compiled before it was hooked. "
                "Choose a layer that every evaluation step runs, and do not compile it."
            )
        hidden = self._output.reshape(len(self._output), -1).cpu()
        self._output = None
        targets = self.targets(batch) if self.targets else _last_integers(batch, len(hidden))
        if targets.shape != hidden.shape[:1]:
            raise ValueError(f"targets must be ({len(hidden)},), a class per row, got {tuple(targets.shape)}.")
        self._hidden.append(hidden[:room])
        self._targets.append(targets[:room].detach().cpu().clone())

    def collected(self, module: LightningModule) -> tuple[Tensor, Tensor] | None:
        """Return hidden states (N, D) and targets (N,) of all processes, on the CPU; None if there are none.

        To be called by every process.
        """
        if not self._hidden:
            return None
        hidden, targets = torch.cat(self._hidden), torch.cat(self._targets)
        if module.trainer.world_size > 1:
            hidden, targets = (torch.cat(gather_all_tensors(x.to(module.device))).cpu() for x in (hidden, targets))
        return hidden, targets

    def _overhear(self, layer: nn.Module, args: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise TypeError(f"Layer {self.layer!r} must return a tensor to be drawn, got {type(output).__name__}.")
        self._output = output.detach().clone()  # the next layer may work in place


def _last_integers(batch: Any, length: int) -> Tensor:
    leaves: list[Tensor] = []
    apply_to_collection(batch, Tensor, leaves.append)
    leaves = [leaf for leaf in leaves if leaf.shape[:1] == (length,) and leaf.numel() == length]
    leaves = [leaf for leaf in leaves if not leaf.is_floating_point() and leaf.dtype != torch.bool]
    if not leaves:
        raise ValueError(f"No integer tensor with {length} entries is in the batch. Pass targets=batch -> Tensor.")
    return leaves[-1].reshape(-1)
