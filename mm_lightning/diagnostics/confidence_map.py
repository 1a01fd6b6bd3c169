"""How confident a network is all over a plane, not only at the data: its inputs' plane, or a layer's of two units."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng
from matplotlib.figure import Figure
from torch import Tensor

from mm_lightning.arguments import check_count, check_flag, check_number
from mm_lightning.diagnostics.clouds import square_frame
from mm_lightning.diagnostics.confidence_figure import draw_confidence_maps, write_animation
from mm_lightning.diagnostics.confidence_frames import Frame, packed, stacked, unpacked
from mm_lightning.diagnostics.diagnostic import Diagnostic, Findings, Rows, SharedArguments
from mm_lightning.diagnostics.drawing import ClassNames, add_run_title, check_class_names, save_arrays
from mm_lightning.diagnostics.hidden_states import INPUT, first_floats
from mm_lightning.diagnostics.occasions import is_last_validation
from mm_lightning.diagnostics.plane import (
    Extent,
    PlaneFunction,
    PlaneMap,
    PlaneNetwork,
    evaluate_plane,
    plane_axes,
)
from mm_lightning.diagnostics.plane_numbers import plane_numbers
from mm_lightning.evaluation.modes import evaluating
from mm_lightning.namespaces import LightningModule, Trainer

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ConfidenceMap(Diagnostic):
    """Draw the predicted class probabilities over the plane of the inputs, or of a layer with two units.

    For the inputs the module is evaluated at the points of a grid. For a layer it is evaluated on one input of the
    epoch, and the layer's output is replaced by the points: the map is of the rest of the network. When it looks says
    :class:`Diagnostic`; how to read the picture says :func:`draw_confidence_map`.

    The picture of the last epoch, of ``validate``, of ``test`` and of the training data has ``resolution`` points on
    each axis; the pictures before, and the numbers that go with them, have ``frame_resolution``. All validation epochs
    have such a coarse map kept as a frame, about 30 kB, also in checkpoints, so that a resumed training has them all.
    When ``fit`` ends they are written as an animation.

    What it costs: a forward pass of as many rows as the grid has points, 90,601 for a final picture and 10,201 for
    another. What comes before ``layer`` runs on one row a batch where it can (:class:`PlaneNetwork`). Drawing takes
    about 0.2 s an epoch, and 0.1 s more for its frame when ``fit`` ends.

    ==========================================  ========================================================================
    log key                                     what it is
    ==========================================  ========================================================================
    ``confidence_map/val``, ``.../test``        image
    ``val/low_confidence``, ``test/...``        share of the grid whose top probability is below ``threshold``
    ``val/low_confidence_near_data``            the same of the grid points near data: not farther than ``band`` times
                                                the frame's longer side from a point looked at
    ``val/boundary_slope``                      mean L2 norm of the gradient of the margin, largest minus second largest
                                                logit, per unit of the plane, over the grid points near data that have
                                                another class predicted beside, above or below them; left out where
                                                there are none; planes of different scales cannot be compared
    ==========================================  ========================================================================

    ============================  ======================================================================================
    file in ``dirpath``           content
    ============================  ======================================================================================
    ``confidence_map_val.npz``    the fields of :class:`PlaneMap`
    ``confidence_map.gif``        the frames of ``fit``
    ``confidence_map_frames.npz`` the frames as :func:`.confidence_frames.stacked` returns them
    ============================  ======================================================================================

    Args:
        layer: ``"input"`` for modules of inputs (N, 2), or the dotted name of the submodule whose output is (N, 2).
        extent: Ends of the horizontal and of the vertical axis, ``((x0, x1), (y0, y1))``; None takes a square around
            the points, which changes with them.
        resolution: Grid points on each axis, both ends included, of the final pictures; 301 on [-15, 15] are 0.1 apart.
        frame_resolution: The same of the pictures during ``fit``.
        threshold: A top probability below it is low.
        band: How far from a data point is near, as a fraction of the frame's longer side: 1/30 is 1.0 where the side
            is 30.
        probabilities: Whether the module's forward returns probabilities; they are softmaxed no more.
        batch_size: Grid points per forward pass.
        class_names: Text for each class, by class index; default is the index.
        forward: Runs the module on inputs (M, ...), the batch's first floating point tensor or points in its place,
            and returns (M, K), or the logit of class 1 against class 0, (M,) or (M, 1); default is ``module(inputs)``.
        **shared: These and ``every_n_epochs``, ``max_points`` and ``name`` are those of every :class:`Diagnostic`.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If a number is outside its range.
    """

    unwritten_name = "confidence_map"

    def __init__(
        self,
        layer: str = INPUT,
        *,
        extent: Extent | None = None,
        resolution: int = 301,
        frame_resolution: int = 101,
        threshold: float = 0.9,
        band: float = 1 / 30,
        probabilities: bool = False,
        batch_size: int = 4096,
        class_names: ClassNames | None = None,
        every_n_epochs: int | None = 1,
        max_points: int = 10_000,
        name: str = unwritten_name,
        **shared: Unpack[SharedArguments],
    ) -> None:
        self._logits: Callable[[LightningModule, Tensor], Tensor] = shared.get("forward") or _logits
        shared["forward"] = self._run_batch
        super().__init__(name, [layer], every_n_epochs, max_points, **shared)
        check_count("resolution", resolution, 2, "301 is the default.")
        check_count("frame_resolution", frame_resolution, 2, "101 is the default.")
        check_count("batch_size", batch_size, 1, "4096 is the default.")
        check_number("threshold", threshold, "a number in (0, 1]", lambda share: 0 < share <= 1, "0.9 is the default.")
        check_number("band", band, "a finite number > 0", lambda width: 0 < width < math.inf, "1/30 is the default.")
        check_flag("probabilities", probabilities, "False takes the module's output for logits.")
        check_class_names(class_names)
        if extent is not None and not _is_extent(extent):
            expected = "extent must be ((x0, x1), (y0, y1)) with x0 < x1 and y0 < y1"
            raise ValueError(f"{expected}, got {extent}. None is a square around the points.")
        self.layer = layer
        self.extent = None if extent is None else _floats(extent)
        self.resolution = resolution
        self.frame_resolution = frame_resolution
        self.threshold = threshold
        self.band = band
        self.probabilities = probabilities
        self.batch_size = batch_size
        self.class_names = class_names
        self._row: Tensor | None = None  # one input
        self._frames: dict[int, Frame] = {}  # by optimizer step
        # the last validation, the training data and the test often show the same weights in the same frame
        self._evaluated: dict[tuple[int, Extent, bytes], PlaneMap] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the frames of an earlier training; those of a checkpoint are read after this."""
        if stage == TrainerFn.FITTING and trainer.global_step == 0:
            self._frames = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the frames, for a checkpoint."""
        return {"frames": dict(self._frames)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the frames of a checkpoint; those of another ``frame_resolution`` are left."""
        shape = (self.frame_resolution, self.frame_resolution)
        frames = state_dict["frames"]
        self._frames = {step: frame for step, frame in frames.items() if frame["predicted"].shape == shape}

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the hidden states of this batch beside its targets, and the epoch's first input."""
        super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        if self._states.is_open and batch_idx == dataloader_idx == 0:
            self._keep_row(batch)

    on_test_batch_end = on_validation_batch_end

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the frames, on rank zero."""
        if not self._frames or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        frames = [frame for _, frame in sorted(self._frames.items())]

        def draw(i: int) -> Figure:
            figure = self._figure(unpacked(frames[i]), f"validation set, epoch {int(frames[i]['epoch']) + 1}")
            if self.run_title:
                add_run_title(figure, self.run_title)
            return figure

        write_animation(draw, len(frames), self.folder(trainer) / f"{self.name}.gif")
        save_arrays(stacked(frames), self.folder(trainer) / f"{self.name}_frames.npz")

    def measure(self, trainer: Trainer, pl_module: LightningModule, rows: Rows) -> Findings | str:
        """Return the map and its numbers, and keep a frame of it during ``fit``."""
        points = rows.hidden[self.layer].float()
        if points.shape[1] != 2:
            raise ValueError(f"Layer {self.layer!r} must have 2 units to be a plane, got {points.shape[1]}.")
        extent = self.extent or _around(points)
        is_frame = rows.split == "val" and trainer.state.fn == TrainerFn.FITTING
        with self._plane(trainer, pl_module) as logits_at:

            def evaluate(resolution: int) -> PlaneMap:
                key = (resolution, extent, _digest(pl_module, None if self.layer == INPUT else self._row))
                if key not in self._evaluated:
                    x, y = plane_axes(extent, resolution)
                    known = evaluate_plane(logits_at, x, y, points, rows.targets, self.batch_size)
                    self._evaluated = {key: known}
                return self._evaluated[key]._replace(points=points.numpy(), targets=rows.targets.numpy())

            found = evaluate(self.frame_resolution if is_frame else self.resolution)
            if is_frame and _is_finite(found):
                self._frames[trainer.global_step] = packed(found, trainer.current_epoch)
            if is_frame and is_last_validation(trainer):
                found = evaluate(self.resolution)
            if not _is_finite(found):
                return "the logits are not finite all over the plane"
            numbers = plane_numbers(found, logits_at, self.threshold, self.band, self.batch_size)
        return Findings(numbers, found.to_arrays())

    def draw(self, findings: Findings, rows: Rows) -> Figure:
        """Draw the map, with the numbers below it."""
        return self._figure(PlaneMap.from_arrays(findings.arrays), rows.occasion, findings.numbers)

    def _figure(self, found: PlaneMap, occasion: str, numbers: dict[str, float] | None = None) -> Figure:
        axis_names = ("x", "y") if self.layer == INPUT else ("hidden unit 1", "hidden unit 2")
        captions = {
            "low_confidence": (f"confidence < {self.threshold:g}", "{:.0%}"),
            "low_confidence_near_data": ("… near the data", "{:.0%}"),
            "boundary_slope": ("boundary slope", "{:.2f}"),
        }
        numbers = numbers or {}
        texts = {label: text.format(numbers[key]) for key, (label, text) in captions.items() if key in numbers}
        where = "the inputs" if self.layer == INPUT else f"layer {self.layer!r}"
        heading = f"Confidence in the plane of {where}"
        return draw_confidence_maps(
            [found], [occasion], heading, axis_names, self.class_names, [texts] if texts else None
        )

    @contextmanager
    def _plane(self, trainer: Trainer, module: LightningModule) -> Iterator[PlaneFunction]:
        replaced = None if self.layer == INPUT else self._states.find(module)[self.layer]
        # one input for all processes: what passes by the layer, and what is known already, must be the same for all
        row = self._row = trainer.strategy.broadcast(self._row)
        assert row is not None  # measure follows a batch
        # not in inference mode, which Lightning evaluates in: the boundary's slope needs gradients
        with isolate_rng(), evaluating(module), torch.inference_mode(False), torch.no_grad():
            network = PlaneNetwork(
                module, self._logits, row.to(module.device), self.layer, replaced, self.probabilities
            )

            def logits_at(points: Tensor) -> Tensor:
                with trainer.precision_plugin.forward_context():
                    return network(points)

            yield logits_at

    def _keep_row(self, batch: Any) -> Tensor:
        inputs = first_floats(batch)
        if inputs is None:
            raise RuntimeError("The batch holds no floating point tensor to run the module on.")
        self._row = inputs[0].detach().to("cpu", copy=True)  # the loader may use its memory again
        return inputs

    def _run_batch(self, module: LightningModule, batch: Any) -> Any:
        return self._logits(module, self._keep_row(batch))


def _logits(module: LightningModule, inputs: Tensor) -> Any:
    return module(inputs)


def _is_extent(extent: Any) -> bool:
    try:
        return all(-math.inf < low < high < math.inf for low, high in _floats(extent))
    except (TypeError, ValueError):
        return False


def _floats(extent: Extent) -> Extent:
    (x0, x1), (y0, y1) = extent
    return (float(x0), float(x1)), (float(y0), float(y1))


def _is_finite(found: PlaneMap) -> bool:
    return bool(np.isfinite(found.confidence).all())


def _digest(module: LightningModule, row: Tensor | None) -> bytes:
    """Tell weights apart, and rows; to be called by every process, for each gets the whole of sharded weights."""
    digest = hashlib.sha256()
    for tensor in (*module.parameters(), *module.buffers(), *([] if row is None else [row])):
        tensor = gather() if (gather := getattr(tensor, "full_tensor", None)) else tensor  # of a DTensor
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def _around(points: Tensor) -> Extent:
    low, high = square_frame(points)
    return (float(low[0]), float(high[0])), (float(low[1]), float(high[1]))
