import io
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.collections import PathCollection
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.clustering import davies_bouldin_score
from versions import answers

from mm_lightning.diagnostics import HiddenSpace
from mm_lightning.diagnostics.drawing import PALETTE
from mm_lightning.diagnostics.hidden_space import class_separation, draw_hidden_space, principal_plane


def _blobs(rows: int = 120, classes: int = 4, width: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (rows,), generator=rng)
    means = 2 * torch.randn(classes, width, generator=rng, dtype=torch.float64)
    return means[targets] + torch.randn(rows, width, generator=rng, dtype=torch.float64), targets


# compute


def test_separation_of_two_pairs_by_hand():
    # means (1, 0) and (5, 3), 5 apart; distances to own mean 1, 1 and 2, 2; class indices need not be 0, 1
    hidden = torch.tensor([[0.0, 0.0], [2.0, 0.0], [5.0, 1.0], [5.0, 5.0]])
    got = class_separation(hidden, torch.tensor([3, 3, 7, 7]))
    # from each row to the other mean: (5, 3), (3, 3), (4, 1), (4, 5)
    others = math.sqrt(34), math.sqrt(18), math.sqrt(17), math.sqrt(41)
    margins = [(far - near) / (far + near) for far, near in zip(others, (1, 1, 2, 2), strict=True)]
    want = {
        "davies_bouldin": (1 + 2) / 5,
        "spread_ratio": math.sqrt((1 + 1 + 4 + 4) / 4) / 5,
        "nearest_mean_acc": 1.0,
        "nearest_mean_margin": sum(margins) / 4,
    }
    assert got == pytest.approx(want, rel=1e-12)


def test_margin_of_points_on_a_line_by_hand():
    # means 0, 4 and 10; to own mean and nearest other 1, 3; 1, 5; 3, 1 (nearer to class 0); 3, 3 (between); 0, 6
    hidden = torch.tensor([[1.0], [-1.0], [1.0], [7.0], [10.0]])
    got = class_separation(hidden, torch.tensor([0, 0, 1, 1, 2]))
    assert got["nearest_mean_margin"] == pytest.approx((2 / 4 + 4 / 6 - 2 / 4 + 0 + 1) / 5, rel=1e-12)


def test_classes_of_one_point_each_have_the_largest_margin():
    got = class_separation(torch.tensor([[0.0, 1.0], [3.0, 1.0], [3.0, 1.0]]), torch.tensor([0, 1, 1]))
    want = {"davies_bouldin": 0.0, "spread_ratio": 0.0, "nearest_mean_acc": 1.0, "nearest_mean_margin": 1.0}
    assert got == want


def test_row_on_a_mean_that_two_classes_share_has_no_margin():
    got = class_separation(torch.tensor([[0.0], [-1.0], [1.0]]), torch.tensor([0, 1, 1]))
    assert got["nearest_mean_margin"] == 0


def _reference_separation(hidden: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    classes = sorted(set(targets.tolist()))
    mean, spread = {}, {}
    for k in classes:
        rows = [h for h, t in zip(hidden, targets, strict=True) if t == k]
        mean[k] = sum(rows) / len(rows)
        spread[k] = sum(math.dist(row, mean[k]) for row in rows) / len(rows)
    worst = [max((spread[k] + spread[j]) / math.dist(mean[k], mean[j]) for j in classes if j != k) for k in classes]
    pairs = [math.dist(mean[k], mean[j]) for k in classes for j in classes if j < k]
    squares, right, margins = 0.0, 0, 0.0
    for h, t in zip(hidden, targets.tolist(), strict=True):
        squares += math.dist(h, mean[t]) ** 2
        right += min(classes, key=lambda k: math.dist(h, mean[k])) == t
        near, far = math.dist(h, mean[t]), min(math.dist(h, mean[k]) for k in classes if k != t)
        margins += (far - near) / (far + near)
    return {
        "davies_bouldin": sum(worst) / len(classes),
        "spread_ratio": math.sqrt(squares / len(hidden)) / (sum(pairs) / len(pairs)),
        "nearest_mean_acc": right / len(hidden),
        "nearest_mean_margin": margins / len(hidden),
    }


@pytest.mark.parametrize(("classes", "width"), [(2, 1), (4, 2), (30, 5)], ids=["line", "plane", "many"])
def test_separation_agrees_with_loops_from_the_definition(classes: int, width: int):
    hidden, targets = _blobs(300, classes, width)
    want = _reference_separation(hidden.numpy(), targets.numpy())
    assert 0.5 < want["nearest_mean_acc"] < 1  # so that the example can tell right from wrong
    assert class_separation(hidden, targets) == pytest.approx(want, rel=1e-10)


def test_davies_bouldin_agrees_with_torchmetrics():
    hidden, targets = _blobs()
    want = davies_bouldin_score(hidden.float(), targets).item()
    assert class_separation(hidden, targets)["davies_bouldin"] == pytest.approx(want, rel=1e-5)


def test_separation_is_exact_far_from_the_origin():
    hidden, targets = _blobs()
    want = class_separation(hidden, targets)
    assert class_separation(hidden + 1e6, targets) == pytest.approx(want, rel=1e-6)


def test_equal_means_are_infinitely_bad():
    hidden = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0]])
    got = class_separation(hidden, torch.tensor([0, 0, 1, 1]))
    assert got == {
        "davies_bouldin": math.inf,
        "spread_ratio": math.inf,
        "nearest_mean_acc": 0.5,
        "nearest_mean_margin": 0.0,
    }


@pytest.mark.parametrize(
    ("hidden", "targets", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), r"at least two classes, got only \[0\]"),
        (torch.zeros(3, 2), torch.arange(4), r"got \(3, 2\) and \(4,\)"),
        (torch.zeros(3), torch.arange(3), r"hidden must be \(N, D\)"),
        (torch.tensor([[0.0, math.nan], [math.inf, 1.0]]), torch.arange(2), "got 2 of 4 values that are not"),
    ],
    ids=["one class", "lengths", "dimensions", "not finite"],
)
def test_separation_refuses(hidden: torch.Tensor, targets: torch.Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        class_separation(hidden, targets)


@pytest.mark.parametrize("shape", [(60, 5), (6, 20)], ids=["tall", "wide"])
def test_principal_plane_agrees_with_numpy_svd(shape: tuple[int, int]):
    hidden = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 3
    centered = hidden.numpy() - hidden.numpy().mean(axis=0)
    _, scale, axes = np.linalg.svd(centered, full_matrices=False)
    for axis in axes:
        axis *= np.sign(axis[np.abs(axis).argmax()])
    plane, fraction = principal_plane(hidden)
    assert_close(plane.numpy(), centered @ axes[:2].T)
    assert_close(fraction.numpy(), scale[:2] ** 2 / (scale**2).sum())


# draw


def test_panels_share_a_square_frame_and_hold_their_classes():
    hidden, targets = _blobs(400, classes=6)
    left, right = draw_hidden_space(hidden, targets, subsets=(range(3), [0, 5])).axes
    assert left.get_xlim() == right.get_xlim()
    assert left.get_ylim() == right.get_ylim()
    assert np.ptp(left.get_xlim()) == pytest.approx(np.ptp(left.get_ylim()))
    for axes, classes in ((left, [0, 1, 2]), (right, [0, 5])):
        points = next(c for c in axes.collections if isinstance(c, PathCollection)).get_offsets()
        want = hidden[torch.isin(targets, torch.tensor(classes))].numpy()
        assert_close(np.sort(np.asarray(points), axis=0), np.sort(want, axis=0))
        texts = [text.get_text() for text in axes.texts]
        assert texts[: len(classes)] == [str(k) for k in classes]
        colours = [text.get_bbox_patch().get_edgecolor()[:3] for text in axes.texts[: len(classes)]]
        assert_close(
            np.array(colours), np.array([[int(PALETTE[k][i : i + 2], 16) / 255 for i in (1, 3, 5)] for k in classes])
        )
        member = torch.isin(targets, torch.tensor(classes))
        assert f"{class_separation(hidden[member], targets[member])['davies_bouldin']:.2f}" in texts
    assert (left.get_title("left"), right.get_title("left")) == ("Classes 0–2", "Classes 0, 5")
    assert (left.get_xlabel(), left.get_ylabel()) == ("hidden unit 1", "hidden unit 2")


def test_far_points_do_not_stretch_the_frame_and_are_counted():
    hidden, targets = _blobs(2000, classes=3)
    before = draw_hidden_space(hidden, targets, [range(3)]).axes[0]
    hidden[:4] = torch.tensor([1e4, -1e4], dtype=torch.float64)
    after = draw_hidden_space(hidden, targets, [range(3)]).axes[0]
    assert np.ptp(after.get_xlim()) < 1.3 * np.ptp(before.get_xlim())
    assert before.get_title("right") == "2,000 points"
    assert after.get_title("right") == "2,000 points, 4 outside the frame"


def test_labels_of_equal_clouds_do_not_overlap_and_carry_names():
    targets = torch.arange(200) % 5
    axes = draw_hidden_space(torch.ones(200, 2), targets, [range(5)], class_names=list("abcde")).axes[0]
    labels = axes.texts[:5]
    assert [text.get_text() for text in labels] == list("abcde")
    places = torch.tensor([text.get_position() for text in labels])
    assert torch.pdist(places).min() > 0.07 * np.ptp(axes.get_xlim())


def test_wide_layers_show_principal_components():
    hidden, targets = _blobs(100, classes=3, width=6)
    axes = draw_hidden_space(hidden, targets, [range(3)]).axes[0]
    plane, fraction = principal_plane(hidden)
    points = np.asarray(axes.collections[0].get_offsets())
    assert_close(np.sort(points, axis=0), np.sort(plane.numpy(), axis=0))
    assert axes.get_ylabel() == f"principal component 2 ({100 * fraction[1]:.0f} % of variance)"
    assert f"{class_separation(hidden, targets)['spread_ratio']:.2f}" in [text.get_text() for text in axes.texts]


@pytest.mark.parametrize("subsets", [5, "all", [0, 1], [[0, 1], []], [["cat"]]], ids=str)
def test_subsets_that_are_no_lists_of_classes_are_refused(subsets: Any):
    message = f"subsets must be a list with a list of class indices for each panel, got {subsets!r} of type"
    with pytest.raises(TypeError, match=re.escape(message)):
        HiddenSpace("body.2", subsets=subsets)


def test_subsets_without_enough_classes():
    hidden, targets = _blobs(50, classes=2)
    axes = draw_hidden_space(hidden, targets, [[0, 1], [1, 2], [5, 6]]).axes
    assert [text.get_text() for text in axes[1].texts].count("–") == 3
    with pytest.raises(ValueError, match=r"subsets \[\[8, 9\]\] hold none of \[0, 1\]"):
        draw_hidden_space(hidden, targets, [[8, 9]])
    with pytest.raises(ValueError, match="two columns or more to be drawn, got 1"):
        draw_hidden_space(hidden[:, :1], targets, [[0, 1]])


# callback


class _Net(LightningModule):
    def __init__(self, fail: BaseException | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2), nn.ReLU(inplace=True))
        self.head = nn.Linear(2, 4)
        self.fail = fail
        self.hooked: list[tuple[int, bool]] = []  # (epoch, is the layer hooked) of each validation step

    def _loss(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(self.head(self.body(batch[0])), batch[1])

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        assert not self.body[2]._forward_hooks
        return self._loss(batch)

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._loss(batch)
        self.hooked.append((self.current_epoch, bool(self.body[2]._forward_hooks)))
        if self.fail is not None and batch_idx == 1 and not self.trainer.sanity_checking:
            raise self.fail

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


INPUTS, TARGETS = _blobs(80, classes=4, width=6, seed=3)
INPUTS = INPUTS.float()


def _loader(rows: slice = slice(None), shuffle: bool = False) -> DataLoader:
    return DataLoader(TensorDataset(INPUTS[rows], TARGETS[rows]), batch_size=16, shuffle=shuffle)


def _trainer(path: Path, callback: HiddenSpace | None, **settings: object) -> Trainer:
    settings = {"max_epochs": 3, "logger": False, "num_sanity_val_steps": 1} | settings
    settings.setdefault("callbacks", [] if callback is None else [callback])
    return Trainer(
        default_root_dir=path,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def _net(**settings: BaseException) -> _Net:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return _Net(**settings)


pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(does not have many workers|log_every_n_steps|`isinstance.treespec).*"
)


def test_numbers_and_pictures_reach_tensorboard_and_files(tmp_path: Path):
    net = _net()
    logger = TensorBoardLogger(tmp_path, name="tb", version=0)
    trainer = _trainer(tmp_path, HiddenSpace("body.2", every_n_epochs=2), logger=[logger, CSVLogger(tmp_path)])
    trainer.fit(net, _loader(shuffle=True), _loader())
    trainer.test(net, _loader(slice(40)), verbose=False)
    assert not net.body[2]._forward_hooks

    events = EventAccumulator(logger.log_dir).Reload()
    assert [image.step for image in events.Images("hidden_space/val")] == [10, 15]  # epochs 1 and 2, of 5 steps
    assert [image.step for image in events.Images("hidden_space/test")] == [15]
    for split, rows in (("val", slice(None)), ("test", slice(40))):
        with Image.open(io.BytesIO(events.Images(f"hidden_space/{split}")[-1].encoded_image_string)) as image:
            assert image.size == (960, 642)
        with Image.open(tmp_path / "figures" / f"hidden_space_{split}.png") as image:
            assert image.size == (1600, 1070)
            assert len(image.convert("RGB").getcolors(1 << 22)) > 100
        with torch.no_grad():  # before the in-place ReLU
            want = class_separation(net.body[:3](INPUTS[rows]), TARGETS[rows])
        for name, value in want.items():
            assert events.Scalars(f"{split}/{name}")[-1].value == pytest.approx(value, rel=1e-5)
    assert len(events.Scalars("val/davies_bouldin")) == 2


def test_hook_is_on_only_in_drawn_epochs(tmp_path: Path):
    net = _net()
    _trainer(tmp_path, HiddenSpace("body.2", every_n_epochs=3), max_epochs=5).fit(net, _loader(), _loader(slice(16)))
    # the first entry is the sanity check; epoch 4 is the last
    assert net.hooked == [(0, False), (0, False), (1, False), (2, True), (3, False), (4, True)]


def test_last_validation_is_drawn_when_epochs_are_skipped(tmp_path: Path):
    net = _net()
    trainer = _trainer(tmp_path, HiddenSpace("body.2", every_n_epochs=50), max_epochs=5, check_val_every_n_epoch=2)
    trainer.fit(net, _loader(), _loader(slice(16)))
    assert net.hooked[1:] == [(1, False), (3, True)]


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()], ids=["exception", "ctrl-c"])
def test_hook_is_gone_after_an_interruption(tmp_path: Path, error: BaseException):
    net, callback = _net(fail=error), HiddenSpace("body.2", every_n_epochs=1)
    with answers(type(error), match=r"boom|1"):
        _trainer(tmp_path, callback).fit(net, _loader(), _loader())
    assert net.hooked[-1] == (0, True)  # it was on when the error struck
    assert not net.body[2]._forward_hooks
    assert not callback._states.is_open
    assert not (tmp_path / "figures").exists()


def test_training_and_random_numbers_are_untouched(tmp_path: Path):
    results = []
    for callback in (None, HiddenSpace("body.2", every_n_epochs=1)):
        net, keys = _net(), list(_net().state_dict())
        with torch.random.fork_rng():
            torch.manual_seed(11)
            np.random.seed(11)  # noqa: NPY002
            trainer = _trainer(tmp_path, callback)
            trainer.fit(net, _loader(shuffle=True), _loader())
            trainer.test(net, _loader(), verbose=False)
            results.append((net.state_dict(), torch.get_rng_state(), np.random.get_state()[1]))  # noqa: NPY002
        assert list(net.state_dict()) == keys
    assert (tmp_path / "figures" / "hidden_space_val.png").exists()
    assert_close(results[0], results[1], rtol=0, atol=0)


def test_unknown_layer_fails_before_training_and_names_the_nearest(tmp_path: Path):
    trainer = _trainer(tmp_path, HiddenSpace("bodi.2"))
    with pytest.raises(ValueError, match=r"Layer 'bodi\.2' is not in _Net\. Nearest names: 'body\.2'"):
        trainer.fit(_net(), _loader(), _loader())
    assert trainer.global_step == 0


@pytest.mark.parametrize(("max_points", "rows"), [(24, 24), (1000, 80)], ids=["cut", "whole"])
def test_only_the_first_rows_of_the_first_loader_are_used(tmp_path: Path, max_points: int, rows: int):
    net = _net()
    trainer = _trainer(tmp_path, HiddenSpace("body.2", max_points=max_points))
    trainer.validate(net, [_loader(), _loader(slice(8))], verbose=False)
    with torch.no_grad():
        want = class_separation(net.body[:3](INPUTS[:rows]), TARGETS[:rows])
    got = {name: trainer.callback_metrics[f"val/{name}"].item() for name in want}
    assert got == pytest.approx(want, rel=1e-5)


def test_targets_come_from_the_callers_function(tmp_path: Path):
    net = _net()
    trainer = _trainer(tmp_path, HiddenSpace("body.2", targets=lambda batch: batch[1] % 2))
    trainer.validate(net, _loader(), verbose=False)
    with torch.no_grad():
        want = class_separation(net.body[:3](INPUTS), TARGETS % 2)
    assert trainer.callback_metrics["val/spread_ratio"].item() == pytest.approx(want["spread_ratio"], rel=1e-5)


@pytest.mark.parametrize(
    ("callback", "error", "message"),
    [
        (HiddenSpace("body.2", targets=lambda batch: batch[1][:3]), ValueError, r"targets must be \(16,\).*got \(3,\)"),
        (HiddenSpace("body.2", targets=lambda batch: batch[0]), ValueError, r"got \(16, 6\)"),
        (HiddenSpace("idle"), RuntimeError, "Layer 'idle' did not run in this batch"),
    ],
    ids=["too few targets", "inputs as targets", "idle layer"],
)
def test_misuse_is_named(tmp_path: Path, callback: HiddenSpace, error: type[Exception], message: str):
    net = _net()
    net.idle = nn.Identity()
    with pytest.raises(error, match=message):
        _trainer(tmp_path, callback).test(net, _loader(), verbose=False)


@pytest.mark.parametrize("layer", ["one", "body.2"], ids=["single unit", "single class"])
def test_what_cannot_be_drawn_is_said(tmp_path: Path, layer: str):
    net = _net()
    net.one = nn.Linear(2, 1)
    net.body.append(net.one)
    net.head = nn.Linear(1, 4)
    callback = HiddenSpace(layer, targets=lambda batch: batch[1] if layer == "one" else 0 * batch[1])
    reason = {"one": "'one' has a single unit, which makes no plane", "body.2": r"'body\.2' has only the classes \[0\]"}
    with pytest.warns(UserWarning, match=f"the test set: layer {reason[layer]}"):
        _trainer(tmp_path, callback).test(net, _loader(), verbose=False)
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize(("layer", "width"), [("body.2", 2), ("body.0", 8)], ids=["narrow", "wide"])
def test_drawn_points_are_kept_beside_the_picture(tmp_path: Path, layer: str, width: int):
    net = _net()
    _trainer(tmp_path, HiddenSpace(layer)).test(net, _loader(), verbose=False)
    with torch.no_grad():
        hidden = net.body[: int(layer[-1]) + 1](INPUTS)
    assert hidden.shape == (80, width)
    with np.load(tmp_path / "figures" / "hidden_space_test.npz") as arrays:
        assert_close(arrays["targets"], TARGETS.numpy())
        if width == 2:
            assert set(arrays) == {"plane", "targets"}
            assert_close(arrays["plane"], hidden.double().numpy())
        else:
            plane, variance = principal_plane(hidden)
            assert_close(arrays["plane"], plane.numpy())
            assert_close(arrays["variance"], variance.numpy())


def test_two_of_a_kind_keep_their_numbers_and_pictures_apart(tmp_path: Path):
    net, logger = _net(), TensorBoardLogger(tmp_path, name="tb", version=0)
    callbacks = [HiddenSpace("body.2"), HiddenSpace("body.0", name="body.0")]
    trainer = _trainer(tmp_path, None, callbacks=callbacks, logger=logger)
    trainer.test(net, _loader(), verbose=False)
    for prefix, cut in (("test/", 3), ("test/body.0/", 1)):
        with torch.no_grad():
            want = class_separation(net.body[:cut](INPUTS), TARGETS)
        got = {name: trainer.callback_metrics[f"{prefix}{name}"].item() for name in want}
        assert got == pytest.approx(want, rel=1e-5)
    assert EventAccumulator(logger.log_dir).Reload().Tags()["images"] == ["hidden_space/test", "body.0/test"]
    files = {"hidden_space_test.npz", "hidden_space_test.png", "body.0_test.npz", "body.0_test.png"}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == files


def test_diverged_states_are_warned_about_not_drawn(tmp_path: Path):
    net = _net()
    nn.init.constant_(net.body[2].bias, math.nan)
    message = r"HiddenSpace neither draws nor logs the test set: layer 'body\.2' has values that are not finite\."
    with pytest.warns(UserWarning, match=message):
        _trainer(tmp_path, HiddenSpace("body.2")).test(net, _loader(), verbose=False)
    assert not (tmp_path / "figures").exists()
