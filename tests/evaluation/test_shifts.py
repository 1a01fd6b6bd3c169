from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from mm_lightning.evaluation import Blur, Contrast, Noise, bounds_of_images, bounds_of_rows, shifts_of_five_strengths

UNIT = bounds_of_images([0.0], [1.0])


def _rng() -> torch.Generator:
    return torch.Generator().manual_seed(2)


@pytest.mark.parametrize(("side", "want"), [(8, 0.08), (64, 0.18)], ids=["small", "large"])
def test_noise_of_images_has_the_deviation_in_pixels(side: int, want: float) -> None:
    bounds = bounds_of_images([0.5], [0.25])
    inputs = torch.zeros(4096 // side, 1, side, side)  # grey
    noise = Noise(3)(inputs, bounds, _rng()) * 0.25
    # the standard error of a standard deviation is about sigma / sqrt(2 n)
    assert abs(noise.std().item() - want) < 4 * want / math.sqrt(2 * noise.numel())
    assert Noise(5)(inputs + 1.9, bounds, _rng()).max().item() == pytest.approx(2.0)  # white


def test_noise_of_rows_has_the_deviation_of_the_training_data() -> None:
    bounds = bounds_of_rows(torch.tensor([[0.0, 0.0], [2.0, 20.0]]))
    got = Noise(4)(torch.zeros(3, 2), bounds, _rng())
    draw = torch.randn(3, 2, generator=_rng())
    assert_close(got, 0.5 * draw * torch.tensor([1.0, 10.0]))


def test_contrast_by_hand() -> None:
    images = torch.tensor([[0.0, 1.0], [1.0, 1.0]]).reshape(1, 1, 2, 2)
    got = Contrast(2)(images, UNIT)
    assert_close(got.flatten(), torch.tensor([0.375, 0.875, 0.875, 0.875]))


def test_blur_spreads_a_point_as_a_gaussian_does() -> None:
    images = torch.zeros(2, 3, 15, 15, dtype=torch.float64)
    images[1, 2, 7, 7] = 1
    got = Blur(5)(images, UNIT)  # sigma 1
    weights = [math.exp(-i * i / 2) for i in range(-4, 5)]
    for i in range(15):
        for j in range(15):
            near = abs(i - 7) <= 4 and abs(j - 7) <= 4
            want = weights[i - 3] * weights[j - 3] / sum(weights) ** 2 if near else 0.0
            assert got[1, 2, i, j].item() == pytest.approx(want, abs=1e-12)
    assert got[0].abs().max() == 0
    assert got[1, :2].abs().max() == 0


def test_blur_leaves_an_even_image_even_to_its_border() -> None:
    images = torch.full((1, 1, 5, 5), 0.7)
    assert_close(Blur(5)(images, UNIT), images)


def test_all_strengths_of_images_and_noise_alone_of_others() -> None:
    assert len({one.name for one in shifts_of_five_strengths(are_images=True)}) == 15
    names = [one.name for one in shifts_of_five_strengths(are_images=False)]
    assert names == ["noise_1", "noise_2", "noise_3", "noise_4", "noise_5"]


def test_misuse_is_named() -> None:
    for kind in (Noise, Blur, Contrast):
        with pytest.raises(ValueError, match=r"strength must be an integer in \[1, 5\], got 6"):
            kind(6)
    with pytest.raises(ValueError, match=r"images must be \(N, C, H, W\), got \(2, 3\)"):
        Blur(1)(torch.zeros(2, 3), UNIT)
    with pytest.raises(ValueError, match="For other inputs there is Noise"):
        Contrast(1)(torch.zeros(2, 3), UNIT)
