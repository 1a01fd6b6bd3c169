"""MixableModule: a LightningModule whose network is a list of blocks, each eligible for mixing or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from mm_lightning.arguments import check_count, is_flag, refusal
from mm_lightning.mixup import INPUT, MixPoint, mixed_accuracy
from mm_lightning.namespaces import ModuleOfBoth

__all__ = ["MixableModule"]

Block = tuple[nn.Module, bool]
# It returns a tensor; but a return type would let LightningCLI take that, and no module that computes one.
Loss = Callable[[Tensor, Tensor], Any]

_MANY = 1000  # batches after which accuracies are summed up


class MixableModule(ModuleOfBoth):
    """A classifier made of blocks that run one after the other.

    ``(block, True)`` says that the batch may be mixed just before that block: a :class:`MixPoint` stands in front of
    it. Before the first block that is the batch itself, the layer ``"input"``. ``ManifoldMixupCallback`` with
    ``layers="auto"`` mixes at exactly these places. Without the callback this is a plain network.

    A batch is ``(inputs, targets)`` with class indices int64 (N,) as targets.

    Logged per epoch, but for ``train/loss``, which is of one step: every ``log_every_n_steps``-th and an epoch's last.

    =================== ==========================================================================================
    key                 meaning
    =================== ==========================================================================================
    train/loss          the loss that is minimised, on mixed targets where the batch is mixed
    train/acc_mixed     accuracy weighted by ``lam`` (see :func:`mixed_accuracy`); not comparable with ``val/acc``
    val/loss, test/loss the loss on unmixed data
    val/acc, test/acc   share of rows whose largest logit is the target's, in [0, 1]
    val/nll, test/nll   mean negative log-likelihood, nats
    val/ece, test/ece   expected calibration error, 15 bins of equal width, L1 norm (Guo et al., 2017)
    =================== ==========================================================================================

    Args:
        blocks: ``(module, eligible)`` for each block, in the order of the forward pass.
        loss: Loss of ``(logits, targets)``. Default: ``nn.CrossEntropyLoss()``.
        optimizer: Makes the optimizer from the parameters; a ``functools.partial`` of a torch optimizer, say.
            Default: Adam with its learning rate of 1e-3.
        scheduler: Makes the learning rate scheduler from the optimizer. None keeps the rate constant.
        scheduler_interval: ``"epoch"`` or ``"step"``: when the scheduler advances.
        num_classes: Number of classes, K. None takes it from the last Linear layer.

    Raises:
        TypeError: If ``blocks`` is not a list of ``(module, eligible)``, or another argument is of a wrong type.
        ValueError: If it is empty, ``num_classes`` is below 2, or None and cannot be told from the blocks, or
            ``scheduler_interval`` is another one.

    Example:
        >>> model = MixableModule([(nn.Linear(784, 100), True), (nn.ReLU(), False), (nn.Linear(100, 10), True)])
        >>> [name for name, module in model.named_modules() if isinstance(module, MixPoint)]
        ['input', 'mix_before.2']
    """

    def __init__(
        self,
        blocks: Iterable[Block],
        loss: Loss | None = None,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        scheduler_interval: str = "epoch",
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        blocks = _checked(blocks)
        _check_functions(loss, optimizer, scheduler)
        if num_classes is not None:
            check_count("num_classes", num_classes, 2, "None takes it from the blocks.")
        if scheduler_interval not in ("epoch", "step"):
            raise ValueError(f"scheduler_interval must be 'epoch' or 'step', got {scheduler_interval!r}.")
        self.blocks = nn.ModuleList(module for module, _ in blocks)
        self.mix_before = nn.ModuleDict(
            {str(i): MixPoint() for i, (_, eligible) in enumerate(blocks) if eligible and i}
        )
        self.add_module(INPUT, MixPoint() if blocks[0][1] else None)
        self.loss = nn.CrossEntropyLoss() if loss is None else loss
        self.optimizer = partial(torch.optim.Adam, lr=1e-3) if optimizer is None else optimizer
        self.scheduler = scheduler
        self.scheduler_interval = scheduler_interval
        num_classes = _num_outputs(self.blocks) if num_classes is None else int(num_classes)
        self.train_accuracy = MeanMetric()
        self._accuracies: list[tuple[Tensor, int]] = []  # a scalar and its rows for each of the last batches
        self.val_metrics, self.test_metrics = _Metrics("val/", num_classes), _Metrics("test/", num_classes)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Build the module from a checkpoint and the arguments that are not in it, ``blocks`` above all.

        Raises:
            TypeError: If an argument is missing.
        """
        try:
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        except TypeError as error:
            if "required positional argument" not in str(error) and "required keyword-only argument" not in str(error):
                raise
            raise TypeError(
                f"{cls.__name__} cannot be built from {str(checkpoint_path)!r} alone: "
                f"{str(error).split('missing ')[-1]} is not in it. A run of the command is loaded by "
                "mm_lightning.load(its folder or checkpoint); otherwise give "
                f"the arguments: {cls.__name__}.load_from_checkpoint(path, blocks=[...])."
            ) from error

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits (N, K) of a batch of inputs."""
        hidden = inputs
        for i, block in enumerate(self.blocks):
            if str(i) in self.mix_before:
                hidden = self.mix_before[str(i)](hidden)
            hidden = block(hidden)
        return hidden

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch ``(inputs, targets)``."""
        inputs, targets = batch
        logits = self(inputs)
        loss = self._loss(logits, targets)
        if self._reaches_the_logger():
            self.log("train/loss", loss, prog_bar=True)
        self._record_accuracy(mixed_accuracy(logits, targets), len(logits))
        return loss

    def on_train_epoch_start(self) -> None:
        """Forget what an epoch that was cut short has left."""
        self._accuracies.clear()
        self.train_accuracy.reset()

    def on_train_epoch_end(self) -> None:
        """Log ``train/acc_mixed``; here and not in every step, because metrics and logging are dear."""
        self._update_train_accuracy()
        self.log("train/acc_mixed", self.train_accuracy)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Update and log the metrics ``val/...``."""
        self._evaluate(batch, self.val_metrics)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Update and log the metrics ``test/...``."""
        self._evaluate(batch, self.test_metrics)

    def predict_step(self, batch: Tensor | Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return class probabilities (N, K) for inputs, or for the inputs of ``(inputs, targets)``."""
        inputs = batch if isinstance(batch, Tensor) else batch[0]
        return self(inputs).softmax(dim=1)

    def configure_optimizers(self) -> Any:
        """Build the optimizer and the scheduler from their partials."""
        optimizer = self.optimizer(self.parameters())
        if self.scheduler is None:
            return optimizer
        schedule = {"scheduler": self.scheduler(optimizer), "interval": self.scheduler_interval}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def _record_accuracy(self, accuracy: Tensor, rows: int) -> None:
        if torch.compiler.is_compiling():  # a list that grows would be a new graph in every step
            self.train_accuracy.update(accuracy, weight=rows)
            return
        self._accuracies.append((accuracy, rows))
        if len(self._accuracies) == _MANY:
            self._update_train_accuracy()

    def _update_train_accuracy(self) -> None:
        if self._accuracies:
            accuracies, rows = zip(*self._accuracies, strict=True)
            self.train_accuracy.update(torch.stack(accuracies), weight=torch.tensor(rows, device=self.device))
            self._accuracies.clear()

    def _reaches_the_logger(self) -> bool:
        # Lightning's log costs as much as mixing does, in every step, though it keeps every log_every_n_steps-th only.
        trainer = self.trainer
        every = max(trainer.log_every_n_steps, 1)  # type: ignore[attr-defined]
        return (trainer.global_step + 1) % every == 0 or trainer.is_last_batch

    def _evaluate(self, batch: tuple[Tensor, Tensor], metrics: _Metrics) -> None:
        inputs, targets = batch
        logits = self(inputs)
        metrics.update(logits, targets, self._loss(logits, targets))
        for key, metric in metrics.by_key().items():
            self.log(key, metric, on_step=False, on_epoch=True, prog_bar=key.endswith("acc"))

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        try:
            return self.loss(logits, targets)
        except IndexError as error:
            wrong = [k for k in targets.flatten().tolist() if k >= logits.shape[1] or (k < 0 and k != -100)]
            raise ValueError(
                f"The batch holds class {max(wrong, default=None)}, but the network has {logits.shape[1]} outputs, for "
                f"classes 0 to {logits.shape[1] - 1}. Make the last block and the data agree."
            ) from error


class _Metrics(nn.Module):
    """Loss, accuracy, negative log-likelihood and calibration error of one evaluation loop."""

    def __init__(self, prefix: str, num_classes: int) -> None:
        super().__init__()
        self.prefix = prefix
        self.loss = MeanMetric()
        self.nll = MeanMetric()
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.calibration_error = MulticlassCalibrationError(num_classes, n_bins=15, norm="l1")

    def update(self, logits: Tensor, targets: Tensor, loss: Tensor) -> None:
        logits = logits.detach().float()  # half precision probabilities do not sum to one
        self.loss.update(loss.detach().float(), weight=len(logits))
        self.nll.update(F.cross_entropy(logits, targets), weight=len(logits))
        self.accuracy.update(logits, targets)
        self.calibration_error.update(logits.softmax(dim=1), targets)

    def by_key(self) -> dict[str, Metric]:
        """The metrics by the keys they are logged under, in the order of the table."""
        return {
            f"{self.prefix}loss": self.loss,
            f"{self.prefix}acc": self.accuracy,
            f"{self.prefix}nll": self.nll,
            f"{self.prefix}ece": self.calibration_error,
        }


def _checked(blocks: Any) -> list[Block]:
    checked: list[Block] = []
    if not isinstance(blocks, Iterable):
        raise refusal("blocks", blocks, "a list of (module, eligible)", "Give at least one.")
    for block in blocks:
        match block:
            case [nn.Module() as module, eligible] if is_flag(eligible):
                checked.append((module, bool(eligible)))
            case _:
                raise TypeError(f"Each block must be (module, True or False), got {block!r}.")
    if not checked:
        raise ValueError("blocks is empty. Give at least one (module, eligible).")
    return checked


def _check_functions(loss: Any, optimizer: Any, scheduler: Any) -> None:
    if isinstance(loss, type) or not (loss is None or callable(loss)):
        raise refusal(
            "loss", loss, "a loss module or a function of (logits, targets)", "None is nn.CrossEntropyLoss()."
        )
    if not (optimizer is None or callable(optimizer)):
        expected = "a function that makes an optimizer from parameters"
        raise refusal("optimizer", optimizer, expected, "Give functools.partial(torch.optim.SGD, lr=0.1), say.")
    if not (scheduler is None or callable(scheduler)):
        expected = "a function that makes a scheduler from an optimizer"
        raise refusal("scheduler", scheduler, expected, "None keeps the learning rate constant.")


def _num_outputs(blocks: nn.ModuleList) -> int:
    sizes = [module.out_features for module in blocks.modules() if isinstance(module, nn.Linear)]
    if not sizes:
        raise ValueError("The number of classes cannot be told from blocks without a Linear layer. Give num_classes.")
    return sizes[-1]
