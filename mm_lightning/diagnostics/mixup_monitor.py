"""Which ratios and layers each epoch's mixing drew, and the loss at each layer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from mm_lightning.arguments import check_count
from mm_lightning.callback import UNMIXED, ManifoldMixupCallback
from mm_lightning.diagnostics.drawing import check_folder, figures_folder, publish
from mm_lightning.diagnostics.mixing_figure import Mixing, draw_mixing, expected_shares
from mm_lightning.mixup import BetaRatio
from mm_lightning.namespaces import CallbackOfBoth, LightningModule, Trainer


class MixupMonitor(CallbackOfBoth):
    """Draws after a training epoch which ratios and layers were drawn, and the loss at each layer.

    For trainers with a :class:`ManifoldMixupCallback`, before or after it. With several processes the picture shows
    what rank zero drew, for ranks share the layers and draw their own ``lam``; the numbers are of all. A batch whose
    ``training_step`` gives no loss (in manual optimization it need not return one) counts for the first two panels
    alone. How to read the picture says :func:`draw_mixing`.

    A step costs about 3 µs: its loss and its ``lam`` are kept where they are and moved from the device once an epoch.

    ============================  ==================================================================================
    log key                       what it is
    ============================  ==================================================================================
    ``mixup_monitor/epoch``       image
    ``mixup/loss_at/LAYER``       mean training loss of the epoch's batches that were mixed at this layer; not to be
                                  compared with ``val/loss``
    ``mixup/loss_at/unmixed``     the same of the batches that were not mixed
    ============================  ==================================================================================

    The data behind the picture hold ``alpha``, ``lam`` (M,), the names of the ``layers`` (L,), ``counts`` and
    ``expected`` of each, (L,), and for every batch that gave a loss ``loss`` and the layer's place ``loss_layer``.

    Args:
        every_n_epochs: Period of the pictures, in epochs; the numbers are logged after each.
        dirpath: Folder of ``mixup_monitor_epoch.png`` and ``.npz``, which the next ones overwrite; default is
            ``figures`` in ``trainer.default_root_dir``. A ``fast_dev_run`` writes none.
        num_bins: Bins of the histogram of ``lam``.
        name: First part of the picture's tag and of the files.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If a number is below 1; in ``setup``, if there is no ``ManifoldMixupCallback`` or another monitor.
    """

    run_title: str = ""  # what run the pictures are of, written above their headings; the command says it

    def __init__(
        self,
        every_n_epochs: int = 1,
        dirpath: str | Path | None = None,
        num_bins: int = 20,
        name: str = "mixup_monitor",
    ) -> None:
        check_count("every_n_epochs", every_n_epochs, 1, "1 draws after each.")
        check_count("num_bins", num_bins, 1, "20 is the default.")
        check_folder(dirpath)
        self.every_n_epochs = every_n_epochs
        self.dirpath = dirpath
        self.num_bins = num_bins
        self.name = name
        self._mixup: ManifoldMixupCallback | None = None
        self._forget()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the callback whose plans are watched."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if (count := sum(isinstance(callback, MixupMonitor) for callback in callbacks)) > 1:
            raise ValueError(f"The trainer has {count} MixupMonitors, which would log the same keys. Leave one.")
        self._mixup = next((callback for callback in callbacks if isinstance(callback, ManifoldMixupCallback)), None)
        if self._mixup is None and stage == TrainerFn.FITTING:
            raise ValueError(
                "MixupMonitor watches a ManifoldMixupCallback, and the trainer has none. Add one, "
                "Trainer(callbacks=[ManifoldMixupCallback(), MixupMonitor()]), or leave the monitor out."
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._forget()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch's plan and loss."""
        assert self._mixup is not None
        plan = self._mixup.plan  # still this batch's, whichever callback comes first
        layer = UNMIXED if plan is None or plan.layer is None else plan.layer
        self._counts[layer] += 1
        if plan is not None and plan.layer is not None:
            self._lam.append(plan.lam)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._losses.append(loss.detach())
            self._loss_layers.append(layer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the numbers and, where it is due, the picture."""
        if not self._counts:
            return
        mixing = self._collected(trainer)
        self._forget()
        means = _means(trainer, pl_module, mixing.losses)
        pl_module.log_dict({f"mixup/loss_at/{layer}": mean for layer, mean in means.items()}, sync_dist=True)
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0 and trainer.is_global_zero:
            self._publish(trainer, mixing)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the tensors kept."""
        self._forget()

    def _collected(self, trainer: Trainer) -> Mixing:
        mixup = self._mixup
        assert mixup is not None
        probability = mixup.probability if mixup.alpha != 0 and mixup.layer_names else 0.0
        expected = expected_shares(mixup.layer_names or (), probability, mixup.layer_weights)
        if mixup.schedule is not None:  # by which every batch has another share
            expected = {layer: self._counts[layer] / self._counts.total() for layer in expected}
        # of which alone the picture shows a density
        alpha = mixup.ratio.alpha if isinstance(mixup.ratio, BetaRatio) and mixup.ratio.beta is None else math.nan
        is_plain = mixup.schedule is None and mixup.interpolation is None
        # one number a batch stands in all of its rows
        lam = _moved([lam[:1] if lam.stride(0) == 0 else lam for lam in self._lam])
        # Lightning hands out the loss divided by the number of batches of an optimizer step
        losses = _moved([loss.reshape(1) for loss in self._losses]) * trainer.accumulate_grad_batches
        layers = np.array(self._loss_layers)
        return Mixing(
            alpha=float(alpha) if is_plain else math.nan,
            lam=lam,
            counts={layer: self._counts[layer] for layer in expected},
            expected=expected,
            losses={layer: losses[layers == layer] for layer in expected},
        )

    def _publish(self, trainer: Trainer, mixing: Mixing) -> None:
        rank = f", rank 0 of {trainer.world_size}" if trainer.world_size > 1 else ""
        figure = draw_mixing(mixing, self.num_bins, f"Mixing in epoch {trainer.current_epoch + 1}{rank}")
        folder = figures_folder(trainer, self.dirpath)
        publish(trainer, self.name, "epoch", figure, _arrays(mixing), folder, self.run_title)

    def _forget(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lam: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._loss_layers: list[str] = []


def _means(trainer: Trainer, module: LightningModule, losses: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Mean of each layer's losses on all processes, where there are any."""
    totals = torch.tensor([[loss.sum(), loss.size] for loss in losses.values()], dtype=torch.float64)
    if trainer.world_size > 1:
        totals = trainer.strategy.reduce(totals.to(module.device), reduce_op="sum").cpu()
    return {layer: total / count for layer, (total, count) in zip(losses, totals.tolist(), strict=True) if count}


def _moved(parts: list[Tensor]) -> np.ndarray:
    return torch.cat(parts).cpu().double().numpy() if parts else np.empty(0)


def _arrays(mixing: Mixing) -> dict[str, np.ndarray]:
    losses = mixing.losses.values()
    return {
        "alpha": np.array(mixing.alpha),
        "lam": mixing.lam,
        "layers": np.array(list(mixing.expected)),
        "counts": np.array(list(mixing.counts.values())),
        "expected": np.array(list(mixing.expected.values())),
        "loss": np.concatenate(list(losses)),
        "loss_layer": np.repeat(np.arange(len(losses)), [len(loss) for loss in losses]),
    }
