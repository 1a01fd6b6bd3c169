"""What every command's line takes, and how it refuses the rest. The commands themselves have files of their own."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser

import mm_lightning
from mm_lightning.command import compare, line, scripts
from mm_lightning.command.configuration import CONF
from mm_lightning.study import runner
from mm_lightning.study.jobs import Job

COMMANDS: dict[str, Callable[[], None]] = {
    "train": scripts.train,
    "inspect": scripts.inspect,
    "compare": compare.main,
    "reproduce": scripts.reproduce,
    "study": scripts.study,
}


@pytest.fixture(params=COMMANDS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[Any, str, str]]:
    """Runs a command in this process; exit code, stdout and stderr."""
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.chdir(tmp_path)

    def call(name: str, *arguments: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", [f"mm-{name}", *arguments])
        code: Any = 0
        try:
            COMMANDS[name]()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


Call = Callable[..., tuple[Any, str, str]]


def test_version_is_that_of_this_package_and_of_what_it_stands_on(call: Call, name: str) -> None:
    others = ", ".join(f"{other} {version(other)}" for other in ("torch", "lightning", "hydra-core"))
    assert call(name, "--version") == (0, f"mm-lightning {mm_lightning.__version__} ({others})\n", "")


def test_help_says_what_it_does_with_examples_and_flags(call: Call, name: str) -> None:
    code, out, err = call(name, "--help")
    assert (code, err) == (0, "")
    first, both = {
        "train": ("Train a network with or without manifold mixup", "python -m mm_lightning.train"),
        "inspect": ("Show where the network of an experiment can be mixed", "python -m mm_lightning.inspect"),
        "compare": ("usage: mm-compare [options] RUN [RUN ...]", "python -m mm_lightning.compare"),
        "reproduce": ("Repeat the findings of manifold mixup", "python -m mm_lightning.reproduce"),
        "study": ("Does manifold mixup help my model on my data?", "python -m mm_lightning.study"),
    }[name]
    assert out.startswith(first)
    assert f"mm-{name} is short for {both}" in out
    assert "--version " in out
    assert re.search(r"--config-dir(, -cd)? FOLDER", out)  # the second since Python 3.13
    assert ("--shell-completion install=bash" in out) == (name != "compare")
    assert ("shells complete folders by themselves" in out) == (name == "compare")
    assert "$" not in out
    # but for the lines of groups, which Hydra writes: GROUP: OPTION, OPTION, ...
    assert max(len(line) for line in out.splitlines() if not re.match(r"\w+: \w+, ", line)) <= 120


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--config-dir"], "argument --config-dir/-cd: expected one argument"),
    ],
)
def test_a_wrong_flag_is_one_line(call: Call, name: str, wrong: list[str], message: str) -> None:
    runs = ["somewhere"] if name == "compare" else []
    assert call(name, *runs, *wrong) == (1, "", f"error: {message}. --help lists what can be said.\n")


def test_a_folder_of_options_that_is_not_there_is_one_line(call: Call, name: str, tmp_path: Path) -> None:
    code, out, err = call(name, "--config-dir", "nowhere", *(["a"] if name == "compare" else []))
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert "nowhere' " in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "epochs"),
    [(["max_epochs=3"], 3), (["trainer.max_epochs=3"], 3), ([], 1)],
    ids=["typed", "typed of the trainer", "not typed"],
)
def test_the_printed_trainer_has_the_epochs_of_the_run(call: Call, overrides: list[str], epochs: int) -> None:
    code, out, _ = call("train", "--cfg", "job", "--resolve", "trainer=smoke", *overrides)
    assert (code, yaml.safe_load(out)["trainer"]["max_epochs"]) == (0, epochs)


def test_a_wrong_choice_of_a_flag_is_one_line(call: Call) -> None:
    code, out, err = call("train", "--cfg", "nonsense")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: argument --cfg/-c: invalid choice: 'nonsense' (choose from ")


def test_the_flags_are_those_of_hydra() -> None:
    # only a flag that is listed here gets to Hydra
    def flags(parser: Any) -> list[Any]:
        actions = sorted(parser._actions, key=lambda action: action.dest)
        return [(action.dest, sorted(action.option_strings), action.nargs, action.choices) for action in actions]

    assert flags(line.hydra_flags()) == flags(get_args_parser())


def test_the_runs_of_a_study_find_its_folder_of_options(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "my options"
    for group in ("experiment", "reproduction"):
        (own / group).mkdir(parents=True)
    (own / "experiment" / "mine.yaml").write_text("# @package _global_\nname: mine\nmax_epochs: 3\n")
    study = {
        "seeds": 1,
        "methods": {"plain": {"overrides": ["mixup=none"]}},
        "schedules": {"default": {"overrides": []}},
    }
    (own / "reproduction" / "mine.yaml").write_text(yaml.safe_dump({"mine": study}))
    jobs: list[Job] = []

    def stop(made: list[Job], *_: Any) -> None:
        jobs.extend(made)
        raise ValueError(f"{runner.composed(made[0])['max_epochs']} epochs.")

    monkeypatch.setattr(runner, "run_all", stop)
    finished = call("reproduce", "reproduction@experiments=[mine]", "--config-dir", "my options")
    assert finished == (1, "", "error: 3 epochs.\n")
    code, out, err = call("train", *jobs[0].arguments, "--cfg", "job")
    assert (code, err, yaml.safe_load(out)["max_epochs"]) == (0, "", 3)
    assert f'hydra.searchpath=["file://{own}"]' in jobs[0].command


@pytest.mark.parametrize("name", ["train", "inspect", "reproduce", "study"])
def test_completion_and_help_wait_for_hydra_alone(name: str, tmp_path: Path) -> None:
    words = {"--help": "", "--version": "", "-sc query=bash": f"mm-{name} mixup="}
    for flags, line_so_far in words.items():
        code = f"import sys; from mm_lightning.command.scripts import {name}\n"
        code += f"sys.argv = 'mm-{name} {flags}'.split()\ntry: {name}()\n"
        code += "except SystemExit: pass\nprint('loaded', *sys.modules)"
        environment = {**os.environ, "COMP_LINE": line_so_far}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        out, _, loaded = done.stdout.rpartition("loaded ")
        assert out
        assert not {"torch", "lightning", "pytorch_lightning", "matplotlib", "numpy"} & set(loaded.split())
    assert out.split() == sorted(f"mixup={path.stem}" for path in (CONF / "mixup").glob("*.yaml"))


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ("outputs/a-b_c.ckpt", "ckpt_path=outputs/a-b_c.ckpt"),
        ("/my runs/lr=1.ckpt", "'ckpt_path=\"/my runs/lr=1.ckpt\"'"),
        ("it's/[1,2].ckpt", """'ckpt_path="it'"'"'s/[1,2].ckpt"'"""),
        ('a"b\\', None),
        ("a,b", "'ckpt_path=\"a,b\"'"),
    ],
)
def test_a_printed_override_can_be_typed(value: str, word: str | None) -> None:
    typed = line.typed("ckpt_path", value)
    assert word in (None, typed)
    (seen,) = shlex.split(typed)
    assert OverridesParser.create().parse_override(seen).value() == value
