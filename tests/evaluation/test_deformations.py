from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from mm_lightning.evaluation import Rotation, Shear, Zoom, affine, paper_deformations

IMAGE = torch.arange(1.0, 13.0, dtype=torch.float64).reshape(1, 1, 3, 4)
SQUARE = torch.arange(1.0, 17.0, dtype=torch.float64).reshape(1, 1, 4, 4)


def _matrix(*entries: float) -> torch.Tensor:
    return torch.tensor(entries, dtype=torch.float64).reshape(1, 2, 2)


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_quarter_turns_are_those_of_rot90(quarters: int) -> None:
    matrix = Rotation.matrices(torch.tensor([quarters * math.pi / 2], dtype=torch.float64))
    assert_close(affine(SQUARE, matrix), torch.rot90(SQUARE, quarters, dims=(2, 3)), rtol=0, atol=1e-9)


def test_a_turn_of_an_oblong_image_does_not_stretch_it() -> None:
    got = affine(IMAGE, Rotation.matrices(torch.tensor([math.pi / 2], dtype=torch.float64)))[0, 0]
    # place (x, y) shows (-y, x): x = -1.5 .. 1.5 as rows -1 .. 1, so rows lie half way between those of the image
    for i in range(3):
        for j in range(4):
            x, y = j - 1.5, i - 1.0
            column, row = -y + 1.5, x + 1.0  # in index units of the image
            want = 0.0
            for r in (math.floor(row), math.floor(row) + 1):
                for c in (math.floor(column), math.floor(column) + 1):
                    if 0 <= r < 3 and 0 <= c < 4:
                        want += float(IMAGE[0, 0, r, c]) * (1 - abs(row - r)) * (1 - abs(column - c))
            assert got[i, j].item() == pytest.approx(want, abs=1e-9)


def test_an_integer_shear_moves_whole_pixels() -> None:
    # place (x, y) shows (x, y - x): of 3 columns, x = -1 0 1, the first shows y + 1, the last y - 1
    image = torch.arange(1.0, 10.0).reshape(1, 1, 3, 3)
    got = affine(image, _matrix(1, 0, -1, 1))
    assert_close(got[0, 0], torch.tensor([[4.0, 2.0, 0.0], [7.0, 5.0, 3.0], [0.0, 8.0, 6.0]]), rtol=0, atol=1e-5)


def test_the_shear_is_that_of_the_authors() -> None:
    angles = torch.tensor([0.0, math.pi / 6, math.pi], dtype=torch.float64)
    half = math.sqrt(3) / 2
    want = torch.tensor([[[1, 0], [0, 1]], [[half, 0], [-0.5, 1]], [[-1, 0], [0, 1]]], dtype=torch.float64)
    assert_close(Shear.matrices(angles), want)
    assert_close(affine(IMAGE, Shear.matrices(angles[2:])), IMAGE.flip(3), rtol=0, atol=1e-9)


def test_zooms_by_two_by_hand() -> None:
    # out: places 1.5 from the centre show 3, outside; places 0.5 show 1, where four pixels meet
    out = Zoom(2.0)(SQUARE)[0, 0]
    blocks = SQUARE[0, 0].reshape(2, 2, 2, 2).mean(dim=(1, 3))
    assert_close(out[1:3, 1:3], blocks, rtol=0, atol=1e-9)
    assert out.sum() == out[1:3, 1:3].sum()
    # in: places -1.5 -0.5 0.5 1.5 show -0.75 -0.25 0.25 0.75, that is 0.75 1.25 1.75 2.25 counted in pixels
    row = torch.tensor([1.0, 3.0, 7.0, 9.0], dtype=torch.float64).expand(1, 1, 4, 4)
    between = [1 + 0.75 * 2, 3 + 0.25 * 4, 3 + 0.75 * 4, 7 + 0.25 * 2]
    assert_close(Zoom(0.5)(row)[0, 0], torch.tensor(between, dtype=torch.float64).expand(4, 4), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("kind", "degrees"), [(Rotation, 40), (Shear, 114.6)])
def test_each_image_has_an_angle_of_its_own_drawn_evenly(kind: type[Rotation] | type[Shear], degrees: float) -> None:
    before = torch.random.get_rng_state()
    images = IMAGE.expand(5, 1, 3, 4).clone()
    got = kind(degrees)(images, torch.Generator().manual_seed(3))
    draws = 2 * torch.rand(5, generator=torch.Generator().manual_seed(3), dtype=torch.float64) - 1
    assert_close(got, affine(images, kind.matrices(math.radians(degrees) * draws)), rtol=0, atol=0)
    assert len({tuple(one.flatten().tolist()) for one in got}) == 5
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(images, IMAGE.expand(5, 1, 3, 4))


def test_nothing_to_do_is_the_identity_and_keeps_the_dtype() -> None:
    rng = torch.Generator()
    for dtype in (torch.float16, torch.float32, torch.float64):
        images = IMAGE.to(dtype)
        for deformation in (Rotation(0), Shear(0), Zoom(1)):
            got = deformation(images, rng)
            assert got.dtype == dtype
            assert_close(got, images, rtol=0, atol=1e-5)


def test_the_paper_has_seventeen() -> None:
    names = [one.name for one in paper_deformations()]
    assert len(set(names)) == 17
    assert {"rotation_20", "shear_171.9", "zoom_0.2", "zoom_1.8"} <= set(names)


def test_misuse_is_named() -> None:
    with pytest.raises(ValueError, match=r"images must be floating point \(N, C, H, W\), got torch.float32 \(2, 3\)"):
        Zoom(2)(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="degrees must be a number >= 0, got -1"):
        Rotation(-1)
    with pytest.raises(ValueError, match="scale must be a number > 0, got 0"):
        Zoom(0)
