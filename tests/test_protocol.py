"""The paper's protocol as experiments: what each of them says, and a few steps of each on a few images."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from hydra.errors import ConfigCompositionException
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from official_files import KINDS, write_official
from omegaconf import DictConfig, OmegaConf
from own_process import run_module
from torch import nn

from mm_lightning import ManifoldMixupCallback
from mm_lightning.command import train
from mm_lightning.command.checks import check_config
from mm_lightning.command.configuration import CONF
from mm_lightning.command.objective import check_may_choose
from mm_lightning.losses import SoftmaxBCE

Compose = Callable[..., DictConfig]

EXPERIMENTS = {
    "cifar10_preactresnet18": "cifar10",
    "cifar10_wrn28_10": "cifar10",
    "cifar100_preactresnet18": "cifar100",
    "svhn_preactresnet18": "svhn",
    "tiny_imagenet_preactresnet18": "tiny_imagenet",
}
SMALL = {
    "preact_resnet": ["model.network.width=4"],
    "wrn": ["model.network.depth=10", "model.network.widen=1"],
}
TWO = ["input", "blocks.0.layer1"]
THREE = [*TWO, "blocks.0.layer2"]


@pytest.fixture
def compose(tmp_path: Path) -> Iterator[Compose]:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        yield lambda *overrides: hydra.compose("train", [*overrides, f"run_dir={tmp_path / 'run'}"])


def small(experiment: str) -> list[str]:
    return SMALL["wrn" if "wrn" in experiment else "preact_resnet"]


@pytest.mark.parametrize(
    ("experiment", "layers", "alpha", "padding", "flip", "stride"),
    [
        ("cifar10_preactresnet18", THREE, 2.0, 4, True, 1),
        ("cifar10_wrn28_10", TWO, 2.0, 4, True, 1),
        ("cifar100_preactresnet18", THREE, 2.0, 4, True, 1),
        ("svhn_preactresnet18", THREE, 2.0, 2, False, 1),
        ("tiny_imagenet_preactresnet18", THREE, 0.2, 4, True, 2),
    ],
)
def test_experiments_say_what_the_paper_does(
    experiment: str, layers: list[str], alpha: float, padding: int, flip: bool, stride: int, compose: Compose
) -> None:
    config = compose(f"+experiment={experiment}")
    assert hydra.utils.get_class(config.data._target_) is KINDS[EXPERIMENTS[experiment]]
    assert (config.name, config.max_epochs, config.trainer.max_epochs) == (experiment, 200, 200)
    assert (config.mixup.alpha, config.mixup.layers, config.model.network.stride) == (alpha, layers, stride)
    assert (config.data.crop_padding, config.data.flip, config.data.batch_size) == (padding, flip, 100)
    assert (config.data.num_validation, config.callbacks.checkpoint.monitor) == (0, None)
    optimizer = instantiate(config.optimizer)([nn.Parameter(torch.zeros(1))])
    settings = {key: optimizer.defaults[key] for key in ("lr", "momentum", "weight_decay", "nesterov")}
    assert settings == {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": False}
    assert config.loss._target_ == "mm_lightning.losses.SoftmaxBCE"


@pytest.mark.parametrize(
    ("option", "epochs", "milestones"),
    [
        ("field_200", 200, [100, 150]),
        ("paper_400", 400, [200, 300]),
        ("paper_1200", 1200, [400, 800]),
        ("paper_2000", 2000, [1000, 1500]),
        ("code_2000", 2000, [500, 1000, 1500]),
    ],
)
def test_epochs_and_the_schedule_of_the_learning_rate_go_together(
    option: str, epochs: int, milestones: list[int], compose: Compose
) -> None:
    for chosen in (["+experiment=cifar10_preactresnet18", f"epochs={option}"], [f"+epochs={option}"]):
        config = compose(*chosen)
        assert (config.trainer.max_epochs, config.scheduler.milestones) == (epochs, milestones)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, rates = instantiate(config.scheduler)(optimizer), []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    drops = [epoch for epoch in range(1, epochs) if rates[epoch] != rates[epoch - 1]]
    assert drops == milestones
    assert rates[-1] == pytest.approx(10.0 ** -len(milestones))


def test_another_schedule_or_other_milestones_go_with_the_epochs(compose: Compose) -> None:
    cosine = compose("+experiment=cifar10_preactresnet18", "scheduler=cosine", "data.root=FOLDER")
    check_config(cosine)
    assert (cosine.scheduler.T_max, "milestones" in cosine.scheduler) == (200, False)
    typed = compose("+experiment=cifar10_preactresnet18", "scheduler.milestones=[2,3]", "max_epochs=4")
    assert (typed.trainer.max_epochs, typed.scheduler.milestones) == (4, [2, 3])


def test_a_typed_number_of_epochs_wins_and_other_experiments_have_no_such_group(compose: Compose) -> None:
    assert compose("+experiment=cifar10_preactresnet18", "epochs=paper_1200", "max_epochs=3").trainer.max_epochs == 3
    assert compose("+experiment=cifar10_preactresnet18", "trainer=smoke").trainer.max_epochs == 1
    with pytest.raises(ConfigCompositionException, match=r"use \+epochs=paper_1200"):
        compose("+experiment=mnist_1000", "epochs=paper_1200")


@pytest.mark.parametrize(
    ("overrides", "alpha", "layers"),
    [(["mixup=none"], None, None), (["mixup=input", "alpha=1"], 1.0, "input"), (["mixup=manifold"], 2.0, THREE)],
    ids=["none", "input", "manifold"],
)
def test_the_paper_s_methods_are_chosen_by_mixup(
    overrides: list[str], alpha: float | None, layers: Any, compose: Compose
) -> None:
    mixup = compose("+experiment=cifar10_preactresnet18", *overrides).mixup
    assert (mixup.get("alpha"), mixup.get("layers")) == (alpha, layers)
    assert bool(mixup) == (alpha is not None)


def written_commands() -> list[str]:
    """What the page and the headers of the experiments tell to type, without what is common to all."""
    files = [CONF.parent / "docs" / "protocol.md", *(CONF / "experiment" / f"{name}.yaml" for name in EXPERIMENTS)]
    texts = [re.sub(r"\\\n#?", "", path.read_text(encoding="utf-8")) for path in files if path.is_file()]
    found = [words for text in texts for words in re.findall(r"python -m mm_lightning\.train (.*)", text)]
    assert len(found) >= 10
    return found


@pytest.mark.parametrize("command", written_commands())
def test_written_commands_compose(command: str, compose: Compose) -> None:
    words = [word for word in command.split() if word != "-m"]
    overrides = [word if "[" in word else word.split(",")[0] for word in words]  # the first run of a sweep
    config = compose(*overrides)
    check_config(config)
    assert config.data.root == "FOLDER"
    assert (config.trainer.accelerator == "gpu") == ("max_epochs=1" not in words)  # the dry run is the CPU's


# --- a few steps


class Losses(Callback):
    """Keeps what the trainer was built with and has computed."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.trainer = trainer
        self.losses.append(float(outputs["loss"]))


@pytest.fixture
def dry_run(
    compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[Losses, dict[str, float]]]]:
    """Train two steps and test on a few images in the official form."""
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    seen = Losses()
    build = train.build_trainer
    monkeypatch.setattr(train, "build_trainer", lambda config, extra: build(config, [*extra, seen]))

    def run(experiment: str, *overrides: str) -> tuple[Losses, dict[str, float]]:
        root = write_official(monkeypatch, EXPERIMENTS[experiment], tmp_path / "data")
        brief = ["trainer=smoke", "trainer.limit_train_batches=2", "data.batch_size=8", "logger=none", "fast_cpu=false"]
        return seen, train.run(
            compose(f"+experiment={experiment}", f"data.root={root}", *small(experiment), *brief, *overrides)
        )

    with torch.random.fork_rng():
        yield run


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_each_experiment_trains_and_tests(
    experiment: str, dry_run: Callable[..., tuple[Losses, dict[str, float]]], tmp_path: Path
) -> None:
    seen, metrics = dry_run(experiment)
    (mixup,) = [callback for callback in seen.trainer.callbacks if isinstance(callback, ManifoldMixupCallback)]
    assert list(mixup.layer_names) == (TWO if "wrn" in experiment else THREE)
    assert len(seen.losses) == seen.trainer.global_step == 2
    # of the last epoch, which is the only one
    assert metrics["test/acc_median1"] == metrics["test/acc"] == metrics["val/acc"]
    assert metrics["test/nll_median1"] == pytest.approx(metrics["test/nll"])
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["last.ckpt"]
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert written["metrics"]["test/acc_median1"] == metrics["test/acc"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["trainer.max_epochs=4"], True),
        (["trainer.max_epochs=3"], False),  # as little as a dry run
        (["trainer.max_epochs=5", "scheduler.milestones=[4]"], False),
        (["trainer.max_epochs=4", "scheduler.milestones=[2,3]"], False),
        (["trainer.max_epochs=4", "scheduler=cosine"], False),
        ([], False),  # a dry run of one epoch
    ],
)
def test_milestones_beyond_the_last_epoch_are_told(
    overrides: list[str],
    said: bool,
    dry_run: Callable[..., tuple[Losses, dict[str, float]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    dry_run("cifar10_preactresnet18", *overrides)
    line = (
        "The learning rate stays as it is: none of its milestones [100, 150] comes before the end of 4 epochs. "
        "scheduler.milestones=[2,3] divides it on the way."
    )
    assert (line in capsys.readouterr().out.splitlines()) == said


def test_the_authors_settings_are_options(
    dry_run: Callable[..., tuple[Losses, dict[str, float]]], tmp_path: Path
) -> None:
    chosen = ["epochs=paper_1200", "+optimizer.nesterov=true", "data.crop_padding=2"]
    seen, _ = dry_run("cifar10_preactresnet18", *chosen)
    module = seen.trainer.lightning_module
    assert type(module.loss) is SoftmaxBCE
    (optimizer,) = seen.trainer.optimizers
    assert optimizer.defaults["nesterov"]
    assert list(seen.trainer.lr_scheduler_configs[0].scheduler.milestones) == [400, 800]
    assert seen.trainer.datamodule.transform("train").padding == 2
    # at the start: (log(10) + 9 log(10/9)) / 10
    assert seen.losses[0] == pytest.approx(0.325, abs=0.1)
    assert OmegaConf.load(tmp_path / "run" / "config.yaml").loss._target_ == "mm_lightning.losses.SoftmaxBCE"


def test_the_best_on_the_test_images_cannot_be_kept(
    dry_run: Callable[..., tuple[Losses, dict[str, float]]],
) -> None:
    with pytest.raises(ValueError, match="validates on the test images, and BestCheckpoint chooses by them"):
        dry_run("cifar10_preactresnet18", "callbacks=default")


@pytest.mark.parametrize("objective", ["auto", "val/nll", "test/acc"])
def test_no_search_is_told_of_the_test_images(
    objective: str, dry_run: Callable[..., tuple[Losses, dict[str, float]]], tmp_path: Path
) -> None:
    text = rf"objective={objective} is what a search chooses by, but .* sees the test images, .*num_validation=5000\."
    with pytest.raises(ValueError, match=text):
        dry_run("cifar10_preactresnet18", f"objective={objective}")
    assert not (tmp_path / "run").exists()
    dry_run("cifar10_preactresnet18", "objective=train/loss")


def test_a_search_may_choose_by_validation_rows(compose: Compose) -> None:
    check_may_choose(compose("+experiment=cifar10_preactresnet18", "data.num_validation=5000").data, "A search chooses")
    check_may_choose(compose("+data.num_validation=0").data, "A search chooses")  # MNIST, which then validates nothing


@pytest.mark.slow
def test_no_study_chooses_by_the_test_images(tmp_path: Path) -> None:
    words = ["+experiment=cifar10_preactresnet18", "data.root=FOLDER", "budget=1m"]
    finished = run_module("mm_lightning.study", *words, cwd=tmp_path)
    assert (finished.returncode, finished.stdout) == (1, "")
    assert finished.stderr == (
        "error: mm-study chooses strengths by validation, but with data.num_validation=0 validation sees the test "
        "images, which may choose nothing. Give data.num_validation=5000.\n"
    )


def test_validation_rows_of_its_own_let_it_choose(
    dry_run: Callable[..., tuple[Losses, dict[str, float]]], tmp_path: Path
) -> None:
    _, metrics = dry_run("cifar10_preactresnet18", "callbacks=default", "data.num_validation=10")
    assert "test/acc_median1" not in metrics
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
