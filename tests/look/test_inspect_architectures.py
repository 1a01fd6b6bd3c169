"""What ``mm_lightning.inspect`` finds in networks of many families."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from architectures import ARCHITECTURES, Architecture, cuts, run_once
from torch.utils._pytree import tree_leaves
from versions import compiles

import mm_lightning
from mm_lightning.inspect import Inspection


@pytest.fixture(params=ARCHITECTURES, ids=lambda architecture: architecture.name)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    if request.param.needs:
        pytest.importorskip(request.param.needs, minversion=request.param.since)
    return request.param


@cache
def inspected(name: str) -> Inspection:
    (found,) = [architecture for architecture in ARCHITECTURES if architecture.name == name]
    return mm_lightning.inspect(found.make(), found.batch())


def test_safe_and_unsafe_layers_are_told_apart(architecture: Architecture) -> None:
    rows = {row.name: row for row in inspected(architecture.name).layers}
    assert {name for name in architecture.safe if not rows[name].safe} == set()
    assert {name for name in architecture.unsafe if rows[name].safe} == set()
    assert [name for name, row in rows.items() if not row.safe and not row.reason] == []


def test_a_layer_is_safe_if_the_loss_sees_the_batch_through_it_alone(architecture: Architecture) -> None:
    module, batch = architecture.make(), architecture.batch()
    names = run_once(module, batch)
    found = {row.name: row.safe for row in inspected(architecture.name).layers if row.name in names}
    assert found == {name: cuts(module, batch, name) for name in found}
    assert architecture.safe - names <= {"net.lstm"}  # which returns several tensors


def test_the_early_stages_are_chosen(architecture: Architecture) -> None:
    inspection = inspected(architecture.name)
    assert tuple(inspection.chosen) == architecture.chosen
    assert {row.name for row in inspection.layers if row.chosen} - {"input"} == set(architecture.chosen) - {"input"}


@compiles
def test_compiling_a_part_changes_no_choice() -> None:
    (mlp,) = [architecture for architecture in ARCHITECTURES if architecture.name == "mlp"]
    module = mlp.make()
    module.net[2] = torch.compile(module.net[2], backend="eager")
    assert mm_lightning.inspect(module, mlp.batch()).chosen == mlp.chosen


@pytest.mark.parametrize("name", ["densenet", "unet"])
def test_a_layer_that_several_ways_lead_around_has_the_same_reason_each_time(name: str) -> None:
    assert len({str(inspected.__wrapped__(name)) for _ in range(4)}) == 1


def test_everything_is_as_before(architecture: Architecture) -> None:
    module, batch = architecture.make(), architecture.batch()
    list(module.modules())[-1].eval()  # modes differ
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    modes = [part.training for part in module.modules()]
    inputs = [leaf.clone() for leaf in tree_leaves(batch)]
    random_state = torch.get_rng_state()
    mm_lightning.inspect(module, batch)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [part.training for part in module.modules()] == modes
    assert list(module.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert all(torch.equal(leaf, before) for leaf, before in zip(tree_leaves(batch), inputs, strict=True))
    assert not any(leaf.requires_grad for leaf in tree_leaves(batch))
