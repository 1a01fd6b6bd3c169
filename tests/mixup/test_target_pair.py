import copy
import pickle
import weakref
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
from torchmetrics import CatMetric, MeanMetric, Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)

from mm_lightning.metrics import show_own_targets
from mm_lightning.mixup import (
    INPUT,
    Layer,
    Mixer,
    MixPlan,
    TargetPair,
    mix_loss,
    mixed_accuracy,
    mixed_target_entropy,
    resolve_layers,
)

N, K = 4, 5
PARTNER = torch.tensor([2, 0, 3, 1])
INVERSE = torch.tensor([1, 3, 0, 2])
LAM = 0.3125
LAMS = torch.tensor([1.0, 0.5, 0.25, 0.0])
TARGETS = torch.tensor([0, 1, 4, 2])


def start(per_sample: bool = False, mixed: bool = True, is_explicit: bool = False) -> tuple[MixPlan, Mixer]:
    """A step whose layer was mixed already, or not yet."""
    plan = MixPlan(INPUT, PARTNER, LAMS if per_sample else torch.tensor([LAM]).expand(N), INVERSE)
    mixer = Mixer([Layer(INPUT)], is_explicit=is_explicit)
    mixer.start(plan)
    if mixed:
        mixer.record_input()
    return plan, mixer


def pair_up(targets: Tensor, per_sample: bool = False, mixed: bool = True) -> tuple[TargetPair, Mixer]:
    plan, mixer = start(per_sample, mixed)
    return TargetPair.wrap(targets, plan, mixer), mixer


def make_logits(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()


def mixed_loss(logits: Tensor, **options: Any) -> Tensor:
    """The mix of the plain losses on ``TARGETS`` and on the partners'."""
    own, partner = (F.cross_entropy(logits, y, **options) for y in (TARGETS, TARGETS[PARTNER]))
    return LAM * own + (1 - LAM) * partner


def assert_mixes(logits: Tensor, target: Any, own: Tensor, partner: Tensor, **options: Any) -> None:
    """The loss and its gradient are the mix of the plain losses on ``own`` and on ``partner``."""
    assert isinstance(target, TargetPair)
    loss = F.cross_entropy(logits, target, **options)
    target.mixer.stop()
    assert type(loss) is Tensor
    expected = LAM * F.cross_entropy(logits, own, **options) + (1 - LAM) * F.cross_entropy(logits, partner, **options)
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


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy], ids=["copy", "deepcopy"])
def test_copied_pair_is_mixed_too(duplicate: Callable[[Tensor], Tensor]) -> None:
    pair, _ = pair_up(TARGETS)
    assert_mixes(make_logits(N, K), duplicate(pair), TARGETS, TARGETS[PARTNER])


def test_wrapping_leaves_the_targets_as_they_were() -> None:
    targets = TARGETS.clone()
    pair, _ = pair_up(targets)
    assert type(targets) is Tensor
    assert torch.equal(targets, TARGETS)
    assert pair.partner.tolist() == [4, 0, 2, 1]
    assert pair.own.tolist() == pair.value.tolist() == [0, 1, 4, 2]


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda z, y: F.cross_entropy(z, y), id="loss"),
        pytest.param(lambda z, y: -(z.log_softmax(1) * F.one_hot(y, K)).sum(1).mean(), id="one_hot"),
        pytest.param(lambda z, y: F.mse_loss(z, torch.zeros_like(z).scatter_(1, y[:, None], 1.0)), id="scatter"),
        pytest.param(lambda z, y: F.cross_entropy(z, y.clone().add_(1) % K), id="change_of_a_clone"),
        pytest.param(lambda z, y: mixed_accuracy(z, y), id="mixed_accuracy"),
    ],
)
def test_step_leaves_the_targets_as_they_were(use: Callable[[Tensor, Tensor], Tensor]) -> None:
    targets = TARGETS.clone()
    version = targets._version
    pair, mixer = pair_up(targets)
    use(make_logits(N, K), pair)
    mixer.stop()
    assert type(targets) is Tensor
    assert torch.equal(targets, TARGETS)
    assert targets._version == version
    assert not targets.__dict__


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
    got = loss(logits, pair)
    assert mixer.losses == ["cross_entropy"]
    mixer.stop()
    assert_close(got, mixed_loss(logits), rtol=1e-12, atol=0)


def test_loss_knows_both_halves_until_the_step_ends() -> None:
    logits, (pair, mixer) = make_logits(N, K), pair_up(TARGETS)
    loss = F.cross_entropy(logits, pair)
    assert isinstance(loss, TargetPair)
    assert loss.is_mixed
    assert_close(loss.own, F.cross_entropy(logits, TARGETS), rtol=1e-12, atol=0)
    assert_close(loss.partner, F.cross_entropy(logits, TARGETS[PARTNER]), rtol=1e-12, atol=0)
    assert_close(loss.value, mixed_loss(logits), rtol=1e-12, atol=0)
    mixer.stop()
    assert type(loss) is type(pair) is Tensor
    assert_close(loss, mixed_loss(logits), rtol=1e-12, atol=0)


def test_number_read_from_a_loss_is_the_mixed_one() -> None:
    logits, (pair, mixer) = make_logits(N, K), pair_up(TARGETS)
    loss, wanted = F.cross_entropy(logits, pair), mixed_loss(logits).item()
    assert loss.item() == pytest.approx(wanted, rel=1e-12)
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-12)
    assert loss.detach().cpu().numpy() == pytest.approx(wanted, rel=1e-12)
    assert f"{loss:.3f}" == f"{wanted:.3f}"
    assert f"{wanted:.4f}" in repr(loss)
    assert_close(loss.detach().clone().double(), mixed_loss(logits).detach(), rtol=1e-12, atol=0, check_dtype=False)
    assert mixer.reads == set()


def test_question_asked_of_a_loss_is_asked_of_the_mixed_one() -> None:
    logits, (pair, _) = make_logits(N, K), pair_up(TARGETS)
    loss, wanted = F.cross_entropy(logits, pair), mixed_loss(logits).item()
    own, partner = (F.cross_entropy(logits, y).item() for y in (TARGETS, TARGETS[PARTNER]))
    assert min(own, partner) < wanted < max(own, partner)
    for bound in (own, partner, wanted - 1e-3, wanted + 1e-3):
        assert bool(loss > bound) is (wanted > bound)
        assert bool(loss < bound) is (wanted < bound)
    assert not torch.isnan(loss)
    assert torch.isfinite(loss)
    assert loss.requires_grad
    assert loss.shape == ()


def test_loss_that_is_not_a_number_is_found_out() -> None:
    pair, _ = pair_up(TARGETS)
    assert torch.isnan(F.cross_entropy(make_logits(N, K) * float("nan"), pair))


def test_backward_within_the_step() -> None:
    logits, (pair, mixer) = make_logits(N, K), pair_up(TARGETS)
    F.cross_entropy(logits, pair).backward()
    mixer.stop()
    (expected,) = torch.autograd.grad(mixed_loss(logits), logits)
    assert_close(logits.grad, expected, rtol=1e-12, atol=1e-14)


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
        pytest.param(TARGETS, lambda y: y.data, (N, K), id="data"),
        pytest.param(TARGETS, lambda y: y.unsqueeze(1).expand(N, 2), (N, K, 2), id="unsqueeze_expand"),
        pytest.param(TARGETS, lambda y: y[:3], (3, K), id="slice_of_rows"),
        pytest.param(TARGETS, lambda y: y[FLIPPED], (N, K), id="rows_by_index"),
        pytest.param(TARGETS, lambda y: y[1], (K,), id="one_row"),
        pytest.param(TARGETS, lambda y: torch.cat([y, y]), (2 * N, K), id="cat"),
        pytest.param(TARGETS, lambda y: torch.stack([y, y], dim=1), (N, K, 2), id="stack"),
        pytest.param(TARGETS, lambda y: torch.stack(list(y)), (N, K), id="list"),
        pytest.param(TARGETS, lambda y: y.chunk(2)[1], (2, K), id="chunk"),
        pytest.param(TARGETS, lambda y: F.one_hot(y, K).double(), (N, K), id="one_hot"),
        pytest.param(TARGETS, lambda y: F.one_hot(y, K).to(torch.float64) * 0.9 + 0.02, (N, K), id="smoothed_one_hot"),
        pytest.param(TARGETS, lambda y: TABLE[y], (N, K), id="look_up_table"),
        pytest.param(TARGETS, lambda y: TABLE.gather(0, y), (N, K), id="gather"),
        pytest.param(TARGETS, lambda y: TABLE.index_select(0, y), (N, K), id="index_select"),
        pytest.param(TARGETS, lambda y: TABLE.take(y), (N, K), id="take"),
        pytest.param(TARGETS, lambda y: torch.sort(y).values, (N, K), id="sort"),
        pytest.param(TARGETS, lambda y: torch.sort(y).indices, (N, K), id="order"),
        pytest.param(TARGETS, lambda y: y.flip(0), (N, K), id="flip"),
        pytest.param(TARGETS, lambda y: y.roll(1), (N, K), id="roll"),
        pytest.param(TARGETS, lambda y: y.cumsum(0) % K, (N, K), id="cumsum"),
        pytest.param(TARGETS, lambda y: torch.bincount(y[:3], minlength=K), (K, K), id="bincount"),
        pytest.param(TARGETS, lambda y: torch.searchsorted(torch.tensor([1, 3]), y), (N, K), id="searchsorted"),
        pytest.param(TARGETS + 1, lambda y: y - 1, (N, K), id="subtract"),
        pytest.param(TARGETS, lambda y: (K - 1) - y, (N, K), id="subtract_from"),
        pytest.param(TARGETS, lambda y: y // 2 + y % 2, (N, K), id="floor_divide_and_remainder"),
        pytest.param(TARGETS, lambda y: (y > 1).long(), (N, K), id="compare"),
        pytest.param(TARGETS, lambda y: ((y == 1) | ~(y != 4)).long(), (N, K), id="logic"),
        pytest.param(TARGETS, lambda y: y.clamp(max=3), (N, K), id="clamp"),
        pytest.param(TOKENS[:, :2] % K, lambda y: y[:, 1:], (N, K, 1), id="shift_by_one"),
        pytest.param(TOKENS % K, lambda y: y[..., 0], (N, K), id="one_column"),
        pytest.param(TOKENS % K, lambda y: y.unbind(1)[2], (N, K), id="unbind"),
        pytest.param(TOKENS % K, lambda y: y.max(dim=1).values, (N, K), id="max_of_a_row"),
        pytest.param(TOKENS % K, lambda y: y.argmax(dim=1), (N, K), id="argmax_of_a_row"),
        pytest.param(TOKENS % K, lambda y: y.flatten(), (3 * N, K), id="flatten"),
        pytest.param(TOKENS % K, lambda y: y.transpose(0, 1).reshape(-1), (3 * N, K), id="transpose"),
        pytest.param(TOKENS, lambda y: y.masked_fill(y == 255, -100), (N, K, 3), id="masked_fill"),
        pytest.param(TOKENS, lambda y: y.masked_fill(y == 255, torch.tensor(-100)), (N, K, 3), id="masked_fill_tensor"),
        pytest.param(TOKENS, lambda y: torch.where(y == 255, -100, y), (N, K, 3), id="where"),
        pytest.param(TOKENS, lambda y: torch.where(y == 255, torch.tensor(-100), y), (N, K, 3), id="where_tensor"),
    ],
)
def test_what_is_derived_is_mixed(
    targets: Tensor, follow: Callable[[Tensor], Tensor], logits_shape: tuple[int, ...]
) -> None:
    pair, _ = pair_up(targets)
    derived = follow(pair)
    assert torch.equal(derived.own, follow(targets))
    assert torch.equal(derived.partner, follow(targets[PARTNER]))
    assert_mixes(make_logits(*logits_shape), derived, follow(targets), follow(targets[PARTNER]))


def test_halves_of_different_sizes() -> None:
    targets = torch.tensor([0, 3, 255, 2])
    plan, mixer = start()
    pair = TargetPair.wrap(targets, plan, mixer)[:2]
    valid = pair[pair != 255]
    assert valid.own.tolist() == [0, 3]
    assert valid.partner.tolist() == [0]
    assert valid.tolist() == [0, 3]


def set_ignored(y: Tensor) -> None:
    y[y == 255] = -100


def set_ignored_of_a_view(y: Tensor) -> None:
    flat = y.view(-1)
    flat[flat == 255] = -100


def set_ignored_of_a_column(y: Tensor) -> None:
    y[:, 1][y[:, 1] == 255] = 0
    y.masked_fill_(y == 255, -100)


def add_and_subtract(y: Tensor) -> None:
    y += 3
    y -= 3
    y.masked_fill_(y == 255, -100)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(set_ignored, id="setitem"),
        pytest.param(set_ignored_of_a_view, id="setitem_of_a_view"),
        pytest.param(set_ignored_of_a_column, id="setitem_of_a_column"),
        pytest.param(lambda y: y.masked_fill_(y == 255, -100), id="masked_fill_"),
        pytest.param(add_and_subtract, id="operators"),
        pytest.param(lambda y: y.remainder_(K), id="remainder_"),
        pytest.param(lambda y: torch.remainder(y, K, out=y), id="out"),
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


def fill_by_scatter(targets: Tensor, y: Tensor) -> None:
    targets.scatter_(1, y[:, None], 1.0)


def fill_by_index(targets: Tensor, y: Tensor) -> None:
    targets[torch.arange(N), y] = 1.0


def fill_through_a_view(targets: Tensor, y: Tensor) -> None:
    targets.view(-1)[torch.arange(N) * K + y] += 1.0


def fill_by_copy(targets: Tensor, y: Tensor) -> None:
    targets.copy_(F.one_hot(y, K))


def fill_by_out(targets: Tensor, y: Tensor) -> None:
    torch.mul(F.one_hot(y, K).double(), 1.0, out=targets)


@pytest.mark.parametrize(
    "fill",
    [fill_by_scatter, fill_by_index, fill_through_a_view, fill_by_copy, fill_by_out],
    ids=lambda fill: fill.__name__,
)
def test_plain_tensor_that_is_filled_with_targets_becomes_a_pair(fill: Callable[[Tensor, Tensor], None]) -> None:
    pair, _ = pair_up(TARGETS)
    one_hot = torch.zeros(N, K, dtype=torch.float64)
    fill(one_hot, pair)
    own, partner = (F.one_hot(y, K).double() for y in (TARGETS, TARGETS[PARTNER]))
    assert torch.equal(one_hot.as_subclass(Tensor), own)
    assert_mixes(make_logits(N, K), one_hot, own, partner)
    assert type(one_hot) is Tensor
    assert torch.equal(one_hot, own)


def test_running_count_of_own_targets_is_plain_after_the_step() -> None:
    counts, hits = torch.zeros(N, dtype=torch.int64), torch.zeros(())
    for _ in range(2):
        pair, mixer = pair_up(TARGETS)
        counts += pair
        counts.add_(pair)
        hits += (pair == 1).sum()
        mixer.stop()
        assert type(counts) is type(hits) is Tensor
    assert counts.tolist() == [0, 4, 16, 8]
    assert hits == 2


def test_running_sum_of_losses_is_the_mixed_one() -> None:
    total, logits = torch.zeros((), dtype=torch.float64), make_logits(N, K)
    for _ in range(2):
        pair, mixer = pair_up(TARGETS)
        total += F.cross_entropy(logits, pair).detach()
        mixer.stop()
    assert type(total) is Tensor
    assert not total.requires_grad
    assert_close(total, 2 * mixed_loss(logits).detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("mixed", [False, True], ids=["before_the_mix", "after_the_mix"])
def test_cross_entropy_without_gradient_is_the_plain_one(mixed: bool) -> None:
    logits, (pair, mixer) = make_logits(N, K), pair_up(TARGETS, mixed=mixed)
    plain = F.cross_entropy(logits.detach(), TARGETS, label_smoothing=0.1)
    with torch.no_grad():
        assert_close(F.cross_entropy(logits, pair, label_smoothing=0.1).own, plain, rtol=0, atol=0)
    detached = F.cross_entropy(logits.detach(), pair, label_smoothing=0.1)
    assert mixer.losses == []
    mixer.stop()
    assert_close(detached, plain, rtol=0, atol=0)


def test_embedding_of_token_indices_before_the_mix_passes() -> None:
    pair, _ = pair_up(TARGETS, mixed=False)
    table = make_logits(K, 3)
    embedded = F.embedding(pair, table)
    assert type(embedded) is Tensor
    assert torch.equal(embedded, table[TARGETS])


def test_frozen_layer_before_the_mix_passes_own_rows() -> None:
    rows, net = make_logits(N, 3).detach(), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double()
    net[0].requires_grad_(False)
    plan = MixPlan("1", PARTNER, torch.tensor([LAM]).expand(N), INVERSE)
    mixer = Mixer(resolve_layers(net, "1"))
    mixer.attach()
    mixer.start(plan)
    output = net(TargetPair.wrap(rows, plan, mixer, is_input=True))
    mixer.detach()
    plain = net(rows)
    assert_close(output, LAM * plain + (1 - LAM) * plain[PARTNER], rtol=1e-12, atol=0)


def test_input_that_is_the_target_too_is_mixed_where_the_network_sees_it() -> None:
    rows, net = make_logits(N, 1, 3).detach(), nn.Linear(3, 3).double()
    plan, mixer = start()
    pair = TargetPair.wrap(rows, plan, mixer, is_input=True)
    output = net(pair.flatten(1) * 2)
    loss = F.mse_loss(output, pair.flatten(1))
    mixer.stop()
    plain = rows.flatten(1)
    mixed = LAM * plain + (1 - LAM) * plain[PARTNER]
    assert_close(output, net(mixed * 2), rtol=1e-12, atol=1e-14)
    expected = LAM * F.mse_loss(output, plain) + (1 - LAM) * F.mse_loss(output, plain[PARTNER])
    assert_close(loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda y: y.requires_grad_(), id="requires_grad_"),
        pytest.param(lambda y: setattr(y, "requires_grad", True), id="requires_grad"),
        pytest.param(lambda y: setattr(y, "data", TARGETS.double()), id="data"),
        pytest.param(nn.Parameter, id="Parameter"),
        pytest.param(lambda y: F.relu(y, inplace=True), id="inplace"),
    ],
)
def test_change_that_cannot_be_followed_is_refused(change: Callable[[Tensor], Any]) -> None:
    pair, _ = pair_up(TARGETS.double())
    with pytest.raises(RuntimeError, match="changes the batch's targets in a way that cannot be followed"):
        change(pair)


def test_kept_pair_is_plain_after_the_step() -> None:
    pair, mixer = pair_up(TARGETS)
    kept = [pair, pair + 1, F.one_hot(pair, K), F.cross_entropy(make_logits(N, K), pair), *pair.unbind(0)]
    values = [tensor.detach().clone().tolist() for tensor in kept]
    mixer.stop()
    assert {type(tensor) for tensor in kept} == {Tensor}
    assert [tensor.tolist() for tensor in kept] == values
    assert not any(tensor.__dict__ for tensor in kept)
    assert mixer.pairs == []
    plain = F.cross_entropy(make_logits(N, K), kept[0])
    assert_close(plain, F.cross_entropy(make_logits(N, K), TARGETS), rtol=0, atol=0)


def test_step_after_step_uses_its_own_plan() -> None:
    logits, kept = make_logits(N, K), []
    for targets in (TARGETS, TARGETS.flip(0)):
        pair, mixer = pair_up(targets)
        loss = F.cross_entropy(logits, pair) + sum(F.cross_entropy(logits, y) for y in kept)
        mixer.stop()
        expected = LAM * F.cross_entropy(logits, targets) + (1 - LAM) * F.cross_entropy(logits, targets[PARTNER])
        assert_close(loss, expected + sum(F.cross_entropy(logits, y) for y in kept), rtol=1e-12, atol=0)
        kept.append(pair)


def test_nothing_large_is_kept_alive_by_what_outlives_the_step() -> None:
    pair, mixer = pair_up(TARGETS)
    hidden = make_logits(N, K)
    logits = hidden * 2
    log_probs = logits.log_softmax(1)
    references = [weakref.ref(tensor) for tensor in (logits, log_probs)]
    loss = (-(log_probs * F.one_hot(pair, K)).sum(1)).sqrt().mean()
    kept = [
        loss.detach(),
        (logits.detach().argmax(1) == pair).float().mean(),
        (logits.detach() * F.one_hot(pair, K)).sum(),
        F.cross_entropy(logits, pair).detach(),
        pair,
    ]
    loss.backward()
    mixer.stop()
    del logits, log_probs, loss
    assert [reference() for reference in references] == [None, None]
    assert {type(tensor) for tensor in kept} == {Tensor}


def test_argmax_accuracy_sees_the_own_targets() -> None:
    logits, (pair, mixer) = make_logits(N, K), pair_up(TARGETS)
    hits = logits.argmax(dim=1) == pair
    accuracy = hits.float().mean()
    plain = logits.argmax(dim=1) == TARGETS
    assert hits.tolist() == plain.tolist()
    assert accuracy == plain.float().mean()
    mixer.stop()
    assert type(hits) is type(accuracy) is Tensor
    assert accuracy == plain.float().mean()


def make_metrics() -> dict[str, Metric]:
    return {
        "accuracy": MulticlassAccuracy(K, average="micro"),
        "f1": MulticlassF1Score(K),
        "confusion": MulticlassConfusionMatrix(K, ignore_index=1),
        "calibration": MulticlassCalibrationError(K),
        "binned_auroc": MulticlassAUROC(K, thresholds=5),
        "auroc": MulticlassAUROC(K),
    }


@pytest.mark.filterwarnings("ignore:.*No (positive|negative) samples in targets")
@pytest.mark.parametrize("name", list(make_metrics()))
@pytest.mark.parametrize("is_called", [True, False], ids=["called", "updated"])
def test_metric_has_the_state_of_the_own_targets(name: str, is_called: bool) -> None:
    of_pair, plain = make_metrics()[name], make_metrics()[name]
    for step in range(2):
        logits, (pair, mixer) = make_logits(N, K), pair_up(TARGETS.roll(step))
        for metric, scores, targets in (of_pair, logits.detach(), pair), (plain, logits.detach(), TARGETS.roll(step)):
            if is_called:
                metric(scores, targets)
            else:
                metric.update(scores, targets)
        mixer.stop()
        assert mixer.losses == []
        leaves = tree_leaves(of_pair.metric_state)
        assert {type(leaf) for leaf in leaves if isinstance(leaf, Tensor)} == {Tensor}
        assert_close(of_pair.metric_state, plain.metric_state, rtol=0, atol=0)
    assert_close(of_pair.compute(), plain.compute(), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*No (positive|negative) samples in targets")
def test_metrics_of_logits_with_gradient_see_own_targets_where_they_are_shown() -> None:
    of_pair, plain = (MetricCollection(make_metrics(), compute_groups=False) for _ in range(2))
    handles = show_own_targets(nn.ModuleList([of_pair]))
    logits, (pair, mixer) = make_logits(N, K), pair_up(TARGETS)
    batch_values = of_pair(logits, pair)
    assert mixer.losses == []
    mixer.stop()
    assert_close(
        {name: value.detach() for name, value in batch_values.items()}, plain(logits.detach(), TARGETS), rtol=0, atol=0
    )
    for name, metric in of_pair.items():
        leaves = tree_leaves(metric.metric_state)
        assert {type(leaf) for leaf in leaves if isinstance(leaf, Tensor)} == {Tensor}, name
    assert_close(of_pair.compute(), plain.compute(), rtol=0, atol=0)
    for handle in handles:
        handle.remove()


def test_metric_that_keeps_every_target_keeps_the_own_ones() -> None:
    pair, mixer = pair_up(TARGETS)
    kept = CatMetric()
    kept.update(pair)
    mixer.stop()
    assert {type(value) for value in kept.metric_state["value"]} == {Tensor}
    assert kept.compute().tolist() == [0, 1, 4, 2]


@pytest.mark.parametrize("is_called", [True, False], ids=["called", "updated"])
def test_mean_metric_of_losses_is_the_mean_of_the_mixed_ones(is_called: bool) -> None:
    mean, logits = MeanMetric().set_dtype(torch.float64), make_logits(N, K)
    for scale in (1, 3):
        pair, mixer = pair_up(TARGETS)
        loss = F.cross_entropy(scale * logits, pair)
        if is_called:
            assert_close(mean(loss).item(), mixed_loss(scale * logits).item(), rtol=1e-12, atol=0)
        else:
            mean.update(loss)
        mixer.stop()
        leaves = [leaf for leaf in tree_leaves(mean.metric_state) if isinstance(leaf, Tensor)]
        assert {type(leaf) for leaf in leaves} == {Tensor}
        assert not any(leaf.requires_grad for leaf in leaves)
    wanted = (mixed_loss(logits) + mixed_loss(3 * logits)) / 2
    assert_close(mean.compute().item(), wanted.item(), rtol=1e-12, atol=0)


def test_named_loss_is_mixed_whatever_it_computes() -> None:
    def compared(z: Tensor, y: Tensor) -> Tensor:  # which could not be followed
        same = torch.tensor((y[:, None] == y).tolist())
        return ((z @ z.T) * same).mean()

    targets = torch.tensor([0, 1, 1, 2])
    plan, mixer = start(is_explicit=True)
    pair, logits = TargetPair.wrap(targets, plan, mixer), make_logits(N, K)
    loss = mix_loss(compared, "criterion", None, logits, pair)
    assert mixer.losses == ["criterion"]
    mixer.stop()
    expected = LAM * compared(logits, targets) + (1 - LAM) * compared(logits, targets[PARTNER])
    assert_close(loss, expected, rtol=1e-12, atol=0)
    got, wanted = (torch.autograd.grad(value, logits)[0] for value in (loss, expected))
    assert_close(got, wanted, rtol=1e-12, atol=1e-14)


def test_named_loss_may_return_several_tensors_and_take_structures() -> None:
    def criterion(outputs: dict[str, Tensor], batch: tuple[Tensor, list[Tensor]]) -> dict[str, Tensor]:
        y, (v,) = batch
        return {"ce": F.cross_entropy(outputs["z"], y), "l1": F.l1_loss(outputs["z"][:, 0], v)}

    values, logits = torch.tensor([0.5, 1.0, -1.0, 2.0]).double(), make_logits(N, K)
    plan, mixer = start(is_explicit=True)
    pairs = TargetPair.wrap(TARGETS, plan, mixer), [TargetPair.wrap(values, plan, mixer)]
    losses = mix_loss(criterion, "criterion", None, {"z": logits}, batch=pairs)
    total = losses["ce"] + losses["l1"].sqrt()
    mixer.stop()
    own, partner = (criterion({"z": logits}, (TARGETS[rows], [values[rows]])) for rows in (torch.arange(N), PARTNER))
    expected = LAM * (own["ce"] + own["l1"].sqrt()) + (1 - LAM) * (partner["ce"] + partner["l1"].sqrt())
    assert_close(total, expected, rtol=1e-12, atol=0)


def test_loss_that_is_not_named_is_left_alone() -> None:
    plan, mixer = start(is_explicit=True)
    pair, logits = TargetPair.wrap(TARGETS, plan, mixer), make_logits(N, K)
    for loss, plain in (
        (-logits.log_softmax(1).gather(1, pair[:, None]).mean(), F.cross_entropy(logits, TARGETS)),
        (F.cross_entropy(logits, pair), F.cross_entropy(logits, TARGETS)),
        (F.mse_loss(logits, F.one_hot(pair, K).double()), F.mse_loss(logits, F.one_hot(TARGETS, K).double())),
    ):
        assert type(loss) is Tensor
        assert_close(loss, plain, rtol=1e-12, atol=0)
    assert mixer.losses == []


def test_named_loss_outside_of_a_mixed_step_is_the_plain_one() -> None:
    logits = make_logits(N, K)
    plain = F.cross_entropy(logits, TARGETS)
    assert torch.equal(mix_loss(F.cross_entropy, "criterion", None, logits, TARGETS), plain)
    plan, mixer = start(mixed=False, is_explicit=True)
    assert torch.equal(
        mix_loss(F.cross_entropy, "criterion", None, logits, TargetPair.wrap(TARGETS, plan, mixer)), plain
    )
    assert mixer.losses == []


def test_named_loss_that_runs_the_network_is_refused() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, K)).double()
    plan = MixPlan("0", PARTNER, torch.tensor([LAM]).expand(N), INVERSE)
    mixer = Mixer(resolve_layers(net, "0"), is_explicit=True)
    mixer.attach()
    mixer.start(plan)
    rows = make_logits(N, 3).detach()
    net(rows)
    with pytest.raises(RuntimeError, match=r"loss=step runs the network itself, so evaluating it on both target sets"):
        mix_loss(lambda x, y: F.cross_entropy(net(x), y), "step", None, rows, TargetPair.wrap(TARGETS, plan, mixer))
    mixer.detach()


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
        mixed_accuracy(ACCURACY_LOGITS, pair.view(4, 1).squeeze(1)),
        mixed_accuracy(ACCURACY_LOGITS.clone().requires_grad_(), pair, plan),
    ):
        assert type(accuracy) is Tensor
        assert not accuracy.requires_grad
        assert accuracy.dtype == torch.float32
        assert accuracy.item() == expected


def test_mixed_accuracy_of_a_partner_of_the_same_class_is_one_hit() -> None:
    plan = MixPlan(INPUT, torch.tensor([1, 0]), torch.tensor([0.25]).expand(2))
    assert mixed_accuracy(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([1, 1]), plan) == 1


def test_mixed_accuracy_of_flat_targets() -> None:
    plan, mixer = start()
    tokens = TOKENS % 2
    pair = TargetPair.wrap(tokens, plan, mixer).view(-1)
    logits = torch.tensor([1.0, 0.0]).expand(3 * N, 2)
    expected = LAM * (tokens == 0).float().mean() + (1 - LAM) * (tokens[PARTNER] == 0).float().mean()
    assert_close(mixed_accuracy(logits, pair), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("plan", [None, MixPlan.unmixed(4)], ids=["no_plan", "unmixed_plan"])
def test_mixed_accuracy_without_mixing_is_the_plain_one(plan: MixPlan | None) -> None:
    assert mixed_accuracy(ACCURACY_LOGITS, ACCURACY_TARGETS, plan) == 0.5


@pytest.mark.parametrize(
    "measure", [mixed_accuracy, lambda logits, y: mixed_target_entropy(y)], ids=["accuracy", "entropy"]
)
def test_measure_of_targets_that_cannot_be_followed_is_refused(measure: Callable[[Tensor, Tensor], Tensor]) -> None:
    pair, _ = pair_up(TARGETS)
    lost = (pair[:, None] == pair).sum(1)
    with pytest.raises(RuntimeError, match=r"'__eq__' compares the targets of different rows with each other"):
        measure(make_logits(N, K), lost)


@pytest.mark.parametrize(
    ("lam", "expected"),
    [
        # Row 1 has a partner of its own class, which leaves no doubt.
        pytest.param(torch.tensor([0.5]).expand(4), 3 / 4 * np.log(2), id="per_batch"),
        pytest.param(torch.tensor([1.0, 0.5, 0.25, 0.0]), (np.log(4) / 4 + 3 / 4 * np.log(4 / 3)) / 4, id="per_sample"),
    ],
)
def test_mixed_target_entropy_by_hand(lam: Tensor, expected: float) -> None:
    targets, partner = torch.tensor([0, 1, 2, 1]), torch.tensor([1, 3, 0, 2])
    plan = MixPlan(INPUT, partner, lam)
    mixer = Mixer([Layer(INPUT)])
    mixer.start(plan)
    for entropy in (mixed_target_entropy(targets, plan), mixed_target_entropy(TargetPair.wrap(targets, plan, mixer))):
        assert type(entropy) is Tensor
        assert entropy.dtype == torch.float32
        assert entropy.item() == pytest.approx(expected, rel=1e-6)


def test_mixed_target_entropy_is_the_cross_entropy_of_a_perfect_network() -> None:
    plan, _ = start(per_sample=True)
    own, partner = (F.one_hot(y, K).double() for y in (TARGETS, TARGETS[PARTNER]))
    soft = LAMS.double()[:, None] * own + (1 - LAMS.double()[:, None]) * partner
    assert_close(
        mixed_target_entropy(TARGETS, plan).double(),
        F.cross_entropy(soft.log().clamp(min=-100), soft),
        rtol=1e-6,
        atol=0,
    )


@pytest.mark.parametrize("plan", [None, MixPlan.unmixed(4)], ids=["no_plan", "unmixed_plan"])
def test_mixed_target_entropy_without_mixing_is_zero(plan: MixPlan | None) -> None:
    assert mixed_target_entropy(TARGETS, plan) == 0
