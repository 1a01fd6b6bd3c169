from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.testing import assert_close

from mm_lightning.diagnostics.hidden_states import HiddenStates
from mm_lightning.evaluation.modes import evaluating


class _Strategy:
    """Of several processes: ``others`` is what they decided."""

    def __init__(self, others: bool = True) -> None:
        self.others = others

    def reduce_boolean_decision(self, decision: bool, all: bool) -> bool:
        assert all
        return decision and self.others


class _Net(LightningModule):
    """4-3-2; the ReLU writes over the first layer's output."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 2)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.idle = nn.Identity()
        self.strategy = _Strategy()

    @property
    def trainer(self) -> Any:
        return SimpleNamespace(strategy=self.strategy, world_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu_(self.first(x)))


def _by_hand(net: _Net, x: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        first = x @ net.first.weight.T + net.first.bias
        output = first.clamp_min(0) @ net.last.weight.T + net.last.bias
    return {"input": x, "first": first, "last": output, "output": output}


def _batch(seed: int, rows: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 4, generator=generator), torch.randint(3, (rows,), generator=generator)


def _collect(states: HiddenStates, net: _Net, *batches: Any) -> tuple[dict[str, Tensor], Tensor]:
    states.open(net)
    with torch.no_grad():
        for batch in batches:
            net(batch[0])
            states.keep(batch)
    collected = states.collected(net)
    assert collected is not None
    return collected


@pytest.mark.parametrize("max_rows", [100, 7, 3], ids=["all", "cut within a batch", "one batch"])
def test_layers_are_kept_in_the_order_asked_for(max_rows: int):
    net, batches = _Net(), [_batch(0), _batch(1, rows=1), _batch(2, rows=4)]
    names = ["output", "first", "input", "last"]
    hidden, targets = _collect(HiddenStates(names, max_rows), net, *batches)
    want = _by_hand(net, torch.cat([x for x, _ in batches]))
    assert list(hidden) == names
    for name in names:
        assert_close(hidden[name], want[name][:max_rows], rtol=1e-6, atol=1e-6)
    assert torch.equal(targets, torch.cat([y for _, y in batches])[:max_rows])


def test_dimensions_behind_the_first_are_flattened():
    net, (_, y) = _Net(), _batch(0)
    x = torch.randn(5, 2, 4)
    hidden, _ = _collect(HiddenStates(["first", "input"], 100), net, (x, y))
    assert_close(hidden["first"], _by_hand(net, x)["first"].reshape(5, 6))
    assert_close(hidden["input"], x.reshape(5, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_states_keep_their_precision(dtype: torch.dtype):
    net, (x, y) = _Net().to(dtype), _batch(0)
    hidden, _ = _collect(HiddenStates(["input", "first", "output"], 4), net, (x.to(dtype), y))
    want = _by_hand(net, x.to(dtype))
    for name, states in hidden.items():
        assert states.dtype == dtype
        assert_close(states, want[name][:4], rtol=0.02, atol=0.02)  # addmm and matmul round differently


def test_rows_are_copies():
    net, (x, y) = _Net(), _batch(0)
    want, states = _by_hand(net, x.clone()), HiddenStates(["input", "first", "output"], 100)
    states.open(net)
    with torch.no_grad():
        output = net(x)
    states.keep((x, y))
    own = y.clone()
    for tensor in (x, y, output):
        tensor.zero_()  # a loader may use its memory again
    hidden, targets = states.collected(net)
    assert torch.equal(targets, own)
    for name, kept in hidden.items():
        assert_close(kept, want[name])


def test_a_layer_that_runs_twice_gives_its_last_output():
    net, (x, y) = _Net(), _batch(0)
    states = HiddenStates(["first", "output"], 100)
    states.open(net)
    with torch.no_grad():
        net(x)
        net(2 * x)
    states.keep((x, y))
    hidden, _ = states.collected(net)
    assert_close(hidden["first"], _by_hand(net, 2 * x)["first"])
    assert_close(hidden["output"], _by_hand(net, 2 * x)["output"])


@pytest.mark.parametrize("returned", ["losses", "loss", "nothing"])
def test_output_is_of_the_call_within_a_call(returned: str):
    # with several processes Lightning calls a step through forward, and the step calls forward
    net, (x, y) = _Net(), _batch(0)
    own = net.forward

    def redirected(x: Tensor) -> Any:
        net.forward = own
        loss = nn.functional.cross_entropy(net(x), y % 2, reduction="none")
        return {"losses": loss, "loss": loss.mean(), "nothing": None}[returned]

    net.forward = redirected
    hidden, _ = _collect(HiddenStates(["output"], 100), net, (x, y))
    assert_close(hidden["output"], _by_hand(net, x)["output"])


def test_nothing_is_copied_once_the_there_are_enough_rows():
    net, states = _Net(), HiddenStates(["first", "output"], 5)
    hidden, _ = _collect(states, net, _batch(0), _batch(1))
    assert states.is_full
    assert not states._outputs
    assert_close(hidden["first"], _by_hand(net, _batch(0)[0])["first"])
    hidden, _ = _collect(states, net, _batch(1))  # opened again, it has room again
    assert_close(hidden["first"], _by_hand(net, _batch(1)[0])["first"])


def test_hooks_are_there_only_while_states_are_open():
    net, states = _Net(), HiddenStates(["input", "first", "output"], 100)
    for _ in range(2):
        _collect(states, net, _batch(0))
        assert (len(net.first._forward_hooks), len(net._forward_hooks), len(net._forward_pre_hooks)) == (1, 1, 1)
    states.close()
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in net.modules())
    states.keep(_batch(0))  # closed: nothing to keep
    assert states.collected(net) is None
    states.open(net)
    assert states.collected(net) is None  # what was collected before is forgotten


def test_nothing_is_gathered_where_another_process_has_no_rows():
    net, states = _Net(), HiddenStates(["first"], 100)
    _collect(states, net, _batch(0))
    net.strategy.others = False
    assert states.collected(net) is None


@dataclass(frozen=True)
class _Batch:
    ids: list[str]
    x: Tensor
    y: Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x, y: _Batch(["a", "b"], x, y),
        lambda x, y: {"meta": {"mask": y > 0, "ids": y + 9}, "data": {"views": [x, 2 * x], "truth": {"y": y}}},
        lambda x, y: {"one": [_Batch([], x, y)], "weights": torch.ones(5)},
    ],
    ids=["dataclass", "nested dict", "dataclass in a dict"],
)
def test_batches_of_other_kinds_are_walked_in_their_order(wrap: Any):
    net, (x, y) = _Net(), _batch(0)
    states = HiddenStates(["input", "first"], 100)
    states.open(net)
    net(x)
    states.keep(wrap(x, y))
    hidden, targets = states.collected(net)
    assert torch.equal(hidden["input"], x)
    assert torch.equal(targets, y)


@pytest.mark.parametrize(
    ("extra", "want"),
    [
        ([torch.tensor([2, 0, 1]), torch.tensor([True, False, True])], [2, 0, 1]),
        ([torch.tensor([2, 0, 1]), torch.tensor([[0, 1], [1, 0], [1, 1]])], [2, 0, 1]),
        ([torch.tensor([2, 0, 1]), torch.tensor([[1], [2], [0]])], [1, 2, 0]),
        ([torch.tensor([9, 9, 9]), {"label": torch.tensor([2, 0, 1], dtype=torch.uint8)}], [2, 0, 1]),
    ],
    ids=["not a mask", "not two columns", "one column", "dict"],
)
def test_targets_are_the_last_integers_with_one_entry_per_row(extra: list[Any], want: list[int]):
    net = _Net()
    _, targets = _collect(HiddenStates(["first"], 100), net, (torch.zeros(3, 4), *extra))
    assert targets.tolist() == want


@pytest.mark.parametrize(
    ("layers", "batch", "error", "message"),
    [
        (["idle"], _batch(0), RuntimeError, "Layer 'idle' did not run in this batch"),
        (["input"], (torch.ones(3, dtype=torch.long),), RuntimeError, "The batch holds no floating point tensor"),
        (["first"], _batch(0)[:1], ValueError, r"No integer tensor with 5 entries is in the batch\. Pass targets="),
        (["input", "first"], (_batch(0)[0], _batch(0)[1][:4]), ValueError, "No integer tensor with 5 entries"),
    ],
    ids=["idle layer", "no floats", "no targets", "too few targets"],
)
def test_batches_that_cannot_be_kept(layers: list[str], batch: Any, error: type[Exception], message: str):
    net, states = _Net(), HiddenStates(layers, 100)
    states.open(net)
    net(torch.zeros(5, 4))
    with pytest.raises(error, match=message):
        states.keep(batch)


def test_layers_of_different_length_are_refused():
    net, states, (x, y) = _Net(), HiddenStates(["input", "first"], 100), _batch(0)
    states.open(net)
    net(x[:4])
    with pytest.raises(ValueError, match="Layer 'first' has 4 rows, layer 'input' has 5"):
        states.keep((x, y))


def test_a_forward_without_tensor_is_no_output():
    net, states = _Net(), HiddenStates(["output"], 100)
    net.forward = lambda x: {"logits": x}
    states.open(net)
    net(_batch(0)[0])
    with pytest.raises(RuntimeError, match=r"own forward\(\) returned no tensor in this batch\. Name the layer"):
        states.keep(_batch(0))


@pytest.mark.parametrize(
    ("output", "kind"), [((1, 2), "tuple"), (torch.tensor(1.0), "a single number")], ids=["tuple", "number"]
)
def test_layers_without_rows_are_refused(output: Any, kind: str):
    net, states = _Net(), HiddenStates(["idle"], 100)
    states.open(net)
    net.idle.forward = lambda: output
    with pytest.raises(TypeError, match=f"Layer 'idle' must return a tensor with rows to be looked at, got {kind}"):
        net.idle()


@pytest.mark.parametrize(
    ("layer", "message"),
    [("lasst", r"Layer 'lasst' is not in _Net\. Nearest names: 'last'"), ("*", r"must name one module, got '\*'")],
    ids=["unknown", "several"],
)
def test_names_must_mean_one_module(layer: str, message: str):
    states, net = HiddenStates(["input", "output", layer], 100), _Net()
    with pytest.raises(ValueError, match=message):
        states.open(net)
    assert not states.is_open
    assert not net._forward_hooks


def test_evaluating_puts_each_module_back():
    net = _Net()
    net.train()
    net.first.eval()

    def fail() -> None:
        with evaluating(net):
            assert not any(one.training for one in net.modules())
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert [name for name, one in net.named_modules() if not one.training] == ["first"]
