"""ManifoldMixupCallback beside what PyTorch does to a network: compilation, recomputation, precision, copies."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from classifier import (
    LAYERS,
    LR,
    Classifier,
    Network,
    Plans,
    assert_no_trace,
    assert_same_weights,
    batches,
    loader,
    mixed_logits,
    mixup,
    train_by_hand,
    weights_of,
)
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    CheckpointWrapper,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.nn.utils.parametrizations import weight_norm
from torch.testing import assert_close
from torch.torch_version import TorchVersion
from versions import compiles

MakeTrainer = Callable[..., pl.Trainer]
NET_LAYERS = ["input", "net.first", "net.second"]


def fit(make_trainer: MakeTrainer, model: Any, data: Any = None, **settings: Any) -> Plans:
    """Two epochs with the callback; returns the plans that it drew."""
    callback = mixup(**settings.pop("mixup", {}))
    plans = Plans(callback)
    make_trainer(callback, plans, **{"max_epochs": 2, **settings}).fit(model, data or loader())
    return plans


# Activation checkpointing.


@pytest.mark.parametrize("impl", list(CheckpointImpl), ids=lambda impl: impl.name.lower())
@pytest.mark.parametrize("wrapped", ["each layer", "the body"])
def test_what_is_wrapped_for_checkpointing_is_mixed_as_by_hand(
    make_trainer: MakeTrainer, impl: CheckpointImpl, wrapped: str
) -> None:
    class WithBody(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(self.first, nn.Tanh(), self.second, nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x.clone().requires_grad_()))  # reentrant checkpointing wants a gradient

    model = WithBody()
    if wrapped == "each layer":  # the mix comes after the recomputed part
        apply_activation_checkpointing(
            model,
            lambda module: checkpoint_wrapper(module, impl),
            lambda module: module in (model.first, model.second),
        )
        model.body[0], model.body[2] = model.first, model.second
        assert isinstance(model.first, CheckpointWrapper)
    else:  # the mix is recomputed
        model.body = checkpoint_wrapper(model.body, impl)
    plans = fit(make_trainer, model).plans
    assert {plan.layer for plan in plans} == {"input", "first", "second"}
    assert_same_weights(model, train_by_hand(plans, 2 * batches()))
    assert_no_trace(model)


# Precision.


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.filterwarnings("ignore:You passed .*16-mixed.* but AMP with fp16 is not supported on CPU")
def test_mixed_precision_equals_a_hand_loop_under_autocast(make_trainer: MakeTrainer, precision: str) -> None:
    model, data = Classifier().float(), [(x.float(), y) for x, y in batches()]
    plans = fit(make_trainer, model, _Batches(data), precision=precision).plans

    net = Network().float()
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    for plan, (x, y) in zip(plans, 2 * data, strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            logits = mixed_logits(net, x, plan)
            losses = [F.cross_entropy(logits, targets) for targets in (y, y[plan.partner])]
        optimizer.zero_grad()
        (plan.lam[0] * losses[0] + (1 - plan.lam[0]) * losses[1]).backward()
        optimizer.step()
    # mixed_logits mixes in float32, the callback in bfloat16, which keeps 8 bits
    assert_close(weights_of(model), weights_of(net), rtol=0, atol=4e-3)
    assert (
        max((got - old).abs().max() for got, old in zip(model.parameters(), Network().parameters(), strict=True)) > 0.1
    )


class _Batches(list[Any]):
    """A plain loader. (A list of batches would be taken for a list of loaders.)"""


# Parametrizations and copies.


def test_weight_norm_is_trained_as_by_hand(make_trainer: MakeTrainer) -> None:
    model, net = Classifier(), Network()
    for part in (model, net):
        weight_norm(part.first)
        weight_norm(part.second)
    plans = fit(make_trainer, model).plans
    assert {plan.layer for plan in plans} == {"input", "first", "second"}
    wanted = train_by_hand(plans, 2 * batches(), net=net)
    assert_close(weights_of(model), weights_of(wanted), rtol=0, atol=1e-12)
    assert_no_trace(model)


@pytest.mark.parametrize("copied", ["on_fit_start", "on_train_start", "on_train_batch_start", "on_train_batch_end"])
def test_a_teacher_copied_during_training_is_unmixed(make_trainer: MakeTrainer, copied: str) -> None:
    class Teaching(Classifier):
        """An exponential moving average of the weights, looked at in every step."""

        def __init__(self) -> None:
            super().__init__()
            self.teacher: Any = [None]  # in a list, so that it is no part of the module

        def copy_once(self, *_: Any) -> None:
            self.teacher[0] = self.teacher[0] or copy.deepcopy(nn.ModuleList([self.first, self.second, self.head]))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            x = batches()[batch_idx][0]
            if self.teacher[0] is not None:
                with torch.no_grad():
                    first, second, head = self.teacher[0]
                    plain = torch.tanh(F.linear(x, first.weight, first.bias))
                    plain = torch.tanh(F.linear(plain, second.weight, second.bias))
                    plain = F.linear(plain, head.weight, head.bias)
                    assert torch.equal(head(torch.tanh(second(torch.tanh(first(x))))), plain)
                    self.taught = True
            return loss

        def on_before_zero_grad(self, optimizer: Any) -> None:
            if self.teacher[0] is not None:
                for slow, fast in zip(self.teacher[0].parameters(), self.parameters(), strict=True):
                    slow.data.lerp_(fast.data, 0.1)

    model = Teaching()
    setattr(model, copied, model.copy_once)
    plans = fit(make_trainer, model).plans
    assert model.taught
    assert_same_weights(model, train_by_hand(plans, 2 * batches()))


# Compilation.


class Holder(pl.LightningModule):
    """A network within a LightningModule."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = Network() if net is None else net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=LR)


class Graphs(list[torch.fx.GraphModule]):
    """A backend that runs graphs as they are, and counts them."""

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        self.append(graph)
        return graph.forward


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    torch.compiler.reset()
    yield Graphs()
    torch.compiler.reset()


# What the compiler itself does, with hidden states that are no leaves for example.
_quiet = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning", "ignore:.*grad attribute of a Tensor that is not a leaf"
)


def compiled(test: Callable[..., None]) -> Callable[..., None]:
    return compiles(_quiet(test))


def _compile(model: Holder, way: str, graphs: Graphs) -> Any:
    """Compile the network, or the whole, in one of the ways there are; returns what is fitted."""
    options: dict[str, Any] = {"backend": graphs, "fullgraph": True}
    if way == "torch.compile":
        model.net = torch.compile(model.net, **options)
    elif way == "in place":
        model.net.compile(**options)
    elif way == "forward":
        model.net.forward = torch.compile(model.net.forward, **options)  # type: ignore[method-assign]
    elif way == "in on_train_start":
        model.on_train_start = lambda: model.net.compile(**options)  # type: ignore[method-assign]
    elif way == "module":
        return torch.compile(model, **options)
    return model


@compiled
@pytest.mark.parametrize("way", ["torch.compile", "in place", "module"])
@pytest.mark.parametrize("probability", [1.0, 0.7], ids=["all mixed", "some unmixed"])
def test_compiled_training_makes_at_most_a_graph_a_layer_and_one(
    make_trainer: MakeTrainer, graphs: Graphs, way: str, probability: float
) -> None:
    model = Holder()
    settings = {"layers": NET_LAYERS, "probability": probability}
    plans = fit(make_trainer, _compile(model, way, graphs), max_epochs=4, mixup=settings).plans
    assert {plan.layer for plan in plans} == {*NET_LAYERS, *([None] if probability < 1 else [])}
    assert_same_weights(model.net, train_by_hand(_inside(plans), 4 * batches()))
    assert len(NET_LAYERS) <= len(graphs) <= len(NET_LAYERS) + 1


@compiled
@pytest.mark.parametrize("way", ["forward", "in on_train_start"])
def test_what_is_compiled_out_of_sight_is_trained_as_by_hand(
    make_trainer: MakeTrainer, graphs: Graphs, way: str
) -> None:
    model = Holder()
    plans = fit(make_trainer, _compile(model, way, graphs), mixup={"layers": NET_LAYERS}).plans
    assert_same_weights(model.net, train_by_hand(_inside(plans), 2 * batches()))
    assert 0 < len(graphs) <= 2 * len(NET_LAYERS)  # looked at closely, each layer is compiled once more


@compiled
def test_a_compiled_module_that_calls_itself_is_compiled_there(make_trainer: MakeTrainer, graphs: Graphs) -> None:
    class CallsItself(Holder):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

    model = CallsItself()
    plans = fit(make_trainer, _compile(model, "module", graphs), mixup={"layers": NET_LAYERS}).plans
    assert_same_weights(model.net, train_by_hand(_inside(plans), 2 * batches()))
    assert graphs


@compiled
def test_a_compiled_function_is_trained_as_by_hand(make_trainer: MakeTrainer, graphs: Graphs) -> None:
    class WithFunction(Holder):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(run(self.net, batch[0]), batch[1])

    run = torch.compile(lambda net, x: net(x), backend=graphs, fullgraph=True)
    model = WithFunction()
    plans = fit(make_trainer, model, mixup={"layers": NET_LAYERS}).plans
    assert_same_weights(model.net, train_by_hand(_inside(plans), 2 * batches()))
    assert graphs


@compiled
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # of the compiler itself
@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_noise_that_a_compiled_loss_draws_is_the_same_for_both_targets(make_trainer: MakeTrainer, backend: str) -> None:
    torch.compiler.reset()  # or it is one function too often compiled, and runs eagerly

    @torch.compile(backend=backend)
    def noisy(logits: Tensor, y: Tensor) -> Tensor:
        return (logits - y - torch.randn_like(y)).square().mean()

    class Noisy(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            torch.manual_seed(batch_idx)
            x, y = batch
            return noisy(self(x), F.one_hot(y, 3).to(x))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0)

    class Returned(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            losses.append(float(outputs["loss"]))

    losses: list[float] = []
    callback, net = mixup(), Network()
    plans = Plans(callback)
    make_trainer(callback, plans, Returned()).fit(Noisy(), loader())
    for i, (plan, (x, y), got) in enumerate(zip(plans.plans, batches(), losses, strict=True)):
        halves = []
        for targets in (y, y[plan.partner]):
            torch.manual_seed(i)
            halves.append(noisy(mixed_logits(net, x, plan).detach(), F.one_hot(targets, 3).to(x)))
        lam = plan.lam[0].double()
        assert got == pytest.approx(float(lam * halves[0] + (1 - lam) * halves[1]), rel=1e-6)


@compiled
@pytest.mark.parametrize("fullgraph", [True, False], ids=["fullgraph", "with breaks"])
def test_a_sequential_compiled_in_place_makes_at_most_a_graph_a_layer_and_one(
    make_trainer: MakeTrainer, graphs: Graphs, fullgraph: bool
) -> None:
    # PyTorch compiles the parts of its own Sequential one by one, and the hooks with them.
    plain = Network()
    net = nn.Sequential(plain.first, nn.Tanh(), plain.second, nn.Tanh(), plain.head)
    net.compile(backend=graphs, fullgraph=fullgraph)
    plans = fit(make_trainer, Holder(net), max_epochs=4, mixup={"layers": ["input", "net.0", "net.2"]}).plans
    names = {"input": "input", "net.0": "first", "net.2": "second"}
    assert_same_weights(net, train_by_hand(_renamed(plans, names), 4 * batches()))
    assert len(graphs) <= 4


@compiled
def test_layers_compiled_one_by_one_make_at_most_a_graph_a_layer_more_than_plain(
    make_trainer: MakeTrainer, graphs: Graphs
) -> None:
    def train(layers: list[str] | None) -> int:
        torch.compiler.reset()
        graphs.clear()
        model = Holder()
        for layer in (model.net.first, model.net.second, model.net.head):
            layer.compile(backend=graphs)
            layer.register_forward_hook(lambda module, args, output: None)  # without hooks it compiles nothing
        callbacks = [mixup(layers=layers)] if layers else []
        make_trainer(*callbacks, max_epochs=4).fit(model, loader())
        return len(graphs)

    layers = ["net.first", "net.second", "net.head"]
    plain = train(None)
    assert 0 < plain < train(layers) <= plain + len(layers)


@compiled
def test_a_smaller_last_batch_at_most_doubles_the_graphs(make_trainer: MakeTrainer, graphs: Graphs) -> None:
    # PyTorch recompiles once for dynamic shapes; eight graphs of a function, and it gives up.
    model = Holder()
    layers = [*NET_LAYERS, "net.head"]
    fit(make_trainer, _compile(model, "in place", graphs), loader(44), max_epochs=6, mixup={"layers": layers})
    assert len(graphs) <= 2 * len(layers)


@compiled
@pytest.mark.parametrize("way", ["torch.compile", "in place", "forward", "in on_train_start", "module"])
def test_validation_of_what_is_compiled_is_bit_identical_to_plain(
    make_trainer: MakeTrainer, graphs: Graphs, way: str
) -> None:
    losses = []

    class Validated(Holder):
        def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return F.cross_entropy(self.net(x), y)

    class Keep(pl.Callback):
        def on_validation_batch_end(self, trainer: Any, module: Any, loss: Tensor, batch: Any, *_: Any) -> None:
            plain = Network()
            for parameter, value in zip(plain.parameters(), weights_of(model), strict=True):
                parameter.data = value
            losses.append((loss, F.cross_entropy(plain(batch[0]), batch[1])))

    model = Validated()
    fitted = _compile(model, way, graphs)
    make_trainer(mixup(layers=NET_LAYERS), Keep(), max_epochs=2).fit(fitted, loader(), loader())
    assert len(losses) == 2 + 2 * 5  # the sanity check looks at two
    assert all(torch.equal(got, wanted) for got, wanted in losses)


def _inside(plans: list[Any]) -> list[Any]:
    """The plans with names of layers within the network."""
    return _renamed(plans, {name: name.removeprefix("net.") for name in NET_LAYERS})


def _renamed(plans: list[Any], names: dict[str, str]) -> list[Any]:
    return [type(plan)(names.get(plan.layer), plan.partner, plan.lam, plan.inverse) for plan in plans]


# Exports during a fit.


class Exporting(pl.Callback):
    """Exports at the end of every epoch, and keeps what is made and the logits that were to come."""

    def __init__(self, export: Callable[[nn.Module, Tensor], Any]) -> None:
        self.export = export
        self.found: list[tuple[Tensor, Tensor]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        x = batches()[0][0]
        made = self.export(pl_module, x)
        with torch.no_grad():
            self.found.append((made(x), Network.forward(pl_module, x)))


def _saved_and_loaded(module: nn.Module, x: Tensor) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


EXPORTS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "trace": lambda module, x: torch.jit.trace(module, x),
    "export": lambda module, x: torch.export.export(module, (x,)).module(),
    "fx": lambda module, x: torch.fx.symbolic_trace(module),
    "save": _saved_and_loaded,
    "copy": lambda module, x: copy.deepcopy(module),
    "script": lambda module, x: torch.jit.script(module),
}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The TorchScript type system")  # of an attribute of Classifier
@pytest.mark.parametrize(
    ("export", "layers"),
    [(name, ["input"] if name == "script" else LAYERS) for name in EXPORTS],
    ids=[*EXPORTS],
)
def test_a_network_exported_during_fit_is_unmixed_and_trains_on(
    make_trainer: MakeTrainer, export: str, layers: list[str]
) -> None:
    model, exporting = Classifier(), Exporting(EXPORTS[export])
    callback = mixup(layers=layers)
    plans = Plans(callback)
    make_trainer(exporting, callback, plans, max_epochs=2).fit(model, loader())
    for got, wanted in exporting.found:
        assert_close(got, wanted, rtol=0, atol=1e-12)
    assert len(exporting.found) == 2
    assert_same_weights(model, train_by_hand(plans.plans, 2 * batches()))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The TorchScript type system")  # of an attribute of Classifier
def test_a_hooked_network_says_why_it_cannot_be_scripted(make_trainer: MakeTrainer) -> None:
    model, exporting = Classifier(), Exporting(EXPORTS["script"])
    with pytest.raises(AttributeError) as refusal:
        make_trainer(exporting, mixup()).fit(model, loader())
    assert str(refusal.value) == (
        "torch.jit.script cannot compile a module that manifold mixup has hooked. Script the module itself after the "
        "fit, or use torch.jit.trace or torch.export, which take it unmixed."
    )
    x = batches()[0][0]
    assert_close(torch.jit.script(model)(x), model(x))


def test_what_is_compiled_is_refused_where_the_compiler_is_too_old(
    make_trainer: MakeTrainer, graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.7.1"))
    said = r"is compiled, and manifold mixup with torch\.compile needs torch >= 2\.8; this is 2\.7\.1\. Update torch"
    for way in ("torch.compile", "in place"):
        with pytest.raises(RuntimeError, match=said):
            fit(make_trainer, _compile(Holder(), way, graphs), mixup={"layers": NET_LAYERS})
    fit(make_trainer, _compile(Holder(), "in place", graphs), mixup={"layers": NET_LAYERS, "alpha": 0.0})


def test_a_failure_of_a_compiler_that_is_too_old_names_the_version(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OutOfSight(Holder):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise Unsupported("not known yet")

    monkeypatch.setattr(torch, "__version__", TorchVersion("2.7.1"))
    said = r"fails with Unsupported: not known yet \(see above\); with torch\.compile it needs torch >= 2\.8, and this"
    with pytest.raises(Unsupported, match=said):
        fit(make_trainer, OutOfSight(), mixup={"layers": NET_LAYERS})
