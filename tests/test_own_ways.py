"""The Python of docs/methods/own.md, run as it stands there, and whether it does what is said there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from mm_lightning import ManifoldMixupCallback
from mm_lightning.mixup import FixedRatio, PlanSource, interpolate

PAGE = (Path(__file__).parents[1] / "docs" / "methods" / "own.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
HEADINGS = ["pairing", "ratio", "interpolation", "interpolation by row", "schedule", "loop"]

MakeTrainer = Callable[..., pl.Trainer]


class Module(pl.LightningModule):
    """A module as a reader has one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 2

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(torch.tanh(self.layer1(batch[0]))), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(block: str, known: dict[str, Any]) -> None:
    exec(compile(block, "own.md", "exec", dont_inherit=True), known)  # without this file's __future__


@pytest.fixture(scope="module")
def names() -> dict[str, dict[str, Any]]:
    """What each block but the last leaves, by its heading; later ones know the earlier."""
    known: dict[str, Any] = {"__name__": "own"}
    left = {}
    for heading, block in zip(HEADINGS[:-1], BLOCKS[:-1], strict=True):
        run(block, known)
        left[heading] = dict(known)
    return left


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(64, 4, generator=generator)
    return DataLoader(TensorDataset(inputs, torch.randint(0, 3, (64,), generator=generator)), batch_size=16)


def fit(make_trainer: MakeTrainer, callback: ManifoldMixupCallback, *watching: pl.Callback, epochs: int = 1) -> None:
    make_trainer(callback, *watching, max_epochs=epochs).fit(Module(), data())


class Plans(pl.Callback):
    """Keeps each batch with its settled plan."""

    def __init__(self, callback: ManifoldMixupCallback) -> None:
        self.callback, self.kept = callback, []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.kept.append((batch, self.callback.plan))


def test_the_page_has_these_examples() -> None:
    assert len(BLOCKS) == len(HEADINGS)
    pairing = BLOCKS[0].split("\n\n\n")[1].splitlines()
    assert len([line for line in pairing if line]) <= 10


def test_every_way_of_the_page_trains(names: Any, make_trainer: MakeTrainer) -> None:
    for heading in ("pairing", "ratio", "interpolation", "interpolation by row", "schedule"):
        callback = names[heading]["mixup"]
        callback.schedule = None if callback.schedule == "auto" else callback.schedule  # which mixes to the end
        fit(make_trainer, callback, epochs=2)
        assert callback.summary()["unmixed"] == 0
    assert names["interpolation by row"]["mixup"].per_sample
    assert not names["interpolation"]["mixup"].per_sample


def test_partners_are_among_the_farthest(names: Any, make_trainer: MakeTrainer) -> None:
    callback = ManifoldMixupCallback(layers="input", pairing=names["pairing"]["Far"](share=0.25))
    plans = Plans(callback)
    fit(make_trainer, callback, plans)
    assert len(plans.kept) == 4
    drawn = []
    for (inputs, _), plan in plans.kept:
        for row, partner in enumerate(plan.partner.tolist()):
            distances = [float((inputs[row] - other).square().sum()) for other in inputs]
            place = sorted(range(16), key=lambda other, d=distances: -d[other]).index(partner)
            drawn.append(place)
    assert set(drawn) == {0, 1, 2, 3}  # a quarter of 16 rows


def test_pairs_across_classes_are_mixed_less(names: Any, make_trainer: MakeTrainer) -> None:
    callback = names["ratio"]["mixup"]
    plans = Plans(callback)
    fit(make_trainer, callback, plans)
    same = torch.cat([batch[1] == batch[1][plan.partner] for batch, plan in plans.kept])
    lam = torch.cat([plan.lam for _, plan in plans.kept])
    assert float(lam[~same].min()) >= 0.8
    assert float(lam[same].min()) < 0.5
    even = names["ratio"]["even"].ratio
    assert [0.4 <= even(np.random.default_rng(seed), 8)[0] <= 0.6 for seed in range(9)] == [True] * 9


def test_features_are_exchanged_and_counted(names: Any) -> None:
    hidden = torch.arange(12.0).view(4, 3) + 1
    for way in (names["interpolation"]["exchanged"], names["interpolation by row"]["ExchangedByRow"]()):
        source = PlanSource(["input"], ratio=FixedRatio(0.5), interpolation=way, seed=1)
        mixed, plan = interpolate(hidden, source.draw(4))
        assert plan.lam.shape == (4,)
        for row, partner in enumerate(plan.partner.tolist()):
            is_own = mixed[row] == hidden[row]
            assert torch.equal(mixed[row], torch.where(is_own, hidden[row], hidden[partner]))
            if row != partner:
                assert_close(plan.lam[row], is_own.float().mean())


def test_an_interpolation_of_other_rows_is_refused(make_trainer: MakeTrainer) -> None:
    def centred(hidden: Tensor, plan: Any) -> tuple[Tensor, Tensor]:
        return hidden - hidden.mean(dim=0), plan.lam

    with pytest.raises(ValueError, match="a row of other rows than the row itself and its partner"):
        fit(make_trainer, ManifoldMixupCallback(layers="input", interpolation=centred))


def test_a_weight_for_each_row_is_to_be_announced(names: Any, make_trainer: MakeTrainer) -> None:
    by_row = names["interpolation by row"]["ExchangedByRow"]()
    with pytest.raises(ValueError, match="which it must say by an attribute per_sample = True"):
        fit(make_trainer, ManifoldMixupCallback(layers="input", interpolation=lambda h, plan: by_row(h, plan)))


def test_the_schedules_are_what_they_say(names: Any, make_trainer: MakeTrainer) -> None:
    fading = names["schedule"]["fading"]
    fit(make_trainer, fading, epochs=10)
    mixed = 40 - fading.summary()["unmixed"]
    assert 20 <= mixed <= 33  # of 40, 2 / 3 expected, and 4 standard deviations of 2.4 on either side
    by_layer = names["schedule"]["mixup"]
    plans = Plans(by_layer)
    fit(make_trainer, by_layer, plans, epochs=6)
    layers = [plan.layer for _, plan in plans.kept]
    assert set(layers[:4]) == {"input"}
    assert set(layers[4:]) == {"input", "layer1"}


def test_the_loop_has_the_gradient_of_the_formula(names: Any) -> None:
    inputs, targets = next(iter(data()))
    module = Module()
    known = {**names["schedule"], "inputs": inputs, "targets": targets, "block1": module.layer1, "head": module.head}
    run(BLOCKS[-1], known)
    plan, weight = known["plan"], known["plan"].lam
    hidden = module.layer1(inputs)
    taken = known["hidden"] == hidden
    assert_close(weight, taken.float().mean(dim=1))
    logits = module.head(torch.where(taken, hidden, hidden[plan.partner]))
    losses = [F.cross_entropy(logits, labels, reduction="none") for labels in (targets, targets[plan.partner])]
    (expected,) = torch.autograd.grad((weight * losses[0] + (1 - weight) * losses[1]).mean(), [module.layer1.weight])
    assert_close(module.layer1.weight.grad, expected)
