"""On a CUDA device: the same numbers as on the CPU, in every precision, without a step that waits for it."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from official_files import write_official
from omegaconf import DictConfig
from test_conf import WAYS, fitting, way
from torch import Tensor
from torch.testing import assert_close
from torch.utils.data import DistributedSampler

from mm_lightning import ManifoldMixupCallback
from mm_lightning.command import train
from mm_lightning.command.configuration import CONF
from mm_lightning.data.image_batches import ImageTransform
from mm_lightning.data.tensor_batches import TensorBatches
from mm_lightning.mixup import ConfidentWithUnconfident, NearestNeighbors, SameClass, noise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]

MakeTrainer = Callable[..., pl.Trainer]
Compose = Callable[..., DictConfig]


@pytest.fixture
def compose(tmp_path: Path) -> Iterator[Compose]:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        yield lambda *overrides: hydra.compose("train", [*overrides, f"run_dir={tmp_path / 'run'}"])


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].detach().double().cpu())


def trained(make_trainer: MakeTrainer, name: str, compose: Compose, **settings: Any) -> tuple[list[Tensor], Tensor]:
    """Weights and losses of an epoch of five batches."""
    callbacks = [made for made in [way(name, compose)] if made]
    model, batches = fitting(callbacks[0] if callbacks else None)
    seen = Losses()
    make_trainer(*callbacks, seen, **settings).fit(model, batches)
    return [parameter.detach().double().cpu() for parameter in model.parameters()], torch.stack(seen.losses)


@pytest.mark.parametrize("name", WAYS)
def test_each_way_trains_as_on_the_cpu(
    name: str, make_trainer: MakeTrainer, compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = noise._drawn  # boxes, masks and noise: a device has numbers of its own
    on_cpu = torch.device("cpu")
    monkeypatch.setattr(
        noise, "_drawn", lambda seed, shape, device, *rest: drawn(seed, shape, on_cpu, *rest).to(device)
    )
    weights, losses = trained(make_trainer, name, compose, precision="64-true")
    on_gpu = trained(make_trainer, name, compose, precision="64-true", accelerator="gpu")
    assert_close(on_gpu[1], losses, rtol=1e-9, atol=0)
    for ours, expected in zip(on_gpu[0], weights, strict=True):
        assert_close(ours, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("pairing", [SameClass(), NearestNeighbors(), ConfidentWithUnconfident()], ids=repr)
def test_partners_that_the_device_draws_have_ratios_of_their_own(pairing: Any, make_trainer: MakeTrainer) -> None:
    found = []
    for accelerator in ("cpu", "gpu"):
        callback, seen = ManifoldMixupCallback(pairing=pairing, per_sample=True, schedule=None, seed=1), Losses()
        make_trainer(callback, seen, accelerator=accelerator, precision="64-true").fit(*fitting(callback))
        found.append(torch.stack(seen.losses))
    assert_close(found[1], found[0], rtol=1e-9, atol=0)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true"])
def test_each_precision_mixes_the_same(precision: Any, make_trainer: MakeTrainer, compose: Compose) -> None:
    expected = trained(make_trainer, "manifold", compose, precision="64-true", accelerator="gpu")[1]
    losses = trained(make_trainer, "manifold", compose, precision=precision, accelerator="gpu")[1]
    assert_close(losses, expected, rtol=0, atol=1e-5 if precision == "32-true" else 5e-3)
    plain = trained(make_trainer, "none", compose, precision="64-true", accelerator="gpu")[1]
    assert (plain - expected).abs().max() > 0.02  # else the comparison would see no mixing


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # of the checkpoints, on purpose
def test_a_resumed_run_goes_on_as_the_straight_one(make_trainer: MakeTrainer, compose: Compose, tmp_path: Path) -> None:
    def run(epochs: int, path: Path | None) -> list[Tensor]:
        callback = ManifoldMixupCallback(seed=3, schedule=None)
        model, batches = fitting(callback)
        model.double()  # Lightning loads weights before it makes them float64
        keep = ModelCheckpoint(tmp_path / str(epochs), save_last=True)
        settings = {"accelerator": "gpu", "enable_checkpointing": True, "max_epochs": epochs, "precision": "64-true"}
        make_trainer(callback, keep, **settings).fit(model, batches, ckpt_path=path)
        return [parameter.detach().cpu() for parameter in model.parameters()]

    straight = run(4, None)
    run(2, None)
    for ours, expected in zip(run(4, tmp_path / "2" / "last.ckpt"), straight, strict=True):
        assert_close(ours, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler itself
def test_a_compiled_module_trains_as_an_eager_one(make_trainer: MakeTrainer) -> None:
    found = []
    for compiles in (False, True):
        callback, seen = ManifoldMixupCallback(seed=3, schedule=None, layers=["first", "second"]), Losses()
        model, batches = fitting(callback)
        if compiles:
            model.compile()
        make_trainer(callback, seen, accelerator="gpu", precision="64-true").fit(model, batches)
        found.append(torch.stack(seen.losses))
    assert_close(found[1], found[0], rtol=1e-9, atol=0)


def test_crops_and_flips_are_those_of_the_cpu() -> None:
    images = torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    transform = ImageTransform((0.5, 0.25, 0.1), (0.5, 0.25, 0.2), padding=4, flip=True, seed=1)
    expected = transform((images, torch.arange(64)), (1, 2, 0))[0]
    on_gpu = transform((images.cuda(), torch.arange(64)), (1, 2, 0))[0]
    assert on_gpu.is_cuda
    assert_close(on_gpu.cpu(), expected, rtol=0, atol=1e-6)


def test_a_batch_is_cut_and_cropped_without_waiting() -> None:
    images = torch.zeros(20, 3, 8, 8, dtype=torch.uint8, device="cuda")
    sampler: Any = DistributedSampler(range(20), num_replicas=1, rank=0)  # type: ignore[arg-type]
    batches = TensorBatches([images], 4, sampler, transform=ImageTransform((0.5,) * 3, (0.5,) * 3, 1, True))
    epoch = iter(batches)
    next(epoch)  # the order is copied, and what images are normalised by
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(epoch)) == 4
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Waits(pl.Callback):
    """What waits for the device in the steps from number ``first`` on: files and lines."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.steps = 0
        self.places: set[str] = set()
        self._step = ExitStack()

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step < self.first:
            return
        caught = self._step.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        self._step.callback(self._close, caught)

    def _close(self, caught: list[warnings.WarningMessage]) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self.steps += 1
        self.places |= {f"{one.filename}:{one.lineno}" for one in caught if "synchroniz" in str(one.message)}

    def on_train_batch_end(self, *_: Any) -> None:
        self._step.close()


@pytest.mark.parametrize("mixup", ["manifold", "manifold_until80", "cutmix", "regmixup", "nfm", "patchup"])
def test_no_step_of_the_command_waits_for_the_device_because_it_mixes(
    mixup: str, compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_official(monkeypatch, "cifar10", tmp_path / "data")  # 40 images
    small = ["model.network.width=4", "data.batch_size=8", "max_epochs=10", "scheduler=constant", f"data.root={root}"]
    quiet = ["trainer=gpu", "logger=none", "trainer.log_every_n_steps=1000"]
    build, found = train.build_trainer, {}
    for name in ("none", mixup):
        waits = found[name] = Waits(first=20)
        monkeypatch.setattr(train, "build_trainer", lambda config, extra, own=waits: build(config, [*extra, own]))
        config = compose("+experiment=cifar10_preactresnet18", *small, *quiet, f"mixup={name}")
        config.run_dir = str(tmp_path / name)
        train.run(config)
        assert waits.steps == 30
    assert found[mixup].places <= found["none"].places
    assert not [place for place in found["none"].places if "mm_lightning" in place]


def run(*words: str) -> None:
    finished = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]


@pytest.mark.slow
def test_a_run_with_every_diagnostic_and_its_evaluation(tmp_path: Path) -> None:
    names = ["calibration", "confidence_map", "evaluation", "hidden_space", "mixup_monitor", "spectrum"]
    folder = tmp_path / "run"
    chosen = ["+experiment=spiral", f"diagnostics=[{','.join(names)}]", "max_epochs=2", "trainer=gpu"]
    run("mm_lightning.train", *chosen, f"hydra.run.dir={folder}")
    told = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["metrics"]
    assert 0 <= told["test/acc"] <= 1
    run("mm_lightning.evaluate", str(folder), "trainer=gpu")
    run("mm_lightning.evaluate", str(folder), "trainer=cpu", "--out", str(tmp_path / "on_cpu"))
