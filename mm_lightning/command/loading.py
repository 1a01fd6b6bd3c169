"""Trained modules, from the folder of their run."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from mm_lightning.namespaces import LightningModule

__all__ = ["load", "load_weights", "place_of", "weights_of"]

_CONFIG = "config.yaml"
# What torch.load raises for files of other kinds.
_UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError)
_MOST_NAMED = 5  # tensors in a message


def load(run: str | Path) -> LightningModule:
    """Return the trained module of a run of the command, in evaluation mode, on the CPU.

    The module is built as ``config.yaml`` in the run's folder says, and gets the weights of the best checkpoint, of
    ``last.ckpt`` where there is none. Of the checkpoint tensors and plain values alone are read (``weights_only``).

    Its logits are as sure as it was trained to be. A temperature that ``mm-evaluate`` has fitted is in
    ``temperature.json`` in the run's folder: ``TemperatureScaling(temperature)`` of ``mm_lightning.evaluation`` divides
    logits by it.

    Args:
        run: Folder of the run, or a checkpoint in it.

    Raises:
        FileNotFoundError: If there is no such run, or no checkpoint in it.
        ValueError: If the checkpoint is not of the configured module.

    Example:
        ``mm_lightning.load("outputs/train/2026-01-31_12-00-00-000000")(images).argmax(dim=1)``
    """
    config_path, checkpoint = place_of(Path(run))
    config = OmegaConf.load(config_path)
    assert isinstance(config, DictConfig)
    with torch.random.fork_rng(devices=[]):  # of initial weights that are replaced
        module: LightningModule = instantiate(config.model)
    load_weights(module, checkpoint)
    return module.eval()


def place_of(run: Path) -> tuple[Path, Path]:
    """Return the configuration and the checkpoint of a run.

    Args:
        run: Folder of the run, whose best checkpoint is taken or else the last, or a checkpoint in it.

    Raises:
        FileNotFoundError: If one of them is not there.
    """
    if run.is_dir():
        if not (run / _CONFIG).is_file():
            raise FileNotFoundError(
                f"{run} holds no {_CONFIG}, so no run. Name the folder of a run or a checkpoint in it."
            )
        return run / _CONFIG, _checkpoint_in(run)
    if not run.is_file():
        raise FileNotFoundError(f"{run} is neither the folder of a run nor a checkpoint in one.")
    found = [folder / _CONFIG for folder in run.absolute().parents[:2] if (folder / _CONFIG).is_file()]
    if not found:
        raise FileNotFoundError(
            f"{run} has no {_CONFIG} of its run in its folder or the one above, which says what module it is of. Leave "
            "checkpoints in the folder of their run, or copy both."
        )
    return found[0], run


def load_weights(module: nn.Module, path: Path) -> None:
    """Give a module the weights of a file, and nothing else that is in it.

    Args:
        module: Gets the weights.
        path: Checkpoint, file of a state dict, or folder of a run.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file holds no weights, or a tensor of another name or shape than the module's.
    """
    path = _checkpoint_in(path) if path.is_dir() else path
    theirs, ours = weights_of(path), module.state_dict()
    differing = [name for name in {**ours, **theirs} if _shape(ours, name) != _shape(theirs, name)]
    if differing:
        named = "; ".join(
            f"{name!r} is {_shape(theirs, name)} there and {_shape(ours, name)} here"
            for name in differing[:_MOST_NAMED]
        )
        more = f"; and {len(differing) - _MOST_NAMED} more" if len(differing) > _MOST_NAMED else ""
        raise ValueError(
            f"The weights in {path} are of another model: {named}{more}. Configure the model that they are of."
        )
    module.load_state_dict(theirs)


def weights_of(path: Path) -> dict[str, Tensor]:
    """Return the weights in a checkpoint of Lightning or a file of a state dict, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no weights, or more than tensors and plain values.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not a file. Checkpoints are checkpoints/best.ckpt and last.ckpt in a run's folder."
        )
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise ValueError(
            f"{path} cannot be read: it is no whole checkpoint, or holds objects other than tensors and plain values "
            f"({str(error).splitlines()[0]})."
        ) from error
    weights = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(weights, Mapping) or not weights or not all(isinstance(one, Tensor) for one in weights.values()):
        raise ValueError(
            f"{path} holds no weights. Name a checkpoint, or a file of torch.save(module.state_dict(), ...)."
        )
    return dict(weights)


def _checkpoint_in(run: Path) -> Path:
    folder = run / "checkpoints"
    named = [folder / name for name in ("best.ckpt", "last.ckpt") if (folder / name).is_file()]
    others = sorted(folder.glob("*.ckpt"))
    if named or len(others) == 1:
        return (named or others)[0]
    if others:
        raise FileNotFoundError(
            f"{run} holds neither best.ckpt nor last.ckpt. Name one of {', '.join(map(str, others))}."
        )
    raise FileNotFoundError(
        f"{run} holds no checkpoint. Its run has not finished an epoch, or keeps none, as those of mm-study: train it "
        "again with the command that the study's page has for it."
    )


def _shape(tensors: Mapping[str, Tensor], name: str) -> Any:
    return tuple(tensors[name].shape) if name in tensors else "not"
