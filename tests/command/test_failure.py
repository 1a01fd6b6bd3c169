import errno
import os
from typing import Any

import pytest
from hydra.errors import ConfigCompositionException, InstantiationException
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from omegaconf import OmegaConf

from mm_lightning.command.failure import JobFailed, as_one_line


@pytest.fixture(autouse=True)
def _default_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)


def reported(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    """The exit code and stderr after ``error``."""
    with pytest.raises(SystemExit) as stop, as_one_line():
        raise error
    out, err = capsys.readouterr()
    assert out == ""
    return stop.value.code, err


def chained(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


ELSEWHERE = "another folder with hydra.run.dir=... or, for several runs, hydra.sweep.dir=..."


@pytest.mark.parametrize(
    ("error", "line"),
    [
        pytest.param(ValueError("alpha must be >= 0, got -1."), "alpha must be >= 0, got -1.", id="value"),
        pytest.param(JobFailed(ValueError("no.")), "no.", id="job"),
        pytest.param(RuntimeError("first\n\n  second?"), "first. second?", id="several lines"),
        pytest.param(ValueError("broken!"), "broken!", id="mark"),
        pytest.param(TypeError(), "TypeError.", id="no text"),
        pytest.param(MisconfigurationException("No GPU"), "No GPU.", id="Lightning's"),
        pytest.param(
            OSError(errno.ENOSPC, "No space left on device", "a/b"),
            f"[Errno 28] No space left on device: 'a/b'. Free some space, or choose {ELSEWHERE}",
            id="full disk",
        ),
        pytest.param(
            PermissionError(errno.EACCES, "Permission denied", "a/b"),
            f"[Errno 13] Permission denied: 'a/b'. Choose {ELSEWHERE}",
            id="read-only",
        ),
        pytest.param(FileNotFoundError("no such folder"), "no such folder.", id="own OSError"),
        pytest.param(
            chained(InstantiationException("Error in call\nfull_key: mixup"), ValueError("alpha is wrong")),
            "mixup: alpha is wrong.",
            id="construction",
        ),
        pytest.param(
            chained(
                InstantiationException("Error in call\nfull_key: data"),
                TypeError("Data.__init__() got an unexpected keyword argument 'num_validation'"),
            ),
            "data: Data.__init__() got an unexpected keyword argument 'num_validation'. "
            "Leave it out; where an experiment sets it, '~data.num_validation' does.",
            id="argument of another class",
        ),
        pytest.param(
            chained(
                InstantiationException("outer\nfull_key: model"),
                chained(InstantiationException("inner\nfull_key: model.blocks"), ValueError("sizes are wrong")),
            ),
            "model: sizes are wrong.",
            id="construction within construction",
        ),
    ],
)
def test_expected_errors_become_one_line(error: BaseException, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert reported(error, capsys) == (1, f"error: {line}\n")


def test_another_folder_is_chosen_as_the_command_has_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), as_one_line("out=..."):
        raise PermissionError(errno.EACCES, "Permission denied", "a/b")
    line = "error: [Errno 13] Permission denied: 'a/b'. Choose another folder with out=...\n"
    assert capsys.readouterr().err == line


def test_defects_show_where_they_come_from(capsys: pytest.CaptureFixture[str]) -> None:
    code, err = reported(JobFailed(ZeroDivisionError("division by zero")), capsys)
    assert code == 1
    assert err.startswith("ZeroDivisionError: division by zero\n")  # never raised, so without frames
    assert err.endswith("\nerror: division by zero.\n")


def test_unknown_name_lists_the_names_there(capsys: pytest.CaptureFixture[str]) -> None:
    config = OmegaConf.create({"mixup": {"_target_": "x", "alpha": 1, "layers": "auto"}})
    OmegaConf.set_struct(config, True)
    with pytest.raises(Exception, match="not in struct") as cause:
        config.mixup.layer = 1
    error = chained(ConfigCompositionException("Could not override"), cause.value)
    line = "error: There is no 'mixup.layer'. Names there: alpha, layers. Did you mean 'layers'?\n"
    assert reported(error, capsys) == (1, line)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        pytest.param(KeyboardInterrupt(), 130, id="Ctrl-C"),
        pytest.param(SIGTERMException(), 143, id="SIGTERM"),
        pytest.param(SystemExit(5), 5, id="an exit code"),
    ],
)
def test_exit_codes(error: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert reported(error, capsys) == (code, "")


def test_exit_that_answers_an_interrupt_is_130() -> None:
    answer = SystemExit(1)  # as Lightning's
    answer.__context__ = KeyboardInterrupt()
    with pytest.raises(SystemExit) as stop, as_one_line():
        raise answer
    assert stop.value.code == 130


def test_full_error_lets_everything_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ZeroDivisionError, match="x"), as_one_line():
        raise ZeroDivisionError("x")
    assert os.environ["HYDRA_FULL_ERROR"] == "1"


def test_environment_is_put_back(capsys: pytest.CaptureFixture[str]) -> None:
    reported(ValueError("x"), capsys)
    with as_one_line():
        pass
    assert "HYDRA_FULL_ERROR" not in os.environ
