"""Whether a checkpoint is one that a model can resume from."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import nn

__all__ = ["check_checkpoint"]


def check_checkpoint(path: Path, model: nn.Module) -> None:
    """Refuse a checkpoint that is not there, not a Lightning checkpoint, or of another model.

    Args:
        path: File written by a checkpoint callback.
        model: The model that is to resume. Not changed.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no Lightning checkpoint, or its weights do not fit ``model``.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"ckpt_path {str(path)!r} is not a file. Checkpoints are in a run's folder checkpoints/."
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        theirs = {name: tuple(tensor.shape) for name, tensor in checkpoint["state_dict"].items()}
        checkpoint["loops"]
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"ckpt_path {str(path)!r} is not a checkpoint of a Lightning trainer.") from error
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"ckpt_path {str(path)!r} is of another model: {name!r} has shape {theirs.get(name, 'none')} there and "
                f"{ours.get(name, 'none')} here."
            )
