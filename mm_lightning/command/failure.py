"""Failures as a person wants to read them: one line that says what was wrong and what to do, and an exit code."""

from __future__ import annotations

import difflib
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

__all__ = ["JobFailed", "as_one_line", "message"]

# Raised on purpose, with a message for a person. Anything else is a defect and shows where it comes from.
_EXPECTED = (
    ValueError,
    TypeError,
    RuntimeError,
    OSError,
    ImportError,
    HydraException,
    OmegaConfBaseException,
)
_EXPECTED_OF_LIGHTNING = "MisconfigurationException"
_SIGTERM_OF_LIGHTNING = "SIGTERMException"
_FULL_ERROR = "HYDRA_FULL_ERROR"
_OURS = "MM_LIGHTNING_SET_HYDRA_FULL_ERROR"  # whether it was not who types the command that set it
_INTERRUPTED, _TERMINATED = 130, 143  # what a shell reports for a command ended by Ctrl-C, by SIGTERM
_OF_AN_EXTRA = ' Others are in the extra sweep: pip install "mm-lightning[sweep]".'
_OF_A_RUN = "hydra.run.dir=... or, for several runs, hydra.sweep.dir=..."
_WAYS_OUT = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Free some space, or choose another folder with "),
    **dict.fromkeys(
        (errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS),
        "Choose another folder with ",
    ),
}


@contextmanager
def as_one_line(folder: str = _OF_A_RUN) -> Iterator[None]:
    """Turn an exception into one line on stderr and exit code 1, Ctrl-C into 130 and SIGTERM into 143.

    ``HYDRA_FULL_ERROR=1`` shows the whole traceback instead.

    Args:
        folder: What another folder is chosen with, where one cannot be written.

    Raises:
        SystemExit: After any exception.
    """
    if os.environ.get(_FULL_ERROR) == "1" and _OURS not in os.environ:
        yield
        return
    # or Hydra prints its own account and exits before this one can; what is begun from here inherits both
    os.environ[_FULL_ERROR] = os.environ[_OURS] = "1"
    try:
        yield
    except JobFailed as failed:
        _report(failed.error, folder)
        sys.exit(1)
    except BrokenPipeError:  # who reads has seen enough, as of --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    except SystemExit as stop:
        if _is_named(stop, _SIGTERM_OF_LIGHTNING):
            sys.exit(_TERMINATED)
        # Lightning answers Ctrl-C with exit code 1.
        sys.exit(_INTERRUPTED if isinstance(stop.__context__, KeyboardInterrupt) else stop.code)
    except Exception as error:
        _report(error, folder)
        sys.exit(1)
    finally:
        os.environ.pop(_FULL_ERROR, None)
        os.environ.pop(_OURS, None)


class JobFailed(BaseException):
    """Carries a job's exception past Hydra, which would print an account of its own."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error

    def __reduce__(self) -> tuple[Callable[..., JobFailed], tuple[Exception, BaseException | None]]:
        """Come whole, with the error's cause, from the process of a run that a launcher has started."""
        return _with_cause, (self.error, self.error.__cause__)


def _with_cause(error: Exception, cause: BaseException | None) -> JobFailed:
    error.__cause__ = cause
    return JobFailed(error)


def message(error: Exception) -> str:
    """Return what is said of an exception, in one line."""
    return _message(error, _cause(error), _OF_A_RUN)


def _report(error: Exception, folder: str) -> None:
    cause = _cause(error)
    if not isinstance(cause, _EXPECTED) and not _is_named(cause, _EXPECTED_OF_LIGHTNING):
        traceback.print_exception(error)
    print(f"error: {_message(error, cause, folder)}", file=sys.stderr)


def _is_named(error: BaseException, name: str) -> bool:
    """Tell a class of Lightning by its name: to have the class itself, TAB would wait for the import of torch."""
    return any(kind.__name__ == name for kind in type(error).__mro__)


def _cause(error: BaseException) -> BaseException:
    """What an object refused at construction, below Hydra's account of constructing it."""
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _message(error: BaseException, cause: BaseException, folder: str) -> str:
    if isinstance(cause, MissingConfigException) and cause.missing_cfg_file and cause.options:
        known = _choices(cause.missing_cfg_file, os.path.basename(cause.missing_cfg_file), cause.options, "Options")
        return known + _OF_AN_EXTRA if cause.missing_cfg_file.startswith(("hydra/launcher", "hydra/sweeper")) else known
    if isinstance(key_error := cause.__cause__, (ConfigAttributeError, ConfigKeyError)) and key_error.full_key:
        names = [str(name) for name in key_error.parent_node or () if not str(name).startswith("_")]
        known = _choices(key_error.full_key, str(key_error.key), names, "Names there")
        if not names and key_error.key == "_target_":  # below what is null
            return f"{known} Give all of it: '{key_error.full_key.removesuffix('._target_')}={{_target_: ...}}'."
        is_answered = not names or "Did you mean" in known
        return known if is_answered else f"{known} A new one is added with +{key_error.full_key}=..."
    if isinstance(cause, MissingConfigException) and cause.missing_cfg_file and (options := _options(cause)):
        return _choices(cause.missing_cfg_file, os.path.basename(cause.missing_cfg_file), options, "Options")
    text = " ".join(_sentences(cause))
    if isinstance(cause, OverrideParseException) and cause.override not in text:
        text = f"Cannot read {cause.override!r}: {text}"
    if isinstance(cause, OSError) and cause.errno in _WAYS_OUT:
        text = f"{text} {_WAYS_OUT[cause.errno]}{folder}"
    key = re.search(r"full_key: (\S+)", str(error)) if isinstance(error, InstantiationException) else None
    if key is None:
        return text
    if unknown := re.search(r"unexpected keyword argument '(\w+)'", text):
        text = f"{text} Leave it out; where an experiment sets it, '~{key.group(1)}.{unknown.group(1)}' does."
    return f"{key.group(1)}: {text}"


def _options(error: MissingConfigException) -> list[str]:
    """Options of a group, from the folders that Hydra has searched; of one of several it lists none itself."""
    group = os.path.dirname(str(error.missing_cfg_file))
    folders = re.findall(r"path=file://(.+)$", str(error), flags=re.MULTILINE)
    files = {path for folder in folders for path in Path(folder, group).glob("*.yaml")}
    return sorted({path.stem for path in files})


def _choices(whole: str, name: str, names: Sequence[str], what: str) -> str:
    nearest = difflib.get_close_matches(name, names, n=1)
    meant = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"There is no {whole!r}. {what}: {', '.join(names) or '(none)'}.{meant}"


def _sentences(error: BaseException) -> list[str]:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # OmegaConf appends where the key is, which its first line has said already.
    lines = [line for line in lines if not line.startswith(("full_key:", "object_type=", "reference_type="))]
    if error.__cause__ is not None and isinstance(error, HydraException):
        lines += [line for line in _sentences(error.__cause__) if line not in lines]
    return [line if line.endswith((".", "?", "!", ":")) else f"{line}." for line in lines]
