import json
import logging
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from omegaconf import OmegaConf
from own_process import THREADS, Running
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.testing import assert_close

from mm_lightning import files
from mm_lightning.command import failure, scripts
from mm_lightning.command.beginning import SayBeginning
from mm_lightning.command.configuration import CONF
from mm_lightning.data import mnist

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
    pytest.mark.filterwarnings(r"ignore:The dirpath has changed from"),
]

SMALL = ["model=mlp_bottleneck", "model.blocks.sizes=[784,16,16,2,16,16,10]"]
# 6 training steps, 1 batch each of validation and test
BRIEF = [*SMALL, "trainer=smoke", "data.limit=600"]
# two epochs of 250 steps: long enough to be stopped in the second one
TWO_EPOCHS = [*SMALL, "max_epochs=2", "data.limit=2500", "data.batch_size=10"]
STEPS = 250

load_once = lru_cache(mnist.load_mnist)


class Finished(NamedTuple):
    code: Any
    out: str
    err: str


Command = Callable[..., Finished]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Runs the command in this process, in an empty folder; what it changes in the process is put back."""
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "HYDRA_FULL_ERROR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mnist, "load_mnist", load_once)
    names = [None, "hydra", "lightning.pytorch", "lightning.fabric"]
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger, logger.level, logger.handlers[:]) for logger in loggers]

    def command(*overrides: str) -> Finished:
        monkeypatch.setattr(sys, "argv", ["train", *overrides])
        code: Any = 0
        try:
            scripts.train()
        except SystemExit as stop:
            code = stop.code
        return Finished(code, *capsys.readouterr())

    with torch.random.fork_rng():
        yield command
    for logger, level, handlers in before:
        for handler in set(logger.handlers) - set(handlers):
            handler.close()
        logger.handlers[:] = handlers
        logger.setLevel(level)


start = partial(Running, "mm_lightning.train")


def finish(process: Running) -> Finished:
    done = process.finish()
    return Finished(done.returncode, done.stdout, done.stderr)


def metrics_of(folder: Path) -> dict[str, float]:
    return json.loads((folder / "metrics.json").read_text())["metrics"]


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


# --- a run and what it leaves


class Pair(NamedTuple):
    whole: Finished
    folder: Path
    folders: list[Path]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The README's command and another, started together in a folder that has nothing to do with the package."""
    cwd = tmp_path_factory.mktemp("elsewhere")
    second = start("+experiment=mnist_bottleneck", *BRIEF[1:], "diagnostics=none", cwd=cwd)
    first = [sys.executable, "-m", "mm_lightning.train", "+experiment=mnist_bottleneck", "trainer=smoke"]
    done = subprocess.run(first, cwd=cwd, env=os.environ | THREADS, capture_output=True, text=True)
    whole, other = Finished(done.returncode, done.stdout, done.stderr), finish(second)
    assert other.code == 0, other.err
    folders = sorted((cwd / "outputs" / "mnist_bottleneck").iterdir())
    (folder,) = (folder for folder in folders if str(folder) in whole.out)
    return Pair(whole, folder, folders)


PICTURES = [
    *("calibration/test", "calibration/val", "confidence_map/test", "confidence_map/val"),
    *("hidden_space/test", "hidden_space/train", "hidden_space/val"),
]


@pytest.mark.slow
def test_command_succeeds_without_a_warning(pair: Pair) -> None:
    assert (pair.whole.code, pair.whole.err) == (0, "")


@pytest.mark.slow
def test_command_prints_an_epoch_a_line_and_where_all_is(pair: Pair) -> None:
    metrics, lines = metrics_of(pair.folder), pair.whole.out.splitlines()
    assert lines[0] == f"Run          {pair.folder}, seed 0, on cpu"
    assert lines[1] == "Manifold mixup mixes at 'mix_before.3', 'mix_before.4'."
    assert re.fullmatch(r"epoch   1/1  train/loss \d\.\d{4}  val/acc \d\.\d{4}  left 0:00", lines[2])
    assert f"val/acc {metrics['val/acc']:.4f}" in lines[2]
    assert lines[3].startswith("Test         acc ")
    for key, shown in (("acc", "acc"), ("ece", "ece"), ("loss", "loss, nll")):
        assert f" {shown} {metrics[f'test/{key}']:.4f}" in lines[3]
    numbers = re.findall(r"-?\d+\.\d{4}", lines[3])
    assert len(set(numbers)) == len(numbers)
    assert re.fullmatch(rf"Run folder   {re.escape(str(pair.folder))}  \(\d+ s\)", lines[4])
    figures = sorted(pair.folder / "figures" / f"{picture.replace('/', '_')}.png" for picture in PICTURES)
    animation = pair.folder / "figures" / "confidence_map.gif"
    assert lines[5:] == [
        *(f"Figure       {path}" for path in sorted([*figures, animation])),
        f"TensorBoard  tensorboard --logdir {pair.folder}",
    ]


@pytest.mark.slow
def test_runs_started_together_get_a_folder_each(pair: Pair) -> None:
    assert len(pair.folders) == 2
    assert metrics_of(pair.folders[0]) != metrics_of(pair.folders[1])


@pytest.mark.slow
def test_folder_holds_the_resolved_configuration(pair: Pair) -> None:
    text = (pair.folder / "config.yaml").read_text()
    assert "${" not in text
    config = OmegaConf.create(text)
    assert config.model.blocks.sizes == [784, 1024, 1024, 2, 1024, 1024, 10]
    assert (config.data.seed, config.mixup.seed, config.trainer.max_epochs) == (0, 0, 1)
    assert config.run_dir == config.logger.tensorboard.save_dir == str(pair.folder)


@pytest.mark.slow
def test_folder_holds_the_final_metrics_and_what_made_them(pair: Pair) -> None:
    content = json.loads((pair.folder / "metrics.json").read_text())
    evaluated = {f"{split}/{key}" for split in ("val", "test") for key in ("loss", "acc", "nll", "ece")}
    diagnosed = {
        f"{split}/{key}" for split in ("val", "test") for key in ("davies_bouldin", "spread_ratio", "nearest_mean_acc")
    }
    assert evaluated | diagnosed <= set(content["metrics"])
    assert all(math.isfinite(value) for value in content["metrics"].values())
    assert content["metrics"]["test/loss"] == pytest.approx(content["metrics"]["test/nll"], rel=1e-5)
    assert (content["name"], content["seed"], content["epochs"]) == ("mnist_bottleneck", 0, 1)
    assert 0 < content["fit_seconds"] < content["total_seconds"] < 120
    assert content["packages"]["torch"] == version("torch")
    revision = r"[0-9a-f]{40}(-dirty)?"
    assert content["git_revision"] is None or re.fullmatch(revision, content["git_revision"])


@pytest.mark.slow
def test_folder_holds_checkpoints(pair: Pair) -> None:
    assert sorted(os.listdir(pair.folder / "checkpoints")) == ["best.ckpt", "last.ckpt"]
    last = torch.load(pair.folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert (last["global_step"], last["epoch"]) == (20, 0)
    assert_close(weights_of(pair.folder / "checkpoints" / "best.ckpt"), last["state_dict"], rtol=0, atol=0)


@pytest.mark.slow
def test_tensorboard_holds_curves_and_figures(pair: Pair) -> None:
    events = EventAccumulator(str(pair.folder / "tensorboard"))
    events.Reload()
    curves = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    assert {"train/loss", "train/acc_mixed", "val/acc", "val/loss", "test/acc"} <= set(curves)
    for tag in ("train/loss", "mixup/lam", "mixup/layer"):
        assert [point.step for point in curves[tag]] == [4, 9, 14, 19]
    assert all(0 < point.value < 1 for point in curves["mixup/lam"])
    assert {point.value for point in curves["mixup/layer"]} <= {0.0, 1.0}
    assert curves["val/acc"][-1].value == pytest.approx(metrics_of(pair.folder)["val/acc"])
    assert sorted(events.Tags()["images"]) == PICTURES


@pytest.mark.slow
@pytest.mark.parametrize("split", ["val", "test"])
def test_figures_are_pictures(split: str, pair: Pair) -> None:
    with Image.open(pair.folder / "figures" / f"hidden_space_{split}.png") as picture:
        picture.load()
        low, high = picture.convert("L").getextrema()
        assert picture.format == "PNG"
        assert min(picture.size) > 800
    assert (low < 100, high) == (True, 255)


@pytest.mark.slow
def test_run_into_a_used_folder_is_refused(pair: Pair, command: Command) -> None:
    names = sorted(str(path.relative_to(pair.folder)) for path in pair.folder.rglob("*") if path.is_file())
    before = [(pair.folder / name).read_bytes() for name in names]
    assert {"metrics.json", "config.yaml", "checkpoints/last.ckpt", "train.log", ".hydra/overrides.yaml"} <= set(names)
    code, out, err = command(*BRIEF, f"hydra.run.dir={pair.folder}", "seed=9")
    line = f"error: {pair.folder} holds a run already. Choose another folder with hydra.run.dir=...\n"
    assert (code, out, err) == (1, "", line)
    assert [(pair.folder / name).read_bytes() for name in names] == before


def test_same_command_gives_the_same_run(command: Command, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert command(*BRIEF, f"hydra.run.dir={name}", f"seed={seed}").code == 0
    first, again, other = (weights_of(tmp_path / name / "checkpoints" / "last.ckpt") for name in "abc")
    assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first["blocks.0.1.weight"], other["blocks.0.1.weight"])


@pytest.mark.parametrize("mixup", ["none", "input"])
@pytest.mark.parametrize("option", ["logger=csv", "optimizer=sgd"])
def test_options_run(mixup: str, option: str, command: Command, tmp_path: Path) -> None:
    finished = command(*BRIEF, f"mixup={mixup}", option, "hydra.run.dir=run")
    assert (finished.code, finished.err) == (0, "")
    metrics = metrics_of(tmp_path / "run")
    assert ("train/loss" in metrics, "mixup/lam" in metrics) == (False, False)  # of a single step
    assert (tmp_path / "run" / "csv" / "metrics.csv").is_file() == (option == "logger=csv")
    assert (tmp_path / "run" / "tensorboard").is_dir() == (option != "logger=csv")


@pytest.mark.slow
def test_sweep_gives_each_run_its_folder(command: Command, tmp_path: Path) -> None:
    finished = command(*BRIEF, "-m", "mixup=none,manifold", "seed=0,1", "hydra.sweep.dir=sweep")
    assert (finished.code, finished.err) == (0, "")
    found = {}
    for path in tmp_path.glob("sweep/*/metrics.json"):
        config = OmegaConf.load(path.with_name("config.yaml"))
        found[path.parent.name.split("_")[0]] = (bool(config.mixup), config.seed)
        assert f"Run folder   {path.parent}" in finished.out
        assert f"seed-{config.seed}" in path.parent.name
    assert found == {"0": (False, 0), "1": (False, 1), "2": (True, 0), "3": (True, 1)}
    assert len({path.read_text() for path in tmp_path.glob("sweep/*/metrics.json")}) == 4


@pytest.mark.slow
def test_two_processes_leave_one_account(tmp_path: Path) -> None:
    process = start(*BRIEF, "trainer=ddp", "trainer.accelerator=cpu", "max_epochs=1", "hydra.run.dir=run", cwd=tmp_path)
    finished = finish(process)
    assert finished.code == 0, finished.err
    assert finished.out.count("epoch   1/1") == 1
    assert finished.out.count("Run folder") == 1
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    assert metrics_of(tmp_path / "run")["test/acc"] > 0


# --- stopped and resumed


def stop_in_second_epoch(folder: Path, number: int, *overrides: str) -> Finished:
    """Send a signal when the first epoch's line is printed and, with periodic checkpoints, another one is saved."""
    process = start(*TWO_EPOCHS, f"hydra.run.dir={folder}", *overrides, cwd=folder.parent)
    lines = [process.stdout.readline()]
    while lines[-1] and not lines[-1].startswith("epoch"):
        lines.append(process.stdout.readline())
    last = folder / "checkpoints" / "last.ckpt"
    if overrides:
        count = saved_step(last)
        while saved_step(last) < max(count, STEPS) + 50 and process.is_running:
            time.sleep(0.005)
    process.send_signal(number)
    finished = finish(process)
    return Finished(finished.code, "".join(lines) + finished.out, finished.err)


def saved_step(path: Path) -> int:
    return torch.load(path, weights_only=True)["global_step"] if path.is_file() else 0


class Stopped(NamedTuple):
    folder: Path
    by: dict[str, Finished]


PERIODIC = ["+callbacks.checkpoint.every_n_train_steps=50"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    """A straight run, and runs stopped in their second epoch, all at the same time."""
    folder = tmp_path_factory.mktemp("stopped")
    straight = start(*TWO_EPOCHS, f"hydra.run.dir={folder / 'straight'}", cwd=folder)
    kinds = {"sigint": (signal.SIGINT,), "sigterm": (signal.SIGTERM,), "sigkill": (signal.SIGKILL, *PERIODIC)}
    with ThreadPoolExecutor() as pool:
        futures = {
            name: pool.submit(stop_in_second_epoch, folder / name, *arguments) for name, arguments in kinds.items()
        }
        by = {name: future.result() for name, future in futures.items()}
    by["straight"] = finish(straight)
    assert by["straight"].code == 0, by["straight"].err
    return Stopped(folder, by)


@pytest.fixture(scope="module")
def resumed(stopped: Stopped) -> dict[str, Finished]:
    processes = {
        name: start(
            *TWO_EPOCHS,
            f"ckpt_path={stopped.folder / name / 'checkpoints' / 'last.ckpt'}",
            f"hydra.run.dir={stopped.folder / f'{name}_resumed'}",
            cwd=stopped.folder,
        )
        for name in ("sigint", "sigkill")
    }
    return {name: finish(process) for name, process in processes.items()}


@pytest.mark.slow
def test_interrupt_saves_and_says_where(stopped: Stopped) -> None:
    finished, path = stopped.by["sigint"], stopped.folder / "sigint" / "checkpoints" / "last.ckpt"
    assert finished.code == 130
    assert finished.err.strip().splitlines() == [
        "Interrupted: finishing this step, then saving a checkpoint. Ctrl-C again to stop at once.",
        f"Saved {path}. To go on, repeat the command with ckpt_path={path}",
    ]


@pytest.mark.slow
def test_termination_has_its_exit_code(stopped: Stopped) -> None:
    finished, path = stopped.by["sigterm"], stopped.folder / "sigterm" / "checkpoints" / "last.ckpt"
    assert finished.code == 143
    assert finished.err == f"Saved {path}. To go on, repeat the command with ckpt_path={path}\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sigint", "sigterm", "sigkill"])
def test_stopped_run_leaves_whole_files_only(name: str, stopped: Stopped) -> None:
    folder = stopped.folder / name
    step = saved_step(folder / "checkpoints" / "last.ckpt")
    # in mid-epoch; Lightning answers a SIGTERM before it begins another epoch
    assert STEPS < step < 2 * STEPS or (name == "sigterm" and step == STEPS)
    assert not (folder / "metrics.json").exists()
    visible = [path.name for path in folder.glob("checkpoints/*") if not path.name.startswith(".")]
    assert sorted(visible) == ["best.ckpt", "last.ckpt"]
    assert saved_step(folder / "checkpoints" / "best.ckpt") > 0


@pytest.mark.slow
def test_interrupt_does_not_overwrite_the_best(stopped: Stopped) -> None:
    assert saved_step(stopped.folder / "sigint" / "checkpoints" / "best.ckpt") == STEPS


@pytest.mark.slow
def test_killed_run_was_killed(stopped: Stopped) -> None:
    assert stopped.by["sigkill"].code == -signal.SIGKILL
    assert saved_step(stopped.folder / "sigkill" / "checkpoints" / "last.ckpt") % 50 == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sigint", "sigkill"])
def test_resumed_run_equals_the_straight_run(name: str, resumed: dict[str, Finished], stopped: Stopped) -> None:
    assert resumed[name].code == 0, resumed[name].err
    again, straight = (stopped.folder / run / "checkpoints" / "last.ckpt" for run in (f"{name}_resumed", "straight"))
    assert saved_step(again) == saved_step(straight) == 2 * STEPS
    assert_close(weights_of(again), weights_of(straight), rtol=0, atol=0)
    keys = ("test/loss", "test/acc", "test/nll", "test/ece", "val/loss")
    metrics = [metrics_of(stopped.folder / run) for run in (f"{name}_resumed", "straight")]
    assert [metrics[0][key] for key in keys] == [metrics[1][key] for key in keys]


# --- extended, begun from weights, and loaded

# two epochs of six steps
LONGER = [*SMALL, "data.limit=600", "trainer.log_every_n_steps=3", "logger=none"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_finished_run_is_extended_to_the_straight_run(precision: str, command: Command, tmp_path: Path) -> None:
    command = partial(command, f"trainer.precision={precision}")
    assert command(*LONGER, "max_epochs=1", "hydra.run.dir=short").code == 0
    last = tmp_path / "short" / "checkpoints" / "last.ckpt"
    for name, resumed in (("longer", [f"ckpt_path={last}"]), ("straight", [])):
        assert command(*LONGER, "max_epochs=2", f"hydra.run.dir={name}", *resumed).code == 0
    longer, straight = (weights_of(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("longer", "straight"))
    assert_close(longer, straight, rtol=0, atol=0)
    over = command(*LONGER, "max_epochs=1", f"ckpt_path={last}", "hydra.run.dir=over")
    assert (over.code, over.err) == (0, "")
    assert f"Nothing is left to train: {last} is of the end. A larger max_epochs trains on." in over.out


@pytest.mark.slow
def test_run_begins_from_the_weights_of_another(command: Command, tmp_path: Path) -> None:
    assert command(*LONGER, "max_epochs=1", "hydra.run.dir=first").code == 0
    rates = [
        "optimizer=sgd",
        "optimizer.lr=0",
        "scheduler=cosine",
        "max_epochs=2",
    ]  # another optimizer, which stands still
    assert command(*LONGER, *rates, "weights=first", "hydra.run.dir=second").code == 0
    first, second = tmp_path / "first" / "checkpoints", tmp_path / "second" / "checkpoints"
    assert_close(weights_of(second / "last.ckpt"), weights_of(first / "best.ckpt"), rtol=0, atol=0)
    both = command(*LONGER, "weights=first", "ckpt_path=first/checkpoints/last.ckpt", "hydra.run.dir=both")
    refused(both, r"weights and ckpt_path are both given\..*")
    other = command(*LONGER, "model.blocks.sizes=[784,8,16,2,16,16,10]", "weights=first", "hydra.run.dir=other")
    refused(other, r"The weights in .*best\.ckpt are of another model: 'blocks\.0\.1\.weight' is \(16, 784\) there .*")


# --- refused


def refused(finished: Finished, pattern: str) -> None:
    assert finished.code == 1
    assert re.fullmatch(f"error: {pattern}\n", finished.err), finished.err
    assert "Run folder" not in finished.out


def test_data_of_another_shape_are_refused_with_both_numbers(command: Command) -> None:
    finished = command("data=spirals", "model=mlp_bottleneck", "mixup=none")
    expected = "error: model.blocks: sizes begin with 784, but an input of the data has 2 numbers (shape (2,)). "
    assert (finished.code, finished.err) == (1, f"{expected}Begin with 2, or null to read it there.\n")


@pytest.mark.parametrize(
    ("overrides", "pattern"),
    [
        pytest.param(["mixup.alpha=-1"], r"mixup: alpha must be .* >= 0, got -1\..*switches mixing off\.", id="alpha"),
        pytest.param(["mixup.alpha=nan"], r"mixup: alpha must be a finite number .*got nan\..*", id="alpha nan"),
        pytest.param(
            ["mixup.layers=blocks.9"], r"Layer 'blocks\.9' is not in .*'blocks\.5', 'blocks\.4'.*", id="layer"
        ),
        pytest.param(
            ["diagnostics=hidden_space", "diagnostics.hidden_space.layer=blocks.9"],
            r"Layer 'blocks\.9' is not in .*'blocks\.5', 'blocks\.4'.*",
            id="layer of a diagnostic",
        ),
        pytest.param(
            ["+experiment=mnist_botleneck"],
            r"There is no 'experiment/mnist_botleneck'\. Options: .*Did you mean 'mnist_bottleneck'\?",
            id="experiment",
        ),
        pytest.param(
            ["mixup=manifld"],
            r"There is no 'mixup/manifld'\. Options: .*input, .*manifold, .*none, .*\. Did you mean 'manifold'\?",
            id="option",
        ),
        pytest.param(
            ["mixup.alhpa=1"],
            r"There is no 'mixup\.alhpa'\. Names there: alpha, layers, .*\. Did you mean 'alpha'\?",
            id="key",
        ),
        pytest.param(["modle=mlp"], r"There is no 'modle'\. Names there: .*Did you mean 'model'\?", id="group"),
        pytest.param(
            ["mixup.interpolation._target_=mm_lightning.CutMix"],
            r"There is no 'mixup\.interpolation\._target_'\. Names there: \(none\)\. Give all of it: "
            r"'mixup\.interpolation=\{_target_: \.\.\.\}'\.",
            id="null",
        ),
        pytest.param(
            ["mixup=none", "mixup.alpha=1"], r"There is no 'mixup\.alpha'\. Names there: \(none\)\.", id="off"
        ),
        pytest.param(["mixup.layers=[}"], r"Cannot read 'mixup\.layers=\[\}': .*", id="syntax"),
        pytest.param(["mixup"], r"Error parsing override 'mixup'\. missing EQUAL .*", id="no value"),
        pytest.param(["seed=one"], r"seed must be an integer in \[0, 2\*\*32\), got 'one'\.", id="seed text"),
        pytest.param(["seed=-1"], r"seed must be an integer in \[0, 2\*\*32\), got -1\.", id="seed below"),
        pytest.param(["seed=4294967296"], r"seed must be an integer in .*, got 4294967296\.", id="seed above"),
        pytest.param(
            ["ckpt_path=nowhere.ckpt"],
            r"ckpt_path 'nowhere\.ckpt' is not a file\. Checkpoints are .* in a run's folder\.",
            id="no checkpoint",
        ),
        pytest.param(
            ["ckpt_path=text"],
            r"ckpt_path 'text' is not a whole Lightning checkpoint\. Checkpoints are .* in a run's folder\.",
            id="text as checkpoint",
        ),
        pytest.param(
            ["model.blocks.sizes=[784,16,16,2,16,16,5]"],
            r"model\.blocks: sizes end with 5, but the data have 10 classes\. End with 10, or null to read it there\.",
            id="too few outputs",
        ),
        pytest.param(
            ["+model.num_classes=12"],
            r"model\.num_classes is 12, but that of the data \(MNISTDataModule\) is 10\. Leave it null.*",
            id="other number of classes",
        ),
        pytest.param(["data.root=."], r".*holds no train-images.*leave data\.root empty .*", id="no data"),
        pytest.param(["data.root=gone"], r"The MNIST folder gone does not exist; leave data\.root.*", id="no root"),
        pytest.param(
            ["hydra.run.dir=text/run"], r".*Not a directory: 'text/run'\. Choose another folder .*", id="run folder"
        ),
        pytest.param(
            ["seed=0,1", "hydra.sweep.dir=text/sweep", "-m"],
            r".*Not a directory: 'text/sweep'\. Choose another folder .*hydra\.sweep\.dir=\.\.\.",
            id="sweep folder",
        ),
    ],
)
def test_mistake_is_answered_in_one_line(overrides: list[str], pattern: str, command: Command, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a checkpoint, and not a folder")
    refused(command(*BRIEF, *overrides), pattern)


def test_mistake_stops_a_sweep(command: Command, tmp_path: Path) -> None:
    refused(command("-m", *BRIEF, "mixup.alpha=-1,1", "hydra.sweep.dir=sweep"), "mixup: alpha must be .*")
    assert not list(tmp_path.glob("sweep/*/metrics.json"))


REFUSED = [
    pytest.param(
        "mixup.alpha=-1", "mixup: alpha must be a finite number >= 0, got -1. 0 switches mixing off.", id="value"
    ),
    pytest.param("optimizer.lr=fast", "optimizer.lr must be a number, got 'fast' of type str.", id="type"),
    pytest.param("optimizer.lr=-1", "optimizer: Invalid learning rate: -1.", id="value of torch"),
    pytest.param(
        "model._target_=mm_lightning.MixabelModule",
        "model._target_: there is no 'mm_lightning.MixabelModule'. Did you mean 'mm_lightning.MixableModule'?",
        id="target",
    ),
    pytest.param(
        "mixup.layers=blocks.9",
        "Layer 'blocks.9' is not in MixableModule. Nearest names: 'blocks.5', 'blocks.4', 'blocks.3', 'blocks.2', "
        "'blocks.1'. mm_lightning.inspect(module, batch) lists all layers.",
        id="layer, known when training begins",
    ),
    pytest.param(
        "diagnostics=[hidden_space,foo]",
        "There is no 'diagnostics/foo'. Options: calibration, confidence_map, evaluation, hidden_space, "
        "mixup_monitor, none, spectrum.",
        id="diagnostic",
    ),
]


@pytest.mark.parametrize(("override", "line"), REFUSED)
def test_refused_run_leaves_nothing(override: str, line: str, command: Command, tmp_path: Path) -> None:
    assert command(*BRIEF, override) == (1, "", f"error: {line}\n")
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("override", ["mixup.layers=blocks.9", "optimizer.lr=fast"])
def test_refused_run_leaves_what_was_there(override: str, command: Command, tmp_path: Path) -> None:
    (tmp_path / "outputs" / "train").mkdir(parents=True)
    (tmp_path / "own" / "figures").mkdir(parents=True)
    (tmp_path / "own" / "train.log").write_text("mine")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for folder in ("own", "empty", "own/below/deep", "."):
        assert command(*BRIEF, override, f"hydra.run.dir={folder}").code == 1
        assert sorted(tmp_path.rglob("*")) == before
    assert command(*BRIEF, override).code == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "own" / "train.log").read_text() == "mine"


@pytest.mark.parametrize("override", ["mixup.alpha=-1,1", "mixup=manifld,none", "optimizer.lr=fast,1"])
def test_refused_sweep_leaves_nothing(override: str, command: Command, tmp_path: Path) -> None:
    assert command("-m", *BRIEF, override).code == 1
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("times", [1, 2], ids=["after the step", "at once"])
def test_interrupted_run_leaves_a_folder_once_it_has_trained(
    times: int, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(SayBeginning, "on_train_start", interrupt)
    assert command(*BRIEF, "hydra.run.dir=run").code == 130
    if times == 1:
        assert saved_step(tmp_path / "run" / "checkpoints" / "last.ckpt") == 1
    else:
        assert list(tmp_path.rglob("*")) == []


def test_sweep_keeps_the_runs_before_the_refused_one(command: Command, tmp_path: Path) -> None:
    assert command("-m", *BRIEF, "mixup.alpha=1,-1", "hydra.sweep.dir=sweep").code == 1
    assert sorted(path.name.split("_")[0] for path in (tmp_path / "sweep").iterdir()) == ["0", "multirun.yaml"]
    assert len(list(tmp_path.glob("sweep/0_*/metrics.json"))) == 1


def test_run_that_fails_later_keeps_its_folder_and_says_why_in_its_log(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("no test today.")

    monkeypatch.setattr("lightning.pytorch.Trainer.test", fail)
    assert command(*BRIEF, "hydra.run.dir=run").err == "error: no test today.\n"
    lines = (tmp_path / "run" / "train.log").read_text().splitlines()
    assert lines[0] == f"Run          {tmp_path / 'run'}, seed 0, on cpu"
    assert lines[-1] == "error: no test today."
    assert saved_step(tmp_path / "run" / "checkpoints" / "last.ckpt") == 6


def test_log_is_what_was_said(command: Command, tmp_path: Path) -> None:
    finished = command(*BRIEF, "hydra.run.dir=run", "max_epochs=2")
    assert (finished.code, finished.err) == (0, "")
    assert "epoch   2/2" in finished.out
    assert (tmp_path / "run" / "train.log").read_text() == finished.out


@pytest.mark.slow
def test_log_holds_warnings(tmp_path: Path) -> None:
    brief = [*BRIEF, "hydra.run.dir=run", "trainer.log_every_n_steps=50"]
    finished = finish(start(*brief, cwd=tmp_path))
    log = (tmp_path / "run" / "train.log").read_text()
    assert finished.code == 0
    assert "The number of training batches (6) is smaller than the logging interval" in finished.err
    assert finished.err in log
    assert log.replace(finished.err, "") == finished.out


def test_smoke_takes_the_epochs_that_are_typed(command: Command, tmp_path: Path) -> None:
    finished = command(*BRIEF, "max_epochs=2", "hydra.run.dir=run", "scheduler=cosine")
    epochs = [line.split("  train")[0] for line in finished.out.splitlines() if line.startswith("epoch")]
    assert epochs == ["epoch   1/2", "epoch   2/2"]
    config = OmegaConf.load(tmp_path / "run" / "config.yaml")
    assert (config.max_epochs, config.trainer.max_epochs, config.scheduler.T_max) == (2, 2, 2)


def test_metrics_hold_no_value_of_a_single_step(command: Command, tmp_path: Path) -> None:
    assert command(*BRIEF, "max_epochs=2", "hydra.run.dir=run", "diagnostics=mixup_monitor").code == 0
    metrics = metrics_of(tmp_path / "run")
    assert {"mixup/lam", "mixup/layer", "mixup/acc_mixed", "mixup/loss_floor"} & set(metrics) == set()
    assert {"train/acc_mixed", "val/acc", "val/loss", "test/acc", "test/ece"} <= set(metrics)


@pytest.mark.slow
def test_checkpoint_of_other_sizes_is_refused(pair: Pair, command: Command) -> None:
    path = pair.folder / "checkpoints" / "last.ckpt"
    pattern = r"ckpt_path '.*' is of another model: .*\(1024, 784\) there and \(16, 784\) here\..*config\.yaml.*"
    refused(command(*BRIEF, f"ckpt_path={path}"), pattern)


@pytest.mark.slow
def test_real_command_answers_in_one_line_unless_asked_for_the_traceback(tmp_path: Path) -> None:
    full = start("mixup.alpha=-1", cwd=tmp_path, HYDRA_FULL_ERROR="1")
    brief = [sys.executable, "-m", "mm_lightning.train", "mixup.alpha=-1"]
    done = subprocess.run(brief, cwd=tmp_path, capture_output=True, text=True)
    refused(Finished(done.returncode, done.stdout, done.stderr), "mixup: alpha must be .* got -1.*")
    finished = finish(full)
    assert finished.code == 1
    assert finished.err.startswith("Traceback (most recent call last):")
    assert "alpha must be" in finished.err


def test_full_error_shows_where_a_job_failed(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(failure.JobFailed, match="alpha must be") as failed:
        command(*BRIEF, "mixup.alpha=-1")
    assert failed.value.__cause__ is failed.value.error


def test_full_disk_leaves_no_half_checkpoint(command: Command, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # bytes of any file; a checkpoint has more
    try:
        finished = command(*BRIEF, "hydra.run.dir=run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    refused(finished, r"\[Errno 27\] File too large\. Free some space, or choose another folder .*")
    assert os.listdir(tmp_path / "run" / "checkpoints") == []
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_full_disk_leaves_no_half_metrics(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(source: Path, target: Path) -> None:
        if target.name == "metrics.json":
            raise OSError(28, "No space left on device")
        os.rename(source, target)

    monkeypatch.setattr(files.os, "replace", replace)
    finished = command(*BRIEF, "hydra.run.dir=run")
    refused(finished, r"\[Errno 28\] No space left on device\. Free some space, or choose another folder .*")
    assert not [path.name for path in (tmp_path / "run").iterdir() if "metrics" in path.name]
    assert saved_step(tmp_path / "run" / "checkpoints" / "last.ckpt") == 6


# --- help


def test_help_lists_the_groups_and_their_options(command: Command) -> None:
    code, out, err = command("--help")
    assert (code, err) == (0, "")
    for group in sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name[0] != "_"):
        options = ", ".join(sorted(path.stem for path in (CONF / group).glob("*.yaml")))
        assert f"\n{group}: {options}\n" in out
    assert "python -m mm_lightning.train +experiment=mnist_bottleneck\n" in out
    assert "$" not in out
    # but for the lines of groups, which Hydra writes: GROUP: OPTION, OPTION, ...
    assert max(len(line) for line in out.splitlines() if not re.match(r"\w+: \w+, ", line)) <= 120


def test_commands_in_the_help_compose(command: Command) -> None:
    commands = re.findall(r"^ +python -m mm_lightning\.train (.*)$", command("--help").out, flags=re.MULTILINE)
    assert len(commands) >= 4
    for line in commands:
        parts = line.split()
        # a flag between two overrides would end them
        assert all(part in ("--cfg", "job") or i == 0 or part[0] != "-" for i, part in enumerate(parts))
        overrides = [part for part in parts if part not in ("-m", "--cfg", "job") and "," not in part]
        finished = command(*overrides, "--cfg", "job")
        if "+sweep=" in line and finished.code:  # whose packages are not installed
            pattern = r"There is no 'hydra/\w+/\w+'\. Options: .*pip install \"mm-lightning\[sweep\]\"\."
            assert re.fullmatch(f"error: {pattern}\n", finished.err)
        else:
            assert finished.code == 0


def test_cfg_prints_the_composed_configuration(command: Command, tmp_path: Path) -> None:
    finished = command("+experiment=mnist_bottleneck", "mixup.alpha=0.5", "--cfg", "job")
    assert (finished.code, finished.err) == (0, "")
    config = OmegaConf.create(finished.out)
    assert (config.mixup.alpha, config.name) == (0.5, "mnist_bottleneck")
    assert list(tmp_path.iterdir()) == []
