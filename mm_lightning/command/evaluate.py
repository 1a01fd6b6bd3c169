"""The command ``python -m mm_lightning.evaluate RUN_OR_CKPT``: test a trained model again, on its own or other data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from mm_lightning.command import failure
from mm_lightning.command.configuration import CONF
from mm_lightning.command.line import LineParser
from mm_lightning.files import write_json

if TYPE_CHECKING:
    from mm_lightning.command.evaluation import Evaluation

__all__ = ["evaluate", "main", "with_overrides"]

_TAKEN = ("data", "trainer")
_ABOUT = """\
Test a trained model, on the data of its run or on other data. Prints the numbers, and writes them to its folder.
mm-evaluate is short for python -m mm_lightning.evaluate."""
_EXAMPLES = """\
examples:
  mm-evaluate outputs/train/2026-01-31_12-00-00-000000
  mm-evaluate outputs/.../checkpoints/last.ckpt data.root=/data/other_digits
  mm-evaluate outputs/... data=spirals data.noise=0.5 trainer=gpu

RUN is the folder of a run, whose best checkpoint is taken, or a checkpoint in it. Overrides are of data and trainer,
as mm-train takes them; the model is the run's own."""


def evaluate(run: Path, overrides: Sequence[str] = (), config_dir: Path | None = None) -> Evaluation:
    """Test the model of a run.

    Args:
        run: Folder of the run, or a checkpoint in it.
        overrides: Of the groups ``data`` and ``trainer``.
        config_dir: Folder of groups and options of one's own.

    Returns:
        What was tested, on what, and the numbers.

    Raises:
        FileNotFoundError: If there is no such run or no checkpoint in it.
        ValueError: If an override is of another group or names no key.
    """
    from mm_lightning.command.evaluation import tested  # help need not wait for torch
    from mm_lightning.command.loading import place_of

    config_path, checkpoint = place_of(run)
    config = OmegaConf.load(config_path)
    assert isinstance(config, DictConfig)
    return tested(checkpoint, config_path.parent, with_overrides(config, overrides, config_dir), list(overrides))


def with_overrides(config: DictConfig, words: Sequence[str], config_dir: Path | None = None) -> DictConfig:
    """Return a run's configuration with other data or another trainer.

    Args:
        config: Resolved. Not changed.
        words: Overrides; one that chooses an option replaces the whole node of the group.
        config_dir: Folder of groups and options of one's own.

    Raises:
        ValueError: If an override is of another group, or names a key that is not there.
    """
    overrides = OverridesParser.create().parse_overrides(list(words))
    for override in overrides:
        if (top := override.key_or_group.split(".")[0]) not in _TAKEN:
            raise ValueError(
                f"{override.input_line!r} overrides {top}. mm-evaluate takes overrides of data and trainer."
            )
    changed = config.copy()
    for top in _TAKEN:
        own = [override for override in overrides if override.key_or_group.split(".")[0] == top]
        if any(override.key_or_group == top for override in own):
            changed[top] = _composed(config, [str(override.input_line) for override in own], config_dir)[top]
            continue
        for override in own:
            key = override.key_or_group
            if not override.is_add() and OmegaConf.select(changed, key, default=_composed) is _composed:
                names = ", ".join(str(name) for name in changed[top] if name != "_target_")
                raise ValueError(f"There is no {key!r}. Names there: {names}. A new one is added with +{key}=...")
            OmegaConf.update(changed, key, override.value(), force_add=True)
    return changed


def main() -> None:
    """Run the command line. Exit code 0 on success, 1 otherwise."""
    with failure.as_one_line():
        arguments = _parser().parse_intermixed_args()
        found = evaluate(arguments.run, arguments.overrides, arguments.config_dir)
        if found.is_global_zero:
            path = arguments.out or _free(found.folder)
            write_json(path, found.content())
            print(f"Checkpoint   {found.checkpoint}\nTest         {found.line()}\nNumbers      {path}")


def _parser() -> LineParser:
    usage = "mm-evaluate [options] RUN [data=... overrides]"
    parser = LineParser(prog="mm-evaluate", usage=usage, description=_ABOUT, epilog=_EXAMPLES)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, or a checkpoint in it")
    parser.add_argument("overrides", nargs="*", metavar="data=...", help="other data, or another trainer")
    parser.add_argument("--out", type=Path, metavar="FILE", help="of the numbers; default: evaluation.json in the run")
    parser.add_config_dir("of groups and options of your own")
    return parser


def _composed(config: DictConfig, words: Sequence[str], config_dir: Path | None) -> Any:
    search = [] if config_dir is None else [f'hydra.searchpath=["file://{config_dir.absolute()}"]']
    context = {key: config[key] for key in ("seed", "max_epochs") if config.get(key) is not None}
    settings = [f"{key}={value}" for key, value in context.items()]
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra.compose("train", [*words, *settings, f'run_dir="{config.run_dir}"', *search])
    return OmegaConf.create(OmegaConf.to_container(composed, resolve=True))


def _free(folder: Path) -> Path:
    """The first of evaluation.json, evaluation_2.json, ... that is not there."""
    names = ("evaluation.json", *(f"evaluation_{i}.json" for i in range(2, 1_000_000)))
    return next(path for path in map(folder.joinpath, names) if not path.exists())
