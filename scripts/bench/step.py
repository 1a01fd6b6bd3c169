"""A training step with manifold mixup, by the callback and by other means, against one without."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from bench.competitors import Textbook, TwoPasses, input_mixups
from bench.fitting import RandomBatches, mean_step, untimed_steps
from bench.networks import Network, deep_mlp, mnist_bottleneck, preact_resnet, residual_network
from bench.timing import compare, in_turn
from mm_lightning.fast_cpu import fast_products, keep_freed_memory

__all__ = ["compile_options", "measure"]

TARGETS = (1.03, 1.02)  # of the callback, at most: MLP, residual CNN
DEFAULT, FAST = "as PyTorch comes", "fast_cpu"
MODES = ("eager", "compiled")
DRAWN_AT_ONCE = 32  # plans: so many steps, or a multiple of it, hold their share of the draw


def measure(quick: bool) -> dict[str, Any]:
    """Time the steps of two networks, eager and compiled, under PyTorch's defaults and under ``fast_cpu``."""
    compiled = compile_options(quick)
    modes = MODES if compiled is not None else MODES[:1]
    cases = [(index, mode) for mode in modes for index in range(len(TARGETS))]
    rows = [_row(*case, DEFAULT, compiled, quick) for case in cases]
    notes = input_mixups(_networks(quick)[0])[1]
    extra = _callback_microseconds(quick)
    kept = keep_freed_memory()  # for the rest of the process, so the default rows are first
    with fast_products() as exact:
        # A quick run has traced its networks once, which is most of its time.
        rows += [_row(*case, FAST, compiled, quick) for case in cases if not (quick and case[1] == "compiled")]
        rows.append(_row_of_the_paper(quick))
    lower, median, upper = np.quantile(extra, (0.25, 0.5, 0.75)).tolist()
    notes.append(
        f"In a network of 8 units, where it is most of the step, the callback takes {median:.0f} µs a step, quartiles "
        f"{lower:.0f} to {upper:.0f}."
    )
    return {"rows": rows, "callback_us": median, "notes": [*notes, *_limits(compiled is not None, kept, exact)]}


def _limits(compiles: bool, kept: bool, exact: bool) -> list[str]:
    """What could not be measured as the cases' names say."""
    limits = {
        "torch.compile finds no C++ compiler here, so compiled networks are left out.": compiles,
        f"Freed memory could not be kept here, so {FAST} is about matrix products alone.": kept,
        f"Matrix products are not oneDNN's under {FAST}: on this processor they would not be float32 ones.": exact,
    }
    return [sentence for sentence, is_possible in limits.items() if not is_possible]


def _networks(quick: bool) -> list[Network]:
    if quick:
        return [mnist_bottleneck(batch_size=8), residual_network(batch_size=8, size=8)]
    return [mnist_bottleneck(), residual_network()]


def _row(index: int, mode: str, setting: str, compiled: dict[str, Any] | None, quick: bool) -> dict[str, Any]:
    network = _networks(quick)[index]
    if mode == "eager":
        sides = _sides(network, 4 if quick else DRAWN_AT_ONCE, compiled=None)
        rounds = 2 if quick else (16, 8)[index]
    else:
        network.module.compile(**(compiled or {}))
        sides = _sides(network, 4 if quick else DRAWN_AT_ONCE, compiled)
        rounds = 1 if quick else 3
    return compare(
        f"{network.name}, {mode}, {setting}",
        sides,
        "no mixup",
        rounds,
        targets={"ManifoldMixupCallback": TARGETS[index]},
        warmup=mode == "eager" or not quick,
        mode=mode,
        setting=setting,
        batch=network.shape[0],
    )


def _row_of_the_paper(quick: bool) -> dict[str, Any]:
    """The paper's network, whose step takes twenty times as long as that of the small residual CNN."""
    network = preact_resnet(batch_size=4, width=4) if quick else preact_resnet()
    sides = _sides(network, timed=4, compiled=None)
    return compare(
        f"{network.name}, eager, {FAST}",
        {name: sides[name] for name in ("no mixup", "ManifoldMixupCallback")},
        "no mixup",
        rounds=1 if quick else 4,
        targets={"ManifoldMixupCallback": TARGETS[1]},
        warmup=False,
        mode="eager",
        setting=FAST,
        batch=network.shape[0],
    )


def _sides(network: Network, timed: int, compiled: dict[str, Any] | None) -> dict[str, Callable[[], float]]:
    untimed = untimed_steps(len(network.places))
    batches = RandomBatches(network.shape, network.classes, untimed + timed + 1)
    seeds = count()

    def run(callbacks: list[pl.Callback], training_step: Callable[..., Any] | None = None) -> float:
        if compiled is not None:
            torch.compiler.reset()  # else a graph without hooks is taken for one with them; code comes from a cache
        return mean_step(network.module, batches, callbacks, training_step, untimed=untimed)

    by_hand: dict[str, Callable[..., Any]] = {
        "textbook": Textbook(network, compiled=compiled).training_step,
        "two forward passes": TwoPasses(network, compiled=compiled).training_step,
        **{name: mixup.training_step for name, mixup in input_mixups(network)[0].items()},
    }
    return {
        "no mixup": lambda: run([]),
        "ManifoldMixupCallback": lambda: run([network.callback(next(seeds))]),
        **{name: partial(run, [], training_step) for name, training_step in by_hand.items()},
    }


def compile_options(quick: bool) -> dict[str, Any] | None:
    """Of ``torch.compile``: a quick run only traces. None where code cannot be compiled."""
    if quick:
        return {"backend": "eager"}
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2))
    except RuntimeError:  # what the compiler raises where there is no C++ compiler
        return None
    return {}


def _callback_microseconds(quick: bool) -> list[float]:
    """Microseconds that the callback adds to a step of an almost empty network, in each round."""
    network = deep_mlp(depth=1, width=8, classes=2, batch_size=8, inputs=8)
    timed, rounds = (20, 2) if quick else (6 * DRAWN_AT_ONCE, 30)
    untimed = untimed_steps(len(network.places))
    batches = RandomBatches(network.shape, network.classes, untimed + timed + 1)
    seeds = count()
    seconds = in_turn(
        {
            "without": lambda: mean_step(network.module, batches, untimed=untimed),
            "with": lambda: mean_step(network.module, batches, [network.callback(next(seeds))], untimed=untimed),
        },
        rounds,
    )
    return [1e6 * (ours - bare) for ours, bare in zip(seconds["with"], seconds["without"], strict=True)]
