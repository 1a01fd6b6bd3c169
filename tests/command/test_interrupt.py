import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from versions import answers, resumes

from mm_lightning import ManifoldMixupCallback, MixableModule
from mm_lightning.command.checkpoint import WholeCheckpointIO
from mm_lightning.command.interrupt import StopAfterStep
from mm_lightning.data import MNISTDataModule, mnist

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
    pytest.mark.filterwarnings(r"ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint"),
]

STEPS, EPOCHS = 5, 2  # steps of an epoch


class Send(pl.Callback):
    """Sends this process a signal in one hook, at one global step, ``times`` times."""

    def __init__(self, hook: str, step: int, number: int = signal.SIGINT, times: int = 1) -> None:
        self.step, self.number, self.times = step, number, times
        setattr(self, hook, self.send)

    def send(self, trainer: pl.Trainer, *_: Any) -> None:
        while trainer.global_step == self.step and self.times > 0:
            self.times -= 1
            os.kill(os.getpid(), self.number)


@pytest.fixture(autouse=True)
def _no_files_read(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (100, 28, 28), dtype=torch.uint8, generator=rng)
    labels = torch.arange(100) % 10
    monkeypatch.setattr(mnist, "load_mnist", lambda root: mnist.MNIST(images, labels, images, labels))


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., nn.Module]:
    """Trains a network that depends on nothing but the arguments, with Adam, mixup and a falling learning rate."""

    def fit(*callbacks: pl.Callback, ckpt_path: Path | None = None) -> nn.Module:
        torch.manual_seed(0)
        model = MixableModule(
            [(nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.ReLU()), True), (nn.Linear(8, 10), True)],
            scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
        )
        data = MNISTDataModule(batch_size=10, num_validation=50, seed=1)
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=EPOCHS,
            num_sanity_val_steps=0,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=tmp_path,
            callbacks=[*callbacks, ManifoldMixupCallback(alpha=1.0, seed=2)],
            plugins=WholeCheckpointIO(),
        )
        trainer.fit(model, data, ckpt_path=None if ckpt_path is None else str(ckpt_path))
        return model

    return fit


@resumes
@pytest.mark.parametrize(
    ("hook", "step", "stopped_at"),
    [
        pytest.param("on_train_batch_start", 0, 1, id="in the first step"),
        pytest.param("on_before_optimizer_step", 2, 3, id="in mid-epoch"),
        pytest.param("on_before_optimizer_step", STEPS - 1, STEPS, id="in an epoch's last step"),
        pytest.param("on_validation_batch_start", STEPS, STEPS + 1, id="during validation"),
        pytest.param("on_before_optimizer_step", 2 * STEPS - 1, 2 * STEPS, id="in the run's last step"),
        pytest.param("on_validation_batch_start", 2 * STEPS, 2 * STEPS, id="during the last validation"),
    ],
)
def test_interrupted_and_resumed_run_equals_the_straight_run(
    hook: str,
    step: int,
    stopped_at: int,
    fit: Callable[..., nn.Module],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "sub" / "last.ckpt"
    with pytest.raises(SystemExit) as stop:
        fit(Send(hook, step), StopAfterStep(path))
    assert isinstance(stop.value.__context__, KeyboardInterrupt)
    assert torch.load(path, weights_only=True)["global_step"] == stopped_at
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == f"Saved {path}. To go on, repeat the command with ckpt_path={path}"
    assert "finishing this step" in said[-2]
    assert_close(fit(ckpt_path=path).state_dict(), fit().state_dict(), rtol=0, atol=0)


def test_second_interrupt_stops_at_once_and_saves_nothing(fit: Callable[..., nn.Module], tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.write_text("older")
    with answers(KeyboardInterrupt):
        fit(Send("on_before_optimizer_step", 2, times=2), StopAfterStep(path))
    assert path.read_text() == "older"
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


@resumes
def test_sigterm_saves_where_a_run_can_go_on(fit: Callable[..., nn.Module], tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    with answers(KeyboardInterrupt):
        fit(Send("on_before_optimizer_step", 2, signal.SIGTERM), StopAfterStep(path))
    assert torch.load(path, weights_only=True)["global_step"] == 3
    assert_close(fit(ckpt_path=path).state_dict(), fit().state_dict(), rtol=0, atol=0)


def test_other_exceptions_save_nothing(fit: Callable[..., nn.Module], tmp_path: Path) -> None:
    class Fail(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            raise RuntimeError("broken on purpose")

    with pytest.raises(RuntimeError, match="broken on purpose"):
        fit(Fail(), StopAfterStep(tmp_path / "last.ckpt"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("is_interrupted", [False, True])
def test_handler_is_put_back(is_interrupted: bool, fit: Callable[..., nn.Module], tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[Any] = []

    class Look(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            seen.append(signal.getsignal(signal.SIGINT))

    stop = StopAfterStep(tmp_path / "last.ckpt")
    if is_interrupted:
        with answers(KeyboardInterrupt):
            fit(Look(), Send("on_train_batch_start", 1), stop)
    else:
        fit(Look(), stop)
    assert before not in seen
    assert signal.getsignal(signal.SIGINT) == before


def test_interrupted_callback_can_be_used_again(fit: Callable[..., nn.Module], tmp_path: Path) -> None:
    stop = StopAfterStep(tmp_path / "last.ckpt")
    with answers(KeyboardInterrupt):
        fit(Send("on_train_batch_start", 1), stop)
    assert_close(fit(stop).state_dict(), fit().state_dict(), rtol=0, atol=0)
