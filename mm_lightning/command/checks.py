"""What can be said of a configuration before anything is made of it: names, types, epochs, devices."""

from __future__ import annotations

import difflib
import inspect
import os
import types
import typing
from collections.abc import Iterator, Sequence
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from omegaconf import DictConfig, OmegaConf

import mm_lightning
from mm_lightning.arguments import plain
from mm_lightning.command.model import OF_THE_DATA

__all__ = ["check_config", "check_devices"]

_OF_HYDRA = {"_target_", "_partial_", "_args_", "_recursive_", "_convert_"}
_SCALARS = {int: "an integer", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
# optimizer and scheduler before the model, which holds them: a key is named as it is typed
_MAKERS = ("optimizer", "scheduler", "data", "model", "mixup", "trainer", "logger", "diagnostics", "callbacks")
_PACKAGES = ("lightning", "mm_lightning", "torch", "torchmetrics", "torchvision", "timm")  # imported or not
_MISSING = "???"  # a value that has to be typed, of which Hydra says more
_EXAMPLE = "Set max_epochs=10, say."


def check_config(config: DictConfig) -> None:
    """Refuse a configuration that no run can be made of, or only one that is not what was meant.

    Args:
        config: The composed configuration of a run.

    Raises:
        ValueError: If a name is not there, or a value is none that is possible.
        TypeError: If a value is of another type than its target takes.
        ImportError: If a target is there and cannot be imported.
    """
    trainer = config.get("trainer") or {}
    _check_epochs(trainer)
    _check_schedule(config.get("scheduler") or {}, trainer)
    for place in _MAKERS:
        if place in config:
            _check_node(OmegaConf.to_container(config[place], resolve=True), place)


def check_devices(config: DictConfig) -> None:
    """Refuse a GPU where there is none, and more than there are.

    Raises:
        ValueError: With what can be chosen instead.
    """
    trainer = config.get("trainer") or {}
    accelerator, devices = trainer.get("accelerator"), trainer.get("devices")
    has_gpu = CUDAAccelerator.is_available() or MPSAccelerator.is_available()
    if (accelerator == "gpu" and not has_gpu) or (accelerator == "cuda" and not CUDAAccelerator.is_available()):
        raise ValueError(
            f"trainer.accelerator is {accelerator!r}, but torch {torch.__version__} finds no GPU here. Choose "
            "trainer=cpu, or install the driver and a torch that is built for it."
        )
    there = torch.cuda.device_count()
    if isinstance(devices, int) and accelerator in ("gpu", "cuda", "auto") and 0 < there < devices:
        raise ValueError(
            f"trainer.devices is {devices}, but torch finds {there} GPU{'s' * (there > 1)}. Set "
            f"trainer.devices={there}, or trainer.accelerator=cpu for processes on the CPU."
        )


def _check_node(node: Any, place: str) -> None:
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    if isinstance(node, dict) and node.get("_target_", _MISSING) != _MISSING:
        target = _target(node["_target_"], f"{place}._target_")
        _check_arguments(target, node, place)
    for key, value in children:
        _check_node(value, f"{place}[{key}]" if isinstance(node, list) else f"{place}.{key}")


# --- names


def _target(path: Any, place: str) -> Any:
    """What a ``_target_`` names; where it names nothing, say what is nearest."""
    if not isinstance(path, str) or not path.strip("."):
        raise TypeError(f"{place} must be the dotted path of a class or a function, got {path!r}.")
    found: Any = None
    parts = path.split(".")
    for i, part in enumerate(parts):
        try:
            inner = _step(found, parts[:i], part)
        except ImportError as error:
            raise ImportError(f"{place}: {'.'.join(parts[: i + 1])!r} cannot be imported: {error}.") from error
        if inner is None:
            raise ValueError(f"{place}: there is no {path!r}. {_nearest(found, parts, i)}")
        found = inner
    if not callable(found):
        raise TypeError(f"{place} must be the dotted path of a class or a function, got {path!r}, which is neither.")
    return found


def _step(found: Any, known: Sequence[str], part: str) -> Any:
    """What ``part`` is in what has been found: an attribute or a module; None if there is none.

    Raises:
        ImportError: If a module is there, but something that it imports is not.
    """
    if found is not None and hasattr(found, part):
        return getattr(found, part)
    if found is not None and not hasattr(found, "__path__"):
        return None
    name = ".".join([*known, part])
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            return None
        raise


def _nearest(found: Any, parts: Sequence[str], i: int) -> str:
    """Name what is like the missing i-th part, or say where it is missing."""
    if found is None:
        names = {*_PACKAGES, *(module.name for module in iter_modules([os.getcwd()]))}
        if len(parts) == 1 and hasattr(mm_lightning, parts[0]):
            return f"Did you mean 'mm_lightning.{parts[0]}'?"
    else:
        names = {*dir(found), *(module.name for module in iter_modules(getattr(found, "__path__", [])))}
    near = difflib.get_close_matches(parts[i], [name for name in names if name[0] != "_"])
    is_last = found is not None and i == len(parts) - 1
    if near := [name for name in near if not is_last or callable(getattr(found, name, None))]:
        return f"Did you mean {'.'.join([*parts[:i], near[0], *parts[i + 1 :]])!r}?"
    if found is None and len(parts) > 1:
        return f"Python cannot import {parts[0]!r}: set PYTHONPATH to the folder that it is in."
    where = f"{'.'.join(parts[:i])!r} has no {parts[i]!r}" if i else f"Python cannot import {parts[i]!r}"
    return f"{where}: name a class or a function with its modules."


# --- types


def _check_arguments(target: Any, node: dict[str, Any], place: str) -> None:
    """Refuse values that are not of the type that the target's signature annotates, and names that it lacks."""
    try:
        parameters = inspect.signature(target).parameters
        hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (TypeError, ValueError, NameError, AttributeError):  # nothing can be known of it
        return
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    # Classes of this package say more about their own arguments than a type.
    parts = target.__module__.split(".")
    says_more = inspect.isclass(target) and parts[0] == "mm_lightning" and parts[1:2] != ["command"]
    for key, value in node.items():
        if key in _OF_HYDRA:
            continue
        if key not in parameters and not takes_any:
            near = difflib.get_close_matches(key, parameters, n=1)
            meant = f" Did you mean {near[0]!r}?" if near else f" It takes {', '.join(parameters) or 'none'}."
            raise ValueError(f"{place}.{key}: {node['_target_']} has no such argument.{meant}")
        is_left_to_data = value is None and key in OF_THE_DATA and place.split(".")[0] == "model"
        is_known = key in hints and not says_more and value != _MISSING and not is_left_to_data
        if is_known and not _is_of(value, hints[key]):
            came = "null" if value is None else f"{value!r} of type {type(value).__name__}"
            raise TypeError(f"{place}.{key} must be {_in_words(hints[key])}, got {came}.")


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value of a configuration is of an annotated type. What is not understood here is taken for granted."""
    if isinstance(value, dict):  # of which something is made that has a type then
        return True
    if _is_scalar(hint):
        if hint is float:
            return isinstance(value, (int, float)) and not isinstance(value, bool)
        return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_is_of(value, one) for one in inner)
    if origin is typing.Literal:
        return value in inner
    if _is_sequence(origin):
        return isinstance(value, list) and all(_is_of(one, inner[0]) for one in value if inner)
    return hint is not torch.Tensor


def _is_scalar(hint: Any) -> bool:
    return any(hint is one for one in _SCALARS)


def _is_sequence(origin: Any) -> bool:
    return inspect.isclass(origin) and origin.__name__ in ("list", "Sequence", "Iterable", "Collection")


def _in_words(hint: Any) -> str:
    words = list(dict.fromkeys(_words(hint)))
    if "a number" in words and "an integer" in words:
        words.remove("an integer")
    return " or ".join(sorted(words, key="null".__eq__))


def _words(hint: Any) -> Iterator[str]:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if _is_scalar(hint):
        yield _SCALARS[hint]
    elif origin in (typing.Union, types.UnionType):
        for one in inner:
            yield from _words(one)
    elif origin is typing.Literal:
        yield from (repr(one) for one in inner)
    elif _is_sequence(origin):
        of = [f"{word.split()[-1]}s" if word != "null" else word for one in inner[:1] for word in _words(one)]
        yield f"a list of {' or '.join(of)}" if of else "a list"


# --- epochs


def _check_epochs(trainer: Any) -> None:
    steps = trainer.get("max_steps", -1)
    if isinstance(steps, bool) or not isinstance(steps, int) or (steps < 1 and steps != -1):
        raise ValueError(f"trainer.max_steps must be an integer >= 1, or -1 for no limit, got {steps!r}.")
    if "max_epochs" not in trainer:
        return
    epochs = trainer["max_epochs"]
    if epochs is None and steps == -1:
        raise ValueError(f"max_epochs is null, and trainer.max_steps sets no end either. {_EXAMPLE}")
    if epochs is not None and (
        isinstance(epochs, bool) or not isinstance(epochs, int) or (epochs < 1 and epochs != -1)
    ):
        raise ValueError(f"max_epochs must be an integer >= 1, or -1 for no end, got {epochs!r}. {_EXAMPLE}")


def _check_schedule(scheduler: Any, trainer: Any) -> None:
    """A schedule along the run needs the number of its epochs, and one of milestones these."""
    if "milestones" in scheduler:
        found = plain(scheduler["milestones"])
        is_list = isinstance(found, list) and len(found) > 0
        if not is_list or any(isinstance(one, bool) or not isinstance(one, int) or one < 1 for one in found):
            shown = "null" if found is None else repr(found)
            way_out = "scheduler.milestones=[100,150], say, or +epochs=field_200, which sets max_epochs with them"
            raise ValueError(
                f"scheduler.milestones must be a list of epochs >= 1, got {shown}. Give {way_out}; scheduler=constant "
                "has none."
            )
    period = scheduler.get("T_max", 1)
    if isinstance(period, int) and not isinstance(period, bool) and period >= 1:
        return
    shown = "null" if period is None else repr(period)
    if period == trainer.get("max_epochs", period):
        raise ValueError(
            f"scheduler=cosine falls to zero over max_epochs, which is {shown} here. Set max_epochs=10, say, or "
            "choose scheduler=step or scheduler=constant."
        )
    raise ValueError(f"scheduler.T_max must be an integer >= 1, in epochs, got {shown}.")
