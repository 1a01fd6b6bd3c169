"""The commands that Hydra composes, as they are typed.

What a command does is imported when it does it: completion by TAB, help and version wait for Hydra, not for torch.
"""

from __future__ import annotations

import sys
from typing import Any

from omegaconf import DictConfig

from mm_lightning.command.line import run_composed

__all__ = ["inspect", "reproduce", "study", "train"]


def train() -> None:
    """Train and test. Exit code 0 on success, 130 after Ctrl-C, 143 after SIGTERM, 1 otherwise."""
    run_composed(_train, "train")


def inspect() -> None:
    """Print where a network can be mixed. Exit code 0 on success, 130 after Ctrl-C, 1 otherwise."""
    run_composed(_inspect, "inspect")


def reproduce() -> None:
    """Run a study and write its report. Exit code 0 on success, 130 after Ctrl-C, 1 otherwise."""
    if "--quick" in sys.argv:
        sys.argv.remove("--quick")
        own_folder = [] if any(word.startswith("out=") for word in sys.argv) else ["out=reproduction_quick"]
        sys.argv += ["quick=true", *own_folder]
    run_composed(_reproduce, "reproduce")


def study() -> None:
    """Answer whether mixing helps. Exit code 0 on success, 130 after Ctrl-C, 1 otherwise."""
    run_composed(_study, "study")


def _train(config: DictConfig) -> Any:
    from mm_lightning.command.objective import objective_of
    from mm_lightning.command.train import run

    metrics = run(config)
    return metrics if config.objective is None else objective_of(metrics, config.objective)


def _inspect(config: DictConfig) -> None:
    from mm_lightning.command.inspect import print_table

    print_table(config)


def _reproduce(config: DictConfig) -> None:
    from mm_lightning.command.reproduce import reproduce

    reproduce(config)


def _study(config: DictConfig) -> None:
    from mm_lightning.command.study import study

    study(config)
