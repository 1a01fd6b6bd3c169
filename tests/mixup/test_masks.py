"""Masks of padded sequences: from the mixed layer on a row has the tokens of both its parents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from classifier import Plans, mixup
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from mm_lightning import MixPlan
from mm_lightning.mixup.masks import UnionHook, keep_value, masks_in, union

MakeTrainer = Callable[..., pl.Trainer]
PLAN = MixPlan("first", torch.tensor([1, 2, 0]), torch.zeros(3))
KEEP = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]])
UNION = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]])


class Batches(list[Any]):
    """A plain loader of given batches."""


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32])
def test_union_keeps_what_either_row_keeps(dtype: torch.dtype) -> None:
    assert torch.equal(union(KEEP.to(dtype), PLAN, True), UNION.to(dtype))
    if dtype != torch.float32:
        assert torch.equal(union((1 - KEEP).to(dtype), PLAN, False), (1 - UNION).to(dtype))


@pytest.mark.parametrize("keep", [True, False])
def test_additive_masks_keep_the_larger_value(keep: bool) -> None:
    additive, wanted = ((1.0 - mask).masked_fill(mask == 0, -torch.inf) for mask in (KEEP, UNION))
    assert torch.equal(union(additive, PLAN, keep), wanted)
    assert torch.equal(union(additive[:, None, None], PLAN, keep), wanted[:, None, None])


def test_masks_of_heads_take_the_partner_of_their_row() -> None:
    # (N, T) -> (N * heads, T, T), heads of a row next to each other; the second head drops the first token
    heads, wanted = ((m.bool()[:, None, None].expand(3, 2, 4, 4).clone()) for m in (KEEP, UNION))
    heads[:, 1, :, 0] = wanted[:, 1, :, 0] = False
    got = union(heads.view(6, 4, 4), PLAN, True)
    assert torch.equal(got, wanted.view(6, 4, 4))


@pytest.mark.parametrize("shape", [(), (4,), (4, 4), (1, 4), (6, 4), (4, 4, 4), (6, 1, 4, 4)])
def test_masks_without_a_row_each_stay_as_they_are(shape: tuple[int, ...]) -> None:
    mask = torch.zeros(shape, dtype=torch.bool)
    assert union(mask, PLAN, True) is mask


class Block(nn.Module):
    """Mean over the kept tokens, with an argument of no conventional name."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, dtype=torch.float64)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, kept_mask: Tensor, segments: Any = None) -> Tensor:
        self.seen.append(torch.as_tensor(segments if segments is not None else kept_mask).clone())
        return x + torch.tanh(self.linear(x)) * kept_mask.unsqueeze(-1)


class Named(nn.Module):
    def forward(self, x: Tensor, attention_mask: Tensor, key_padding_mask: Tensor, ids: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("key", ["attention_mask", 1])
def test_the_name_tells_what_a_mask_keeps(key: str | int) -> None:
    assert keep_value(KEEP, Named(), key) is True
    assert keep_value(KEEP, Named(), 2) is keep_value(KEEP, Named(), "key_padding_mask") is False
    assert keep_value(KEEP, nn.MultiheadAttention(8, 2), "attn_mask") is False
    assert keep_value(KEEP.double(), Named(), "key_padding_mask") is True


def test_the_side_of_the_padding_tells_what_a_mask_keeps() -> None:
    left = KEEP[:, :3].flip(1)
    for mask in (KEEP[:, :3], left):
        assert keep_value(mask.bool(), Block(), "kept_mask") is True
        assert keep_value(mask == 0, Block(), "kept_mask") is False


def test_without_padding_it_cannot_be_told_what_a_mask_keeps() -> None:
    assert keep_value(torch.ones(3, 4, dtype=torch.bool), Block(), "kept_mask") is None
    assert keep_value(torch.tensor([[True, False], [False, True]]), Block(), 1) is None


@pytest.mark.parametrize(
    ("mask", "key", "is_mask"),
    [
        (KEEP.bool(), "key_padding_mask", True),
        (KEEP, "attention_mask", True),
        (KEEP, 1, True),
        (KEEP, "ids", False),
        (torch.tensor([[0, 1, 2]] * 3), "attention_mask", False),
        (KEEP.double() * -1e9, "ids", True),
    ],
    ids=["bool", "integers so called", "by place", "indices", "three values", "additive"],
)
def test_masks_are_told_from_indices(mask: Tensor, key: str | int, is_mask: bool) -> None:
    hidden = torch.zeros(3, 4, 2)
    args = (hidden, mask) if isinstance(key, int) else (hidden,)
    sites = masks_in("named", Named(), args, {} if isinstance(key, int) else {key: mask}, lambda t: t is mask)
    assert [(site.name, site.key) for site in sites] == ([("named", key)] if is_mask else [])
    assert masks_in("named", Named(), (mask,), {}, lambda t: t is mask) == []  # beside no hidden states


IDS = torch.randint(1, 10, (4, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(4, 6, dtype=torch.long)
MASK[0, 3:] = MASK[2, 2:] = MASK[3, 5:] = 0
Y = torch.tensor([0, 1, 2, 1])
BATCH = {"ids": IDS, "mask": MASK, "y": Y}


class Encoder(pl.LightningModule):
    """Two blocks of attention over padded tokens."""

    def __init__(self, is_checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        settings: dict[str, Any] = {"batch_first": True, "dtype": torch.float64, "dropout": 0.0}
        self.embed = nn.Embedding(10, 8, dtype=torch.float64)
        self.a, self.b = (nn.TransformerEncoderLayer(8, 2, 16, **settings) for _ in range(2))
        self.head = nn.Linear(8, 3, dtype=torch.float64)
        self.is_checkpointed = is_checkpointed
        self.steps: list[tuple[Tensor, list[Tensor]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        padding = batch["mask"] == 0
        hidden = self.embed(batch["ids"])
        for block in (self.a, self.b):
            if self.is_checkpointed:
                hidden = checkpoint(block, hidden, src_key_padding_mask=padding, use_reentrant=False)
            else:
                hidden = block(hidden, src_key_padding_mask=padding)
        return F.cross_entropy(self.head(hidden[:, 0]), batch["y"])

    def on_train_batch_end(self, outputs: Any, *_: Any) -> None:
        grads = [parameter.grad.clone() for parameter in self.parameters() if parameter.grad is not None]
        self.steps.append((outputs["loss"], grads))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def by_hand(self, plan: MixPlan, has_union: bool = True) -> Tensor:
        """The loss for padding of a mixed row where both rows have padding."""
        lam, own = float(plan.lam[0]), MASK == 0
        both = own & own[plan.partner] if has_union else own

        def mix(hidden: Tensor) -> Tensor:
            return lam * hidden + (1 - lam) * hidden[plan.partner]

        hidden = self.embed(IDS)
        if plan.layer == "b":
            hidden = self.b(self.a(hidden, src_key_padding_mask=own), src_key_padding_mask=own)
            logits = self.head(mix(hidden)[:, 0])
            return lam * F.cross_entropy(logits, Y) + (1 - lam) * F.cross_entropy(logits, Y[plan.partner])
        if plan.layer == "a":
            hidden = mix(self.a(hidden, src_key_padding_mask=own))
        else:
            hidden = self.a(mix(hidden), src_key_padding_mask=both)
        logits = self.head(self.b(hidden, src_key_padding_mask=both)[:, 0])
        return lam * F.cross_entropy(logits, Y) + (1 - lam) * F.cross_entropy(logits, Y[plan.partner])


def fit(make_trainer: MakeTrainer, module: Any, batch: Any, **settings: Any) -> list[MixPlan]:
    callback = mixup(**settings)
    plans = Plans(callback)
    make_trainer(callback, plans).fit(module, Batches([batch] * 3))
    return plans.plans


@pytest.mark.parametrize("layer", ["a", "input", "embed"])
@pytest.mark.parametrize("has_union", [True, False], ids=["union", "own"])
def test_mixed_rows_attend_to_both_parents(make_trainer: MakeTrainer, layer: str, has_union: bool) -> None:
    module = Encoder()
    plans = fit(make_trainer, module, BATCH, layers=layer, union_masks=has_union)
    for (loss, _), plan in zip(module.steps, plans, strict=True):
        wanted, other = module.by_hand(plan, has_union).detach(), module.by_hand(plan, not has_union).detach()
        assert_close(loss, wanted, rtol=0, atol=1e-12)
        assert abs(loss - other) > 1e-6


def test_blocks_before_the_mix_keep_their_own_masks(make_trainer: MakeTrainer) -> None:
    module = Encoder()
    plans = fit(make_trainer, module, BATCH, layers="b")
    for (loss, _), plan in zip(module.steps, plans, strict=True):
        assert_close(loss, module.by_hand(plan).detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("layer", ["a", "input"])
def test_recomputed_blocks_take_the_union_again(make_trainer: MakeTrainer, layer: str) -> None:
    found = []
    for is_checkpointed in (False, True):
        module = Encoder(is_checkpointed)
        fit(make_trainer, module, BATCH, layers=layer)
        found.append(module.steps)
    assert_close(found[1], found[0], rtol=0, atol=1e-12)


def test_segments_stay_as_they_are(make_trainer: MakeTrainer) -> None:
    segments = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1]])

    class Segmented(Encoder):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Block(), Block()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            hidden = self.a(self.embed(batch["ids"]), batch["mask"])
            hidden = self.b(hidden, batch["mask"], batch["segments"])
            return F.cross_entropy(self.head(hidden.mean(dim=1)), batch["y"])

    module = Segmented()
    plans = fit(make_trainer, module, {**BATCH, "segments": segments}, layers="embed")
    assert all(torch.equal(seen, segments) for seen in module.b.seen[-3:])
    for seen, plan in zip(module.a.seen[-3:], plans, strict=True):
        assert torch.equal(seen, MASK | MASK[plan.partner])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("has_union", [True, False], ids=["union", "own"])
def test_bert_attends_to_both_parents(make_trainer: MakeTrainer, attention: str, has_union: bool) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=10, num_labels=3, attn_implementation=attention, **sizes)

    class Bert(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = BertForSequenceClassification(config)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    module, seen = Bert(), []

    def note(block: nn.Module, args: Any, kwargs: Any) -> None:
        masks = [item for item in (*args, *kwargs.values()) if isinstance(item, Tensor) and item.dim() == 4]
        row = masks[0][:, 0, -1]  # (N, 1, T, T) -> (N, T), of the last query
        seen.append((row if row.dtype == torch.bool else row > -1).long())

    module.model.bert.encoder.layer[1].attention.register_forward_pre_hook(note, with_kwargs=True)
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": Y}
    plans = fit(make_trainer, module, batch, layers="model.bert.encoder.layer.0", union_masks=has_union)
    for got, plan in zip(seen[-2:], plans[-2:], strict=True):  # before the second step it is looked at again
        assert torch.equal(got, MASK | MASK[plan.partner] if has_union else MASK)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_module_with_the_hook_says_why_it_cannot_be_scripted() -> None:
    module = nn.Linear(2, 2)
    module.register_forward_pre_hook(UnionHook({}), with_kwargs=True)
    with pytest.raises(AttributeError, match=r"^torch\.jit\.script cannot compile a module that"):
        torch.jit.script(module)
