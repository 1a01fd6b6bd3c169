import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mm_lightning.diagnostics import Calibration
from mm_lightning.evaluation.scores import reliability

SCRIPT = Path(__file__).parents[1] / "scripts" / "calibrate_on_two_processes.py"
INPUTS = torch.randn(80, 6, generator=torch.Generator().manual_seed(3))
TARGETS = torch.arange(80) % 3
KEYS = ["ece", "mce", "overconfidence", "nll", "brier"]


class _Net(LightningModule):
    def __init__(self, classes: int = 3, last: nn.Module | None = None, scale: float = 3.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.head = nn.Linear(6, classes)
        nn.init.normal_(self.head.weight, std=scale, generator=torch.Generator().manual_seed(1))
        self.last = nn.Identity() if last is None else last

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.last(self.head(inputs))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self(batch[0])

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _loader(targets: torch.Tensor = TARGETS, rows: slice = slice(None)) -> DataLoader:
    return DataLoader(TensorDataset(INPUTS[rows], targets[rows]), batch_size=16)


def _reference_numbers(logits: torch.Tensor, targets: torch.Tensor, num_bins: int = 15) -> dict[str, float]:
    cells: dict[int, list[tuple[float, bool]]] = {}
    nll = brier = 0.0
    for row, t in zip(logits.detach().double().numpy(), targets.tolist(), strict=True):
        p = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        cells.setdefault(math.ceil(p.max() * num_bins), []).append((p.max(), p.argmax() == t))
        nll -= math.log(p[t]) / len(targets)
        brier += ((p - np.eye(len(p))[t]) ** 2).sum() / len(targets)
    gaps = {b: np.mean([p for p, _ in cell]) - np.mean([right for _, right in cell]) for b, cell in cells.items()}
    share = {b: len(cell) / len(targets) for b, cell in cells.items()}
    return {
        "ece": sum(share[b] * abs(gaps[b]) for b in cells),
        "mce": max(map(abs, gaps.values())),
        "overconfidence": sum(share[b] * gaps[b] for b in cells),
        "nll": nll,
        "brier": brier,
    }


def _logged(trainer: Trainer, split: str = "val") -> dict[str, float]:
    return {key: trainer.callback_metrics[f"{split}/calibration/{key}"].item() for key in KEYS}


def test_numbers_pictures_and_data_reach_loggers_and_files(tmp_path: Path, make_trainer: Callable[..., Trainer]):
    net, logger = _Net(), TensorBoardLogger(tmp_path, name="tb", version=0)
    trainer = make_trainer(Calibration(every_n_epochs=2, train_points=32), logger=logger, max_epochs=3)
    trainer.fit(net, _loader(), _loader(rows=slice(64)))
    trainer.test(net, _loader(rows=slice(30, 80)), verbose=False)

    events = EventAccumulator(logger.log_dir).Reload()
    for split, rows, steps in (("val", slice(64), [10, 15]), ("test", slice(30, 80), [15]), ("train", slice(32), [15])):
        assert [image.step for image in events.Images(f"calibration/{split}")] == steps
        logits = net(INPUTS[rows])
        for key, number in _reference_numbers(logits, TARGETS[rows]).items():
            assert events.Scalars(f"{split}/calibration/{key}")[-1].value == pytest.approx(number, rel=1e-5)
        kept = np.load(tmp_path / "figures" / f"calibration_{split}.npz")
        want = reliability(logits.detach().softmax(dim=1), TARGETS[rows])
        for name, values in want._asdict().items():
            np.testing.assert_allclose(kept[name], values, rtol=1e-6)
        assert (tmp_path / "figures" / f"calibration_{split}.png").exists()


@pytest.mark.parametrize(
    ("last", "settings"),
    [
        (nn.Identity(), {"layer": "head"}),
        (nn.Softmax(dim=1), {"layer": "head"}),
        (nn.Softmax(dim=1), {"probabilities": True}),
    ],
    ids=["named layer", "logits below the output", "probabilities"],
)
def test_logits_and_probabilities_give_the_same(
    last: nn.Module, settings: dict[str, Any], make_trainer: Callable[..., Trainer]
):
    net, trainer = _Net(last=last), make_trainer(Calibration(num_bins=7, **settings))
    trainer.validate(net, _loader(), verbose=False)
    assert _logged(trainer) == pytest.approx(_reference_numbers(net.head(INPUTS), TARGETS, 7), rel=1e-5)


@pytest.mark.parametrize(
    ("last", "probabilities"),
    [(nn.Identity(), False), (nn.Flatten(0), False), (nn.Sigmoid(), True)],
    ids=["(N, 1) logits", "(N,) logits", "(N, 1) probabilities"],
)
def test_one_output_is_the_logit_of_class_one(
    last: nn.Module, probabilities: bool, make_trainer: Callable[..., Trainer]
):
    net, targets = _Net(1, last, scale=0.5), TARGETS % 2
    trainer = make_trainer(Calibration(probabilities=probabilities))
    trainer.validate(net, _loader(targets), verbose=False)
    p = net.head(INPUTS).detach().double().sigmoid()
    want = _reference_numbers(torch.cat([1 - p, p], dim=1).log(), targets)
    assert _logged(trainer) == pytest.approx(want, rel=1e-4)


def test_large_logits_have_a_finite_likelihood(make_trainer: Callable[..., Trainer]):
    net = _Net(scale=3000.0)  # the probability of most targets is zero in float64
    trainer = make_trainer(Calibration())
    trainer.validate(net, _loader(), verbose=False)
    want = nn.functional.cross_entropy(net(INPUTS).double(), TARGETS).item()
    assert want > 1000
    assert trainer.callback_metrics["val/calibration/nll"].item() == pytest.approx(want, rel=1e-5)


def test_ignored_targets_are_left_out(make_trainer: Callable[..., Trainer]):
    net, trainer = _Net(), make_trainer(Calibration())
    trainer.validate(net, _loader(TARGETS.masked_fill(TARGETS == 1, -100)), verbose=False)
    assert _logged(trainer) == pytest.approx(_reference_numbers(net(INPUTS[TARGETS != 1]), TARGETS[TARGETS != 1]))


@pytest.mark.parametrize(
    ("bias", "targets", "message"),
    [
        (math.inf, TARGETS, "layer 'output' has values that are not finite"),
        (0.0, torch.full((80,), -100), "all targets are -100"),
    ],
    ids=["diverged", "nothing left"],
)
def test_what_cannot_be_measured_is_warned_about(
    bias: float, targets: torch.Tensor, message: str, tmp_path: Path, make_trainer: Callable[..., Trainer]
):
    net = _Net()
    nn.init.constant_(net.head.bias, bias)
    with pytest.warns(UserWarning, match=message):
        make_trainer(Calibration()).test(net, _loader(targets), verbose=False)
    assert not (tmp_path / "figures").exists()


def test_misuse_is_named(make_trainer: Callable[..., Trainer]):
    with pytest.raises(ValueError, match="num_bins must be an integer >= 1, got 0"):
        Calibration(num_bins=0)
    with pytest.raises(TypeError, match=r"num_bins must be an integer >= 1, got 7\.5 of type float"):
        Calibration(num_bins=7.5)
    with pytest.raises(TypeError, match="probabilities must be True or False, got 'no' of type str"):
        Calibration(probabilities="no")
    with pytest.raises(ValueError, match=r"sum to 1 in each row, got .* Are they logits"):
        make_trainer(Calibration(probabilities=True)).test(_Net(), _loader(), verbose=False)


@pytest.mark.slow
@pytest.mark.slow
def test_two_processes_see_the_rows_of_both(tmp_path: Path):
    subprocess.run([sys.executable, str(SCRIPT), str(tmp_path)], check=True, cwd=tmp_path)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    weights = torch.load(tmp_path / "weights.pt")
    inputs, targets = torch.load(tmp_path / "data.pt")
    want = _reference_numbers(nn.functional.linear(inputs, weights["head.weight"], weights["head.bias"]), targets)
    for numbers in ranks:
        assert numbers == {f"val/calibration/{key}": pytest.approx(number, rel=1e-5) for key, number in want.items()}
    assert np.load(tmp_path / "figures" / "calibration_val.npz")["counts"].sum() == len(targets)
