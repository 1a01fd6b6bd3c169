"""``mm_lightning.inspect``: the function, its table, and the command."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from classifier import Classifier, loader, rows
from own_process import run_module
from torch import Tensor, nn

import mm_lightning
from mm_lightning.inspect import Inspection, LayerReport, inspect

TABLE = """\
layer   type       output shape  depth  auto  safe to mix
input   the batch  6x4           0.00   *     yes
first   Linear     6x8           0.33   *     yes
second  Linear     6x8           0.67         yes
head    Linear     6x3           1.00         yes
unused  Linear     -                          no: does not run in training_step

layers="auto" mixes at 'input', 'first'."""


class Net(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)


def test_the_function_and_the_module_have_one_name() -> None:
    assert isinstance(mm_lightning.inspect, types.ModuleType)
    assert mm_lightning.inspect is sys.modules["mm_lightning.inspect"]
    assert mm_lightning.inspect.inspect is inspect
    assert str(mm_lightning.inspect(Net(), rows(6))) == TABLE
    assert mm_lightning.inspect(module=Net(), batch=rows(6), batch_dim={"first": 1}).layers[1].safe is False


class Cells(HTMLParser):
    """What a browser shows of the page: the cells of its tables' rows, and the paragraphs."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.paragraphs: list[str] = []
        self.inside: list[str] = []  # where text belongs
        self.feed(page)
        assert self.rows

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        assert tag in {"table", "thead", "tbody", "tr", "th", "td", "p"}
        if tag == "tr":
            self.rows.append([])
        self.inside = self.rows[-1] if tag in {"th", "td"} else self.paragraphs
        if tag in {"th", "td", "p"}:
            self.inside.append("")

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.inside[-1] += data


def test_a_notebook_shows_the_same_table() -> None:
    net = Net()
    net.second = type("A<b>&'c", (nn.Linear,), {})(8, 8, dtype=torch.float64)
    report = inspect(net, rows(6))
    page = Cells(report._repr_html_())
    *lines, _, choice = str(report).splitlines()
    assert [" ".join(" ".join(row).split()) for row in page.rows] == [" ".join(line.split()) for line in lines]
    assert page.rows[3] == ["second", "A<b>&'c", "6x8", "0.67", "", "yes"]
    assert page.paragraphs == [choice]


@pytest.mark.parametrize("has_trainer", [False, True], ids=["alone", "with a trainer"])
def test_the_report(make_trainer: Callable[..., pl.Trainer], has_trainer: bool) -> None:
    net, trainer = Net(), None
    if has_trainer:
        trainer = make_trainer()
        trainer.fit(net, loader(6))
    report = inspect(net, rows(6))
    assert isinstance(report, Inspection)
    assert str(report) == TABLE
    assert report.chosen == ("input", "first")
    assert report.safe == ("input", "first", "second", "head")
    assert report.layers[1] == LayerReport("first", "Linear", (6, 8), True, "", True, 1 / 3)
    assert report.layers[4] == LayerReport("unused", "Linear", None, False, "does not run in training_step", False, 0.0)
    assert net._trainer is trainer
    assert len(net.losses) == has_trainer


def test_a_path_around_a_layer_is_told() -> None:
    class Bypassed(Net):
        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.first(x))
            return self.head(hidden + torch.tanh(self.second(hidden)))

    second = inspect(Bypassed(), rows(6)).layers[2]
    assert (second.safe, second.chosen) == (False, False)
    assert second.reason == "a path from 'first' to 'head' leads around it"


def test_only_lightning_modules_are_taken() -> None:
    with pytest.raises(TypeError, match=r"inspect takes a LightningModule, got Linear\."):
        inspect(nn.Linear(4, 3), rows(6))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="needs tensors in the batch, got str without any"):
        inspect(Net(), "rows")


def test_the_errors_of_the_step_pass_through() -> None:
    class Broken(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise KeyError("mine")

    net = Broken()
    with pytest.raises(KeyError, match="mine"):
        inspect(net, rows(6))
    assert net._trainer is None
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())


class SequenceFirst(pl.LightningModule):
    """Takes (N, T, 4) and runs an LSTM on (T, N, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 8), nn.Linear(8, 3)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        hidden, _ = self.lstm(batch[0].transpose(0, 1))
        return F.cross_entropy(self.head(hidden[-1]), batch[1])


@pytest.mark.parametrize(("batch_dim", "is_safe"), [(0, False), (1, True), ({"lstm": 1}, True)])
def test_the_batch_may_stand_in_another_dimension(batch_dim: Any, is_safe: bool) -> None:
    batch = torch.randn(6, 5, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    lstm = inspect(SequenceFirst(), batch, batch_dim=batch_dim).layers[1]
    assert (lstm.name, lstm.type, lstm.shape, lstm.safe) == ("lstm", "LSTM", (5, 6, 8), is_safe)
    problem = "has no floating point output with the 6 rows in dimension 0: (5, 6, 8), (1, 6, 8), (1, 6, 8)"
    assert lstm.reason == ("" if is_safe else problem)


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    empty = tmp_path / "empty"
    empty.mkdir()

    def command(*overrides: str) -> subprocess.CompletedProcess[str]:
        finished = run_module("mm_lightning.inspect", *overrides, cwd=empty)
        assert list(empty.iterdir()) == []
        return finished

    return command


def test_the_command_prints_the_table(command: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    finished = command("+experiment=mnist_bottleneck")
    assert (finished.returncode, finished.stderr) == (0, "")
    lines = finished.stdout.splitlines()
    assert lines[0].split() == ["layer", "type", "output", "shape", "depth", "auto", "safe", "to", "mix"]
    assert lines[1].split() == ["input", "the", "batch", "100x1x28x28", "0.00", "yes"]
    assert "mix_before.3 MixPoint 100x2 0.50 * yes" in [" ".join(line.split()) for line in lines]
    assert lines[-1] == "layers=\"auto\" mixes at 'mix_before.3', 'mix_before.4'."


def test_the_command_judges_the_configured_way(command: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    finished = command("+experiment=mnist_bottleneck", "mixup=cutmix")
    assert (finished.returncode, finished.stderr) == (0, "")
    lines = [" ".join(line.split()) for line in finished.stdout.splitlines()]
    assert any(
        line.startswith("mix_before.3 MixPoint 100x2 no: CutMix() does not fit: it cuts boxes out of") for line in lines
    )
    assert lines[-2:] == ['layers="auto" mixes at nothing.', "mixup.layers is 'input'."]


def test_the_command_finds_an_experiment_in_a_folder_of_ones_own(
    command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "experiment").mkdir()
    settings = "# @package _global_\ndefaults:\n  - override /data: spirals\n  - override /model: mlp_spiral\n"
    sizes = "model: {blocks: {sizes: [2, 4, 4, 4, 4, 4, 4, 4, 2]}}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(settings + sizes)
    finished = command("+experiment=mine", "--config-dir", "..")
    assert (finished.returncode, finished.stderr) == (0, "")
    assert "blocks.0.1 Linear 20x4 0.12 yes" in [" ".join(line.split()) for line in finished.stdout.splitlines()]


def test_a_mistake_is_answered_in_one_line(command: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    finished = command("data.batch_sice=3")
    assert (finished.returncode, finished.stdout) == (1, "")
    assert finished.stderr.startswith("error: There is no 'data.batch_sice'. Names there: ")
    assert finished.stderr.endswith("Did you mean 'batch_size'?\n")
    assert finished.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"batch_dim": "x"}, TypeError, r"^batch_dim must be a dimension >= 0 or a dict .*, got 'x' of type str\."),
        ({"batch_dim": -1}, ValueError, r"^batch_dim must be a dimension >= 0 or a dict .*, got -1\."),
        ({"batch_dim": {"frist": 0}}, ValueError, r"^batch_dim must name layers of \w+, got 'frist'\."),
        ({"batch_size": "a"}, TypeError, r"^batch_size must be an integer >= 1, got 'a' of type str\."),
        ({"batch_size": 0}, ValueError, r"^batch_size must be an integer >= 1, got 0\."),
    ],
    ids=["name", "negative", "no layer", "text", "zero"],
)
def test_settings_that_are_none_are_refused(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        inspect(Classifier(), rows(6), **settings)
