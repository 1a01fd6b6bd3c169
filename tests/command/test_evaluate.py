"""What mm-evaluate measures beyond a module's own test, prints and keeps."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mm_lightning import MixableModule
from mm_lightning.command.evaluate import evaluate, main
from mm_lightning.command.loading import load
from mm_lightning.data.tensor_data_module import TensorDataModule
from mm_lightning.evaluation import TemperatureScaling, scores
from mm_lightning.models import mlp_blocks

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
    pytest.mark.filterwarnings("ignore:The `srun` command is available"),
]

MakeTrainer = Callable[..., pl.Trainer]
TRAINER = {"_target_": "lightning.pytorch.Trainer", "accelerator": "cpu", "devices": 1, "enable_model_summary": False}


class Blobs(TensorDataModule):
    """Two Gaussian clouds, side by side."""

    num_classes = 2
    input_shape = (2,)

    def __init__(self, noise: float = 1.0, seed: int = 1) -> None:
        super().__init__(batch_size=100, eval_batch_size=100, seed=seed)
        self.noise = noise

    def load_splits(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        rng, splits = torch.Generator().manual_seed(self.seed), {}
        for name in ("train", "val", "test"):
            targets = torch.arange(400) % 2
            middle = torch.stack([2.0 * targets - 1, torch.zeros(400)], dim=1)
            splits[name] = (middle + self.noise * torch.randn(400, 2, generator=rng), targets)
        return splits


DATA = {"_target_": f"{__name__}.Blobs", "noise": 1.0}


class Regression(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 1)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/mse", (self.net(batch[0])[:, 0] - batch[1]).square().mean())


class RegressionByForward(Regression):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.net(inputs)


class Numbers(pl.LightningDataModule):
    def test_dataloader(self) -> DataLoader[Any]:
        inputs = torch.linspace(-1, 1, 40).reshape(20, 2)
        return DataLoader(TensorDataset(inputs, inputs.sum(dim=1)), batch_size=10)


class NumbersWithIntegers(pl.LightningDataModule):
    def __init__(self, largest: int) -> None:
        super().__init__()
        self.largest = largest

    def train_dataloader(self) -> DataLoader[Any]:
        inputs = torch.linspace(-1, 1, 40).reshape(20, 2)
        integers = torch.arange(20) % 2 * self.largest
        return DataLoader(TensorDataset(inputs, inputs.sum(dim=1), integers), batch_size=10)

    test_dataloader = train_dataloader


def _folder(folder: Path, model: dict[str, Any], data: dict[str, Any], weights: dict[str, Any]) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    torch.save({"state_dict": weights}, folder / "checkpoints" / "best.ckpt")
    config = {"seed": 1, "run_dir": str(folder), "fast_cpu": False, "max_epochs": 2, "data": data, "model": model}
    OmegaConf.save({**config, "trainer": {**TRAINER, "default_root_dir": str(folder)}}, folder / "config.yaml")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose model is the line x = 0, far too sure of it."""
    model = MixableModule(mlp_blocks([2, 4, 2], [1]))
    weights = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    first, last = [name for name in weights if name.endswith("weight")]
    weights[first][0, 0], weights[first][1, 0] = -1, 1
    weights[last][0, 0], weights[last][1, 1] = 4, 4
    blocks = {"_target_": "mm_lightning.models.mlp_blocks", "sizes": [2, 4, 2], "mix_before": [1]}
    return _folder(tmp_path / "run", {"_target_": "mm_lightning.MixableModule", "blocks": blocks}, DATA, weights)


def typed(run: Path, *words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", ["mm-evaluate", str(run), *words])
    capsys.readouterr()
    main()
    return capsys.readouterr().out


def rows(split: str, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    data = Blobs(**settings)
    data.setup()
    batches = list(data.val_dataloader() if split == "val" else data.test_dataloader())
    return torch.cat([batch[0] for batch in batches]), torch.cat([batch[1] for batch in batches])


def test_scores_and_the_fitted_temperature_are_printed_and_kept(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = typed(run, monkeypatch=monkeypatch, capsys=capsys).splitlines()
    model = load(run)
    inputs, targets = rows("test")
    logits = model(inputs).detach()
    want = scores(logits.log_softmax(dim=1), targets)
    scaling = TemperatureScaling()
    with torch.no_grad():
        fitted = scaling.fit(model(rows("val")[0]), rows("val")[1])
    scaled = scores(scaling(logits).log_softmax(dim=1), targets)
    place = out.index("Scores")
    assert out[place + 1].split() == ["acc", "nll", "ece", "brier", "mce", "overconfidence"]
    table = [want, scaled]
    for line, found, name in zip(out[place + 2 : place + 4], table, ["as it is", "temperature"], strict=True):
        assert line.startswith(f"  {name}")
        order = ("acc", "nll", "ece", "brier", "mce", "overconfidence")
        assert line.split()[-6:] == [f"{found[key]:.4f}" for key in order]
    content = json.loads((run / "evaluation.json").read_text())["evaluation"]
    assert content["scores"] == pytest.approx(want, rel=1e-5)
    assert content["scores_scaled"] == pytest.approx(scaled, rel=1e-5)
    kept = json.loads((run / "temperature.json").read_text())
    assert kept["temperature"] == pytest.approx(fitted.temperature, rel=1e-6)
    assert TemperatureScaling(kept["temperature"])(logits) == pytest.approx(logits / fitted.temperature, rel=1e-6)
    assert content["temperature"]["high"] == pytest.approx(fitted.high, rel=1e-6)
    assert content["remarks"] == []
    events = EventAccumulator(str(run / "evaluation")).Reload()
    assert events.Scalars("test/evaluation/nll_scaled")[0].value == pytest.approx(scaled["nll"], rel=1e-5)
    assert events.Scalars("test/acc")[0].value == pytest.approx(want["acc"], rel=1e-5)
    assert len(events.Images("evaluation/reliability")) == 1
    assert "evaluation/table/text_summary" in events.Tags()["tensors"]


def test_groups_are_measured_with_their_settings(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--all", "--epsilon", "0.01,0.1", "--k", "3", "--rows", "50", "--layers", "blocks.0"]
    out = typed(run, *words, monkeypatch=monkeypatch, capsys=capsys)
    content = json.loads((run / "evaluation.json").read_text())["evaluation"]
    assert list(content["attacks"]) == ["fgsm_0.01", "fgsm_0.1", "pgd_0.01", "pgd_0.1"]
    assert content["attacks"]["fgsm_0.1"]["nll"] > content["attacks"]["fgsm_0.01"]["nll"] > 0
    assert list(content["shifts"]) == [f"noise_{strength}" for strength in range(1, 6)]
    assert list(content["neighbours"]) == list(content["spectra"]) == ["blocks.0"]
    settings = content["settings"]
    assert settings["neighbours"] == {"k": 3, "cosine": True, "layer": "blocks.0", "rows": 50}
    assert (settings["seed"], settings["max_points"], settings["extra_points"]) == (1, 100_000, 50)
    assert settings["unit"] == "the range of the training data, by feature"
    assert settings["attacks"][-1] == {
        **{"name": "pgd_0.1", "epsilon": 0.1, "step_size": 0.025, "steps": 10, "random_start": True}
    }
    why = "deformations: left out, for inputs are (2,) a row, not images."
    assert content["remarks"] == [why]
    assert f"Note         {why}" in out.splitlines()
    assert "Attacks, epsilon in the range of the training data, by feature" in out
    assert "Neighbours, the 3 nearest of 50 training rows" in out
    plain = evaluate(run)
    assert plain.metrics == json.loads((run / "evaluation.json").read_text())["metrics"]


def test_a_layer_of_neighbours_needs_no_spectra(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(run, "--with", "neighbours", "--layers", "blocks.0", monkeypatch=monkeypatch, capsys=capsys)
    content = json.loads((run / "evaluation.json").read_text())["evaluation"]
    assert list(content["neighbours"]) == ["blocks.0"]
    assert "spectra" not in content


def test_temperature_and_bounds_are_of_the_runs_own_data(run: Path) -> None:
    own, other = evaluate(run), evaluate(run, ["data.noise=3.0"])
    assert other.metrics != own.metrics
    assert own.evaluation.fitted is not None
    assert other.evaluation.fitted == own.evaluation.fitted
    config: Any = OmegaConf.load(run / "config.yaml")
    config.data = {"_target_": "mm_lightning.data.ArraysDataModule", "path": str(run / "gone.npz")}
    OmegaConf.save(config, run / "config.yaml")
    gone = evaluate(run, ["data=spirals"])
    assert gone.evaluation.fitted is None
    assert "the run's own data cannot be had" in gone.left_out()[0]
    assert gone.left_out()[1].startswith("no temperature is fitted: there are no validation data")


def test_a_module_that_is_no_classifier_is_tested_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {kind: {"_target_": f"{__name__}.{kind}"} for kind in ("Regression", "Numbers")}
    weights = {"net.weight": torch.ones(1, 2), "net.bias": torch.ones(1)}
    run = _folder(tmp_path / "run", names["Regression"], names["Numbers"], weights)
    out = typed(run, "--with", "attacks", monkeypatch=monkeypatch, capsys=capsys).splitlines()
    assert out[1] == "Test         mse 1.0000"
    notes = [line for line in out if line.startswith("Note")]
    assert len(notes) == 1
    assert "taken for no classifier" in notes[0]
    content = json.loads((run / "evaluation.json").read_text())
    assert content["metrics"] == {"test/mse": pytest.approx(1.0)}
    assert content["evaluation"]["scores"] == {}
    assert not (run / "temperature.json").exists()


@pytest.mark.parametrize("largest", [1, 2])
def test_integers_beside_the_numbers_of_a_regression(
    largest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"_target_": f"{__name__}.NumbersWithIntegers", "largest": largest}
    weights = {"net.weight": torch.ones(1, 2), "net.bias": torch.ones(1)}
    run = _folder(tmp_path / "run", {"_target_": f"{__name__}.RegressionByForward"}, data, weights)
    out = typed(run, "--with", "attacks", monkeypatch=monkeypatch, capsys=capsys).splitlines()
    assert out[1] == "Test         mse 1.0000"
    assert ("Scores" in out) == (largest == 1)  # 2 is no class of a single logit
    said = "the module's own test is that of a regression. If it is one, the scores say nothing"
    assert any(said in line for line in out) == (largest == 1)


def test_numbers_are_printed_where_no_file_can_be_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        typed(run, "--out", str(tmp_path), monkeypatch=monkeypatch, capsys=capsys)
    assert "Scores" in capsys.readouterr().out
    typed(run, "--out", str(tmp_path / "new" / "numbers.json"), monkeypatch=monkeypatch, capsys=capsys)
    assert (tmp_path / "new" / "numbers.json").is_file()


def test_a_checkpoint_of_another_model_is_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "checkpoints" / "best.ckpt"
    torch.save({"state_dict": nn.Linear(2, 2).state_dict()}, path)
    with pytest.raises(SystemExit) as ended:
        typed(run, monkeypatch=monkeypatch, capsys=capsys)
    assert ended.value.code == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "are of another model: " in said[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--with", "attacs"],
            "there is no 'attacs'; there are attacks, deformations, shifts, neighbours, sp",
        ),
        (["--epsilon", "0.1"], "--epsilon is of attacks, not asked for. Add --with attacks."),
        (["--with", "attacks", "--epsilon", "much"], "argument --epsilon: 'much' is no list of numbers"),
        (["--k", "3"], "--k is of neighbours, not asked for. Add --with neighbours."),
        (["--layers", "blocks.0"], "--layers is of spectra and neighbours, not asked for. Add --with spectra."),
        (["--with", "attacks", "--epsilon", ","], "argument --epsilon: ',' names nothing; leave the flag out"),
        (["~data.noise"], "'~data.noise' must be KEY=VALUE; mm-evaluate deletes and sweeps nothing."),
        (["data.noise=1,2"], "'data.noise=1,2' must be KEY=VALUE;"),
        (["--config-dir", "nowhere"], "--config-dir nowhere is not a folder. Name one, or leave it out."),
        (["--with", "neighbours", "--k", "0"], "k must be an integer >= 1, got 0"),
        (["--with", "spectra", "--layers", "blocks.9"], "Layer 'blocks.9' is not in MixableModule"),
    ],
)
def test_a_wrong_word_is_one_line(
    words: list[str], message: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        typed(run, *words, monkeypatch=monkeypatch, capsys=capsys)
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert message in said[0]
    assert not (run / "evaluation.json").exists()
