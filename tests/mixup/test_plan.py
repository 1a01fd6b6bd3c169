from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from mm_lightning.mixup import BetaRatio, MixPlan, PlanSource

LAYERS = ("input", "layer1", "layer2")


def test_plan_cannot_be_changed() -> None:
    plan = PlanSource(LAYERS).draw(4)
    with pytest.raises(FrozenInstanceError, match="cannot assign to field 'layer'"):
        plan.layer = None  # type: ignore[misc]


def test_plan_on_its_device_already_is_not_copied() -> None:
    plan = PlanSource(LAYERS).draw(4)
    assert plan.to("cpu") is plan


def test_moved_ratio_of_the_batch_stays_one_number() -> None:
    moved = PlanSource(LAYERS).draw(4).to("meta")
    assert moved.lam.shape == (4,)
    assert moved.lam.stride() == (0,)
    assert moved.lam.untyped_storage().nbytes() == 4  # one float32


def test_moved_plan_lies_on_the_device_whole() -> None:
    plan = PlanSource(LAYERS, BetaRatio(2.0, per_sample=True)).draw(4)
    moved = plan.to(torch.device("meta"))
    assert {tensor.device.type for tensor in (moved.lam, moved.partner, moved.inverse)} == {"meta"}
    assert (moved.lam.shape, moved.lam.stride(), moved.lam.dtype) == ((4,), (1,), torch.float32)
    assert (moved.layer, moved.batch_size, moved.mixes) == (plan.layer, 4, True)


@pytest.mark.parametrize(
    "plan",
    [
        MixPlan("input", torch.tensor([1, 2, 0]), torch.tensor([0.3]).expand(3), torch.tensor([2, 0, 1]), 0.3),
        MixPlan("input", torch.tensor([1, 2, 0]), torch.tensor([0.3]).expand(3), torch.tensor([2, 0, 1])),
        MixPlan("input", torch.tensor([1, 2, 0]), torch.tensor([0.3, 0.2, 1.0]), torch.tensor([2, 0, 1])),
        MixPlan("input", torch.tensor([1, 1, 0]), torch.tensor([0.3, 0.2, 1.0])),
        MixPlan.unmixed(3),
    ],
    ids=["one number", "one number unknown", "per row", "no permutation", "unmixed"],
)
def test_moved_plan_keeps_what_was_drawn(plan: MixPlan) -> None:
    moved = plan.to("cpu:0")  # which torch takes for another device than "cpu", so that it is moved
    assert moved is not plan
    assert torch.equal(moved.partner, plan.partner)
    assert torch.equal(moved.lam, torch.full((3,), torch.tensor(0.3)) if plan.shared_lam == 0.3 else plan.lam)
    assert moved.lam.stride() == plan.lam.stride()
    assert (moved.inverse is None) == (plan.inverse is None)
    assert plan.inverse is None or torch.equal(moved.inverse, plan.inverse)
    assert (moved.layer, moved.shared_lam) == (plan.layer, plan.shared_lam)


@pytest.mark.parametrize("places", [("meta", "cpu", "cpu"), ("cpu", "meta", "meta"), ("meta", "meta", "cpu")])
def test_what_was_drawn_elsewhere_is_moved_to(places: tuple[str, str, str]) -> None:
    lam, partner, inverse = places  # partners may be drawn from hidden states on a GPU
    rows = torch.tensor([1, 0])
    moved = MixPlan("input", rows.to(partner), torch.tensor([0.5, 0.25]).to(lam), rows.to(inverse)).to("meta")
    assert moved.inverse is not None
    assert [one.device.type for one in (moved.partner, moved.lam, moved.inverse)] == ["meta"] * 3


class Copies(TorchDispatchMode):
    """Counts copies to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("plan", "copies"),
    [
        (PlanSource(LAYERS).draw(4), 1),
        (PlanSource(LAYERS, BetaRatio(1.0, per_sample=True)).draw(4), 2),
        (MixPlan.unmixed(4), 0),
    ],
    ids=["one number", "per row", "unmixed"],
)
def test_few_copies_move_a_plan(plan: MixPlan, copies: int) -> None:
    with Copies() as seen:
        moved = plan.to("meta")
    assert seen.count == copies
    assert moved.inverse is not None
    assert {one.device.type for one in (moved.partner, moved.lam, moved.inverse)} == {"meta"}


@pytest.mark.parametrize("layer", ["input", None])
def test_moved_ratio_keeps_its_type(layer: str | None) -> None:
    lam = torch.tensor([0.5], dtype=torch.float64).expand(2)
    moved = MixPlan(layer, torch.tensor([1, 0]), lam, shared_lam=0.5).to("meta")
    assert (moved.lam.dtype, moved.inverse) == (torch.float64, None)


def test_plan_without_inverse_moves() -> None:
    moved = MixPlan("input", torch.tensor([0, 0]), torch.tensor([0.5, 0.25])).to("meta")
    assert moved.inverse is None
    assert moved.partner.device.type == "meta"


def test_unmixed_plan_of_many_rows_holds_one_ratio() -> None:
    plan = MixPlan.unmixed(3)
    assert_close(plan.lam, torch.ones(3))
    assert plan.lam.stride() == (0,)
    assert plan.inverse.tolist() == [0, 1, 2]
