import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.autograd import forward_ad
from torch.testing import assert_close
from versions import compiles

from mm_lightning.mixup import BetaRatio, MixPlan, PlanSource, linear, mix, mixed_cross_entropy

PARTNER = torch.tensor([2, 0, 3, 1])
INVERSE = torch.tensor([1, 3, 0, 2])
REPEATING = torch.tensor([1, 1, 1, 0])
LAMS = torch.tensor([0.3, 1.0, 0.0, 0.8])

per_batch_and_per_sample = pytest.mark.parametrize("per_sample", [False, True], ids=["per_batch", "per_sample"])
permuted_and_repeating = pytest.mark.parametrize("permuted", [True, False], ids=["permutation", "repeating"])


def make_plan(per_sample: bool, permuted: bool = True, lam: float = 0.3) -> MixPlan:
    lams = LAMS if per_sample else torch.tensor([lam]).expand(4)
    return MixPlan("layer", PARTNER, lams, INVERSE) if permuted else MixPlan("layer", REPEATING, lams)


def rows(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)


def _reference_mix(hidden: Tensor, plan: MixPlan) -> Tensor:
    lam, partner = plan.lam.double().tolist(), plan.partner.tolist()
    return torch.stack([lam[i] * hidden[i] + (1 - lam[i]) * hidden[partner[i]] for i in range(len(lam))])


def _reference_grad(grad: Tensor, plan: MixPlan) -> Tensor:
    lam, partner = plan.lam.double().tolist(), plan.partner.tolist()
    result = torch.zeros_like(grad)
    for i in range(len(lam)):
        result[i] += lam[i] * grad[i]
        result[partner[i]] += (1 - lam[i]) * grad[i]
    return result


def mixed_and_grad(hidden: Tensor, plan: MixPlan, grad: Tensor) -> tuple[Tensor, Tensor]:
    leaf = hidden.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    mixed = mix(leaf, plan)
    (leaf_grad,) = torch.autograd.grad(mixed, leaf, grad)
    return mixed.detach(), leaf_grad


def test_linear_by_hand() -> None:
    own = torch.tensor([[1.0, 2.0], [10.0, 0.0]], dtype=torch.float64)
    partner = torch.tensor([[3.0, 6.0], [20.0, -8.0]], dtype=torch.float64)
    mixed = linear(own, partner, torch.tensor([0.25, 0.5]))
    assert_close(mixed, torch.tensor([[2.5, 5.0], [15.0, -4.0]], dtype=torch.float64), rtol=0, atol=0)


def test_linear_weights_the_row_itself_by_lam_in_the_rows_own_precision() -> None:
    own, partner, lam = rows(4, 3, 2), rows(4, 3, 2).flip(0), LAMS
    expected = torch.stack([lam[i].double() * own[i] + (1 - lam[i].double()) * partner[i] for i in range(4)])
    assert_close(linear(own, partner, lam), expected, rtol=0, atol=1e-14)


def test_linear_mixes_one_hot_targets() -> None:
    own, partner = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]), torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    mixed = linear(own, partner, torch.tensor([0.75]).expand(2))
    assert_close(mixed, torch.tensor([[0.75, 0.25, 0.0], [0.0, 0.0, 1.0]]), rtol=0, atol=0)


def test_linear_passes_gradients_to_both() -> None:
    own, partner = rows(4, 3).requires_grad_(), rows(4, 3).flip(0).requires_grad_()
    grad = rows(4, 3).square()
    linear(own, partner, LAMS).backward(grad)
    lam = LAMS.double().unsqueeze(1)
    assert_close(own.grad, lam * grad)
    assert_close(partner.grad, (1 - lam) * grad)


@pytest.mark.parametrize(
    ("own", "partner", "lam", "message"),
    [
        pytest.param((4, 2), (4, 3), (4,), r"must have one shape, got \(4, 2\) and \(4, 3\)", id="shapes"),
        pytest.param((4, 2), (4, 2), (2,), r"lam must be \(N,\).*got \(2,\) for \(4, 2\)", id="lam_too_short"),
        pytest.param((4, 2), (4, 2), (4, 1), r"lam must be \(N,\).*got \(4, 1\) for \(4, 2\)", id="lam_column"),
        pytest.param((4, 2), (4, 2), (), r"lam must be \(N,\).*got \(\) for \(4, 2\)", id="lam_scalar"),
        pytest.param((), (), (), r"lam must be \(N,\).*got \(\) for \(\)", id="scalars"),
    ],
)
def test_linear_refuses_shapes_that_do_not_fit(
    own: tuple[int, ...], partner: tuple[int, ...], lam: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        linear(torch.zeros(own), torch.zeros(partner), torch.ones(lam))


def test_mix_by_hand() -> None:
    hidden = torch.tensor([[1.0], [5.0], [9.0]], dtype=torch.float64)
    plan = MixPlan("layer", torch.tensor([1, 2, 0]), torch.tensor([0.25]).expand(3), torch.tensor([2, 0, 1]))
    assert mix(hidden, plan).tolist() == [[4.0], [8.0], [3.0]]


@per_batch_and_per_sample
@permuted_and_repeating
@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 3, 5), (4, 3, 2, 5)], ids=lambda shape: f"{len(shape)}d")
def test_mix_equals_the_equation(per_sample: bool, permuted: bool, shape: tuple[int, ...]) -> None:
    hidden, plan = rows(*shape), make_plan(per_sample, permuted)
    assert_close(mix(hidden, plan), _reference_mix(hidden, plan), rtol=0, atol=1e-14)


@per_batch_and_per_sample
@permuted_and_repeating
def test_gradient_equals_the_equation(per_sample: bool, permuted: bool) -> None:
    plan, grad = make_plan(per_sample, permuted), rows(4, 3, 2).cos()
    _, hidden_grad = mixed_and_grad(rows(4, 3, 2), plan, grad)
    assert_close(hidden_grad, _reference_grad(grad, plan), rtol=0, atol=1e-14)


@per_batch_and_per_sample
@permuted_and_repeating
def test_gradient_that_will_be_differentiated_equals_the_equation(per_sample: bool, permuted: bool) -> None:
    plan, hidden, grad = make_plan(per_sample, permuted), rows(4, 3).requires_grad_(), rows(4, 3).cos()
    (hidden_grad,) = torch.autograd.grad(mix(hidden, plan), hidden, grad, create_graph=True)  # takes another way
    assert_close(hidden_grad, _reference_grad(grad, plan), rtol=0, atol=1e-14)


@per_batch_and_per_sample
@permuted_and_repeating
def test_first_and_second_derivative_equal_finite_differences(per_sample: bool, permuted: bool) -> None:
    plan, hidden = make_plan(per_sample, permuted), rows(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: mix(x, plan), hidden)
    assert torch.autograd.gradgradcheck(lambda x: mix(x, plan).square(), hidden)


@permuted_and_repeating
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_lam_one_returns_own_rows(permuted: bool, dtype: torch.dtype) -> None:
    hidden = rows(4, 3, dtype=dtype)
    assert torch.equal(mix(hidden, make_plan(False, permuted, lam=1.0)), hidden)


@permuted_and_repeating
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_lam_zero_returns_the_partners(permuted: bool, dtype: torch.dtype) -> None:
    hidden, plan = rows(4, 3, dtype=dtype), make_plan(False, permuted, lam=0.0)
    assert torch.equal(mix(hidden, plan), hidden[plan.partner])


@per_batch_and_per_sample
@permuted_and_repeating
def test_mixed_rows_lie_between_their_parents(per_sample: bool, permuted: bool) -> None:
    hidden, plan = rows(4, 50), make_plan(per_sample, permuted)
    partner, mixed = hidden[plan.partner], mix(hidden, plan)
    assert (mixed >= torch.minimum(hidden, partner) - 1e-15).all()
    assert (mixed <= torch.maximum(hidden, partner) + 1e-15).all()


@per_batch_and_per_sample
@permuted_and_repeating
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        pytest.param(torch.float64, 1e-14, id="float64"),
        pytest.param(torch.float32, 1e-6, id="float32"),
        pytest.param(torch.bfloat16, 3e-2, id="bfloat16"),
        pytest.param(torch.float16, 4e-3, id="float16"),
    ],
)
def test_dtype_is_kept_forward_and_backward(
    per_sample: bool, permuted: bool, dtype: torch.dtype, tolerance: float
) -> None:
    hidden, plan, grad = rows(4, 6, dtype=dtype), make_plan(per_sample, permuted), rows(4, 6, dtype=dtype).cos()
    mixed, hidden_grad = mixed_and_grad(hidden, plan, grad)
    assert mixed.dtype == hidden_grad.dtype == dtype
    assert_close(mixed.double(), _reference_mix(hidden.double(), plan), rtol=0, atol=tolerance)
    assert_close(hidden_grad.double(), _reference_grad(grad.double(), plan), rtol=0, atol=tolerance)


@per_batch_and_per_sample
@permuted_and_repeating
@pytest.mark.parametrize(
    "hidden",
    [
        pytest.param(rows(4), id="one_number_a_row"),
        pytest.param(rows(4, 3, 2, 5), id="contiguous"),
        pytest.param(rows(4, 3, 2, 5).to(memory_format=torch.channels_last), id="channels_last"),
        pytest.param(rows(4, 3, 2, 5, 2).to(memory_format=torch.channels_last_3d), id="channels_last_3d"),
        pytest.param(rows(7, 4, 3).transpose(0, 1), id="sequence_first"),
        pytest.param(rows(3, 4).t(), id="transposed"),
    ],
)
def test_memory_format_is_kept(per_sample: bool, permuted: bool, hidden: Tensor) -> None:
    plan = make_plan(per_sample, permuted)
    mixed = mix(hidden, plan)
    assert mixed.stride() == hidden.stride()
    assert_close(mixed, _reference_mix(hidden, plan), rtol=0, atol=1e-14)


@permuted_and_repeating
def test_rows_of_a_sliced_tensor_are_mixed(permuted: bool) -> None:
    hidden, plan = rows(4, 10)[:, ::3], make_plan(False, permuted)
    assert_close(mix(hidden, plan), _reference_mix(hidden, plan), rtol=0, atol=1e-14)


@per_batch_and_per_sample
@permuted_and_repeating
def test_hidden_state_and_plan_are_not_changed(per_sample: bool, permuted: bool) -> None:
    hidden, plan = rows(4, 3), make_plan(per_sample, permuted)
    tensors = [hidden, plan.lam, plan.partner] + ([plan.inverse] if permuted else [])
    before = [tensor.clone() for tensor in tensors]
    mixed = mix(hidden, plan)
    mixed.zero_()
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy)


def test_plan_that_does_not_mix_returns_the_very_same_tensor() -> None:
    for hidden in (rows(4, 3), torch.arange(4)):
        assert mix(hidden, MixPlan.unmixed(4)) is hidden


def test_integers_are_refused() -> None:
    with pytest.raises(
        TypeError, match=r"Only floating point hidden states.*got torch\.int64\. Mix after an embedding"
    ):
        mix(torch.arange(4), make_plan(False))


@pytest.mark.parametrize("shape", [(5, 4), (2,), ()], ids=["too_many", "too_few", "scalar"])
def test_another_number_of_rows_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"plan is for 4 rows.*shape \({', '.join(map(str, shape))},?\)"):
        mix(torch.zeros(shape), make_plan(False))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@compiles
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo itself
@per_batch_and_per_sample
@permuted_and_repeating
def test_compiled_mix_equals_eager(per_sample: bool, permuted: bool) -> None:
    def layer(hidden: Tensor) -> Tensor:
        return mix(hidden.sin(), plan).cos()

    plan, grad = make_plan(per_sample, permuted), rows(4, 3)
    results = []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        hidden = rows(4, 3).requires_grad_()
        output = run(hidden)
        output.backward(grad)
        results.append((output.detach(), hidden.grad))
    assert_close(results[1], results[0], rtol=0, atol=1e-15)


@compiles
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler of graphs needs a compiler of C++")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler itself
@pytest.mark.filterwarnings("ignore:.*TF32:UserWarning")
def test_compiled_mix_is_one_kernel_with_its_neighbours() -> None:
    plan, hidden = make_large_plan(64, per_sample=False, knows_number=True), rows(64, 96, dtype=torch.float32)
    run = torch.compile(lambda leaf: mix(leaf.relu(), plan).relu().sum())
    leaf = hidden.requires_grad_()
    _, codes = run_and_get_code(lambda: run(leaf).backward())
    assert [code.count("async_compile.cpp") for code in codes] == [1, 1]  # forward, backward
    (expected,) = torch.autograd.grad(mix(hidden.relu(), plan).relu().sum(), hidden)
    assert_close(leaf.grad, expected, rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@per_batch_and_per_sample
def test_nothing_waits_for_the_device(per_sample: bool) -> None:
    lam = BetaRatio(1.0, per_sample)
    source = PlanSource(("layer",), ratio=lam)
    hidden = torch.randn(64, 10, device="cuda", requires_grad=True)
    targets = torch.randint(10, (64,), device="cuda")
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in range(3):
            plan = source.draw(64, batch_index=batch).to("cuda")
            mixed_cross_entropy(mix(hidden, plan), targets, plan).backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.fixture
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("deterministic")
@per_batch_and_per_sample
@permuted_and_repeating
def test_deterministic_algorithms_suffice(per_sample: bool, permuted: bool) -> None:
    plan, grad = make_plan(per_sample, permuted), rows(4, 3)
    mixed, hidden_grad = mixed_and_grad(rows(4, 3), plan, grad)
    assert_close(mixed, _reference_mix(rows(4, 3), plan))
    assert_close(hidden_grad, _reference_grad(grad, plan))


# Large hidden states are summed in one pass by another kernel: rows of one piece, of several, of none that fits.
many = pytest.mark.parametrize(
    "shape",
    [(4, 2**18), (512, 3000), (9, 131101), (4, 65, 64, 64), (3, 16, 16, 32, 64)],
    ids=["pieces", "one_piece", "prime", "image", "volume"],
)


def make_large_plan(n: int, per_sample: bool, knows_number: bool) -> MixPlan:
    generator = torch.Generator().manual_seed(n)
    partner = torch.randperm(n, generator=generator)
    lams = torch.rand(n, generator=generator) if per_sample else torch.tensor([0.3]).expand(n)
    return MixPlan("layer", partner, lams, partner.argsort(), float(lams[0]) if knows_number else None)


@many
@pytest.mark.parametrize(
    ("per_sample", "knows_number"), [(True, False), (False, False), (False, True)], ids=["rows", "tensor", "number"]
)
def test_large_hidden_states_and_their_gradients_equal_a_loop(
    shape: tuple[int, ...], per_sample: bool, knows_number: bool
) -> None:
    plan = make_large_plan(shape[0], per_sample, knows_number)
    hidden, grad = rows(*shape, dtype=torch.float32), rows(*shape).flip(0).float()
    mixed, leaf_grad = mixed_and_grad(hidden, plan, grad)
    assert_close(mixed.double(), _reference_mix(hidden.double(), plan), rtol=0, atol=2e-6)
    assert_close(leaf_grad.double(), _reference_grad(grad.double(), plan), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_large_hidden_states_of_half_precision_are_rounded_like_it(dtype: torch.dtype) -> None:
    plan = make_large_plan(64, per_sample=True, knows_number=False)
    hidden, grad = rows(64, 16384, dtype=dtype), rows(64, 16384).flip(0).to(dtype)
    mixed, leaf_grad = mixed_and_grad(hidden, plan, grad)
    assert mixed.dtype is leaf_grad.dtype is dtype
    # The weights and the sum are rounded, each by half a unit in the last place at most, of numbers up to 5.
    assert torch.cat((hidden, grad)).abs().max() < 5
    atol = 1.5 * 5 * torch.finfo(dtype).eps
    assert_close(mixed.double(), _reference_mix(hidden.double(), plan), rtol=0, atol=atol)
    assert_close(leaf_grad.double(), _reference_grad(grad.double(), plan), rtol=0, atol=atol)


@pytest.mark.parametrize("shape", [(4, 65, 64, 64), (3, 16, 16, 32, 64)], ids=["image", "volume"])
def test_large_channels_last_hidden_states_stay_channels_last(shape: tuple[int, ...]) -> None:
    plan = make_large_plan(shape[0], per_sample=False, knows_number=True)
    memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    hidden = rows(*shape, dtype=torch.float32).contiguous(memory_format=memory_format)
    grad = rows(*shape).flip(0).float().contiguous(memory_format=memory_format)
    mixed, leaf_grad = mixed_and_grad(hidden, plan, grad)
    assert mixed.stride() == leaf_grad.stride() == hidden.stride()
    assert_close(mixed.double(), _reference_mix(hidden.double(), plan), rtol=0, atol=2e-6)
    assert_close(leaf_grad.double(), _reference_grad(grad.double(), plan), rtol=0, atol=2e-6)


def test_large_hidden_states_of_other_layouts_are_mixed_as_well() -> None:
    plan = make_large_plan(64, per_sample=False, knows_number=True)
    hidden = rows(16384, 64, dtype=torch.float32).t()  # (N, D), the rows in steps of N
    mixed, leaf_grad = mixed_and_grad(hidden, plan, torch.ones(64, 1).expand(64, 16384))
    assert_close(mixed.double(), _reference_mix(hidden.double(), plan), rtol=0, atol=2e-6)
    expected = _reference_grad(torch.ones(64, 1, dtype=torch.float64), plan).expand(64, 16384)
    assert_close(leaf_grad.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@per_batch_and_per_sample
def test_rows_of_half_precision_mixed_with_their_like_stay_as_they_are(dtype: torch.dtype, per_sample: bool) -> None:
    for lam in (0.001, 0.3, 0.5, 0.7, 0.999):
        lams = torch.full((64,), lam) if per_sample else torch.tensor([lam]).expand(64)
        plan = MixPlan("layer", PARTNER.repeat(16), lams, torch.arange(64))
        assert torch.equal(mix(torch.ones(64, 16384, dtype=dtype), plan), torch.ones(64, 16384, dtype=dtype))


@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["plain", "channels_last"]
)
def test_large_mixed_hidden_states_may_be_changed_in_place(memory_format: torch.memory_format) -> None:
    plan = make_large_plan(4, per_sample=False, knows_number=True)
    hidden = rows(4, 65, 64, 64, dtype=torch.float32).contiguous(memory_format=memory_format)
    leaf = hidden.clone(memory_format=torch.preserve_format).requires_grad_()
    mix(leaf, plan).relu_().sum().backward()
    expected = _reference_grad((_reference_mix(hidden.double(), plan) > 0).double(), plan)
    assert leaf.grad is not None
    assert_close(leaf.grad.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # by make_dual itself
def test_tangents_pass_through_large_hidden_states() -> None:
    plan = make_large_plan(64, per_sample=True, knows_number=False)
    hidden, tangent = rows(64, 16384, dtype=torch.float32), rows(64, 16384).flip(0).float()
    with forward_ad.dual_level():
        mixed = forward_ad.unpack_dual(mix(forward_ad.make_dual(hidden, tangent), plan))
    assert_close(mixed.tangent.double(), _reference_mix(tangent.double(), plan), rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", [(64, 16384), (2**18, 4)], ids=["wide", "narrow"])
def test_one_copy_is_all_that_mixing_allocates_and_nothing_is_kept(shape: tuple[int, int]) -> None:
    plan = make_large_plan(shape[0], per_sample=False, knows_number=True)
    leaf = rows(*shape, dtype=torch.float32).requires_grad_()  # 4 MiB
    kept: list[int] = []
    keeping = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t)
    with keeping, torch.profiler.profile(profile_memory=True) as forward:
        mixed = mix(leaf, plan)
    grad = torch.ones_like(mixed)
    with torch.profiler.profile(profile_memory=True) as backward:
        torch.autograd.grad(mixed, leaf, grad)
    assert sum(kept) == 2 * shape[0] * 8  # partner and inverse, int64 (N,)
    for profile in (forward, backward):
        allocated = sum(event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > 0)
        assert 1 <= allocated / leaf.nbytes < 1.05
