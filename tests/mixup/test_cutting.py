"""HOW: boxes, blocks, tokens and channels, against loops written from the papers' equations."""

from __future__ import annotations

import math
import pickle
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from versions import compiles
from ways_by_hand import (
    assert_weights,
    reference_blocks,
    reference_channels,
    reference_cutmix,
    reference_exchanged,
    reference_patchup,
    reference_token_weights,
)

from mm_lightning.mixup import (
    ChannelMix,
    CutMix,
    MixPlan,
    NoisyFeatures,
    PatchUp,
    PlanSource,
    TokenMix,
    interpolate,
    mix,
    uniform,
)
from mm_lightning.mixup.masks import union

CPU = torch.device("cpu")
PARTNER = [2, 0, 3, 1]
REPEATING = [1, 1, 1, 0]
BY_ROW = [0.75, 1.0, 0.0, 0.4]
IMAGES, VOLUMES, TOKENS, VECTORS = (4, 3, 7, 10), (4, 2, 5, 8, 6), (4, 9, 5), (4, 11)

permuted_and_repeating = pytest.mark.parametrize("partner", [PARTNER, REPEATING], ids=["permutation", "repeating"])
per_batch_and_by_row = pytest.mark.parametrize("lam", [0.4, 0.75, BY_ROW], ids=["0.4", "0.75", "by_row"])
EVERY_WAY = [
    pytest.param(CutMix(), IMAGES, id="cutmix"),
    pytest.param(CutMix(), VOLUMES, id="cutmix_volume"),
    pytest.param(PatchUp(0.5, 3), IMAGES, id="patchup"),
    pytest.param(TokenMix(), TOKENS, id="token"),
    pytest.param(ChannelMix(), IMAGES, id="channel"),
    pytest.param(ChannelMix(), VECTORS, id="channel_vector"),
    pytest.param(ChannelMix(-1), TOKENS, id="channel_sequence"),
]
every_way = pytest.mark.parametrize(("way", "shape"), EVERY_WAY)


def states(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plan_of(
    way: Any, lam: float | list[float], partner: list[int] = PARTNER, seed: int = 11, batch: Any = None
) -> MixPlan:
    """A plan as :class:`PlanSource` draws it."""
    numbers = [lam] if isinstance(lam, (int, float)) else lam
    return PlanSource(
        ["layer"],
        ratio=lambda rng, n: np.array(numbers, dtype=np.float64),
        pairing=lambda rng, n: np.array(partner),
        interpolation=way,
        seed=seed,
    ).draw(len(partner), batch=batch)


@permuted_and_repeating
@per_batch_and_by_row
@pytest.mark.parametrize("shape", [IMAGES, VOLUMES, (4, 1, 1, 1), (4, 2, 8, 8)], ids=str)
def test_cutmix_equals_algorithm_a1(shape: tuple[int, ...], lam: Any, partner: list[int]) -> None:
    sizes = set()
    for seed in range(12):
        plan, hidden = plan_of(CutMix(), lam, partner, seed), states(*shape)
        mixed, used = interpolate(hidden, plan)
        expected, weights = reference_cutmix(hidden, plan, by_row=lam is BY_ROW)
        assert torch.equal(mixed, expected)
        assert_weights(used.lam, weights)
        sizes.add(tuple(weights))
    assert shape == (4, 1, 1, 1) or len(sizes) > 1  # boxes at the edge are smaller


@pytest.mark.parametrize(
    ("shape", "lam", "side"),
    [
        ((2, 1, 20, 20), 0.96, 4),  # 20 * sqrt(0.04)
        ((2, 1, 10, 10), 0.91, 2),  # 10 * sqrt(0.09) = 3, halved and rounded down on either side
        ((2, 1, 8, 8, 8), 0.875, 4),  # 8 * cbrt(1 / 8)
        ((2, 1, 30, 30, 30), 1 - 0.2**3, 6),
        ((2, 1, 24, 24, 24), 1 - 0.25**3, 6),
    ],
)
def test_sides_that_are_whole_numbers_are_not_rounded_down(shape: tuple[int, ...], lam: float, side: int) -> None:
    hidden = torch.stack([torch.zeros(shape[1:]), torch.ones(shape[1:])])
    largest = max(int(interpolate(hidden, plan_of(CutMix(), lam, [1, 0], s))[0][0].sum()) for s in range(25))
    assert largest == side ** len(shape[2:])


def test_cutmix_with_lam_zero_is_a_box_as_large_as_the_map_around_its_centre() -> None:
    hidden = torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)]).double()
    for seed in range(20):
        plan = plan_of(CutMix(), 0.0, [1, 0], seed)
        row, column = (int(x * 8) for x in uniform(plan.seed, (1, 2), CPU)[0].tolist())
        expected = torch.zeros(8, 8, dtype=torch.float64)
        expected[max(row - 4, 0) : row + 4, max(column - 4, 0) : column + 4] = 1
        mixed, used = interpolate(hidden, plan)
        assert torch.equal(mixed[0, 0], expected)
        assert used.lam[0] == 1 - expected.mean()


@permuted_and_repeating
@pytest.mark.parametrize("lam", [0.4, 0.0, BY_ROW], ids=["soft", "hard", "by_row"])
@pytest.mark.parametrize(
    ("way", "shape"),
    [
        (PatchUp(0.5, 3), IMAGES),
        (PatchUp(), IMAGES),
        (PatchUp(0.9, 7), (4, 3, 4, 9)),
        (PatchUp(0.3, 1), (4, 5, 1, 6)),
    ],
    ids=["3", "7", "larger_than_the_map", "1"],
)
def test_patchup_equals_the_papers_formulas(way: PatchUp, shape: tuple[int, ...], lam: Any, partner: list[int]) -> None:
    shares = []
    for seed in range(6):
        plan, hidden = plan_of(way, lam, partner, seed), states(*shape)
        mixed, used = interpolate(hidden, plan)
        expected, weights = reference_patchup(hidden, plan, way)
        assert_close(mixed, expected, rtol=0, atol=1e-15)
        assert_weights(used.lam, weights)
        shares.append(float(reference_blocks(way, shape, plan).double().mean()))
    assert 0 < sum(shares) < len(shares)


def test_hard_patchup_takes_the_partners_blocks_as_they_are() -> None:
    hidden, plan = states(*IMAGES), plan_of(PatchUp(0.5, 3), 0.0)
    mixed, used = interpolate(hidden, plan)
    is_partners = mixed == hidden[plan.partner]
    assert torch.equal(is_partners | (mixed == hidden), torch.ones(IMAGES, dtype=torch.bool))
    assert_close(used.lam, 1 - is_partners.double().mean(dim=(1, 2, 3)))


def test_share_of_altered_features_is_about_gamma() -> None:
    hidden = states(2, 64, 40, 40)
    used = [float(interpolate(hidden, plan_of(PatchUp(0.1, 3), 0.0, [1, 0], s))[1].lam[0]) for s in range(5)]
    assert 1 - np.mean(used) == pytest.approx(0.1, abs=0.01)  # blocks overlap seldom yet


@permuted_and_repeating
@per_batch_and_by_row
@pytest.mark.parametrize(
    ("way", "shape", "dim"),
    [
        (TokenMix(), TOKENS, 1),
        (ChannelMix(), IMAGES, 1),
        (ChannelMix(), VECTORS, 1),
        (ChannelMix(-1), TOKENS, 2),
        (ChannelMix(3), IMAGES, 3),
    ],
    ids=["tokens", "maps", "vectors", "sequences", "columns"],
)
def test_tokens_and_channels_are_exchanged_whole(
    way: Any, shape: tuple[int, ...], dim: int, lam: Any, partner: list[int]
) -> None:
    plan, hidden = plan_of(way, lam, partner), states(*shape)
    mixed, used = interpolate(hidden, plan)
    expected, weights = reference_channels(hidden, plan, dim)
    assert torch.equal(mixed, expected)
    assert_weights(used.lam, weights)


def test_places_are_exchanged_with_the_probability_one_minus_lam() -> None:
    hidden = torch.stack([torch.zeros(50, 1), torch.ones(50, 1)])
    taken = sum(interpolate(hidden, plan_of(TokenMix(), 0.7, [1, 0], s))[0][0].sum() for s in range(100))
    assert abs(float(taken) / 5000 - 0.3) < 4 * math.sqrt(0.21 / 5000)


LENGTHS = [9, 2, 5, 0]
MASK = torch.arange(9) < torch.tensor(LENGTHS)[:, None]


@permuted_and_repeating
@per_batch_and_by_row
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_padding_counts_for_no_row(lam: Any, partner: list[int], dtype: torch.dtype) -> None:
    way = TokenMix("mask")
    plan = plan_of(way, lam, partner, batch={"mask": MASK.to(dtype)})
    _, used = interpolate(states(*TOKENS), plan)
    weights = reference_token_weights(MASK, plan)
    assert_weights(used.lam, weights)
    assert way.per_sample
    assert len(set(weights)) > 1


@per_batch_and_by_row
@pytest.mark.parametrize("shape", [(4, 9), (4, 1, 1, 9), (4, 9, 1), (4, 3, 9, 9)], ids=str)
@pytest.mark.parametrize("keep", [True, False], ids=["keeps", "drops"])
def test_each_token_keeps_its_own_mask(lam: Any, shape: tuple[int, ...], keep: bool) -> None:
    plan = plan_of(TokenMix(), lam)
    mask = MASK[:, :, None].expand(shape) if shape[-1] == 1 else MASK.view(4, *[1] * (len(shape) - 2), 9).expand(shape)
    mask = (mask if keep else ~mask).clone()
    mixed = union(mask, plan, keep)
    expected = mask.clone()
    for i, taken in enumerate(reference_exchanged(9, plan)):
        for t in range(9):
            if taken[t]:
                dim = 0 if shape[-1] == 1 else -1
                expected[i].select(dim, t).copy_(mask[PARTNER[i]].select(dim, t))
    assert torch.equal(mixed, expected)
    assert not torch.equal(mixed, mask)


def test_a_mask_of_lists_is_a_mask() -> None:
    batches = [{"mask": mask} for mask in (MASK, MASK.tolist(), MASK.numpy())]
    plans = [plan_of(TokenMix("mask"), 0.4, batch=batch) for batch in batches]
    lams = [interpolate(states(*TOKENS), plan)[1].lam.tolist() for plan in plans]
    assert lams[0] == lams[1] == lams[2]


def test_a_mask_of_another_shape_is_refused() -> None:
    plan = plan_of(TokenMix("mask"), 0.5, batch={"mask": MASK[:, 1:]})
    message = "mask='mask' must be (N, T) = (4, 9) at this layer, got (4, 8)."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        interpolate(states(*TOKENS), plan)


@every_way
@pytest.mark.parametrize("lam", [1.0, [1.0] * 4], ids=["per_batch", "by_row"])
@permuted_and_repeating
def test_lam_one_is_the_identity(way: Any, shape: tuple[int, ...], lam: Any, partner: list[int]) -> None:
    hidden = states(*shape)
    mixed, used = interpolate(hidden, plan_of(way, lam, partner))
    assert torch.equal(mixed, hidden)
    assert used.lam.tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("way", "shape"), [(TokenMix(), TOKENS), (ChannelMix(), IMAGES), (ChannelMix(-1), TOKENS)], ids=["t", "c", "s"]
)
@permuted_and_repeating
def test_lam_zero_returns_the_partners(way: Any, shape: tuple[int, ...], partner: list[int]) -> None:
    hidden = states(*shape)
    mixed, used = interpolate(hidden, plan_of(way, 0.0, partner))
    assert torch.equal(mixed, hidden[partner])
    assert used.lam.tolist() == [0.0] * 4


@every_way
@permuted_and_repeating
@per_batch_and_by_row
def test_gradient_is_that_of_the_plain_formula(way: Any, shape: tuple[int, ...], partner: list[int], lam: Any) -> None:
    """A mix is linear in each feature: ``W * h + (1 - W) * h[partner]`` with W read off two mixes of ones and zeros."""
    plan, grad = plan_of(way, lam, partner), states(*shape, seed=1)
    weight = torch.zeros(shape, dtype=torch.float64)
    for i in range(4):
        own = torch.zeros(shape, dtype=torch.float64)
        own[i] = 1
        weight[i] = interpolate(own, plan)[0][i] if partner[i] != i else 1
    hidden = states(*shape).requires_grad_()
    mixed, _ = interpolate(hidden, plan)
    (got,) = torch.autograd.grad(mixed, hidden, grad)
    expected = torch.zeros(shape, dtype=torch.float64)
    for i in range(4):
        expected[i] += weight[i] * grad[i]
        expected[partner[i]] += (1 - weight[i]) * grad[i]
    assert_close(got, expected, rtol=0, atol=1e-14)
    (again,) = torch.autograd.grad(interpolate(hidden, plan)[0], hidden, grad, create_graph=True)
    assert_close(again, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("way", "shape"),
    [
        (CutMix(), (4, 1, 4, 3)),
        (PatchUp(0.5, 3), (4, 1, 4, 3)),
        (TokenMix(), (4, 3, 2)),
        (ChannelMix(), (4, 5)),
        (NoisyFeatures(), (4, 5)),
    ],
    ids=lambda value: type(value).__name__,
)
@permuted_and_repeating
@pytest.mark.parametrize("lam", [0.4, BY_ROW], ids=["per_batch", "by_row"])
def test_first_and_second_derivative_equal_finite_differences(
    way: Any, shape: tuple[int, ...], lam: Any, partner: list[int]
) -> None:
    plan, hidden = plan_of(way, lam, partner), states(*shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: interpolate(x, plan)[0], hidden)
    assert torch.autograd.gradgradcheck(lambda x: interpolate(x, plan)[0].square(), hidden)


WITH_NOISE = [*EVERY_WAY, pytest.param(NoisyFeatures(), IMAGES, id="noisy")]
every_way_with_noise = pytest.mark.parametrize(("way", "shape"), WITH_NOISE)


@every_way_with_noise
@permuted_and_repeating
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-2), (torch.float16, 8e-3)], ids=str
)
def test_dtype_is_kept_forward_and_backward(
    way: Any, shape: tuple[int, ...], partner: list[int], dtype: torch.dtype, tolerance: float
) -> None:
    plan, grad = plan_of(way, 0.4, partner), states(*shape, seed=1)
    results = []
    for kind in (torch.float64, dtype):
        hidden = states(*shape).to(dtype).to(kind).requires_grad_()
        mixed, used = interpolate(hidden, plan)
        mixed.backward(grad.to(dtype).to(kind))
        assert hidden.grad is not None
        assert mixed.dtype == hidden.grad.dtype == kind
        assert used.lam.dtype in (torch.float32, torch.float64)  # weights are counted in no less
        results.append((mixed.detach().double(), hidden.grad.double(), used.lam.double()))
    for got, wanted in zip(results[1], results[0], strict=True):
        assert_close(got, wanted, rtol=0, atol=tolerance)


@every_way_with_noise
@permuted_and_repeating
@pytest.mark.parametrize("lam", [0.4, BY_ROW], ids=["per_batch", "by_row"])
def test_complex_rows_are_mixed_in_both_parts(way: Any, shape: tuple[int, ...], partner: list[int], lam: Any) -> None:
    if isinstance(way, NoisyFeatures):
        way = NoisyFeatures(0.0)  # the additive noise is real
    plan, (real, imaginary) = plan_of(way, lam, partner), (states(*shape), states(*shape, seed=1))
    hidden = torch.complex(real, imaginary).requires_grad_()
    mixed, used = interpolate(hidden, plan)
    for got, part in ((mixed.real, real), (mixed.imag, imaginary)):
        wanted, plan_wanted = interpolate(part, plan)
        assert_close(got.detach(), wanted, rtol=0, atol=1e-15)
        assert torch.equal(used.lam, plan_wanted.lam)
    grad = torch.complex(imaginary, real)
    (got,) = torch.autograd.grad(mixed, hidden, grad)
    leaves = [real.clone().requires_grad_(), imaginary.clone().requires_grad_()]
    parts = [
        torch.autograd.grad(interpolate(x, plan)[0], x, g)[0] for x, g in zip(leaves, (imaginary, real), strict=True)
    ]
    assert_close(got, torch.complex(*parts), rtol=0, atol=1e-15)


@every_way_with_noise
@permuted_and_repeating
@pytest.mark.parametrize("lam", [0.4, BY_ROW], ids=["per_batch", "by_row"])
@pytest.mark.parametrize("is_trained", [False, True], ids=["no_grad", "grad"])
def test_memory_format_is_kept(
    way: Any, shape: tuple[int, ...], partner: list[int], lam: Any, is_trained: bool
) -> None:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    plan = plan_of(way, lam, partner)
    layouts = [states(*shape), states(shape[1], shape[0], *shape[2:]).transpose(0, 1)]
    layouts += [states(*shape).contiguous(memory_format=formats[len(shape)])] if len(shape) in formats else []
    for hidden in layouts:
        leaf = hidden.clone(memory_format=torch.preserve_format).requires_grad_(is_trained)
        mixed, _ = interpolate(leaf, plan)
        assert mixed.stride() == hidden.stride()
        assert_close(mixed.detach(), interpolate(hidden.contiguous(), plan)[0], rtol=0, atol=1e-15)


@every_way_with_noise
def test_nothing_that_is_given_is_changed(way: Any, shape: tuple[int, ...]) -> None:
    hidden, plan = states(*shape), plan_of(way, 0.4)
    tensors = [hidden, plan.lam, plan.partner, plan.inverse, plan.seed]
    before = [tensor.clone() for tensor in tensors]
    global_states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    mixed, used = interpolate(hidden, plan)
    mixed.zero_()
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy)
    assert used.partner is plan.partner
    assert torch.equal(torch.get_rng_state(), global_states[0])
    assert np.array_equal(np.random.get_state()[1], global_states[1])  # noqa: NPY002
    assert random.getstate() == global_states[2]


@every_way_with_noise
def test_global_random_states_are_not_read(way: Any, shape: tuple[int, ...]) -> None:
    mixed = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        mixed.append(interpolate(states(*shape), plan_of(way, 0.4))[0])
    assert torch.equal(*mixed)
    assert not torch.equal(interpolate(states(*shape), plan_of(way, 0.4, seed=12))[0], mixed[0])


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@compiles
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo itself
@pytest.mark.parametrize(
    ("way", "shape", "lam"),
    [
        pytest.param(CutMix(), IMAGES, 0.4, id="cutmix"),
        pytest.param(CutMix(), IMAGES, BY_ROW, id="cutmix_by_row"),
        pytest.param(PatchUp(0.5, 3), IMAGES, 0.4, id="patchup"),
        pytest.param(TokenMix(), TOKENS, 0.4, id="token"),
        pytest.param(ChannelMix(), VECTORS, BY_ROW, id="channel_by_row"),
        pytest.param(NoisyFeatures(), IMAGES, 0.4, id="noisy"),
    ],
)
def test_compiled_equals_eager_whatever_the_plan(way: Any, shape: tuple[int, ...], lam: Any) -> None:
    def layer(hidden: Tensor, plan: MixPlan) -> tuple[Tensor, Tensor]:
        mixed, used = interpolate(hidden.sin(), plan)
        return mixed.cos(), used.lam

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for seed in (11, 12, 13):
        results = []
        for run in (layer, compiled):
            hidden = states(*shape).requires_grad_()
            output, lams = run(hidden, plan_of(way, lam, seed=seed))
            output.backward(states(*shape, seed=1))
            results.append((output.detach(), hidden.grad, lams.double()))
        for got, wanted in zip(results[1], results[0], strict=True):
            assert_close(got, wanted, rtol=0, atol=1e-15)


@every_way_with_noise
@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
def test_recomputation_repeats_the_mix(way: Any, shape: tuple[int, ...], reentrant: bool) -> None:
    plan, grads, calls = plan_of(way, 0.4), [], []

    def layer(hidden: Tensor) -> Tensor:
        calls.append(1)
        return interpolate(hidden.sin(), plan)[0].square()

    for run in (layer, lambda hidden: checkpoint(layer, hidden, use_reentrant=reentrant)):
        hidden = states(*shape).requires_grad_()
        run(hidden).backward(states(*shape, seed=1))
        grads.append(hidden.grad)
    assert torch.equal(*grads)
    assert len(calls) == 3


@every_way_with_noise
def test_a_plan_with_an_interpolation_is_not_mixed_linearly(way: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^The plan has an interpolation of its own.*interpolate\(hidden, plan\)\.$"):
        mix(states(*shape), plan_of(way, 0.4))


@pytest.mark.parametrize(
    ("way", "shape", "problem"),
    [
        (CutMix(), VECTORS, "it cuts boxes out of (N, C, H, W) or (N, C, D, H, W)"),
        (CutMix(), TOKENS, "it cuts boxes out of (N, C, H, W) or (N, C, D, H, W)"),
        (PatchUp(), TOKENS, "it mixes blocks of feature maps (N, C, H, W)"),
        (PatchUp(), VOLUMES, "it mixes blocks of feature maps (N, C, H, W)"),
        (TokenMix(), IMAGES, "it exchanges tokens of (N, T, D)"),
        (ChannelMix(), (4,), "it exchanges channels of dimension 1"),
        (ChannelMix(2), VECTORS, "it exchanges channels of dimension 2"),
        (ChannelMix(-2), VECTORS, "it exchanges channels of dimension -2"),
    ],
    ids=lambda value: str(value),
)
def test_shapes_that_cannot_be_mixed_are_refused(way: Any, shape: tuple[int, ...], problem: str) -> None:
    message = f"{way!r} cannot mix hidden states of shape {shape}: {problem}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        interpolate(states(*shape), plan_of(way, 0.4))


@every_way_with_noise
def test_integers_and_other_numbers_of_rows_are_refused(way: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(TypeError, match=r"^Only floating point hidden states can be mixed, got torch\.int64\."):
        interpolate(torch.zeros(shape, dtype=torch.int64), plan_of(way, 0.4))
    with pytest.raises(ValueError, match=r"^The plan is for 4 rows, but the hidden state has shape \(5,"):
        interpolate(torch.zeros(5, *shape[1:]), plan_of(way, 0.4))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PatchUp(0.0), ValueError, "gamma must be a number in (0, 1], got 0.0. The paper uses 0.5 and more."),
        (
            lambda: PatchUp(block_size=4),
            ValueError,
            "block_size must be an odd integer >= 1, got 4. The paper uses 7, and 3 or 5 deep in the network.",
        ),
        (
            lambda: PatchUp(block_size=3.0),  # type: ignore[arg-type]
            TypeError,
            "block_size must be an odd integer >= 1, got 3.0 of type float. The paper uses 7, and 3 or 5 deep in the "
            "network.",
        ),
        (
            lambda: TokenMix(2.5),  # type: ignore[arg-type]
            TypeError,
            "mask must be the name of a part of the batch, got 2.5 of type float. None counts all tokens.",
        ),
        (lambda: ChannelMix(0), ValueError, "dim must be an integer other than 0, got 0. 0 is the batch."),
        (
            lambda: PlanSource(["a"], interpolation=CutMix),
            TypeError,
            f"interpolation must be a function of hidden states and the plan, got {CutMix!r} of type type. Give "
            "CutMix(), say; None is the linear one.",
        ),
    ],
    ids=["gamma", "even", "float", "mask", "dim", "class"],
)
def test_settings_out_of_range_are_refused(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as refusal:
        make()
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    "way", [CutMix(), PatchUp(0.7, 5), TokenMix("a.mask"), ChannelMix(-1), NoisyFeatures(0.1, 0)], ids=repr
)
def test_repr_is_the_call_that_makes_it(way: Any) -> None:
    assert eval(repr(way)) == pickle.loads(pickle.dumps(way)) == way


def test_masks_of_another_number_of_tokens_get_the_union() -> None:
    plan = plan_of(TokenMix(), 0.5)
    mask = torch.rand(4, 1, 10) < 0.5
    assert torch.equal(union(mask[:, 0], plan, True, (4, 9, 2)), mask[:, 0] | mask[plan.partner, 0])
    assert torch.equal(
        union(mask[:, 0, 1:], plan, True, (4, 9, 2)),
        TokenMix().mix_mask(mask[:, :, 1:], mask[plan.partner][:, :, 1:], plan, (4, 9, 2))[:, 0],
    )  # type: ignore[index]
