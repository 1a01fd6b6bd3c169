"""Every way to mix, through the callback: loss and gradient of a step against loops written from the formulas."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from ways_by_hand import (
    Mixed,
    assert_weights,
    reference_channels,
    reference_cutmix,
    reference_linear,
    reference_noisy,
    reference_patchup,
    reference_token_weights,
)

from mm_lightning import ManifoldMixupCallback
from mm_lightning.mixup import (
    BetaRatio,
    ChannelMix,
    ConfidentWithUnconfident,
    CutMix,
    FixedRatio,
    FoldedRatio,
    FromBatch,
    LabelDistance,
    MatchedGroups,
    MixPlan,
    NearestNeighbors,
    NoisyFeatures,
    OtherClass,
    PatchUp,
    PlanSource,
    Roll,
    SameClass,
    SimilarityRatio,
    TokenMix,
    UniformRatio,
)

MakeTrainer = Callable[..., pl.Trainer]
Reference = Callable[[Tensor, MixPlan], Mixed]
ROWS = 7


class Pool(nn.Module):
    """Mean over the tokens that are real."""

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            return hidden.mean(dim=1)
        weight = mask[:, :, None].to(hidden.dtype)
        return (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(1)


class Network(pl.LightningModule):
    """Convolutions for images and a linear layer for sequences, then 5-3 with tanh; float64, always the same weights.

    Keeps loss and gradients of each step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.embed, self.pool = nn.Linear(3, 4), Pool()
        self.hidden, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2
        self.seen: list[dict[str, Any]] = []

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if x.dim() == 3:
            pooled = self.pool(torch.tanh(self.embed(x)), mask)
        else:
            pooled = torch.tanh(self.second(torch.tanh(self.first(x)))).mean(dim=(2, 3))
        return self.head(torch.tanh(self.hidden(pooled)))

    def loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        y = batch["y"]
        return F.mse_loss(logits[:, 0], y) if y.is_floating_point() else F.cross_entropy(logits, y)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(self(batch["x"], batch.get("mask")), batch)
        self.seen.append({"own": loss.detach().clone()})
        return loss

    def on_before_backward(self, loss: Tensor) -> None:
        self.seen[-1]["loss"] = loss.detach().clone()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.seen[-1]["grads"] = [None if p.grad is None else p.grad.clone() for p in self.parameters()]
        self.seen[-1]["weights"] = copy.deepcopy(self.state_dict())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Batches(list[Any]):
    """A plain loader. (A list of batches would be taken for a list of loaders.)"""


class Plans(pl.Callback):
    """Keeps the plan of every batch as the loss used it."""

    def __init__(self, callback: ManifoldMixupCallback) -> None:
        self.callback = callback
        self.used: list[MixPlan] = []

    def on_train_batch_end(self, *_: Any) -> None:
        assert self.callback.plan is not None
        self.used.append(self.callback.plan)


def images(rows: int = ROWS, seed: int = 2, numbers: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 2, 6, 8, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (rows,), generator=generator)
    partner = torch.randint(0, rows, (rows,), generator=generator)
    return {"x": x, "y": y.double() if numbers else y, "partner": partner}


def sequences(rows: int = ROWS, seed: int = 2, masked: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 9, 3, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 10, (rows,), generator=generator)
    lengths[0] = 9
    batch = {"x": x, "y": torch.randint(0, 3, (rows,), generator=generator)}
    return {**batch, "mask": torch.arange(9) < lengths[:, None]} if masked else batch


def mixup(**settings: Any) -> ManifoldMixupCallback:
    if not {"ratio", "alpha"} & settings.keys():
        settings["alpha"] = 1.0
    return ManifoldMixupCallback(**{"seed": 5, "schedule": None, **settings})


def hidden_states(net: Network, x: Tensor) -> dict[str, Tensor]:
    """Of the unmixed batch at every layer."""
    if x.dim() == 3:
        embed = net.embed(x)
        return {"input": x, "embed": embed}
    first = net.first(x)
    second = net.second(torch.tanh(first))
    return {
        "input": x,
        "first": first,
        "second": second,
        "hidden": net.hidden(torch.tanh(second).mean(dim=(2, 3))),
    }


def rest(net: Network, layer: str, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The logits from what a layer returned."""
    if layer == "input":
        return net(hidden, mask)
    if layer == "embed":
        return net.head(torch.tanh(net.hidden(net.pool(torch.tanh(hidden), mask))))
    if layer == "first":
        hidden = net.second(torch.tanh(hidden))
    if layer in ("first", "second"):
        hidden = net.hidden(torch.tanh(hidden).mean(dim=(2, 3)))
    return net.head(torch.tanh(hidden))


def reference_step(
    net: Network, batch: dict[str, Tensor], plan: MixPlan, reference: Reference, clean_weight: float = 0.0
) -> tuple[Tensor, list[Tensor | None], list[float]]:
    """``mean_i w_i L(y_i) + (1 - w_i) L(y_partner(i))``, its gradients, and the weights w."""
    assert plan.layer is not None
    mixed, weights = reference(hidden_states(net, batch["x"])[plan.layer], plan)
    mask = batch.get("mask")
    if mask is not None:
        mask = reference_mask(mask, plan, reference)
    logits, partner = rest(net, plan.layer, mixed, mask), plan.partner.tolist()
    loss = torch.zeros((), dtype=torch.float64)
    for i, weight in enumerate(weights):
        own, other = (row_loss(logits[i], batch["y"][j]) for j in (i, partner[i]))
        loss = loss + (weight * own + (1 - weight) * other) / len(weights)
    if clean_weight:
        clean = net(batch["x"], batch.get("mask"))
        losses = [row_loss(row, y) for row, y in zip(clean, batch["y"], strict=True)]
        loss = loss + clean_weight * sum(losses) / len(losses)
    grads = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    return loss.detach(), list(grads), weights


def reference_mask(mask: Tensor, plan: MixPlan, reference: Reference) -> Tensor:
    """What either row keeps; where tokens are exchanged, what the row keeps that each token is from."""
    if reference in (by_tokens, by_real_tokens):
        mixed, _ = reference_channels(mask[:, :, None].double(), plan, 1)
        return mixed[:, :, 0] > 0
    return torch.stack([mask[i] | mask[j] for i, j in enumerate(plan.partner.tolist())])


def row_loss(logits: Tensor, y: Tensor) -> Tensor:
    return (logits[0] - y).square() if y.is_floating_point() else -(logits - logits.exp().sum().log())[int(y)]


def by_tokens(hidden: Tensor, plan: MixPlan) -> Mixed:
    return reference_channels(hidden, plan, 1)


def by_real_tokens(hidden: Tensor, plan: MixPlan) -> Mixed:
    mixed, _ = reference_channels(hidden, plan, 1)
    return mixed, reference_token_weights(plan.batch["mask"], plan)


BY_ROW = BetaRatio(1.0, per_sample=True)
SOFT, HARD, NOISY = PatchUp(0.5, 3), PatchUp(0.9, 5), NoisyFeatures(0.3, 0.5)
IMAGE_LAYERS = ["input", "first", "second"]
INTERPOLATIONS = [
    pytest.param({"interpolation": CutMix()}, IMAGE_LAYERS, images, reference_cutmix, id="cutmix"),
    pytest.param(
        {"interpolation": CutMix(), "ratio": BY_ROW},
        IMAGE_LAYERS,
        images,
        lambda hidden, plan: reference_cutmix(hidden, plan, by_row=True),
        id="cutmix_by_row",
    ),
    pytest.param(
        {"interpolation": SOFT},
        IMAGE_LAYERS,
        images,
        lambda hidden, plan: reference_patchup(hidden, plan, SOFT),
        id="patchup_soft",
    ),
    pytest.param(
        {"interpolation": HARD, "ratio": FixedRatio(0.0)},
        IMAGE_LAYERS,
        images,
        lambda hidden, plan: reference_patchup(hidden, plan, HARD),
        id="patchup_hard",
    ),
    pytest.param(
        {"interpolation": SOFT, "ratio": BY_ROW, "pairing": Roll()},
        IMAGE_LAYERS,
        images,
        lambda hidden, plan: reference_patchup(hidden, plan, SOFT),
        id="patchup_by_row",
    ),
    pytest.param(
        {"interpolation": NOISY},
        [*IMAGE_LAYERS, "hidden"],
        images,
        lambda hidden, plan: reference_noisy(hidden, plan, NOISY),
        id="noisy",
    ),
    pytest.param(
        {"interpolation": ChannelMix()},
        [*IMAGE_LAYERS, "hidden"],
        images,
        lambda hidden, plan: reference_channels(hidden, plan, 1),
        id="channels",
    ),
    pytest.param(
        {"interpolation": ChannelMix(-1)},
        ["input", "embed"],
        lambda seed: sequences(seed=seed, masked=False),
        lambda hidden, plan: reference_channels(hidden, plan, 2),
        id="channels_of_sequences",
    ),
    pytest.param(
        {"interpolation": TokenMix()},
        ["input", "embed"],
        lambda seed: sequences(seed=seed, masked=False),
        by_tokens,
        id="tokens",
    ),
    pytest.param({"interpolation": TokenMix()}, ["embed"], sequences, by_tokens, id="tokens_with_masks"),
    pytest.param(
        {"interpolation": TokenMix("mask")},
        ["input", "embed"],
        lambda seed: {**sequences(seed=seed)},
        by_real_tokens,
        id="real_tokens",
    ),
]
OTHERS = [
    pytest.param({"pairing": SameClass()}, images, id="same_class"),
    pytest.param({"pairing": OtherClass()}, images, id="other_class"),
    pytest.param({"pairing": LabelDistance(0.5)}, lambda seed: images(seed=seed, numbers=True), id="label_distance"),
    pytest.param({"pairing": NearestNeighbors()}, images, id="nearest"),
    pytest.param({"pairing": MatchedGroups(3)}, images, id="matched"),
    pytest.param({"pairing": ConfidentWithUnconfident()}, images, id="confident"),
    pytest.param({"pairing": FromBatch("partner")}, images, id="from_batch"),
    pytest.param({"ratio": BetaRatio(2.0, beta=0.5)}, images, id="beta"),
    pytest.param({"ratio": UniformRatio(per_sample=True)}, images, id="uniform"),
    pytest.param({"ratio": FixedRatio(0.3)}, images, id="fixed"),
    pytest.param({"ratio": FoldedRatio(BetaRatio(0.5))}, images, id="folded"),
    pytest.param({"ratio": SimilarityRatio()}, images, id="similarity"),
    pytest.param({"ratio": SimilarityRatio(), "pairing": NearestNeighbors(2)}, images, id="similar_nearest"),
]
EVERY_WAY = [
    *INTERPOLATIONS,
    *[
        pytest.param(*p.values[:1], ["input", "second", "hidden"], p.values[1], reference_linear, id=p.id)
        for p in OTHERS
    ],
    pytest.param(
        {"interpolation": CutMix(), "pairing": NearestNeighbors()},
        IMAGE_LAYERS,
        images,
        reference_cutmix,
        id="nearest_cutmix",
    ),
    pytest.param(
        {"interpolation": CutMix(), "pairing": SameClass()}, IMAGE_LAYERS, images, reference_cutmix, id="same_cutmix"
    ),
]
every_way = pytest.mark.parametrize(("settings", "layers", "make_batch", "reference"), EVERY_WAY)


def plan_by_hand(net: Network, batch: dict[str, Tensor], batch_index: int, **settings: Any) -> MixPlan:
    """The plan of the callback, drawn by the functional interface from what the unmixed batch gives."""
    layers, settings = settings.pop("layers"), {"ratio": BetaRatio(1.0), "seed": 5, **settings}
    source = PlanSource(layers, **settings)
    seen = {"batch": batch, "targets": batch["y"], "logits": net(batch["x"], batch.get("mask"))}
    plan = source.draw(len(batch["y"]), batch_index=batch_index, progress=0.5, **seen)
    return plan if plan.layer is None else plan.settled(hidden=hidden_states(net, batch["x"])[plan.layer])


def trained(make_trainer: MakeTrainer, data: list[Any], **settings: Any) -> tuple[Network, Plans]:
    net, callback = Network(), mixup(**settings)
    plans = Plans(callback)
    make_trainer(callback, plans).fit(net, Batches(data))
    return net, plans


def net_with(weights: dict[str, Tensor]) -> Network:
    net = Network()
    net.load_state_dict(weights)
    return net


def check_steps(
    make_trainer: MakeTrainer,
    settings: dict[str, Any],
    layers: list[str],
    make_batch: Any,
    reference: Reference,
    clean_weight: float,
) -> None:
    """Loss and gradient of every step of a fit that mixes at every layer."""
    data = [make_batch(seed=seed) for seed in range(2 * len(layers) + 1)]
    net, plans = trained(make_trainer, data, layers=layers, clean_weight=clean_weight, **settings)
    assert {plan.layer for plan in plans.used} == set(layers)
    num_by_row = 0
    for i, (seen, batch, used) in enumerate(zip(net.seen, data, plans.used, strict=True)):
        before = net_with(seen["weights"])
        plan = plan_by_hand(before, batch, i, layers=layers, **settings)
        assert torch.equal(used.partner, plan.partner)
        loss, grads, weights = reference_step(before, batch, plan, reference, clean_weight)
        assert_weights(used.lam, weights)
        num_by_row += len(set(weights)) > 1
        assert_close(seen["loss"], loss, rtol=0, atol=1e-12)
        for got, wanted in zip(seen["grads"], grads, strict=True):
            assert (got is None) == (wanted is None)
            assert got is None or (got - wanted).abs().max() < 1e-12
    assert (num_by_row > 0) == mixup(layers=layers, **settings).per_sample


@every_way
def test_every_step_equals_the_formulas(
    make_trainer: MakeTrainer, settings: dict[str, Any], layers: list[str], make_batch: Any, reference: Reference
) -> None:
    check_steps(make_trainer, settings, layers, make_batch, reference, 0.0)


@pytest.mark.parametrize(
    ("settings", "layers", "make_batch", "reference"),
    [
        pytest.param({}, ["input", "second"], images, reference_linear, id="linear"),
        pytest.param({"interpolation": CutMix()}, ["input"], images, reference_cutmix, id="cutmix"),
        pytest.param({"interpolation": TokenMix("mask")}, ["embed"], sequences, by_real_tokens, id="real_tokens"),
        pytest.param({"pairing": ConfidentWithUnconfident()}, ["first"], images, reference_linear, id="confident"),
        pytest.param({"ratio": SimilarityRatio()}, ["hidden"], images, reference_linear, id="similarity"),
    ],
)
def test_the_unmixed_loss_is_added_with_its_weight(
    make_trainer: MakeTrainer, settings: dict[str, Any], layers: list[str], make_batch: Any, reference: Reference
) -> None:
    check_steps(make_trainer, settings, layers, make_batch, reference, 0.5)
