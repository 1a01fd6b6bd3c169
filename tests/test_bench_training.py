from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).parents[1] / "scripts"
Load = Callable[[str], Any]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Import a benchmark; what it would do to this process for good is left out."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def load(name: str) -> Any:
        module = importlib.import_module(f"bench.{name}")
        if hasattr(module, "keep_freed_memory"):
            monkeypatch.setattr(module, "keep_freed_memory", lambda: True)
        return module

    return load


def check_row(row: dict[str, Any], sides: list[str], against: str) -> None:
    assert list(row["seconds"]) == sides
    assert row["against"] == against
    assert all(seconds > 0 for runs in row["seconds"].values() for seconds in runs)


# --- in this process


def test_epoch_has_both_settings(load: Load) -> None:
    rows = load("epoch").measure(quick=True)["rows"]
    assert [row["case"] for row in rows] == ["as PyTorch comes", "with fast_cpu"]
    for row in rows:
        check_row(row, ["bare loop", "mixup=none", "mixup=manifold"], "bare loop")
        assert row["targets"] == {"mixup=manifold": 1.10}
    assert torch.get_float32_matmul_precision() == "highest"


def test_gpu_has_a_convolutional_network_and_an_mlp(load: Load) -> None:
    gpu = load("gpu")
    rows = [gpu.step(network, "cpu", quick=True) for network in gpu.networks(quick=True)]
    assert [row["case"] for row in rows] == ["PreActResNet18, batch 100", "MLP, 3 x 256, 10 classes, batch 100"]
    for row in rows:
        check_row(row, ["no mixup", "ManifoldMixupCallback"], "no mixup")
        assert row["targets"] == {"ManifoldMixupCallback": 1.02}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_is_refused_without_one(load: Load) -> None:
    with pytest.raises(SystemExit, match=r"The benchmark gpu needs a CUDA device, and torch .* finds none\."):
        load("gpu").measure(quick=True)


def test_loading_has_each_data_set_alone_and_with_its_network(load: Load) -> None:
    rows = load("loading").measure(quick=True)["rows"]
    # 600 images in batches of 100; 200 points, of which 0.9 * 0.9 train, in batches of 20
    found = [(row["case"], row["batches"], row["batch_size"]) for row in rows]
    assert found == [
        ("MNIST, batches alone", 6, 100),
        ("MNIST, with its network", 6, 100),
        ("spirals, batches alone", 9, 20),
        ("spirals, with its network", 9, 20),
    ]
    for row in rows:
        check_row(row, ["tensor batches", "DataLoader, 0 workers", "DataLoader, 2 workers"], "tensor batches")


def test_trainer_has_a_side_for_each_switch(load: Load) -> None:
    pytest.importorskip("rich")
    result = load("trainer").measure(quick=True)
    [row] = result["rows"]
    sides = [
        "bare loop",
        "lean",
        "self.log in every step",
        "self.log(on_epoch=True)",
        "self.log to TensorBoard, log_every_n_steps=50",
        "self.log to TensorBoard, log_every_n_steps=1",
        "checkpoint after the epoch",
        "Lightning's bar, tqdm",
        "Lightning's bar, rich",
        "the command's bar, in a terminal",
        "the command's lines, elsewhere",
        "all that the command uses but the checkpoint",
    ]
    check_row(row, sides, "lean")
    for part in result["parts"]:
        extra = row["median_seconds"]["lean"] * (row["ratios"][part["side"]]["median"] - 1) / 60
        assert part["microseconds_a_batch"] == pytest.approx(1e6 * extra, abs=0.06)


def test_trainer_switches_on_what_a_side_says(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, command = load("trainer"), load("command")
    trainers: list[pl.Trainer] = []

    def fit(trainer: pl.Trainer, network: Any, data: Any) -> float:
        trainers.append(trainer)
        return command.training_seconds(trainer, network, data)

    monkeypatch.setattr(module, "training_seconds", fit)
    config = command.compose_epoch(str(tmp_path), 4, "mixup=none", "diagnostics=none", "data.limit=400", command.SMALL)
    sides = module._sides(config, str(tmp_path), batches=4)
    runs = {name: run for name, run in sides.items() if name != "bare loop" and not name.startswith("all")}
    found = {}
    for name, run in runs.items():
        run()
        trainer = trainers.pop()
        kinds = {type(callback).__name__ for callback in trainer.callbacks} - {"_TrainingClock"}
        found[name] = (kinds, bool(trainer.loggers) and trainer.log_every_n_steps, set(trainer.callback_metrics))
        assert trainer.global_step == 4
    logged = {"train/loss"}
    assert found == {
        "lean": (set(), False, set()),
        "self.log in every step": (set(), False, logged),
        "self.log(on_epoch=True)": (set(), False, logged),
        "self.log to TensorBoard, log_every_n_steps=50": (set(), 50, logged),
        "self.log to TensorBoard, log_every_n_steps=1": (set(), 1, logged),
        "checkpoint after the epoch": ({"ModelCheckpoint"}, False, set()),
        "Lightning's bar, tqdm": ({"TQDMProgressBar"}, False, set()),
        **({"Lightning's bar, rich": ({"RichProgressBar"}, False, set())} if "Lightning's bar, rich" in runs else {}),
        "the command's bar, in a terminal": ({"TerminalBar"}, False, set()),
        "the command's lines, elsewhere": ({"EpochLines"}, False, set()),
    }
    assert len(list(tmp_path.rglob("*.ckpt"))) == 1


def test_clock_runs_around_training_but_not_what_follows(
    load: Load, make_trainer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    class Spy(pl.Callback):
        def on_train_start(self, trainer: Any, *_: Any) -> None:
            print("printed")
            seen.append({"_begin", "seconds"} & set(vars(trainer.callbacks[0])))

        on_train_epoch_end = on_train_end = on_train_start

    command = load("command")
    network = load("trainer")._Network(command.compose_experiment(command.SMALL), log=None)
    batches = DataLoader([(torch.rand(5, 1, 28, 28), torch.arange(5))], batch_size=None)  # type: ignore[arg-type]
    seconds = command.training_seconds(make_trainer(Spy()), network, batches)
    assert seen == [{"_begin"}, {"_begin"}, {"_begin", "seconds"}]  # what the clock holds by then
    assert seconds > 0
    assert capsys.readouterr().out == ""


def test_bare_loop_takes_the_experiment_s_steps(load: Load) -> None:
    command = load("command")
    network, optimizer = command.bare_network(command.compose_experiment("optimizer.lr=0.01", command.SMALL))
    generator = torch.Generator().manual_seed(1)
    images, targets = torch.rand(30, 1, 28, 28, generator=generator), torch.arange(30) % 10
    hand = nn.ParameterList(parameter.detach().clone() for parameter in network.parameters())
    adam = torch.optim.Adam(hand, lr=0.01)
    batches = list(command.cut(images, targets, batch_size=12, batches=2))
    assert [len(labels) for _, labels in batches] == [12, 12]  # of 12, 12 and 6
    assert len({tuple(image.flatten().tolist()) for inputs, _ in batches for image in inputs}) == 24
    for inputs, labels in batches:
        hidden = inputs.flatten(1)
        for i in range(0, len(hand), 2):  # weight, bias; LeakyReLU(0.3) after all layers but the last
            hidden = hidden @ hand[i].T + hand[i + 1]
            hidden = torch.where(hidden > 0, hidden, 0.3 * hidden) if i + 2 < len(hand) else hidden
        gradients = torch.autograd.grad(F.nll_loss(hidden.log_softmax(1), labels), list(hand))
        for parameter, gradient in zip(hand, gradients, strict=True):
            parameter.grad = gradient
        adam.step()
    assert command.train_bare(network, optimizer, batches) > 0
    assert_close(list(network.parameters()), list(hand), rtol=1e-4, atol=1e-5)


def test_products_of_a_network_by_hand(load: Load) -> None:
    network = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    products = list(load("arithmetic").products_of(network, batch_size=4))
    found = [(product.case, tuple((product.left @ product.right).shape), product.flops) for product in products]
    assert found == [
        ("4 x 3 x 5, forward", (4, 5), 2 * 4 * 3 * 5),
        ("4 x 3 x 5, gradient of the weights", (5, 3), 2 * 4 * 3 * 5),
        ("4 x 5 x 2, forward", (4, 2), 2 * 4 * 5 * 2),
        ("4 x 5 x 2, gradient of the weights", (2, 5), 2 * 4 * 5 * 2),
        ("4 x 5 x 2, gradient of the inputs", (4, 5), 2 * 4 * 5 * 2),
    ]


def test_arithmetic_counts_and_divides(load: Load) -> None:
    result = load("arithmetic").measure(quick=True)
    rows = {row["case"]: row for row in result["rows"]}
    weights = 784 * 32 + 32 * 32 + 32 * 2 + 2 * 32 + 32 * 32 + 32 * 10
    flops = 2 * 100 * (3 * weights - 784 * 32)  # forward and two gradients, but none of the images
    libraries = ["MKL (default)", "oneDNN (fast_cpu)"]
    for memory in ("memory as it comes", "freed memory kept"):
        row = rows[f"training step, {memory}"]
        check_row(row, [f"{name}{what}" for name in libraries for what in ("", ", products alone")], libraries[0])
        assert row["flops"] == flops
        for name in ("Adam", "SGD with momentum"):
            check_row(rows[f"{name}, {memory}"], ["for-loop", "foreach", "fused"], "for-loop")
            assert rows[f"{name}, {memory}"]["parameters"] == weights + 32 + 32 + 2 + 32 + 32 + 10
    check_row(rows["100 x 784 x 32, forward"], libraries, libraries[0])
    assert rows["128 x 128 x 128"]["flops"] == 2 * 128**3
    for rate in result["gflops"]:
        seconds = rows[rate["case"]]["median_seconds"][rate["side"]]
        assert rate["gflops"] == pytest.approx(rows[rate["case"]]["flops"] / seconds / 1e9, abs=0.051)
    assert len(result["gflops"]) == 6 * 2 + 2 * 2


def test_parts_of_a_step_and_its_share_of_products(load: Load) -> None:
    module = load("arithmetic")
    step = module._Step(quick=True)
    before = [parameter.detach().clone() for parameter in step.network.parameters()]
    row = {
        "case": "step",
        "flops": 6e9,
        "median_seconds": {"MKL (default)": 2.0, "oneDNN (fast_cpu)": 1.0, "MKL (default), products alone": 1.5},
        "seconds": {
            "MKL (default)": [2.0, 4.0, 1.0],
            "MKL (default), products alone": [1.0, 1.0, 1.0],
            "oneDNN (fast_cpu)": [1.0, 1.0, 1.0],
            "oneDNN (fast_cpu), products alone": [0.5, 0.75, 0.9],
        },
    }
    parts = module._parts(step, row, "memory", rounds=1)
    assert [(part["gflops"], part["share_of_products"], part["step_ms"]) for part in parts] == [
        (3.0, 0.5, 2000.0),
        (6.0, 0.75, 1000.0),
    ]
    assert all(part[f"{name}_ms"] > 0 for part in parts for name in ("zero_grad", "forward", "backward", "optimizer"))
    assert not torch.equal(before[0], step.network[0][1].weight)


# --- in processes of their own


class Started:
    """Stands in for Running: keeps the command lines, and counts how many run at the same time."""

    def __init__(self) -> None:
        self.lines: list[tuple[list[str], int | None]] = []
        self.running: set[int] = set()
        self.at_once: list[int] = []

    def __call__(self, arguments: list[str], folder: str, threads: int | None = None, path: Any = ()) -> Any:
        assert list(Path(folder).iterdir()) == [] or self.running  # nothing of an earlier run
        return _Process(self, len(self.lines), arguments, threads)


class _Process:
    def __init__(self, started: Started, index: int, arguments: list[str], threads: int | None) -> None:
        self.started, self.index, self.process = started, index, self
        started.lines.append((arguments, threads))
        started.running.add(index)
        started.at_once.append(len(started.running))

    def wait(self) -> None:
        self.started.running.remove(self.index)

    def kill(self) -> None:
        assert self.index not in self.started.running


def test_jobs_share_the_threads(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, started = load("jobs"), Started()
    monkeypatch.setattr(jobs, "Running", started)
    [row] = jobs.measure(quick=False)["rows"]
    sides = ["two at a time, one thread each", "one after another, two threads"]
    check_row(row, sides, sides[1])
    assert started.at_once[:4] == [1, 2, 1, 1]
    assert [threads for _, threads in started.lines[:4]] == [1, 1, 2, 2]
    for first, second in ((0, 1), (2, 3)):  # alike but for the seed and the folder
        a, b = started.lines[first][0], started.lines[second][0]
        assert [pair for pair in zip(a, b, strict=True) if pair[0] != pair[1]] == [
            ("seed=0", "seed=1"),
            ("hydra.run.dir=seed-0", "hydra.run.dir=seed-1"),
        ]
    assert started.lines[0][0] == started.lines[2][0]


@pytest.mark.parametrize("quick", [True, False])
def test_end_to_end_compares_whole_processes(quick: bool, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    module, started = load("end_to_end"), Started()
    monkeypatch.setattr(module, "Running", started)
    monkeypatch.setattr(module, "phases", lambda length: [])
    [row] = module.measure(quick)["rows"]
    against = "straightforward project, 0 workers"
    check_row(row, ["mm_lightning.train", against, "straightforward project, 2 workers"], against)
    assert row["targets"] == ({} if quick else {"mm_lightning.train": 0.5})  # quick runs do unlike work
    ours, *theirs = (line for line, _ in started.lines[:3])
    assert ours[:4] == [sys.executable, "-m", "mm_lightning.train", "+experiment=mnist_bottleneck"]
    assert ("max_epochs=1" in ours) == quick
    script = str(SCRIPTS / "bench" / "straightforward.py")
    for line, workers in zip(theirs, ("0", "2"), strict=True):
        length = ["--max-epochs", "1"] if quick else []
        assert line == [sys.executable, script, "--folder", ".", "--workers", workers, *length]


def test_phases_of_a_run_of_the_command(load: Load) -> None:
    module, command = load("end_to_end"), load("command")
    parts = module.phases(["max_epochs=1", "data.limit=200", command.SMALL, "diagnostics=calibration", "logger=none"])
    assert [part["part"] for part in parts] == [
        "process start, imports, configuration, exit",
        "reading the data",
        "building model and trainer",
        "training steps",
        "validation",
        "checkpoints",
        "diagnostics",
        "testing",
    ]
    assert all(part["seconds"] > 0 for part in parts)
    assert sum(part["share"] for part in parts) == pytest.approx(1, abs=0.001)
    assert parts[0]["seconds"] > 1  # importing torch and Lightning


def test_time_belongs_to_the_innermost_phase(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("end_to_end")
    now = iter(range(0, 10_000, 10))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(now)))  # 10 s from one event to the next
    profiler = module.PhaseProfiler(str(tmp_path / "phases.json"))
    profiler.setup("fit")
    with profiler.profile("[LightningDataModule]MNISTDataModule.setup"):
        pass
    with profiler.profile("run_training_epoch"):
        with profiler.profile("run_training_batch"):
            pass
        with profiler.profile("[Callback]EpochLines.on_validation_start"):
            pass
        with profiler.profile("[Callback]HiddenSpace{'name': 'hidden_space'}.on_validation_epoch_end"):
            pass
        saving, inside = "[Callback]ModelCheckpoint{...}.on_validation_end", "[Callback]HiddenSpace{...}.state_dict"
        with profiler.profile(saving), profiler.profile(inside):
            pass
        with profiler.profile("[Strategy]SingleDeviceStrategy.on_validation_end"):
            pass
    profiler.setup("test")
    with profiler.profile("[Callback]Calibration{'name': 'calibration'}.on_test_epoch_end"):
        pass
    profiler.describe()
    assert json.loads((tmp_path / "phases.json").read_text()) == {
        "building model and trainer": 10 + 10 + 10,  # to setup, to the data, to the epoch
        "reading the data": 10,
        "training steps": 3 * 10 + 10 + 10,  # around the batch and in it, to the epoch's end, to the test
        "validation": 10 + 10 + 10 + 10 + 10,  # in and after the first hook, between, in the last one
        "diagnostics": 10 + 10 + 10,
        "checkpoints": 10 + 10,  # around the diagnostic's share
        "testing": 10 + 10,  # around the diagnostic
    }


def test_process_gets_its_threads_and_modules(load: Load, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "only_here.py").write_text("number = 7")
    code = "import os, only_here; print(os.environ['OMP_NUM_THREADS'], only_here.number, os.getcwd())"
    running = load("command").Running([sys.executable, "-c", code], str(tmp_path), 3, path=(tmp_path / "here",))
    running.wait()
    assert running.output.read_text().split() == ["3", "7", str(tmp_path)]


def test_failed_process_is_an_error_with_its_last_line(load: Load, tmp_path: Path) -> None:
    running = load("command").Running([sys.executable, "-c", "raise SystemExit('no data')"], str(tmp_path))
    with pytest.raises(RuntimeError, match=r"ended with exit code 1: no data$"):
        running.wait()
