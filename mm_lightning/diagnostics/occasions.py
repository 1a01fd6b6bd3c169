"""When a callback looks."""

from __future__ import annotations

import math

from mm_lightning.namespaces import Trainer

__all__ = ["is_last_validation"]


def is_last_validation(trainer: Trainer) -> bool:
    """Whether the validation that runs during ``fit`` is in the last epoch, or ``max_steps`` allows none after it."""
    epoch, period = trainer.current_epoch, trainer.check_val_every_n_epoch or 1
    if trainer.max_epochs is not None and 0 < trainer.max_epochs <= epoch + period:
        return True
    batches = trainer.val_check_batch or math.inf  # until the next one; not known of a loader without length
    steps = 1 if math.isinf(batches) else math.ceil(batches * period / trainer.accumulate_grad_batches)
    return 0 < trainer.max_steps < trainer.global_step + steps
