"""The hooks that mix inside a forward pass, the switch they read, and the record that proves what they did."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from mm_lightning.mixup.graph import find_sources
from mm_lightning.mixup.interpolation import mix_rows
from mm_lightning.mixup.layers import Layer
from mm_lightning.mixup.masks import MaskSite, UnionHook
from mm_lightning.mixup.plan import MixPlan
from mm_lightning.mixup.trace import Trace
from mm_lightning.mixup.trees import map_tensors

__all__ = ["Mixer"]

_OFF = -1
_WATCHED_STEPS = 2


class Mixer:
    """Mixes the output of the planned layer while it is on, and records what became of the plan.

    The plan decides, never the number of calls: a recomputed forward pass (activation checkpointing) repeats the mix.
    Each hook reads plain attributes of its own only, so it traces into a compiled graph if attached before its first
    call, and causes no more graphs than there are plans to tell apart.

    Args:
        layers: The eligible layers, S.
        batch_dim: Dimension of the layers' outputs that holds the batch; or that of some layers, by name.
        tolerated: Names of layers at which the user wants to mix although a path leads around them.
        masks: For each layer's name the arguments of later modules that take masks, with the modules.
        is_explicit: Whether the user has named the losses to mix, so that others are left alone.

    Attributes:
        losses: Names of the functions in which mixed targets met the hidden state since :meth:`start`, in order.
        is_verified: Whether the loss was proved to be followed, so that numbers read from targets are no part of it.
        is_in_named_loss: Whether a loss that the user named is being evaluated.
        measures: Whether to measure the next step's cross-entropy, because it will be logged.
        measured: Accuracy on the mixed targets and their entropy, scalars by name.
        reads: Names of the functions that took class indices out of tensors.
        sources: Autograd nodes that tensors of the batch came from, for :meth:`check_path`.
        trace: Where the batch's inputs entered the graph, for :meth:`check_path`; None if they are not followed.
        looked_up: Autograd nodes of embeddings of targets, such as class centres.
        pairs: The targets that know their partners', which end with the step.
        written: Memory of tensors that targets were written into; views made before know nothing of it.
        held: Those that were made in a compiled region, where there are no weak references.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        batch_dim: int | Mapping[str, int] = 0,
        tolerated: Collection[str] = (),
        masks: Mapping[str, Sequence[tuple[nn.Module, MaskSite]]] | None = None,
        is_explicit: bool = False,
    ) -> None:
        self.layers = tuple(layers)
        self.tolerated = frozenset(tolerated)
        self.is_explicit = is_explicit
        self.masks = dict(masks or {})
        self.losses: list[str] = []
        self.reads: set[str] = set()
        self.is_verified = False
        self.is_in_named_loss = False
        self.measures = False
        self.measured: dict[str, Tensor] = {}
        self.sources: set[Node] = set()
        self.trace: Trace | None = None
        self.looked_up: set[Node] = set()
        self.pairs: list[weakref.ref[Any]] = []
        self.held: list[Any] = []
        self.written: set[int | None] = set()
        dims = [batch_dim if isinstance(batch_dim, int) else batch_dim.get(layer.name, 0) for layer in self.layers]
        self._hooks = [
            [_MixHook(layer.name, dim) for _ in layer.modules] for layer, dim in zip(self.layers, dims, strict=True)
        ]
        self._all_hooks = [hook for hooks in self._hooks for hook in hooks]
        self._mask_hooks: list[UnionHook] = []
        self._input_runs = 0
        self._nodes: set[Node] = set()
        self._index = {layer.name: i for i, layer in enumerate(self.layers)}
        self._mixed = _OFF
        self._recording = False
        self._following = False
        self._in_step = False
        self._accepted: Counter[int] = Counter()
        self._plan: MixPlan | None = None
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Hook every eligible layer, once."""
        self.detach()
        for layer, hooks in zip(self.layers, self._hooks, strict=True):
            for module, hook in zip(layer.modules, hooks, strict=True):
                # The hook comes last, so that it mixes what the module's user made of the output.
                self._handles.append(module.register_forward_hook(hook))
        for module, sites in self._mask_sites().items():
            self._mask_hooks.append(UnionHook(sites))
            self._handles.append(module.register_forward_pre_hook(self._mask_hooks[-1], with_kwargs=True))

    def _mask_sites(self) -> dict[nn.Module, dict[int, list[MaskSite]]]:
        found: dict[nn.Module, dict[int, list[MaskSite]]] = {}
        for name, sites in self.masks.items():
            for module, site in sites:
                found.setdefault(module, {}).setdefault(self._index[name], []).append(site)
        return found

    def detach(self) -> None:
        """Remove every hook. Nothing is mixed any more."""
        self.stop()
        while self._handles:
            self._handles.pop().remove()
        self._mask_hooks.clear()

    def start(self, plan: MixPlan, *, followed: bool = True) -> None:
        """Mix and record every forward pass from now on.

        Args:
            plan: A plan for one of the layers.
            followed: Whether to keep the mixed tensors' places in the autograd graph while the layer is watched.
        """
        self.retire()
        self._switch_on(plan, records=True)
        self._following = followed and self.is_watched
        self._input_runs = 0
        for hook in self._all_hooks:
            hook.runs = 0
            hook.follower = self if self._following else None
        self.losses = []
        self.measured = {}

    def rehearse(self, plan: MixPlan) -> None:
        """Do as after :meth:`start`, but leave hidden states as they are."""
        self.start(plan, followed=False)
        for hook in self._all_hooks:
            hook.plan = None
        for mask_hook in self._mask_hooks:
            mask_hook.plan = None
        if not self.layers[self._mixed].modules:
            self.record_input()

    def stop(self, *, keeps_targets: bool = False) -> None:
        """Mix and record nothing from now on.

        Args:
            keeps_targets: Whether targets go on knowing their partners', for a backward pass that recomputes losses.
        """
        if not keeps_targets:
            self.retire()
        self._plan = None
        self._mixed = _OFF
        self._recording = self._following = False
        for hook in self._all_hooks:
            hook.plan = hook.follower = None
            hook.recording = False
        for mask_hook in self._mask_hooks:
            mask_hook.plan = None
        if self.trace is not None:
            self.trace.close()
        self.trace = None
        self.sources = set()
        self.looked_up = set()
        self._nodes = set()

    def retire(self) -> None:
        """Make plain tensors of what is left of the step's targets that know their partners'."""
        for reference in self.pairs:
            pair = reference()
            if pair is not None and type(pair) is not Tensor:
                pair.retire()
        self.pairs.clear()
        for pair in self.held:
            if type(pair) is not Tensor:
                pair.retire()
        self.held.clear()
        self.written.clear()

    def begin_backward(self, plan: MixPlan, loss: Tensor) -> None:
        """Mix without recording: activation checkpointing recomputes forward passes during the backward pass."""
        self._in_step = self._recording  # True in manual optimization, where the backward pass is a part of the step
        self.check_no_path_around(loss)
        self._switch_on(plan, records=False)

    def end_backward(self) -> None:
        """End what :meth:`begin_backward` began."""
        if self._in_step:
            self._recording = True
            for hook in self._all_hooks:
                hook.recording = True
        else:
            self.stop()
        self._in_step = False

    @property
    def ran(self) -> list[int]:
        """Indices into ``layers`` of those that ran since :meth:`start`, one for each run."""
        inputs = [self._mixed] * self._input_runs
        return inputs + [i for i, hooks in enumerate(self._hooks) for hook in hooks for _ in range(hook.runs)]

    @property
    def planned(self) -> str | None:
        """Name of the layer that is to be mixed, None if none is."""
        return None if self._mixed == _OFF else self.layers[self._mixed].name

    @property
    def has_mixed(self) -> bool:
        """Whether the planned layer has run since :meth:`start`."""
        return self.times_mixed > 0

    @property
    def times_mixed(self) -> int:
        """How often the planned layer has run since :meth:`start`."""
        if self._mixed == _OFF:
            return 0
        return self._input_runs + sum([hook.runs for hook in self._hooks[self._mixed]])

    @property
    def times_expected(self) -> int:
        """How often the planned layer runs in one forward pass: at each of its modules, and in the batch itself."""
        return len(self.layers[self._mixed].modules) + (self._input_runs > 0)

    @property
    def unreached(self) -> list[str]:
        """Names of the hooked layers that have not run since :meth:`start`."""
        return [
            layer.name
            for layer, hooks in zip(self.layers, self._hooks, strict=True)
            if hooks and not any(hook.runs for hook in hooks)
        ]

    @property
    def is_watched(self) -> bool:
        """Whether the step is looked at closely: the first two at each layer, as one may use what the other kept."""
        return self._accepted[self._mixed] < _WATCHED_STEPS

    def accept(self) -> None:
        """Note that a step at the planned layer was proved right."""
        self._accepted[self._mixed] += 1

    def accept_anew(self) -> None:
        """Look closely again at the next steps at each layer: what a module does may change with the epoch."""
        self._accepted.clear()

    def check_path(self, hidden: Tensor, consumer: str) -> None:
        """Raise RuntimeError if mixed targets meet a tensor to which the batch comes past the mixed layer alone.

        Only where the graph can tell: not in a compiled region, nor where the layer ran without gradient under
        reentrant checkpointing.
        """
        if not self._nodes:
            return
        meets_mix, around = find_sources(hidden, self._nodes, self._sources(), self.looked_up)
        if around is not None and not meets_mix:
            raise RuntimeError(
                f"'{consumer}' compares the batch's targets with a result that does not depend on the mixed layer "
                f"{self.planned!r}, so unmixed features would meet mixed targets. Choose layers that every loss "
                "depends on; mm_lightning.inspect(module, batch) lists them."
            )

    def check_no_path_around(self, loss: Tensor) -> None:
        """Raise RuntimeError if the batch reaches ``loss`` on a path that the mixed layer is not on."""
        if not self._nodes or self.planned in self.tolerated:
            return
        around = find_sources(loss, self._nodes, self._sources(), self.looked_up)[1]
        if around is not None:
            raise RuntimeError(
                f"A path from {around} to the loss leads around layer {self.planned!r}, so unmixed features would meet "
                "mixed targets. Choose a layer that everything runs through, such as the end of a residual block; "
                "mm_lightning.inspect(module, batch) lists them."
            )

    def _sources(self) -> set[Any]:
        entries = [] if self.trace is None else self.trace.entries
        return self.sources | {entry.node for entry in entries if entry.is_value}

    def mix_input(self, rows: Tensor) -> Tensor:
        """Mix a tensor of the batch itself, the layer ``"input"``. Integers are mixed after their embedding."""
        assert self._plan is not None
        if not rows.is_floating_point():
            return rows
        return self.follow(mix_rows(rows, self._plan))

    def record_input(self) -> None:
        """Note that the batch itself was mixed."""
        self._input_runs += 1

    def follow(self, mixed: Tensor) -> Tensor:
        """Keep the mixed tensor's place in the graph, where the first steps at a layer are looked at closely."""
        if not (self._recording and self._following and torch.is_grad_enabled()):
            return mixed
        if mixed.grad_fn is None:  # nothing before it is trained: give it a place
            mixed = mixed.detach().requires_grad_().clone()
        assert mixed.grad_fn is not None
        self._nodes.add(mixed.grad_fn)
        return mixed

    def _switch_on(self, plan: MixPlan, *, records: bool) -> None:
        self._plan = plan
        self._mixed = _OFF if plan.layer is None else self._index[plan.layer]
        self._recording = records
        for hook in self._all_hooks:
            hook.recording = records
            hook.plan = None
        for hook in self._hooks[self._mixed] if self._mixed != _OFF else ():
            hook.plan = plan
        for mask_hook in self._mask_hooks:
            mask_hook.switch_on(self._mixed, plan)


class _MixHook:
    """The forward hook of one layer; a class, not a closure, so that a hooked module stays picklable.

    Attributes:
        plan: What to mix by; None if another layer is planned, or none.
        recording: Whether to count the runs.
        runs: How often the layer has run.
        follower: Told of the mixed tensor while the layer is watched.
    """

    def __init__(self, name: str, batch_dim: int = 0) -> None:
        self.name = name
        self.batch_dim = batch_dim
        self.plan: MixPlan | None = None
        self.recording = False
        self.runs = 0
        self.follower: Mixer | None = None

    def __deepcopy__(self, memo: Any) -> _MixHook:
        return _MixHook(self.name)  # a copied module, an averaged teacher say, is never mixed

    def __reduce__(self) -> Any:
        return _MixHook, (self.name,)  # nor is a loaded one

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.recording:
            self.runs += 1
        plan = self.plan
        if plan is None or not (self.recording or torch.is_grad_enabled()):
            return None  # around the backward pass only what is recomputed for it is mixed
        if isinstance(output, Tensor):
            if self._is_batch(output, plan):
                return self._mix(output, plan)
        else:
            found: list[Tensor] = []

            def mix_if_batch(tensor: Tensor) -> Tensor:
                if not self._is_batch(tensor, plan):
                    return tensor
                found.append(tensor)
                return self._mix(tensor, plan)

            mixed = map_tensors(mix_if_batch, output)
            if found:
                return mixed
        raise self._refusal(output, plan)

    def _is_batch(self, tensor: Tensor, plan: MixPlan) -> bool:
        dim = self.batch_dim
        return tensor.is_floating_point() and tensor.dim() > dim and tensor.shape[dim] == plan.batch_size

    def _mix(self, hidden: Tensor, plan: MixPlan) -> Tensor:
        hidden = getattr(hidden, "value", hidden)  # of targets that are the input, too
        if self.batch_dim == 0:
            mixed = mix_rows(hidden, plan)
        else:
            rows = mix_rows(hidden.movedim(self.batch_dim, 0), plan)
            mixed = rows.movedim(0, self.batch_dim)
        if torch.compiler.is_compiling() or self.follower is None:
            return mixed
        return self.follower.follow(mixed)

    def _refusal(self, output: Any, plan: MixPlan) -> Exception:
        if isinstance(output, Tensor):
            what = f"the output has shape {tuple(output.shape)} and type {output.dtype}"
        else:
            what = f"no tensor of its {type(output).__name__} is that"
        return ValueError(
            f"Layer {self.name!r} cannot be mixed: the batch of {plan.batch_size} rows must be in dimension "
            f"{self.batch_dim} of a floating point output, but {what}. Choose another layer, or name the dimension "
            "with batch_dim."
        )
