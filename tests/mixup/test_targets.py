import math
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from versions import compiles

from mm_lightning.mixup import (
    BetaRatio,
    CutMix,
    MixPlan,
    PlanSource,
    SameClass,
    interpolate,
    mixed_accuracy,
    mixed_cross_entropy,
    mixed_target_entropy,
)

N, K = 6, 4
PARTNER = torch.tensor([3, 0, 5, 4, 1, 2])
LAM = 0.3125  # lam and 1 - lam are exact in float32
LAMS = torch.tensor([1.0, 0.0, 0.5, 0.25, 0.875, 0.3125])
CLASS_WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.25], dtype=torch.float64)
PER_BATCH = MixPlan("layer", PARTNER, torch.tensor([LAM]).expand(N))
PER_SAMPLE = MixPlan("layer", PARTNER, LAMS)
REPEATING = MixPlan("layer", torch.tensor([1, 1, 0, 2, 2, 2]), LAMS)

each_plan = pytest.mark.parametrize(
    "plan", [PER_BATCH, PER_SAMPLE, REPEATING], ids=["per_batch", "per_sample", "repeating"]
)
shapes = pytest.mark.parametrize("spatial", [(), (2, 3)], ids=["rows", "dense"])
weights = pytest.mark.parametrize("weight", [None, CLASS_WEIGHT], ids=["unweighted", "weighted"])
smoothings = pytest.mark.parametrize("label_smoothing", [0.0, 0.1], ids=["hard", "smooth"])
reductions = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
# Value of ignored targets, and the argument: PyTorch's default, one outside the classes, one of the classes.
ignored = pytest.mark.parametrize(
    ("fill", "ignore_index"),
    [(None, -100), (-100, -100), (255, 255), (1, 1)],
    ids=["none_ignored", "ignore_-100", "ignore_255", "ignore_class_1"],
)


def make_logits(*spatial: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (2 * torch.randn(N, K, *spatial, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).to(dtype)


def make_targets(*spatial: int, fill: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(K, (N, *spatial), generator=generator)
    if fill is not None:
        targets[torch.rand(targets.shape, generator=generator) < 0.4] = fill
        assert 0 < (targets == fill).sum() < targets.numel()
    return targets


def make_probabilities(*spatial: int) -> Tensor:
    return make_logits(*spatial).flip(0).softmax(dim=1)


def loss_and_grad(loss_of: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    loss = loss_of(leaf)
    # A weight for each entry, so that reduction "none" is told from its sum.
    (grad,) = torch.autograd.grad((loss * torch.arange(1.0, loss.numel() + 1).view(loss.shape)).sum(), leaf)
    return loss.detach(), grad


def _reference_loss(
    logits: Tensor,
    targets: Tensor,
    plan: MixPlan,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Tensor:
    """Row by row: each term's losses are weighted by its ratio, then reduced with its own normaliser."""
    weight = torch.ones(K, dtype=torch.float64) if weight is None else weight
    spatial = list(product(*map(range, targets.shape[1:])))
    total: Any = 0
    for partners in (False, True):
        losses, normaliser = [], torch.zeros((), dtype=torch.float64)
        for i in range(N):
            lam = plan.lam[i].double()
            ratio = 1 - lam if partners else lam
            source = plan.partner[i] if partners else i
            for place in spatial:
                scores, y = logits[(i, slice(None), *place)], int(targets[(source, *place)])
                if y == ignore_index:
                    losses.append(0 * scores.sum())
                    continue
                surprise = scores.exp().sum().log() - scores  # -log p, (K,)
                smooth = (weight * surprise).sum() / K
                losses.append(ratio * ((1 - label_smoothing) * weight[y] * surprise[y] + label_smoothing * smooth))
                normaliser = normaliser + weight[y]
        losses = torch.stack(losses)
        total = (
            total
            + {
                "none": losses.view(targets.shape),
                "sum": losses.sum(),
                "mean": losses.sum() / normaliser,
            }[reduction]
        )
    return total


@shapes
@weights
@ignored
@smoothings
@reductions
def test_loss_is_the_mix_of_the_two_plain_losses(
    spatial: tuple[int, ...],
    weight: Tensor | None,
    fill: int | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> None:
    logits, targets = make_logits(*spatial), make_targets(*spatial, fill=fill)
    options: dict[str, Any] = {
        "weight": weight,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "reduction": reduction,
    }
    got = loss_and_grad(lambda z: mixed_cross_entropy(z, targets, PER_BATCH, **options), logits)
    expected = loss_and_grad(
        lambda z: (
            LAM * F.cross_entropy(z, targets, **options) + (1 - LAM) * F.cross_entropy(z, targets[PARTNER], **options)
        ),
        logits,
    )
    assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("plan", [PER_SAMPLE, REPEATING], ids=["per_sample", "repeating"])
@shapes
@weights
@ignored
@smoothings
@reductions
def test_loss_with_a_ratio_a_row_equals_the_definition(
    plan: MixPlan,
    spatial: tuple[int, ...],
    weight: Tensor | None,
    fill: int | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> None:
    logits, targets = make_logits(*spatial), make_targets(*spatial, fill=fill)
    options: dict[str, Any] = {
        "weight": weight,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "reduction": reduction,
    }
    got = loss_and_grad(lambda z: mixed_cross_entropy(z, targets, plan, **options), logits)
    expected = loss_and_grad(lambda z: _reference_loss(z, targets, plan, **options), logits)
    assert_close(got, expected, rtol=1e-12, atol=1e-12)


@each_plan
@shapes
@reductions
def test_loss_without_weights_equals_that_on_mixed_one_hot_targets(
    plan: MixPlan, spatial: tuple[int, ...], reduction: str
) -> None:
    logits, targets = make_logits(*spatial), make_targets(*spatial)
    one_hot = F.one_hot(targets, K).movedim(-1, 1).double()
    lam = plan.lam.double().view(-1, *[1] * (one_hot.dim() - 1))
    mixed = lam * one_hot + (1 - lam) * one_hot[plan.partner]
    got = loss_and_grad(lambda z: mixed_cross_entropy(z, targets, plan, reduction=reduction), logits)
    expected = loss_and_grad(lambda z: F.cross_entropy(z, mixed, reduction=reduction), logits)
    assert_close(got, expected, rtol=1e-12, atol=1e-12)


@shapes
@weights
@smoothings
@reductions
def test_loss_on_class_probabilities_is_the_mix_of_the_two_plain_losses(
    spatial: tuple[int, ...], weight: Tensor | None, label_smoothing: float, reduction: str
) -> None:
    logits, targets = make_logits(*spatial), make_probabilities(*spatial)
    options: dict[str, Any] = {"weight": weight, "label_smoothing": label_smoothing, "reduction": reduction}
    got = loss_and_grad(lambda z: mixed_cross_entropy(z, targets, PER_BATCH, **options), logits)
    expected = loss_and_grad(
        lambda z: (
            LAM * F.cross_entropy(z, targets, **options) + (1 - LAM) * F.cross_entropy(z, targets[PARTNER], **options)
        ),
        logits,
    )
    assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_loss_on_class_probabilities_weights_each_row_by_its_ratio() -> None:
    logits, targets = make_logits(), make_probabilities()
    log_probs = logits.log_softmax(dim=1)
    rows = [
        -sum(
            (LAMS[i].double() * targets[i, k] + (1 - LAMS[i].double()) * targets[PARTNER[i], k]) * log_probs[i, k]
            for k in range(K)
        )
        for i in range(N)
    ]
    assert_close(mixed_cross_entropy(logits, targets, PER_SAMPLE), torch.stack(rows).mean(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("per_sample", [False, True], ids=["per_batch", "per_sample"])
def test_weights_of_the_two_losses_add_to_one_in_the_precision_of_the_logits(per_sample: bool) -> None:
    # Where both targets are of one class, the ratio makes no difference. lam is drawn, so not a short binary fraction.
    logits, targets = make_logits(), torch.full((N,), 2)
    for batch_index in range(10):
        plan = PlanSource(["layer"], BetaRatio(2.0, per_sample)).draw(N, batch_index=batch_index)
        loss = mixed_cross_entropy(logits, targets, plan)
        assert_close(loss, F.cross_entropy(logits, targets), rtol=1e-12, atol=1e-12)


def test_unmixed_plan_gives_the_plain_loss() -> None:
    logits, targets = make_logits(), make_targets()
    loss = mixed_cross_entropy(logits, targets, MixPlan.unmixed(N), weight=CLASS_WEIGHT)
    assert_close(loss, F.cross_entropy(logits, targets, weight=CLASS_WEIGHT), rtol=1e-12, atol=1e-12)


def test_loss_by_hand() -> None:
    # p = (1/4, 3/4) and (1/2, 1/2), targets 0 and 1, each the other's partner, lam = 1/4.
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]], dtype=torch.float64)
    plan = MixPlan("layer", torch.tensor([1, 0]), torch.tensor([0.25]).expand(2))
    rows = mixed_cross_entropy(logits, torch.tensor([0, 1]), plan, reduction="none")
    first = 0.25 * math.log(4.0) + 0.75 * math.log(4.0 / 3.0)
    assert_close(rows, torch.tensor([first, math.log(2.0)], dtype=torch.float64), rtol=1e-14, atol=0)


def test_large_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    plan = MixPlan("layer", torch.tensor([1, 0]), torch.tensor([0.25]).expand(2))
    loss = mixed_cross_entropy(logits, torch.tensor([0, 1]), plan)
    loss.backward()
    assert loss.item() == 0.75 * 2e4
    # softmax minus mixed one-hot target, over N = 2
    assert_close(logits.grad, torch.tensor([[0.375, -0.375], [-0.375, 0.375]]))


@shapes
@weights
@smoothings
@reductions
def test_batch_of_ignored_rows_gives_what_pytorch_gives(
    spatial: tuple[int, ...], weight: Tensor | None, label_smoothing: float, reduction: str
) -> None:
    logits, targets = make_logits(*spatial), torch.full((N, *spatial), -100)
    options: dict[str, Any] = {"weight": weight, "label_smoothing": label_smoothing, "reduction": reduction}
    got = mixed_cross_entropy(logits, targets, PER_BATCH, **options)
    assert torch.isnan(got).all() if reduction == "mean" else (got == 0).all()
    assert_close(got, F.cross_entropy(logits, targets, **options), equal_nan=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@smoothings
def test_half_precision_is_close_to_float32(
    dtype: torch.dtype, tolerance: float, soft: bool, label_smoothing: float
) -> None:
    logits = make_logits(dtype=dtype)
    targets = make_probabilities() if soft else make_targets()
    losses = [
        mixed_cross_entropy(z, targets.to(z.dtype) if soft else targets, PER_SAMPLE, label_smoothing=label_smoothing)
        for z in (logits, logits.float())
    ]
    assert losses[0].dtype == dtype
    assert_close(losses[0].float(), losses[1], rtol=tolerance, atol=0)


def test_arguments_are_not_changed() -> None:
    logits, targets, weight = make_logits(), make_targets(fill=-100), CLASS_WEIGHT.clone()
    before = logits.clone(), targets.clone()
    mixed_cross_entropy(logits, targets, PER_SAMPLE, weight=weight, label_smoothing=0.1)
    assert_close((logits, targets, weight), (*before, CLASS_WEIGHT), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("logits", "targets", "options", "message"),
    [
        pytest.param((5, K), (5,), {}, "targets have 5 rows, but the batch was mixed with 6 rows", id="rows"),
        pytest.param((5, K), (N,), {}, r"logits \(5, 4\) and targets \(6,\) do not fit", id="rows_of_logits"),
        pytest.param((N, K), (N, 2), {}, r"logits \(6, 4\) and targets \(6, 2\) do not fit", id="targets_2d"),
        pytest.param((N, K, 3), (N,), {}, r"logits \(6, 4, 3\) and targets \(6,\) do not fit", id="logits_dense"),
        pytest.param((N,), (N,), {}, r"logits \(6,\) and targets \(6,\) do not fit", id="logits_1d"),
        pytest.param((N, K), (N,), {"reduction": "avg"}, "must be 'mean', 'sum' or 'none', got 'avg'", id="reduction"),
        pytest.param(
            (N, K), (N,), {"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\], got 1.5", id="above"
        ),
        pytest.param((N, K), (N,), {"label_smoothing": -0.1}, r"must be in \[0, 1\], got -0.1", id="below"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    logits: tuple[int, ...], targets: tuple[int, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        mixed_cross_entropy(torch.zeros(logits), torch.zeros(targets, dtype=torch.int64), PER_BATCH, **options)


def test_class_probabilities_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"logits \(6, 4\) and targets \(6, 3\) do not fit"):
        mixed_cross_entropy(torch.zeros(N, K), torch.zeros(N, 3), PER_BATCH)


@weights
def test_class_that_does_not_exist_is_refused(weight: Tensor | None) -> None:
    with pytest.raises(IndexError, match="Target 4 is out of bounds"):
        mixed_cross_entropy(make_logits(), torch.full((N,), K), PER_BATCH, weight=weight)


# From 262,144 scores on both targets' are picked at once.
LARGE = [((6, 48_000), 48_000), ((6, 4, 120, 120), 4)]


@pytest.mark.parametrize(("shape", "num_classes"), LARGE, ids=["rows", "dense"])
@pytest.mark.parametrize("ignore_index", [None, -100, 255, 1], ids=["none_ignored", "-100", "255", "class_1"])
def test_large_loss_and_gradient_equal_both_cross_entropies(
    shape: tuple[int, ...], num_classes: int, ignore_index: int | None
) -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(shape, dtype=torch.float64, generator=generator)
    targets = torch.randint(num_classes, (6, *shape[2:]), generator=generator)
    if ignore_index is not None:
        targets[::2] = ignore_index
    options = {} if ignore_index is None else {"ignore_index": ignore_index}

    def expected_loss(logits: Tensor) -> Tensor:
        own, partner = F.cross_entropy(logits, targets, **options), F.cross_entropy(logits, targets[PARTNER], **options)
        return LAM * own + (1 - LAM) * partner

    assert logits.numel() >= 2**18
    for plan in (PER_BATCH, MixPlan("layer", PARTNER, PER_BATCH.lam, None, LAM)):
        loss, grad = loss_and_grad(lambda leaf, plan=plan: mixed_cross_entropy(leaf, targets, plan, **options), logits)
        expected, expected_grad = loss_and_grad(expected_loss, logits)
        assert_close(loss, expected, rtol=1e-12, atol=0)
        assert_close(grad, expected_grad, rtol=1e-9, atol=1e-15)


def test_large_loss_refuses_a_class_too_many_as_pytorch_does() -> None:
    targets = torch.tensor([0, 1, 48_000, 3, 4, 5])
    with pytest.raises(IndexError, match="48000 is out of bounds"):
        mixed_cross_entropy(torch.zeros(6, 48_000), targets, PER_BATCH)


def test_large_loss_of_ignored_rows_is_nothing_whatever_their_logits() -> None:
    logits = torch.zeros(6, 48_000, dtype=torch.float64)
    logits[::2, 0] = -math.inf  # of ignored rows, where no class is taken for the target
    targets = torch.tensor([-100, 1, -100, 2, -100, 3])
    partner = torch.tensor([0, 3, 2, 5, 4, 1])
    loss = mixed_cross_entropy(logits, targets, MixPlan("layer", partner, PER_BATCH.lam, None, LAM))
    assert_close(loss, torch.tensor(math.log(48_000), dtype=torch.float64), rtol=1e-12, atol=0)


def test_large_loss_in_half_precision_is_as_exact_as_pytorchs() -> None:
    logits = torch.zeros(6, 4, 128, 128, dtype=torch.bfloat16)  # 98,304 losses of log 4, of eight bits each
    targets = torch.randint(4, (6, 128, 128), generator=torch.Generator().manual_seed(0))
    loss = mixed_cross_entropy(logits, targets, PER_BATCH)
    assert loss == F.cross_entropy(logits, targets)
    assert_close(loss.double(), torch.tensor(math.log(4), dtype=torch.float64), rtol=4e-3, atol=0)


def test_infinite_losses_stay_infinite() -> None:
    logits = torch.zeros(2, 3)
    logits[:, 0] = -math.inf
    for shared_lam in (None, 0.25):
        plan = MixPlan("layer", torch.tensor([1, 0]), torch.tensor([0.25]).expand(2), None, shared_lam)
        assert mixed_cross_entropy(logits, torch.tensor([0, 0]), plan) == math.inf


@compiles
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo itself
def test_compiled_loss_is_one_graph_for_every_lam() -> None:
    graphs = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(mixed_cross_entropy, backend=counting, fullgraph=True)
    for lam in torch.linspace(0.1, 0.9, 8):
        plan = MixPlan("layer", PARTNER, lam.expand(N), None, float(lam))
        got = compiled(make_logits(), make_targets(), plan)
        assert_close(got, mixed_cross_entropy(make_logits(), make_targets(), plan), rtol=1e-6, atol=0)
    torch.compiler.reset()
    assert len(graphs) == 1


@pytest.mark.parametrize("function", [mixed_cross_entropy, mixed_accuracy, mixed_target_entropy])
def test_a_plan_that_does_not_tell_yet_how_targets_are_mixed_is_refused(function: Any) -> None:
    hidden, targets, logits = torch.randn(6, 3, 4, 4), torch.arange(6) % 3, torch.randn(6, 3)
    arguments = (targets,) if function is mixed_target_entropy else (logits, targets)
    plans = [PlanSource(["input"], **way).draw(6) for way in ({"pairing": SameClass()}, {"interpolation": CutMix()})]
    for plan in plans:
        with pytest.raises(ValueError, match=r"^The plan does not tell yet how targets are mixed: .* interpolate\(hid"):
            function(*arguments, plan)
    _, told = interpolate(hidden, plans[1])
    assert torch.isfinite(function(*arguments, told))
