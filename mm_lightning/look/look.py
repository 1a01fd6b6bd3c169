"""One look at a training step before anything trains: where may the batch be mixed, and how is a mixed step run?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from mm_lightning.arguments import check_integer, refusal
from mm_lightning.look.flow import Flow
from mm_lightning.look.graph import Entries, Graph
from mm_lightning.look.look_failed import LookFailed
from mm_lightning.look.nodes import Call, Leaf, closure
from mm_lightning.look.place import Place
from mm_lightning.look.reordering import RowSamples, are_close, mover, order_of, tolerance_of
from mm_lightning.look.ways import Calls, Ways
from mm_lightning.look.without_trace import Watched, without_trace
from mm_lightning.mixup import INPUT, Layer, named_layers
from mm_lightning.mixup.batch import Layout, Path, guess_layout, layouts
from mm_lightning.mixup.hook import Dims
from mm_lightning.mixup.masks import MaskSite
from mm_lightning.namespaces import LightningModule
from mm_lightning.step.attach import check_compiler
from mm_lightning.step.effects import Effects
from mm_lightning.step.host import Host, OptimizerReached
from mm_lightning.step.named_losses import NamedLosses
from mm_lightning.step.run import loss_of
from mm_lightning.step.way import Way

__all__ = ["Look", "check_batch_dim"]

BatchDim = int | Mapping[str, int] | None


class Look:
    """Runs ``training_step`` without training, on the batch as it is and reordered.

    Weights, buffers, metrics, other attributes, gradients and random states are put back after each run; nothing is
    logged; optimizers and backward passes do not run.

    Args:
        module: The module. Its modes (train or eval) are left as they are.
        step: Its ``training_step``.
        args: The step's arguments, the batch first. Not changed.
        kwargs: Its keyword arguments.
        batch_dim: Dimension of layers' outputs that holds the batch, or that of some by name; else it is learned.
        batch_size: Number of rows; None tells it by the batch and what is done with it.
        named: The losses that the user named.
        agree: Whether all processes that train together say so.

    Raises:
        ValueError: If ``batch_dim`` names a layer that is not there.
        LookFailed: If the step fails.
        RuntimeError: If the module is compiled and this torch is too old.
    """

    def __init__(
        self,
        module: LightningModule,
        step: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        batch_dim: BatchDim = None,
        batch_size: int | None = None,
        named: NamedLosses | None = None,
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        check_compiler(module)
        self.module, self.step, self.args, self.kwargs = module, step, args, kwargs
        self.batch_dim, self.named, self.agree = batch_dim, named, agree
        self.host = Host(module)
        self.modules = named_layers(module)
        self.watched: dict[str, nn.Module] = {"": module}
        for name, part in self.modules.items():  # a module with two names is one
            if not any(part is other for other in self.watched.values()):
                self.watched[name] = part
        self._check_names(batch_dim)
        guess_layout(args[0], batch_size)  # a batch without rows is refused in its own words
        self._candidates = layouts(args[0], batch_size)
        sizes = {layout.rows_of(args[0]) for layout in self._candidates}
        self.flow = Flow(lambda tensors: RowSamples(tensors, sizes, is_reordered=False))
        try:
            self.losses, self.gradients = self._run_plain()
        except Exception as error:
            raise LookFailed.because_of(error, module) from error
        self.graph = Graph(self.flow)
        self.layout, self._reordered, self.reordered_losses = self._learn_rows()
        self.rows = self.layout.rows_of(args[0])

    @property
    def has_loss(self) -> bool:
        """Whether there is anything to train on."""
        return self._has_loss

    @cached_property
    def entries(self) -> Entries:
        """Where the batch enters the network."""

        def has_rows(leaf: Leaf) -> bool:
            return self.layout.dim_of(leaf.tensor, self.rows) is not None

        return self.graph.entries(has_rows)

    @property
    def input_layer(self) -> Layer:
        """The layer ``"input"``: the batch, and the embeddings of its integers."""
        return Layer(INPUT, tuple({id(call.module): call.module for call in self.entries.embeddings}.values()))

    @property
    def input_shape(self) -> tuple[int, ...] | None:
        """Shape of the first tensor that enters the network."""
        leaves = [leaf for leaf in self.flow.leaves if leaf in self._before_weights]
        return tuple(leaves[0].tensor.shape) if leaves else None

    @cached_property
    def places(self) -> dict[str, Place]:
        """Every module as a place to mix at, in the order of ``named_modules``."""
        return {
            name: Place(name, self.graph.runs_of(module), self.graph, self._problem_at)
            for name, module in self.modules.items()
        }

    def dims_of(self, layer: Layer) -> dict[nn.Module, Dims]:
        """Which dimension of each tensor that the layer's modules return holds the batch."""
        return {module: self._dims(layer.name, self.graph.runs_of(module)[0]) for module in layer.modules}

    def masks_after(self, layer: Layer) -> list[tuple[nn.Module, MaskSite]]:
        """The outermost modules that take a mask after the layer, and in which argument."""
        below = Ways(self.graph, self.nodes(layer)).below
        found: list[Call] = []
        for call in self.flow.calls:
            is_after = bool(below.intersection(call.results)) and not self._runs_in(call, layer)
            is_outermost = not any(around in found for around in call.around)
            if call.masks and is_after and is_outermost and not self._compares(call):  # a loss takes targets so
                found.append(call)
        return [(call.module, site) for call in found for site in call.masks]

    @cached_property
    def is_symmetric(self) -> bool:
        """Whether the step does not care about the order of its rows."""
        losses = self.reordered_losses
        return losses is not None and are_close(self.losses, losses, self.tolerance)

    def way_of(self, layer: Layer) -> Way:
        """How a step mixed at a layer is run, without a proof."""
        ways = Ways(self.graph, self.nodes(layer))
        calls, runs = ways.replayed()
        return self.way(layer, calls, Effects(self.outside(calls, runs)))

    def outside(self, calls: Calls, runs: Sequence[nn.Module]) -> list[nn.Module]:
        """The modules that run in the partners' half, or might: all but those that ran in what is replayed alone."""
        replayed: set[int] = set()
        for module, taken in calls:
            for call in self.graph.runs_of(module):
                if taken.numbers is None or call.number in taken.numbers:
                    replayed |= {id(inner.module) for inner in _with_inner(call)}
        kept = {id(module) for module in (self.module, *runs)}
        return [module for module in self.module.modules() if id(module) in kept or id(module) not in replayed]

    def has_targets(self, layer: Layer) -> bool:
        """Whether the loss may compare with anything of the batch."""
        return self.named is not None or self.flow.loses_values or bool(Ways(self.graph, self.nodes(layer)).targets)

    def _run_plain(self) -> tuple[list[Tensor], dict[tuple[int, int], RowSamples]]:
        losses: list[Tensor] = []

        into = self.into(losses)

        def backward(loss: Tensor, *_: Any, **__: Any) -> None:
            self.flow.end_in(loss)
            into(loss)

        with without_trace(self.host, self.args[0], backward) as writes:
            self.flow.follow(self.args[0])
            with self.flow.watching(self.watched):
                loss = self._call(self.args[0])
                if loss is not None and self.module.automatic_optimization:
                    backward(loss)
            self._written = {leaf.path for leaf in self.flow.leaves if writes.value_of(leaf.tensor) is not None}
            gradients = self._gradients_of(losses)  # before buffers are put back
        self._has_loss = bool(losses)
        return self.compared(losses), gradients

    def into(self, losses: list[Tensor]) -> Callable[..., None]:
        """Stands in for a backward pass."""

        def backward(loss: Tensor, *_: Any, **__: Any) -> None:
            losses.append(loss)
            if self.module.automatic_optimization:
                return
            for parameter in self.module.parameters():  # what follows may read gradients
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

        return backward

    def compared(self, losses: list[Tensor], of_partners: bool = False) -> list[Tensor]:
        """What a proof compares: the losses, or those that the user named."""
        compared = losses if self.named is None or not losses else self.named.values(of_partners)
        return [loss.detach() for loss in compared]

    def _gradients_of(self, losses: list[Tensor]) -> dict[tuple[int, int], RowSamples]:
        """Some rows of the losses' gradient, of what the outermost calls returned to the loss."""
        inner = {result for call, _ in self.flow.outputs for result in call.results}
        last = {parent for node in closure(self.flow.loss_nodes, inner) for parent in node.parents} | set(
            self.flow.loss_nodes
        )
        outputs = [(c, t[0]) for c, t in self.flow.outputs if len(t) == 1 and not last.isdisjoint(c.results)]
        self.flow.outputs.clear()
        outputs = [(call, tensor) for call, tensor in outputs if tensor.requires_grad]
        trained = [loss for loss in losses if loss.requires_grad]
        if not trained or not outputs:
            return {}
        total: Any = sum(trained)
        grads = torch.autograd.grad(total, [tensor for _, tensor in outputs], allow_unused=True)
        pairs = zip(outputs, grads, strict=True)
        return {
            (id(call.module), call.number): self.flow.sample([grad]) for (call, _), grad in pairs if grad is not None
        }

    def _learn_rows(self) -> tuple[Layout, dict[tuple[int, int], RowSamples], list[Tensor] | None]:
        """Reorder the batch: what changes its order with it has its rows."""
        others: list[tuple[Layout, dict[Any, RowSamples], list[Tensor] | None]] = []
        for layout in self._candidates if self.has_loss else ():
            rows = layout.rows_of(self.args[0])
            if rows < 2:
                break
            order = order_of(rows)
            flow = Flow(partial(RowSamples, sizes={rows}, is_reordered=True))
            collected: list[Tensor] = []
            losses: list[Tensor] | None = None
            # What cannot be reordered may fail: a graph, whose edges are row numbers.
            with suppress(Exception):
                with (
                    without_trace(self.host, self.args[0], self.into(collected)) as writes,
                    flow.watching(self.watched),
                ):
                    writes.move = mover(order)
                    loss = self._call(layout.permuted(self.args[0], order))
                    collected += [loss] if loss is not None and self.module.automatic_optimization else []
                losses = self.compared(collected)
            found = {(id(call.module), call.number): call.samples for call in flow.calls if call.samples is not None}
            others.append((layout, found, losses))
            is_right = losses is not None and are_close(self.losses, losses, self.tolerance)
            if self.agree(is_right and self._has_rows(found)):
                return layout, found, losses
        others.append((self._candidates[0], {}, None))
        return next((other for other in others if self._are_rows(other[0])), others[0])

    def _are_rows(self, layout: Layout) -> bool:
        """Whether all that the loss compares with has such rows, and a call returns some: nodes of graphs are none."""
        rows = layout.rows_of(self.args[0])
        compared = [leaf.tensor for leaf in self.graph.targets if leaf.tensor.dim()]
        return (
            bool(compared)
            and all(layout.dim_of(tensor, rows) is not None for tensor in compared)
            and any(rows in shape for call in self.flow.calls if call.name for shape in call.shapes)
        )

    def _has_rows(self, reordered: dict[tuple[int, int], RowSamples]) -> bool:
        """Whether a call was seen to return the rows of the reordered batch."""
        for call in self.flow.calls:
            other = reordered.get((id(call.module), call.number))
            if call.samples is None or other is None:
                continue
            if any(dim is not None for dim in call.samples.dims(other)):
                return True
        return False

    @property
    def tolerance(self) -> float:
        """How far apart equal losses may be, by their size."""
        dtypes = {p.dtype for p in self.module.parameters() if p.is_floating_point()}
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            dtypes.add(torch.bfloat16)
        return tolerance_of(*dtypes)

    def _check_names(self, batch_dim: BatchDim) -> None:
        names = batch_dim if isinstance(batch_dim, Mapping) else {}
        if unknown := next((name for name in names if name != INPUT and name not in self.modules), None):
            raise ValueError(
                f"batch_dim must name layers of {type(self.module).__name__}, got {unknown!r}. "
                "mm_lightning.inspect(module, batch) lists them."
            )

    def _dims(self, name: str, call: Call) -> Dims:
        given = self.batch_dim.get(name) if isinstance(self.batch_dim, Mapping) else self.batch_dim
        if given is not None:
            sizes = [shape[given] if len(shape) > given else None for shape in call.shapes]
            return tuple(given if size == self.rows else None for size in sizes)
        other = self._reordered.get((id(call.module), call.number))
        if call.samples is not None and other is not None:
            dims = call.samples.dims(other)
            if any(dim is not None for dim in dims):
                return dims
            if self.is_symmetric:
                return dims  # its rows are in an order of their own
        return tuple(shape.index(self.rows) if self.rows in shape else None for shape in call.shapes)

    def _problem_at(self, name: str, calls: Sequence[Call]) -> str:
        """Say why a module that was called so cannot be mixed at all; empty if it may."""
        if len(calls) != 1:
            return f"runs {len(calls)} times in training_step" if calls else "does not run in training_step"
        call = calls[0]
        numbers = [dtype.is_floating_point or dtype.is_complex for dtype in call.dtypes]
        dims = self._dims(name, call)
        if not any(dim is not None and is_number for dim, is_number in zip(dims, numbers, strict=True)):
            given = self.batch_dim.get(name) if isinstance(self.batch_dim, Mapping) else self.batch_dim
            shapes = ", ".join(map(str, call.shapes)) or "no tensor"
            if given is None and any(shape[:1] == (self.rows,) for shape in call.shapes) and any(numbers):
                return (
                    "its rows are not the batch's: training_step shuffles, sorts, samples or mixes them before, in "
                    f"{shapes}"
                )
            return f"has no floating point output with the {self.rows} rows in dimension {given or 0}: {shapes}"
        if call.results and self.graph.upstream.isdisjoint(call.results):
            return "nothing that is trained on comes from it"
        return "computes the loss: its output depends on the targets" if self._compares(call) else ""

    def _compares(self, call: Call) -> bool:
        """Whether a call depends on tensors of the batch that never meet weights before."""
        return not self._from_targets.isdisjoint(call.results)

    @cached_property
    def _from_targets(self) -> set[Any]:
        return self.graph.below(leaf for leaf in self.graph.targets if leaf not in self._before_weights)

    @cached_property
    def _before_weights(self) -> set[Any]:
        return closure(self.graph.weights)

    def _runs_in(self, call: Call, layer: Layer) -> bool:
        """Whether the layer runs inside of a call."""
        return any(call in run.around for module in layer.modules for run in self.graph.runs_of(module))

    def nodes(self, layer: Layer) -> set[Any]:
        """What a layer returned, or what of the batch the layer ``"input"`` is."""
        if layer.name == INPUT:
            return self.entries.nodes
        return {result for module in layer.modules for call in self.graph.runs_of(module) for result in call.results}

    def way(self, layer: Layer, calls: Calls, effects: Effects) -> Way:
        """How a step is run that is mixed at a layer, takes over some calls and has some effects."""
        is_input = layer.name == INPUT
        entries = tuple(call.module for call in self.entries.calls) if is_input else ()
        calls_layer = any(module in layer.modules for module, _ in calls)
        written, inputs = frozenset(self._written), self.mixed_inputs(layer)
        return Way(calls, effects, self.layout, written, inputs, entries, calls_layer)

    def mixed_inputs(self, layer: Layer) -> frozenset[Path]:
        """Paths of the batch's tensors that are mixed themselves."""
        return frozenset(leaf.path for leaf in self.entries.leaves if layer.name == INPUT)

    def targets_of(self, layer: Layer) -> tuple[Path, ...]:
        """Paths of the batch's tensors with rows that the loss compares with, past the layer."""
        found = Ways(self.graph, self.nodes(layer)).targets
        leaves = [leaf for leaf in self.flow.leaves if leaf in found and leaf not in self.entries.leaves]
        return tuple(leaf.path for leaf in leaves if self.layout.dim_of(leaf.tensor, self.rows) is not None)

    def mixed_shapes(self, layer: Layer) -> list[tuple[int, ...]]:
        """Shapes (N, ...) of the tensors that are mixed at a layer."""
        shapes = []
        if layer.name == INPUT:
            leaves = [(leaf.tensor.shape, self.layout.dim_of(leaf.tensor, self.rows)) for leaf in self.entries.leaves]
            shapes += [_rows_first(shape, dim) for shape, dim in leaves if dim is not None]
        for module in layer.modules:
            call = self.graph.runs_of(module)[0]
            name = next((name for name, part in self.modules.items() if part is module), layer.name)
            dims = zip(call.shapes, self._dims(name, call), call.dtypes, strict=True)
            shapes += [
                _rows_first(shape, dim)
                for shape, dim, dtype in dims
                if dim is not None and (dtype.is_floating_point or dtype.is_complex)
            ]
        return shapes

    def effects_of_step(self) -> Effects:
        """What a whole run of the step changes in the module.

        Raises:
            RuntimeError: If it cannot be put back.
        """
        with without_trace(self.host, self.args[0], self.into([])) as writes:
            watched = Watched(list(self.module.modules()), writes)
            started = watched.start()
            self._call(self.args[0])
            with started.put_back():
                pass
        if watched.problem:
            raise RuntimeError(f"The step cannot run a second time on the unmixed batch: {watched.problem}.")
        return watched.found

    def without_rows(self, layer: Layer) -> str:
        """Say which tensor of the batch takes part in the loss and has no row for each row; empty if none."""
        nodes = {*Ways(self.graph, self.nodes(layer)).targets, *self.entries.leaves}
        for leaf in self.flow.leaves:
            if leaf in nodes and leaf.tensor.dim() and self.layout.dim_of(leaf.tensor, self.rows) is None:
                return (
                    f"a tensor of shape {tuple(leaf.tensor.shape)} of the batch takes part in the loss, but has no row "
                    f"for each of the {self.rows} rows, so that partners cannot be found in it"
                )
        return ""

    def _call(self, batch: Any) -> Tensor | None:
        loss = None
        with suppress(OptimizerReached), self.named.half(False) if self.named is not None else nullcontext():
            loss = loss_of(self.step(batch, *self.args[1:], **self.kwargs))
        return loss


def _rows_first(shape: Sequence[int], dim: int) -> tuple[int, ...]:
    return (shape[dim], *shape[:dim], *shape[dim + 1 :])


def _with_inner(call: Call) -> Iterator[Call]:
    yield call
    for inner in call.inner:
        yield from _with_inner(inner)


def check_batch_dim(batch_dim: Any) -> None:
    """Refuse what is no dimension.

    Raises:
        TypeError: Unless it is None, an integer, or a mapping of layers' names to integers.
        ValueError: If one is negative.
    """
    if batch_dim is None:
        return
    expected = "a dimension >= 0 or a dict of layers' names to dimensions >= 0"
    is_mapping = isinstance(batch_dim, Mapping)
    if is_mapping and not all(isinstance(name, str) for name in batch_dim):
        raise refusal("batch_dim", batch_dim, expected, "None learns it.")
    for dim in batch_dim.values() if is_mapping else [batch_dim]:
        check_integer("batch_dim", dim, expected, lambda dim: dim >= 0, "None learns it.")
