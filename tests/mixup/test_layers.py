import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mm_lightning.mixup import MixPoint, has_auto, named_layers, resolve_layers


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Linear(2, 2)
        self.act = nn.ReLU()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.act(self.conv(hidden))


class Net(nn.Module):
    """Two blocks in a row; ``marked`` puts a MixPoint before each."""

    def __init__(self, marked: bool = False) -> None:
        super().__init__()
        if marked:
            self.before1 = MixPoint()
        self.layer1 = nn.Sequential(Block(), Block())
        if marked:
            self.before2 = MixPoint()
        self.layer2 = nn.Sequential(Block())
        self.head = nn.Linear(2, 2)


def names(root: nn.Module, spec: Any, **settings: Any) -> list[str]:
    return [layer.name for layer in resolve_layers(root, spec, **settings)]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        pytest.param("input", ["input"], id="input"),
        pytest.param("layer2", ["layer2"], id="name"),
        pytest.param("layer1.0.conv", ["layer1.0.conv"], id="dotted_name"),
        pytest.param("layer*", ["layer1", "layer2"], id="star_is_one_component"),
        pytest.param("*", ["layer1", "layer2", "head"], id="lone_star"),
        pytest.param("layer*.*", ["layer1.0", "layer1.1", "layer2.0"], id="two_stars"),
        pytest.param("*.0.conv", ["layer1.0.conv", "layer2.0.conv"], id="leading_star"),
        pytest.param("l*1", ["layer1"], id="inner_star"),
        pytest.param(Block, ["layer1.0", "layer1.1", "layer2.0"], id="class"),
        pytest.param(nn.Linear, ["layer1.0.conv", "layer1.1.conv", "layer2.0.conv", "head"], id="torch_class"),
        pytest.param(["layer2", "input", "layer1"], ["input", "layer1", "layer2"], id="list_in_order_of_the_net"),
        pytest.param(("layer2", "layer*", "layer2"), ["layer1", "layer2"], id="no_repetition"),
        pytest.param(
            ["head", Block, "input", "layer1.0"], ["input", "layer1.0", "layer1.1", "layer2.0", "head"], id="mix"
        ),
    ],
)
def test_specification_names_layers(spec: Any, expected: list[str]) -> None:
    net = Net()
    layers = resolve_layers(net, spec)
    assert [layer.name for layer in layers] == expected
    for layer in layers:
        assert layer.modules == (() if layer.name == "input" else (net.get_submodule(layer.name),))


def test_dot_in_a_name_is_a_dot() -> None:
    with pytest.raises(ValueError, match=r"Layer 'layer1\.\.' is not in Net"):
        resolve_layers(Net(), "layer1..")
    with pytest.raises(ValueError, match=r"Layer 'layer1.0.con\[v\]' is not in Net"):
        resolve_layers(Net(), "layer1.0.con[v]")


def test_auto_means_exactly_the_mix_points() -> None:
    assert names(Net(marked=True), "auto") == ["before1", "before2"]
    assert names(Net(marked=True), ["auto", "input"]) == ["input", "before1", "before2"]


def test_auto_means_the_chosen_layers_where_there_is_no_mix_point() -> None:
    assert names(Net(), "auto", chosen=["layer2", "layer1"]) == ["layer1", "layer2"]
    assert names(Net(), "auto", chosen=["layer1.0", "input"]) == ["input", "layer1.0"]
    assert names(Net(), ["auto", "head"], chosen=["input"]) == ["input", "head"]
    assert names(Net(marked=True), "auto", chosen=["layer1"]) == ["before1", "before2"]


def test_chosen_layers_are_those_of_auto_alone() -> None:
    assert names(Net(), ["layer2"], chosen=["layer1"]) == ["layer2"]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        pytest.param("auto", True, id="auto"),
        pytest.param(["input", "auto"], True, id="in_a_list"),
        pytest.param("layer1", False, id="name"),
        pytest.param("auto*", False, id="pattern"),
        pytest.param(nn.Linear, False, id="class"),
        pytest.param([], False, id="nothing"),
    ],
)
def test_auto_needs_a_look_where_there_is_no_mix_point(spec: Any, expected: bool) -> None:
    assert has_auto(Net(), spec) is expected
    assert has_auto(Net(marked=True), spec) is False


def test_module_object_names_itself() -> None:
    net = Net()
    assert names(net, net.layer2[0]) == ["layer2.0"]
    assert names(net, [net.head, nn.Sequential, net.layer1]) == ["layer1", "layer2", "head"]


def test_module_that_is_a_container_is_one_layer_not_a_list() -> None:
    net = Net()
    assert names(net, net.layer1) == ["layer1"]


def test_shared_module_is_one_layer() -> None:
    shared = nn.Linear(2, 2)
    net = nn.Sequential(shared, nn.ReLU(), shared)
    for spec in (nn.Linear, shared, ["0", "2"], ["2", "0"]):
        assert names(net, spec) == ["0"]
    (layer,) = resolve_layers(net, "2")
    assert (layer.name, layer.modules) == ("2", (shared,))


def test_names_of_wrappers_are_left_out() -> None:
    net = Net()
    net.layer1 = nn.Sequential(OrderedDict(_orig_mod=net.layer1))
    assert names(net, "layer1.0.conv") == ["layer1.0.conv"]
    assert list(named_layers(net))[:3] == ["layer1", "layer1.0", "layer1.0.conv"]
    assert names(net, Block) == ["layer1.0", "layer1.1", "layer2.0"]


def test_foreign_submodule_called_input_is_not_the_batch() -> None:
    net = nn.Sequential()
    net.add_module("input", nn.Linear(2, 2))
    net.add_module("head", nn.Linear(2, 2))
    (batch,) = resolve_layers(net, "input")
    assert (batch.name, batch.modules) == ("input", ())
    for spec in (net.input, "input (module)"):
        (layer,) = resolve_layers(net, spec)
        assert (layer.name, layer.modules) == ("input (module)", (net.input,))
    both = resolve_layers(net, [nn.Linear, "input"])
    assert [(layer.name, layer.modules) for layer in both] == [
        ("input", ()),
        ("input (module)", (net.input,)),
        ("head", (net.head,)),
    ]


def test_mix_point_called_input_is_the_batch() -> None:
    net = nn.Sequential()
    net.add_module("input", MixPoint())
    net.add_module("head", nn.Linear(2, 2))
    (layer,) = resolve_layers(net, "auto")
    assert (layer.name, layer.modules) == ("input", ())


def test_misspelt_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"Layer 'layer3' is not in Net\. Nearest names: .*'layer[12]'"):
        resolve_layers(Net(), "layer3")
    with pytest.raises(ValueError, match=r"Layer 'imput' is not in Net\. Nearest names: 'input'"):
        resolve_layers(Net(), ["layer1", "imput"])
    marked = nn.ModuleDict({"input": MixPoint()})  # whose name is that of the batch
    with pytest.raises(ValueError, match=r"Layer 'imput' is not in ModuleDict\. Nearest names: 'input'\. mm"):
        resolve_layers(marked, "imput")


def test_name_without_a_near_one_is_answered_with_all() -> None:
    with pytest.raises(ValueError, match=r"Layer 'zzz' is not in Sequential\. It has 'input', '0', '1'\."):
        resolve_layers(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "zzz")


def test_long_list_of_names_is_cut() -> None:
    with pytest.raises(ValueError, match=r"'input', '0', '1', .*'10' and 9 more\."):
        resolve_layers(nn.Sequential(*[nn.ReLU() for _ in range(20)]), "zzz")


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        pytest.param("layer*.conv", r"layer\*\.conv", id="star_does_not_cross_dots"),
        pytest.param(nn.LSTM, "LSTM", id="class"),
        pytest.param(nn.LayerNorm(2), "LayerNorm", id="object"),
    ],
)
def test_specification_that_matches_nothing_is_refused(spec: Any, part: str) -> None:
    with pytest.raises(ValueError, match=f"Layer '{part}' is not in Net"):
        resolve_layers(Net(), spec)


def test_root_itself_is_refused() -> None:
    net = Net()
    with pytest.raises(ValueError, match=r"the whole Net\. Its output is the prediction"):
        resolve_layers(net, net)
    with pytest.raises(ValueError, match="Layer 'Net' is not in Net"):
        resolve_layers(net, Net)


@pytest.mark.parametrize("spec", [[], ()], ids=["list", "tuple"])
def test_empty_list_is_refused(spec: Any) -> None:
    with pytest.raises(ValueError, match=r"^layers must name at least one layer, got (\[\]|\(\))\. Give 'auto'"):
        resolve_layers(Net(), spec)


@pytest.mark.parametrize(
    ("spec", "described"),
    [
        pytest.param(1, "1 of type int", id="int"),
        pytest.param(None, "None of type NoneType", id="None"),
        pytest.param(int, "<class 'int'> of type type", id="other_class"),
        pytest.param(["layer1", 2], "2 of type int", id="in_a_list"),
    ],
)
def test_wrong_type_is_refused(spec: Any, described: str) -> None:
    with pytest.raises(TypeError, match=f"or a list of these, got {described}\\. mm_lightning.inspect"):
        resolve_layers(Net(), spec)


def test_mix_point_returns_the_very_same_tensor() -> None:
    hidden = torch.randn(2, 3)
    assert MixPoint()(hidden) is hidden


def test_mix_point_leaves_no_trace_in_the_network() -> None:
    torch.manual_seed(0)
    marked, plain = Net(marked=True), Net()
    assert list(MixPoint().parameters()) == list(MixPoint().buffers()) == []
    assert list(marked.state_dict()) == list(plain.state_dict())
    marked.load_state_dict(copy.deepcopy(plain.state_dict()))
