"""Lightning under both of its names: ``lightning.pytorch`` and ``pytorch_lightning``.

They are two packages with the same classes twice. A trainer of one takes objects of its own classes only, and tells by
comparing code objects which hooks they override. What trainers are handed derives from the classes of both, therefore,
and its inherited methods are those of its trainer's package.
"""

from __future__ import annotations

import functools
import importlib
import logging
import operator
import sys
from inspect import getattr_static, isfunction, unwrap
from types import ModuleType
from typing import TYPE_CHECKING, Any

import lightning_utilities.core.rank_zero as rank_zero

__all__ = [
    "CallbackOfBoth",
    "DataModuleOfBoth",
    "LightningModule",
    "ModuleOfBoth",
    "Trainer",
    "classes",
    "package_of",
    "version_of",
]

_NAMES = ("lightning.pytorch", "pytorch_lightning")
_OLDEST = (2, 2)


def _version(package: ModuleType) -> tuple[int, ...]:
    return tuple(map(int, package.__version__.split(".")[:2]))


def _packages() -> tuple[ModuleType, ...]:
    """The packages that are installed; of the second one only a version whose classes are like the first one's.

    Both write to one logger that they share: to that of the package that was imported last. That stays as it was, and
    who silences the logger of either package silences it.
    """
    if "pytorch_lightning" not in sys.modules:
        importlib.import_module("lightning.pytorch")
    log, category = rank_zero.log, rank_zero.rank_zero_deprecation_category
    first = importlib.import_module("lightning.pytorch")
    try:
        second = importlib.import_module("pytorch_lightning")
    except ImportError:
        return (first,)
    rank_zero.log, rank_zero.rank_zero_deprecation_category = log, category
    log.addFilter(lambda record: all(record.levelno >= logging.getLogger(name).level for name in _NAMES))
    return (first, second) if _version(second) >= _OLDEST else (first,)


_PACKAGES = _packages()


def classes(name: str) -> tuple[type[Any], ...]:
    """The classes of that name, one of each package, for ``isinstance`` and ``except``.

    Args:
        name: Dotted, below ``lightning.pytorch``: ``"loggers.TensorBoardLogger"``.
    """
    path, _, attribute = name.rpartition(".")
    modules = [importlib.import_module(".".join(filter(None, (one.__name__, path)))) for one in _PACKAGES]
    return tuple(getattr(module, attribute) for module in modules)


def package_of(thing: Any) -> ModuleType:
    """The package whose trainer, module, data module or callback ``thing`` is; ``lightning.pytorch`` if of both."""
    kind: Any = type(thing)
    return _package_of_class(kind)


@functools.cache
def _package_of_class(kind: type) -> ModuleType:
    names = ("Trainer", "LightningModule", "LightningDataModule", "Callback")
    found = (one for one in _PACKAGES if issubclass(kind, tuple(getattr(one, name) for name in names)))
    return next(found, _PACKAGES[0])


def version_of(thing: Any) -> tuple[int, ...]:
    """Major and minor version of :func:`package_of` ``thing``."""
    return _version(package_of(thing))


class _OfItsTrainer:
    """A method that looks to each trainer like the one that an object of its own package inherits."""

    def __init__(self, name: str, bases: tuple[type, ...]) -> None:
        self.methods = {package: getattr(base, name) for package, base in zip(_PACKAGES, bases, strict=True)}

    def __get__(self, instance: Any, owner: type) -> Any:
        held = {} if instance is None else vars(instance)
        method = self.methods[package_of(held.get("_trainer", held.get("trainer")))]
        return method if instance is None else method.__get__(instance, owner)


def _of_both(name: str) -> Any:
    bases = classes(name)
    if len(bases) == 1:
        return bases[0]
    differing = {}
    for attribute in dir(bases[0]):
        found = [getattr_static(base, attribute, None) for base in bases]
        if all(map(isfunction, found)) and len({unwrap(method).__code__ for method in found}) > 1:
            differing[attribute] = _OfItsTrainer(attribute, bases)
    return type(f"{name}OfBoth", bases, {"__module__": __name__, "__doc__": bases[0].__doc__, **differing})


if TYPE_CHECKING:
    import lightning.pytorch
    import pytorch_lightning
    from lightning.pytorch import Trainer as Trainer

    LightningModule = lightning.pytorch.LightningModule | pytorch_lightning.LightningModule

    # With a base of any type, so that a type checker takes them for objects of the other package as well.
    class CallbackOfBoth(lightning.pytorch.Callback, Any):  # noqa: D101
        pass

    class ModuleOfBoth(lightning.pytorch.LightningModule, Any):  # noqa: D101
        pass

    class DataModuleOfBoth(lightning.pytorch.LightningDataModule, Any):  # noqa: D101
        pass

else:
    Trainer, LightningModule = (
        functools.reduce(operator.or_, classes(name)) for name in ("Trainer", "LightningModule")
    )
    CallbackOfBoth, ModuleOfBoth, DataModuleOfBoth = map(
        _of_both, ("Callback", "LightningModule", "LightningDataModule")
    )
