import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from mm_lightning import ManifoldMixupCallback
from mm_lightning.models import classifier, preact_resnet18, timm_classifier, torchvision_classifier

MakeTrainer = Callable[..., pl.Trainer]


def needs(name: str) -> Any:
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"needs {name}")


def images(channels: int = 3, size: int = 32) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(8, channels, size, size, generator=generator)
    return DataLoader(TensorDataset(pixels, torch.arange(8) % 3), batch_size=4)


@pytest.mark.slow
def test_a_whole_network_is_mixed_at_its_stages_and_logs_as_a_mixable_module(make_trainer: MakeTrainer) -> None:
    torch.manual_seed(0)
    network = preact_resnet18(num_classes=3, width=2, in_channels=1)
    optimizer, scheduler = partial(torch.optim.SGD, lr=0.5), partial(torch.optim.lr_scheduler.StepLR, step_size=1)
    module = classifier(network, 3, optimizer, scheduler)
    callback = ManifoldMixupCallback(seed=1)
    trainer = make_trainer(callback)
    trainer.fit(module, images(channels=1, size=8), images(channels=1, size=8))
    assert set(callback.layer_names) == {"input", "blocks.0.layer1", "blocks.0.layer2"}
    keys = {"train/loss", "train/acc_mixed", "val/loss", "val/acc", "val/nll", "val/ece"}
    assert set(trainer.callback_metrics) == keys
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_classes": None}, TypeError, r"num_classes must be an integer >= 1, got None .*read from data"),
        (
            {"in_channels": None},
            TypeError,
            r"in_channels must be an integer >= 1, got None .*model=mlp takes all others",
        ),
        ({"in_channels": 0}, ValueError, r"in_channels must be an integer >= 1, got 0"),
    ],
    ids=["classes", "no image", "channels"],
)
def test_networks_for_unknown_data_are_refused(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        preact_resnet18(**settings)


@pytest.mark.parametrize(("num_classes", "error"), [(None, TypeError), (1, ValueError)])
def test_a_classifier_of_unknown_or_one_class_is_refused(num_classes: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"num_classes must be an integer >= 2, got "):
        classifier(torch.nn.Linear(2, 2), num_classes)


@pytest.mark.parametrize(
    ("make", "package"),
    [(timm_classifier, "timm"), (torchvision_classifier, "torchvision")],
    ids=["timm", "torchvision"],
)
def test_without_the_package_one_sentence_says_what_to_install(
    make: Callable[..., Any], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ImportError, match=rf"^model={package} needs {package}: pip install mm-lightning\[{package}\]\.$"
    ):
        make("resnet18", 3)


@needs("timm")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "channels", "size"),
    [("resnet18", 1, 32), ("test_vit", 3, 32), ("test_convnext", 3, 32)],
    ids=["channels", "size", "stages"],
)
def test_networks_of_timm_are_made_for_the_images_and_mixed_inside(
    name: str, channels: int, size: int, make_trainer: MakeTrainer
) -> None:
    module = timm_classifier(name, 3, [channels, size, size])
    callback = ManifoldMixupCallback(seed=1)
    trainer = make_trainer(callback)
    trainer.fit(module, images(channels, size), images(channels, size))
    assert len(callback.layer_names) >= 3
    assert module(torch.zeros(2, channels, size, size)).shape == (2, 3)


@needs("timm")
def test_names_that_timm_does_not_know_are_refused_with_near_ones() -> None:
    with pytest.raises(ValueError, match=r"no network of timm 'resnet19'\. Did you mean .*'resnet1"):
        timm_classifier("resnet19", 3)
    with pytest.raises(ValueError, match=r"takes images \(C, H, W\), .* has the shape \(5,\)\. model=mlp takes any\."):
        timm_classifier("resnet18", 3, [5])
    with pytest.raises(TypeError, match=r"input_shape must be three integers \(C, H, W\), got 32 of type int"):
        timm_classifier("resnet18", 3, 32)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"arguments must be a mapping .*, got 'deep' of type str"):
        timm_classifier("resnet18", 3, arguments="deep")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="pretrained must be True or False, got 'yes' of type str"):
        timm_classifier("resnet18", 3, pretrained="yes")  # type: ignore[arg-type]


@needs("torchvision")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_networks_of_torchvision_are_mixed_inside(name: str, make_trainer: MakeTrainer) -> None:
    module = torchvision_classifier(name, 3, [3, 32, 32])
    callback = ManifoldMixupCallback(seed=1)
    make_trainer(callback).fit(module, images(), images())
    assert len(callback.layer_names) >= 3


@needs("torchvision")
def test_what_torchvision_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no network of torchvision 'resnet19'\. Did you mean 'resnet18'"):
        torchvision_classifier("resnet19", 3)
    with pytest.raises(ValueError, match=r"take 3 channels, the data have 1\. model=timm"):
        torchvision_classifier("resnet18", 3, [1, 32, 32])
