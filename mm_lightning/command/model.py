"""The model of a run: given what it needs to know of the data, and the optimizer where it has none of its own."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from mm_lightning.files import whole_file
from mm_lightning.namespaces import LightningModule, classes

__all__ = ["OF_THE_DATA", "build_model", "fitted_to_data", "record"]

OF_THE_DATA = ("num_classes", "input_shape", "in_channels")
_OF_THE_RUN = ("optimizer", "scheduler")


def fitted_to_data(
    config: DictConfig, data: Any, way_out: str = "Leave it null, and it is read from the data."
) -> DictConfig:
    """Fill in what the model is built for: ``num_classes``, ``input_shape`` and ``in_channels`` of the data.

    Where one of them is null, anywhere below ``model``, it becomes the data's; and where the model's class or function
    takes it, or ``optimizer`` or ``scheduler``, and the configuration leaves it out. It stays as it is where the data
    do not have it as an attribute: not now, and not after ``prepare_data()`` and ``setup("fit")``, which are called if
    it is needed. ``in_channels`` is the first of the three numbers of ``input_shape``.

    Args:
        config: The composed configuration.
        data: The data module.
        way_out: What is said to do about a value that is not the data's.

    Returns:
        A copy.

    Raises:
        ValueError: If a value is given that is not the data's, or the model's class is not.
    """
    config = copy.deepcopy(config)
    if OmegaConf.is_missing(config.model, "_target_"):
        raise ValueError("model._target_ is missing. Give the class of a LightningModule, e.g. my_package.MyModule.")
    facts = _Facts(data)
    with open_dict(config.model):
        for name, is_required in _left_out(config.model).items():
            if name in _OF_THE_RUN and name in config:
                config.model[name] = f"${{{name}}}"
            elif name in OF_THE_DATA and (own := facts.get(name, is_required)) is not None:
                config.model[name] = own
    for place, node, name in list(_places(config.model, "model")):
        given, own = plain_list(node[name]), facts.get(name, is_needed=node[name] is None)
        if given is None:
            node[name] = own
        elif own is not None and given != own:
            text = f"{place}.{name} is {given}, but that of the data ({type(data).__name__}) is {own}"
            raise ValueError(f"{text}. {way_out}")
    return config


def build_model(config: DictConfig) -> pl.LightningModule:
    """Build the model, with the configured optimizer and scheduler if it defines no ``configure_optimizers``.

    Raises:
        TypeError: If it is no LightningModule.
    """
    model: Any = instantiate(config.model)
    kinds = classes("LightningModule")
    if not isinstance(model, kinds):
        way_out = "A torch network is trained with model=preact_resnet18 model.network._target_=..."
        raise TypeError(f"model must be a LightningModule, got one of type {type(model).__name__}. {way_out}")
    if any(type(model).configure_optimizers is kind.configure_optimizers for kind in kinds):
        made_by = [instantiate(config[name]) for name in _OF_THE_RUN]
        model.configure_optimizers = partial(_optimizers, model, *made_by)
    return model


def record(folder: Path, config: DictConfig) -> None:
    """Write the configuration, resolved, to the run's folder: with it the model can be built without the data."""
    with whole_file(folder / "config.yaml") as file:
        file.write(OmegaConf.to_yaml(config, resolve=True).encode())


def plain_list(value: Any) -> Any:
    """A list of OmegaConf's or a tuple as a list, all else as it is."""
    return list(value) if isinstance(value, (ListConfig, tuple)) else value


class _Facts:
    """What the data say of themselves, set up once if they have to be."""

    def __init__(self, data: Any) -> None:
        self.data = data
        self.is_set_up = False

    def get(self, name: str, is_needed: bool) -> Any:
        """The data's, or None. Where it is not needed, data that have no such attribute are not set up for it."""
        if name == "in_channels" and not hasattr(self.data, name):
            shape = self.get("input_shape", is_needed)
            return shape[0] if shape is not None and len(shape) == 3 else None
        known = getattr(self.data, name, None)
        if known is None and not self.is_set_up and (is_needed or hasattr(self.data, name)):
            self.data.prepare_data()
            self.data.setup("fit")
            self.is_set_up = True
            known = getattr(self.data, name, None)
        return plain_list(known)


def _left_out(node: DictConfig) -> dict[str, bool]:
    """What can be handed on that the target takes and ``node`` does not give, and whether the target needs it."""
    try:
        parameters = inspect.signature(get_object(node._target_)).parameters
    except (ImportError, ValueError, TypeError, AttributeError, InstantiationException):
        return {}  # instantiate says what is wrong with it
    names = [name for name in (*OF_THE_DATA, *_OF_THE_RUN) if name in parameters and name not in node]
    return {name: parameters[name].default is inspect.Parameter.empty for name in names}


def _places(node: DictConfig, place: str) -> Iterator[tuple[str, DictConfig, str]]:
    """Every key below ``node`` that names something of the data, with the place and the node it is in."""
    for key in map(str, node):
        if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            continue
        if key in OF_THE_DATA:
            yield place, node, key
        elif isinstance(node[key], DictConfig):
            yield from _places(node[key], f"{place}.{key}")


def _optimizers(model: LightningModule, optimizer: Any, scheduler: Any) -> dict[str, Any]:
    made = optimizer(model.parameters())
    return {"optimizer": made, "lr_scheduler": scheduler(made)}
