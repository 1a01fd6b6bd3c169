"""The hooks that mix inside a forward pass, the switch they read, and the record that proves what they did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from mm_lightning.mixup.graph import find_sources
from mm_lightning.mixup.interpolation import mix_rows
from mm_lightning.mixup.layers import Layer
from mm_lightning.mixup.plan import MixPlan

__all__ = ["Mixer"]

_OFF = -1


class Mixer:
    """Mixes the output of the planned layer while it is on, and records what became of the plan.

    The plan decides, never the number of calls: a recomputed forward pass (activation checkpointing) repeats the mix.
    The hooks read plain attributes only, so they trace into a compiled graph if attached before its first call.

    Attributes:
        layers: The eligible layers, S.
        ran: Indices into ``layers`` of those whose output was seen since :meth:`start`, in order.
        losses: Names of the loss functions that were computed on mixed targets since :meth:`start`, in order.
        sources: Autograd nodes that the batch's own tensors came from, for :meth:`check_path`; empty if not followed.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = tuple(layers)
        self.ran: list[int] = []
        self.losses: list[str] = []
        self.sources: set[Node] = set()
        self._nodes: set[Node] = set()
        self._index = {layer.name: i for i, layer in enumerate(self.layers)}
        self._mixed = _OFF
        self._recording = False
        self._in_step = False
        self._accepted: set[int] = set()
        self._plan: MixPlan | None = None
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Hook every eligible layer, once."""
        self.detach()
        for index, layer in enumerate(self.layers):
            if layer.module is not None:
                # The hook comes last, so that it mixes what the module's user made of the output.
                self._handles.append(layer.module.register_forward_hook(_MixHook(self, index)))

    def detach(self) -> None:
        """Remove every hook. Nothing is mixed any more."""
        self.stop()
        while self._handles:
            self._handles.pop().remove()

    def start(self, plan: MixPlan) -> None:
        """Mix and record every forward pass from now on."""
        self._switch_on(plan)
        self._recording = True
        self.ran = []
        self.losses = []

    def stop(self) -> None:
        """Mix and record nothing from now on."""
        self._plan = None
        self._mixed = _OFF
        self._recording = False
        self.sources = set()
        self._nodes = set()

    def begin_backward(self, plan: MixPlan, loss: Tensor) -> None:
        """Mix without recording: activation checkpointing recomputes forward passes during the backward pass."""
        self._in_step = self._recording  # True in manual optimization, where the backward pass is a part of the step
        self.check_no_path_around(loss)
        self._switch_on(plan)
        self._recording = False

    def end_backward(self) -> None:
        """End what :meth:`begin_backward` began."""
        if self._in_step:
            self._recording = True
        else:
            self.stop()
        self._in_step = False

    def is_on(self, plan: MixPlan) -> bool:
        """Whether batches are being mixed by ``plan`` now."""
        return self._plan is plan

    @property
    def planned(self) -> str | None:
        """Name of the layer that is to be mixed, None if none is."""
        return None if self._mixed == _OFF else self.layers[self._mixed].name

    @property
    def has_mixed(self) -> bool:
        """Whether the planned layer has run since :meth:`start`."""
        return self._mixed in self.ran

    @property
    def times_mixed(self) -> int:
        """How often the planned layer has run since :meth:`start`."""
        return self.ran.count(self._mixed)

    @property
    def unreached(self) -> list[str]:
        """Names of the hooked layers that have not run since :meth:`start`."""
        return [layer.name for i, layer in enumerate(self.layers) if layer.module is not None and i not in self.ran]

    @property
    def is_first_mix(self) -> bool:
        """Whether no step at the planned layer was accepted before."""
        return self._mixed not in self._accepted

    def accept(self) -> None:
        """Note that a step at the planned layer was proved right."""
        self._accepted.add(self._mixed)

    def accept_anew(self) -> None:
        """Look closely again at the next step at each layer: what a module does may change with the epoch."""
        self._accepted.clear()

    def check_path(self, logits: Tensor) -> None:
        """Raise RuntimeError unless the batch reaches ``logits``, and through the mixed layer alone.

        Only where the graph can tell: not in a compiled region, nor where the layer ran without gradient under
        reentrant checkpointing.
        """
        if self._nodes and not find_sources(logits, self._nodes, self.sources)[0]:
            raise RuntimeError(
                f"cross_entropy got logits that do not depend on the mixed layer {self.planned!r}, so they would be "
                "unmixed beside mixed targets. Choose a layer that every loss depends on."
            )
        self.check_no_path_around(logits)

    def check_no_path_around(self, loss: Tensor) -> None:
        """Raise RuntimeError if the batch reaches ``loss`` on a path that the mixed layer is not on."""
        around = find_sources(loss, self._nodes, self.sources)[1] if self._nodes else None
        if around is not None:
            raise RuntimeError(
                f"A path from {around} to the loss leads around layer {self.planned!r}, so unmixed features would meet "
                "mixed targets. Choose a layer that everything runs through, such as the end of a residual block."
            )

    def mix_input(self, rows: Tensor) -> Tensor:
        """Mix a tensor of the batch itself, the layer ``"input"``."""
        assert self._plan is not None
        return self._followed(mix_rows(rows, self._plan.lam, self._plan.partner, self._plan.inverse))

    def record_input(self) -> None:
        """Note that the batch itself was mixed."""
        self.ran.append(self._mixed)

    def _switch_on(self, plan: MixPlan) -> None:
        self._plan = plan
        self._mixed = _OFF if plan.layer is None else self._index[plan.layer]

    def _followed(self, mixed: Tensor) -> Tensor:
        """Keep the mixed tensor's place in the graph, where the first step at a layer is looked at closely."""
        if torch.compiler.is_compiling() or not (self._recording and self.is_first_mix and torch.is_grad_enabled()):
            return mixed
        if mixed.grad_fn is None:  # nothing before it is trained: give it a place
            mixed = mixed.detach().requires_grad_().clone()
        assert mixed.grad_fn is not None
        self._nodes.add(mixed.grad_fn)
        return mixed

    def _on_output(self, index: int, output: Any) -> Any:
        if self._recording:
            self.ran.append(index)
        if self._mixed != index:
            return None
        if not isinstance(output, Tensor):
            raise TypeError(
                f"Layer {self.layers[index].name!r} returns a {type(output).__name__}; only the output of a layer that "
                "returns one tensor can be mixed. Choose a layer inside or after it."
            )
        plan = self._plan
        assert plan is not None
        try:
            return self._followed(mix_rows(output, plan.lam, plan.partner, plan.inverse))
        except (TypeError, ValueError) as error:
            raise type(error)(f"Layer {self.layers[index].name!r} cannot be mixed: {error}") from error


class _MixHook:
    """A forward hook; a class, not a closure, so that a hooked module stays picklable."""

    def __init__(self, mixer: Mixer, index: int) -> None:
        self.mixer = mixer
        self.index = index

    def __deepcopy__(self, memo: Any) -> _MixHook:
        return _MixHook(Mixer(()), 0)  # a copied module, an averaged teacher say, is never mixed

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return self.mixer._on_output(self.index, output)
