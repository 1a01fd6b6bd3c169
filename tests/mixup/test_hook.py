import copy
import dataclasses
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from versions import compiles

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
    assert [mixer.times_mixed(name) for name in ("0", "2", "4")] == [[1], [1], [1]]


def test_input_plan_mixes_the_batch_and_no_module(net: nn.Sequential, mixer: Mixer) -> None:
    plan, rows = make_plan("input"), make_rows()
    mixer.start(plan)
    assert_close(mixer.mix_input(rows), 0.3 * rows + 0.7 * rows[PARTNER], rtol=0, atol=1e-7)
    assert torch.equal(net(rows), make_net()(rows))


def test_nothing_is_mixed_or_recorded_outside_start_and_stop(net: nn.Sequential, mixer: Mixer) -> None:
    rows, plain = make_rows(), make_net()(make_rows())
    assert torch.equal(net(rows), plain)
    mixer.start(make_plan("2"))
    mixer.stop()
    assert torch.equal(net(rows), plain)
    assert torch.equal(net(make_rows(7)), make_net()(make_rows(7)))  # a batch of another size passes
    assert mixer.times_mixed("2") == [0]


def test_unmixed_plan_records_and_mixes_nothing(net: nn.Sequential, mixer: Mixer) -> None:
    mixer.start(MixPlan.unmixed(N))
    assert torch.equal(net(make_rows()), make_net()(make_rows()))
    assert [mixer.times_mixed(layer) for layer in ("0", "2", "4")] == [[1], [1], [1]]  # they ran


def test_start_forgets_the_last_step(net: nn.Sequential, mixer: Mixer) -> None:
    mixer.start(make_plan("2"))
    net(make_rows())
    mixer.start(make_plan("4"))
    assert mixer.times_mixed("2") == [0]


def test_layer_that_runs_twice_is_counted_twice(net: nn.Sequential, mixer: Mixer) -> None:
    mixer.start(make_plan("2"))
    net(make_rows())
    net(make_rows())
    assert mixer.times_mixed("2") == [2]


def test_layer_repeats_what_it_returned(net: nn.Sequential, mixer: Mixer) -> None:
    mixer.start(make_plan("2"), keep=True)
    first, second = net[:3](make_rows()), net[:3](-make_rows())
    mixer.repeat(True)
    assert net[:3](make_rows()) is first
    assert net[:3](make_rows()) is second  # whatever comes in
    mixer.repeat(False)
    assert_close(net[:3](make_rows()), first, rtol=0, atol=0)
    assert net[:3](make_rows()) is not first


def test_layer_that_keeps_nothing_mixes_again_and_counts_once(net: nn.Sequential, mixer: Mixer) -> None:
    mixer.start(make_plan("2"))
    first = net[:3](make_rows())
    mixer.repeat(True)
    assert_close(net[:3](make_rows()), first, rtol=0, atol=0)
    assert mixer.times_mixed("2") == [1]


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
    assert mixer.times_mixed("2") == [1]


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
    ran = mixer.times_mixed("2")
    twin(make_rows())
    assert mixer.times_mixed("2") == ran  # the twin's hook is its own
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
    mixer.begin_backward()
    loss.backward()
    assert mixer.times_mixed(layer) == [1]  # the recomputation is not counted
    mixer.end_backward()
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
    mixer.begin_backward()
    loss.backward()
    mixer.end_backward()
    assert mixer.times_mixed("2") == [1]
    assert_close(net(rows), _reference_forward(make_net(), rows, plan), rtol=0, atol=1e-14)
    assert mixer.times_mixed("2") == [2]
    mixer.stop()
    mixer.begin_backward()
    mixer.end_backward()
    assert torch.equal(net(rows), make_net()(rows))


class Returns(nn.Module):
    def __init__(self, of: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.of = of

    def forward(self, rows: Tensor) -> Any:
        return self.of(rows)


def net_that_returns(of: Callable[[Tensor], Any], **settings: Any) -> tuple[nn.Sequential, Mixer]:
    net = nn.Sequential()
    net.add_module("body", Returns(of))
    dims = {net.body: settings["dims"]} if settings else {}
    mixer = Mixer(resolve_layers(net, "body"), dims=dims)
    mixer.attach()
    return net, mixer


UNMIXABLE = r"Layer 'body' cannot be mixed: the batch of 4 rows must be in dimension 0 of a floating point output, but "


@pytest.mark.parametrize(
    ("of", "found"),
    [
        pytest.param(lambda x: x.t(), r"the output has shape \(3, 4\) and type torch.float64", id="other_dimension"),
        pytest.param(lambda x: x.sum(), r"the output has shape \(\) and type torch.float64", id="scalar"),
        pytest.param(lambda x: x.long(), r"the output has shape \(4, 3\) and type torch.int64", id="integers"),
        pytest.param(lambda x: (x.t(), x.long()), "no tensor of its tuple is that", id="tuple"),
        pytest.param(lambda x: {"x": x.sum()}, "no tensor of its dict is that", id="dict"),
        pytest.param(lambda x: None, "no tensor of its NoneType is that", id="None"),
    ],
)
def test_output_that_cannot_be_mixed_is_refused_by_name(of: Callable[[Tensor], Any], found: str) -> None:
    net, mixer = net_that_returns(of)
    net(make_rows())  # not refused while the mixer is off
    mixer.start(make_plan("body"))
    with pytest.raises(ValueError, match=rf"^{UNMIXABLE}{found}\. Choose another layer, or name the dimension"):
        net(make_rows())
    mixer.detach()
    net(make_rows())


class Named(NamedTuple):
    hidden: Tensor
    lengths: Tensor


@dataclasses.dataclass(frozen=True)
class Output:
    hidden: Tensor
    rest: Any = None


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        pytest.param(lambda x: (x, "name"), lambda out: out[0], id="tuple"),
        pytest.param(lambda x: [x.long(), x], lambda out: out[1], id="list"),
        pytest.param(lambda x: {"x": x, "none": None}, lambda out: out["x"], id="dict"),
        pytest.param(lambda x: OrderedDict(x=x), lambda out: out["x"], id="OrderedDict"),
        pytest.param(lambda x: Named(x, torch.arange(N)), lambda out: out.hidden, id="named_tuple"),
        pytest.param(lambda x: Output(x, 3), lambda out: out.hidden, id="dataclass"),
        pytest.param(lambda x: {"a": [Output((x,))]}, lambda out: out["a"][0].hidden[0], id="nested"),
        pytest.param(lambda x: Output(None, [Output(x)]), lambda out: out.rest[0].hidden, id="nested_dataclass"),
    ],
)
def test_tensor_inside_an_output_is_mixed(wrap: Callable[[Tensor], Any], unwrap: Callable[[Any], Tensor]) -> None:
    net, mixer = net_that_returns(wrap)
    plan, rows = make_plan("body"), make_rows()
    plain = net(rows)
    mixer.start(plan)
    mixed = net(rows)
    assert mixer.times_mixed("body") == [1]
    mixer.detach()
    assert type(mixed) is type(plain)
    assert_close(unwrap(mixed), mix(rows, plan), rtol=0, atol=1e-14)
    assert torch.equal(unwrap(plain), rows)


def test_every_floating_tensor_with_the_batch_is_mixed_and_nothing_else() -> None:
    def of(x: Tensor) -> dict[str, Any]:
        return {"hidden": x, "pooled": x.mean(1), "lengths": torch.arange(N), "bias": x[0], "none": None, "name": "x"}

    net, mixer = net_that_returns(of)
    plan, rows = make_plan("body", per_sample=True), make_rows()
    plain = of(rows)
    mixer.start(plan)
    mixed = net(rows)
    mixer.detach()
    expected = {**plain, "hidden": mix(rows, plan), "pooled": mix(rows.mean(1), plan)}
    assert list(mixed) == list(expected)
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert_close(mixed[name], value, rtol=0, atol=1e-14)
        else:
            assert mixed[name] == value


@pytest.mark.parametrize("per_sample", [False, True], ids=["per_batch", "per_sample"])
def test_batch_in_another_dimension(per_sample: bool) -> None:
    net, mixer = net_that_returns(lambda x: (2 * x, x.sum(0)), dims=(1, None))
    plan = make_plan("body", per_sample)
    rows = torch.stack([make_rows(), -make_rows().exp()]).requires_grad_()  # (2, N, D)
    mixer.start(plan)
    mixed, summed = net(rows)
    mixer.detach()
    expected = torch.stack([mix(2 * part, plan) for part in rows])
    assert_close(mixed, expected, rtol=0, atol=1e-14)
    assert_close(summed, rows.sum(0), rtol=0, atol=0)  # which has no rows, it was said
    weight = torch.linspace(-1, 1, mixed.numel(), dtype=torch.float64).view_as(mixed)
    got, wanted = (torch.autograd.grad((value * weight).sum(), rows)[0] for value in (mixed, expected))
    assert_close(got, wanted, rtol=1e-12, atol=1e-14)


def test_output_without_the_batch_in_the_named_dimension_is_refused() -> None:
    net, mixer = net_that_returns(lambda x: x, dims=(1,))
    mixer.start(make_plan("body"))
    with pytest.raises(ValueError, match=r"4 rows must be in dimension 1 of a floating point output, but .* \(4, 3\)"):
        net(make_rows())
    mixer.detach()


def test_layer_without_module_needs_no_hook() -> None:
    mixer = Mixer([Layer("input")])
    mixer.attach()
    mixer.start(make_plan("input"))
    assert mixer.times_mixed("input") == []
    mixer.detach()


class Embeds(nn.Module):
    """Words and places are looked up, and a floating point tensor of the batch is added."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(6, D).double()
        self.kinds = nn.Embedding(2, D).double()

    def forward(self, words: Tensor, kinds: Tensor, rows: Tensor) -> Tensor:
        return self.words(words).mean(1) + self.kinds(kinds) + rows


def test_input_of_integers_is_mixed_after_each_embedding() -> None:
    net, plan = Embeds(), make_plan("input")
    words, kinds, rows = torch.arange(2 * N).view(N, 2) % 6, torch.tensor([0, 1, 1, 0]), make_rows()
    mixer = Mixer([Layer("input", (net.words, net.kinds))])
    plain = net(words, kinds, rows)
    mixer.attach()
    mixer.start(plan)
    assert torch.equal(mixer.mix_input(words), words)
    mixed_rows = mixer.mix_input(rows)
    mixed = net(words, kinds, mixed_rows)
    assert_close(mixed, mix(plain, plan), rtol=0, atol=1e-14)
    assert mixer.times_mixed("input") == [1, 1]
    mixer.detach()


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@compiles
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
        assert [mixer.times_mixed(layer) for layer in ("0", "2", "4")] == [[1], [1], [1]]
        mixer.stop()
        eager = make_net()
        output.square().sum().backward()
        _reference_forward(eager, rows, plan).square().sum().backward()
        assert_close(net[0].weight.grad, eager[0].weight.grad, rtol=0, atol=1e-13)
        net.zero_grad()
    assert len(graphs) <= 4  # |S| + 1


@compiles
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo itself
@pytest.mark.parametrize("keep", [False, True])
def test_compiled_network_returns_its_mixed_layer_only_to_be_kept(net: nn.Sequential, mixer: Mixer, keep: bool) -> None:
    returned: list[int] = []

    def counting(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        returned.append(len(graph.graph.output_node().args[0]))
        return graph

    mixer.start(make_plan("2"), keep=keep)
    torch.compile(net, backend=counting)(make_rows())
    assert returned == [1 + keep]
