import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.data import DistributedSampler

from mm_lightning.data.image_batches import ImageTransform, WorkerBatches, crop_and_flip, normalize
from mm_lightning.data.tensor_batches import TensorBatches

MEAN, STD = (0.5, 0.25, 0.1), (0.5, 0.25, 0.2)


def images(count: int = 6) -> Tensor:
    return torch.randint(1, 256, (count, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _reference_crop(image: Tensor, top: int, left: int, flip: bool, padding: int) -> Tensor:
    """Pixel by pixel: where the cut reaches beyond the image it is black."""
    _, height, width = image.shape
    cut = torch.zeros_like(image)
    for row in range(height):
        for column in range(width):
            y, x = row + top - padding, column + left - padding
            if 0 <= y < height and 0 <= x < width:
                cut[:, row, width - 1 - column if flip else column] = image[:, y, x]
    return cut


def test_crops_and_flips_are_those_of_each_image_alone() -> None:
    batch = images()
    shift = torch.tensor([[2, 2], [0, 0], [4, 4], [0, 4], [1, 2], [3, 1]])
    flip = torch.tensor([False, False, True, True, False, True])
    got = crop_and_flip(batch, shift, flip, padding=2)
    for image, (top, left), mirrored, cut in zip(batch, shift.tolist(), flip.tolist(), got, strict=True):
        assert torch.equal(cut, _reference_crop(image, top, left, mirrored, 2))
    assert torch.equal(got[0], batch[0])  # by the padding on both sides: where it was
    assert torch.equal(batch, images())


def test_normalised_pixels_follow_the_formula() -> None:
    batch = images()
    expected = torch.stack([(batch[:, c].double() / 255 - MEAN[c]) / STD[c] for c in range(3)], dim=1)
    torch.testing.assert_close(normalize(batch, MEAN, STD).double(), expected, rtol=0, atol=1e-6)


def test_what_is_kept_of_a_normalisation_fits_every_later_call() -> None:
    mean, std = (0.123,), (0.456,)  # of no other test
    image = images()[:, :1]
    torch.set_default_dtype(torch.float64)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        normalize(mode.from_tensor(image), mean, std)
    with torch.inference_mode():
        normalize(image, mean, std)
    torch.set_default_dtype(torch.float32)
    leaf = image.float().requires_grad_()
    got = normalize(leaf, mean, std)
    got.sum().backward()  # refused for what inference mode has made
    assert (type(got), got.dtype) == (Tensor, torch.float32)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, torch.full_like(leaf, 1 / (255 * 0.456)))


def test_what_is_drawn_follows_seed_epoch_batch_and_rank_alone() -> None:
    transform = ImageTransform(MEAN, STD, padding=2, flip=True, seed=3)
    batch = (images(), torch.arange(6))
    state = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    got, targets = transform(batch, (1, 2, 0))
    assert torch.equal(targets, torch.arange(6))
    assert torch.equal(got, transform(batch, (1, 2, 0))[0])
    others = [transform(batch, place)[0] for place in ((2, 2, 0), (1, 1, 0), (1, 2, 1))]
    others.append(ImageTransform(MEAN, STD, padding=2, flip=True, seed=4)(batch, (1, 2, 0))[0])
    assert not any(torch.equal(got, other) for other in others)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == state[1:]  # noqa: NPY002


def test_shifts_are_uniform_and_half_is_mirrored() -> None:
    # a white pixel in the corner of a 5 x 5 image tells where the cut begins and whether it is mirrored
    batch = torch.zeros(4000, 1, 5, 5, dtype=torch.uint8)
    batch[:, 0, 2, 2], batch[:, 0, 2, 1] = 255, 100
    cut = ImageTransform((0.0,), (1.0,), padding=1, flip=True)((batch,), (0, 0, 0))[0].squeeze(1)
    place = (cut == cut.amax((1, 2), keepdim=True)).flatten(1).int().argmax(1)
    seen = torch.bincount(place, minlength=25).double() / 4000
    middle = [row * 5 + column for row in (1, 2, 3) for column in (1, 2, 3)]
    assert float(seen[middle].sum()) == pytest.approx(1)
    assert (seen[middle] - 1 / 9).abs().max() < 4 * (1 / 9 * 8 / 9 / 4000) ** 0.5
    rows = torch.arange(4000)
    mirrored = cut[rows, place // 5, place % 5 + 1] > cut[rows, place // 5, place % 5 - 1]
    assert abs(float(mirrored.double().mean()) - 0.5) < 4 * (0.25 / 4000) ** 0.5


def test_without_crop_and_flip_images_stay_where_they_are() -> None:
    got, _ = ImageTransform(MEAN, STD)((images(), torch.arange(6)), (0, 0, 0))
    assert torch.equal(got, normalize(images(), MEAN, STD))


# --- batches ---------------------------------------------------------------------------------------------------------


def noted(batch: tuple[Tensor, ...], place: tuple[int, int, int]) -> Any:
    return (*batch, place)


def order(rows: int, **settings: Any) -> DistributedSampler[Any]:
    return DistributedSampler(range(rows), **{"num_replicas": 1, "rank": 0, "seed": 5, **settings})


def test_a_transform_is_given_the_numbers_of_epoch_batch_and_rank() -> None:
    sampler = order(10, num_replicas=2, rank=1)
    sampler.set_epoch(4)
    batches = TensorBatches([torch.arange(10)], 2, sampler, first_batch=lambda: 1, transform=noted)
    assert [place for _, place in batches] == [(4, 1, 1), (4, 2, 1)]


def read_image(number: int) -> Tensor | str:
    return f"{number} cannot be read." if number == 99 else torch.full((1, 2, 2), number, dtype=torch.uint8)


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_workers_give_the_batches_that_tensors_give(num_workers: int) -> None:
    numbers, targets = torch.arange(10, 20), torch.arange(10) % 3
    held = torch.stack([read_image(int(number)) for number in numbers])
    settings: dict[str, Any] = {"batch_size": 4, "sampler": order(10), "first_batch": lambda: 1}
    read = WorkerBatches([numbers, targets], read_image, num_workers, **settings)
    state = torch.get_rng_state()
    got, expected = list(read), list(TensorBatches([held, targets], **settings))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(got) == len(expected) == 2
    for own, other in zip(got, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))
    assert read.state_dict() == {"num_samples": 10, "batch_size": 4, "num_batches": 3}


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_image_that_a_worker_cannot_read_is_named(num_workers: int) -> None:
    batches = WorkerBatches([torch.tensor([1, 99])], read_image, num_workers, batch_size=2, sampler=order(2))
    with pytest.raises(ValueError, match=r"^99 cannot be read\.$"):
        list(batches)
