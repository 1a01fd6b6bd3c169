import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from mm_lightning.mixup import BetaRatio, Layer, Mixer, MixPlan, PlanSource, mix, resolve_layers

N, D = 4, 3
PARTNER = torch.tensor([2, 0, 3, 1])
INVERSE = torch.tensor([1, 3, 0, 2])


def make_net() -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D), nn.Tanh())
    for parameter in net.parameters():
        nn.init.normal_(parameter, generator=generator)
    return net.double()


def make_rows(num_rows: int = N) -> Tensor:
    return torch.randn(num_rows, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def make_plan(layer: str, per_sample: bool = False) -> MixPlan:
    lam = torch.tensor([0.1, 0.9, 0.5, 0.0]) if per_sample else torch.tensor([0.3]).expand(N)
    return MixPlan(layer, PARTNER, lam, INVERSE)


@pytest.fixture
def net() -> nn.Sequential:
    return make_net()


@pytest.fixture
def mixer(net: nn.Sequential) -> Iterator[Mixer]:
    mixer = Mixer(resolve_layers(net, ["input", "0", "2", "4"]))
    mixer.attach()
    yield mixer
    mixer.detach()


def _reference_forward(blocks: nn.Sequential, hidden: Tensor, plan: MixPlan) -> Tensor:
    """The blocks, without hooks, one after another, mixed after the planned one."""
    lam = plan.lam.double().unsqueeze(1)
    for name, block in blocks.named_children():
        hidden = block(hidden)
        if name == plan.layer:
            hidden = lam * hidden + (1 - lam) * hidden[plan.partner]
    return hidden


@pytest.mark.parametrize("per_sample", [False, True], ids=["per_batch", "per_sample"])
@pytest.mark.parametrize("layer", ["0", "2", "4"])
def test_planned_layer_alone_is_mixed(net: nn.Sequential, mixer: Mixer, layer: str, per_sample: bool) -> None:
    plan, rows = make_plan(layer, per_sample), make_rows()
    mixer.start(plan)
    assert_close(net(rows), _reference_forward(make_net(), rows, plan), rtol=0, atol=1e-14)
    assert mixer.planned == layer
    assert (mixer.has_mixed, mixer.times_mixed, mixer.unreached) == (True, 1, [])
    assert [mixer.layers[index].name for index in mixer.ran] == ["0", "2", "4"]


def test_input_plan_mixes_the_batch_and_no_module(net: nn.Sequential, mixer: Mixer) -> None:
    plan, rows = make_plan("input"), make_rows()
    mixer.start(plan)
    assert_close(mixer.mix_input(rows), 0.3 * rows + 0.7 * rows[PARTNER], rtol=0, atol=1e-7)
    assert not mixer.has_mixed
    mixer.record_input()
    assert (mixer.planned, mixer.has_mixed, mixer.times_mixed) == ("input", True, 1)
    assert torch.equal(net(rows), make_net()(rows))
    assert mixer.times_mixed == 1


def test_nothing_is_mixed_or_recorded_outside_start_and_stop(net: nn.Sequential, mixer: Mixer) -> None:
    rows, plain = make_rows(), make_net()(make_rows())
    assert torch.equal(net(rows), plain)
    assert (mixer.planned, mixer.ran, mixer.has_mixed) == (None, [], False)
    mixer.start(make_plan("2"))
    mixer.stop()
    assert torch.equal(net(rows), plain)
    assert torch.equal(net(make_rows(7)), make_net()(make_rows(7)))  # a batch of another size passes
    assert (mixer.planned, mixer.ran, mixer.has_mixed) == (None, [], False)


def test_unmixed_plan_records_and_mixes_nothing(net: nn.Sequential, mixer: Mixer) -> None:
    mixer.start(MixPlan.unmixed(N))
    assert torch.equal(net(make_rows()), make_net()(make_rows()))
    assert (mixer.planned, mixer.has_mixed, mixer.times_mixed) == (None, False, 0)
    assert mixer.unreached == []


def test_start_forgets_the_last_step(net: nn.Sequential, mixer: Mixer) -> None:
    mixer.start(make_plan("2"))
    net(make_rows())
    mixer.losses.append("cross_entropy")
    mixer.start(make_plan("4"))
    assert (mixer.ran, mixer.losses, mixer.has_mixed) == ([], [], False)
    assert mixer.unreached == ["0", "2", "4"]


def test_layer_that_runs_twice_is_counted_twice(net: nn.Sequential, mixer: Mixer) -> None:
    mixer.start(make_plan("2"))
    net(make_rows())
    net(make_rows())
    assert mixer.times_mixed == 2


def test_first_mix_of_each_layer_is_known(mixer: Mixer) -> None:
    mixer.start(make_plan("2"))
    assert mixer.is_first_mix
    mixer.accept()
    assert not mixer.is_first_mix
    mixer.start(make_plan("4"))
    assert mixer.is_first_mix
    mixer.start(make_plan("2"))
    assert not mixer.is_first_mix


def test_detached_module_is_as_it_was(net: nn.Sequential) -> None:
    before = copy.deepcopy(net.state_dict())
    mixer = Mixer(resolve_layers(net, ["0", "2"]))
    mixer.attach()
    assert [len(block._forward_hooks) for block in net] == [1, 0, 1, 0, 0, 0]
    mixer.start(make_plan("2"))
    assert list(net.state_dict()) == list(before)
    mixer.detach()
    assert not any(block._forward_hooks or block._forward_pre_hooks or block._backward_hooks for block in net.modules())
    assert_close(dict(net.state_dict()), dict(before), rtol=0, atol=0)
    assert torch.equal(net(make_rows()), make_net()(make_rows()))
    assert mixer.planned is None


def test_detach_leaves_the_hooks_of_others(net: nn.Sequential) -> None:
    net[0].register_forward_hook(lambda module, args, output: 2 * output)
    mixer = Mixer(resolve_layers(net, "0"))
    mixer.attach()
    plan, rows = make_plan("0"), make_rows()
    mixer.start(plan)
    assert_close(net[0](rows), mix(2 * make_net()[0](rows), plan), rtol=0, atol=1e-14)
    mixer.detach()
    assert len(net[0]._forward_hooks) == 1


def test_module_attached_again_is_mixed_once(net: nn.Sequential, mixer: Mixer) -> None:
    mixer.detach()
    mixer.attach()
    plan, rows = make_plan("2"), make_rows()
    mixer.start(plan)
    assert_close(net(rows), _reference_forward(make_net(), rows, plan), rtol=0, atol=1e-14)
    assert mixer.times_mixed == 1


@pytest.mark.parametrize(
    "duplicate", [lambda net: pickle.loads(pickle.dumps(net)), copy.deepcopy], ids=["pickle", "copy"]
)
def test_hooked_module_can_be_duplicated(
    net: nn.Sequential, mixer: Mixer, duplicate: Callable[[nn.Sequential], nn.Sequential]
) -> None:
    mixer.start(make_plan("2"))
    twin = duplicate(net)
    mixer.stop()
    assert list(twin.state_dict()) == list(net.state_dict())
    ran = list(mixer.ran)
    twin(make_rows())
    assert mixer.ran == ran  # the twin reports to a mixer of its own
    assert torch.equal(net(make_rows()), make_net()(make_rows()))


class Checkpointed(nn.Module):
    """Blocks 2 and 3 are recomputed in the backward pass."""

    def __init__(self, blocks: nn.Sequential, use_reentrant: bool) -> None:
        super().__init__()
        self.blocks = blocks
        self.use_reentrant = use_reentrant

    def forward(self, rows: Tensor) -> Tensor:
        hidden = self.blocks[:2](rows)
        hidden = checkpoint(self.blocks[2:4], hidden, use_reentrant=self.use_reentrant)
        return self.blocks[4:](hidden)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non_reentrant", "reentrant"])
@pytest.mark.parametrize("per_sample", [False, True], ids=["per_batch", "per_sample"])
@pytest.mark.parametrize("layer", ["0", "2", "4"])
def test_recomputed_forward_pass_repeats_the_mix(
    net: nn.Sequential, mixer: Mixer, layer: str, per_sample: bool, use_reentrant: bool
) -> None:
    plan, plain = make_plan(layer, per_sample), make_net()
    mixer.start(plan)
    loss = Checkpointed(net, use_reentrant=use_reentrant)(make_rows()).square().sum()
    mixer.stop()
    mixer.begin_backward(plan, loss)
    loss.backward()
    mixer.end_backward()
    assert [mixer.layers[index].name for index in mixer.ran] == ["0", "2", "4"]  # the recomputation is not recorded
    assert torch.equal(net(make_rows()), plain(make_rows()))  # and off again
    expected = _reference_forward(plain, make_rows(), plan).square().sum()
    expected.backward()
    assert_close(loss, expected, rtol=1e-12, atol=0)
    grads, expected_grads = ([parameter.grad for parameter in root.parameters()] for root in (net, plain))
    assert_close(grads, expected_grads, rtol=1e-12, atol=1e-12)


def test_backward_within_a_step_leaves_the_step_on(net: nn.Sequential, mixer: Mixer) -> None:
    # manual optimization: training_step itself calls backward, and may run the network again
    plan, rows = make_plan("2"), make_rows()
    mixer.start(plan)
    loss = net(rows).sum()
    mixer.begin_backward(plan, loss)
    loss.backward()
    mixer.end_backward()
    assert (mixer.planned, mixer.times_mixed) == ("2", 1)
    assert_close(net(rows), _reference_forward(make_net(), rows, plan), rtol=0, atol=1e-14)
    assert mixer.times_mixed == 2
    mixer.stop()
    mixer.begin_backward(plan, loss)
    mixer.end_backward()
    assert mixer.planned is None


class Returns(nn.Module):
    def __init__(self, of: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.of = of

    def forward(self, rows: Tensor) -> Any:
        return self.of(rows)


@pytest.mark.parametrize(
    ("of", "error", "message"),
    [
        pytest.param(
            lambda x: (x, x), TypeError, "Layer 'body' returns a tuple; only the output of a layer that", id="tuple"
        ),
        pytest.param(lambda x: {"x": x}, TypeError, "Layer 'body' returns a dict", id="dict"),
        pytest.param(
            lambda x: x.t(),
            ValueError,
            r"Layer 'body' cannot be mixed: The plan is for 4 rows, but the hidden state has shape \(3, 4\)",
            id="batch_in_dimension_1",
        ),
        pytest.param(
            lambda x: x.sum(), ValueError, "Layer 'body' cannot be mixed: The plan is for 4 rows", id="scalar"
        ),
        pytest.param(lambda x: x.long(), TypeError, "Layer 'body' cannot be mixed: Only floating point", id="integers"),
    ],
)
def test_output_that_cannot_be_mixed_is_refused_by_name(
    of: Callable[[Tensor], Any], error: type[Exception], message: str
) -> None:
    net = nn.Sequential()
    net.add_module("body", Returns(of))
    mixer = Mixer(resolve_layers(net, "body"))
    mixer.attach()
    net(make_rows())  # not refused while the mixer is off
    mixer.start(make_plan("body"))
    with pytest.raises(error, match=message):
        net(make_rows())
    mixer.detach()
    net(make_rows())


def test_layer_without_module_needs_no_hook() -> None:
    mixer = Mixer([Layer("input")])
    mixer.attach()
    mixer.start(make_plan("input"))
    assert mixer.unreached == []
    mixer.detach()


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo itself
@pytest.mark.parametrize("per_sample", [False, True], ids=["per_batch", "per_sample"])
def test_compiled_module_is_mixed_as_planned_with_a_graph_a_layer(
    net: nn.Sequential, mixer: Mixer, per_sample: bool
) -> None:
    aot_eager, graphs = torch._dynamo.lookup_backend("aot_eager"), []

    def counting(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return aot_eager(graph, example_inputs)

    compiled = torch.compile(net, backend=counting, fullgraph=True)
    source = PlanSource(["0", "2", "4"], BetaRatio(2.0, per_sample), probability=0.7, seed=3)
    plans = [source.draw(N, batch_index=i) for i in range(24)]
    assert {plan.layer for plan in plans} == {None, "0", "2", "4"}
    for plan in plans:
        rows = make_rows()
        mixer.start(plan)
        output = compiled(rows)
        assert_close(output, _reference_forward(make_net(), rows, plan), rtol=0, atol=1e-14)
        assert mixer.times_mixed == (1 if plan.mixes else 0)
        assert len(mixer.ran) == 3
        mixer.stop()
        eager = make_net()
        output.square().sum().backward()
        _reference_forward(eager, rows, plan).square().sum().backward()
        assert_close(net[0].weight.grad, eager[0].weight.grad, rtol=0, atol=1e-13)
        net.zero_grad()
    assert len(graphs) <= 4  # |S| + 1
