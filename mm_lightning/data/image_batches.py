"""Batches of images: cropped, flipped and normalised on the device, and read by workers where memory is short."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mm_lightning.data.tensor_batches import TensorBatches
from mm_lightning.devices import sent

__all__ = ["ImageTransform", "WorkerBatches", "crop_and_flip", "normalize"]

_CROP_STREAM = 5  # of the seed; see splits.py


def crop_and_flip(images: Tensor, shift: Tensor, flip: Tensor, padding: int) -> Tensor:
    """Cut each image out of itself with a black border around it, and mirror some of them.

    Args:
        images: (N, C, H, W).
        shift: Row and column of the border's image that each cut begins with, in 0 ... 2 * padding; int64 (N, 2).
            ``padding`` leaves the image where it is.
        flip: Which are mirrored, left to right, after that; bool (N,).
        padding: Width of the border, pixels.

    Returns:
        (N, C, H, W), a copy.
    """
    height, width = images.shape[-2:]
    padded = F.pad(images, [padding] * 4)
    columns = torch.arange(width, device=images.device).expand(len(images), width)
    columns = torch.where(flip[:, None], width - 1 - columns, columns) + shift[:, 1, None]  # (N, W)
    rows = torch.arange(height, device=images.device) + shift[:, 0, None]  # (N, H)
    own = torch.arange(len(images), device=images.device)
    # indices with a slice between them: (N, H, W, C)
    return padded[own[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Take uint8 images to [0, 1], subtract the mean of each channel and divide by its standard deviation."""
    # of tensors that are none, such as those of a trace, nothing is kept
    make = _factor_and_offset if type(images) is Tensor else _factor_and_offset.__wrapped__
    factor, offset = make(tuple(mean), tuple(std), images.device)
    return torch.addcmul(offset, images.float(), factor)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _factor_and_offset(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """What pixels are multiplied by and what is added, (C, 1, 1): kept, because a GPU would be waited for each time."""
    factor = [1 / (255 * deviation) for deviation in std]
    offset = [-average / deviation for average, deviation in zip(mean, std, strict=True)]
    made = torch.tensor([factor, offset], dtype=torch.float32, device=device)[..., None, None]
    return made[0], made[1]


@dataclass(frozen=True)
class ImageTransform:
    """What becomes of a batch of uint8 images (N, C, H, W) and its targets: a function of seed, epoch, batch and rank.

    Attributes:
        mean: Of each channel of images in [0, 1].
        std: Standard deviation of each.
        padding: Black border that images are randomly cropped from, pixels; 0 does not crop.
        flip: Whether each image is mirrored with probability one half.
        seed: Of the draws, in [0, 2**32).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int = 0
    flip: bool = False
    seed: int = 0

    def __call__(self, batch: tuple[Tensor, ...], place: tuple[int, int, int]) -> tuple[Tensor, ...]:
        """Transform the batch; ``place`` is the numbers of its epoch, of itself there, and of its rank."""
        images, *others = batch
        if self.padding or self.flip:
            # drawn on the CPU, so that every device sees the same
            key = np.array([self.seed, _CROP_STREAM], dtype=np.uint64)
            rng = np.random.Generator(np.random.Philox(key=key, counter=np.array([0, *place], dtype=np.uint64)))
            shift = torch.from_numpy(rng.integers(0, 2 * self.padding + 1, (len(images), 2)))
            flip = torch.from_numpy(rng.random(len(images)) < (0.5 if self.flip else 0))
            images = crop_and_flip(images, sent(shift, images.device), sent(flip, images.device), self.padding)
        return (normalize(images, self.mean, self.std), *others)


class WorkerBatches(TensorBatches):
    """Batches whose inputs are numbers of images, read by the workers of a ``DataLoader`` in the order of the epoch.

    Args:
        tensors: Image numbers int64 (N,), and targets.
        read_image: Reads an image by its number, uint8 (C, H, W), in a worker; text is why it cannot be read.
        num_workers: Processes; None is up to four, 0 reads in this one.
        settings: The other arguments of :class:`TensorBatches`.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        read_image: Callable[[int], Tensor | str],
        num_workers: int | None,
        **settings: Any,
    ) -> None:
        super().__init__(tensors, **settings)
        self.read_image = read_image
        self.num_workers = min(4, os.cpu_count() or 1) if num_workers is None else num_workers

    def read(self, order: Tensor, first: int) -> Iterator[tuple[Tensor, ...]]:
        """Yield the batches from number ``first`` to the end of ``order``, on the device of the targets."""
        numbers, *others = self.tensors
        device = numbers.device
        chunks = list(order.split(self.batch_size))[first : len(self)]
        loader = DataLoader(
            _Images(numbers.cpu(), self.read_image),
            batch_sampler=[chunk.tolist() for chunk in chunks],
            collate_fn=_stack,
            num_workers=self.num_workers,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # or it would draw from the global one
        )
        for chunk, images in zip(chunks, loader, strict=True):
            if isinstance(images, str):  # raised in a worker it would arrive as a traceback in a message
                raise ValueError(images)
            yield (images.to(device, non_blocking=True), *(other[chunk.to(device)] for other in others))


def _stack(images: list[Tensor | str]) -> Tensor | str:
    unread = [image for image in images if isinstance(image, str)]
    return unread[0] if unread else torch.stack(images)  # type: ignore[arg-type]  # none is text


class _Images(Dataset[Tensor | str]):
    def __init__(self, numbers: Tensor, read_image: Callable[[int], Tensor | str]) -> None:
        self.numbers, self.read_image = numbers, read_image

    def __getitem__(self, row: int) -> Tensor | str:
        return self.read_image(int(self.numbers[row]))
