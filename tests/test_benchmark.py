from __future__ import annotations

import importlib
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SCRIPTS = Path(__file__).parents[1] / "scripts"
NAMES = (
    *("interpolation", "mixed_loss", "memory", "step", "look", "layers", "scaling", "epoch", "loading"),
    *("trainer", "arithmetic", "jobs", "end_to_end"),
)
ROW = {
    "case": "8 MB",
    "against": "base",
    "seconds": {"base": [1.0], "ours": [3.0]},
    "median_seconds": {"base": 1.0, "ours": 3.0},
    "ratios": {"ours": dict.fromkeys(("median", "lower_quartile", "upper_quartile", "min", "max"), 3.0)},
    "targets": {},
}
# Runs a script with its arguments, and says last what it has imported.
RUN = """
import runpy, sys
del sys.argv[0]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(sorted({"torch", "lightning", "numpy", "mm_lightning"} & sys.modules.keys()))
"""


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The command with one benchmark, ``stub``, whose numbers go to a temporary folder."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("benchmark")
    stub: Any = ModuleType("bench.stub")
    stub.asked = []

    def measure(quick: bool) -> dict[str, Any]:
        stub.asked.append(quick)
        return {"rows": [ROW], "notes": ["A note."], "callback_us": 12.5}

    stub.measure = measure
    monkeypatch.setitem(sys.modules, "bench.stub", stub)
    monkeypatch.setattr(module, "BENCHMARKS", {"stub": "a constant"})
    monkeypatch.setattr(module, "FOLDER", tmp_path / "benchmarks")
    module.FOLDER.mkdir()
    return module


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN, str(SCRIPTS / "benchmark.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def _main(benchmark: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    benchmark.main()


def test_help_names_every_benchmark_and_imports_nothing_slow() -> None:
    done = _command("--help")
    *text, imported = done.stdout.splitlines()
    assert (done.returncode, imported, done.stderr) == (0, "[]", "")
    listed = [line.split()[0] for line in text if line.startswith("  ")]
    assert [name for name in listed if name in NAMES] == list(NAMES)


def test_wrong_name_is_answered_with_the_right_ones_before_anything_slow_is_imported() -> None:
    done = _command("stap")
    assert (done.returncode, done.stdout) == (2, "[]\n")
    message = done.stderr.splitlines()[-1]
    assert "argument benchmark: invalid choice: 'stap'" in message
    for name in (*NAMES, "all", "report"):
        assert name in message


def test_json_of_all_benchmarks_is_refused(benchmark: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        _main(benchmark, monkeypatch, "all", "--json", "numbers.json")
    assert sys.modules["bench.stub"].asked == []
    assert capsys.readouterr().err.endswith(
        "error: --json names the file of one benchmark; all of them go to benchmarks/*.json.\n"
    )


def test_run_writes_the_numbers_with_their_environment(benchmark: Any, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "stub.json"
    content = benchmark.run("stub", quick=False, path=path)
    assert json.loads(path.read_text()) == content
    revision = content.pop("git_revision")
    assert revision is None or len(revision.removesuffix("-dirty")) == 40
    assert content.pop("processor").endswith(torch.backends.cpu.get_cpu_capability())
    assert content.pop("packages")["torch"] == version("torch")
    assert content.pop("python") == ".".join(map(str, sys.version_info[:3]))
    assert content.keys() - {"platform", "processors"} == {
        *("benchmark", "what", "command", "rows", "notes", "callback_us", "threads")
    }
    assert content["command"] == "python scripts/benchmark.py stub"
    assert (content["benchmark"], content["what"]) == ("stub", "a constant")
    assert (content["rows"], content["notes"], content["callback_us"]) == ([ROW], ["A note."], 12.5)
    assert content["threads"] == torch.get_num_threads()
    out = capsys.readouterr().out
    assert "## stub: a constant\n" in out
    assert "\n|  | ours | 3 s | 3.00 | 3.00 to 3.00 |  |\n" in out


def test_quick_is_passed_on_and_said_in_the_command(benchmark: Any) -> None:
    content = benchmark.run("stub", quick=True, path=None)
    assert sys.modules["bench.stub"].asked == [True]
    assert content["command"] == "python scripts/benchmark.py stub --quick"


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        (["stub"], []),
        (["stub", "--quick", "--json", "{folder}/own.json"], ["own.json"]),
    ],
    ids=" ".join,
)
def test_numbers_go_where_they_are_asked_for(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], written: list[str]
) -> None:
    _main(benchmark, monkeypatch, *(argument.format(folder=tmp_path) for argument in arguments))
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.json")] == written
    assert sys.modules["bench.stub"].asked == ["--quick" in arguments]


@pytest.mark.parametrize("quick", [False, True], ids=["whole", "quick"])
def test_all_runs_each_in_a_process_of_its_own(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quick: bool
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(benchmark.subprocess, "run", lambda command, check: commands.append(command) if check else None)
    _main(benchmark, monkeypatch, "all", *["--quick"] * quick)
    options = ["--quick"] if quick else ["--json", str(tmp_path / "benchmarks" / "stub.json")]
    assert commands == [[sys.executable, benchmark.__file__, "stub", *options]]
    assert sys.modules["bench.stub"].asked == []


def test_report_is_written_from_the_folder_of_the_numbers(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Path, Path]] = []
    report: Any = ModuleType("bench.report")
    report.write = lambda results, docs: asked.append((results, docs))
    monkeypatch.setitem(sys.modules, "bench.report", report)
    _main(benchmark, monkeypatch, "report")
    assert asked == [(benchmark.FOLDER, benchmark.FOLDER.parent / "docs")]
    assert sys.modules["bench.stub"].asked == []
