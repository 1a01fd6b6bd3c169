"""Any loss on mixed targets is ``lam * loss(own) + (1 - lam) * loss(partner)``, value and gradient, or is refused."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.testing import assert_close

from mm_lightning.mixup import INPUT, Layer, Mixer, MixPlan, TargetPair

N, K = 4, 5
PARTNER, INVERSE = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 3, 0, 2])
REPEATING = torch.tensor([1, 1, 1, 0])
LAM = 0.3125  # a short binary fraction: the same number in float32
LAMS = torch.tensor([1.0, 0.5, 0.25, 0.0])

Loss = Callable[..., Tensor]


def start(per_sample: bool = False, partner: Tensor = PARTNER, has_mixed: bool = True) -> tuple[MixPlan, Mixer]:
    """A step in which the planned layer has run already, or not yet."""
    lam = LAMS if per_sample else torch.tensor([LAM]).expand(N)
    plan = MixPlan(INPUT, partner, lam, INVERSE if partner is PARTNER else None)
    mixer = Mixer([Layer(INPUT)])
    mixer.start(plan)
    if has_mixed:
        mixer.record_input()
    return plan, mixer


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_mixed(
    loss: Loss,
    logits: Tensor,
    *targets: Tensor,
    leaves: Sequence[Tensor] = (),
    partner: Tensor = PARTNER,
    per_sample: bool = False,
    expected: Loss | None = None,
) -> Mixer:
    """Compare ``loss(logits, *targets)`` with the interpolation of the plain losses.

    Args:
        loss: May change what it is given.
        logits: What the network made of the mixed batch.
        targets: The batch's own.
        leaves: Further parameters that the loss depends on.
        partner: The rows mixed in.
        per_sample: Use a ``lam`` for each row.
        expected: What to compare with, of the logits, the own targets and the partners'.
    """
    plan, mixer = start(per_sample, partner)
    inputs = [logits.clone().requires_grad_() for _ in range(2)]
    torch.manual_seed(0)
    mixed = loss(inputs[0], *[TargetPair.wrap(target.clone(), plan, mixer) for target in targets])
    assert isinstance(mixed, TargetPair)
    assert mixed.is_mixed
    assert mixer.losses
    mixer.stop()
    assert type(mixed) is Tensor
    plain = (expected or _interpolation_of(loss))(
        inputs[1], [target.clone() for target in targets], [target[partner] for target in targets]
    )
    assert_close(mixed, plain, rtol=1e-12, atol=1e-14)
    got, wanted = (
        torch.autograd.grad(value.sum(), [rows, *leaves]) for value, rows in zip((mixed, plain), inputs, strict=True)
    )
    assert wanted[0].abs().max() > 0
    assert_close(list(got), list(wanted), rtol=1e-12, atol=1e-14)
    return mixer


def assert_mixed_or_refused(loss: Loss, logits: Tensor, *targets: Tensor, **settings: Any) -> None:
    """For what may be more than can be followed: it must not be silently wrong."""
    try:
        assert_mixed(loss, logits, *targets, **settings)
    except RuntimeError as error:
        if type(error) is not RuntimeError or not re.search("targets|mixed|per_sample", str(error)):
            raise  # none of ours


def _interpolation_of(loss: Loss) -> Loss:
    def interpolation(logits: Tensor, own: Sequence[Tensor], partners: Sequence[Tensor]) -> Tensor:
        halves = []
        for targets in (own, partners):
            torch.manual_seed(0)
            halves.append(loss(logits, *targets))
        return LAM * halves[0] + (1 - LAM) * halves[1]

    return interpolation


def _by_row(rows: Loss, reduction: str = "mean") -> Loss:
    """The reference for one lam per sample: the rows' losses are weighted, then reduced."""

    def mixed_rows(logits: Tensor, own: Sequence[Tensor], partners: Sequence[Tensor]) -> Tensor:
        first, second = rows(logits, *own), rows(logits, *partners)
        lam = LAMS.double().view(N, *[1] * (first.dim() - 1))
        mixed = lam * first + (1 - lam) * second
        return {"mean": mixed.mean(), "sum": mixed.sum(), "batchmean": mixed.sum() / N, "none": mixed}[reduction]

    return mixed_rows


def each(**losses: Loss) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("loss", list(losses.values()), ids=list(losses))


def each_with_data(**cases: tuple[Any, ...]) -> pytest.MarkDecorator:
    """Of cases that hold a loss, logits and targets."""
    cases = {name: (loss, logits, targets) for name, (loss, logits, *targets) in cases.items()}
    return pytest.mark.parametrize(("loss", "logits", "targets"), list(cases.values()), ids=list(cases))


every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])

CLASSES = torch.tensor([0, 1, 4, 2])
SQUARE_CLASSES = torch.tensor([0, 1, 3, 2])  # of as many classes as rows
BINARY = torch.tensor([0, 1, 1, 0])
TOKENS = torch.tensor([[0, 1, 2], [3, 255, 0], [255, 4, 1], [2, 2, 255]])
UNEVEN = torch.tensor([[0, 1, 2], [255, 3, 0], [255, 4, 1], [255, 255, 255]])  # 7 valid, of repeating partners 9
MAPS = torch.arange(N * 6).view(N, 2, 3) % K
LABELS = (normal(N, K, seed=1) > 0).double()
SIGNS = 2 * LABELS - 1
SOFT = normal(N, K, seed=2).softmax(1)
VALUES = normal(N, 3, seed=3)
COUNTS = torch.arange(12.0, dtype=torch.float64).view(N, 3)
WEIGHTS = normal(N, seed=4).abs()
SEQUENCES, LENGTHS = torch.tensor([[1, 2, 3], [2, 4, 0], [1, 0, 0], [3, 3, 1]]), torch.tensor([3, 2, 1, 3])
LABEL_SETS = torch.tensor([[0, -1, 1], [1, 2, -1], [2, -1, 0], [-1, 1, 1]])
CLASS_WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 1.0, 3.0], dtype=torch.float64)


@every_reduction
@each_with_data(
    plain=(cross_entropy, normal(N, K), CLASSES),
    weight=(lambda *a, **o: F.cross_entropy(*a, weight=CLASS_WEIGHTS, **o), normal(N, K), CLASSES),
    ignore_index=(lambda *a, **o: F.cross_entropy(*a, ignore_index=1, **o), normal(N, K), CLASSES),
    label_smoothing=(lambda *a, **o: F.cross_entropy(*a, label_smoothing=0.1, **o), normal(N, K), CLASSES),
    all_options=(
        lambda *a, **o: F.cross_entropy(*a, weight=CLASS_WEIGHTS, ignore_index=1, label_smoothing=0.1, **o),
        normal(N, K),
        CLASSES,
    ),
    soft_targets=(
        lambda *a, **o: F.cross_entropy(*a, weight=CLASS_WEIGHTS, label_smoothing=0.1, **o),
        normal(N, K),
        SOFT,
    ),
    sequences=(lambda *a, **o: F.cross_entropy(*a, ignore_index=255, **o), normal(N, K, 3), TOKENS),
    segmentation=(
        lambda *a, **o: F.cross_entropy(*a, weight=CLASS_WEIGHTS, ignore_index=1, **o),
        normal(N, K, 2, 3),
        MAPS,
    ),
)
def test_cross_entropy(loss: Loss, logits: Tensor, targets: list[Tensor], reduction: str) -> None:
    mixer = assert_mixed(lambda z, y: loss(z, y, reduction=reduction), logits, *targets)
    assert mixer.losses == ["cross_entropy"]


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
@pytest.mark.parametrize("option", ["size_average", "reduce"])
def test_cross_entropy_with_its_old_options(option: str) -> None:
    assert_mixed(lambda z, y: F.cross_entropy(z, y, **{option: False}), normal(N, K), CLASSES)


@every_reduction
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss")
@each_with_data(
    nll=(lambda z, y, **o: F.nll_loss(z.log_softmax(1), y, CLASS_WEIGHTS, **o), normal(N, K), CLASSES),
    nll_of_maps=(
        lambda z, y, **o: F.nll_loss(z.log_softmax(1), y, ignore_index=1, **o),
        normal(N, K, 2, 3),
        MAPS,
    ),
    bce=(lambda z, y, **o: F.binary_cross_entropy(z.sigmoid(), y, **o), normal(N, K), LABELS),
    bce_with_weights_of_the_batch=(
        lambda z, y, w, **o: F.binary_cross_entropy(z.sigmoid(), y, w, **o),
        normal(N, K),
        LABELS,
        SOFT,
    ),
    bce_with_logits_multi_label=(
        lambda z, y, **o: F.binary_cross_entropy_with_logits(z, y, pos_weight=CLASS_WEIGHTS, **o),
        normal(N, K),
        LABELS,
    ),
    bce_with_logits_binary=(
        lambda z, y, **o: F.binary_cross_entropy_with_logits(z.squeeze(1), y.double(), **o),
        normal(N, 1),
        BINARY,
    ),
    kl=(lambda z, y, **o: F.kl_div(z.log_softmax(1), y, **o), normal(N, K), SOFT),
    kl_of_logs=(lambda z, y, **o: F.kl_div(z.log_softmax(1), y, log_target=True, **o), normal(N, K), SOFT.log()),
    mse=(mse_loss, normal(N, 3), VALUES),
    l1=(F.l1_loss, normal(N, 3), VALUES),
    smooth_l1=(lambda z, y, **o: F.smooth_l1_loss(z, y, beta=0.3, **o), normal(N, 3), VALUES),
    huber=(lambda z, y, **o: F.huber_loss(z, y, delta=0.3, **o), normal(N, 3), VALUES),
    gaussian_nll=(
        lambda z, y, **o: F.gaussian_nll_loss(z[:, :3], y, z[:, 3:].exp(), full=True, **o),
        normal(N, 6),
        VALUES,
    ),
    poisson_nll=(lambda z, y, **o: F.poisson_nll_loss(z, y, full=True, **o), normal(N, 3), COUNTS),
    ctc=(
        lambda z, y, lengths, **o: F.ctc_loss(z.log_softmax(2), y, torch.full((N,), 8), lengths, **o),
        normal(8, N, K),
        SEQUENCES,
        LENGTHS,
    ),
    multi_margin=(lambda z, y, **o: F.multi_margin_loss(z, y, weight=CLASS_WEIGHTS, **o), normal(N, K), CLASSES),
    multilabel_margin=(F.multilabel_margin_loss, normal(N, 3), LABEL_SETS),
    multilabel_soft_margin=(F.multilabel_soft_margin_loss, normal(N, K), LABELS),
    soft_margin=(F.soft_margin_loss, normal(N, K), SIGNS),
    hinge_embedding=(F.hinge_embedding_loss, normal(N, K), SIGNS),
    cosine_embedding=(
        lambda z, y, **o: F.cosine_embedding_loss(z[:, :3], z[:, 3:], 2 * y - 1, **o),
        normal(N, 6),
        BINARY,
    ),
    margin_ranking=(
        lambda z, y, **o: F.margin_ranking_loss(z[:, 0], z[:, 1], 2 * y - 1, **o),
        normal(N, 2),
        BINARY,
    ),
)
def test_functions_of_torch(loss: Loss, logits: Tensor, targets: list[Tensor], reduction: str) -> None:
    assert_mixed(lambda z, *y: loss(z, *y, reduction=reduction), logits, *targets)


@each_with_data(
    CrossEntropyLoss=(
        nn.CrossEntropyLoss(CLASS_WEIGHTS, ignore_index=1, label_smoothing=0.1),
        normal(N, K),
        CLASSES,
    ),
    NLLLoss=(nn.NLLLoss(CLASS_WEIGHTS), normal(N, K), CLASSES),
    BCEWithLogitsLoss=(nn.BCEWithLogitsLoss(pos_weight=CLASS_WEIGHTS), normal(N, K), LABELS),
    KLDivLoss=(nn.KLDivLoss(reduction="batchmean"), normal(N, K), SOFT),
    MSELoss=(nn.MSELoss(), normal(N, 3), VALUES),
    SmoothL1Loss=(nn.SmoothL1Loss(reduction="sum"), normal(N, 3), VALUES),
    HuberLoss=(nn.HuberLoss(delta=0.3), normal(N, 3), VALUES),
    PoissonNLLLoss=(nn.PoissonNLLLoss(), normal(N, 3), COUNTS),
    MultiMarginLoss=(nn.MultiMarginLoss(p=2), normal(N, K), CLASSES),
    keywords=(lambda z, y: F.cross_entropy(target=y, input=z), normal(N, K), CLASSES),
    Categorical=(lambda z, y: torch.distributions.Categorical(logits=z).log_prob(y).mean(), normal(N, K), CLASSES),
    Normal=(
        lambda z, y: torch.distributions.Normal(z[:, :3], z[:, 3:].exp()).log_prob(y).mean(),
        normal(N, 6),
        VALUES,
    ),
    Bernoulli=(lambda z, y: torch.distributions.Bernoulli(logits=z).log_prob(y).mean(), normal(N, K), LABELS),
)
def test_modules_and_distributions(loss: Loss, logits: Tensor, targets: list[Tensor]) -> None:
    assert_mixed(loss, logits, *targets)


def one_hot_chained(z: Tensor, y: Tensor) -> Tensor:
    one_hot = torch.zeros(N, K, dtype=z.dtype).scatter_(1, y[:, None], 1)
    return -(one_hot * z.log_softmax(1)).sum(1).mean()


def one_hot_statement(z: Tensor, y: Tensor) -> Tensor:
    one_hot = torch.zeros_like(z)
    one_hot.scatter_(1, y.view(-1, 1), 1.0)
    return -(one_hot * z.log_softmax(1)).sum(1).mean()


def one_hot_by_index(z: Tensor, y: Tensor) -> Tensor:
    one_hot = torch.zeros_like(z)
    one_hot[range(N), y] = 1
    return F.mse_loss(z.softmax(1), one_hot)


def one_hot_row_by_row(z: Tensor, y: Tensor) -> Tensor:
    one_hot = torch.zeros_like(z)
    for i in range(N):
        one_hot[i, y[i]] = 1
    return (one_hot * z).square().mean()


def one_hot_through_a_view(z: Tensor, y: Tensor) -> Tensor:
    one_hot = torch.zeros(K, N, dtype=z.dtype)
    one_hot.t().scatter_(1, y[:, None], 1.0)
    return (one_hot * z.t()).exp().sum()


def one_hot_smoothed(z: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        targets = torch.empty_like(z)
        targets.fill_(0.02)
        targets.scatter_(1, y.data.unsqueeze(1), 0.9)
    return torch.mean(torch.sum(-targets * z.log_softmax(-1), dim=-1))


@each(
    one_hot=lambda z, y: -(z.log_softmax(1) * F.one_hot(y, K)).sum(1).mean(),
    rows_of_eye=lambda z, y: -(z.log_softmax(1) * torch.eye(K)[y]).sum(1).mean(),
    einsum=lambda z, y: -torch.einsum("nk,nk->", z.log_softmax(1), F.one_hot(y, K).double()),
    diagonal_of_a_product=lambda z, y: -(z.log_softmax(1) @ F.one_hot(y, K).double().T).diagonal().mean(),
    gather=lambda z, y: -z.log_softmax(1).gather(1, y[:, None]).squeeze(1).mean(),
    index_by_range=lambda z, y: -z.log_softmax(1)[range(N), y].mean(),
    index_by_arange=lambda z, y: -z.log_softmax(1)[torch.arange(len(y)), y].mean(),
    loop_over_targets=lambda z, y: -sum(z.log_softmax(1)[i, t] for i, t in enumerate(y)),
    loop_over_rows=lambda z, y: -sum(z.log_softmax(1)[i][y[i]] for i in range(N)),
    loop_over_single_losses=lambda z, y: sum(F.cross_entropy(z[i], y[i]) for i in range(N)),
    loop_over_classes=lambda z, y: sum(F.cross_entropy(z[y == k], y[y == k], reduction="sum") for k in range(K)),
    mean_of_each_class=lambda z, y: sum(z[y == k].mean(0).square().sum() for k in y.unique()),
    one_hot_chained=one_hot_chained,
    one_hot_statement=one_hot_statement,
    one_hot_by_index=one_hot_by_index,
    one_hot_row_by_row=one_hot_row_by_row,
    one_hot_through_a_view=one_hot_through_a_view,
    one_hot_smoothed=one_hot_smoothed,
)
def test_losses_of_the_targets_class(loss: Loss) -> None:
    assert_mixed(loss, normal(N, K), CLASSES)


def focal_rows(z: Tensor, y: Tensor) -> Tensor:
    ce = F.cross_entropy(z, y, reduction="none")
    return 0.25 * (1 - torch.exp(-ce)) ** 2 * ce


def focal_with_detached_weights(z: Tensor, y: Tensor) -> Tensor:
    ce = F.cross_entropy(z, y, reduction="none")
    return ((1 - torch.exp(-ce.detach())).pow(2) * ce).mean()


def focal_by_gather(z: Tensor, y: Tensor) -> Tensor:
    log_pt = z.log_softmax(1).gather(1, y.view(-1, 1)).view(-1)
    pt = log_pt.detach().exp()
    return (-CLASS_WEIGHTS[y] * (1 - pt) ** 2 * log_pt).mean()


def focal_without_grad(z: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        pt = z.softmax(1)[range(N), y]
    return ((1 - pt) ** 2 * F.cross_entropy(z, y, reduction="none")).mean()


def poly(z: Tensor, y: Tensor) -> Tensor:
    pt = (F.one_hot(y, K) * z.softmax(1)).sum(-1)
    return (F.cross_entropy(z, y, reduction="none") + 1 - pt).mean()


def symmetric_cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    targets = F.one_hot(y, K).double().clamp(min=1e-4)
    return 0.1 * F.cross_entropy(z, y) - (z.softmax(1).clamp(1e-7, 1) * targets.log()).sum(1).mean()


def arcface(z: Tensor, y: Tensor) -> Tensor:
    cosine = F.normalize(z) @ F.normalize(normal(K, K, seed=7)).T
    phi = cosine * 0.9 - (1 - cosine.square()).sqrt() * 0.2
    phi = torch.where(cosine > 0, phi, cosine - 0.1)
    one_hot = torch.zeros_like(cosine)
    one_hot.scatter_(1, y.view(-1, 1).long(), 1)
    return F.cross_entropy(8 * (one_hot * phi + (1 - one_hot) * cosine), y)


def margin_by_index(z: Tensor, y: Tensor) -> Tensor:
    z = z * 1
    z[range(N), y] -= 0.35
    return F.cross_entropy(8 * z, y)


def margin_by_rows_and_columns(z: Tensor, y: Tensor) -> Tensor:
    rows = torch.where(y != -1)[0]
    columns = y[rows].view(-1)
    target = z[rows, columns]
    z = z * 1
    z[rows, columns] = torch.cos(target.clamp(-0.9, 0.9).acos() + 0.2)
    return F.cross_entropy(8 * z, y)


def margin_by_subtraction(z: Tensor, y: Tensor) -> Tensor:
    z = z * 1
    z -= 0.35 * F.one_hot(y, K)
    return F.cross_entropy(8 * z, y)


def margin_by_scatter(z: Tensor, y: Tensor) -> Tensor:
    z = z * 1
    z.scatter_add_(1, y[:, None], torch.full((N, 1), -0.35, dtype=z.dtype))
    return F.cross_entropy(8 * z, y)


def margin_in_flat_logits(z: Tensor, y: Tensor) -> Tensor:
    z = z * 1
    z.view(-1)[torch.arange(N) * K + y] -= 0.35
    return F.cross_entropy(8 * z, y)


def without_the_target(z: Tensor, y: Tensor) -> Tensor:
    mask = torch.zeros_like(z, dtype=torch.bool)
    mask[range(N), y] = True
    return z.masked_fill(mask, 0.0).logsumexp(1).mean() - z[mask].mean()


def multi_class_hinge(z: Tensor, y: Tensor) -> Tensor:
    margins = F.relu(z - z.gather(1, y[:, None]) + 1)
    return margins.scatter(1, y[:, None], 0).sum(1).mean()


def class_balanced(z: Tensor, y: Tensor) -> Tensor:
    counts = torch.bincount(y, minlength=K).double()
    return F.cross_entropy(z, y, weight=1 / (1 + counts)) + (F.cross_entropy(z, y, reduction="none") / counts[y]).mean()


def prototypes(z: Tensor, y: Tensor) -> Tensor:
    sums = torch.zeros(3, K, dtype=z.dtype).index_add_(0, y % 3, z)
    means = sums / torch.bincount(y % 3, minlength=3)[:, None]
    return (z - means[y % 3]).square().mean()


@each(
    focal=lambda z, y: focal_rows(z, y).mean(),
    focal_with_detached_weights=focal_with_detached_weights,
    focal_by_gather=focal_by_gather,
    focal_without_grad=focal_without_grad,
    poly=poly,
    symmetric_cross_entropy=symmetric_cross_entropy,
    generalized_cross_entropy=lambda z, y: (1 - z.softmax(1).gather(1, y[:, None]) ** 0.7).mean() / 0.7,
    arcface=arcface,
    margin_by_index=margin_by_index,
    margin_by_rows_and_columns=margin_by_rows_and_columns,
    margin_by_subtraction=margin_by_subtraction,
    margin_by_scatter=margin_by_scatter,
    margin_in_flat_logits=margin_in_flat_logits,
    without_the_target=without_the_target,
    multi_class_hinge=multi_class_hinge,
    ordinal_levels=lambda z, y: F.binary_cross_entropy_with_logits(z, (y[:, None] > torch.arange(K)).double()),
    class_balanced=class_balanced,
    prototypes=prototypes,
)
def test_losses_of_classes(loss: Loss) -> None:
    assert_mixed(loss, normal(N, K), CLASSES)


def dice(z: Tensor, y: Tensor) -> Tensor:
    one_hot = F.one_hot(y, K).movedim(-1, 1).to(z)
    overlap, total = (z.softmax(1) * one_hot).sum((0, 2, 3)), (z.softmax(1) + one_hot).sum((0, 2, 3))
    return 1 - ((2 * overlap + 1) / (total + 1)).mean()


def jaccard(z: Tensor, y: Tensor) -> Tensor:
    p = z.sigmoid()
    overlap = (p * y).flatten(1).sum(1)
    return (1 - overlap / (p.flatten(1).sum(1) + y.flatten(1).sum(1) - overlap)).mean()


def focal_tversky(z: Tensor, y: Tensor) -> Tensor:
    p = z.sigmoid()
    hits, false_alarms, misses = (p * y).sum(), (p * (1 - y)).sum(), ((1 - p) * y).sum()
    return (1 - hits / (hits + 0.3 * false_alarms + 0.7 * misses)) ** 0.75


def sigmoid_focal(z: Tensor, y: Tensor) -> Tensor:
    p = z.sigmoid()
    ce = F.binary_cross_entropy_with_logits(z, y, reduction="none")
    loss = ce * (1 - (p * y + (1 - p) * (1 - y))) ** 2
    return ((0.25 * y + 0.75 * (1 - y)) * loss).sum()


def asymmetric(z: Tensor, y: Tensor) -> Tensor:
    p = z.sigmoid()
    loss = y * torch.log(p) + (1 - y) * torch.log(1 - p)
    with torch.no_grad():
        weight = torch.pow(1 - p * y - (1 - p) * (1 - y), 1 * y + 4 * (1 - y))
    loss *= weight
    return -loss.sum()


def lovasz(z: Tensor, y: Tensor) -> Tensor:
    errors, order = (y - z.sigmoid()).abs().flatten().sort(descending=True)
    return (errors * (1 - y.flatten()[order]).cumsum(0)).mean()


@each_with_data(
    dice=(dice, normal(N, K, 2, 3), MAPS),
    jaccard=(jaccard, normal(N, K), LABELS),
    focal_tversky=(focal_tversky, normal(N, K), LABELS),
    sigmoid_focal=(sigmoid_focal, normal(N, K), LABELS),
    asymmetric=(asymmetric, normal(N, K), LABELS),
    lovasz=(lovasz, normal(N, K), LABELS),
    binary_hinge=(lambda z, y: F.relu(1 - z * (2 * y - 1)).mean(), normal(N), BINARY),
)
def test_losses_of_labels_and_maps(loss: Loss, logits: Tensor, targets: list[Tensor]) -> None:
    assert_mixed(loss, logits, *targets)


def correlation(z: Tensor, y: Tensor) -> Tensor:
    a, b = z - z.mean(), y - y.mean()
    return 1 - (a * b).sum() / (a.norm() * b.norm())


def structural_similarity(z: Tensor, y: Tensor) -> Tensor:
    window = torch.ones(1, 1, 2, dtype=z.dtype) / 2
    z, y = z.view(N, 1, 3), y.view(N, 1, 3)
    mean_z, mean_y, mean_zy = F.conv1d(z, window), F.conv1d(y, window), F.conv1d(z * y, window)
    return 1 - (2 * (mean_zy - mean_z * mean_y) + 1).mean()


@each(
    rmse=lambda z, y: torch.sqrt(F.mse_loss(z, y) + 1e-8),
    root_squared_log_error=lambda z, y: (torch.log1p(z.exp()) - torch.log1p(y.exp())).pow(2).mean().sqrt(),
    log_cosh=lambda z, y: torch.log(torch.cosh(z - y)).mean(),
    pinball=lambda z, y: torch.max(0.9 * (y - z), -0.1 * (y - z)).mean(),
    distance=lambda z, y: (z - y).norm(dim=1).mean(),
    largest_error=lambda z, y: (z - y).abs().amax(1).mean(),
    median_error=lambda z, y: (z - y).abs().median(),
    cosine_similarity=lambda z, y: 1 - F.cosine_similarity(z, y).mean(),
    fourier=lambda z, y: (torch.fft.rfft(z) - torch.fft.rfft(y)).abs().mean(),
    total_variation=lambda z, y: (z - y).diff(dim=1).abs().mean(),
    earth_movers=lambda z, y: (z.cumsum(1) - y.cumsum(1)).square().mean(),
    correlation=correlation,
    structural_similarity=structural_similarity,
    standardised_targets=lambda z, y: F.mse_loss(z, (y - y.mean(0)) / y.std(0)),
    normalised_targets=lambda z, y: F.mse_loss(z, y / y.abs().sum()),
)
@pytest.mark.parametrize("partner", [PARTNER, REPEATING], ids=["permutation", "repeating"])
def test_losses_of_values(loss: Loss, partner: Tensor) -> None:
    assert_mixed(loss, normal(N, 3), VALUES, partner=partner)


def total_of_zeros(z: Tensor, y: Tensor) -> Tensor:
    total = torch.zeros((), dtype=z.dtype)
    total += F.cross_entropy(z, y)
    total += F.multi_margin_loss(z, y)
    return total


def total_of_the_first(z: Tensor, y: Tensor) -> Tensor:
    total = F.cross_entropy(z, y)
    total += z.square().mean()
    total /= 2
    return total


def total_of_an_unmixed_loss(z: Tensor, y: Tensor) -> Tensor:
    total = z.square().mean()
    total += F.cross_entropy(z, y)
    return total


def total_in_place(z: Tensor, y: Tensor) -> Tensor:
    total = torch.zeros(1, dtype=z.dtype)
    total.add_(F.cross_entropy(z, y)).mul_(3)
    return total


def losses_in_a_tensor(z: Tensor, y: Tensor) -> Tensor:
    losses = z.new_zeros(2)
    losses[0] = F.cross_entropy(z, y)
    losses[1] = z.square().mean()
    return (losses * torch.tensor([1.0, 2.0])).sum()


def losses_added_to_a_tensor(z: Tensor, y: Tensor) -> Tensor:
    losses = z.new_zeros(2)
    losses[0] += F.cross_entropy(z, y)
    losses[1] += z.square().mean()
    return losses.square().sum()


def losses_row_by_row(z: Tensor, y: Tensor) -> Tensor:
    losses = z.new_zeros(N)
    for i in range(N):
        losses[i] = F.cross_entropy(z[i : i + 1], y[i : i + 1])
    return losses.square().mean()


@each(
    weighted_sum=lambda z, y: 0.5 * F.cross_entropy(z, y) + 2 * F.multi_margin_loss(z, y) + z.abs().sum(),
    total_of_zeros=total_of_zeros,
    total_of_the_first=total_of_the_first,
    total_of_an_unmixed_loss=total_of_an_unmixed_loss,
    total_in_place=total_in_place,
    losses_in_a_tensor=losses_in_a_tensor,
    losses_row_by_row=losses_row_by_row,
    sum_of_a_list=lambda z, y: sum([F.cross_entropy(z, y), F.multi_margin_loss(z, y)]),
    sum_of_a_dict=lambda z, y: sum({"ce": F.cross_entropy(z, y), "l2": z.square().mean()}.values()),
    mean_of_a_stack=lambda z, y: torch.stack([F.cross_entropy(z, y), F.multi_margin_loss(z, y), z.mean()]).mean(),
    logsumexp_of_a_stack=lambda z, y: torch.stack([F.cross_entropy(z, y), z.mean()]).logsumexp(0),
    flooding=lambda z, y: (F.cross_entropy(z, y) - 2.0).abs() + 2.0,
    clamped=lambda z, y: F.cross_entropy(z, y).clamp(max=2.0),
    squared=lambda z, y: F.cross_entropy(z, y) ** 2,
    normalised=lambda z, y: F.cross_entropy(z, y) / F.cross_entropy(z, y).detach(),
)
def test_combinations_of_losses(loss: Loss) -> None:
    assert_mixed(loss, normal(N, K), CLASSES)


@each(
    log_variance=lambda z, y, s: torch.exp(-s) * F.cross_entropy(z, y) + s,
    variance=lambda z, y, s: F.cross_entropy(z, y) / (2 * s**2) + torch.log(s),
    temperature=lambda z, y, s: F.cross_entropy(s * z, y),
)
def test_loss_with_a_learned_scale(loss: Loss) -> None:
    scale = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    assert_mixed(lambda z, y: loss(z, y, scale), normal(N, K), CLASSES, leaves=[scale])


def distance_to_the_center(z: Tensor, y: Tensor, centers: Tensor) -> Tensor:
    mask = y.unsqueeze(1).expand(N, K).eq(torch.arange(K).expand(N, K))
    return (torch.cdist(z, centers) * mask.double()).clamp(1e-12, 1e12).sum() / N


@each(
    index=lambda z, y, c: (z - c[y]).square().sum(1).mean(),
    embedding=lambda z, y, c: (z - F.embedding(y, c)).square().sum(1).mean(),
    index_select=lambda z, y, c: (z - c.index_select(0, y)).square().sum(1).mean(),
    mask=distance_to_the_center,
)
def test_center_loss(loss: Loss) -> None:
    centers = nn.Parameter(normal(K, 3, seed=9))
    assert_mixed(lambda z, y: loss(z, y, centers), normal(N, 3), CLASSES, leaves=[centers])


def test_centers_in_a_buffer() -> None:
    centers = torch.zeros(K, 3, dtype=torch.float64)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        centers.zero_()
        with torch.no_grad():
            centers.index_add_(0, y, z)
        return (2 * z - centers[y]).square().mean()

    assert_mixed(loss, normal(N, 3), CLASSES)
    assert type(centers) is Tensor


@each_with_data(
    float=(lambda z, y: F.mse_loss(z, y.float().double()), normal(N), CLASSES),
    long=(lambda z, y: F.cross_entropy(z, y.long()), normal(N, K), CLASSES.int()),
    type_as=(lambda z, y: F.mse_loss(z, y.type_as(z)), normal(N), CLASSES),
    to=(lambda z, y: F.cross_entropy(z, y.to("cpu", torch.int64)), normal(N, K), CLASSES.int()),
    to_device=(lambda z, y: F.cross_entropy(z, y.to(z.device, non_blocking=True)), normal(N, K), CLASSES),
    view=(lambda z, y: F.cross_entropy(z, y.view(-1)), normal(N, K), CLASSES.view(N, 1)),
    squeeze=(lambda z, y: F.cross_entropy(z, y.squeeze()), normal(N, K), CLASSES.view(N, 1)),
    one_hot=(lambda z, y: F.cross_entropy(z, F.one_hot(y).double()), normal(N, K), CLASSES),
    column=(lambda z, y: F.cross_entropy(z, y[:, 1]), normal(N, K), TOKENS % K),
    columns=(lambda z, y: F.cross_entropy(z, y[..., 1:3]), normal(N, K, 2), TOKENS % K),
    shifted=(lambda z, y: F.cross_entropy(z[:, :, 1:], y[:, 1:], ignore_index=255), normal(N, K, 3), TOKENS),
    repeated=(
        lambda z, y: F.cross_entropy(z.flatten(0, 1), y[:, None].repeat(1, 2).flatten()),
        normal(N, 2, K),
        CLASSES,
    ),
    interleaved=(lambda z, y: F.cross_entropy(z.flatten(0, 1), y.repeat_interleave(2)), normal(N, 2, K), CLASSES),
    chunks=(lambda z, y: sum(map(F.cross_entropy, z.chunk(2), y.chunk(2))), normal(N, K), CLASSES),
    flat=(lambda z, y: F.cross_entropy(z.movedim(1, -1).reshape(-1, K), y.reshape(-1)), normal(N, K, 2, 3), MAPS),
    enlarged=(
        lambda z, y: F.cross_entropy(z, F.interpolate(y[:, None].float(), scale_factor=2).squeeze(1).long()),
        normal(N, K, 4, 6),
        MAPS,
    ),
)
def test_targets_that_are_prepared_first(loss: Loss, logits: Tensor, targets: list[Tensor]) -> None:
    assert_mixed(loss, logits, *targets)


def masked_sum(z: Tensor, y: Tensor) -> Tensor:
    valid = y != 255
    losses = F.cross_entropy(z, torch.where(valid, y, 0), reduction="none")
    return (losses * valid).sum() / valid.sum()


def two_masks_of_flat_targets(z: Tensor, y: Tensor) -> Tensor:
    flat, logits = y.view(-1), z.movedim(1, -1).reshape(-1, K)
    valid = (flat != 255) & (flat != 4)
    return (F.cross_entropy(logits, flat * valid, reduction="none") * valid).sum() / valid.sum()


def weights_of_valid_targets(z: Tensor, y: Tensor) -> Tensor:
    targets = y[y != 255]
    weights = CLASS_WEIGHTS[targets] * (targets > 0)
    losses = F.cross_entropy(z.movedim(1, -1)[y != 255], targets, reduction="none")
    return (losses * weights).sum() / weights.sum()


def nonzero_of_valid_targets(z: Tensor, y: Tensor) -> Tensor:
    rows = (y.view(-1) != 255).nonzero().squeeze(1)
    logits = z.movedim(1, -1).reshape(-1, K).index_select(0, rows)
    return F.cross_entropy(logits, y.view(-1).index_select(0, rows))


def mask_then_change_targets(z: Tensor, y: Tensor) -> Tensor:
    valid = y != 255
    y[~valid] = 0
    return (F.cross_entropy(z, y, reduction="none") * valid).sum() / valid.sum()


def losses_at_valid_targets(z: Tensor, y: Tensor) -> Tensor:
    losses = torch.zeros(N, 3, dtype=z.dtype)
    valid = y != 255
    losses[valid] = F.cross_entropy(z.movedim(1, -1)[valid], y[valid], reduction="none")
    return losses.square().mean()


@each(
    valid_rows=lambda z, y: F.cross_entropy(z.movedim(1, -1)[y != 255], y[y != 255]),
    valid_losses=lambda z, y: F.cross_entropy(z, y, ignore_index=255, reduction="none")[y != 255].mean(),
    masked_select=lambda z, y: F.cross_entropy(z, y % 255, reduction="none").masked_select(y != 255).mean(),
    nonzero=nonzero_of_valid_targets,
    masked_sum=masked_sum,
    weights_of_valid_targets=weights_of_valid_targets,
    two_masks_of_flat_targets=two_masks_of_flat_targets,
    mask_then_change_targets=mask_then_change_targets,
    losses_at_valid_targets=losses_at_valid_targets,
)
@pytest.mark.parametrize(
    ("targets", "partner"), [(TOKENS, PARTNER), (UNEVEN, REPEATING)], ids=["same_number", "ragged_halves"]
)
def test_valid_targets(loss: Loss, targets: Tensor, partner: Tensor) -> None:
    assert_mixed(loss, normal(N, K, 3), targets, partner=partner)


@pytest.mark.parametrize(
    "size", [len, Tensor.numel, lambda y: y.shape[0], lambda y: y.size(0)], ids=["len", "numel", "shape", "size"]
)
def test_size_of_one_half_is_not_taken_for_the_others(size: Callable[[Tensor], int]) -> None:
    def loss(z: Tensor, y: Tensor) -> Tensor:
        valid = y != 255
        return F.cross_entropy(z.movedim(1, -1)[valid], y[valid], reduction="sum") / size(y[valid])

    assert_mixed(loss, normal(N, K, 3), TOKENS)
    assert_mixed_or_refused(loss, normal(N, K, 3), UNEVEN, partner=REPEATING)


def hard_by_threshold(losses: Tensor) -> Tensor:
    return losses[losses >= losses.detach().sort(descending=True)[0][1]].mean()


def hard_by_count(losses: Tensor) -> Tensor:
    hard = losses > 2.0
    return (losses * hard).sum() / hard.sum()


def easy_set_to_zero(losses: Tensor) -> Tensor:
    losses[losses < 2.0] = 0
    return losses.mean()


@pytest.mark.parametrize(
    "select",
    [
        pytest.param(lambda losses: losses.topk(2)[0].mean(), id="topk"),
        pytest.param(lambda losses: losses[losses.topk(2).indices].mean(), id="indices_of_topk"),
        pytest.param(hard_by_threshold, id="threshold"),
        pytest.param(hard_by_count, id="count"),
        pytest.param(easy_set_to_zero, id="easy_set_to_zero"),
        pytest.param(lambda losses: losses.max(), id="max"),
        pytest.param(lambda losses: losses[losses.argmax()], id="argmax"),
        pytest.param(lambda losses: (losses.softmax(0).detach() * losses).sum(), id="softmax_weights"),
        pytest.param(lambda losses: losses.quantile(0.7), id="quantile"),
    ],
)
def test_hard_examples(select: Callable[[Tensor], Tensor]) -> None:
    assert_mixed(lambda z, y: select(F.cross_entropy(z, y, reduction="none")), normal(N, K), CLASSES)


def test_hard_examples_found_without_grad() -> None:
    def loss(z: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            rows = F.cross_entropy(z, y, reduction="none").topk(2).indices
        return F.cross_entropy(z[rows], y[rows])

    assert_mixed(loss, normal(N, K), CLASSES)


def weighted_in_place(z: Tensor, y: Tensor, w: Tensor) -> Tensor:
    losses = F.cross_entropy(z, y, reduction="none")
    losses *= w
    return losses.mean()


@each(
    mean=lambda z, y, w: (F.cross_entropy(z, y, reduction="none") * w).mean(),
    sum_by_sum=lambda z, y, w: (F.cross_entropy(z, y, reduction="none") * w).sum() / w.sum(),
    normalised=lambda z, y, w: (F.cross_entropy(z, y, reduction="none") * (w / w.sum())).sum(),
    dot_product=lambda z, y, w: F.cross_entropy(z, y, reduction="none") @ w,
    in_place=weighted_in_place,
    in_place_by_method=lambda z, y, w: F.cross_entropy(z, y, reduction="none").mul_(w).mean(),
)
@pytest.mark.parametrize("partner", [PARTNER, REPEATING], ids=["permutation", "repeating"])
def test_sample_weights_of_the_batch(loss: Loss, partner: Tensor) -> None:
    assert_mixed(loss, normal(N, K), CLASSES, WEIGHTS, partner=partner)


def test_two_kinds_of_targets() -> None:
    def loss(z: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return F.cross_entropy(z[:, :K], y) + F.mse_loss(z[:, K:], v)

    mixer = assert_mixed(loss, normal(N, K + 3), CLASSES, VALUES)
    assert mixer.losses == ["cross_entropy", "mse_loss"]


def test_two_targets_that_are_cut_alike() -> None:
    assert_mixed(lambda z, v, w: (z[:3] * (v[:3] * w[:3, None])).exp().sum(), normal(N, 3), VALUES, WEIGHTS)


def part_scaled_in_place(losses: Tensor, y: Tensor) -> Tensor:
    losses[:2].mul_(3)
    return losses.square()


def buffer_filled_in_place(losses: Tensor, y: Tensor) -> Tensor:
    buffer = torch.zeros(2, N, dtype=losses.dtype)
    buffer[0].add_(losses)
    buffer[1].add_(torch.ones(N))
    return buffer.square().sum()


def some_set_to_zero(losses: Tensor, y: Tensor) -> Tensor:
    losses[y == 0] = 0
    return losses


def targets_added_in_place(losses: Tensor, y: Tensor) -> Tensor:
    losses += y
    return losses


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda losses, y: losses.mean().sqrt_(), id="root"),
        pytest.param(lambda losses, y: losses.clamp_(max=1.7), id="clamped"),
        pytest.param(lambda losses, y: losses.mul_(y).exp_().mean(), id="scaled_by_targets"),
        pytest.param(lambda losses, y: torch.zeros(N).double().add_(losses).exp_(), id="buffer"),
        pytest.param(some_set_to_zero, id="some_set_to_zero"),
        pytest.param(targets_added_in_place, id="targets_added"),
    ],
)
def test_losses_changed_in_place(change: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert_mixed(lambda z, y: change(F.cross_entropy(z, y, reduction="none"), y), normal(N, K), CLASSES)


@pytest.mark.parametrize("change", [part_scaled_in_place, buffer_filled_in_place])
def test_part_of_losses_changed_in_place_is_refused(change: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(
        RuntimeError, match=r"'(mul_|add_)' changes a part of what was computed from the batch's targets"
    ):
        assert_mixed(lambda z, y: change(F.cross_entropy(z, y, reduction="none"), y), normal(N, K), CLASSES)


@pytest.mark.parametrize(
    "keep",
    [
        pytest.param(lambda y: y[torch.arange(N)], id="copied_by_index"),
        pytest.param(lambda y: y.view(2, 2).t().reshape(-1), id="copied_by_reshape"),
        pytest.param(lambda y: y.clone(), id="clone"),
        pytest.param(lambda y: y % 3, id="remainder"),
        pytest.param(lambda y: y.view(N), id="view"),
        pytest.param(lambda y: y.view(2, 2).t().t().reshape(-1), id="view_by_reshape"),
    ],
)
def test_targets_changed_in_place_after_a_use(keep: Callable[[Tensor], Tensor]) -> None:
    def loss(z: Tensor, y: Tensor) -> Tensor:
        before = keep(y)
        y[y == 4] = 0
        return F.cross_entropy(z, before) + F.cross_entropy(2 * z, y)

    assert_mixed(loss, normal(N, K), CLASSES)


def test_a_part_of_losses_changed_in_place_is_not_silently_wrong() -> None:
    assert_mixed_or_refused(losses_added_to_a_tensor, normal(N, K), CLASSES)


@each(
    randn_like=lambda z, y: F.mse_loss(z, y + torch.randn_like(y)),
    randn=lambda z, y: F.mse_loss(z, y + torch.randn(y.shape, dtype=y.dtype)),
    bernoulli_=lambda z, y: F.mse_loss(z, y * torch.empty_like(y).bernoulli_(0.5)),
    uniform_=lambda z, y: F.mse_loss(z, y + y.new_empty(N, 3).uniform_()),
    normal_of_a_clone=lambda z, y: F.mse_loss(z, y + y.clone().normal_()),
    bernoulli=lambda z, y: F.mse_loss(z, torch.bernoulli(y.sigmoid())),
    multinomial=lambda z, y: z.gather(1, torch.multinomial(y.exp(), 2)).square().mean(),
    normal=lambda z, y: F.mse_loss(z, torch.normal(y)),
    distribution=lambda z, y: F.mse_loss(z, torch.distributions.Normal(y, 1.0).sample()),
    dropout_of_losses=lambda z, y: F.dropout((z - y).square()).mean(),
)
def test_noise_is_the_same_for_both_halves(loss: Loss) -> None:
    assert_mixed_or_refused(loss, normal(N, 3), VALUES)


@each(
    randn_like=lambda z, y: F.mse_loss(z, y + torch.randn_like(y)),
    normal_of_a_clone=lambda z, y: F.mse_loss(z, y + y.clone().normal_()),
    dropout=lambda z, y: F.mse_loss(z, F.dropout(y)),
    dropout_of_losses=lambda z, y: F.dropout((z - y).square()).mean(),
    bernoulli=lambda z, y: F.mse_loss(z, torch.bernoulli(y.sigmoid())),
)
def test_noise_moves_the_random_state_as_without_mixing(loss: Loss) -> None:
    states = []
    plan, mixer = start()
    for targets in (TargetPair.wrap(VALUES, plan, mixer), VALUES):
        torch.manual_seed(0)
        loss(normal(N, 3).requires_grad_(), targets)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_dropout_of_targets_mixes_what_is_left_of_them() -> None:
    def expected(z: Tensor, own: Sequence[Tensor], partners: Sequence[Tensor]) -> Tensor:
        torch.manual_seed(0)
        dropped = F.dropout(own[0])
        return LAM * F.mse_loss(z, dropped) + (1 - LAM) * F.mse_loss(z, dropped[PARTNER])

    assert_mixed(lambda z, y: F.mse_loss(z, F.dropout(y)), normal(N, 3), VALUES, expected=expected)


@each(
    features_of_both=lambda z, y, net: F.mse_loss(net(z), net(y)),
    features_of_the_difference=lambda z, y, net: net(z - y).square().mean(),
)
def test_perceptual_loss(loss: Loss) -> None:
    frozen = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double().requires_grad_(False)
    assert_mixed(lambda z, y: loss(z, y, frozen), normal(N, 3), VALUES)


@every_reduction
@each_with_data(
    cross_entropy=(F.cross_entropy, normal(N, K), CLASSES),
    label_smoothing=(lambda z, y, **o: F.cross_entropy(z, y, label_smoothing=0.1, **o), normal(N, K), CLASSES),
    soft_targets=(F.cross_entropy, normal(N, K), SOFT),
    segmentation=(F.cross_entropy, normal(N, K, 2, 3), MAPS),
    mse=(F.mse_loss, normal(N, 3), VALUES),
    l1=(F.l1_loss, normal(N, 3), VALUES),
    huber=(F.huber_loss, normal(N, 3), VALUES),
    bce=(lambda z, y, **o: F.binary_cross_entropy(z.sigmoid(), y, **o), normal(N, K), LABELS),
    bce_with_logits=(
        lambda z, y, **o: F.binary_cross_entropy_with_logits(z, y, pos_weight=CLASS_WEIGHTS, **o),
        normal(N, K),
        LABELS,
    ),
    module=(lambda z, y, reduction: nn.MSELoss(reduction=reduction)(z, y), normal(N, 3), VALUES),
    gaussian_nll=(lambda z, y, **o: F.gaussian_nll_loss(z[:, :3], y, z[:, 3:].exp(), **o), normal(N, 6), VALUES),
    multi_margin=(F.multi_margin_loss, normal(N, K), CLASSES),
    multilabel_soft_margin=(F.multilabel_soft_margin_loss, normal(N, K), LABELS),
)
def test_one_lam_per_sample_weights_each_row(loss: Loss, logits: Tensor, targets: list[Tensor], reduction: str) -> None:
    expected = _by_row(lambda z, y: loss(z, y, reduction="none"), reduction)
    assert_mixed(lambda z, y: loss(z, y, reduction=reduction), logits, *targets, per_sample=True, expected=expected)


def test_one_lam_per_sample_with_the_sum_by_the_batch() -> None:
    expected = _by_row(lambda z, y: F.kl_div(z.log_softmax(1), y, reduction="none"), "batchmean")
    loss = nn.KLDivLoss(reduction="batchmean")
    assert_mixed(lambda z, y: loss(z.log_softmax(1), y), normal(N, K), SOFT, per_sample=True, expected=expected)


@each(
    one_hot=lambda z, y, v: -(z.log_softmax(1) * F.one_hot(y, K)).sum(1),
    gather=lambda z, y, v: -z.log_softmax(1).gather(1, y[:, None]),
    index=lambda z, y, v: -z.log_softmax(1)[torch.arange(N), y],
    index_by_range=lambda z, y, v: -z.log_softmax(1)[range(N), y],
    focal=lambda z, y, v: focal_rows(z, y),
    sample_weights=lambda z, y, v: F.cross_entropy(z, y, reduction="none") * v[:, 0],
    squared_error=lambda z, y, v: (z[:, :3] - v).square(),
    distance=lambda z, y, v: (z[:, :3] - v).norm(dim=1),
    log_cosh=lambda z, y, v: torch.log(torch.cosh(z[:, :3] - v)).sum(1),
)
def test_one_lam_per_sample_in_rows_written_by_hand(loss: Loss) -> None:
    assert_mixed(lambda *a: loss(*a).mean(), normal(N, K), CLASSES, VALUES, per_sample=True, expected=_by_row(loss))


@each(sum=lambda z, y: F.cross_entropy(z, y) + F.multi_margin_loss(z, y), total_of_zeros=total_of_zeros)
def test_one_lam_per_sample_in_a_sum_of_losses(loss: Loss) -> None:
    def rows(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y, reduction="none") + F.multi_margin_loss(z, y, reduction="none")

    assert_mixed(loss, normal(N, K), CLASSES, per_sample=True, expected=_by_row(rows))


def _weighted_cross_entropy(z: Tensor, own: Sequence[Tensor], partners: Sequence[Tensor]) -> Tensor:
    """Each term has a normaliser of its own, as without mixing."""
    losses = [F.cross_entropy(z, y, CLASS_WEIGHTS, ignore_index=1, reduction="none") for y in (*own, *partners)]
    totals = [(CLASS_WEIGHTS[y] * (y != 1)).sum() for y in (*own, *partners)]
    lam = LAMS.double()
    return (lam * losses[0]).sum() / totals[0] + ((1 - lam) * losses[1]).sum() / totals[1]


@each(
    targets_alone=lambda z, y: F.cross_entropy(z, y, CLASS_WEIGHTS, ignore_index=1),
    logits_that_met_targets=lambda z, y: F.cross_entropy(z + 0 * F.one_hot(y, K), y, CLASS_WEIGHTS, ignore_index=1),
)
def test_one_lam_per_sample_with_class_weights_and_ignored_classes(loss: Loss) -> None:
    assert_mixed_or_refused(loss, normal(N, K), CLASSES, per_sample=True, expected=_weighted_cross_entropy)


# Not l1_loss: torch does not hand its weight on to tensor subclasses.
@pytest.mark.parametrize("loss", [F.mse_loss, F.huber_loss])
def test_one_lam_per_sample_with_weights_of_elements(loss: Loss) -> None:
    weight = normal(N, 3, seed=6).abs()
    assert_mixed_or_refused(
        lambda z, y: loss(z, y, weight=weight),
        normal(N, 3),
        VALUES,
        per_sample=True,
        expected=_by_row(lambda z, y: loss(z, y, reduction="none") * weight / weight.mean()),
    )


def test_one_lam_per_sample_in_ctc() -> None:
    def loss(z: Tensor, y: Tensor, lengths: Tensor, reduction: str = "mean") -> Tensor:
        return F.ctc_loss(z.log_softmax(2), y, torch.full((N,), 8), lengths, reduction=reduction)

    expected = _by_row(lambda z, y, lengths: loss(z, y, lengths, reduction="none") / lengths)
    assert_mixed_or_refused(loss, normal(8, N, K), SEQUENCES, LENGTHS, per_sample=True, expected=expected)


@pytest.mark.parametrize(
    "transposed",
    [
        pytest.param(lambda t: t.t(), id="t()"),
        pytest.param(lambda t: t.T, id="T"),
        pytest.param(lambda t: t.mT, id="mT"),
        pytest.param(lambda t: t.swapaxes(0, 1), id="swapaxes"),
        pytest.param(lambda t: t.transpose(0, 1), id="transpose"),
    ],
)
def test_one_lam_per_sample_finds_the_rows_among_as_many_classes(transposed: Callable[[Tensor], Tensor]) -> None:
    assert_mixed_or_refused(
        lambda z, y: -(transposed(z.log_softmax(1)) * transposed(F.one_hot(y, N))).sum(0).mean(),
        normal(N, N),
        SQUARE_CLASSES,
        per_sample=True,
        expected=_by_row(lambda z, y: -(z.log_softmax(1) * F.one_hot(y, N)).sum(1)),
    )


@each(
    sum_over_rows=lambda z, y: (z * F.one_hot(y, N)).sum(0).square().mean(),
    mean_over_rows=lambda z, y: (z * F.one_hot(y, N)).mean(0).exp().mean(),
    product=lambda z, y: (F.one_hot(y, N).double().T @ z).square().mean(),
)
def test_one_lam_per_sample_is_no_lam_per_class(loss: Loss) -> None:
    with pytest.raises(RuntimeError, match=r"one lam per sample.* Use per_sample=False"):
        assert_mixed(loss, normal(N, N), SQUARE_CLASSES, per_sample=True)


@each_with_data(
    flat_targets=(
        lambda z, y: F.cross_entropy(z.movedim(1, -1).reshape(-1, K), y.view(-1)),
        normal(N, K, 3),
        TOKENS % K,
    ),
    rows_in_another_order=(lambda z, y: F.cross_entropy(z, y.flip(0)), normal(N, K), CLASSES),
    rows_by_index=(lambda z, y: F.cross_entropy(z, y[torch.tensor([3, 2, 1, 0])]), normal(N, K), CLASSES),
    valid_rows=(lambda z, y: F.cross_entropy(z.movedim(1, -1)[y != 255], y[y != 255]), normal(N, K, 3), TOKENS),
    topk=(lambda z, y: F.cross_entropy(z, y, reduction="none").topk(2)[0].mean(), normal(N, K), CLASSES),
    root_of_the_mean=(lambda z, y: F.cross_entropy(z, y).sqrt(), normal(N, K), CLASSES),
    square_of_the_mean=(lambda z, y: F.mse_loss(z, y) ** 2, normal(N, 3), VALUES),
    dice=(dice, normal(N, K, 2, 3), MAPS),
)
def test_one_lam_per_sample_refuses_what_is_no_sum_over_rows(loss: Loss, logits: Tensor, targets: list[Tensor]) -> None:
    with pytest.raises(RuntimeError, match=r"one lam per sample.* Use per_sample=False"):
        assert_mixed(loss, logits, *targets, per_sample=True)


def supervised_contrastive(z: Tensor, y: Tensor) -> Tensor:
    mask = torch.eq(y.view(-1, 1), y.view(1, -1)).double()
    return -(mask * (z @ z.T).log_softmax(1)).sum(1).mean()


def contrastive_of_two_views(z: Tensor, y: Tensor) -> Tensor:
    labels, both = y.repeat(2).contiguous().view(-1, 1), torch.cat([z, z])
    return ((both @ both.T) * torch.eq(labels, labels.T)).mean()


def hardest_in_the_batch(z: Tensor, y: Tensor) -> Tensor:
    same = y.expand(N, N).eq(y.expand(N, N).t())
    return torch.cdist(z, z)[same].max()


def halves_of_the_batch(z: Tensor, y: Tensor) -> Tensor:
    (a, b), (first, second) = z.chunk(2), y.chunk(2)
    return ((a - b).square().sum(1) * (first == second)).mean()


def similarity_of_one_hot(z: Tensor, y: Tensor) -> Tensor:
    one_hot = F.one_hot(y, K).double()
    return F.mse_loss(z @ z.T, one_hot @ one_hot.T)


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        pytest.param(supervised_contrastive, "eq", id="supervised_contrastive"),
        pytest.param(contrastive_of_two_views, "eq", id="contrastive_of_two_views"),
        pytest.param(hardest_in_the_batch, "eq", id="hardest_in_the_batch"),
        pytest.param(halves_of_the_batch, "__eq__", id="halves_of_the_batch"),
        pytest.param(similarity_of_one_hot, "__matmul__|matmul", id="similarity_of_one_hot"),
        pytest.param(lambda z, y: ((z @ z.T) * (y[:, None] == y[None])).mean(), "__eq__", id="operator"),
        pytest.param(lambda z, y: F.mse_loss(z @ z.T, (y[:, None] - y).double()), "sub|__sub__", id="difference"),
        pytest.param(lambda z, y: ((z @ z.T) * torch.isin(y, y[:2])).mean(), "isin", id="isin"),
    ],
)
def test_comparison_of_rows_is_refused(loss: Loss, name: str) -> None:
    with pytest.raises(RuntimeError, match=f"'({name})' compares the targets of different rows with each other"):
        assert_mixed(loss, normal(N, K), CLASSES)


def heatmap(z: Tensor, y: Tensor) -> Tensor:
    maps = torch.zeros(N, 4, 4, dtype=z.dtype)
    for i in range(N):
        maps[i, y[i, 0], y[i, 1]] = 1
    return F.mse_loss(z[:, None] * z[:, :, None], maps)


def mask_in_steps(z: Tensor, y: Tensor) -> Tensor:
    mask = torch.zeros(N, 3, dtype=torch.bool)
    mask[y == 3] = True
    mask[:, 0] = False
    mask |= y == 1
    return (z[:, :3] * mask).square().sum()


PLACES = torch.tensor([[0, 1, 3], [2, 3, 1], [1, 1, 3], [0, 2, 2]])


@each(
    difference_of_columns=lambda z, y: (z * (y[:, 1] - y[:, 0])[:, None]).square().mean(),
    differences_along_a_row=lambda z, y: F.mse_loss(z[:, :2], (y[:, 1:] - y[:, :-1]).double()),
    changes_along_a_row=lambda z, y: (z[:, :2] * (y[:, 1:] == y[:, :-1])).square().sum(),
    outer_product_of_a_row=lambda z, y: F.mse_loss(
        z[:, :3, None] * z[:, None, :3], (y[:, :, None] * y[:, None]).double()
    ),
    product_of_matrices=lambda z, y: F.mse_loss(z[:, :3, None] @ z[:, None, :3], (y[:, :, None] @ y[:, None]).double()),
    squares=lambda z, y: F.mse_loss(z[:, :3], (y * y).double()),
    centred_rows=lambda z, y: F.mse_loss(z[:, :3], y - y.double().mean(1, keepdim=True)),
    scaled_by_the_largest=lambda z, y: F.mse_loss(z[:, :3], y / y.max()),
    softmax_over_the_batch=lambda z, y: -(y.double().softmax(0) * z[:, :3].log_softmax(0)).sum(),
    two_masks=lambda z, y: (z[:, :3] * ((y > 0) & (y < 3))).square().sum(),
    mask_in_steps=mask_in_steps,
    heatmap=heatmap,
)
def test_comparison_within_a_row_is_followed(loss: Loss) -> None:
    assert_mixed(loss, normal(N, N), PLACES)


def valid_by_where(z: Tensor, y: Tensor) -> Tensor:
    valid = y != 255
    losses = F.cross_entropy(z, torch.where(valid, y, 0), reduction="none")
    return (losses * valid).sum() / valid.sum().clamp(min=1)


def valid_by_product(z: Tensor, y: Tensor) -> Tensor:
    valid = (y != 255) & (y != 3)
    return (F.cross_entropy(z, y * valid, reduction="none") * valid).sum()


@each(where=valid_by_where, product=valid_by_product)
@pytest.mark.parametrize("number", [1, 2, N], ids=["one_chunk", "two_chunks", "row_by_row"])
def test_masks_of_a_part_of_the_batch_are_followed(loss: Loss, number: int) -> None:
    assert_mixed(lambda z, y: sum(map(loss, z.chunk(number), y.chunk(number))), normal(N, K, 3), TOKENS)


def if_of_a_row(z: Tensor, y: Tensor) -> Tensor:
    return sum(z[i].norm() if y[i] > 1 else z[i].sum() for i in range(N))


def if_of_two_rows(z: Tensor, y: Tensor) -> Tensor:
    pairs = [(i, j) for i in range(N) for j in range(i) if y[i] == y[j]]
    return sum((z[i] - z[j]).norm() for i, j in pairs) + F.cross_entropy(z, y)


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        pytest.param(if_of_a_row, "__bool__", id="if_of_a_row"),
        pytest.param(if_of_two_rows, "__bool__", id="if_of_two_rows"),
        pytest.param(lambda z, y: z[0, : [1, 2, 3, 4, 5][y[0]]].sum(), "__index__", id="index_of_a_list"),
    ],
)
def test_decision_by_the_class_of_a_row_is_refused(loss: Loss, name: str) -> None:
    with pytest.raises(
        RuntimeError, match=rf"decides by the class of single rows \('{name}' of a target\)|different rows"
    ):
        assert_mixed(loss, normal(N, K), torch.tensor([0, 1, 1, 2]))


def same_by_list(z: Tensor, y: Tensor) -> Tensor:
    same = torch.tensor((y[:, None] == y).tolist())
    return ((z @ z.T) * same).sum() + F.cross_entropy(z, y)


def same_by_numpy(z: Tensor, y: Tensor) -> Tensor:
    same = torch.from_numpy((y[:, None] == y).numpy())
    return ((z @ z.T) * same).sum() + F.cross_entropy(z, y)


def classes_by_numpy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, torch.from_numpy(y.cpu().numpy())) + F.cross_entropy(z, y)


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        pytest.param(same_by_list, "tolist", id="comparison_by_list"),
        pytest.param(same_by_numpy, "numpy", id="comparison_by_numpy"),
        pytest.param(classes_by_numpy, "numpy", id="classes_by_numpy"),
        pytest.param(lambda z, y: sum(z[i, int(y[i])] for i in range(N)) + F.cross_entropy(z, y), "__int__", id="int"),
        pytest.param(lambda z, y: sum(z[i, y[i].item()] for i in range(N)) + F.cross_entropy(z, y), "item", id="item"),
    ],
)
def test_numbers_taken_out_of_targets_are_noted(loss: Loss, name: str) -> None:
    plan, mixer = start()
    loss(normal(N, K).requires_grad_(), TargetPair.wrap(torch.tensor([0, 1, 1, 2]), plan, mixer))
    assert mixer.reads == {name}


class _SquaredError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, prediction: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(prediction - targets)
        return (prediction - targets).square().sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return 2 * grad * ctx.saved_tensors[0], None


def test_loss_with_a_backward_of_its_own_is_refused() -> None:
    plan, mixer = start()
    loss = _SquaredError.apply(normal(N, 3).requires_grad_(), TargetPair.wrap(VALUES, plan, mixer))
    assert mixer.losses == []  # so that a step that returns it is refused
    assert not getattr(loss, "is_mixed", False)
    with pytest.raises(RuntimeError, match=r"'mul' got what a torch.autograd.Function made of the batch's targets"):
        loss * 2


def test_targets_that_go_on_through_the_network_are_refused() -> None:
    plan, mixer = start()
    mixed = normal(N, K).requires_grad_() * F.one_hot(TargetPair.wrap(CLASSES, plan, mixer), K)
    with pytest.raises(RuntimeError, match=r"further through the network\. Targets can be mixed in the loss only"):
        F.linear(mixed, nn.Parameter(normal(2, K, seed=5)))


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        pytest.param(F.cross_entropy, "cross_entropy", id="cross_entropy"),
        pytest.param(lambda z, y: F.cross_entropy(z, y, reduction="none"), "cross_entropy", id="unreduced"),
        pytest.param(lambda z, y: F.mse_loss(z, F.one_hot(y, K).double()), "mse_loss", id="mse_loss"),
    ],
)
def test_loss_before_the_layer_was_mixed_is_refused(loss: Loss, name: str) -> None:
    plan, mixer = start(has_mixed=False)
    with pytest.raises(RuntimeError, match=f"{name} was computed before layer 'input' mixed the batch"):
        loss(normal(N, K).requires_grad_(), TargetPair.wrap(CLASSES, plan, mixer))
    assert mixer.losses == []


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


compiles = pytest.mark.usefixtures("fresh_compiler")
# both by dynamo itself
quietly = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
)


@compiles
@quietly
@each_with_data(
    cross_entropy=(F.cross_entropy, normal(N, K), CLASSES),
    one_hot=(lambda z, y: -(z.log_softmax(1) * F.one_hot(y, K)).sum(1).mean(), normal(N, K), CLASSES),
    root=(lambda z, y: F.mse_loss(z, y).sqrt(), normal(N, 3), VALUES),
    focal=(lambda z, y: focal_rows(z, y).mean(), normal(N, K), CLASSES),
    columns=(lambda z, y: F.cross_entropy(z, y.unbind(1)[1] % K), normal(N, K), TOKENS),
    chunks=(lambda z, y: sum(map(F.mse_loss, z.chunk(2), y.chunk(2))), normal(N, 3), VALUES),
    topk=(lambda z, y: F.cross_entropy(z, y, reduction="none").topk(2)[0].mean(), normal(N, K), CLASSES),
    noise=(lambda z, y: F.mse_loss(z, y + torch.randn_like(y)), normal(N, 3), VALUES),
)
def test_compiled_loss(loss: Loss, logits: Tensor, targets: list[Tensor]) -> None:
    """Compare the value alone: what the step returns is made plain by the step."""
    compiled = torch.compile(loss, backend="eager")

    def value(z: Tensor, *targets: Tensor) -> Tensor:
        mixed = compiled(z, *targets) if isinstance(targets[0], TargetPair) else loss(z, *targets)
        if isinstance(mixed, TargetPair):
            plan, mixer = targets[0].plan, targets[0].mixer
            mixed = TargetPair.wrap(mixed.value, plan, mixer)
            mixed.is_mixed = True
        return mixed

    assert_mixed_or_refused(value, logits, *targets)


@compiles
@quietly
def test_result_of_a_compiled_loss_ends_with_the_step() -> None:
    plan, mixer = start()
    compiled = torch.compile(F.cross_entropy, backend="eager")
    loss = compiled(normal(N, K).requires_grad_(), TargetPair.wrap(CLASSES, plan, mixer))
    mixer.stop()
    assert type(loss) is Tensor
