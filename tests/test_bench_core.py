"""The benchmarks of mixing: that their sides are there, and that every side computes what it is said to."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from versions import compiles

from mm_lightning import BetaRatio, ManifoldMixupCallback, MixPlan, PlanSource

pytestmark = pytest.mark.slow

MakeTrainer = Callable[..., pl.Trainer]
STEP = ("no mixup", "ManifoldMixupCallback", "textbook", "two forward passes")
LAYERS = ("1 layer", "2 layers", "4 layers", "8 layers", "16 layers", "1 layer, 500 unused modules")
LOSSES = ("plain cross-entropy", "mixed_cross_entropy", "two cross-entropies", "one-hot")


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    """Measure quickly, without telling this process to keep its memory."""

    def run(name: str, kept: bool = True) -> dict[str, Any]:
        module = import_module(f"bench.{name}")
        monkeypatch.setattr(module, "keep_freed_memory", lambda: kept, raising=False)
        result = module.measure(quick=True)
        for row in result["rows"]:
            assert all(seconds > 0 for runs in row["seconds"].values() for seconds in runs)
            assert all(seconds > 0 for seconds in row["median_seconds"].values())
        return json.loads(json.dumps(result))

    return run


# measure


def test_interpolation_is_measured_against_copies_and_the_textbook_against_ours(
    measure: Callable[..., dict[str, Any]],
) -> None:
    result = measure("interpolation", kept=False)
    both = [row for row in result["rows"] if row["against"] == "copies" and not row.get("forward_only")]
    assert [(row["dtype"], row["layout"], row["per_sample"], row["bytes"]) for row in both] == [
        ("float32", "contiguous", False, 4 * 32 * 1024),
        ("float32", "contiguous", False, 4 * 32 * 4 * 1024),
        ("float32", "channels-last", False, 4 * 32 * 4 * 1024),
        ("bfloat16", "contiguous", False, 4 * 32 * 1024),
        ("bfloat16", "contiguous", False, 4 * 32 * 4 * 1024),
        ("bfloat16", "channels-last", False, 4 * 32 * 4 * 1024),
        ("float32", "contiguous", True, 4 * 32 * 4 * 1024),
    ]
    assert all(tuple(row["seconds"]) == ("copies", "mix", "textbook", "lerp") for row in both)
    assert all(row["targets"] == {"mix": 1.25} for row in both)
    derived = [row for row in result["rows"] if row["against"] == "mix"]
    for row, own in zip(derived, both, strict=True):
        # Of the two runs of each side, the median of the ratios is their mean.
        ratios = [own["seconds"]["textbook"][i] / own["seconds"]["mix"][i] for i in range(2)]
        assert row["ratios"]["textbook"]["median"] == pytest.approx(sum(ratios) / 2)
        assert row["targets"] == {"textbook": -2.0}
        assert tuple(row["seconds"]) == tuple(row["median_seconds"]) == ("mix", "textbook")
    assert [tuple(row["seconds"]) for row in result["rows"] if row.get("forward_only")] == [("copies", "mix")]
    assert "could not be kept" in result["notes"][1]


def test_mixed_loss_is_measured_against_the_plain_one(measure: Callable[..., dict[str, Any]]) -> None:
    rows = measure("mixed_loss")["rows"]
    assert [(tuple(row["seconds"]), row["against"], row["classes"]) for row in rows] == [
        (LOSSES, "plain cross-entropy", 10),
        (LOSSES, "plain cross-entropy", 5),
    ]


def test_layers_are_measured_against_one_layer(measure: Callable[..., dict[str, Any]]) -> None:
    (row,) = measure("layers")["rows"]
    assert (tuple(row["seconds"]), row["against"]) == (LAYERS, "1 layer")
    layers = import_module("bench.layers")
    assert layers.eligible_layers(1) == ["hidden.15"]
    assert layers.eligible_layers(4) == ["hidden.3", "hidden.7", "hidden.11", "hidden.15"]


def test_scaling_varies_one_size_at_a_time(measure: Callable[..., dict[str, Any]]) -> None:
    rows = measure("scaling")["rows"]
    assert [(row["vary"], row["value"]) for row in rows] == [
        ("batch", 16),
        ("batch", 32),
        ("width", 32),
        ("classes", 50),
        ("layers", 4),
    ]
    assert rows[1]["sizes"] == {"batch": 32, "width": 32, "classes": 10, "layers": 2}
    assert all((tuple(row["seconds"]), row["against"]) == (STEP[:3], "no mixup") for row in rows)


def test_eager_steps_are_measured_under_both_settings_where_nothing_compiles(
    measure: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(function: Any) -> Any:
        raise RuntimeError("No working C++ compiler found in torch._inductor.config.cpp.cxx")

    step = import_module("bench.step")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", refuse)
        options = step.compile_options(quick=False)
    assert options is None
    monkeypatch.setattr(step, "compile_options", lambda quick: options)
    monkeypatch.setattr(step, "_callback_microseconds", lambda quick: [1.0, 2.0, 9.0])
    before = torch.get_float32_matmul_precision()
    result = measure("step", kept=False)
    assert [(row["mode"], row["setting"], row["targets"]) for row in result["rows"]] == [
        ("eager", setting, {"ManifoldMixupCallback": target})
        for setting, targets in (("as PyTorch comes", (1.03, 1.02)), ("fast_cpu", (1.03, 1.02, 1.02)))
        for target in targets
    ]
    *rows, paper = result["rows"]
    assert all(tuple(row["seconds"])[:4] == STEP and row["against"] == "no mixup" for row in rows)
    assert (paper["case"], tuple(paper["seconds"])) == ("PreActResNet18, batch 4, eager, fast_cpu", STEP[:2])
    assert result["callback_us"] == 2.0
    assert any("no C++ compiler" in note for note in result["notes"])
    assert any("Freed memory could not be kept" in note for note in result["notes"])
    assert torch.get_float32_matmul_precision() == before


@compiles
# What the compiler itself does, with hidden states that are no leaves for example.
@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning", "ignore:.*grad attribute of a Tensor that is not a leaf"
)
def test_compiled_steps_are_measured_beside_each_other() -> None:
    step = import_module("bench.step")
    try:
        row = step._row(1, "compiled", step.DEFAULT, step.compile_options(quick=True), quick=True)
    finally:
        torch.compiler.reset()
    assert tuple(row["seconds"])[:4] == STEP
    assert all(seconds > 0 for seconds in row["median_seconds"].values())
    assert (row["mode"], row["targets"]) == ("compiled", {"ManifoldMixupCallback": 1.02})


def test_cost_of_the_callback_is_the_difference_within_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    step = import_module("bench.step")
    monkeypatch.setattr(step, "in_turn", lambda sides, rounds: {"without": [1e-3, 2e-3], "with": [1.25e-3, 2.5e-3]})
    assert step._callback_microseconds(quick=True) == pytest.approx([250, 500])


# interpolation and loss


def _plan(rows: int, per_sample: bool) -> MixPlan:
    plan = PlanSource(["input"], ratio=BetaRatio(2.0, per_sample), seed=7).draw(rows)
    assert plan.mixes
    assert per_sample or (1 - plan.lam[0]).item() != 1 - plan.lam[0].item()  # float32 would be seen
    assert not torch.equal(plan.partner[plan.partner], torch.arange(rows))  # its inverse is another permutation
    return plan


@pytest.mark.parametrize("per_sample", [False, True], ids=["one lam", "lam per sample"])
@pytest.mark.parametrize("way", ["mix", "textbook", "lerp"])
def test_every_way_to_mix_agrees_with_a_loop(way: str, per_sample: bool) -> None:
    plan = _plan(5, per_sample)
    generator = torch.Generator().manual_seed(1)
    hidden, gradient = torch.randn(2, 5, 3, 2, 2, generator=generator, dtype=torch.float64)
    want, want_gradient = torch.zeros_like(hidden), torch.zeros_like(hidden)
    for i, (lam, p) in enumerate(zip(plan.lam.tolist(), plan.partner.tolist(), strict=True)):
        want[i] = lam * hidden[i] + (1 - lam) * hidden[p]
        want_gradient[i] += lam * gradient[i]
        want_gradient[p] += (1 - lam) * gradient[i]
    mixed = import_module("bench.interpolation").ways()[way](hidden.requires_grad_(), plan)
    assert_close(mixed, want, rtol=0, atol=1e-14)
    assert_close(torch.autograd.grad(mixed, hidden, gradient)[0], want_gradient, rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", [(6, 5), (4, 5, 3, 2)], ids=["rows", "segmentation"])
@pytest.mark.parametrize("way", LOSSES[1:])
def test_every_mixed_loss_agrees_with_a_loop(way: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    plan = _plan(shape[0], per_sample=False)
    log_probs = (logits - logits.logsumexp(dim=1, keepdim=True)).movedim(1, -1).reshape(shape[0], -1, shape[1])
    classes, lam = targets.reshape(shape[0], -1).tolist(), plan.lam[0].item()
    want = torch.zeros((), dtype=torch.float64)
    for i, p in enumerate(plan.partner.tolist()):
        for pixel, (own, other) in enumerate(zip(classes[i], classes[p], strict=True)):
            want = want - lam * log_probs[i, pixel, own] - (1 - lam) * log_probs[i, pixel, other]
    want = want / targets.numel()
    got = import_module("bench.mixed_loss").losses()[way](logits, targets, plan)
    assert_close(got, want, rtol=0, atol=1e-12)
    assert_close(torch.autograd.grad(got, logits)[0], torch.autograd.grad(want, logits)[0], rtol=0, atol=1e-12)


# memory


def test_kept_and_peak_bytes_of_small_calls_by_hand() -> None:
    memory = import_module("bench.memory")
    x = torch.rand(1000).requires_grad_()  # 4,000 bytes
    assert memory.kept_bytes(lambda: x * x, x) == 0  # keeps x, which is there anyway
    assert memory.kept_bytes(lambda: x.exp(), x) == 4000  # its own result
    assert memory.kept_bytes(lambda: x.exp().sin() * x, x) == 8000  # the exponential twice, and the sine
    with torch.no_grad():
        assert memory.peak_bytes(lambda: x + x) == 4000
        assert memory.peak_bytes(lambda: (x + x) * x + x) == 8000  # the first sum is gone when the second is made
        assert memory.peak_bytes(lambda: x.view(10, 100)) == 0


def test_mixing_needs_one_hidden_state_forward_and_one_backward(measure: Callable[..., dict[str, Any]]) -> None:
    result = measure("memory")
    assert result["rows"] == []
    assert [row["way"] for row in result["memory"]] == ["mix", "textbook", "lerp"] * 2
    for row in result["memory"]:
        hidden = row["hidden_bytes"]
        assert hidden == 4 * 100 * 8 * 16 * 16
        peaks = row["peak_forward_bytes"] / hidden, row["peak_backward_bytes"] / hidden
        # The textbook's products and its gathered rows forward; two products of the gradient backward, at least.
        want = {"mix": (1, 1), "textbook": (3, 2), "lerp": (2, 3)}[row["way"]]
        assert peaks == pytest.approx(want, abs=0.01)
        assert row["kept_bytes"] < 0.01 * hidden
        assert row["kept_bytes"] >= 8 * 100  # the partners, at least


# competitors


def _network(name: str) -> Any:
    networks = import_module("bench.networks")
    torch.manual_seed(0)
    make = {
        "mlp": lambda: networks.deep_mlp(depth=3, width=6, classes=4, batch_size=8, inputs=5),
        "cnn": lambda: networks.residual_network(batch_size=8, size=8),
        "bottleneck": lambda: networks.mnist_bottleneck(batch_size=8),
    }
    network = make[name]()
    network.module.double()
    return network


class _Gradients(pl.Callback):
    """Keeps the loss and the gradients of the only step."""

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self.loss = loss.detach().clone()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.gradients = [parameter.grad.clone() for parameter in pl_module.parameters()]


PLACES = [
    *[("mlp", f"hidden.{i}") for i in range(3)],
    *[("cnn", layer) for layer in ("input", "stage1", "stage2")],
    *[("bottleneck", f"mix_before.{i}") for i in (3, 4)],
]


@pytest.mark.parametrize(("name", "layer"), PLACES, ids=[f"{name}, {layer}" for name, layer in PLACES])
def test_textbook_two_passes_and_callback_give_one_loss_and_gradient(
    make_trainer: MakeTrainer, name: str, layer: str
) -> None:
    competitors, fitting = import_module("bench.competitors"), import_module("bench.fitting")
    network = _network(name)
    assert [place for place, _ in PLACES].count(name) == len(network.places)
    inputs, targets = fitting.RandomBatches(network.shape, network.classes, 1)[0]
    inputs = inputs.double()
    weights = [parameter.detach().clone() for parameter in network.module.parameters()]
    mixup, seen = ManifoldMixupCallback(layers=[layer], seed=1), _Gradients()
    make_trainer(mixup, seen).fit(network.module, _Batches([(inputs, targets)]))
    plan = mixup.plan
    assert plan is not None
    assert plan.layer == layer
    for parameter, weight in zip(network.module.parameters(), weights, strict=True):
        parameter.data.copy_(weight)
    for competitor in (competitors.Textbook(network), competitors.TwoPasses(network)):
        network.module.zero_grad()
        lam = plan.lam[:1].double()
        logits = competitor.logits(inputs, network.places[layer], lam, plan.partner)
        loss = competitor.loss(logits, targets, lam, plan.partner)
        loss.backward()
        assert_close(loss.detach(), seen.loss, rtol=0, atol=1e-10)
        gradients = [parameter.grad for parameter in network.module.parameters()]
        assert_close(gradients, seen.gradients, rtol=0, atol=1e-10)


class _Batches(list[Any]):
    """A plain loader of given batches."""


@pytest.mark.parametrize(("kind", "want"), [("Textbook", [1, 1, 1, 1]), ("TwoPasses", [2, 2, 1, 1])])
def test_second_pass_ends_where_the_batch_is_mixed(kind: str, want: list[int]) -> None:
    network = _network("mlp")
    calls = dict.fromkeys(network.parts, 0)

    def count(part: nn.Module, args: Any) -> None:
        calls[part] += 1

    for part in network.parts:
        part.register_forward_pre_hook(count)
    competitor = getattr(import_module("bench.competitors"), kind)(network)
    inputs, partner = torch.rand(network.shape, dtype=torch.float64), torch.arange(8).roll(1)
    competitor.logits(inputs, network.places["hidden.1"], torch.tensor([0.3], dtype=torch.float64), partner)
    assert list(calls.values()) == want


def test_written_by_hand_draws_places_lam_and_partners_and_records_the_batch() -> None:
    competitors, networks = import_module("bench.competitors"), import_module("bench.networks")
    drawn: list[Any] = []
    recorded: list[tuple[Tensor, Tensor]] = []

    class Drawing(competitors.HandWritten):
        def logits(self, inputs: Tensor, place: int, lam: Tensor, partner: Tensor) -> Tensor:
            drawn.append((place, lam.item(), partner))
            return inputs

        def loss(self, logits: Tensor, targets: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
            assert (lam.item(), partner) == drawn[-1][1:]
            return logits.sum()

    plain = _network("mlp")
    network = networks.Network(**{**vars(plain), "record": lambda *seen: recorded.append(seen)})
    inputs, targets = torch.ones(8, 5, requires_grad=True), torch.arange(8) % 4
    step = Drawing(network, alpha=2.0).training_step
    assert all(step((inputs, targets), index).item() == 40 for index in range(400))
    places, lams, partners = zip(*drawn, strict=True)
    assert set(places) == {1, 2, 3}
    assert all(sorted(partner.tolist()) == list(range(8)) for partner in partners)
    lam = torch.tensor(lams, dtype=torch.float64)
    # Beta(2, 2) has mean 1/2 and variance 1/20: within four standard errors of 400 draws
    assert lam.mean().item() == pytest.approx(0.5, abs=4 * (1 / 20 / 400) ** 0.5)
    assert len(recorded) == 400
    assert not recorded[0][0].requires_grad
    assert recorded[0][1] is targets


@compiles
def test_compiled_steps_by_hand_equal_eager_ones() -> None:
    competitors = import_module("bench.competitors")
    network = _network("mlp")
    inputs = torch.rand(network.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    targets = torch.arange(8) % 4
    try:
        for kind in (competitors.Textbook, competitors.TwoPasses):
            eager, compiled = kind(network), kind(network, compiled={"backend": "eager", "fullgraph": True})
            for index in range(12):  # of one generator's draws, at every place
                batch = inputs, targets
                assert_close(compiled.training_step(batch, index), eager.training_step(batch, index), rtol=0, atol=0)
    finally:
        torch.compiler.reset()


@pytest.fixture
def libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A timm that mixes half and half with the flipped batch, in place, and a torchvision that breaks on import."""
    timm = tmp_path / "timm" / "data"
    timm.mkdir(parents=True)
    (tmp_path / "timm" / "__init__.py").touch()
    (timm / "__init__.py").touch()
    (timm / "mixup.py").write_text(
        "import torch\n"
        "class Mixup:\n"
        "    def __init__(self, mixup_alpha, label_smoothing, num_classes):\n"
        "        assert (mixup_alpha, label_smoothing) == (2.0, 0.0)\n"
        "        self.num_classes = num_classes\n"
        "    def __call__(self, x, y):\n"
        "        hot = torch.eye(self.num_classes, dtype=x.dtype)[y]\n"
        "        return x.mul_(0.5).add_(x.flip(0)), 0.5 * hot + 0.5 * hot.flip(0)\n"
    )
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] in ("timm", "torchvision")]:
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        del sys.modules[name]


@pytest.mark.usefixtures("libraries")
def test_input_mixup_of_a_library_that_can_be_imported_trains_on_its_batch() -> None:
    network = _network("mlp")
    found, notes = import_module("bench.competitors").input_mixups(network)
    assert list(found) == ["input mixup, timm"]
    assert [note.split()[0] for note in notes] == ["torchvision"]
    inputs = torch.rand(network.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    targets = torch.arange(8) % 4
    logits = network.module(0.5 * inputs + 0.5 * inputs.flip(0))
    want = 0.5 * F.cross_entropy(logits, targets) + 0.5 * F.cross_entropy(logits, targets.flip(0))
    assert_close(found["input mixup, timm"].training_step((inputs, targets), 0), want, rtol=0, atol=1e-12)


def test_libraries_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    competitors = import_module("bench.competitors")
    monkeypatch.setattr(competitors.importlib.util, "find_spec", lambda name: None)
    found, notes = competitors.input_mixups(_network("mlp"))
    assert found == {}
    assert [note.split()[0] for note in notes] == ["timm", "torchvision"]


def test_calls_are_added_to_a_bare_step_one_at_a_time(measure: Callable[..., dict[str, Any]]) -> None:
    rows = measure("calls")["rows"]
    calls = ("no mixup", "empty Function", "clone", "mix", "mixed_cross_entropy", "both", "textbook formula")
    assert [(tuple(row["seconds"]), row["against"]) for row in rows] == [(calls, "no mixup")] * 2


# fitting


class _Clock:
    """Shows the given times, one after the other."""

    def __init__(self, *times: float) -> None:
        self.times = iter(times)

    def perf_counter(self) -> float:
        return next(self.times)


def test_first_steps_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    fitting = import_module("bench.fitting")
    network = _network("mlp")
    network.module.float()
    batches = fitting.RandomBatches(network.shape, network.classes, 6)
    # steps of 50 and 40 seconds do not count; of 1, 5 and 2 the median is 2; the last one has no end
    monkeypatch.setattr(fitting, "time", _Clock(0, 50, 90, 91, 96, 98))
    assert fitting.median_step(network.module, batches, untimed=2) == 2
    monkeypatch.setattr(fitting, "time", _Clock(0, 50, 90, 91, 96, 98))
    assert fitting.mean_step(network.module, batches, untimed=2) == pytest.approx(8 / 3)
    assert fitting.untimed_steps(1) == 6
    assert fitting.untimed_steps(16) == 64


def test_training_step_is_put_back_after_an_exception() -> None:
    fitting = import_module("bench.fitting")
    module = _network("mlp").module

    def fail(batch: Any, batch_idx: int) -> Tensor:
        raise ArithmeticError("stopped by the test")

    with pytest.raises(ArithmeticError, match="stopped by the test"):
        fitting.median_step(module, fitting.RandomBatches((8, 5), 4, 3), training_step=fail, untimed=0)
    assert "training_step" not in vars(module)


def test_batches_are_handed_out_as_copies() -> None:
    batches = import_module("bench.fitting").RandomBatches((3, 2), 4, 9)
    assert len(batches) == 9
    inputs, targets = batches[0]
    want = inputs.clone(), targets.clone()
    inputs.zero_()
    targets.zero_()
    assert_close(batches[4], want, rtol=0, atol=0)  # the fifth batch is the first one again
    assert not torch.equal(batches[1][0], want[0])


def test_unused_modules_have_no_part_in_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = import_module("bench.layers")
    seen = []

    def record(module: pl.LightningModule, batches: Any, callbacks: Any, **settings: Any) -> float:
        seen.append((len(callbacks[0].layers), sum(isinstance(part, nn.Identity) for part in module.modules())))
        return 1.0

    monkeypatch.setattr(layers, "median_step", record)
    layers.measure(quick=True)
    assert seen[:6] == [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (1, 500)]
