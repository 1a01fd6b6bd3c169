"""Any loss on mixed targets is ``lam * loss(own) + (1 - lam) * loss(partner)``, in value and gradient, or is refused."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.testing import assert_close
from torch.utils._pytree import tree_map_only

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
    shown = mixed.value.detach().clone()
    mixer.stop()
    assert type(mixed) is Tensor
    assert torch.equal(shown, mixed)

    if expected is None:

        def expected(logits: Tensor, own: Sequence[Tensor], partners: Sequence[Tensor]) -> Tensor:
            halves = []
            for half in (own, partners):
                torch.manual_seed(0)
                halves.append(loss(logits, *half))
            return LAM * halves[0] + (1 - LAM) * halves[1]

    copies = [target.clone() for target in targets]
    plain = expected(inputs[1], copies, [target[partner] for target in targets])
    assert_close(mixed, plain, rtol=1e-12, atol=1e-14)
    assert not any(isinstance(leaf, TargetPair) for leaf in leaves)
    got, wanted = (
        torch.autograd.grad(value.sum(), [rows, *leaves]) for value, rows in zip((mixed, plain), inputs, strict=True)
    )
    assert wanted[0].abs().max() > 0
    assert_close(list(got), list(wanted), rtol=1e-12, atol=1e-14)
    return mixer


def assert_mixed_or_refused(loss: Loss, logits: Tensor, *targets: Tensor, **settings: Any) -> None:
    """Where there is no knowing that a loss can be followed: it must not be silently wrong."""
    try:
        assert_mixed(loss, logits, *targets, **settings)
    except RuntimeError as error:
        assert "targets" in str(error), error  # ours, not one of torch


CLASSES = torch.tensor([0, 1, 4, 2])
BINARY = torch.tensor([0, 1, 1, 0])
TOKENS = torch.tensor([[0, 1, 2], [3, 255, 0], [255, 4, 1], [2, 2, 255]])
UNEVEN = torch.tensor([[0, 1, 2], [255, 255, 0], [255, 4, 1], [255, 255, 255]])
MAPS = torch.arange(N * 6).view(N, 2, 3) % K
LABELS = (normal(N, K, seed=1) > 0).double()
SOFT = normal(N, K, seed=2).softmax(1)
VALUES = normal(N, 3, seed=3)
WEIGHTS = normal(N, seed=4).abs()
SEQUENCES, LENGTHS = torch.tensor([[1, 2, 3], [2, 4, 0], [1, 0, 0], [3, 3, 1]]), torch.tensor([3, 2, 1, 3])
CLASS_WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 1.0, 3.0], dtype=torch.float64)

every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


@every_reduction
@pytest.mark.parametrize(
    ("logits", "targets", "options"),
    [
        pytest.param(normal(N, K), CLASSES, {}, id="plain"),
        pytest.param(normal(N, K), CLASSES, {"weight": CLASS_WEIGHTS}, id="weight"),
        pytest.param(normal(N, K), CLASSES, {"ignore_index": 1}, id="ignore_index"),
        pytest.param(normal(N, K), CLASSES, {"label_smoothing": 0.1}, id="label_smoothing"),
        pytest.param(
            normal(N, K),
            CLASSES,
            {"weight": CLASS_WEIGHTS, "ignore_index": 1, "label_smoothing": 0.1},
            id="all_options",
        ),
        pytest.param(normal(N, K), SOFT, {"weight": CLASS_WEIGHTS, "label_smoothing": 0.1}, id="soft_targets"),
        pytest.param(normal(N, K, 3), TOKENS, {"ignore_index": 255}, id="sequences"),
        pytest.param(normal(N, K, 2, 3), MAPS, {"weight": CLASS_WEIGHTS, "ignore_index": 1}, id="segmentation"),
    ],
)
def test_cross_entropy(logits: Tensor, targets: Tensor, options: dict[str, Any], reduction: str) -> None:
    mixer = assert_mixed(lambda z, y: F.cross_entropy(z, y, reduction=reduction, **options), logits, targets)
    assert mixer.losses == ["cross_entropy"]


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
@pytest.mark.parametrize("option", ["size_average", "reduce"])
def test_cross_entropy_with_its_old_options(option: str) -> None:
    assert_mixed(lambda z, y: F.cross_entropy(z, y, **{option: False}), normal(N, K), CLASSES)


@every_reduction
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss")
@pytest.mark.parametrize(
    ("loss", "logits", "targets"),
    [
        pytest.param(
            lambda z, y, **o: F.nll_loss(z.log_softmax(1), y, CLASS_WEIGHTS, ignore_index=1, **o),
            normal(N, K),
            [CLASSES],
            id="nll",
        ),
        pytest.param(
            lambda z, y, **o: F.nll_loss(z.log_softmax(1), y, ignore_index=1, **o),
            normal(N, K, 2, 3),
            [MAPS],
            id="nll_2d",
        ),
        pytest.param(lambda z, y, **o: F.binary_cross_entropy(z.sigmoid(), y, **o), normal(N, K), [LABELS], id="bce"),
        pytest.param(
            lambda z, y, w, **o: F.binary_cross_entropy(z.sigmoid(), y, w, **o),
            normal(N, K),
            [LABELS, SOFT],
            id="bce_with_weights_of_the_batch",
        ),
        pytest.param(
            lambda z, y, **o: F.binary_cross_entropy_with_logits(z, y, pos_weight=CLASS_WEIGHTS, **o),
            normal(N, K),
            [LABELS],
            id="bce_with_logits_multi_label",
        ),
        pytest.param(
            lambda z, y, **o: F.binary_cross_entropy_with_logits(z.squeeze(1), y.double(), **o),
            normal(N, 1),
            [BINARY],
            id="bce_with_logits_binary",
        ),
        pytest.param(lambda z, y, **o: F.kl_div(z.log_softmax(1), y, **o), normal(N, K), [SOFT], id="kl"),
        pytest.param(
            lambda z, y, **o: F.kl_div(z.log_softmax(1), y, log_target=True, **o),
            normal(N, K),
            [SOFT.log()],
            id="kl_log",
        ),
        pytest.param(F.mse_loss, normal(N, 3), [VALUES], id="mse"),
        pytest.param(F.l1_loss, normal(N, 3), [VALUES], id="l1"),
        pytest.param(lambda z, y, **o: F.smooth_l1_loss(z, y, beta=0.3, **o), normal(N, 3), [VALUES], id="smooth_l1"),
        pytest.param(lambda z, y, **o: F.huber_loss(z, y, delta=0.3, **o), normal(N, 3), [VALUES], id="huber"),
        pytest.param(
            lambda z, y, **o: F.gaussian_nll_loss(z[:, :3], y, z[:, 3:].exp(), full=True, **o),
            normal(N, 6),
            [VALUES],
            id="gaussian_nll",
        ),
        pytest.param(
            lambda z, y, **o: F.poisson_nll_loss(z, y, full=True, **o),
            normal(N, 3),
            [torch.arange(12.0, dtype=torch.float64).view(N, 3)],
            id="poisson_nll",
        ),
        pytest.param(
            lambda z, y, lengths, **o: F.ctc_loss(z.log_softmax(2), y, torch.full((N,), 8), lengths, **o),
            normal(8, N, K),
            [SEQUENCES, LENGTHS],
            id="ctc",
        ),
        pytest.param(
            lambda z, y, **o: F.multi_margin_loss(z, y, weight=CLASS_WEIGHTS, **o),
            normal(N, K),
            [CLASSES],
            id="multi_margin",
        ),
        pytest.param(
            F.multilabel_margin_loss,
            normal(N, 3),
            [torch.tensor([[0, -1, 1], [1, 2, -1], [2, -1, 0], [-1, 1, 1]])],
            id="multilabel_margin",
        ),
        pytest.param(F.multilabel_soft_margin_loss, normal(N, K), [LABELS], id="multilabel_soft_margin"),
        pytest.param(F.soft_margin_loss, normal(N, K), [2 * LABELS - 1], id="soft_margin"),
        pytest.param(F.hinge_embedding_loss, normal(N, K), [2 * LABELS - 1], id="hinge_embedding"),
        pytest.param(
            lambda z, y, **o: F.cosine_embedding_loss(z[:, :3], z[:, 3:], 2 * y - 1, **o),
            normal(N, 6),
            [BINARY],
            id="cosine_embedding",
        ),
        pytest.param(
            lambda z, y, **o: F.margin_ranking_loss(z[:, 0], z[:, 1], 2 * y - 1, **o),
            normal(N, 2),
            [BINARY],
            id="margin_ranking",
        ),
    ],
)
def test_functions_of_torch(loss: Loss, logits: Tensor, targets: list[Tensor], reduction: str) -> None:
    assert_mixed(lambda z, *y: loss(z, *y, reduction=reduction), logits, *targets)


def test_kl_divergence_by_the_batch() -> None:
    assert_mixed(lambda z, y: F.kl_div(z.log_softmax(1), y, reduction="batchmean"), normal(N, K), SOFT)


@pytest.mark.parametrize(
    ("loss", "logits", "targets"),
    [
        pytest.param(
            nn.CrossEntropyLoss(CLASS_WEIGHTS, ignore_index=1, label_smoothing=0.1),
            normal(N, K),
            [CLASSES],
            id="CrossEntropy",
        ),
        pytest.param(nn.BCEWithLogitsLoss(pos_weight=CLASS_WEIGHTS), normal(N, K), [LABELS], id="BCEWithLogits"),
        pytest.param(nn.KLDivLoss(reduction="batchmean"), normal(N, K).log_softmax(1), [SOFT], id="KLDiv"),
        pytest.param(nn.MSELoss(), normal(N, 3), [VALUES], id="MSE"),
        pytest.param(nn.SmoothL1Loss(reduction="sum"), normal(N, 3), [VALUES], id="SmoothL1"),
        pytest.param(nn.HuberLoss(delta=0.3), normal(N, 3), [VALUES], id="Huber"),
        pytest.param(nn.PoissonNLLLoss(), normal(N, 3), [VALUES.exp()], id="PoissonNLL"),
        pytest.param(nn.MultiMarginLoss(p=2), normal(N, K), [CLASSES], id="MultiMargin"),
        pytest.param(cross_entropy, normal(N, K), [CLASSES], id="imported_cross_entropy"),
        pytest.param(mse_loss, normal(N, 3), [VALUES], id="imported_mse_loss"),
        pytest.param(lambda z, y: F.cross_entropy(target=y, input=z), normal(N, K), [CLASSES], id="keywords"),
        pytest.param(
            lambda z, y: -torch.distributions.Categorical(logits=z).log_prob(y).mean(),
            normal(N, K),
            [CLASSES],
            id="Categorical",
        ),
        pytest.param(
            lambda z, y: -torch.distributions.Normal(z[:, :3], z[:, 3:].exp()).log_prob(y).mean(),
            normal(N, 6),
            [VALUES],
            id="Normal",
        ),
        pytest.param(
            lambda z, y: -torch.distributions.Bernoulli(logits=z).log_prob(y).mean(),
            normal(N, K),
            [LABELS],
            id="Bernoulli",
        ),
    ],
)
def test_modules_distributions_and_imported_functions(loss: Loss, logits: Tensor, targets: list[Tensor]) -> None:
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


def one_hot_transposed(z: Tensor, y: Tensor) -> Tensor:
    one_hot = torch.zeros(K, N, dtype=z.dtype)
    one_hot.t().scatter_(1, y[:, None], 1.0)
    return (one_hot * z.t()).exp().sum()


def smoothed_one_hot(z: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        targets = torch.empty_like(z)
        targets.fill_(0.02)
        targets.scatter_(1, y.data.unsqueeze(1), 0.9)
    return torch.mean(torch.sum(-targets * z.log_softmax(-1), dim=-1))


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(lambda z, y: -(z.log_softmax(1) * F.one_hot(y, K)).sum(1).mean(), id="one_hot"),
        pytest.param(lambda z, y: -(z.log_softmax(1) * torch.eye(K)[y]).sum(1).mean(), id="rows_of_eye"),
        pytest.param(lambda z, y: -torch.einsum("nk,nk->", z.log_softmax(1), F.one_hot(y, K).double()), id="einsum"),
        pytest.param(
            lambda z, y: -(z.log_softmax(1) @ F.one_hot(y, K).double().T).diagonal().mean(), id="diagonal_of_a_product"
        ),
        pytest.param(lambda z, y: -z.log_softmax(1).gather(1, y[:, None]).squeeze(1).mean(), id="gather"),
        pytest.param(lambda z, y: -z.log_softmax(1)[range(N), y].mean(), id="index_by_range"),
        pytest.param(lambda z, y: -z.log_softmax(1)[torch.arange(len(y)), y].mean(), id="index_by_arange"),
        pytest.param(lambda z, y: -sum(z.log_softmax(1)[i, t] for i, t in enumerate(y)) / N, id="loop_over_targets"),
        pytest.param(lambda z, y: -sum(z.log_softmax(1)[i][y[i]] for i in range(N)) / N, id="loop_over_rows"),
        pytest.param(
            lambda z, y: sum(F.cross_entropy(z[y == k], y[y == k], reduction="sum") for k in range(K)),
            id="loop_over_classes",
        ),
        pytest.param(lambda z, y: sum(z[y == k].mean(0).square().sum() for k in y.unique()), id="mean_of_each_class"),
        pytest.param(one_hot_chained, id="one_hot_by_scatter_chained"),
        pytest.param(one_hot_statement, id="one_hot_by_scatter"),
        pytest.param(one_hot_by_index, id="one_hot_by_index"),
        pytest.param(one_hot_row_by_row, id="one_hot_row_by_row"),
        pytest.param(one_hot_transposed, id="one_hot_through_a_view"),
        pytest.param(smoothed_one_hot, id="smoothed_one_hot"),
    ],
)
def test_cross_entropy_written_by_hand(loss: Loss) -> None:
    assert_mixed(loss, normal(N, K), CLASSES)


def focal(z: Tensor, y: Tensor) -> Tensor:
    ce = F.cross_entropy(z, y, reduction="none")
    return (0.25 * (1 - torch.exp(-ce)) ** 2 * ce).mean()


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
    sums = torch.zeros(K, K, dtype=z.dtype).index_add_(0, y, z)
    means = sums / torch.bincount(y % 3, minlength=K).clamp(min=1)[:, None]
    return (z - means[y]).square().mean() + z.square().mean()


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(focal, id="focal"),
        pytest.param(focal_with_detached_weights, id="focal_with_detached_weights"),
        pytest.param(focal_by_gather, id="focal_by_gather"),
        pytest.param(focal_without_grad, id="focal_without_grad"),
        pytest.param(poly, id="poly"),
        pytest.param(symmetric_cross_entropy, id="symmetric_cross_entropy"),
        pytest.param(
            lambda z, y: ((1 - z.softmax(1).gather(1, y[:, None]) ** 0.7) / 0.7).mean(), id="generalized_cross_entropy"
        ),
        pytest.param(arcface, id="arcface"),
        pytest.param(margin_by_index, id="margin_by_index"),
        pytest.param(margin_by_rows_and_columns, id="margin_by_rows_and_columns"),
        pytest.param(margin_by_subtraction, id="margin_by_subtraction"),
        pytest.param(margin_by_scatter, id="margin_by_scatter"),
        pytest.param(margin_in_flat_logits, id="margin_in_flat_logits"),
        pytest.param(without_the_target, id="logits_without_the_target"),
        pytest.param(multi_class_hinge, id="multi_class_hinge"),
        pytest.param(
            lambda z, y: F.binary_cross_entropy_with_logits(z[:, 1:], (y[:, None] > torch.arange(K - 1)).double()),
            id="ordinal_levels",
        ),
        pytest.param(class_balanced, id="class_balanced"),
        pytest.param(prototypes, id="prototypes"),
    ],
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


@pytest.mark.parametrize(
    ("loss", "logits", "targets"),
    [
        pytest.param(dice, normal(N, K, 2, 3), MAPS, id="dice"),
        pytest.param(jaccard, normal(N, K), LABELS, id="jaccard"),
        pytest.param(focal_tversky, normal(N, K), LABELS, id="focal_tversky"),
        pytest.param(sigmoid_focal, normal(N, K), LABELS, id="sigmoid_focal"),
        pytest.param(asymmetric, normal(N, K), LABELS, id="asymmetric"),
        pytest.param(lovasz, normal(N, K), LABELS, id="lovasz"),
        pytest.param(
            lambda z, y: F.relu(1 - z.squeeze(1) * (2 * y - 1)).mean(), normal(N, 1), BINARY, id="binary_hinge"
        ),
    ],
)
def test_losses_of_labels_and_maps(loss: Loss, logits: Tensor, targets: Tensor) -> None:
    assert_mixed(loss, logits, targets)


def correlation(z: Tensor, y: Tensor) -> Tensor:
    a, b = z - z.mean(), y - y.mean()
    return 1 - (a * b).sum() / (a.norm() * b.norm())


def structural_similarity(z: Tensor, y: Tensor) -> Tensor:
    window = torch.ones(1, 1, 2, 2, dtype=z.dtype) / 4
    z, y = z.view(1, 1, N, 3), y.view(1, 1, N, 3)
    mean_z, mean_y, mean_zy = F.conv2d(z, window), F.conv2d(y, window), F.conv2d(z * y, window)
    return 1 - (2 * mean_zy + 1 - mean_z * mean_y).mean()


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(lambda z, y: torch.sqrt(F.mse_loss(z, y) + 1e-8), id="rmse"),
        pytest.param(
            lambda z, y: (torch.log1p(z.exp()) - torch.log1p(y.exp())).pow(2).mean().sqrt(), id="root_squared_log_error"
        ),
        pytest.param(lambda z, y: torch.log(torch.cosh(z - y)).mean(), id="log_cosh"),
        pytest.param(lambda z, y: torch.max(0.9 * (y - z), -0.1 * (y - z)).mean(), id="pinball"),
        pytest.param(lambda z, y: (z - y).norm(dim=1).mean(), id="distance"),
        pytest.param(lambda z, y: (z - y).abs().amax(1).mean(), id="largest_error"),
        pytest.param(lambda z, y: (z - y).abs().median(), id="median_error"),
        pytest.param(lambda z, y: 1 - F.cosine_similarity(z, y).mean(), id="cosine_similarity"),
        pytest.param(lambda z, y: (torch.fft.rfft(z) - torch.fft.rfft(y)).abs().mean(), id="fourier"),
        pytest.param(lambda z, y: (z - y).diff(dim=1).abs().mean(), id="total_variation"),
        pytest.param(lambda z, y: (z.cumsum(1) - y.cumsum(1)).square().mean(), id="earth_movers"),
        pytest.param(correlation, id="correlation"),
        pytest.param(structural_similarity, id="structural_similarity"),
        pytest.param(lambda z, y: F.mse_loss(z, (y - y.mean(0)) / y.std(0)), id="standardised_targets"),
        pytest.param(lambda z, y: F.mse_loss(z, y / y.abs().sum()), id="normalised_targets"),
    ],
)
def test_losses_of_values(loss: Loss) -> None:
    assert_mixed(loss, normal(N, 3), VALUES)


def test_standardised_targets_with_repeating_partners() -> None:
    assert_mixed(lambda z, y: F.mse_loss(z, (y - y.mean(0)) / y.std(0)), normal(N, 3), VALUES, partner=REPEATING)


def total_of_zeros(z: Tensor, y: Tensor) -> Tensor:
    total = torch.zeros((), dtype=z.dtype)
    total += F.cross_entropy(z, y)
    total += 0.1 * z.square().mean()
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


def total_of_ones(z: Tensor, y: Tensor) -> Tensor:
    total = torch.zeros(1, dtype=z.dtype)
    total.add_(F.cross_entropy(z, y)).mul_(3)
    return total


def losses_in_a_tensor(z: Tensor, y: Tensor) -> Tensor:
    losses = z.new_zeros(2)
    losses[0] = F.cross_entropy(z, y)
    losses[1] = z.square().mean()
    return (losses * torch.tensor([1.0, 2.0])).sum()


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(
            lambda z, y: 0.5 * F.cross_entropy(z, y) + 2 * F.multi_margin_loss(z, y) + z.abs().sum(), id="weighted_sum"
        ),
        pytest.param(total_of_zeros, id="total_of_zeros"),
        pytest.param(total_of_the_first, id="total_of_the_first"),
        pytest.param(total_of_an_unmixed_loss, id="total_of_an_unmixed_loss"),
        pytest.param(total_of_ones, id="total_in_place"),
        pytest.param(lambda z, y: sum([F.cross_entropy(z, y), F.multi_margin_loss(z, y)]), id="sum_of_a_list"),
        pytest.param(
            lambda z, y: torch.stack([F.cross_entropy(z, y), F.multi_margin_loss(z, y), z.abs().mean()]).mean(),
            id="stack",
        ),
        pytest.param(lambda z, y: torch.stack([F.cross_entropy(z, y), z.mean()]).logsumexp(0), id="stack_logsumexp"),
        pytest.param(lambda z, y: sum({"ce": F.cross_entropy(z, y), "l2": z.square().mean()}.values()), id="dict"),
        pytest.param(lambda z, y: (F.cross_entropy(z, y) - 1.7).abs() + 1.7, id="flooding"),
        pytest.param(lambda z, y: F.cross_entropy(z, y) / F.cross_entropy(z, y).detach(), id="normalised"),
        pytest.param(lambda z, y: F.cross_entropy(z, y).clamp(max=1.6), id="clamped"),
        pytest.param(lambda z, y: F.cross_entropy(z, y) ** 2, id="squared"),
        pytest.param(losses_in_a_tensor, id="losses_in_a_tensor"),
    ],
)
def test_combinations_of_losses(loss: Loss) -> None:
    assert_mixed(loss, normal(N, K), CLASSES)


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(lambda z, y, s: torch.exp(-s) * F.cross_entropy(z, y) + s, id="log_variance"),
        pytest.param(lambda z, y, s: F.cross_entropy(z, y) / (2 * s**2) + torch.log(s), id="variance"),
        pytest.param(lambda z, y, s: F.cross_entropy(s * z, y), id="temperature"),
    ],
)
def test_loss_with_a_learned_scale(loss: Loss) -> None:
    scale = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    assert_mixed(lambda z, y: loss(z, y, scale), normal(N, K), CLASSES, leaves=[scale])


def distance_to_all_centers(z: Tensor, y: Tensor, centers: Tensor) -> Tensor:
    mask = y.unsqueeze(1).expand(N, K).eq(torch.arange(K).expand(N, K))
    return (torch.cdist(z, centers) * mask.double()).clamp(1e-12, 1e12).sum() / N


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(lambda z, y, c: (z - c[y]).square().sum(1).mean(), id="index"),
        pytest.param(lambda z, y, c: (z - F.embedding(y, c)).square().sum(1).mean(), id="embedding"),
        pytest.param(lambda z, y, c: (z - c.index_select(0, y)).square().sum(1).mean(), id="index_select"),
        pytest.param(distance_to_all_centers, id="mask"),
    ],
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


@pytest.mark.parametrize(
    ("loss", "logits", "targets"),
    [
        pytest.param(lambda z, y: F.mse_loss(z, y.float().double()), normal(N), CLASSES, id="float"),
        pytest.param(lambda z, y: F.cross_entropy(z, y.long()), normal(N, K), CLASSES.int(), id="long"),
        pytest.param(lambda z, y: F.mse_loss(z, y.type_as(z)), normal(N), CLASSES, id="type_as"),
        pytest.param(lambda z, y: F.cross_entropy(z, y.to("cpu", torch.int64)), normal(N, K), CLASSES.int(), id="to"),
        pytest.param(lambda z, y: F.cross_entropy(z, y.view(-1)), normal(N, K), CLASSES.view(N, 1), id="view"),
        pytest.param(lambda z, y: F.cross_entropy(z, y.squeeze()), normal(N, K), CLASSES.view(N, 1), id="squeeze"),
        pytest.param(lambda z, y: F.cross_entropy(z, F.one_hot(y).double()), normal(N, K), CLASSES, id="one_hot"),
        pytest.param(lambda z, y: F.cross_entropy(z, y[:, 1]), normal(N, K), TOKENS % K, id="column"),
        pytest.param(lambda z, y: F.cross_entropy(z, y[..., 1:3]), normal(N, K, 2), TOKENS % K, id="columns"),
        pytest.param(
            lambda z, y: F.cross_entropy(z[:, :, :-1], y[:, 1:], ignore_index=255),
            normal(N, K, 3),
            TOKENS,
            id="shifted",
        ),
        pytest.param(lambda z, y: F.mse_loss(z, y["v"]), normal(N, 3), VALUES, id="dict_of_targets"),
        pytest.param(
            lambda z, y: F.cross_entropy(z.flatten(0, 1), y[:, None].repeat(1, 2).flatten()),
            normal(N, 2, K),
            CLASSES,
            id="repeat",
        ),
        pytest.param(
            lambda z, y: F.cross_entropy(z.flatten(0, 1), y.repeat_interleave(2)),
            normal(N, 2, K),
            CLASSES,
            id="interleave",
        ),
        pytest.param(
            lambda z, y: sum(F.cross_entropy(*part) for part in zip(z.chunk(2), y.chunk(2), strict=True)),
            normal(N, K),
            CLASSES,
            id="chunks",
        ),
        pytest.param(
            lambda z, y: F.cross_entropy(z.permute(0, 2, 3, 1).reshape(-1, K), y.reshape(-1)),
            normal(N, K, 2, 3),
            MAPS,
            id="flat_maps",
        ),
        pytest.param(
            lambda z, y: F.cross_entropy(z, F.interpolate(y[:, None].float(), scale_factor=2).squeeze(1).long()),
            normal(N, K, 4, 6),
            MAPS,
            id="enlarged_maps",
        ),
    ],
)
def test_targets_that_are_prepared_first(loss: Loss, logits: Tensor, targets: Tensor) -> None:
    if loss.__code__.co_consts and "v" in loss.__code__.co_consts:
        assert_mixed(lambda z, y: loss(z, {"v": y}), logits, targets)
    else:
        assert_mixed(loss, logits, targets)


def masked_sum(z: Tensor, y: Tensor) -> Tensor:
    valid = y != 255
    losses = F.cross_entropy(z, torch.where(valid, y, 0), reduction="none")
    return (losses * valid).sum() / valid.sum()


def two_masks_of_flat_targets(z: Tensor, y: Tensor) -> Tensor:
    flat, logits = y.view(-1), z.permute(0, 2, 1).reshape(-1, K)
    valid = (flat != 255) & (flat != 4)
    return (F.cross_entropy(logits, flat * valid, reduction="none") * valid).sum() / valid.sum()


def weights_of_valid_targets(z: Tensor, y: Tensor) -> Tensor:
    targets = y[y != 255]
    weights = CLASS_WEIGHTS[targets] * (targets > 1)
    losses = F.cross_entropy(z.permute(0, 2, 1)[y != 255], targets, reduction="none")
    return (losses * weights).sum() / weights.sum()


def nonzero_of_valid_targets(z: Tensor, y: Tensor) -> Tensor:
    rows = (y.view(-1) != 255).nonzero().squeeze(1)
    logits = z.permute(0, 2, 1).reshape(-1, K).index_select(0, rows)
    return F.cross_entropy(logits, y.view(-1).index_select(0, rows))


def mask_then_change_targets(z: Tensor, y: Tensor) -> Tensor:
    valid = y != 255
    y[~valid] = 0
    return (F.cross_entropy(z, y, reduction="none") * valid).sum() / valid.sum()


def losses_at_valid_targets(z: Tensor, y: Tensor) -> Tensor:
    losses = torch.zeros(N, 3, dtype=z.dtype)
    valid = y != 255
    losses[valid] = F.cross_entropy(z.permute(0, 2, 1)[valid], y[valid], reduction="none")
    return losses.mean()


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(lambda z, y: F.cross_entropy(z.permute(0, 2, 1)[y != 255], y[y != 255]), id="valid_rows"),
        pytest.param(nonzero_of_valid_targets, id="nonzero"),
        pytest.param(
            lambda z, y: F.cross_entropy(z, y, ignore_index=255, reduction="none")[y != 255].mean(), id="valid_losses"
        ),
        pytest.param(
            lambda z, y: F.cross_entropy(z, y, ignore_index=255, reduction="none").masked_select(y != 255).mean(),
            id="masked_select",
        ),
        pytest.param(masked_sum, id="masked_sum"),
        pytest.param(weights_of_valid_targets, id="weights_of_valid_targets"),
        pytest.param(two_masks_of_flat_targets, id="two_masks_of_flat_targets"),
        pytest.param(mask_then_change_targets, id="mask_then_change_targets"),
        pytest.param(losses_at_valid_targets, id="losses_at_valid_targets"),
    ],
)
@pytest.mark.parametrize(
    ("targets", "partner"),
    [pytest.param(TOKENS, PARTNER, id="even"), pytest.param(UNEVEN, REPEATING, id="ragged_halves")],
)
def test_valid_targets(loss: Loss, targets: Tensor, partner: Tensor) -> None:
    assert_mixed(loss, normal(N, K, 3), targets, partner=partner)


@pytest.mark.parametrize(
    "size",
    [
        pytest.param(len, id="len"),
        pytest.param(Tensor.numel, id="numel"),
        pytest.param(lambda y: y.shape[0], id="shape"),
        pytest.param(lambda y: y.size(0), id="size"),
    ],
)
def test_size_of_a_half_is_not_taken_for_the_others(size: Callable[[Tensor], int]) -> None:
    def loss(z: Tensor, y: Tensor) -> Tensor:
        valid = y != 255
        return F.cross_entropy(z.permute(0, 2, 1)[valid], y[valid], reduction="sum") / size(y[valid])

    assert_mixed(loss, normal(N, K, 3), TOKENS)
    assert_mixed_or_refused(loss, normal(N, K, 3), UNEVEN, partner=REPEATING)


def hard_by_index(z: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(z, y, reduction="none")
    return losses[losses.topk(2).indices].mean()


def hard_by_threshold(z: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(z, y, reduction="none")
    threshold = losses.detach().sort(descending=True)[0][1]
    return losses[losses >= threshold].mean()


def hard_without_grad(z: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        rows = F.cross_entropy(z, y, reduction="none").topk(2).indices
    return F.cross_entropy(z[rows], y[rows])


def hard_by_count(z: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(z, y, reduction="none")
    hard = losses > 2.0
    return (losses * hard).sum() / hard.sum()


def easy_losses_set_to_zero(z: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(z, y, reduction="none")
    losses[losses < 2.0] = 0
    return losses.mean()


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(lambda z, y: F.cross_entropy(z, y, reduction="none").topk(2)[0].mean(), id="topk"),
        pytest.param(hard_by_index, id="index"),
        pytest.param(hard_by_threshold, id="threshold"),
        pytest.param(hard_without_grad, id="without_grad"),
        pytest.param(hard_by_count, id="count"),
        pytest.param(easy_losses_set_to_zero, id="set_to_zero"),
        pytest.param(lambda z, y: F.cross_entropy(z, y, reduction="none").max(), id="max"),
        pytest.param(
            lambda z, y: (lambda losses: losses[losses.argmax()])(F.cross_entropy(z, y, reduction="none")), id="argmax"
        ),
        pytest.param(
            lambda z, y: (lambda losses: (losses.softmax(0).detach() * losses).sum())(
                F.cross_entropy(z, y, reduction="none")
            ),
            id="softmax_weights",
        ),
    ],
)
def test_hard_examples(loss: Loss) -> None:
    losses = F.cross_entropy(normal(N, K), CLASSES, reduction="none")
    assert 0 < (losses > 2.0).sum() < N
    assert_mixed(loss, normal(N, K), CLASSES)


def weighted_in_place(z: Tensor, y: Tensor, w: Tensor) -> Tensor:
    losses = F.cross_entropy(z, y, reduction="none")
    losses *= w
    return losses.mean()


def weighted_by_method_in_place(z: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="none").mul_(w).mean()


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(lambda z, y, w: (F.cross_entropy(z, y, reduction="none") * w).mean(), id="mean"),
        pytest.param(lambda z, y, w: (F.cross_entropy(z, y, reduction="none") * w).sum() / w.sum(), id="sum_by_sum"),
        pytest.param(lambda z, y, w: (F.cross_entropy(z, y, reduction="none") * (w / w.sum())).sum(), id="normalised"),
        pytest.param(lambda z, y, w: F.cross_entropy(z, y, reduction="none") @ w, id="dot_product"),
        pytest.param(weighted_in_place, id="in_place"),
        pytest.param(weighted_by_method_in_place, id="in_place_by_method"),
    ],
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


def root_in_place(z: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(z, y)
    loss.sqrt_()
    return loss


def part_in_place(z: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(z, y, reduction="none")
    losses[:2].mul_(3)
    return losses.square()


def part_of_a_buffer_in_place(z: Tensor, y: Tensor) -> Tensor:
    losses = torch.zeros(2, N, dtype=z.dtype)
    losses[0].add_(F.cross_entropy(z, y, reduction="none"))
    losses[1].add_(z[:, 0])
    return losses.square().sum()


def at_some_targets_in_place(z: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(z, y, reduction="none")
    losses[y == 0] = 0
    return losses


def targets_added_in_place(z: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(z, y, reduction="none")
    losses += y
    return losses


def buffer_in_place(z: Tensor, y: Tensor) -> Tensor:
    losses = torch.zeros(N, dtype=z.dtype).add_(F.cross_entropy(z, y, reduction="none"))
    losses.clamp_(max=2.0)
    return losses


@pytest.mark.parametrize(
    "loss",
    [
        root_in_place,
        part_in_place,
        part_of_a_buffer_in_place,
        at_some_targets_in_place,
        targets_added_in_place,
        buffer_in_place,
    ],
)
def test_losses_changed_in_place(loss: Loss) -> None:
    assert_mixed_or_refused(loss, normal(N, K), CLASSES)


def copy_of_rows(z: Tensor, y: Tensor) -> Tensor:
    before = y[torch.arange(N)]
    y[y == 4] = 0
    return F.cross_entropy(z, before) + F.cross_entropy(2 * z, y)


def copy_by_reshape(z: Tensor, y: Tensor) -> Tensor:
    before = y.view(2, 2).t().reshape(-1)
    y[y == 4] = 0
    return F.cross_entropy(z, before) + F.cross_entropy(2 * z, y)


def copy_by_clone(z: Tensor, y: Tensor) -> Tensor:
    before = y.clone()
    y[y == 4] = 0
    return F.cross_entropy(z, before) + F.cross_entropy(2 * z, y)


def mask_of_before(z: Tensor, y: Tensor) -> Tensor:
    mask = y > 2
    y.clamp_(max=2)
    return (F.cross_entropy(z, y, reduction="none") * mask).mean()


def view_of_one_hot(z: Tensor, y: Tensor) -> Tensor:
    one_hot = torch.zeros(N, K, dtype=z.dtype)
    flat = one_hot.view(-1)
    one_hot.scatter_(1, y[:, None], 1)
    return (flat * z.view(-1)).sum() + F.cross_entropy(z, y)


@pytest.mark.parametrize("loss", [copy_of_rows, copy_by_reshape, copy_by_clone, mask_of_before, view_of_one_hot])
def test_targets_changed_in_place_after_a_use(loss: Loss) -> None:
    assert_mixed_or_refused(loss, normal(N, K), CLASSES)


@pytest.mark.parametrize(
    "noise",
    [
        pytest.param(torch.randn_like, id="randn_like"),
        pytest.param(lambda y: torch.empty_like(y).bernoulli_(0.5), id="bernoulli_"),
        pytest.param(lambda y: y.new_empty(N, 3).uniform_(), id="uniform_"),
        pytest.param(lambda y: y.clone().normal_(), id="normal_of_a_clone"),
        pytest.param(lambda y: torch.randn(y.shape, dtype=y.dtype), id="randn"),
    ],
)
def test_noise_is_the_same_for_both_halves(noise: Callable[[Tensor], Tensor]) -> None:
    assert_mixed_or_refused(lambda z, y: F.mse_loss(z, y + noise(y)), normal(N, 3), VALUES)


def test_dropout_of_losses_drops_the_same_rows_of_both_halves() -> None:
    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.dropout(F.mse_loss(z, y, reduction="none")).mean()

    assert_mixed_or_refused(loss, normal(N, 3), VALUES)


def test_dropout_of_targets_mixes_what_is_left_of_them() -> None:
    def expected(z: Tensor, own: Sequence[Tensor], partners: Sequence[Tensor]) -> Tensor:
        torch.manual_seed(0)
        dropped = F.dropout(own[0])
        return LAM * F.mse_loss(z, dropped) + (1 - LAM) * F.mse_loss(z, dropped[PARTNER])

    assert_mixed(lambda z, y: F.mse_loss(z, F.dropout(y)), normal(N, 3), VALUES, expected=expected)


class Frozen(nn.Module):
    """A teacher, or a perceptual network: its weights are not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(6, 3, seed=5), requires_grad=False)

    def forward(self, rows: Tensor) -> Tensor:
        return F.linear(rows, self.weight).tanh()


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(lambda z, y, net: F.mse_loss(net(z), net(y)), id="features_of_both"),
        pytest.param(lambda z, y, net: net(z - y).square().mean(), id="features_of_the_difference"),
    ],
)
def test_perceptual_loss(loss: Loss) -> None:
    net = Frozen()
    assert_mixed(lambda z, y: loss(z, y, net), normal(N, 3), VALUES)


def _by_row(loss: Loss, reduce: Callable[[Tensor], Tensor]) -> Loss:
    """The reference for one lam per sample: rows are weighted, then summed up."""

    def expected(z: Tensor, own: Sequence[Tensor], partners: Sequence[Tensor]) -> Tensor:
        rows, others = loss(z, *own), loss(z, *partners)
        lam = LAMS.double().view(N, *[1] * (rows.dim() - 1))
        return reduce(lam * rows + (1 - lam) * others)

    return expected


REDUCE: dict[str, Callable[[Tensor], Tensor]] = {"mean": Tensor.mean, "sum": Tensor.sum, "none": lambda rows: rows}


@every_reduction
@pytest.mark.parametrize(
    ("loss", "logits", "targets"),
    [
        pytest.param(F.cross_entropy, normal(N, K), CLASSES, id="cross_entropy"),
        pytest.param(
            lambda z, y, **o: F.cross_entropy(z, y, label_smoothing=0.1, **o),
            normal(N, K),
            CLASSES,
            id="label_smoothing",
        ),
        pytest.param(F.cross_entropy, normal(N, K), SOFT, id="soft_targets"),
        pytest.param(F.cross_entropy, normal(N, K, 2, 3), MAPS, id="segmentation"),
        pytest.param(F.mse_loss, normal(N, 3), VALUES, id="mse"),
        pytest.param(F.l1_loss, normal(N, 3), VALUES, id="l1"),
        pytest.param(F.huber_loss, normal(N, 3), VALUES, id="huber"),
        pytest.param(lambda z, y, **o: F.binary_cross_entropy(z.sigmoid(), y, **o), normal(N, K), LABELS, id="bce"),
        pytest.param(
            lambda z, y, **o: F.binary_cross_entropy_with_logits(z, y, pos_weight=CLASS_WEIGHTS, **o),
            normal(N, K),
            LABELS,
            id="bce_with_logits",
        ),
        pytest.param(lambda z, y, reduction: nn.MSELoss(reduction=reduction)(z, y), normal(N, 3), VALUES, id="module"),
        pytest.param(
            lambda z, y, **o: F.gaussian_nll_loss(z[:, :3], y, z[:, 3:].exp(), **o),
            normal(N, 6),
            VALUES,
            id="gaussian_nll",
        ),
        pytest.param(F.multi_margin_loss, normal(N, K), CLASSES, id="multi_margin"),
    ],
)
def test_one_lam_per_sample_weights_each_row(loss: Loss, logits: Tensor, targets: Tensor, reduction: str) -> None:
    expected = _by_row(lambda z, y: loss(z, y, reduction="none"), REDUCE[reduction])
    assert_mixed(lambda z, y: loss(z, y, reduction=reduction), logits, targets, per_sample=True, expected=expected)


def test_one_lam_per_sample_with_the_sum_by_the_batch() -> None:
    expected = _by_row(lambda z, y: F.kl_div(z.log_softmax(1), y, reduction="none"), lambda rows: rows.sum() / N)
    loss = nn.KLDivLoss(reduction="batchmean")
    assert_mixed(lambda z, y: loss(z.log_softmax(1), y), normal(N, K), SOFT, per_sample=True, expected=expected)


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(lambda z, y, v: -(z.log_softmax(1)[:, :K] * F.one_hot(y, K)).sum(1), id="one_hot"),
        pytest.param(lambda z, y, v: (z[:, :3] - v).square(), id="squared_error"),
        pytest.param(lambda z, y, v: (z[:, :3] - v).norm(dim=1), id="distance"),
        pytest.param(lambda z, y, v: focal_rows(z, y), id="focal"),
        pytest.param(lambda z, y, v: F.cross_entropy(z, y, reduction="none") * v[:, 0], id="sample_weights"),
        pytest.param(lambda z, y, v: torch.log(torch.cosh(z[:, :3] - v)).sum(1), id="log_cosh"),
    ],
)
def test_one_lam_per_sample_in_rows_written_by_hand(rows: Loss) -> None:
    assert_mixed(
        lambda z, y, v: rows(z, y, v).mean(),
        normal(N, K),
        CLASSES,
        VALUES,
        per_sample=True,
        expected=_by_row(rows, Tensor.mean),
    )


def focal_rows(z: Tensor, y: Tensor) -> Tensor:
    ce = F.cross_entropy(z, y, reduction="none")
    return (1 - torch.exp(-ce)) ** 2 * ce


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(lambda z, y: F.cross_entropy(z, y) + 2 * F.multi_margin_loss(z, y), id="sum"),
        pytest.param(total_of_zeros, id="total"),
    ],
)
def test_one_lam_per_sample_in_a_sum_of_losses(loss: Loss) -> None:
    weight = 2 if loss is not total_of_zeros else 1

    def rows(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y, reduction="none") + weight * F.multi_margin_loss(z, y, reduction="none")

    def reduce(losses: Tensor) -> Tensor:
        return losses.mean()

    def expected(z: Tensor, own: Sequence[Tensor], partners: Sequence[Tensor]) -> Tensor:
        mixed = _by_row(rows, reduce)(z, own, partners)
        return mixed if weight == 2 else mixed + 0.1 * z.square().mean()

    assert_mixed(loss, normal(N, K), CLASSES, per_sample=True, expected=expected)


SQUARE_CLASSES = torch.tensor([0, 1, 3, 2])


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
def test_one_lam_per_sample_with_as_many_classes_as_rows(transposed: Callable[[Tensor], Tensor]) -> None:
    def rows(z: Tensor, y: Tensor) -> Tensor:
        return -(z.log_softmax(1) * F.one_hot(y, N)).sum(1)

    assert_mixed_or_refused(
        lambda z, y: -(transposed(z.log_softmax(1)) * transposed(F.one_hot(y, N))).sum(0).mean(),
        normal(N, N),
        SQUARE_CLASSES,
        per_sample=True,
        expected=_by_row(rows, Tensor.mean),
    )


def test_one_lam_per_sample_is_no_lam_per_class() -> None:
    def rows(z: Tensor, y: Tensor) -> Tensor:
        return -(z.log_softmax(1) * F.one_hot(y, N)).sum(1) / N

    assert_mixed_or_refused(
        lambda z, y: -(z.log_softmax(1) * F.one_hot(y, N)).sum(0).mean(),
        normal(N, N),
        SQUARE_CLASSES,
        per_sample=True,
        expected=_by_row(rows, Tensor.sum),
    )
    with pytest.raises(RuntimeError, match=r"one lam per sample .* Use per_sample=False"):
        assert_mixed(
            lambda z, y: (z * F.one_hot(y, N)).sum(0).square().mean(), normal(N, N), SQUARE_CLASSES, per_sample=True
        )


@pytest.mark.parametrize(
    ("loss", "logits", "targets"),
    [
        pytest.param(
            lambda z, y: F.cross_entropy(z.permute(0, 2, 1).reshape(-1, K), y.view(-1)),
            normal(N, K, 3),
            TOKENS % K,
            id="flat_targets",
        ),
        pytest.param(lambda z, y: F.cross_entropy(z, y.flip(0)), normal(N, K), CLASSES, id="rows_in_another_order"),
        pytest.param(
            lambda z, y: F.cross_entropy(z, y[torch.tensor([3, 2, 1, 0])]), normal(N, K), CLASSES, id="rows_by_index"
        ),
        pytest.param(
            lambda z, y: F.cross_entropy(z.permute(0, 2, 1)[y != 255], y[y != 255]),
            normal(N, K, 3),
            TOKENS,
            id="valid_rows",
        ),
        pytest.param(
            lambda z, y: F.cross_entropy(z, y, reduction="none").topk(2)[0].mean(), normal(N, K), CLASSES, id="topk"
        ),
        pytest.param(lambda z, y: F.cross_entropy(z, y).sqrt(), normal(N, K), CLASSES, id="root_of_the_mean"),
        pytest.param(lambda z, y: F.mse_loss(z, y) ** 2, normal(N, 3), VALUES, id="square_of_the_mean"),
        pytest.param(dice, normal(N, K, 2, 3), MAPS, id="dice"),
        pytest.param(
            lambda z, y, lengths=LENGTHS: F.ctc_loss(
                z.log_softmax(2), y, torch.full((N,), 8), lengths, reduction="mean"
            ),
            normal(8, N, K),
            SEQUENCES,
            id="ctc_mean",
        ),
    ],
)
def test_one_lam_per_sample_refuses_what_is_no_sum_over_rows(loss: Loss, logits: Tensor, targets: Tensor) -> None:
    with pytest.raises(RuntimeError, match=r"Use (cross_entropy or )?per_sample=False"):
        assert_mixed(loss, logits, targets, per_sample=True)


def supervised_contrastive(z: Tensor, y: Tensor) -> Tensor:
    z = F.normalize(z)
    mask = torch.eq(y.view(-1, 1), y.view(1, -1)).double()
    return -(mask * (z @ z.T).log_softmax(1)).sum(1).mean()


def triplet_by_bool(z: Tensor, y: Tensor) -> Tensor:
    total = z.new_zeros(())
    for i in range(N):
        for j in range(i):
            distance = (z[i] - z[j]).norm()
            total = total + (distance if y[i] == y[j] else F.relu(1 - distance))
    return total


def triplet_by_class(z: Tensor, y: Tensor) -> Tensor:
    return sum(z[i].norm() if y[i] > 1 else z[i].sum() for i in range(N))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        pytest.param(
            supervised_contrastive, r"'eq' compares the targets of different rows", id="supervised_contrastive"
        ),
        pytest.param(
            lambda z, y: ((z @ z.T) * (y[:, None] == y[None])).mean(), "compares the targets of different rows", id="eq"
        ),
        pytest.param(
            lambda z, y: F.mse_loss(z @ z.T, F.one_hot(y, K).double() @ F.one_hot(y, K).double().T),
            "compares the targets of different rows",
            id="product_of_one_hot",
        ),
        pytest.param(
            lambda z, y: F.mse_loss(z @ z.T, (y[:, None] - y[None]).abs().double()),
            "compares the targets of different rows",
            id="difference",
        ),
        pytest.param(
            triplet_by_bool, r"compares the targets|decides by the class of single rows", id="triplet_by_bool"
        ),
        pytest.param(triplet_by_class, r"decides by the class of single rows \('__bool__' of a target\)", id="bool"),
        pytest.param(
            lambda z, y: z[0, : [1, 2, 3, 4, 5][y[0]]].sum(),
            r"decides by the class of single rows \('__index__' of a target\)",
            id="index_of_a_list",
        ),
        pytest.param(
            lambda z, y: F.mse_loss(z, torch.bernoulli(F.one_hot(y, K) * 0.5).double()),
            r"went through 'bernoulli', which draws random numbers",
            id="bernoulli",
        ),
        pytest.param(
            lambda z, y: z.gather(1, torch.multinomial(1.0 - F.one_hot(y, K), 1)).mean(),
            r"went through 'multinomial', which draws random numbers",
            id="multinomial",
        ),
    ],
)
def test_loss_that_cannot_be_mixed_is_refused(loss: Loss, message: str) -> None:
    plan, mixer = start()
    with pytest.raises(RuntimeError, match=message):
        loss(normal(N, K).requires_grad_(), TargetPair.wrap(CLASSES, plan, mixer))


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
    assert mixer.losses == []  # so that the step is refused if nothing more is done with it
    assert not getattr(loss, "is_mixed", False)
    with pytest.raises(RuntimeError, match=r"'mul' got what a torch.autograd.Function made of the batch's targets"):
        loss * 2


def test_targets_that_go_on_through_the_network_are_refused() -> None:
    plan, mixer = start()
    logits, weight = normal(N, K).requires_grad_(), nn.Parameter(normal(2, K, seed=5))
    mixed = logits * F.one_hot(TargetPair.wrap(CLASSES, plan, mixer), K)
    for use in (lambda: F.linear(mixed, weight), lambda: mixed @ weight.t()):
        with pytest.raises(RuntimeError, match=r"further through the network\. Targets can be mixed in the loss only"):
            use()


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        pytest.param(F.cross_entropy, "cross_entropy", id="cross_entropy"),
        pytest.param(lambda z, y: F.mse_loss(z, F.one_hot(y, K).double()), "mse_loss", id="mse_loss"),
        pytest.param(lambda z, y: F.cross_entropy(z, y, reduction="none"), "cross_entropy", id="unreduced"),
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


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo itself
@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(lambda z, y: F.cross_entropy(z.tanh(), y), id="cross_entropy"),
        pytest.param(lambda z, y: -(z.log_softmax(1) * F.one_hot(y, K)).sum(1).mean(), id="one_hot"),
    ],
)
def test_compiled_loss(loss: Loss) -> None:
    assert_mixed_or_refused(torch.compile(loss, backend="eager"), normal(N, K), CLASSES)


def test_targets_in_a_batch_of_any_structure() -> None:
    batch: dict[str, Any] = {"a": [CLASSES.clone(), {"b": VALUES.clone()}]}
    plan, mixer = start()
    logits = normal(N, K).requires_grad_()
    pairs = tree_map_only(Tensor, lambda target: TargetPair.wrap(target, plan, mixer), batch)
    loss = F.cross_entropy(logits, pairs["a"][0]) + F.mse_loss(logits[:, :3], pairs["a"][1]["b"])
    mixer.stop()
    expected = sum(
        weight * (F.cross_entropy(logits, CLASSES[rows]) + F.mse_loss(logits[:, :3], VALUES[rows]))
        for weight, rows in ((LAM, torch.arange(N)), (1 - LAM, PARTNER))
    )
    assert_close(loss, expected, rtol=1e-12, atol=0)
