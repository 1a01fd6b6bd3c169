"""Every module of the zoo trains as the formulas say, or is refused."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from zoo import ENTRIES, Entry
from zoo.entry import ROWS
from zoo.one_batch import train_mixed, train_on
from zoo.reference import assert_exact, deviation, reference

from mm_lightning import MixPlan

CASES = [
    pytest.param(
        entry,
        layer,
        id=f"{entry.name} at {layer}",
        marks=pytest.mark.skipif(entry.needs is not None and find_spec(entry.needs) is None, reason="not installed"),
    )
    for entry in ENTRIES
    for layer in entry.layers
]

pytestmark = pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`")


@pytest.mark.parametrize(("entry", "layer"), CASES)
def test_a_step_is_exact_or_refused(entry: Entry, layer: str) -> None:
    batch = entry.batch()
    if entry.refused is None:
        got, plan = train_mixed(entry, layer, batch=batch)
        assert_exact(got, reference(entry, plan))
    else:
        with pytest.raises((RuntimeError, TypeError, ValueError), match=entry.refused):
            train_mixed(entry, layer, batch=batch)
    for left, original in zip(tree_leaves(batch), tree_leaves(entry.batch()), strict=True):
        assert type(left) is type(original)
        if isinstance(original, Tensor):
            torch.testing.assert_close(left, original, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("entry", "layer"), CASES)
def test_an_entry_can_tell_right_from_wrong(entry: Entry, layer: str) -> None:
    if entry.refused is not None:  # because of mixup, not because it is broken
        assert train_on(entry.batch(), entry.make()).losses.isfinite().all()
        return
    plan = MixPlan(layer, torch.tensor([5, 4, 0, 1, 2, 3]), torch.full((ROWS,), 0.6))
    mixed = reference(entry, plan)
    unmixed_targets = dataclasses.replace(entry, with_targets_of=lambda batch, _: batch, moves_inputs=False)
    assert mixed.losses.isfinite().all()
    assert deviation(mixed, reference(unmixed_targets, plan)) > 1e-3
    assert deviation(mixed, train_on(entry.batch(), entry.make())) > 1e-3


@pytest.mark.parametrize(
    ("name", "metric"),
    [("WithMetrics", "train_acc"), ("KeywordSpotter", "train_accuracy"), ("MSE", "train_mae"), ("ClickModel", "auroc")],
)
def test_metrics_see_the_batch_s_own_targets(name: str, metric: str) -> None:
    (entry,) = [entry for entry in ENTRIES if entry.name == name]
    module, seen = entry.make(), []
    update = getattr(module, metric).update

    def spy(preds: Tensor, target: Tensor) -> None:
        with torch.no_grad():
            seen.append(target.flatten().tolist())
        update(preds, target)

    getattr(module, metric).update = spy
    batch = entry.batch()
    _, plan = train_mixed(entry, entry.layers[0], module)
    own = batch["target"] if isinstance(batch, dict) else batch[-1]
    assert own[plan.partner].tolist() != own.tolist()
    # The look, and a metric that is updated for the partners' half as well, are undone: what it holds is of one batch.
    assert own.tolist() in seen
    assert getattr(module, metric)._update_count in (0, 1)  # 0 where the epoch's end has reset it


def test_batch_norm_counts_one_batch() -> None:
    (entry,) = [entry for entry in ENTRIES if entry.name == "ResNet"]
    module = entry.make()
    train_mixed(entry, "layer1", module)
    assert {int(n) for name, n in module.named_buffers() if name.endswith("num_batches_tracked")} == {1}


def test_names_are_unique() -> None:
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES)
