"""Floating point operations a second: of matrix products, and of the training step that is made of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.command import SMALL, bare_network, compose_experiment
from bench.timing import Run, compare, ratio, seconds_of
from mm_lightning.fast_cpu import fast_products, keep_freed_memory

__all__ = ["Product", "measure", "products_of"]

BATCH_SIZE = 100
LIBRARIES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "MKL (default)": nullcontext,
    "oneDNN (fast_cpu)": fast_products,
}
WAYS = {"for-loop": {"foreach": False, "fused": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "Adam": torch.optim.Adam,
    "SGD with momentum": partial(torch.optim.SGD, momentum=0.9),
}
LEARNING_RATE = 1e-6  # of steps along one gradient again and again


class Product(NamedTuple):
    """A matrix product of the network: ``left @ right``, laid out in memory as autograd has it."""

    case: str
    left: Tensor
    right: Tensor

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.left.shape[0] * self.left.shape[1] * self.right.shape[1]


class Length(NamedTuple):
    """How long it is measured: seconds of one run of a short call, and rounds."""

    seconds: float
    rounds: int


def measure(quick: bool) -> dict[str, Any]:
    """Time the products, then the step and the optimizers with memory as it comes and with freed memory kept."""
    length = Length(0.002, 2) if quick else Length(0.05, 20)
    network, _ = bare_network(compose_experiment("mixup=none", *[SMALL] * quick))
    size = 128 if quick else 2048
    square = Product(f"{size} x {size} x {size}", torch.randn(size, size), torch.randn(size, size))
    products = list(products_of(network, BATCH_SIZE))
    rows = [_compare_products(product, length) for product in [*products[:5], square]]
    gflops = [rate for row in rows for rate in _rates(row)]
    parts: list[dict[str, Any]] = []
    notes = [f"A step has {sum(product.flops for product in products) / 1e9:.3f} GFLOP in its matrix products alone."]
    for memory in ("memory as it comes", "freed memory kept"):
        if memory == "freed memory kept" and not keep_freed_memory():  # last, for it cannot be undone
            notes.append("The C library is not glibc, which keep_freed_memory() speaks to.")
            break
        step = _Step(quick)
        rows.append(_compare_steps(step, products, memory, length))
        gflops += [rate for rate in _rates(rows[-1]) if rate["side"] in LIBRARIES]
        parts += _parts(step, rows[-1], memory, 3 if quick else 20)
        rows += [_compare_optimizers(name, list(step.network.parameters()), memory, length) for name in OPTIMIZERS]
    with fast_products() as is_fast:
        if not is_fast:
            notes.append("fast_products() left everything as it was here, so both libraries are the default one.")
    return {"rows": rows, "gflops": gflops, "parts": parts, "notes": notes}


def products_of(network: nn.Module, batch_size: int) -> Iterator[Product]:
    """The matrix products of a training step, layer by layer; the inputs of the first layer have no gradient."""
    generator = torch.Generator().manual_seed(0)
    linears = [module for module in network.modules() if isinstance(module, nn.Linear)]
    for linear in linears:
        inputs = torch.randn(batch_size, linear.in_features, generator=generator)
        gradient = torch.randn(batch_size, linear.out_features, generator=generator)
        weight = linear.weight.detach()
        shape = f"{batch_size} x {linear.in_features} x {linear.out_features}"
        yield Product(f"{shape}, forward", inputs, weight.t())
        yield Product(f"{shape}, gradient of the weights", gradient.t(), inputs)
        if linear is not linears[0]:
            yield Product(f"{shape}, gradient of the inputs", gradient, weight)


class _Step:
    """A training step of mnist_bottleneck on one batch of noise."""

    def __init__(self, quick: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.network, self.optimizer = bare_network(compose_experiment("mixup=none", *[SMALL] * quick))
        self.images = torch.rand(BATCH_SIZE, 1, 28, 28, generator=generator)
        self.targets = torch.randint(10, (BATCH_SIZE,), generator=generator)

    def __call__(self) -> list[float]:
        """Take the step, and return the seconds of its four parts, in the order of :func:`_parts`."""
        times = [time.perf_counter()]
        self.optimizer.zero_grad()
        times.append(time.perf_counter())
        loss = F.cross_entropy(self.network(self.images), self.targets)
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        self.optimizer.step()
        times.append(time.perf_counter())
        return [end - begin for begin, end in pairwise(times)]


def _under(context: Callable[[], AbstractContextManager[object]], run: Callable[[], Any]) -> Callable[[], Any]:
    def inside() -> Any:
        with context():
            return run()

    return inside


def _compare_products(product: Product, length: Length) -> dict[str, Any]:
    run: Run = seconds_of(lambda: product.left @ product.right, length.seconds)
    sides = {name: _under(context, run) for name, context in LIBRARIES.items()}
    return compare(product.case, sides, "MKL (default)", length.rounds, flops=product.flops)


def _compare_steps(step: _Step, products: list[Product], memory: str, length: Length) -> dict[str, Any]:
    """The step, and beside it nothing but its matrix products."""

    def multiply() -> None:
        for product in products:
            product.left @ product.right

    runs = {"": seconds_of(step, length.seconds), ", products alone": seconds_of(multiply, length.seconds)}
    sides = {name + what: _under(context, run) for name, context in LIBRARIES.items() for what, run in runs.items()}
    flops = sum(product.flops for product in products)
    return compare(f"training step, {memory}", sides, "MKL (default)", length.rounds, flops=flops)


def _rates(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"case": row["case"], "side": side, "gflops": round(row["flops"] / seconds / 1e9, 1)}
        for side, seconds in row["median_seconds"].items()
    ]


def _parts(step: _Step, row: dict[str, Any], memory: str, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of the step's parts, its rate, and how much of the time its products alone take."""
    seconds: dict[str, list[list[float]]] = {name: [] for name in LIBRARIES}
    for _ in range(rounds):
        for name, context in LIBRARIES.items():
            with context():
                step()  # the first one after a change does not count
                seconds[name] += [step() for _ in range(5)]
    parts = []
    for rate in _rates(row):
        if (name := rate["side"]) not in LIBRARIES:
            continue
        medians = [round(1e3 * statistics.median(part), 4) for part in zip(*seconds[name], strict=True)]
        share = ratio(row["seconds"][f"{name}, products alone"], row["seconds"][name])["median"]
        keys = ("zero_grad_ms", "forward_ms", "backward_ms", "optimizer_ms")
        numbers = {**dict(zip(keys, medians, strict=True)), "step_ms": round(1e3 * row["median_seconds"][name], 4)}
        products = {"gflops": rate["gflops"], "share_of_products": round(share, 3)}
        parts.append({"memory": memory, "products": name, **numbers, **products})
    return parts


def _compare_optimizers(name: str, parameters: list[nn.Parameter], memory: str, length: Length) -> dict[str, Any]:
    def run(settings: dict[str, bool]) -> Run:
        generator = torch.Generator().manual_seed(0)
        own = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
        for parameter in own:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        return seconds_of(OPTIMIZERS[name](own, lr=LEARNING_RATE, **settings).step, length.seconds)

    number = sum(parameter.numel() for parameter in parameters)
    sides = {way: run(settings) for way, settings in WAYS.items()}
    return compare(f"{name}, {memory}", sides, "for-loop", length.rounds, parameters=number)
