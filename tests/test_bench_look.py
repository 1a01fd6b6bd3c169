"""The benchmark of the look: what its numbers mean, and that each is of the step it is said to be of."""

from __future__ import annotations

import json
import sys
from collections import Counter
from functools import partial
from importlib import import_module
from mmap import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).parents[1] / "scripts"
MIXED, PLAIN = "ManifoldMixupCallback", "no mixup"
CASES = ("frozen backbone", "ResNet50", "transformer")


@pytest.fixture
def look(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return import_module("bench.look")


def test_quick_run_takes_a_first_step_of_each_network_and_side(look: Any) -> None:
    result = json.loads(json.dumps(look.measure(quick=True)))
    steps, looks, peaks = result["rows"][:3], result["rows"][3:6], result["rows"][6:]
    assert [(row["case"], tuple(row["seconds"])) for row in steps] == [
        (f"{case}, first step", (PLAIN, MIXED)) for case in CASES
    ]
    assert [(row["case"], tuple(row["seconds"]), row["layers"]) for row in looks] == [
        (
            "frozen backbone, 4 layers",
            ("forward pass", "look"),
            ["input", *(f"network.backbone.{i}" for i in (1, 3, 5))],
        ),
        ("ResNet50, 3 layers", ("forward pass", "look"), ["input", "network.stage1", "network.stage2"]),
        (
            "transformer, 3 layers",
            ("forward pass", "look"),
            ["input", *(f"network.encoder.layers.{i}" for i in (0, 1))],
        ),
    ]
    assert all(seconds > 0 for row in [*steps, *looks] for runs in row["seconds"].values() for seconds in runs)
    assert [row["case"] for row in peaks] == [row["case"] for row in result["memory"]] == list(CASES)
    assert not any(row["targets"] for row in result["rows"])  # they are for networks that have something to compute
    # Of 8 rows in float32: four times 32 features; 3 x 8 x 8, 16 x 8 x 8 and 32 x 4 x 4; three times 4 tokens of 16.
    outputs = [32 * 4 * 32, 32 * (3 * 8 * 8 + 16 * 8 * 8 + 32 * 4 * 4), 32 * 3 * 4 * 16]
    assert [row["outputs_bytes"] for row in result["memory"]] == outputs
    # Batch normalisation has a mean and a variance in float32, and a count in int64: of the stem, and four in a stage.
    channels = 4 + sum(narrow + narrow + 4 * narrow + 4 * narrow for narrow in (4, 8, 16, 32))
    assert [row["buffers_bytes"] for row in result["memory"]] == [0, 8 * channels + 8 * (1 + 4 * 4), 0]
    assert "in one process" in result["notes"][-1]


class Processes:
    """Stands in for first steps in processes of their own. The machine grows slower from round to round."""

    def __init__(self) -> None:
        self.started: Counter[tuple[str, bool, bool]] = Counter()

    def __call__(self, case: str, mixup: bool, is_memory: bool) -> dict[str, Any]:
        self.started[case, mixup, is_memory] += 1
        slower = self.started[case, mixup, is_memory]
        return {
            "step_seconds": slower * (0.75 if mixup else 0.25),
            "forward_seconds": slower * (99.0 if mixup else 0.125),  # the plain side's counts
            "peak_bytes": slower * 10_000 + 6_000 * mixup if is_memory else 0,
            "layers": ["input", "body.1"] if mixup else [],
            "buffers_bytes": 500,
            "outputs_bytes": 1_500 if mixup else 0,
        }


def test_look_is_what_a_first_step_takes_beyond_the_plain_one_of_its_round(
    look: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = Processes()
    monkeypatch.setattr(look, "_in_a_process", processes)
    result = json.loads(json.dumps(look.measure(quick=False)))
    for row in result["rows"][3:6]:
        assert row["seconds"]["look"] == [0.5 * (1 + i) for i in range(look.ROUNDS)]
        assert row["ratios"]["look"] == dict.fromkeys(("median", "lower_quartile", "upper_quartile", "min", "max"), 4.0)
        assert row["targets"] == {"look": 2 + 3}
    for row in result["rows"][6:]:
        assert row["ratios"]["extra memory"]["median"] == 6_000 / 2_000
        assert (row["seconds"], row["targets"]) == ({}, {"extra memory": 1})
    assert result["memory"] == [
        {
            "case": case,
            "no_mixup_bytes": 20_000,  # of the second of three rounds
            "with_callback_bytes": 26_000,
            "extra_bytes": 6_000,
            "buffers_bytes": 500,
            "outputs_bytes": 1_500,
        }
        for case in CASES
    ]
    rounds = {False: look.ROUNDS, True: look.MEMORY_ROUNDS}
    assert processes.started == {
        (case, mixup, m): rounds[m] for case in CASES for mixup in (False, True) for m in rounds
    }


def test_memory_counts_towards_the_targets_and_in_no_table_of_times(look: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    report, timing = import_module("bench.report"), import_module("bench.timing")
    monkeypatch.setattr(look, "_in_a_process", Processes())
    result = {**look.measure(quick=False), "command": "python scripts/benchmark.py look"}
    assert timing.table(result["rows"]).count("\n| ") == 1 + 3 * 2 + 3 * 2  # the rule, and two sides of each row
    summary = report._targets({"look": result})
    assert summary.startswith("3 of 6 targets are met.")
    assert (
        "transformer: extra memory at most 1 times buffers and outputs | 3.00 (3.00 to 3.00), **missed** |" in summary
    )
    assert "transformer, 2 layers: look at most 5 times forward pass | 4.00 (4.00 to 4.00), met |" in summary


@pytest.mark.parametrize("is_memory", [False, True], ids=["time", "memory"])
def test_process_that_is_weighed_gives_memory_back(look: Any, monkeypatch: pytest.MonkeyPatch, is_memory: bool) -> None:
    lines = []

    class Running:
        def __init__(self, arguments: list[str], folder: str, path: Any) -> None:
            lines.append(arguments)
            assert path == (SCRIPTS,)
            Path(folder, "numbers.json").write_text('{"step_seconds": 1.0}')

        def wait(self) -> None:
            pass

    monkeypatch.setattr(look, "Running", Running)
    assert look._in_a_process("ResNet50", True, is_memory) == {"step_seconds": 1.0}
    setting = ["env", "MALLOC_MMAP_THRESHOLD_=16384"] if is_memory else []
    assert lines == [[*setting, sys.executable, "-m", "bench.look", "ResNet50", "numbers.json", "--mixup"]]


def test_process_of_its_own_takes_the_first_step(look: Any) -> None:
    numbers = look._in_a_process("frozen backbone", mixup=True, is_memory=True, quick=True)
    assert len(numbers["layers"]) == 4
    assert numbers["step_seconds"] > numbers["forward_seconds"] > 0


def test_plain_side_has_no_eligible_layers(look: Any) -> None:
    numbers = look.first_step("frozen backbone", mixup=False, quick=True)
    assert (numbers["layers"], numbers["outputs_bytes"]) == ([], 0)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak cannot be forgotten here")
def test_peak_of_a_call_is_not_that_of_an_earlier_one(look: Any) -> None:
    def touch(megabytes: int) -> None:
        with mmap(-1, megabytes * 2**20) as memory:  # not from an allocator, which may have some at hand
            memory[:: 2**10] = b"1" * (megabytes * 2**10)

    earlier, later = (look.peak_bytes(partial(touch, megabytes)) for megabytes in (80, 40))
    assert (earlier, later) == (pytest.approx(80 * 2**20, abs=2**20), pytest.approx(40 * 2**20, abs=2**20))


def test_steps_with_the_callback_and_without_begin_alike_and_keep_no_state(look: Any) -> None:
    (one, batches), (other, same) = look._made(look.QUICK_CASES["ResNet50"]), look._made(look.QUICK_CASES["ResNet50"])
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))
    assert all(map(torch.equal, batches[0], same[0]))
    assert one.configure_optimizers().defaults["momentum"] == 0


def test_networks_are_of_the_size_that_their_names_say(look: Any) -> None:
    with torch.device("meta"):
        frozen, resnet, transformer = (case.network() for case in look.CASES.values())
    trained = {name for name, parameter in frozen.named_parameters() if parameter.requires_grad}
    assert trained == {"head.weight", "head.bias"}
    assert sum(parameter.nbytes for parameter in frozen.backbone.parameters()) == 60 * 1024 * 1024 * 4
    layers = [name for name, part in resnet.named_modules() if isinstance(part, (nn.Conv2d, nn.Linear))]
    assert len([name for name in layers if "shortcut" not in name]) == 50
    # ResNet50 has 25,557,032 with 1,000 classes and a stem of 7 x 7.
    want = 25_557_032 - 990 * (2048 + 1) - (7 * 7 - 3 * 3) * 3 * 64
    assert sum(parameter.numel() for parameter in resnet.parameters()) == want
    assert 99e6 < sum(parameter.numel() for parameter in transformer.parameters()) < 101e6


@pytest.mark.parametrize("case", CASES)
def test_networks_take_their_batches(look: Any, case: str) -> None:
    with torch.device("meta"):
        made = look.CASES[case]
        logits = made.network()(torch.empty(made.shape))
    assert logits.shape == (made.shape[0], 10)
