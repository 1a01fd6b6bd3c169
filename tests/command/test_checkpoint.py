import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from versions import OF_WEIGHTS

from mm_lightning.command.checkpoint import WholeCheckpointIO, check_checkpoint


def content_of(model: nn.Module) -> dict[str, Any]:
    optimizer = torch.optim.Adam(model.parameters())
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # leaves a setting of its own
    return {
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "loops": {},
        "global_step": 3,
    }


def check(path: Path, model: nn.Module) -> None:
    check_checkpoint(path, model, torch.optim.Adam(model.parameters()))


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    def save(content: Any) -> Path:
        torch.save(content, tmp_path / "last.ckpt")
        return tmp_path / "last.ckpt"

    return save


def test_own_checkpoint_is_accepted(saved: Callable[[Any], Path]) -> None:
    model = nn.Linear(3, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check(saved(content_of(nn.Linear(3, 2))), model)
    assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["nowhere.ckpt", "."], ids=["missing", "folder"])
def test_path_without_a_file_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is not a file\. Checkpoints are .*last\.ckpt in a run's folder"):
        check(tmp_path / name, nn.Linear(3, 2))


@pytest.mark.parametrize("content", [b"", b"name: train\n", b"PK\x03\x04"], ids=["empty", "text", "zip"])
def test_file_of_another_kind_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.yaml' is not a whole Lightning checkpoint\. Checkpoints are"):
        check(tmp_path / "config.yaml", nn.Linear(3, 2))


def test_half_a_checkpoint_is_refused(saved: Callable[[Any], Path]) -> None:
    path = saved(content_of(nn.Linear(3, 2)))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="is not a whole Lightning checkpoint"):
        check(path, nn.Linear(3, 2))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(nn.Linear(3, 2).state_dict(), id="weights alone"),
        pytest.param({"state_dict": nn.Linear(3, 2).state_dict()}, id="no loops"),
        pytest.param([1, 2], id="list"),
    ],
)
def test_torch_file_of_another_kind_is_refused(content: Any, saved: Callable[[Any], Path]) -> None:
    with pytest.raises(ValueError, match="is not a whole Lightning checkpoint"):
        check(saved(content), nn.Linear(3, 2))


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        pytest.param(nn.Linear(4, 2), r"'weight' has shape \(2, 4\) there and \(2, 3\) here", id="other sizes"),
        pytest.param(nn.Linear(3, 2, bias=False), r"'bias' has shape none there and \(2,\) here", id="fewer"),
        pytest.param(nn.Bilinear(3, 2, 2), r"'weight' has shape \(2, 3, 2\) there", id="other layer"),
    ],
)
def test_checkpoint_of_another_model_is_refused(theirs: nn.Module, message: str, saved: Callable[[Any], Path]) -> None:
    with pytest.raises(ValueError, match=rf"is of another model: {message}.*config\.yaml"):
        check(saved(content_of(theirs)), nn.Linear(3, 2))


def test_checkpoint_with_more_than_the_model_is_refused(saved: Callable[[Any], Path]) -> None:
    path = saved(content_of(nn.Linear(3, 2)))
    with pytest.raises(ValueError, match=r"'bias' has shape \(2,\) there and none here"):
        check(path, nn.Linear(3, 2, bias=False))


def test_whole_checkpoint_is_read_back_and_alone_in_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    model = nn.Linear(3, 2)
    WholeCheckpointIO().save_checkpoint(content_of(model), path)
    loaded = WholeCheckpointIO().load_checkpoint(path, **OF_WEIGHTS)
    assert_close(loaded["state_dict"], model.state_dict(), rtol=0, atol=0)
    assert loaded["global_step"] == 3
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_checkpoint_goes_to_its_own_folder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a temporary file elsewhere would have to be copied from one file system to the other
    opened: list[Path] = []

    def open_and_note(path: Path, *args: Any, **kwargs: Any) -> Any:
        opened.append(path)
        return original(path, *args, **kwargs)

    original = Path.open
    monkeypatch.setattr(Path, "open", open_and_note)
    monkeypatch.setattr("tempfile.mkstemp", None)
    WholeCheckpointIO().save_checkpoint(content_of(nn.Linear(3, 2)), tmp_path / "last.ckpt")
    assert [path.parent for path in opened] == [tmp_path]


def test_full_disk_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    older, newer = nn.Linear(3, 2), nn.Linear(100, 100)
    WholeCheckpointIO().save_checkpoint(content_of(older), path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # bytes of any file
    try:
        with pytest.raises(OSError, match="File too large"):
            WholeCheckpointIO().save_checkpoint(content_of(newer), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    check(path, older)
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_checkpoint_of_another_schedule_is_refused(saved: Callable[[Any], Path]) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2)
    optimizer.step()
    theirs.step()
    path = saved({**content_of(model), "lr_schedulers": [theirs.state_dict()]})
    check_checkpoint(path, model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2))
    with pytest.raises(ValueError, match=r"is of another schedule, which would go on: T_max is 2 there and 4 here\."):
        check_checkpoint(path, model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4))


def test_checkpoint_of_another_optimizer_is_refused(saved: Callable[[Any], Path]) -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"is of another optimizer than SGD: it lacks dampening, momentum, nesterov\."):
        check_checkpoint(saved(content_of(model)), model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_another_schedule_has_a_way_out(saved: Callable[[Any], Path]) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2).state_dict()
    path = saved({**content_of(model), "lr_schedulers": [theirs]})
    with pytest.raises(ValueError, match=rf"weights={path} max_epochs=\.\.\. instead of ckpt_path\."):
        check_checkpoint(path, model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4))
