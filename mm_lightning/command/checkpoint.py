"""Checkpoints: written whole, and checked before a model resumes from one."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mm_lightning.files import whole_file

__all__ = ["WholeCheckpointIO", "check_checkpoint"]  # the first one is of conf/trainer/cpu.yaml

# What a scheduler's state holds of the time that has passed; the rest are its settings.
_PROGRESS = {"last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial"}
_PLACE = "Checkpoints are checkpoints/best.ckpt and checkpoints/last.ckpt in a run's folder."


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes each checkpoint beside its place, a local path, and renames it when it is whole.

    Lightning's own writes to the system's temporary folder. Where that is another file system, the last step is a copy,
    and a full disk or a kill during it leaves half a checkpoint in place of the one before.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path``; ``storage_options`` has no meaning here.

        Raises:
            OSError: If the folder cannot be written or is full. An older file at ``path`` survives.
        """
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()  # written straight to a full disk, torch reports a wrong position instead
        torch.save(checkpoint, content)
        with whole_file(Path(path)) as file:
            file.write(content.getbuffer())


def check_checkpoint(
    path: Path, model: nn.Module, optimizer: Optimizer | None, scheduler: LRScheduler | None = None
) -> None:
    """Refuse a checkpoint that is not there, not a Lightning checkpoint, or of another model, optimizer or schedule.

    Args:
        path: File written by a checkpoint callback.
        model: The model that is to resume. Not changed.
        optimizer: One like that which is to resume. Not changed. None where the model makes its own.
        scheduler: One like that which is to resume, not advanced. None if there is none.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no Lightning checkpoint, or its weights, its optimizer's settings or its schedule do not
            fit. The trainer would go on with the checkpoint's schedule, whatever this run's configuration says.
    """
    if not path.is_file():
        raise FileNotFoundError(f"ckpt_path {str(path)!r} is not a file. {_PLACE}")
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        theirs = {name: tuple(tensor.shape) for name, tensor in checkpoint["state_dict"].items()}
        settings = checkpoint["optimizer_states"][0]["param_groups"][0].keys()
        schedule = checkpoint["lr_schedulers"][0] if scheduler is not None else {}
        checkpoint["loops"]
    except (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"ckpt_path {str(path)!r} is not a whole Lightning checkpoint. {_PLACE}") from error
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"ckpt_path {str(path)!r} is of another model: {name!r} has shape {theirs.get(name, 'none')} there and "
                f"{ours.get(name, 'none')} here. Its own settings are in config.yaml of its run's folder."
            )
    # A scheduler adds initial_lr to the settings.
    own = set() if optimizer is None else optimizer.param_groups[0].keys()
    if missing := sorted(own - settings - {"initial_lr"}):
        raise ValueError(
            f"ckpt_path {str(path)!r} is of another optimizer than {type(optimizer).__name__}: it lacks "
            f"{', '.join(missing)}. Choose the optimizer of its run, which is in config.yaml of its folder."
        )
    for name, value in (scheduler.state_dict() if scheduler is not None else {}).items():
        if name not in _PROGRESS and schedule.get(name) != value:
            raise ValueError(
                f"ckpt_path {str(path)!r} is of another schedule, which would go on: {name} is {schedule.get(name)} "
                f"there and {value} here. Resume with its optimizer, scheduler and max_epochs; or train on as long as "
                f"you like with a schedule of its own: weights={path} max_epochs=... instead of ckpt_path."
            )
