"""The public packages whose modules are tried, and what is installed for each."""

from __future__ import annotations

import dataclasses

TORCH = "torch==2.13.0"
VISION = ("torch==2.14.1", "torchvision==0.29.1")


@dataclasses.dataclass(frozen=True)
class Package:
    """A package, installed into an environment of its own.

    Attributes:
        name: Of the file beside this one that has its cases.
        distribution: What pip calls it.
        requirements: What pip is asked for, beside it.
        imports_twin: Whether it imports ``pytorch_lightning`` for ``lightning.pytorch``.
    """

    name: str
    distribution: str
    requirements: tuple[str, ...] = (TORCH,)
    imports_twin: bool = False


PACKAGES = [
    Package("lightning_demos", "lightning"),
    Package("pytorch_forecasting", "pytorch-forecasting"),
    Package("neuralforecast", "neuralforecast", imports_twin=True),
    Package("chemprop", "chemprop"),
    Package("gluonts", "gluonts", (TORCH, "gluonts[torch]")),
    Package("darts", "darts", imports_twin=True),
    Package("pytorch_tabular", "pytorch-tabular", (TORCH, "requests"), imports_twin=True),
    Package("torch_uncertainty", "torch-uncertainty", (*VISION, "rich", "scikit-learn", "huggingface_hub", "timm")),
    Package("scvi_tools", "scvi-tools"),
    Package("lightning_uq_box", "lightning-uq-box", VISION),
    Package("torchgeo", "torchgeo", (*VISION, "requests")),
    Package("deeptab", "deeptab"),
]
BY_NAME = {package.name: package for package in PACKAGES}
