"""The step that mixup asks for, without mixup's code: the unmodified step on own and on partners' targets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mm_lightning import MixPlan
from zoo.entry import Entry
from zoo.one_batch import Step, train_on


def reference(entry: Entry, plan: MixPlan) -> Step:
    """Interpolate two runs of the step, which share the mixed hidden state and differ in the targets.

    Every loss and gradient is ``lam * (of own targets) + (1 - lam) * (of partners' targets)``. Where these cannot be
    had without their inputs, the second run sees the partners' rows and mixes them the other way round: what is row
    ``partner[i]`` of the batch is row i there.
    """
    lam, partner, inverse = float(plan.lam[0]), plan.partner, plan.partner.argsort()
    batch = entry.batch()
    own = _run(entry, batch, plan.layer, lambda h: lam * h + (1 - lam) * h[partner])
    other = entry.with_targets_of(batch, partner)
    if entry.moves_inputs:
        partners = _run(entry, other, plan.layer, lambda h: lam * h[inverse] + (1 - lam) * h)
    else:
        partners = _run(entry, other, plan.layer, lambda h: lam * h + (1 - lam) * h[partner])
    return Step(
        lam * own.losses + (1 - lam) * partners.losses,
        {name: lam * own.grads[name] + (1 - lam) * partners.grads[name] for name in own.grads},
    )


def _run(entry: Entry, batch: Any, layer: str | None, mix: Any) -> Step:
    module = entry.make()
    if layer == "input":
        return train_on(tree_map_only(Tensor, lambda x: mix(x) if x.is_floating_point() else x, batch), module)
    assert layer is not None
    module.get_submodule(layer).register_forward_hook(lambda _, args, out: tree_map_only(Tensor, mix, out))
    return train_on(batch, module)


def assert_exact(got: Step, wanted: Step) -> None:
    """Raise AssertionError unless losses and gradients agree to the rounding of float64."""
    torch.testing.assert_close(got.losses, wanted.losses, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got.grads, wanted.grads, rtol=1e-9, atol=1e-12)


def deviation(got: Step, wanted: Step) -> float:
    """Return the largest absolute difference of a gradient."""
    pairs = [(got.grads[name], wanted.grads[name]) for name in got.grads.keys() & wanted.grads.keys()]
    return max(float((ours - theirs).abs().max()) for ours, theirs in pairs)
