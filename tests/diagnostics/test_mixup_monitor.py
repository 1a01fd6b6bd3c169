import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from classifier import LAYERS, Classifier, Network, Plans, assert_same_weights, batches, loader, mixed_loss, mixup
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.collections import LineCollection, PathCollection
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.testing import assert_close

from mm_lightning import ManifoldMixupCallback, MixPlan
from mm_lightning.diagnostics import MixupMonitor
from mm_lightning.diagnostics.mixing_figure import Mixing, draw_mixing, expected_shares
from mm_lightning.fit import Batch

MakeTrainer = Callable[..., pl.Trainer]
EMPTY = np.empty(0)


# compute


@pytest.mark.parametrize(
    ("layers", "probability", "weights", "want"),
    [
        (["a", "b"], 1.0, None, {"a": 0.5, "b": 0.5, "unmixed": 0.0}),
        (["a", "b"], 0.8, [1, 3], {"a": 0.2, "b": 0.6, "unmixed": 0.2}),
        ([], 0.0, None, {"unmixed": 1.0}),
    ],
    ids=["equal", "weighted", "no layers"],
)
def test_expected_shares_by_hand(layers: list[str], probability: float, weights: Any, want: dict[str, float]):
    got = expected_shares(layers, probability, weights)
    assert list(got) == list(want)
    assert got == pytest.approx(want, abs=1e-12)


# draw


def _mixing(**settings: Any) -> Mixing:
    rows = {
        "alpha": 2.0,
        "lam": np.array([0.1, 0.15, 0.5, 0.9]),
        "counts": {"a": 3, "b": 1, "unmixed": 0},
        "expected": {"a": 0.5, "b": 0.5, "unmixed": 0.0},
        "losses": {"a": np.array([1.0, 2.0, 6.0]), "b": np.array([4.0]), "unmixed": EMPTY},
    }
    return Mixing(**{**rows, **settings})


def test_histogram_and_density_share_their_scale():
    axes = draw_mixing(_mixing(), num_bins=5).axes[0]
    # two of four rows in the first bin, of width 1/5: 2/4 / (1/5) = 2.5
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([2.5, 0, 1.25, 0, 1.25])
    assert [bar.get_x() for bar in axes.patches] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    x, density = axes.lines[0].get_data()
    assert_close(density, np.asarray(6 * x * (1 - x), np.float32))  # Beta(2, 2)
    assert axes.get_ylim()[1] > 2.5
    assert axes.get_legend().get_texts()[0].get_text() == "Beta(2, 2)"
    assert axes.get_title("right") == "4 draws"


def test_density_without_end_does_not_stretch_the_axis():
    lam = np.concatenate([np.full(5, 0.01), np.full(5, 0.99)])
    axes = draw_mixing(_mixing(alpha=0.1, lam=lam), num_bins=20).axes[0]
    assert axes.get_ylim()[1] == pytest.approx(1.25 * 10)  # half of the rows in a bin of width 1/20
    assert np.isfinite(axes.lines[0].get_ydata()).all()


def test_shares_stand_beside_what_was_expected():
    axes = draw_mixing(_mixing()).axes[1]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]  # nobody expected "unmixed"
    band_a, bar_a, band_b, bar_b = axes.patches
    assert (bar_a.get_width(), bar_b.get_width()) == (75, 25)
    for band in (band_a, band_b):  # 50 ± 2 * 100 * sqrt(1/2 * 1/2 / 4)
        assert (band.get_x(), band.get_width()) == pytest.approx((0, 100))
    strokes = [line for line in axes.collections if isinstance(line, LineCollection)]
    assert [stroke.get_segments()[0][:, 0].tolist() for stroke in strokes] == [[50, 50], [50, 50]]
    assert bar_a.get_y() < bar_b.get_y()
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # so the first layer is at the top
    assert axes.get_xlabel() == "% of 4 batches"


def test_losses_are_drawn_with_mean_and_standard_deviation():
    losses = {"a": np.array([1.0, 2.0, 6.0, math.nan, math.inf]), "b": np.array([4.0]), "unmixed": EMPTY}
    axes = draw_mixing(_mixing(losses=losses)).axes[2]
    dots = [part.get_offsets()[:, 0].tolist() for part in axes.collections if isinstance(part, PathCollection)]
    assert dots == [[1.0, 2.0, 6.0], [4.0]]
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[3.0, 0.0]], [[4.0, 1.0]]]
    bars = [part.get_segments()[0][:, 0].tolist() for part in axes.collections if isinstance(part, LineCollection)]
    spread = math.sqrt((4 + 1 + 9) / 3)
    assert bars == [pytest.approx([3 - spread, 3 + spread]), [4.0, 4.0]]
    assert axes.get_ylim() == draw_mixing(_mixing()).axes[1].get_ylim()


def test_what_is_missing_is_said():
    nothing = {"unmixed": 4}, {"unmixed": 1.0}, {"unmixed": EMPTY}
    ratios, shares, losses = draw_mixing(Mixing(0.0, EMPTY, *nothing)).axes
    assert [text.get_text() for text in ratios.texts] == ["nothing was mixed"]
    assert [label.get_text() for label in shares.get_yticklabels()] == ["unmixed"]
    assert [text.get_text() for text in losses.texts] == ["training_step gave none"]


def test_long_names_keep_their_last_parts():
    names = "network.encoder.layers.11.mlp", "a_name_of_one_part_that_is_long", "twenty_letters_wide."
    layers = dict.fromkeys(names, 1)
    mixing = _mixing(counts=layers, expected=layers, losses=dict.fromkeys(names, EMPTY))
    labels = [label.get_text() for label in draw_mixing(mixing).axes[1].get_yticklabels()]
    assert labels == ["…layers.11.mlp", "…" + names[1][-19:], names[2]]


# callback


def _still() -> Classifier:
    """A classifier whose weights stay as they are, so that its losses can be computed afterwards."""
    module = Classifier()
    module.lr = 0.0
    return module


def _fit(make_trainer: MakeTrainer, monitor: MixupMonitor, first: bool = False, **settings: Any) -> tuple[Any, Any]:
    mixing = {key: settings.pop(key) for key in ("per_sample", "probability", "layer_weights") if key in settings}
    callback = mixup(**mixing)
    plans = Plans(callback)
    trainer = make_trainer(*([monitor, callback] if first else [callback, monitor]), plans, **settings)
    trainer.fit(_still(), loader())
    return trainer, plans.plans


def _reference_losses(plans: list[MixPlan]) -> dict[str, list[float]]:
    losses = defaultdict(list)
    for plan, (x, y) in zip(plans, batches(), strict=True):
        losses[plan.layer or "unmixed"].append(float(mixed_loss(Network(), x, y, plan).detach()))
    return dict(losses)


@pytest.mark.parametrize("first", [True, False], ids=["monitor first", "monitor last"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"per_sample": True}, {"probability": 0.5}, {"accumulate_grad_batches": 2}],
    ids=["per batch", "per sample", "half of the batches", "accumulated"],
)
def test_numbers_are_means_over_the_epoch(make_trainer: MakeTrainer, first: bool, settings: dict[str, Any]):
    trainer, plans = _fit(make_trainer, MixupMonitor(every_n_epochs=3), first, max_epochs=3, **settings)
    want = _reference_losses(plans[10:])  # of the last epoch's five batches
    assert len(want) > 1
    # of a layer that this epoch did not draw Lightning keeps the number of an earlier one
    got = {layer: float(trainer.callback_metrics[f"mixup/loss_at/{layer}"]) for layer in want}
    assert got == pytest.approx({layer: np.mean(losses) for layer, losses in want.items()}, rel=1e-6)
    with np.load(Path(trainer.default_root_dir, "figures", "mixup_monitor_epoch.npz")) as arrays:
        layers = arrays["layers"].tolist()
        assert layers == [*LAYERS, "unmixed"]
        lams = [plan.lam if settings.get("per_sample") else plan.lam[:1] for plan in plans[10:] if plan.mixes]
        assert_close(arrays["lam"], torch.cat(lams).double().numpy())
        assert arrays["counts"].tolist() == [len(want.get(layer, [])) for layer in layers]
        half = settings.get("probability", 1.0)
        assert arrays["expected"].tolist() == pytest.approx([half / 3] * 3 + [1 - half])
        for layer, losses in want.items():
            assert_close(
                arrays["loss"][arrays["loss_layer"] == layers.index(layer)], np.array(losses), rtol=1e-6, atol=0
            )


def test_pictures_and_numbers_reach_tensorboard(make_trainer: MakeTrainer, tmp_path: Path):
    logger = TensorBoardLogger(tmp_path)
    monitor = MixupMonitor(every_n_epochs=2, dirpath=tmp_path / "there", name="mixing")
    _, plans = _fit(make_trainer, monitor, max_epochs=4, logger=logger, layer_weights=[1, 2, 1])
    events = EventAccumulator(logger.log_dir).Reload()
    assert [image.step for image in events.Images("mixing/epoch")] == [10, 20]
    wanted = defaultdict(list)
    for epoch in range(4):
        for layer, losses in _reference_losses(plans[5 * epoch : 5 * epoch + 5]).items():
            wanted[f"mixup/loss_at/{layer}"].append((5 * epoch + 4, np.mean(losses)))
    for tag, want in wanted.items():
        found = events.Scalars(tag)
        assert [event.step for event in found] == [step for step, _ in want]
        assert [event.value for event in found] == pytest.approx([mean for _, mean in want], rel=1e-5)
    assert {path.name for path in (tmp_path / "there").iterdir()} == {"mixing_epoch.png", "mixing_epoch.npz"}
    with np.load(tmp_path / "there" / "mixing_epoch.npz") as arrays:
        assert arrays["expected"].tolist() == [0.25, 0.5, 0.25, 0]


@pytest.mark.parametrize("alpha", [0.0, 1.0], ids=["off", "one row in each batch"])
def test_batches_that_are_not_mixed_count_as_unmixed(make_trainer: MakeTrainer, alpha: float):
    trainer = make_trainer(mixup(alpha=alpha), MixupMonitor())
    batch_size = 8 if alpha == 0 else 1
    if alpha:
        with pytest.warns(UserWarning, match="one row has no partner"):
            trainer.fit(_still(), loader(40, batch_size))
    else:
        trainer.fit(_still(), loader(40, batch_size))
    unmixed = MixPlan.unmixed(8)
    want = np.mean(_reference_losses([unmixed] * 5)["unmixed"])
    assert {key: float(value) for key, value in trainer.callback_metrics.items()} == pytest.approx(
        {"mixup/loss_at/unmixed": want}, rel=1e-6
    )


class _Manual(Classifier):
    """Optimizes by itself and returns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


def test_steps_without_a_loss_count_for_their_layer(make_trainer: MakeTrainer, tmp_path: Path):
    callback = mixup()
    trainer = make_trainer(callback, MixupMonitor())
    trainer.fit(_Manual(), loader())
    assert not trainer.callback_metrics
    with np.load(tmp_path / "figures" / "mixup_monitor_epoch.npz") as arrays:
        assert dict(zip(arrays["layers"].tolist(), arrays["counts"].tolist(), strict=True)) == callback.summary()
        assert arrays["lam"].shape == (5,)
        assert not arrays["loss"].size


def test_a_step_reads_no_number_from_the_device():
    # on the meta device there is none to read: whatever waited for one would raise
    callback, monitor = ManifoldMixupCallback(), MixupMonitor()
    callback._batch = Batch({}, 8, plan=MixPlan("first", *torch.empty(2, 8, device="meta")))
    monitor._mixup = callback
    for _ in range(3):
        monitor.on_train_batch_end(None, None, {"loss": torch.empty((), device="meta")}, None, 0)
    assert monitor._counts == {"first": 3}
    assert (len(monitor._lam), len(monitor._losses)) == (3, 3)


def test_training_is_untouched(make_trainer: MakeTrainer):
    modules = []
    for monitors in ([], [MixupMonitor()]):
        modules.append(Classifier())
        torch.manual_seed(3)
        make_trainer(mixup(), *monitors, max_epochs=2).fit(modules[-1], loader())
        modules[-1].state = torch.get_rng_state()
    assert_same_weights(*modules, atol=0)
    assert torch.equal(modules[0].state, modules[1].state)


def test_an_interrupted_epoch_is_forgotten(make_trainer: MakeTrainer, tmp_path: Path):
    class Stops(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            if args[-1] == 2:
                raise RuntimeError("boom")

    monitor = MixupMonitor()
    with pytest.raises(RuntimeError, match="boom"):
        make_trainer(mixup(), monitor, Stops()).fit(_still(), loader())
    assert not monitor._lam
    assert not monitor._losses
    assert not (tmp_path / "figures").exists()


def test_a_dev_run_writes_no_files(make_trainer: MakeTrainer, tmp_path: Path):
    monitor = MixupMonitor()
    trainer = make_trainer(mixup(), monitor, fast_dev_run=True)
    trainer.fit(_still(), loader())
    assert len(trainer.callback_metrics) == 1
    assert not monitor._losses  # nothing is kept once it is drawn
    assert not (tmp_path / "figures").exists()


def test_a_trainer_without_mixup_is_refused(make_trainer: MakeTrainer):
    trainer = make_trainer(MixupMonitor())
    with pytest.raises(ValueError, match=r"none\. Add one, Trainer\(callbacks=\[ManifoldMixupCallback\(\), MixupMon"):
        trainer.fit(_still(), loader())


def test_a_second_monitor_is_refused(make_trainer: MakeTrainer):
    with pytest.raises(ValueError, match="has 2 MixupMonitors, which would log the same keys"):
        make_trainer(mixup(), MixupMonitor(), MixupMonitor(name="other")).fit(_still(), loader())


@pytest.mark.parametrize("setting", ["every_n_epochs", "num_bins"])
def test_settings_below_one_are_refused(setting: str):
    with pytest.raises(ValueError, match=f"{setting} must be an integer >= 1, got 0"):
        MixupMonitor(**{setting: 0})
    with pytest.raises(TypeError, match=f"{setting} must be an integer >= 1, got 'all' of type str"):
        MixupMonitor(**{setting: "all"})
