import io
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from versions import resumes

from mm_lightning.command.mean_loss import MeanLoss
from mm_lightning.command.progress import EpochLines, TerminalBar, progress_bar

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
    pytest.mark.filterwarnings(r"ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings(r"ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint"),
    pytest.mark.filterwarnings("ignore:`max_epochs` was not set"),
]

STEPS = 4  # of an epoch


class Clock:
    """Time that passes in ticks: one second for each training step, nothing else."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


class Module(pl.LightningModule):
    """Its loss is 0.5 * (global_step + 1), its accuracy 0.25 * (epoch + 1)."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.clock = clock

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.clock.now += 1.0
        loss = 0.5 * (self.global_step + 1) + 0.0 * self.weight
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/acc", 0.25 * (self.current_epoch + 1), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., pl.Trainer]:
    clock = Clock(monkeypatch)

    def fit(*callbacks: pl.Callback, ckpt_path: str | None = None, **settings: Any) -> pl.Trainer:
        loader = DataLoader(TensorDataset(torch.zeros(STEPS, 1)))
        trainer = pl.Trainer(
            **{"max_epochs": 2, "logger": False, "log_every_n_steps": 1, **settings},
            accelerator="cpu",
            callbacks=list(callbacks),
            num_sanity_val_steps=0,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(Module(clock), loader, loader, ckpt_path=ckpt_path)
        return trainer

    return fit


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]


def test_one_line_an_epoch(fit: Callable[..., pl.Trainer], capsys: pytest.CaptureFixture[str]) -> None:
    fit(EpochLines(), max_epochs=3)
    assert lines_of(capsys) == [
        "epoch   1/3  train/loss 1.2500  val/acc 0.2500  left 0:08",
        "epoch   2/3  train/loss 3.2500  val/acc 0.5000  left 0:04",
        "epoch   3/3  train/loss 5.2500  val/acc 0.7500  left 0:00",
    ]


def test_what_is_logged_for_no_bar_is_shown_where_there_is_nothing_else(
    fit: Callable[..., pl.Trainer], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Module.log

    def log_for_no_bar(module: Module, name: str, value: Any, prog_bar: bool) -> None:
        log(module, name, value)
        log(module, "mixup/lam", 0.5)

    monkeypatch.setattr(Module, "log", log_for_no_bar)
    bar = TerminalBar()
    shown = []
    monkeypatch.setattr(bar, "on_train_epoch_end", lambda *of: shown.append(bar.get_metrics(*of)))
    fit(EpochLines())
    assert lines_of(capsys) == [
        "epoch   1/2  train/loss 1.2500  val/acc 0.2500  left 0:04",
        "epoch   2/2  train/loss 3.2500  val/acc 0.5000  left 0:00",
    ]
    fit(bar, max_epochs=1)
    assert shown == [{"train/loss": 1.25, "val/acc": 0.25, "left": "0:00"}]


def test_loss_of_accumulated_batches_is_not_divided(
    fit: Callable[..., pl.Trainer], capsys: pytest.CaptureFixture[str]
) -> None:
    fit(EpochLines(), max_epochs=1, accumulate_grad_batches=2)
    # 0.5 * (global_step + 1) is 0.5 twice and 1.0 twice
    assert lines_of(capsys) == ["epoch   1/1  train/loss 0.7500  val/acc 0.2500  left 0:00"]


@pytest.mark.parametrize(
    ("key", "is_mean"),
    [("train/loss", True), ("train_loss_step", True), ("loss", True), ("train/loss_aux", False), ("val_loss", False)],
)
def test_only_the_training_loss_is_shown_as_a_mean(key: str, is_mean: bool) -> None:
    mean, trainer = MeanLoss(), pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert mean.shown({key: 9.0}) == {key: 9.0}
    for outputs in ({"loss": torch.tensor(1.0)}, torch.tensor(2.0), None, {}):
        mean.add(trainer, outputs)
    assert mean.shown({key: 9.0}) == {key: 1.5 if is_mean else 9.0}


def test_other_ranks_print_nothing(fit: Callable[..., pl.Trainer], capsys: pytest.CaptureFixture[str]) -> None:
    lines = EpochLines()
    lines.disable()
    fit(lines)
    assert lines_of(capsys) == []
    lines.enable()
    fit(lines)
    assert len(lines_of(capsys)) == 2


def test_minutes_left(fit: Callable[..., pl.Trainer], capsys: pytest.CaptureFixture[str]) -> None:
    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.should_stop = True

    fit(EpochLines(), Stop(), max_epochs=40)
    assert lines_of(capsys)[0].endswith("left 2:36")  # 39 epochs of 4 s


@pytest.mark.parametrize(
    ("settings", "lines"),
    [
        pytest.param(
            {"check_val_every_n_epoch": 2, "max_epochs": 2},
            [
                "epoch   1/2  train/loss 1.2500  left 0:04",
                "epoch   2/2  train/loss 3.2500  val/acc 0.5000  left 0:00",
            ],
            id="validation every second epoch",
        ),
        pytest.param(
            {"max_epochs": None, "max_steps": 6},
            [
                "epoch   1  train/loss 1.2500  val/acc 0.2500  left 0:02",
                "epoch   2  train/loss 2.7500  val/acc 0.2500  left 0:00",
            ],
            id="steps alone",
        ),
        pytest.param(
            {"max_epochs": 9, "max_steps": 8},
            [
                "epoch   1/9  train/loss 1.2500  val/acc 0.2500  left 0:04",
                "epoch   2/9  train/loss 3.2500  val/acc 0.5000  left 0:00",
            ],
            id="steps before epochs",
        ),
        pytest.param(
            {"max_epochs": 3, "limit_val_batches": 0},
            [f"epoch   {i}/3  train/loss {2 * i - 0.75:.4f}  left 0:0{4 * (3 - i)}" for i in (1, 2, 3)],
            id="no validation",
        ),
    ],
)
def test_lines_follow_the_trainers_settings(
    settings: dict[str, Any], lines: list[str], fit: Callable[..., pl.Trainer], capsys: pytest.CaptureFixture[str]
) -> None:
    fit(EpochLines(), **settings)
    assert lines_of(capsys) == lines


def test_endless_training_has_no_time_left(fit: Callable[..., pl.Trainer], capsys: pytest.CaptureFixture[str]) -> None:
    class StopInSecondEpoch(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    fit(EpochLines(), StopInSecondEpoch(), max_epochs=-1)
    assert lines_of(capsys) == [
        "epoch   1  train/loss 1.2500  val/acc 0.2500  left ?",
        "epoch   2  train/loss 3.2500  val/acc 0.5000  left ?",
    ]


def test_resumed_run_measures_its_own_steps(
    fit: Callable[..., pl.Trainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "last.ckpt")
    fit(max_epochs=1).save_checkpoint(path)
    fit(EpochLines(), max_epochs=3, ckpt_path=path)
    assert [line.split("left ")[1] for line in lines_of(capsys)] == ["0:04", "0:00"]


def test_bar_shows_time_left_and_no_version(fit: Callable[..., pl.Trainer]) -> None:
    seen: list[dict[str, Any]] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            bar = trainer.progress_bar_callback
            assert isinstance(bar, TerminalBar)
            seen.append(dict(bar.get_metrics(trainer, pl_module)))

    fit(TerminalBar(), Look(), logger=True)
    assert [metrics["left"] for metrics in seen] == [f"0:0{left}" for left in range(7, -1, -1)]
    assert all("v_num" not in metrics for metrics in seen)
    assert seen[-1]["val/acc"] == 0.25
    assert [metrics["train/loss"] for metrics in seen] == [0.5, 0.75, 1.0, 1.25, 2.5, 2.75, 3.0, 3.25]


def test_bar_in_evaluation_has_no_time_left(fit: Callable[..., pl.Trainer]) -> None:
    bar = TerminalBar()
    trainer = fit(bar, logger=True)
    trainer.validate(trainer.lightning_module, DataLoader(TensorDataset(torch.zeros(1, 1))), verbose=False)
    assert "left" not in bar.get_metrics(trainer, trainer.lightning_module)


@pytest.mark.parametrize(("is_terminal", "kind"), [(True, TerminalBar), (False, EpochLines)])
def test_bar_for_terminals_lines_elsewhere(is_terminal: bool, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    assert type(progress_bar()) is kind


@resumes
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_bar_of_a_resumed_epoch_begins_where_the_run_was_stopped(
    fit: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    class SaveInSecondEpoch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            if trainer.global_step == STEPS + 2:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    seen: list[tuple[Any, ...]] = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            assert isinstance(trainer.progress_bar_callback, TerminalBar)
            bar = trainer.progress_bar_callback.train_progress_bar
            seen.append((bar.desc, bar.n, bar.total, bar.initial))

    fit(SaveInSecondEpoch())
    fit(TerminalBar(), Look(), max_epochs=3, ckpt_path=str(tmp_path / "a.ckpt"))
    assert seen[0] == ("Epoch 1: ", 2, STEPS, 2)
    assert (seen[2], len(seen)) == (("Epoch 2: ", 0, STEPS, 0), 2 + STEPS)
