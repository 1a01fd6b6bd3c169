import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from mm_lightning.diagnostics import ConfidenceMap
from mm_lightning.diagnostics.confidence_figure import (
    TINTS,
    class_colours,
    draw_confidence_map,
    draw_confidence_maps,
    write_animation,
)
from mm_lightning.diagnostics.confidence_frames import packed, stacked, unpacked
from mm_lightning.diagnostics.drawing import PALETTE
from mm_lightning.diagnostics.plane import (
    PlaneMap,
    PlaneNetwork,
    evaluate_plane,
    grid_points,
    plane_axes,
)
from mm_lightning.diagnostics.plane_numbers import (
    at_boundary,
    low_confidence,
    margin_slopes,
    near_points,
    p_class1,
    plane_numbers,
)
from mm_lightning.evaluation.rows import class_logits

EXTENT = ((-3.0, 3.0), (-2.0, 2.0))


# compute


def test_grid_holds_both_ends_and_goes_row_by_row():
    x, y = plane_axes(((0, 2), (5, 6)), 3)
    want = [[0, 5], [1, 5], [2, 5], [0, 5.5], [1, 5.5], [2, 5.5], [0, 6], [1, 6], [2, 6]]
    assert grid_points(x, y).tolist() == want
    assert_close(plane_axes(((-15, 15), (0, 1)), 301)[0].diff(), torch.full((300,), 0.1, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(5,), (5, 1)], ids=["N", "N, 1"])
def test_one_logit_is_that_of_class_1(shape: tuple[int, ...]):
    outputs = torch.linspace(-3, 3, 5).reshape(shape)
    assert_close(class_logits(outputs, 5).softmax(dim=1)[:, 1], outputs.reshape(5).sigmoid())
    got = class_logits(outputs.sigmoid(), 5, probabilities=True)
    assert_close(got.softmax(dim=1)[:, 1], outputs.reshape(5).sigmoid())


def test_probabilities_are_softmaxed_no_more():
    outputs = torch.tensor([[0.7, 0.2, 0.1], [1.0, 0.0, 0.0]])
    assert_close(class_logits(outputs, 2, probabilities=True).softmax(dim=1), outputs)
    assert not torch.allclose(class_logits(outputs, 2).softmax(dim=1), outputs, atol=0.1)


@pytest.mark.parametrize(("dtype", "want"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)], ids=str)
def test_logits_are_float32_or_better(dtype: torch.dtype, want: torch.dtype):
    assert class_logits(torch.zeros(4, 3, dtype=dtype), 4).dtype == want


@pytest.mark.parametrize(
    ("outputs", "probabilities", "error", "message"),
    [
        (torch.zeros(3, 4), False, ValueError, r"logits \(2, K\) for 2 inputs, got shape \(3, 4\)"),
        (torch.zeros(2, 4, 1), False, ValueError, r"got shape \(2, 4, 1\)"),
        (torch.zeros(2, 4).long(), False, TypeError, "floating point tensor, got torch.int64"),
        ({"logits": torch.zeros(2, 4)}, False, TypeError, "floating point tensor, got dict"),
        (torch.tensor([[1.5, -0.5], [1, 0]]), True, ValueError, r"got -0\.5 and a sum 0 away"),
        (torch.tensor([[0.7, 0.2], [1, 0]]), True, ValueError, r"got 0 and a sum 0\.1 away from 1"),
        (torch.tensor([0.5, 1.5]), True, ValueError, r"got -0\.5 and"),
    ],
    ids=["rows", "axes", "integers", "dict", "negative", "sum", "one above 1"],
)
def test_outputs_that_are_no_logits(outputs: Any, probabilities: bool, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        class_logits(outputs, 2, probabilities)


def _linear(weight: list[list[float]]) -> nn.Linear:
    layer = nn.Linear(2, len(weight)).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.zero_()
    return layer


def _map(logits_at: Any, resolution: int = 31, batch_size: int = 7, points: torch.Tensor | None = None) -> PlaneMap:
    points = torch.tensor([[0.0, 0.0], [1.0, 1.0]]) if points is None else points
    targets = torch.arange(len(points)) % 2
    return evaluate_plane(logits_at, *plane_axes(((-15, 15), (-15, 15)), resolution), points, targets, batch_size)


def test_map_of_a_linear_network_at_points_by_hand():
    # logits x, y and 0
    found = _map(_linear([[1, 0], [0, 1], [0, 0]]))
    assert (found.x[0], found.x[-1], found.num_classes) == (-15, 15, 3)
    assert (found.confidence.dtype, found.predicted.dtype, found.confidence.shape) == (np.float32, np.int16, (31, 31))
    for x, y in ((-3, 2), (4, -1), (-5, -6), (-15, 15)):
        want = torch.tensor([x, y, 0.0]).softmax(dim=0)
        row, column = y + 15, x + 15
        assert found.confidence[row, column] == pytest.approx(want.max().item(), rel=1e-6)
        assert found.predicted[row, column] == want.argmax()


def test_low_confidence_of_a_linear_network():
    # p(class 1) = sigmoid(x): below 0.9 where |x| < ln 9 = 2.197, in 43 of 301 columns
    logits_at = _linear([[0, 0], [1, 0]])
    found = _map(logits_at, 301, 4096, points=torch.tensor([[2.03, 0.02]], dtype=torch.float64))
    assert low_confidence(found.confidence, 0.9) == pytest.approx(43 / 301)
    numbers = plane_numbers(found, logits_at, threshold=0.9, band=1 / 30, batch_size=4096)
    assert numbers["low_confidence"] == pytest.approx(43 / 301)
    tenths = range(-150, 151)
    near = [i / 10 for i in tenths for j in tenths if math.hypot(i / 10 - 2.03, j / 10 - 0.02) <= 1]
    low = sum(abs(x) < math.log(9) for x in near)
    assert 0 < low < len(near)
    assert numbers["low_confidence_near_data"] == pytest.approx(low / len(near))
    assert "boundary_slope" not in numbers  # the boundary is 2 away, further than 1


def test_numbers_without_data_in_sight_are_left_out():
    logits_at = _linear([[0, 0], [1, 0]])
    found = _map(logits_at, points=torch.tensor([[40.0, 0.0]]))
    assert set(plane_numbers(found, logits_at, threshold=0.9, band=1 / 30, batch_size=64)) == {"low_confidence"}


def test_threshold_itself_is_not_low():
    assert low_confidence(np.array([[0.5, 0.75], [0.875, 1.0]]), 0.75) == 0.25


def test_near_is_a_disc_with_its_edge():
    axis = np.arange(5.0)
    got = near_points(axis, axis, np.array([[2.0, 1.0]]), 1.0)
    want = np.zeros((5, 5), dtype=bool)
    want[[0, 1, 1, 1, 2], [2, 1, 2, 3, 2]] = True
    assert_close(got, want)


@pytest.mark.parametrize("radius", [0.01, 0.4, 3.0, 30.0])
def test_near_agrees_with_all_distances(radius: float):
    x, y = (axis.numpy() for axis in (plane_axes(((-2, 3), (0, 1)), 23)))
    points = 2 * torch.randn(60, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points[:2] = torch.tensor([[1e12, 0.0], [-2.3, -0.1]])
    grid = grid_points(torch.tensor(x), torch.tensor(y))
    want = torch.cdist(grid, points, compute_mode="donot_use_mm_for_euclid_dist").amin(dim=1) <= radius
    assert_close(near_points(x, y, points.numpy(), radius), want.reshape(23, 23).numpy())


def test_boundary_by_hand():
    predicted = np.array([[0, 0, 1], [0, 0, 1], [0, 0, 0], [2, 2, 2]])
    want = np.array([[0, 1, 1], [0, 1, 1], [1, 1, 1], [1, 1, 1]], dtype=bool)
    assert_close(at_boundary(predicted), want)
    assert not at_boundary(np.ones((3, 3))).any()


@pytest.mark.parametrize(
    ("weight", "want"),
    [([[1, 2], [4, -2]], 5.0), ([[1, 2], [4, -2], [0, 0]], None), ([[3, -4]], 5.0)],
    ids=["two classes", "three classes", "one logit"],
)
def test_slope_of_a_linear_network_is_the_weights_distance(weight: list[list[float]], want: float | None):
    layer = _linear(weight)
    points = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = margin_slopes(lambda part: class_logits(layer(part), len(part)), points, batch_size=3)
    if want is None:
        order = (points @ layer.weight.T).argsort(dim=1, descending=True)
        want_each = (layer.weight[order[:, 0]] - layer.weight[order[:, 1]]).norm(dim=1).detach()
        assert len(want_each.unique()) > 1
    else:
        want_each = torch.full((20,), want, dtype=torch.float64)
    assert_close(got, want_each)
    assert layer.weight.grad is None


def test_boundary_slope_is_taken_near_data_at_the_boundary():
    # the margin is |x (1 + y / 30)|; at the two columns beside x = 0.05 it is steeper where y is larger
    def logits_at(points: torch.Tensor) -> torch.Tensor:
        margin = (points[:, 0] - 0.05) * (1 + points[:, 1] / 30)
        return torch.stack([torch.zeros_like(margin), margin], dim=1)

    found = _map(logits_at, 301, 4096, points=torch.tensor([[0.05, 10.0], [10.0, 0.0]]))
    got = plane_numbers(found, logits_at, threshold=0.9, band=1 / 30, batch_size=5)["boundary_slope"]
    want = [
        math.hypot(1 + y / 30, (x - 0.05) / 30)
        for x in (0.0, 0.1)
        for y in np.linspace(-15, 15, 301)
        if math.hypot(x - 0.05, y - 10) <= 1
    ]
    assert got == pytest.approx(np.mean(want), rel=1e-9)


def test_p_class1():
    assert_close(p_class1(np.array([0.75, 1.0, 0.625]), np.array([1, 0, 0])), np.array([0.75, 0.0, 0.375]))


# frames


@pytest.mark.parametrize("classes", [2, 3, 300])
def test_frames_round_to_a_byte(classes: int):
    rng = np.random.default_rng(0)
    confidence = rng.uniform(1 / classes, 1, (4, 5)).astype(np.float32)
    confidence[0, :2] = 1 / classes, 1
    predicted = rng.integers(classes, size=(4, 5)).astype(np.int16)
    predicted[0, 0] = classes - 1
    points, targets = np.zeros((1200, 2), dtype=np.float32), np.arange(1200)
    found = PlaneMap(np.arange(5.0), np.arange(4.0), confidence, predicted, classes, points, targets)
    frame = packed(found, epoch=3)
    assert frame["confidence"].dtype == torch.uint8
    assert (frame["confidence"][0, 0], frame["confidence"][0, 1], frame["epoch"]) == (0, 255, 3)
    again = unpacked(frame)
    assert_close(again.confidence, confidence, rtol=0, atol=0.5 / 255 + 1e-6)
    assert_close(again.predicted, predicted)
    assert again.num_classes == classes
    assert again.targets.tolist() == list(range(0, 1200, 2))  # at most 1,000, from all over
    fewer = packed(found._replace(points=points[:7], targets=targets[:7]), epoch=4)
    arrays = stacked([frame, fewer])
    assert {name: array.shape for name, array in arrays.items()} == {
        "epochs": (2,), "num_classes": (), "x": (2, 5), "y": (2, 4), "confidence": (2, 4, 5), "predicted": (2, 4, 5),
        "points": (2, 7, 2), "targets": (2, 7),
    }  # fmt: skip
    assert arrays["epochs"].tolist() == [3, 4]


# draw


def _found(classes: int = 2, x: tuple[float, float] = (-2, 2)) -> PlaneMap:
    layer = _linear([[math.cos(k), math.sin(3 * k)] for k in range(classes)])
    points = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    axes = plane_axes((x, (-1, 3)), 21)
    return evaluate_plane(layer, *axes, points, torch.arange(40) % classes, 1000)


def test_two_classes_are_drawn_as_the_probability_of_class_1():
    found = _found()
    axes = Figure().add_subplot()
    draw_confidence_map(axes, found)
    (image,) = axes.images
    assert image.get_clim() == (0, 1)
    assert image.cmap(0.5) == pytest.approx((1, 1, 1, 1), abs=0.01)
    assert_close(np.array([image.cmap(0.0)[:3], image.cmap(1.0)[:3]]), TINTS[:2])
    assert_close(np.asarray(image.get_array()), p_class1(found.confidence, found.predicted))
    # 20 steps of 0.2: the first pixel's middle is the first grid point
    assert image.get_extent() == pytest.approx((-2.1, 2.1, -1.1, 3.1))
    assert image.origin == "lower"
    assert axes.get_aspect() == 1
    assert (axes.get_xlim(), axes.get_ylim()) == ((-2, 2), (-1, 3))
    dots = next(c for c in axes.collections if isinstance(c, PathCollection))
    assert_close(np.sort(np.asarray(dots.get_offsets()), axis=0), np.sort(found.points, axis=0), check_dtype=False)
    assert len({tuple(colour) for colour in dots.get_facecolor()}) == 2
    line = next(c for c in axes.collections if not isinstance(c, PathCollection))
    weight = np.array([math.cos(1) - 1, math.sin(3)])
    assert_close(line.get_paths()[0].vertices @ weight, np.zeros(len(line.get_paths()[0].vertices)), atol=1e-3, rtol=0)


def test_many_classes_have_their_hue_as_far_as_they_are_confident():
    colours = class_colours(np.array([[1 / 3, 2 / 3, 1.0]]), np.array([[2, 2, 2]]), 3)
    assert_close(TINTS[2], (1 + 4 * np.array(to_rgb(PALETTE[2]))) / 5)
    assert_close(colours[0], np.stack([np.ones(3), (1 + TINTS[2]) / 2, TINTS[2]]))
    found = _found(classes=4)
    axes = Figure().add_subplot()
    draw_confidence_map(axes, found, class_names=["a", "b", "c", "d"])
    assert_close(np.asarray(axes.images[0].get_array()), class_colours(found.confidence, found.predicted, 4))
    assert [text.get_text() for text in axes.texts] == ["a", "b", "c", "d"]


@pytest.mark.parametrize("classes", [2, 4])
def test_panels_share_axes_and_key(classes: int):
    maps = [_found(classes), _found(classes, x=(-1, 5))]
    numbers = [{"low": "1"}, {"low": "2"}]
    figure = draw_confidence_maps(maps, ["left", "right"], "heading", ("u", "v"), ["zero", "one", *"cd"], numbers)
    left, right, key = figure.axes
    assert left.get_xlim() == right.get_xlim() == (-2, 5)
    assert left.get_ylim() == right.get_ylim() == (-1, 3)
    assert (left.get_aspect(), right.get_aspect()) == (1, 1)
    assert (left.get_title("left"), right.get_title("left"), left.get_title("right")) == ("left", "right", "40 points")
    assert (left.get_xlabel(), left.get_ylabel(), right.get_ylabel()) == ("u", "v", "")
    assert [text.get_text() for text in figure.texts] == ["heading"]
    for axes, number in ((left, "1"), (right, "2")):
        assert [text.get_text() for text in axes.texts][-2:] == [number, "low"]
    if classes == 2:
        assert key.get_ylim() == (0, 1)
        assert key.get_ylabel() == "probability of class one"
    else:
        assert [label.get_text() for label in key.get_yticklabels()] == ["zero", "one", "c", "d"]


def test_maps_of_different_classes_have_no_common_key():
    with pytest.raises(ValueError, match=r"same classes, got \[2, 3\]"):
        draw_confidence_maps([_found(2), _found(3)], ["", ""], "")
    with pytest.raises(ValueError, match=r"got \[\]"):
        draw_confidence_maps([], [], "")


def test_maps_of_one_class_have_no_lines(recwarn: pytest.WarningsRecorder):
    found = _found()
    found = found._replace(predicted=np.zeros_like(found.predicted), targets=np.zeros_like(found.targets))
    axes = Figure().add_subplot()
    draw_confidence_map(axes, found)
    assert [type(c) for c in axes.collections] == [PathCollection]


def test_failed_animation_leaves_the_older_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "new" / "map.gif"
    write_animation(lambda i: draw_confidence_maps([_found()], ["ab"[i]], ""), 2, path)
    older = path.read_bytes()

    def fill_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fill_disk)
    with pytest.raises(OSError, match="No space left"):
        write_animation(lambda i: draw_confidence_maps([_found()], ["c"], ""), 1, path)
    assert path.read_bytes() == older
    assert [file.name for file in path.parent.iterdir()] == ["map.gif"]


# callback


class _Net(LightningModule):
    def __init__(self, body: nn.Module, learning_rate: float = 0.05) -> None:
        super().__init__()
        self.body = body
        self.learning_rate = learning_rate

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.body(inputs)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self(batch[0])

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


def _seeded(make: Any) -> _Net:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return _Net(make())


class _Draw(nn.Module):
    """The identity, which draws a random number in evaluation too."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + 0 * torch.rand(())


def _flat(classes: int = 2) -> _Net:
    return _seeded(lambda: nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, classes), _Draw()))


def _bottleneck(classes: int = 3, width: int = 2) -> _Net:
    def make() -> nn.Module:
        front = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, width))
        head = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(width, 6), nn.Tanh(), nn.Linear(6, classes))
        return nn.Sequential(front, head)

    return _seeded(make)


RNG = torch.Generator().manual_seed(2)
POINTS, IMAGES = torch.randn(50, 2, generator=RNG), torch.randn(50, 1, 6, 6, generator=RNG)
TARGETS = torch.arange(50) % 2


def _loader(inputs: torch.Tensor = POINTS, shuffle: bool = False) -> DataLoader:
    return DataLoader(TensorDataset(inputs, TARGETS), batch_size=16, shuffle=shuffle)


def _trainer(path: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    settings = {"max_epochs": 3, "logger": False, "num_sanity_val_steps": 1, "enable_checkpointing": False} | settings
    return Trainer(
        default_root_dir=path,
        callbacks=list(callbacks),
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def _callback(layer: str = "input", **settings: Any) -> ConfidenceMap:
    return ConfidenceMap(layer, **({"extent": EXTENT, "resolution": 13, "frame_resolution": 7} | settings))


def _kept(path: Path, name: str = "confidence_map_val.npz") -> PlaneMap:
    with np.load(path / "figures" / name) as file:
        return PlaneMap.from_arrays(file)


def _assert_probabilities(found: PlaneMap, want_at: Any, **tolerance: float) -> None:
    """Compare with probabilities (K,) of single points, at corners and inside."""
    for row, column in ((0, 0), (12, 12), (12, 0), (3, 8), (6, 6)):
        point = torch.tensor([[-3 + column / 2, -2 + row / 3]])
        with torch.no_grad():
            want = want_at(point)[0].float()
        assert found.confidence[row, column] == pytest.approx(want.max().item(), **({"rel": 1e-5} | tolerance))
        assert found.predicted[row, column] == want.argmax()
    assert len(np.unique(found.confidence)) > 40


pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(does not have many workers|log_every_n_steps|`isinstance.treespec).*"
)


def test_inputs_are_mapped_as_the_module_sees_them(tmp_path: Path):
    net = _flat()
    trainer = _trainer(tmp_path, _callback(batch_size=50))
    trainer.validate(net, _loader(), verbose=False)
    found = _kept(tmp_path)
    _assert_probabilities(found, lambda point: net.eval()(point).softmax(dim=1))
    assert (found.x[[0, -1]].tolist(), found.y[[0, -1]].tolist()) == ([-3, 3], [-2, 2])
    assert_close(found.points, POINTS.numpy())
    assert_close(found.targets, TARGETS.numpy())
    logged = {name: trainer.callback_metrics[f"val/{name}"].item() for name in ("low_confidence", "boundary_slope")}
    assert logged["low_confidence"] == pytest.approx((found.confidence < 0.9).mean())
    assert logged["boundary_slope"] > 0


def test_hidden_plane_is_mapped_by_the_rest_of_the_network(tmp_path: Path):
    net = _bottleneck()
    trainer = _trainer(tmp_path, _callback("body.0", batch_size=50))
    trainer.test(net, _loader(IMAGES), verbose=False)
    found = _kept(tmp_path, "confidence_map_test.npz")
    _assert_probabilities(found, lambda point: net.body[1](point).softmax(dim=1))
    with torch.no_grad():
        assert_close(found.points, net.eval().body[0](IMAGES).numpy())
    assert not net.body[0]._forward_hooks


def test_what_passes_by_the_layer_is_of_the_first_input(tmp_path: Path):
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.head = nn.Linear(2, 2), nn.Linear(2, 3)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            hidden = self.front(inputs)
            return self.head(hidden) * torch.cat([inputs, inputs[:, :1]], dim=1)

    net = _seeded(Skip)
    _trainer(tmp_path, _callback("body.front")).validate(net, _loader(), verbose=False)
    aside = torch.cat([POINTS[0], POINTS[0, :1]])
    _assert_probabilities(_kept(tmp_path), lambda point: (net.body.head(point) * aside).softmax(dim=1))


@pytest.mark.parametrize("layer", ["body.0", "input"])
def test_other_shapes_of_two_numbers(tmp_path: Path, layer: str):
    net = _seeded(lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 5, 1), nn.Flatten()))
    _trainer(tmp_path, _callback(layer)).validate(net, _loader(POINTS[..., None, None]), verbose=False)
    rest = net.body if layer == "input" else net.body[1:]
    _assert_probabilities(_kept(tmp_path), lambda point: rest(point[..., None, None]).softmax(dim=1))


def test_one_logit_and_probabilities(tmp_path: Path):
    class Binary(_Net):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.body(inputs).squeeze(1)

    net = Binary(_flat(classes=1).body)
    _trainer(tmp_path, _callback()).validate(net, _loader(), verbose=False)
    found = _kept(tmp_path)
    p = p_class1(found.confidence, found.predicted)
    grid = grid_points(torch.tensor(found.x), torch.tensor(found.y)).float()
    with torch.no_grad():
        want = net.eval()(grid).sigmoid().reshape(13, 13).numpy()
    assert_close(p, want)
    callback = _callback(probabilities=True, forward=lambda module, inputs: module(inputs).sigmoid())
    _trainer(tmp_path, callback).validate(net, _loader(), verbose=False)
    assert_close(_kept(tmp_path).confidence, found.confidence)


@pytest.mark.parametrize("layer", ["input", "body.0"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precision_is_the_trainers(tmp_path: Path, precision: str, layer: str):
    net = _seeded(lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True), nn.Linear(2, 3)))
    with torch.no_grad():
        net.body[2].bias[:] = 0  # three classes meet where both units are 0
    trainer = _trainer(tmp_path, _callback(layer), precision=precision)
    trainer.validate(net, _loader(), verbose=False)
    rest = net.body if layer == "input" else net.body[1:]

    def want_at(point: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            dtype = torch.bfloat16 if "bf16" in precision and layer != "input" else net.body[0].weight.dtype
            return rest(point.to(dtype)).float().softmax(dim=1)

    _assert_probabilities(_kept(tmp_path), want_at, rel=1e-6)
    assert trainer.callback_metrics["val/boundary_slope"] > 0
    assert all(parameter.grad is None for parameter in net.parameters())


def test_frames_have_the_titles_of_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    titles = []

    def draw(maps: list[PlaneMap], occasions: list[str], *settings: Any) -> Figure:
        titles.extend(occasions)
        return draw_confidence_maps(maps, occasions, *settings)

    monkeypatch.setattr("mm_lightning.diagnostics.confidence_map.draw_confidence_maps", draw)
    _trainer(tmp_path, _callback(), max_epochs=2).fit(_flat(), _loader(), _loader())
    assert titles == 2 * ["validation set, epoch 1", "validation set, epoch 2"]


def test_every_epoch_is_a_frame_and_the_last_picture_is_fine(tmp_path: Path):
    logger = TensorBoardLogger(tmp_path, name="tb", version=0)
    net, callback = _flat(), _callback()
    coarse = []

    class Watch(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if not trainer.sanity_checking:
                found = _kept(tmp_path)
                coarse.append(found.confidence.shape)
                self.low = (found.confidence < 0.9).mean()

    watch = Watch()
    trainer = _trainer(tmp_path, callback, watch, logger=logger)
    trainer.fit(net, _loader(shuffle=True), _loader())
    assert coarse == [(7, 7), (7, 7), (13, 13)]
    events = EventAccumulator(logger.log_dir).Reload()
    assert [image.step for image in events.Images("confidence_map/val")] == [4, 8, 12]
    assert [scalar.step for scalar in events.Scalars("val/low_confidence")] == [3, 7, 11]
    assert events.Scalars("val/low_confidence")[-1].value == pytest.approx(watch.low)
    with Image.open(io.BytesIO(events.Images("confidence_map/val")[-1].encoded_image_string)) as image:
        assert image.size[0] > 500
    with Image.open(tmp_path / "figures" / "confidence_map.gif") as gif:
        assert gif.n_frames == 3
        assert gif.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    with np.load(tmp_path / "figures" / "confidence_map_frames.npz") as frames:
        assert frames["epochs"].tolist() == [0, 1, 2]
        assert frames["confidence"].shape == frames["predicted"].shape == (3, 7, 7)
        assert frames["confidence"].dtype == np.uint8
        last = 0.5 + frames["confidence"][-1] / 510
        assert (frames["confidence"][0] != frames["confidence"][1]).any()
    assert_close(last, _kept(tmp_path).confidence[::2, ::2], rtol=0, atol=1 / 510 + 1e-6, check_dtype=False)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_resumed_training_has_the_frames_of_the_straight_one(tmp_path: Path):
    def fit(path: Path, epochs: int, **resume: Any) -> dict[str, np.ndarray]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            saver = ModelCheckpoint(path, "{epoch}", save_top_k=-1)
            trainer = _trainer(path, _callback(), saver, max_epochs=epochs, enable_checkpointing=True)
            net = _flat()
            net.body[2].p = 0.0  # no draws: they are not resumed
            trainer.fit(net, _loader(), _loader(), **resume)
        with np.load(path / "figures" / "confidence_map_frames.npz") as file:
            return dict(file)

    straight = fit(tmp_path / "straight", 2)
    fit(tmp_path / "first", 1)
    resumed = fit(tmp_path / "second", 2, ckpt_path=tmp_path / "first" / "epoch=0.ckpt")
    assert resumed["epochs"].tolist() == [0, 1]
    assert_close(resumed, straight, rtol=0, atol=0)
    with Image.open(tmp_path / "second" / "figures" / "confidence_map.gif") as gif:
        assert gif.n_frames == 2


def test_training_that_goes_on_keeps_its_frames(tmp_path: Path):
    net, trainer = _flat(), _trainer(tmp_path, _callback(), max_epochs=1)
    trainer.fit(net, _loader(), _loader())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(net, _loader(), _loader())
    with np.load(tmp_path / "figures" / "confidence_map_frames.npz") as file:
        assert file["epochs"].tolist() == [0, 1]


def test_second_training_forgets_the_frames_of_the_first(tmp_path: Path):
    callback = _callback()
    for epochs in (2, 1):
        _trainer(tmp_path, callback, max_epochs=epochs).fit(_flat(), _loader(), _loader())
    with np.load(tmp_path / "figures" / "confidence_map_frames.npz") as file:
        assert file["epochs"].tolist() == [0]


def test_a_fast_development_run_writes_no_files(tmp_path: Path):
    callback = _callback()
    _trainer(tmp_path, callback, fast_dev_run=True).fit(_flat(), _loader(), _loader())
    assert len(callback.state_dict()["frames"]) == 1
    assert not (tmp_path / "figures").exists()


def test_frames_of_another_resolution_are_left():
    callback = _callback()
    frame = packed(_found(), 0)
    callback.load_state_dict({"frames": {1: frame}})
    assert callback.state_dict() == {"frames": {}}
    callback = _callback(frame_resolution=21)
    callback.load_state_dict({"frames": {1: frame}})
    assert list(callback.state_dict()["frames"]) == [1]


def test_frame_of_hidden_points_follows_them(tmp_path: Path):
    net = _bottleneck()
    _trainer(tmp_path, _callback("body.0", extent=None), max_epochs=2).fit(net, _loader(IMAGES), _loader(IMAGES))
    with np.load(tmp_path / "figures" / "confidence_map_frames.npz") as frames:
        assert frames["x"].shape == frames["y"].shape == (2, 7)
        assert not np.array_equal(frames["x"][0], frames["x"][1])
        assert not np.array_equal(frames["points"][0], frames["points"][1])
        inside = (frames["points"][..., 0] > frames["x"][:, :1]) & (frames["points"][..., 0] < frames["x"][:, -1:])
        assert inside.all()
    found = _kept(tmp_path)
    assert np.ptp(found.x) == pytest.approx(np.ptp(found.y))


@pytest.mark.parametrize("shuffle", [False, True])
def test_training_and_random_numbers_are_untouched(tmp_path: Path, shuffle: bool):
    results = []
    for callbacks in ([], [_callback(train_points=30)]):
        net, keys = _flat(), list(_flat().state_dict())
        with torch.random.fork_rng():
            torch.manual_seed(11)
            np.random.seed(11)  # noqa: NPY002
            trainer = _trainer(tmp_path, *callbacks)
            trainer.fit(net, _loader(shuffle=shuffle), _loader())
            results.append((net.state_dict(), torch.get_rng_state(), np.random.get_state()[1]))  # noqa: NPY002
        assert list(net.state_dict()) == keys
    assert_close(results[0], results[1], rtol=0, atol=0)
    found = _kept(tmp_path, "confidence_map_train.npz")
    assert found.confidence.shape == (13, 13)
    assert len(found.points) == 30
    assert set(map(tuple, found.points.tolist())) <= set(map(tuple, POINTS.tolist()))
    with np.load(tmp_path / "figures" / "confidence_map_frames.npz") as frames:
        assert frames["points"].shape == (3, 50, 2)  # of the validation set alone


def test_training_rows_are_mapped_without_validation_and_dropout(tmp_path: Path):
    net = _flat()
    trainer = _trainer(tmp_path, _callback(train_points=30))
    trainer.fit(net, _loader())
    assert net.training
    _assert_probabilities(_kept(tmp_path, "confidence_map_train.npz"), lambda point: net.eval()(point).softmax(dim=1))
    assert 0 < trainer.callback_metrics["train/low_confidence"] <= 1
    assert not (tmp_path / "figures" / "confidence_map.gif").exists()


@pytest.mark.parametrize(
    ("layer", "inputs", "message"),
    [
        ("body.0", IMAGES, r"Layer 'body\.0' must have 2 units to be a plane, got 5\."),
        ("input", IMAGES, r"Layer 'input' must have 2 units to be a plane, got 36\."),
    ],
    ids=["hidden", "input"],
)
def test_layers_of_another_width_are_refused(tmp_path: Path, layer: str, inputs: torch.Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        _trainer(tmp_path, _callback(layer)).validate(_bottleneck(width=5), _loader(inputs), verbose=False)


def test_layers_that_points_cannot_replace():
    layer = nn.Linear(4, 2)

    def run(forward: Any) -> torch.Tensor:
        return PlaneNetwork(layer, forward, torch.zeros(4), "middle", layer)(torch.zeros(3, 2))

    with pytest.raises(RuntimeError, match=r"Layer 'middle' must run once .* it ran 0 times"):
        run(lambda module, inputs: inputs)
    with pytest.raises(RuntimeError, match="it ran 2 times"):
        run(lambda module, inputs: module(inputs) + module(inputs))
    with pytest.raises(ValueError, match=r"two numbers for each of 3 inputs, got shape \(6, 2\)"):
        run(lambda module, inputs: module(inputs.repeat(2, 1)))
    with pytest.raises(ValueError, match=r"logits \(3, K\) for 3 inputs, got shape \(1, 2\)"):
        run(lambda module, inputs: module(inputs).mean(dim=0, keepdim=True))
    assert not layer._forward_hooks


def test_network_that_works_in_place_does_not_move_the_points():
    layer, points = nn.Identity(), torch.ones(3, 2)
    for replaced in (None, layer):
        network = PlaneNetwork(layer, lambda module, inputs: module(inputs).mul_(2), torch.zeros(2), "", replaced)
        assert_close(network(points), torch.full((3, 2), 2.0))
        assert_close(points, torch.ones(3, 2))


@pytest.mark.parametrize(
    ("join", "most"),
    [
        (lambda hidden, inputs: hidden, 4),
        (lambda hidden, inputs: hidden + inputs, 4),
        (lambda hidden, inputs: torch.cat([hidden, inputs], dim=1), 12),
        (lambda hidden, inputs: hidden + inputs * len(inputs), 12),
    ],
    ids=["alone", "sum", "concatenation", "uses the number of rows"],
)
def test_layers_in_front_run_on_one_row_where_that_agrees(join: Any, most: int):
    front, rows = nn.Linear(2, 2), []
    front.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    inputs, points = torch.tensor([0.5, -2.0]), torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    network = PlaneNetwork(front, lambda module, inputs: join(module(inputs), inputs), inputs, "front", front)
    got = [network(part) for part in (points, points[:1])]
    want = [join(part, inputs.expand(len(part), 2)) for part in (points, points[:1])]
    assert_close(got, want)
    assert max(rows) == most
    if most == 4:  # a trial with 4 of the 12 points, then one row for all
        assert rows == [1, 4, 1, 1]


def test_diverged_network_is_warned_about_not_drawn(tmp_path: Path):
    net = _flat()
    nn.init.constant_(net.body[0].bias, math.nan)
    with pytest.warns(UserWarning, match="test set: the logits are not finite all over the plane"):
        _trainer(tmp_path, _callback()).test(net, _loader(), verbose=False)
    callback = _callback()
    with pytest.warns(UserWarning, match="epoch 1: the logits are not finite all over the plane"):
        _trainer(tmp_path, callback, max_epochs=1).fit(net, _loader(), _loader())
    assert callback.state_dict()["frames"] == {}
    net = _bottleneck()
    nn.init.constant_(net.body[0][0].bias, math.nan)
    with pytest.warns(UserWarning, match=r"layer 'body\.0' has values that are not finite"):
        _trainer(tmp_path, _callback("body.0")).fit(net, _loader(IMAGES), _loader(IMAGES))
    assert not (tmp_path / "figures").exists()


def test_batch_without_inputs_for_the_module(tmp_path: Path):
    net = _seeded(lambda: nn.Sequential(nn.Embedding(2, 2), nn.Linear(2, 2)))
    with pytest.raises(RuntimeError, match="The batch holds no floating point tensor"):
        _trainer(tmp_path, _callback("body.0")).validate(net, _loader(TARGETS), verbose=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resolution": 1}, "^resolution must be an integer >= 2, got 1"),
        ({"frame_resolution": 0}, "^frame_resolution must be an integer >= 2, got 0"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"every_n_epochs": 0}, "every_n_epochs must be an integer >= 1, got 0"),
        ({"threshold": 90}, r"threshold must be a number in \(0, 1\], got 90"),
        ({"band": 0}, "band must be a finite number > 0, got 0"),
        ({"extent": ((0, 1), (2, 2))}, r"y0 < y1, got \(\(0, 1\), \(2, 2\)\)"),
        ({"extent": ((0, math.inf), (0, 1))}, "x0 < x1"),
        ({"extent": 15}, "y0 < y1, got 15. None is a square around the points"),
        ({"extent": [-15, 15]}, r"y0 < y1, got \[-15, 15\]"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_settings_out_of_range(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ConfidenceMap(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resolution": 300.5}, r"resolution must be an integer >= 2, got 300\.5 of type float"),
        ({"threshold": "high"}, "threshold must be a number in .0, 1., got 'high' of type str"),
        ({"band": None}, "band must be a finite number > 0, got None of type NoneType"),
        ({"probabilities": 1}, "probabilities must be True or False, got 1 of type int"),
        ({"class_names": "ab"}, "class_names must be a list of texts, or a mapping .* got 'ab' of type str"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_settings_of_another_type(settings: dict[str, Any], message: str):
    with pytest.raises(TypeError, match=message):
        ConfidenceMap(**settings)


def test_same_weights_in_the_same_frame_are_evaluated_once(tmp_path: Path):
    runs = []

    def forward(module: LightningModule, inputs: torch.Tensor) -> torch.Tensor:
        runs.append(len(inputs))
        return module(inputs)

    # 11 * 11 final points, 9 * 9 of a frame; near no point, so that no slope is taken
    callback = _callback(resolution=11, frame_resolution=9, forward=forward, band=1e-9)
    net, trainer = _flat(), _trainer(tmp_path, callback, max_epochs=1)
    trainer.fit(net, _loader(POINTS), _loader(POINTS))
    assert runs.count(81) == runs.count(121) == 1  # the frame, then the final map
    first = trainer.callback_metrics["val/low_confidence"].item()
    trainer.test(net, _loader(POINTS), verbose=False)
    assert runs.count(121) == 1
    assert trainer.callback_metrics["test/low_confidence"].item() == first
    with torch.no_grad():
        net.body[3].weight.data.mul_(-3)  # past the version counter, as weight averaging does
    trainer.test(net, _loader(POINTS), verbose=False)
    assert runs.count(121) == 2


def test_two_maps_of_one_training_have_keys_of_their_own(tmp_path: Path):
    narrow = ((-0.1, 0.1), (-0.1, 0.1))
    trainer = _trainer(tmp_path, _callback(), _callback(extent=narrow, name="close"))
    trainer.validate(_flat(), _loader(), verbose=False)
    whole, close = (trainer.callback_metrics[f"val/{name}low_confidence"].item() for name in ("", "close/"))
    for name, want in (("confidence_map", whole), ("close", close)):
        assert (_kept(tmp_path, f"{name}_val.npz").confidence < 0.9).mean() == pytest.approx(want)
