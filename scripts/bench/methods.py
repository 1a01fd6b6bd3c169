"""A training step of every way to mix, conf/mixup/*.yaml, against one without mixup and one of linear mixing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor, nn

from bench.fitting import RandomBatches, mean_step, untimed_steps
from bench.networks import Network, deep_mlp, residual_network, transformer
from bench.timing import compare, ratio
from mm_lightning import ManifoldMixupCallback
from mm_lightning.command.configuration import CONF

__all__ = ["measure", "ways"]

NONE, LINEAR = "none", "manifold"
# Of the step with linear mixing, at most.
OVER_LINEAR = {"images": {"cutmix_hidden": 1.05, "patchup": 1.05, "patchup_hard": 1.05}, "vectors": {"nearest": 1.10}}
DRAWN_AT_ONCE = 32


def measure(quick: bool) -> dict[str, Any]:
    """Time the steps of the ways that fit images, vectors and sequences."""
    networks = {
        "images": residual_network(batch_size=8, size=8) if quick else residual_network(),
        "vectors": deep_mlp(depth=3, width=16 if quick else 512, batch_size=8 if quick else 512),
        "sequences": _sequences(quick),
    }
    rows = []
    for kind, network in networks.items():
        sides = _sides(network, _fitting(network), quick)
        row = compare(f"{network.name}, over no mixup", sides, NONE, 1 if quick else 5, warmup=not quick, kind=kind)
        rows += [row, _over_linear(row, network.name, OVER_LINEAR.get(kind, {}))]
    return {"rows": rows}


def ways() -> list[str]:
    """Names of the ways, as in ``mixup=NAME``, but ``none``."""
    return sorted(path.stem for path in (CONF / "mixup").glob("*.yaml") if path.stem != NONE)


def _over_linear(row: dict[str, Any], name: str, targets: dict[str, float]) -> dict[str, Any]:
    """The same runs against those of linear mixing."""
    seconds = {side: runs for side, runs in row["seconds"].items() if side != NONE}
    ratios = {side: ratio(runs, seconds[LINEAR]) for side, runs in seconds.items() if side != LINEAR}
    medians = {side: row["median_seconds"][side] for side in seconds}
    case = f"{name}, over linear mixing"
    return {**row, "case": case, "against": LINEAR, "median_seconds": medians, "ratios": ratios, "targets": targets}


def _sides(network: Network, names: list[str], quick: bool) -> dict[str, Callable[[], float]]:
    untimed = untimed_steps(len(network.places))
    batches = RandomBatches(network.shape, network.classes, untimed + (2 if quick else DRAWN_AT_ONCE) + 1)

    def run(callbacks: list[pl.Callback]) -> float:
        return mean_step(network.module, batches, callbacks, untimed=untimed)

    sides: dict[str, Callable[[], float]] = {NONE: lambda: run([])}
    return sides | {name: lambda name=name: run([_callback(name, network)]) for name in names}  # type: ignore[misc]


def _fitting(network: Network) -> list[str]:
    """The ways that can mix this network's layers."""
    batches = RandomBatches(network.shape, network.classes, 3)
    names = []
    for name in ways():
        try:
            mean_step(network.module, batches, [_callback(name, network)], untimed=0)
        except ValueError as error:
            if "cannot be mixed" not in str(error):
                raise
        else:
            names.append(name)
    return names


def _callback(name: str, network: Network) -> ManifoldMixupCallback:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", [f"mixup={name}", "run_dir=."]).mixup
    if config.layers == "auto":
        config.layers = list(network.places)
    callback: ManifoldMixupCallback = instantiate(config, seed=0)  # the layers of all are the same
    return callback


def _sequences(quick: bool) -> Network:
    depth, width, heads, length, rows = (2, 16, 2, 8, 8) if quick else (4, 128, 4, 32, 64)
    module = _Transformer(transformer(depth, width, heads, length))
    places = {f"network.encoder.layers.{i}": i + 1 for i in range(depth - 1)}
    return Network(
        name=f"transformer, {depth} x {width}, {length} tokens, batch {rows}",
        module=module,
        parts=[],
        places=places,
        shape=(rows, length, width),
        classes=10,
        callback=lambda seed: ManifoldMixupCallback(layers=list(places), seed=seed, schedule=None),
    )


class _Transformer(pl.LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.01)
