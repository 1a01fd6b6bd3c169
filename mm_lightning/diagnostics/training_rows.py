"""Overhearing layers on training data, unmixed, by a pass of evaluation after the training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng

from mm_lightning.diagnostics.hidden_states import HiddenStates
from mm_lightning.evaluation.modes import evaluating
from mm_lightning.namespaces import LightningModule, Trainer, package_of


def overhear_training(
    trainer: Trainer, module: LightningModule, states: HiddenStates, forward: Callable[[LightningModule, Any], Any]
) -> None:
    """Run the module on training batches, in evaluation mode, until enough rows have been overheard.

    The batches come from the trainer's own loader, as many as an epoch has, as :func:`pass_over` shows them.

    Args:
        trainer: Its training has just ended.
        module: The module.
        states: Are left open, with the rows.
        forward: Runs the module on a batch.
    """

    def see(batch: Any) -> bool:
        forward(module, batch)
        states.keep(batch)
        return states.is_full

    states.open(module)
    pass_over(trainer, module, CombinedLoader(trainer.train_dataloader, "min_size"), trainer.num_training_batches, see)


def pass_over(
    trainer: Trainer, module: LightningModule, loader: CombinedLoader, length: float, see: Callable[[Any], bool]
) -> None:
    """Show the batches of a loader to a function, while the module is in evaluation mode, without gradients.

    The batches take the way of validation batches: hooks of module and data that ask for the trainer's stage are told
    that it validates. Stage, modes and random states are as they were afterwards, those of the loader's own generators
    too.

    Args:
        trainer: It runs or has just ended.
        module: The module.
        loader: Gives the batches.
        length: So many batches at most.
        see: Gets a batch on the module's device, and returns whether it has seen enough.
    """
    precision, stage = trainer.precision_plugin, trainer.state.stage
    trainer.validating = True
    try:
        with isolate_rng(), _kept_generators(loader), evaluating(module), torch.no_grad():
            for batch, _, _ in islice(loader, None if math.isinf(length) else int(length)):
                batch = _before_transfer(trainer, module, precision.convert_input(batch))
                batch = trainer.strategy.batch_to_device(batch)
                with precision.forward_context():
                    has_seen_enough = see(batch)
                if has_seen_enough:
                    break
    finally:
        trainer.state.stage = stage


def run_on_first_entry(module: LightningModule, batch: Any) -> Any:
    """Run a module on a batch, or on the first entry of a tuple, a list or a dict.

    Raises:
        RuntimeError: If the module fails.
    """
    try:
        return module(first_entry(batch))
    except Exception as error:
        raise RuntimeError(
            f"{type(module).__name__} did not run on the first entry of a batch ({error}). Pass "
            "forward=(module, batch) -> anything, which runs it."
        ) from error


def first_entry(batch: Any) -> Any:
    """Return the first entry of a tuple, a list or a dict that is not empty, all else as it is."""
    if isinstance(batch, Mapping):
        return next(iter(batch.values()), batch)
    return batch[0] if isinstance(batch, (tuple, list)) and len(batch) else batch


@contextmanager
def _kept_generators(loader: CombinedLoader) -> Iterator[None]:
    parts = [part for one in loader.flattened for part in (one, getattr(one, "sampler", None))]
    found = [generator for part in parts if isinstance(generator := getattr(part, "generator", None), torch.Generator)]
    states = [generator.get_state() for generator in found]
    try:
        yield
    finally:
        for generator, state in zip(found, states, strict=True):
            generator.set_state(state)


def _before_transfer(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    data = trainer.datamodule  # type: ignore[attr-defined]
    helpers = package_of(trainer).utilities.model_helpers
    is_of_data = data is not None and helpers.is_overridden("on_before_batch_transfer", data)
    return (data if is_of_data else module).on_before_batch_transfer(batch, 0)
