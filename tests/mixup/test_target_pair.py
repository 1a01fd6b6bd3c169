import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves
from torchmetrics import CatMetric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)

from mm_lightning.mixup import INPUT, Layer, Mixer, MixPlan, TargetPair, mixed_accuracy

N, K = 4, 5
PARTNER = torch.tensor([2, 0, 3, 1])
INVERSE = torch.tensor([1, 3, 0, 2])
LAM = 0.3125
LAMS = torch.tensor([1.0, 0.5, 0.25, 0.0])
TARGETS = torch.tensor([0, 1, 4, 2])


def pair_up(targets: Tensor, per_sample: bool = False, mixed: bool = True) -> tuple[TargetPair, Mixer]:
    """A pair within a step whose layer was mixed already, or not yet."""
    lam = LAMS if per_sample else torch.tensor([LAM]).expand(N)
    plan = MixPlan(INPUT, PARTNER, lam, INVERSE)
    mixer = Mixer([Layer(INPUT)])
    mixer.start(plan)
    if mixed:
        mixer.record_input()
    return TargetPair.wrap(targets, plan, mixer), mixer


def make_logits(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()


def assert_mixes(logits: Tensor, target: Any, own: Tensor, partner: Tensor, **options: Any) -> None:
    """The loss and its gradient are the mix of the plain losses on ``own`` and on ``partner``."""
    assert isinstance(target, TargetPair)
    loss = F.cross_entropy(logits, target, **options)
    expected = LAM * F.cross_entropy(logits, own, **options) + (1 - LAM) * F.cross_entropy(logits, partner, **options)
    assert type(loss) is Tensor
    assert_close(loss, expected, rtol=1e-12, atol=0)
    got_grad, expected_grad = (torch.autograd.grad(value.sum(), logits)[0] for value in (loss, expected))
    assert_close(got_grad, expected_grad, rtol=1e-12, atol=1e-14)


def test_pair_looks_like_its_own_tensor() -> None:
    targets = TARGETS.clone()
    pair, _ = pair_up(targets)
    assert isinstance(pair, Tensor)
    assert pair.tolist() == [0, 1, 4, 2]
    assert (pair.dtype, pair.shape, pair.device, pair.stride()) == (torch.int64, (4,), targets.device, (1,))
    assert pair.data_ptr() == targets.data_ptr()
    assert (len(pair), pair.numel(), pair.dim(), pair.size(0)) == (4, 4, 1, 4)
    assert repr(pair) == "tensor([0, 1, 4, 2])"
    assert not pair.requires_grad
    assert pair[2].item() == 4
    assert (pair.max(), pair.sum()) == (4, 7)


def test_pair_becomes_an_array() -> None:
    pair, _ = pair_up(TARGETS)
    for array in (pair.numpy(), np.asarray(pair)):
        assert type(array) is np.ndarray
        assert array.tolist() == [0, 1, 4, 2]


def test_pickled_pair_is_a_plain_tensor() -> None:
    pair, _ = pair_up(TARGETS)
    restored = pickle.loads(pickle.dumps(pair))
    assert type(restored) is Tensor
    assert torch.equal(restored, TARGETS)


def test_copied_pair_has_its_values_and_other_memory() -> None:
    pair, _ = pair_up(TARGETS)
    copied = copy.deepcopy(pair)
    assert copied.tolist() == [0, 1, 4, 2]
    assert copied.data_ptr() != pair.data_ptr()


def test_wrapping_leaves_the_targets_as_they_were() -> None:
    targets = TARGETS.clone()
    pair, _ = pair_up(targets)
    assert type(targets) is Tensor
    assert torch.equal(targets, TARGETS)
    assert pair.partner.tolist() == [4, 0, 2, 1]


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(F.cross_entropy, id="F.cross_entropy"),
        pytest.param(cross_entropy, id="imported_function"),
        pytest.param(nn.CrossEntropyLoss(), id="nn.CrossEntropyLoss"),
        pytest.param(lambda logits, target: F.cross_entropy(input=logits, target=target), id="keywords"),
    ],
)
def test_cross_entropy_is_mixed_however_it_is_called(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    logits, (pair, mixer) = make_logits(N, K), pair_up(TARGETS)
    own, partner = F.cross_entropy(logits, TARGETS), F.cross_entropy(logits, TARGETS[PARTNER])
    assert_close(loss(logits, pair), LAM * own + (1 - LAM) * partner, rtol=1e-12, atol=0)
    assert mixer.losses == ["cross_entropy"]


def test_options_of_the_loss_are_kept() -> None:
    weight = torch.tensor([1.0, 0.5, 2.0, 1.0, 3.0], dtype=torch.float64)
    options: dict[str, Any] = {"ignore_index": 1, "label_smoothing": 0.2}
    for reduction in ("mean", "sum", "none"):
        options |= {"reduction": reduction, "weight": weight}
        pair, _ = pair_up(TARGETS)
        assert_mixes(make_logits(N, K), pair, TARGETS, TARGETS[PARTNER], **options)
    module = nn.CrossEntropyLoss(**options)
    logits, (pair, _) = make_logits(N, K), pair_up(TARGETS)
    expected = LAM * module(logits, TARGETS) + (1 - LAM) * module(logits, TARGETS[PARTNER])
    assert_close(module(logits, pair), expected, rtol=1e-12, atol=0)


TOKENS = torch.tensor([[0, 1, 2], [3, 255, 0], [255, 4, 1], [2, 2, 255]])
TABLE = torch.tensor([4, 3, 2, 1, 0])
FLIPPED = torch.tensor([3, 2, 1, 0])


@pytest.mark.parametrize(
    ("targets", "follow", "logits_shape"),
    [
        pytest.param(TARGETS.view(N, 1), lambda y: y.view(-1), (N, K), id="view"),
        pytest.param(TARGETS.view(N, 1), lambda y: y.squeeze(1), (N, K), id="squeeze"),
        pytest.param(TARGETS.view(N, 1), lambda y: y.reshape(N), (N, K), id="reshape"),
        pytest.param(TARGETS.int(), lambda y: y.long(), (N, K), id="long"),
        pytest.param(TARGETS.int(), lambda y: y.to(torch.int64), (N, K), id="to"),
        pytest.param(TARGETS, lambda y: y.clone().detach().contiguous(), (N, K), id="clone"),
        pytest.param(TARGETS, lambda y: y.unsqueeze(1).expand(N, 2), (N, K, 2), id="unsqueeze_expand"),
        pytest.param(TARGETS, lambda y: y[:3], (3, K), id="slice_of_rows"),
        pytest.param(TARGETS, lambda y: y[FLIPPED], (N, K), id="rows_by_index"),
        pytest.param(TARGETS, lambda y: torch.cat([y, y]), (2 * N, K), id="cat"),
        pytest.param(TARGETS, lambda y: torch.stack([y, y], dim=1), (N, K, 2), id="stack"),
        pytest.param(TARGETS, lambda y: y.chunk(2)[1], (2, K), id="chunk"),
        pytest.param(TARGETS, lambda y: F.one_hot(y, K).double(), (N, K), id="one_hot"),
        pytest.param(TARGETS, lambda y: F.one_hot(y, K).to(torch.float64) * 0.9 + 0.02, (N, K), id="smoothed_one_hot"),
        pytest.param(TARGETS, lambda y: TABLE[y], (N, K), id="look_up_table"),
        pytest.param(TARGETS, lambda y: TABLE.gather(0, y), (N, K), id="gather"),
        pytest.param(TARGETS, lambda y: TABLE.index_select(0, y), (N, K), id="index_select"),
        pytest.param(TARGETS, lambda y: TABLE.take(y), (N, K), id="take"),
        pytest.param(TARGETS + 1, lambda y: y - 1, (N, K), id="subtract"),
        pytest.param(TARGETS, lambda y: (K - 1) - y, (N, K), id="subtract_from"),
        pytest.param(TARGETS, lambda y: y // 2 + y % 2, (N, K), id="floor_divide_and_remainder"),
        pytest.param(TARGETS, lambda y: (y > 1).long(), (N, K), id="compare"),
        pytest.param(TARGETS, lambda y: ((y == 1) | ~(y != 4)).long(), (N, K), id="logic"),
        pytest.param(TARGETS, lambda y: y.clamp(max=3), (N, K), id="clamp"),
        pytest.param(TOKENS[:, :2] % K, lambda y: y[:, 1:], (N, K, 1), id="shift_by_one"),
        pytest.param(TOKENS % K, lambda y: y[..., 0], (N, K), id="one_column"),
        pytest.param(TOKENS % K, lambda y: y.unbind(1)[2], (N, K), id="unbind"),
        pytest.param(TOKENS % K, lambda y: y.flatten(), (3 * N, K), id="flatten"),
        pytest.param(TOKENS % K, lambda y: y.transpose(0, 1).reshape(-1), (3 * N, K), id="transpose"),
        pytest.param(TOKENS, lambda y: y.masked_fill(y == 255, -100), (N, K, 3), id="masked_fill"),
        pytest.param(TOKENS, lambda y: y.masked_fill(y == 255, torch.tensor(-100)), (N, K, 3), id="masked_fill_tensor"),
        pytest.param(TOKENS, lambda y: torch.where(y == 255, -100, y), (N, K, 3), id="where"),
        pytest.param(TOKENS, lambda y: torch.where(y == 255, torch.tensor(-100), y), (N, K, 3), id="where_tensor"),
    ],
)
def test_what_is_derived_row_by_row_is_mixed(
    targets: Tensor, follow: Callable[[Tensor], Tensor], logits_shape: tuple[int, ...]
) -> None:
    pair, _ = pair_up(targets)
    derived = follow(pair)
    assert torch.equal(derived.as_subclass(Tensor), follow(targets))
    assert_mixes(make_logits(*logits_shape), derived, follow(targets), follow(targets[PARTNER]))


def set_ignored(y: Tensor) -> None:
    y[y == 255] = -100


def set_ignored_of_a_view(y: Tensor) -> None:
    flat = y.view(-1)
    flat[flat == 255] = -100


def add_and_subtract(y: Tensor) -> None:
    y += 3
    y -= 3
    y.masked_fill_(y == 255, -100)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(set_ignored, id="setitem"),
        pytest.param(set_ignored_of_a_view, id="setitem_of_a_view"),
        pytest.param(lambda y: y.masked_fill_(y == 255, -100), id="masked_fill_"),
        pytest.param(add_and_subtract, id="operators"),
        pytest.param(lambda y: y.remainder_(K), id="remainder_"),
    ],
)
def test_change_in_place_changes_both_halves(change: Callable[[Tensor], Any]) -> None:
    own, partner, pair = TOKENS.clone(), TOKENS[PARTNER], pair_up(TOKENS.clone())[0]
    for tensor in (own, partner, pair):
        change(tensor)
    assert not torch.equal(own, TOKENS)
    assert pair.tolist() == own.tolist()
    assert pair.partner.tolist() == partner.tolist()
    assert_mixes(make_logits(N, K, 3), pair, own, partner)


def test_change_in_place_of_another_tensor_is_made_once() -> None:
    counts = torch.zeros(N, dtype=torch.int64)
    pair, _ = pair_up(TARGETS)
    counts += pair
    counts.add_(pair)
    assert type(counts) is Tensor
    assert counts.tolist() == [0, 2, 8, 4]


def test_one_lam_per_sample_weights_its_row() -> None:
    logits, lam = make_logits(N, K), LAMS.double()
    for pair in (pair_up(TARGETS, per_sample=True)[0], pair_up(TARGETS.view(N, 1), per_sample=True)[0].squeeze(1)):
        own, partner = (F.cross_entropy(logits, y, reduction="none") for y in (TARGETS, TARGETS[PARTNER]))
        assert_close(F.cross_entropy(logits, pair), (lam * own + (1 - lam) * partner).mean(), rtol=1e-12, atol=0)


def test_one_lam_per_sample_weights_its_sequence() -> None:
    logits, tokens, lam = make_logits(N, K, 3), TOKENS % K, LAMS.double().view(N, 1)
    pair, _ = pair_up(tokens, per_sample=True)
    own, partner = (F.cross_entropy(logits, y, reduction="none") for y in (tokens, tokens[PARTNER]))
    assert_close(F.cross_entropy(logits, pair), (lam * own + (1 - lam) * partner).mean(), rtol=1e-12, atol=0)


def test_one_lam_per_sample_refuses_flattened_targets() -> None:
    pair, mixer = pair_up(TOKENS % K, per_sample=True)
    with pytest.raises(RuntimeError, match=r"must keep the batch in dimension 0.*\(12,\) for 4 rows. Use per_sample"):
        F.cross_entropy(make_logits(3 * N, K), pair.view(-1))
    assert mixer.losses == []


def test_one_lam_per_sample_refuses_rows_in_another_order() -> None:
    pair, mixer = pair_up(TARGETS, per_sample=True)
    with pytest.raises(RuntimeError, match=r"must keep the batch in dimension 0|cannot be followed"):
        F.cross_entropy(make_logits(N, K), pair[FLIPPED])
    assert mixer.losses == []


@pytest.mark.parametrize("mixed", [False, True], ids=["before_the_mix", "after_the_mix"])
def test_cross_entropy_without_gradient_is_the_plain_one(mixed: bool) -> None:
    logits, (pair, mixer) = make_logits(N, K), pair_up(TARGETS, mixed=mixed)
    plain = F.cross_entropy(logits.detach(), TARGETS, label_smoothing=0.1)
    with torch.no_grad():
        assert_close(F.cross_entropy(logits, pair, label_smoothing=0.1), plain, rtol=0, atol=0)
    assert_close(F.cross_entropy(logits.detach(), pair, label_smoothing=0.1), plain, rtol=0, atol=0)
    assert mixer.losses == []


def test_loss_before_the_layer_was_mixed_is_refused() -> None:
    pair, mixer = pair_up(TARGETS, mixed=False)
    with pytest.raises(RuntimeError, match="cross_entropy was computed before layer 'input' mixed the batch"):
        F.cross_entropy(make_logits(N, K), pair)
    assert mixer.losses == []


@pytest.mark.parametrize(
    ("use", "name"),
    [
        pytest.param(lambda z, y: z.log_softmax(1)[range(N), y], "__getitem__", id="index"),
        pytest.param(lambda z, y: z.log_softmax(1).gather(1, y.view(N, 1)), "gather", id="gather"),
        pytest.param(lambda z, y: F.nll_loss(z.log_softmax(1), y), "nll_loss", id="nll_loss"),
        pytest.param(
            lambda z, y: F.nll_loss(z.log_softmax(1), y, reduction="none"), "nll_loss", id="nll_loss_unreduced"
        ),
        pytest.param(F.multi_margin_loss, "multi_margin_loss", id="multi_margin_loss"),
        pytest.param(lambda z, y: F.mse_loss(z, F.one_hot(y, K).double()), "mse_loss", id="mse_loss"),
        pytest.param(lambda z, y: z.log_softmax(1) * F.one_hot(y, K), "mul", id="product_with_one_hot"),
        pytest.param(lambda z, y: F.embedding(y, z.t()), "embedding", id="embedding"),
    ],
)
def test_other_differentiable_use_after_the_mix_is_refused(use: Callable[[Tensor, Tensor], Tensor], name: str) -> None:
    pair, _ = pair_up(TARGETS)
    with pytest.raises(RuntimeError, match=rf"'.*{name}.*' uses the batch's class indices in a differentiable way"):
        use(make_logits(N, K), pair)


def test_embedding_of_token_indices_before_the_mix_passes() -> None:
    pair, _ = pair_up(TARGETS, mixed=False)
    table = make_logits(K, 3)
    embedded = F.embedding(pair, table)
    assert type(embedded) is Tensor
    assert torch.equal(embedded, table[TARGETS])
    assert torch.equal(nn.Embedding(K, 3, _weight=table.detach())(pair), embedded)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        pytest.param(lambda y: torch.sort(y).values, "sort", id="sort"),
        pytest.param(lambda y: y.flip(0), "flip", id="flip"),
        pytest.param(lambda y: y.cumsum(0) % K, "cumsum", id="cumsum_then_followed"),
    ],
)
def test_targets_that_were_lost_sight_of_are_refused(change: Callable[[Tensor], Tensor], name: str) -> None:
    pair, mixer = pair_up(TARGETS)
    changed = change(pair)
    assert changed.tolist() == change(TARGETS).tolist()
    with pytest.raises(RuntimeError, match=f"targets that went through '{name}', which cannot be followed"):
        F.cross_entropy(make_logits(N, K), changed)
    assert mixer.losses == []


@pytest.mark.parametrize("argument", ["size_average", "reduce"])
def test_deprecated_arguments_are_refused(argument: str) -> None:
    pair, _ = pair_up(TARGETS)
    with pytest.raises(TypeError, match="size_average and reduce are deprecated and cannot be mixed; use reduction"):
        F.cross_entropy(make_logits(N, K), pair, **{argument: True})


def test_pair_as_logits_or_class_weights_is_refused() -> None:
    logits, (pair, _) = make_logits(N, N), pair_up(TARGETS)
    for arguments in ((pair.double().view(1, N), TARGETS[:1]), (logits, TARGETS % N, pair.double())):
        with pytest.raises(RuntimeError, match="only where its target, and nothing else, is of the batch"):
            F.cross_entropy(*arguments)


def test_argmax_accuracy_sees_the_own_targets() -> None:
    logits, (pair, _) = make_logits(N, K), pair_up(TARGETS)
    hits = logits.argmax(dim=1) == pair
    plain = logits.argmax(dim=1) == TARGETS
    assert type(hits) is Tensor
    assert hits.tolist() == plain.tolist()
    assert hits.float().mean() == plain.float().mean()


def make_metrics() -> MetricCollection:
    return MetricCollection(
        [
            MulticlassAccuracy(K, average="micro"),
            MulticlassF1Score(K),
            MulticlassConfusionMatrix(K, ignore_index=1),
            MulticlassCalibrationError(K),
            MulticlassAUROC(K, thresholds=5),
        ],
        compute_groups=False,
    )


@pytest.mark.filterwarnings("ignore:.*No (positive|negative) samples in targets")
def test_metrics_see_the_own_targets_and_keep_no_pair() -> None:
    logits, (pair, _) = make_logits(N, K), pair_up(TARGETS)
    of_pair, plain = make_metrics(), make_metrics()
    for _ in range(2):
        assert_close(of_pair(logits, pair), plain(logits.detach(), TARGETS), rtol=0, atol=0)
    assert_close(of_pair.compute(), plain.compute(), rtol=0, atol=0)
    for metric in of_pair.values():
        assert not any(isinstance(leaf, TargetPair) for leaf in tree_leaves(metric.metric_state)), metric


@pytest.mark.filterwarnings("ignore:.*No (positive|negative) samples in targets")
def test_metrics_that_keep_every_target_compute_from_the_own_ones() -> None:
    logits, (pair, _) = make_logits(N, K), pair_up(TARGETS)
    of_pair, plain = MulticlassAUROC(K), MulticlassAUROC(K)
    of_pair.update(logits, pair)
    plain.update(logits.detach(), TARGETS)
    assert_close(of_pair.compute(), plain.compute(), rtol=0, atol=0)
    kept = CatMetric()
    kept.update(pair)
    assert kept.compute().tolist() == [0, 1, 4, 2]


ACCURACY_LOGITS = F.one_hot(torch.tensor([0, 1, 2, 0]), 3).float()
ACCURACY_TARGETS = torch.tensor([0, 1, 0, 2])
ACCURACY_PARTNER = torch.tensor([1, 0, 3, 2])  # of the classes 1, 0, 2, 0


@pytest.mark.parametrize(
    ("lam", "expected"),
    [
        # Rows 0 and 1 hit their own class, rows 2 and 3 their partner's.
        pytest.param(torch.tensor([0.75]).expand(4), (0.75 + 0.75 + 0.25 + 0.25) / 4, id="per_batch"),
        pytest.param(torch.tensor([1.0, 0.5, 0.25, 0.0]), (1.0 + 0.5 + 0.75 + 1.0) / 4, id="per_sample"),
    ],
)
def test_mixed_accuracy_by_hand(lam: Tensor, expected: float) -> None:
    plan = MixPlan(INPUT, ACCURACY_PARTNER, lam)
    mixer = Mixer([Layer(INPUT)])
    mixer.start(plan)
    pair = TargetPair.wrap(ACCURACY_TARGETS, plan, mixer)
    for accuracy in (
        mixed_accuracy(ACCURACY_LOGITS, ACCURACY_TARGETS, plan),
        mixed_accuracy(ACCURACY_LOGITS, pair),
        mixed_accuracy(ACCURACY_LOGITS.clone().requires_grad_(), pair, plan),
    ):
        assert type(accuracy) is Tensor
        assert not accuracy.requires_grad
        assert accuracy.dtype == torch.float32
        assert accuracy.item() == expected


def test_mixed_accuracy_of_a_partner_of_the_same_class_is_one_hit() -> None:
    plan = MixPlan(INPUT, torch.tensor([1, 0]), torch.tensor([0.25]).expand(2))
    assert mixed_accuracy(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([1, 1]), plan) == 1


@pytest.mark.parametrize("plan", [None, MixPlan.unmixed(4)], ids=["no_plan", "unmixed_plan"])
def test_mixed_accuracy_without_mixing_is_the_plain_one(plan: MixPlan | None) -> None:
    assert mixed_accuracy(ACCURACY_LOGITS, ACCURACY_TARGETS, plan) == 0.5
