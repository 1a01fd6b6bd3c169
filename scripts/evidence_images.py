"""The images of ``scripts/evidence.py``: CIFAR-10 from a folder of JPEG files, few of each class, every way to mix.

Each run is the one that the printed command makes. They share one process, in which the images are decoded once.
"""

from __future__ import annotations

import json
import math
import shlex
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_calibration_error

import mm_lightning
from mm_lightning.command.configuration import CONF
from mm_lightning.command.train import run
from mm_lightning.data import ImageFolderDataModule
from mm_lightning.data.image_files import find_images

# Methods, and what the command is told for them; label smoothing has a module of its own, see ``Images.arguments``.
MAIN = {
    "none": ["mixup=none"],
    "input": ["mixup=input"],
    "manifold": ["mixup=manifold"],
    "manifold_until80": ["mixup=manifold_until80"],
    "label smoothing": ["mixup=none"],
    "cutmix": ["mixup=cutmix"],
    "regmixup": ["mixup=regmixup"],
    "patchup": ["mixup=patchup"],
    "nfm": ["mixup=nfm"],
}
SETTINGS = {
    "input, alpha 1": ["mixup=input", "alpha=1"],
    "manifold, alpha 0.2": ["mixup=manifold", "alpha=0.2"],
    "manifold, alpha 1": ["mixup=manifold", "alpha=1"],
    "manifold_until80, alpha 1": ["mixup=manifold_until80", "alpha=1"],
    "first stage": ["mixup=manifold", "mixup.layers=blocks.0.layer1"],
}
_FILES = sorted(path.stem for path in (CONF / "mixup").glob("*.yaml"))
OTHERS = {name: [f"mixup={name}"] for name in _FILES if name not in {*MAIN, "tokens"}}
METHODS = MAIN | SETTINGS | OTHERS
HELD_OUT = 100  # images of each class that the temperature is fitted on


@dataclass(frozen=True)
class Images:
    """A budget of images and training.

    Attributes:
        per_class: Training images of each class, of the 5,000 in the folder.
        epochs: Of training.
        width: Channels of the network's first stage.
        methods: In the order in which they are run, group by group: all seeds of one before the next.
        seeds: Each draws training images of its own.
        of_class: Images of each class in the folder ``train``.
    """

    per_class: int
    epochs: int
    width: int
    methods: tuple[Collection[str], ...]
    seeds: int = 5
    of_class: int = 5000

    def arguments(self, folder: Path, method: str, seed: int) -> list[str]:
        """What the command is told. A temperature needs ``HELD_OUT`` images of each class that are not trained on."""
        return [
            *("data=image_folder", f"data.root={folder}", "data.size=16", "data.crop_padding=2", "data.batch_size=50"),
            *(f"data.val_share={1 - self.per_class / self.of_class:g}", "data.test_share=0.01", "data.data_seed=null"),
            *("model=preact_resnet18", "scheduler=cosine", f"max_epochs={self.epochs}"),
            *("+trainer.limit_val_batches=0", "callbacks=last", "logger=none"),
            *(self._smoothing() if method == "label smoothing" else [f"model.network.width={self.width}"]),
            *METHODS[method],
            f"seed={seed}",
        ]

    def command(self, method: str, seed: int = 0) -> str:
        """The command of a run, as it is typed."""
        return shlex.join(["python", "-m", "mm_lightning.train", *self.arguments(Path("FOLDER"), method, seed)])

    def _smoothing(self) -> list[str]:
        network = f"_target_:mm_lightning.models.preact_resnet18,num_classes:10,width:{self.width},in_channels:3"
        loss = "_target_:torch.nn.CrossEntropyLoss,label_smoothing:0.1"
        module = ["model._target_=mm_lightning.MixableModule", "+model._convert_=all", "~model.network"]
        return [*module, f"+model.blocks=[[{{{network}}},false]]", f"+model.loss={{{loss}}}"]


FIRST = ("none", "input", "manifold", "manifold_until80", "label smoothing")
IMAGES = {
    "images_100": Images(100, epochs=50, width=8, methods=(MAIN, SETTINGS, OTHERS)),
    "images_500": Images(500, epochs=25, width=8, methods=(FIRST, [name for name in MAIN if name not in FIRST])),
    "images_500_long": Images(500, epochs=100, width=8, methods=(("none", "manifold_until80"), ("manifold",)), seeds=3),
}


@contextmanager
def one_process(images: Images, folder: Path) -> Iterator[None]:
    """Compose runs by Hydra, and decode the folder's images once, here at the beginning."""
    read, held = ImageFolderDataModule._read, {}

    def read_once(module: ImageFolderDataModule) -> Any:
        key = (module.root, module.size, module.channels)
        if key not in held:
            held[key] = read(module)
        return held[key]

    with (
        initialize_config_dir(str(CONF), version_base="1.3"),
        patch.object(ImageFolderDataModule, "_read", read_once),
        patch("mm_lightning.data.image_folder.find_images", cache(find_images)),
    ):
        instantiate(composed(images.arguments(folder, "none", 0)).data).setup()
        yield


def composed(arguments: Sequence[str]) -> DictConfig:
    """The configuration of a run, with a folder that is not made yet."""
    return compose("train", [*arguments, "run_dir=."])


def score(images: Images, folder: Path, method: str, seed: int) -> dict[str, float]:
    """Train and test as the command does; then fit a temperature, and tell what it makes of the test."""
    with tempfile.TemporaryDirectory() as place:
        config = composed(images.arguments(folder, method, seed))
        config.run_dir = f"{place}/run"
        begin = time.process_time()  # of the processor: others may use it, too
        with redirect_stdout(StringIO()):
            run(config)
        seconds = time.process_time() - begin
        told = json.loads((Path(config.run_dir) / "metrics.json").read_text(encoding="utf-8"))
        module = mm_lightning.load(config.run_dir)
    data = instantiate(config.data)
    data.setup()
    images_held_out, classes = data.split("val")
    rows = rows_of_each_class(classes, HELD_OUT)
    temperature = fitted_temperature(*_logits(module, data, images_held_out[rows], classes[rows]))
    tested, targets = _logits(module, data, *data.split("test"))
    found = {key: told["metrics"][f"test/{key}"] for key in ("acc", "nll", "ece")}
    if not math.isclose(float(F.cross_entropy(tested, targets)), found["nll"], rel_tol=1e-3):
        raise RuntimeError(f"The module loaded from the run of {method}, seed {seed}, is not the one that was tested.")
    scaled = tested / temperature
    return {
        **found,
        "nll_scaled": float(F.cross_entropy(scaled, targets)),
        "ece_scaled": calibration_error(scaled, targets),
        "temperature": temperature,
        "seconds": seconds,
    }


def rows_of_each_class(targets: Tensor, count: int) -> Tensor:
    """Numbers of the first ``count`` rows of each class, ascending."""
    return torch.cat([torch.nonzero(targets == k)[:count, 0] for k in targets.unique()]).sort().values


def fitted_temperature(logits: Tensor, targets: Tensor) -> float:
    """The temperature in [0.05, 20] that gives ``logits / temperature`` the least cross-entropy (Guo et al., 2017)."""

    def nll(log_temperature: float) -> float:
        return float(F.cross_entropy(logits.double() / math.exp(log_temperature), targets))

    return math.exp(minimize_scalar(nll, bounds=(math.log(0.05), math.log(20)), method="bounded").x)


def calibration_error(logits: Tensor, targets: Tensor) -> float:
    """ECE with 15 bins, as the package's modules log it."""
    found = multiclass_calibration_error(logits.softmax(dim=1), targets, logits.shape[1], n_bins=15, norm="l1")
    return float(found)


def _logits(module: nn.Module, data: ImageFolderDataModule, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (N, K) of uint8 images, normalised as the test's are, and the targets."""
    normalized = data.transform("test")
    made = []
    with torch.no_grad():
        for begin in range(0, len(images), data.eval_batch_size):
            batch = images[begin : begin + data.eval_batch_size]
            made.append(module(normalized((batch,), (0, 0, 0))[0]))
    return torch.cat(made), targets
