"""A LightningDataModule for data that fit into memory: tensors on the trainer's device, cut into batches."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler, TensorDataset

from mm_lightning.arguments import check_count, check_integer
from mm_lightning.data.tensor_batches import TensorBatches, Transform
from mm_lightning.namespaces import DataModuleOfBoth

# The sampler adds the epoch to its seed. Without a stride, seed 0 in epoch 1 would repeat seed 1 in epoch 0.
_SEED_STRIDE = 1_000_003


class TensorDataModule(DataModuleOfBoth, ABC):
    """Three splits held as tensors on the trainer's device. A subclass loads them in :meth:`load_splits`.

    ``num_classes``, ``class_names`` and ``input_shape``, the shape of one input, are what a model is built for: the
    class tells them, or ``load_splits`` sets them on the object; None says that they are not known (yet).
    ``normalization`` says which mean was subtracted from each channel of images in [0, 1], and by which deviation it
    was divided; None that the inputs are no such images.

    Batches are ``(inputs, targets)``; ``predict`` sees the test set. The training order is a function of ``seed`` and
    the epoch alone, and a resumed epoch continues with the batch at which it stopped.

    Args:
        batch_size: Training rows per batch, on each device.
        eval_batch_size: Rows per batch in validation, test and prediction, on each device.
        seed: Seed of the training order, in [0, 2**32).

    Raises:
        TypeError: If an argument is no integer.
        ValueError: If a batch size is below 1, or the seed out of range.
    """

    row_name: ClassVar[str] = "row"  # what error messages call one
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    input_shape: tuple[int, ...] | None = None
    normalization: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    def __init__(self, batch_size: int, eval_batch_size: int, seed: int) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            check_count(name, value, 1, f"1 yields single {self.row_name}s.")
        check_seed("seed", seed)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self._splits: dict[str, tuple[Tensor, Tensor]] = {}

    @abstractmethod
    def load_splits(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Load the data, on the CPU; called once.

        Returns:
            ``(inputs, targets)`` with one row for each sample, under ``"train"``, ``"val"`` and ``"test"``.
        """

    def setup(self, stage: str | None = None) -> None:
        """Load the data once and put it on the trainer's device (the CPU without a trainer)."""
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        splits = self._splits or self.load_splits()
        self._splits = {name: (inputs.to(device), targets.to(device)) for name, (inputs, targets) in splits.items()}

    def split(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets of ``"train"``, ``"val"`` or ``"test"``, as they are held: not transformed.

        Raises:
            RuntimeError: Before :meth:`setup`.
        """
        if not self._splits:
            raise RuntimeError(f"{type(self).__name__} holds no data yet. Call setup() before asking for its rows.")
        return self._splits[name]

    def train_dataloader(self) -> TensorBatches:
        """Shuffled anew in each epoch.

        While the trainer trains, iteration begins with its next batch, which is batch 0 except in a resumed epoch.
        """
        # overfit_batches asks for the same batches in each epoch; getattr, for Trainer does not declare it
        shuffle = not getattr(self.trainer, "overfit_batches", 0)
        return self._batches("train", self.batch_size, shuffle, self._next_train_batch)

    def val_dataloader(self) -> TensorBatches:
        """The validation set in order."""
        return self._eval_batches("val")

    def test_dataloader(self) -> TensorBatches:
        """The test set in order."""
        return self._eval_batches("test")

    def predict_dataloader(self) -> TensorBatches:
        """The test set in order, with its targets."""
        return self._eval_batches("test")

    def transform(self, split: str) -> Transform | None:
        """What becomes of each batch of a split, on the trainer's device; nothing, unless a subclass says so."""
        return None

    def make_batches(self, inputs: Tensor, targets: Tensor, **settings: Any) -> TensorBatches:
        """Cut a split into batches. A subclass whose inputs stand for something to be read reads them here.

        Args:
            inputs: The split's, on the trainer's device.
            targets: The same.
            settings: The other arguments of :class:`TensorBatches`.
        """
        return TensorBatches([inputs, targets], **settings)

    def _eval_batches(self, name: str) -> TensorBatches:
        return self._batches(name, self.eval_batch_size, shuffle=False, first_batch=lambda: 0)

    def _batches(self, name: str, batch_size: int, shuffle: bool, first_batch: Callable[[], int]) -> TensorBatches:
        inputs, targets = self.split(name)
        return self.make_batches(
            inputs,
            targets,
            batch_size=batch_size,
            sampler=self._sampler(inputs, shuffle),
            first_batch=first_batch,
            transform=self.transform(name),
        )

    def _sampler(self, inputs: Tensor, shuffle: bool) -> DistributedSampler[tuple[Tensor, ...]]:
        world_size = 1 if self.trainer is None else self.trainer.world_size
        rank = 0 if self.trainer is None else self.trainer.global_rank
        seed = self.seed * _SEED_STRIDE
        return DistributedSampler(TensorDataset(inputs), world_size, rank, shuffle=shuffle, seed=seed)

    def _next_train_batch(self) -> int:
        # `ready` is the batch_idx of Lightning's next training step, restored from the checkpoint in a resumed epoch;
        # after training it keeps the last epoch's value, which must not shorten a loader iterated by hand
        if self.trainer is None or not self.trainer.training:
            return 0
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.ready


def check_seed(name: str, seed: Any) -> None:
    """Raise TypeError unless ``seed`` is an integer, and ValueError unless it is in [0, 2**32)."""
    check_integer(name, seed, "an integer in [0, 2**32)", lambda seed: 0 <= seed < 2**32, "Give 0, for example.")


def seed_of_data(seed: int, data_seed: Any) -> int:
    """The ``data_seed``, checked as :func:`check_seed` does it, or where it is None the ``seed``."""
    if data_seed is None:
        return seed
    check_seed("data_seed", data_seed)
    return data_seed
