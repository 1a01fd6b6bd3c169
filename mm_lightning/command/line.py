"""The line that a command is typed in: its flags, and the job that Hydra composes for it."""

from __future__ import annotations

import argparse
import functools
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from omegaconf import DictConfig

from mm_lightning.command import failure
from mm_lightning.command.configuration import CONF
from mm_lightning.command.run_folder import leave_nothing, package_versions

__all__ = ["LineParser", "hydra_flags", "run_composed", "typed"]

_WITH_OUT = ("reproduce", "study")  # commands with a folder of their own, out=


class LineParser(argparse.ArgumentParser):
    """A parser with ``--version``, whose errors can be told in one line."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
        versions = package_versions()
        of_others = ", ".join(f"{name} {versions[name]}" for name in ("torch", "lightning", "hydra-core"))
        text = f"mm-lightning {versions['mm-lightning']} ({of_others})"
        self.add_argument("--version", action="version", version=text, help="print the versions and exit")

    def add_config_dir(self, of: str) -> None:
        """Take ``--config-dir``, as Hydra's commands do."""
        self.add_argument("--config-dir", "-cd", type=Path, metavar="FOLDER", help=of)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"{message}. --help lists what can be said.")


def hydra_flags() -> LineParser:
    """Return a parser of what Hydra's own takes, but for the version that it prints."""
    parser = LineParser(add_help=False)
    for name in ("--help -h", "--hydra-help", "--resolve", "--run -r", "--multirun -m", "--shell-completion -sc"):
        parser.add_argument(*name.split(), action="store_true")
    for name in ("--package -p", "--config-path -cp", "--config-name -cn", "--config-dir -cd", "--experimental-rerun"):
        parser.add_argument(*name.split())
    parser.add_argument("--cfg", "-c", choices=["job", "hydra", "all"])
    parts = ["all", "config", "defaults", "defaults-tree", "plugins", "searchpath"]
    parser.add_argument("--info", "-i", nargs="?", const="all", choices=parts)
    parser.add_argument("overrides", nargs="*")
    return parser


def run_composed(job: Callable[[DictConfig], Any], config_name: str) -> None:
    """Run a command line: ``job`` with the configuration that Hydra composes. A failure is one line and exit code 1.

    Args:
        job: What to do.
        config_name: Name of the file in ``conf/`` that it is composed from.

    Raises:
        SystemExit: After any failure; with 130 after Ctrl-C, 143 after SIGTERM.
    """

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)
    @functools.wraps(job)
    def composed(config: DictConfig) -> Any:
        try:
            return job(config)
        except BaseException as error:  # Ctrl-C before the first step, too
            leave_nothing()
            if isinstance(error, Exception):
                raise failure.JobFailed(error) from error
            raise

    with failure.as_one_line("out=...") if config_name in _WITH_OUT else failure.as_one_line():
        sys.argv[1:] = _overrides_last(sys.argv[1:])
        flags = hydra_flags().parse_args()
        typed_keys = {word.split("=")[0] for word in flags.overrides}
        if flags.cfg and "max_epochs" in typed_keys and "trainer.max_epochs" not in typed_keys:
            sys.argv.append("++trainer.max_epochs=${max_epochs}")  # as one_number_of_epochs lets a run have it
        try:
            composed()
        except Exception:  # Hydra's own, for some runs of a sweep
            leave_nothing()
            raise


def typed(key: str, value: str) -> str:
    """Write an override as it is typed in a shell: quoted where Hydra's grammar asks for it, then for the shell."""
    if not re.fullmatch(r"[\w./:%+-]+", value):
        escaped = re.sub(r'(\\*)"', r"\1\1\"", value)
        escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
        value = f'"{escaped}"'
    return shlex.quote(f"{key}={value}")


def _overrides_last(arguments: Sequence[str]) -> list[str]:
    """Move the flags before the overrides: Hydra's parser takes a flag between two overrides for the end of them."""
    is_override = [not text.startswith("-") and ("=" in text or text.startswith("~")) for text in arguments]
    return [text for late in (False, True) for text, last in zip(arguments, is_override, strict=True) if last is late]
