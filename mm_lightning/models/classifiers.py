"""Whole networks as classifiers that log what a MixableModule logs: one's own, and those of timm and torchvision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mm_lightning.arguments import check_count, check_flag, no_such, plain, refusal
from mm_lightning.module import MixableModule

__all__ = ["classifier", "timm_classifier", "torchvision_classifier"]

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
MakeScheduler = Callable[[Optimizer], LRScheduler]
Loss = Callable[[Tensor, Tensor], Any]


def classifier(
    network: nn.Module,
    num_classes: int | None,
    optimizer: MakeOptimizer | None = None,
    scheduler: MakeScheduler | None = None,
    loss: Loss | None = None,
) -> MixableModule:
    """Make a network a MixableModule of one block, ``blocks.0``; ``layers="auto"`` finds the layers inside it.

    Args:
        network: Takes inputs (N, ...) to logits (N, K).
        num_classes: K, >= 2; None, where the command leaves it to the data, is refused.
        optimizer: As of :class:`MixableModule`.
        scheduler: The same.
        loss: The same.
    """
    _check_num_classes(num_classes)
    # not eligible: with a MixPoint in front, "auto" would be that one alone
    return MixableModule([(network, False)], loss, optimizer, scheduler, num_classes=num_classes)


def timm_classifier(
    name: str,
    num_classes: int | None,
    input_shape: Sequence[int] | None = None,
    pretrained: bool = False,
    arguments: Mapping[str, Any] | None = None,
    optimizer: MakeOptimizer | None = None,
    scheduler: MakeScheduler | None = None,
    loss: Loss | None = None,
) -> MixableModule:
    """Make a network of timm a classifier.

    Args:
        name: What ``timm.create_model`` calls it.
        num_classes: K, >= 2; None, where the command leaves it to the data, is refused.
        input_shape: (C, H, W) of an image. C goes to the network, and H and W where it is made for one size. None
            leaves both as timm has them.
        pretrained: Whether to begin with the weights that timm downloads, but for the last layer.
        arguments: More of ``timm.create_model``, e.g. ``{"drop_path_rate": 0.1}``.
        optimizer: As of :class:`MixableModule`.
        scheduler: The same.
        loss: The same.

    Raises:
        ImportError: If timm is not installed.
        ValueError: If it has no such network.
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError("model=timm needs timm: pip install mm-lightning[timm].") from error
    if not isinstance(name, str) or not timm.is_model(name):
        raise ValueError(no_such(str(name), timm.list_models(), "network of timm"))
    _check_num_classes(num_classes)
    check_flag("pretrained", pretrained, "True begins with the weights that timm downloads.")
    settings: dict[str, Any] = {"num_classes": num_classes, "pretrained": pretrained}
    if input_shape is not None:
        channels, *size = _image_shape(input_shape)
        settings["in_chans"] = channels
        if getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False):
            settings["img_size"] = tuple(size)
    network = timm.create_model(name, **{**settings, **_of_the_network(arguments)})
    return classifier(network, num_classes, optimizer, scheduler, loss)


def torchvision_classifier(
    name: str,
    num_classes: int | None,
    input_shape: Sequence[int] | None = None,
    arguments: Mapping[str, Any] | None = None,
    optimizer: MakeOptimizer | None = None,
    scheduler: MakeScheduler | None = None,
    loss: Loss | None = None,
) -> MixableModule:
    """Make an untrained network of torchvision a classifier.

    Args:
        name: What ``torchvision.models.get_model`` calls it.
        num_classes: K, >= 2; None, where the command leaves it to the data, is refused.
        input_shape: (C, H, W) of an image, where C must be 3.
        arguments: More of the network's own, e.g. ``{"dropout": 0.1}``.
        optimizer: As of :class:`MixableModule`.
        scheduler: The same.
        loss: The same.

    Raises:
        ImportError: If torchvision is not installed.
        ValueError: If it has no such network, or images are not RGB.
    """
    try:
        from torchvision import models
    except ImportError as error:
        raise ImportError("model=torchvision needs torchvision: pip install mm-lightning[torchvision].") from error
    names = models.list_models(module=models)
    if name not in names:
        raise ValueError(no_such(str(name), names, "network of torchvision"))
    _check_num_classes(num_classes)
    if input_shape is not None and (channels := _image_shape(input_shape)[0]) != 3:
        way_out = "model=timm takes any number."
        raise ValueError(f"Networks of torchvision take 3 channels, the data have {channels}. {way_out}")
    settings: dict[str, Any] = {"num_classes": num_classes}
    if name in ("googlenet", "inception_v3"):
        settings["aux_logits"] = False  # or in training they return two outputs
    return classifier(
        models.get_model(name, weights=None, **{**settings, **_of_the_network(arguments)}),
        num_classes,
        optimizer,
        scheduler,
        loss,
    )


def _check_num_classes(num_classes: Any) -> None:
    way_out = "It is read from the data where those have num_classes."
    check_count("num_classes", num_classes, 2, way_out)


def _image_shape(input_shape: Sequence[int]) -> tuple[int, ...]:
    shape: Any = plain(input_shape)
    if not isinstance(shape, list) or not all(isinstance(size, Integral) for size in shape):
        raise refusal("input_shape", shape, "three integers (C, H, W)", "It is read from the data where it is null.")
    if len(shape) != 3:
        got = f"an input of the data has the shape {tuple(shape)}"
        raise ValueError(f"The network takes images (C, H, W), {got}. model=mlp takes any.")
    return tuple(map(int, shape))


def _of_the_network(arguments: Any) -> dict[str, Any]:
    if arguments is not None and not isinstance(arguments, Mapping):
        raise refusal("arguments", arguments, "a mapping of more arguments of the network", "None gives no more.")
    return dict(arguments or {})
