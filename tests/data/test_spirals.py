import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.testing import assert_close

from mm_lightning.data import SpiralsDataModule, TensorDataModule, two_spirals
from mm_lightning.mixup.source import PlanSource

ARM_END = 780 * 2 * math.pi / 360


def sorted_rows(points: Tensor) -> list[list[float]]:
    return sorted(points.tolist())


def set_up(**settings: Any) -> SpiralsDataModule:
    datamodule = SpiralsDataModule(**settings)
    datamodule.setup()
    return datamodule


def splits_of(datamodule: SpiralsDataModule) -> dict[str, tuple[Tensor, ...]]:
    return {
        "train": datamodule.train_dataloader().tensors,
        "val": datamodule.val_dataloader().tensors,
        "test": datamodule.test_dataloader().tensors,
    }


# --- the points ------------------------------------------------------------------------------------------------------


def _reference_spirals(draws: list[list[float]], noise: float) -> list[list[float]]:
    """The formula, point by point."""
    class_0 = []
    for u, v, w in draws:
        n = math.sqrt(u) * 780 * (2 * math.pi) / 360
        class_0.append([-math.cos(n) * n + v * noise, math.sin(n) * n + w * noise])
    return class_0 + [[-x, -y] for x, y in class_0]


def test_points_follow_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = [[0.0, 0.5, 0.25], [0.25, 0.0, 1.0], [0.7, 0.9, 0.1], [0.99, 0.3, 0.6]]

    class Given:
        def random(self, size: tuple[int, int]) -> np.ndarray:
            assert size == (4, 3)
            return np.array(draws)

    monkeypatch.setattr("mm_lightning.data.spirals._rng", lambda seed, stream: Given())
    points, targets = two_spirals(num_points=4, noise=0.8, seed=0)
    assert (points.dtype, targets.dtype) == (torch.float32, torch.int64)
    assert_close(points.double(), torch.tensor(_reference_spirals(draws, 0.8), dtype=torch.float64), rtol=1e-6, atol=0)
    # by hand: u = 0 is the origin moved by the noise; u = 1/4 is 390 degrees, at radius 13 pi / 6
    assert_close(points[0], torch.tensor([0.4, 0.2]))
    radius = 13 * math.pi / 6
    assert_close(points[1], torch.tensor([-math.sqrt(3) / 2 * radius, radius / 2 + 0.8]))
    assert targets.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_without_noise_the_radius_is_the_angle() -> None:
    points, _ = two_spirals(num_points=500, noise=0.0, seed=3)
    x, y = points[:500].double().T
    radius = torch.hypot(x, y)
    assert_close(x, -radius.cos() * radius, rtol=0, atol=3e-5)
    assert_close(y, radius.sin() * radius, rtol=0, atol=3e-5)
    assert radius.max() < ARM_END


def test_class_1_is_the_mirror_image_of_class_0() -> None:
    points, targets = two_spirals(num_points=100, noise=0.9, seed=3)
    assert points.shape == (200, 2)
    assert torch.equal(points[100:], -points[:100])
    assert targets.tolist() == [0] * 100 + [1] * 100


def test_squared_radius_is_uniform() -> None:
    num_points = 20_000
    points, _ = two_spirals(num_points, noise=0.0, seed=5)
    share = points[:num_points].double().square().sum(1) / ARM_END**2  # u again
    assert abs(share.mean() - 1 / 2) < 4 * math.sqrt(1 / 12 / num_points)
    # u ** 2 has mean 1 / 3 and variance 1 / 5 - 1 / 9
    assert abs(share.square().mean() - 1 / 3) < 4 * math.sqrt(4 / 45 / num_points)


def test_noise_is_uniform_and_one_sided() -> None:
    num_points, noise = 20_000, 0.9
    noisy, clean = (two_spirals(num_points, noise=level, seed=5)[0].double()[:num_points] for level in (noise, 0.0))
    shift = (noisy - clean) / noise
    assert shift.min() > -1e-5
    assert shift.max() < 1 + 1e-5
    for column in shift.T:
        assert abs(column.mean() - 1 / 2) < 4 * math.sqrt(1 / 12 / num_points)
        assert abs(column.square().mean() - 1 / 3) < 4 * math.sqrt(4 / 45 / num_points)
    # both coordinates and the radius are drawn independently: a correlation of 0 has a standard error of 1 / sqrt(N)
    correlation = torch.corrcoef(torch.stack([*shift.T, clean.square().sum(1)]))
    assert (correlation - torch.eye(3)).abs().max() < 4 / math.sqrt(num_points)


def test_points_follow_the_seed_alone() -> None:
    first, again, other = (two_spirals(num_points=50, noise=0.9, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.isclose(first, other).any()


# --- the data module -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_points", "sizes"), [(2000, [3240, 360, 400]), (3, [4, 1, 1]), (7, [12, 1, 1]), (100, [162, 18, 20])]
)
def test_splits_are_81_9_and_10_percent(num_points: int, sizes: list[int]) -> None:
    splits = splits_of(set_up(num_points=num_points))
    assert [len(points) for points, _ in splits.values()] == sizes
    assert [len(targets) for _, targets in splits.values()] == sizes


def test_splits_hold_each_point_once_with_its_own_target() -> None:
    points, targets = two_spirals(num_points=300, noise=0.5, seed=4)
    splits = splits_of(set_up(num_points=300, noise=0.5, seed=4))
    target_of = {tuple(point): target for point, target in zip(points.tolist(), targets.tolist(), strict=True)}
    assert len(target_of) == 600
    rows = [tuple(row) for split, _ in splits.values() for row in split.tolist()]
    assert len(rows) == len(set(rows)) == 600
    assert [target_of[row] for row in rows] == [target for _, own in splits.values() for target in own.tolist()]


def test_defaults_are_the_original_settings() -> None:
    points = torch.cat([points for points, _ in splits_of(set_up()).values()])
    assert sorted_rows(points) == sorted_rows(two_spirals(num_points=2000, noise=0.9, seed=0)[0])


def test_split_is_drawn_apart_from_the_points() -> None:
    # 0 correlation between a point's place in the split and its radius, 4 standard errors; a split drawn from the
    # points' own numbers would be tied to the radius
    splits = splits_of(set_up(num_points=5000, seed=6))
    radius = torch.cat([points for points, _ in splits.values()]).double().norm(dim=1)
    assert abs(torch.corrcoef(torch.stack([radius, torch.arange(10_000.0).double()]))[0, 1]) < 4 / 100
    # of 1000 test points, drawn without replacement from 10000 of which half are of class 1
    assert abs(int(splits["test"][1].sum()) - 500) < 4 * math.sqrt(1000 * 0.25 * 9000 / 9999)


def test_points_split_and_mixing_draw_from_different_streams_of_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[tuple[int, ...]] = []
    philox = np.random.Philox

    def noted(key: np.ndarray, **settings: Any) -> np.random.Philox:
        keys.append(tuple(key.tolist()))
        return philox(key=key, **settings)

    monkeypatch.setattr(np.random, "Philox", noted)
    set_up(num_points=5, seed=7)
    PlanSource(["input"], seed=7).draw(batch_size=10)
    assert len(keys) == len(set(keys)) == 4
    assert {key[0] for key in keys} == {7}


def test_split_follows_the_seed() -> None:
    def training_points(**settings: Any) -> list[list[float]]:
        return sorted_rows(splits_of(set_up(num_points=100, **settings))["train"][0])

    assert training_points(seed=1) == training_points(seed=1, batch_size=7, eval_batch_size=3)
    assert training_points(seed=1) != training_points(seed=2)
    assert training_points(seed=2, data_seed=1) == training_points(seed=1)


def test_same_points_can_be_split_alike_while_the_training_order_differs() -> None:
    first, second = (set_up(num_points=100, seed=seed, data_seed=0) for seed in (1, 2))
    assert torch.equal(first.train_dataloader().tensors[0], second.train_dataloader().tensors[0])
    assert list(first.train_dataloader().sampler) != list(second.train_dataloader().sampler)


def test_batches_are_points_and_targets() -> None:
    datamodule = set_up()
    train = [(points.shape, targets.shape) for points, targets in datamodule.train_dataloader()]
    assert train == [((20, 2), (20,))] * 162
    loaders = [datamodule.val_dataloader(), datamodule.test_dataloader(), datamodule.predict_dataloader()]
    assert [[points.shape for points, _ in loader] for loader in loaders] == [[(360, 2)], [(400, 2)], [(400, 2)]]
    points, targets = next(iter(datamodule.train_dataloader()))
    assert (points.dtype, targets.dtype) == (torch.float32, torch.int64)


def test_classes_are_two() -> None:
    assert SpiralsDataModule.num_classes == 2
    assert SpiralsDataModule.class_names == ("0", "1")
    assert set(set_up().train_dataloader().tensors[1].tolist()) == {0, 1}


def test_global_random_state_is_neither_read_nor_moved() -> None:
    def read() -> list[list[list[float]]]:
        datamodule = set_up(num_points=50)
        loaders = [datamodule.train_dataloader(), datamodule.val_dataloader(), datamodule.test_dataloader()]
        return [points.tolist() for loader in loaders for points, _ in loader]

    states = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()  # noqa: NPY002
    try:
        first = read()
        assert torch.equal(torch.get_rng_state(), states[0])
        assert repr(np.random.get_state()) == states[1]  # noqa: NPY002
        assert random.getstate() == states[2]
        torch.rand(1)
        assert read() == first
    finally:
        torch.set_rng_state(states[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_points": 2}, r"^num_points must be an integer >= 3, got 2\. Fewer leave a split without points\."),
        ({"num_points": -5}, r"^num_points must be an integer >= 3, got -5\."),
        ({"noise": -0.1}, r"^noise must be a finite number >= 0, got -0\.1\. 0 leaves the points on the spirals\."),
        ({"noise": math.nan}, r"^noise must be a finite number >= 0, got nan\."),
        ({"noise": math.inf}, r"^noise must be a finite number >= 0, got inf\."),
        ({"batch_size": 0}, r"^batch_size must be an integer >= 1, got 0\. 1 yields single points\.$"),
        ({"eval_batch_size": 0}, r"^eval_batch_size must be an integer >= 1, got 0\."),
        ({"seed": -1}, r"^seed must be an integer in \[0, 2\*\*32\), got -1\."),
        ({"seed": 2**32}, r"^seed must be an integer in \[0, 2\*\*32\), got 4294967296\."),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpiralsDataModule(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_points": 2.5}, "an integer >= 3, got 2.5 of type float. Fewer leave a split without points."),
        ({"noise": "0"}, "a finite number >= 0, got '0' of type str. 0 leaves the points on the spirals."),
        ({"data_seed": 0.5}, "an integer in [0, 2**32), got 0.5 of type float. Give 0, for example."),
        ({"data_seed": True}, "an integer in [0, 2**32), got True of type bool. Give 0, for example."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_of_another_type_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError) as refusal:
        SpiralsDataModule(**settings)
    assert str(refusal.value) == f"{next(iter(settings))} must be {message}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_points": 0}, r"^num_points must be an integer >= 1, got 0\. It counts the points of one class\."),
        ({"noise": -1.0}, r"^noise must be a finite number >= 0, got -1\.0\."),
        ({"seed": -1}, r"^seed must be an integer in \[0, 2\*\*32\), got -1\."),
    ],
)
def test_points_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        two_spirals(**{"num_points": 10, "noise": 0.9, "seed": 0} | settings)


# --- what is common to all data modules ------------------------------------------------------------------------------


class Recorder(LightningModule):
    """A linear classifier that notes the points of each training batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.seen: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        points, targets = batch
        self.seen.append(points)
        return nn.functional.cross_entropy(self.linear(points), targets)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_each_epoch_sees_each_training_point_once_in_a_new_order(make_trainer: Any) -> None:
    module, datamodule = Recorder(), SpiralsDataModule(num_points=50, batch_size=20)
    trainer: Trainer = make_trainer(max_epochs=2, limit_val_batches=0)
    trainer.fit(module, datamodule=datamodule)
    assert [len(points) for points in module.seen] == [20, 20, 20, 20, 1] * 2
    first, second = torch.cat(module.seen[:5]), torch.cat(module.seen[5:])
    assert not torch.equal(first, second)
    assert sorted_rows(first) == sorted_rows(second) == sorted_rows(datamodule.train_dataloader().tensors[0])


def test_order_of_one_seed_is_not_that_of_the_next_seed_an_epoch_earlier() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = set_up(num_points=50, seed=seed).train_dataloader().sampler
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(seed=0, epoch=1) != order(seed=1, epoch=0)


def test_loader_before_setup_is_refused_in_the_name_of_the_data() -> None:
    with pytest.raises(RuntimeError, match=r"^SpiralsDataModule holds no data yet\. Call setup\(\)"):
        SpiralsDataModule().val_dataloader()


def test_data_module_of_ones_own_says_only_how_to_load() -> None:
    class Numbers(TensorDataModule):
        def load_splits(self) -> dict[str, tuple[Tensor, Tensor]]:
            numbers = torch.arange(6).unsqueeze(1)
            return {name: (numbers + 10 * i, numbers[:, 0]) for i, name in enumerate(("train", "val", "test"))}

    datamodule = Numbers(batch_size=4, eval_batch_size=5, seed=0)
    datamodule.setup()
    assert [points.flatten().tolist() for points, _ in datamodule.val_dataloader()] == [[10, 11, 12, 13, 14], [15]]
    assert [targets.tolist() for _, targets in datamodule.predict_dataloader()] == [[0, 1, 2, 3, 4], [5]]
    assert [len(points) for points, _ in datamodule.train_dataloader()] == [4, 2]
    with pytest.raises(ValueError, match=r"^batch_size must be an integer >= 1, got 0\. 1 yields single rows\.$"):
        Numbers(batch_size=0, eval_batch_size=5, seed=0)


def test_data_module_without_load_splits_is_refused() -> None:
    with pytest.raises(TypeError, match="load_splits"):
        TensorDataModule(batch_size=1, eval_batch_size=1, seed=0)  # type: ignore[abstract]
