"""Batches cut from tensors in memory, in an order that depends on the seed and the epoch alone."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from mm_lightning.arguments import check_count, check_flag

# Takes a batch, and the numbers of its epoch, of itself in the epoch, and of its rank.
Transform = Callable[[tuple[Tensor, ...], tuple[int, int, int]], tuple[Tensor, ...]]


class TensorBatches:
    """Cut tensors that are already in memory into batches.

    It takes the place of a ``DataLoader``: one indexing operation per tensor and batch, no per-sample Python, no
    workers, no global random state. A ``Trainer`` accepts it as it is, and resumes it in mid-epoch.

    The order and the first batch are read at the first ``next()``, not at ``iter()``: Lightning creates the iterator
    before it restores the progress and sets the epoch.

    Args:
        tensors: One tensor per field, all (N, ...) on one device. Each batch is a tuple of their rows. A sequential
            order hands out views, so do not write into a batch.
        batch_size: Rows per batch, on each rank.
        sampler: The order, over a dataset of N rows. Lightning sets the epoch of ``loader.sampler``.
        drop_last: Leave out a last batch of fewer than ``batch_size`` rows.
        first_batch: Number of the batch to begin with, counted from 0, asked for once per iteration.
        transform: What becomes of each batch, on its device; a function of the batch and of (epoch, batch, rank), so
            that a resumed epoch goes on as the straight one would have.

    Raises:
        TypeError: If ``batch_size`` is no integer, or ``drop_last`` neither True nor False.
        ValueError: If there is no tensor, the lengths differ or ``batch_size`` is below 1.

    Example:
        >>> rows = torch.arange(5)
        >>> sampler = DistributedSampler(rows, num_replicas=1, rank=0, shuffle=False)
        >>> list(TensorBatches([rows], batch_size=2, sampler=sampler))
        [(tensor([0, 1]),), (tensor([2, 3]),), (tensor([4]),)]
    """

    batch_sampler = None  # Lightning reads it from every evaluation loader that has a sampler

    def __init__(
        self,
        tensors: Sequence[Tensor],
        batch_size: int,
        sampler: DistributedSampler[Any],
        drop_last: bool = False,
        first_batch: Callable[[], int] = lambda: 0,
        transform: Transform | None = None,
    ) -> None:
        if not tensors:
            raise ValueError("tensors must hold at least one tensor, got none. Pass for example [images, labels].")
        lengths = [len(tensor) for tensor in tensors]
        if len(set(lengths)) > 1:
            raise ValueError(f"tensors must have equal lengths, got {lengths}. Pass one row per sample in each.")
        num_rows = len(sampler.dataset)  # type: ignore[arg-type]  # torch's Dataset does not declare __len__
        if num_rows != lengths[0]:
            raise ValueError(
                f"sampler must order as many rows as tensors have, got {num_rows} and {lengths[0]}."
                " Build it from the same data."
            )
        check_count("batch_size", batch_size, 1, "1 yields single rows.")
        check_flag("drop_last", drop_last, "False keeps a last batch of fewer rows.")
        self.tensors = tuple(tensors)
        self.batch_size = batch_size
        self.sampler = sampler
        self.drop_last = drop_last
        self.first_batch = first_batch
        self.transform = transform

    def __len__(self) -> int:
        """Number of batches in a whole epoch on this rank."""
        num_full, rest = divmod(len(self.sampler), self.batch_size)
        return num_full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield the batches from ``first_batch()`` to the epoch's end."""
        # a generator function, so that these lines run at the first next() (see the class)
        order = torch.tensor(list(self.sampler), dtype=torch.int64)
        first = self.first_batch()
        epoch, rank = getattr(self.sampler, "epoch", 0), getattr(self.sampler, "rank", 0)
        for number, batch in enumerate(self.read(order, first), start=first):
            yield batch if self.transform is None else self.transform(batch, (epoch, number, rank))

    def read(self, order: Tensor, first: int) -> Iterator[tuple[Tensor, ...]]:
        """Yield the rows of the batches from number ``first`` to the end of ``order``, as they are held."""
        is_sequential = torch.equal(order, torch.arange(len(order)))
        order = order.to(self.tensors[0].device)
        for batch in range(first, len(self)):
            span = slice(batch * self.batch_size, (batch + 1) * self.batch_size)
            rows = span if is_sequential else order[span]
            yield tuple(tensor[rows] for tensor in self.tensors)

    # Lightning asks for these two to tell a loader that resumes from one that does not. They carry no position: it
    # stands once, in the trainer's loop progress, from which `first_batch` reads it.

    def state_dict(self) -> dict[str, int]:
        """The loader's shape, by which a batch number finds its samples."""
        return {
            "num_samples": len(self.tensors[0]),
            "batch_size": self.batch_size,
            "num_batches": len(self),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Check that a checkpoint's batch numbers mean the same samples here.

        Args:
            state: What ``state_dict`` returned when the checkpoint was written.

        Raises:
            ValueError: If the shapes differ, so that resuming would repeat or skip samples.
        """
        if state != (own := self.state_dict()):
            raise ValueError(
                f"The checkpoint was written with the loader {state}, but this run has {own}, so resuming would repeat"
                " or skip samples; use the checkpoint's data settings and number of devices, or start a new run."
            )
