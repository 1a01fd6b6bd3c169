import math
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.colors import to_hex
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from mm_lightning.diagnostics import Spectrum
from mm_lightning.diagnostics.drawing import INK, PALETTE
from mm_lightning.diagnostics.spectrum import draw_spectra
from mm_lightning.evaluation.spectrum import class_spectrum, spectrum_numbers


def _states(rows: int, width: int, classes: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (rows,), generator=rng)
    means = 5 * torch.randn(classes, width, generator=rng)
    return means[targets] + torch.randn(rows, width, generator=rng) * torch.logspace(0, -3, width), targets


# compute


def test_diagonal_matrices_by_hand():
    # class 2: diag(3, 4) above a row of zeros; class 7: one row of length 5
    hidden = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0], [3.0, 4.0]])
    values, classes = class_spectrum(hidden, torch.tensor([2, 2, 2, 7]), centred=False)
    assert classes.tolist() == [2, 7]
    assert_close(values, torch.tensor([[4.0, 3.0], [5.0, 0.0]], dtype=torch.float64))
    # means of 4 and 5; of 3 and 0
    assert spectrum_numbers(values) == pytest.approx({"largest": 4.5, "others": 1.5, "others_share": 0.25}, rel=1e-12)


def test_centred_pairs_by_hand():
    # around their mean (1, 7) the rows are (-1, 0) and (1, 0): one direction, of length sqrt(2)
    values, _ = class_spectrum(torch.tensor([[0.0, 7.0], [2.0, 7.0]]), torch.zeros(2, dtype=torch.long), centred=True)
    assert_close(values, torch.tensor([[math.sqrt(2), 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("centred", [False, True], ids=["uncentred", "centred"])
@pytest.mark.parametrize(("rows", "width"), [(300, 7), (60, 40), (2000, 1)], ids=["tall", "wide", "one unit"])
def test_values_agree_with_numpy_svd(rows: int, width: int, centred: bool):
    hidden, targets = _states(rows, width)
    values, classes = class_spectrum(hidden, targets, centred)
    assert values.dtype == torch.float64
    assert values.shape == (3, width)
    for k, got in zip(classes.tolist(), values.numpy(), strict=True):
        own = hidden[targets == k].numpy().astype(np.float64)
        want = np.linalg.svd(own - own.mean(axis=0) if centred else own, compute_uv=False)
        np.testing.assert_allclose(got[: len(want)], want, rtol=1e-9, atol=1e-12 * want[0])
        assert (got[len(want) :] == 0).all()


def test_class_of_one_row_has_its_length_and_centred_nothing():
    hidden, targets = torch.tensor([[1.0, 2.0, 2.0]]), torch.tensor([4])
    assert class_spectrum(hidden, targets, centred=False)[0].tolist() == [[pytest.approx(3.0), 0.0, 0.0]]
    values, _ = class_spectrum(hidden, targets, centred=True)
    assert values.tolist() == [[0.0, 0.0, 0.0]]
    assert math.isnan(spectrum_numbers(values)["others_share"])


def test_small_values_survive_beside_a_large_mean():
    # the squares of 1e-6 and 1e3 are eighteen decades apart: a Gram matrix in float64 would lose the smaller
    hidden = torch.diag(torch.tensor([1e3, 1.0, 1e-6], dtype=torch.float64))
    values, _ = class_spectrum(hidden, torch.zeros(3, dtype=torch.long), centred=False)
    assert values[0].tolist() == pytest.approx([1e3, 1.0, 1e-6], rel=1e-9)


def test_values_grow_with_the_root_of_the_rows_and_the_share_does_not():
    hidden, targets = _states(90, 6)
    once, _ = class_spectrum(hidden, targets, centred=True)
    fourfold, _ = class_spectrum(hidden.repeat(4, 1), targets.repeat(4), centred=True)
    assert_close(fourfold, 2 * once)
    assert spectrum_numbers(fourfold)["others_share"] == pytest.approx(spectrum_numbers(once)["others_share"])


@pytest.mark.parametrize(
    ("hidden", "targets", "message"),
    [
        (torch.zeros(3, 2), torch.arange(4), r"got \(3, 2\) and \(4,\)"),
        (torch.zeros(3), torch.arange(3), r"hidden must be \(N, D\)"),
        (torch.zeros(0, 2), torch.arange(0), r"with N >= 1, got \(0, 2\)"),
        (torch.tensor([[0.0, math.nan], [math.inf, 1.0]]), torch.arange(2), "got 2 of 4 values that are not"),
    ],
    ids=["lengths", "dimensions", "no rows", "not finite"],
)
def test_spectrum_refuses(hidden: torch.Tensor, targets: torch.Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        class_spectrum(hidden, targets, centred=False)


# draw


def _pair(width: int, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    hidden, targets = _states(400, width, classes)
    return tuple(class_spectrum(hidden, targets, centred)[0].numpy() for centred in (False, True))


def test_panels_hold_a_line_per_class_and_their_mean():
    narrow, wide = _pair(5), _pair(60)
    figure = draw_spectra({"blocks.2": narrow, "blocks.0": wide}, [0, 1, 2], "Heading", class_names=list("abc"))
    assert len(figure.axes) == 4
    for axes, values in zip(figure.axes, (*narrow, *wide), strict=True):
        *lines, mean = axes.get_lines()
        assert [to_hex(line.get_color()) for line in lines] == list(PALETTE[:3])
        assert [line.get_label() for line in (*lines, mean)] == ["a", "b", "c", "mean"]
        for line, want in zip((*lines, mean), (*values, values.mean(axis=0)), strict=True):
            np.testing.assert_array_equal(line.get_xdata(), np.arange(1, values.shape[1] + 1))
            np.testing.assert_array_equal(line.get_ydata(), np.where(want > axes.get_ylim()[0], want, np.nan))
        assert mean.get_color() == INK
        assert axes.get_yscale() == "log"
        assert axes.get_xlabel() == "rank"
        texts = [text.get_text() for text in axes.texts]
        assert f"{values[:, 0].mean():,.4g}" in texts
        assert f"{values[:, 1:].sum(axis=1).mean():,.4g}" in texts
    left, right, lower, _ = figure.axes
    assert left.get_ylim() == right.get_ylim() != lower.get_ylim()
    assert (left.get_xscale(), lower.get_xscale()) == ("linear", "log")
    assert (left.get_title("left"), left.get_ylabel(), right.get_ylabel()) == ("Layer blocks.2", "singular value", "")
    assert (left.get_title("right"), right.get_title("right")) == ("uncentred", "minus class mean")
    assert figure.texts[0].get_text() == "Heading"


def test_lines_end_where_values_count_as_zero():
    values = np.array([[10.0, 2.0, 1e-5, 0.0]])
    axes = draw_spectra({"x": (values, np.zeros((1, 4)))}, [3]).axes
    np.testing.assert_array_equal(axes[0].get_lines()[0].get_ydata(), [10, 2, np.nan, np.nan])
    assert 1.5 < axes[0].get_ylim()[0] < 2
    assert np.isnan(axes[1].get_lines()[0].get_ydata()).all()


def test_more_classes_than_colours_have_no_legend_entries():
    values = np.ones((11, 2))
    axes = draw_spectra({"x": (values, values)}, range(11)).axes[1]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["mean"]


# callback


class _Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.body(inputs)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    validation_step = test_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


INPUTS, TARGETS = _states(80, 6, seed=3)


def _loader(rows: slice = slice(None)) -> DataLoader:
    return DataLoader(TensorDataset(INPUTS[rows], TARGETS[rows]), batch_size=16)


def _trainer(path: Path, callback: Spectrum, **settings: object) -> Trainer:
    return Trainer(
        default_root_dir=path,
        callbacks=[callback],
        accelerator="cpu",
        max_epochs=2,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def _reference_numbers(hidden: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    numbers = {}
    for ending, centred in (("", False), ("_centred", True)):
        largest, others = [], []
        for k in sorted(set(targets.tolist())):
            own = hidden[targets == k].astype(np.float64)
            values = np.linalg.svd(own - own.mean(axis=0) * centred, compute_uv=False)
            largest.append(values[0])
            others.append(sum(values[1:]))
        numbers[f"largest{ending}"] = sum(largest) / len(largest)
        numbers[f"others{ending}"] = sum(others) / len(others)
        numbers[f"others_share{ending}"] = sum(others) / (sum(largest) + sum(others))
    return numbers


def test_numbers_pictures_and_data_reach_loggers_and_files(tmp_path: Path):
    net, layers = _Net(), ["body.0", "output"]
    logger = TensorBoardLogger(tmp_path, name="tb", version=0)
    trainer = _trainer(tmp_path, Spectrum(layers, train_points=32), logger=logger)
    trainer.fit(net, _loader(), _loader(slice(64)))
    trainer.test(net, _loader(slice(30, 80)), verbose=False)

    events = EventAccumulator(logger.log_dir).Reload()
    with torch.no_grad():
        hidden = {"body.0": net.body[0](INPUTS).numpy(), "output": net(INPUTS).numpy()}
    for split, rows in (("val", slice(64)), ("test", slice(30, 80)), ("train", slice(32))):
        assert [image.step for image in events.Images(f"spectrum/{split}")] == [10]
        assert (tmp_path / "figures" / f"spectrum_{split}.png").exists()
        kept = np.load(tmp_path / "figures" / f"spectrum_{split}.npz")
        assert kept["layers"].tolist() == layers
        assert kept["classes"].tolist() == [0, 1, 2]
        for place, layer in enumerate(layers):
            want = _reference_numbers(hidden[layer][rows], TARGETS[rows].numpy())
            for key, number in want.items():
                logged = events.Scalars(f"{split}/spectrum/{layer}/{key}")
                assert [one.value for one in logged] == [pytest.approx(number, rel=1e-4)]
            for ending in ("", "_centred"):
                values = kept[f"values{ending}_{place}"]
                assert values.shape == (3, hidden[layer].shape[1])
                assert values[:, 0].mean() == pytest.approx(want[f"largest{ending}"], rel=1e-4)


def test_one_layer_needs_no_list_and_the_name_is_in_the_keys(tmp_path: Path):
    trainer = _trainer(tmp_path, Spectrum("body.2", name="flatness"), logger=False)
    trainer.validate(_Net(), _loader(), verbose=False)
    keys = {
        f"val/flatness/body.2/{key}{end}" for key in ("largest", "others", "others_share") for end in ("", "_centred")
    }
    assert set(trainer.callback_metrics) == keys


def test_ignored_targets_are_left_out(tmp_path: Path):
    def targets(batch: list[torch.Tensor]) -> torch.Tensor:
        return torch.where(batch[1] == 0, -100, batch[1])

    net, trainer = _Net(), _trainer(tmp_path, Spectrum("body.2", targets=targets), logger=False)
    trainer.validate(net, _loader(), verbose=False)
    with torch.no_grad():
        want = _reference_numbers(net(INPUTS).numpy()[TARGETS > 0], TARGETS[TARGETS > 0].numpy())
    assert trainer.callback_metrics["val/spectrum/body.2/largest"].item() == pytest.approx(want["largest"], rel=1e-5)
    assert np.load(tmp_path / "figures" / "spectrum_val.npz")["classes"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("bias", "targets", "message"),
    [(math.nan, None, r"'body\.2' has values that are not finite"), (0.0, -100, "all targets are -100")],
    ids=["diverged", "nothing left"],
)
def test_what_cannot_be_measured_is_warned_about(tmp_path: Path, bias: float, targets: int | None, message: str):
    net = _Net()
    nn.init.constant_(net.body[2].bias, bias)
    find = None if targets is None else lambda batch: torch.full_like(batch[1], targets)
    trainer = _trainer(tmp_path, Spectrum("body.2", targets=find), logger=False)
    with pytest.warns(UserWarning, match=message):
        trainer.test(net, _loader(), verbose=False)
    assert not (tmp_path / "figures").exists()
