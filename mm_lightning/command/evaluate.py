"""The command ``python -m mm_lightning.evaluate RUN_OR_CKPT``: what a trained model is worth, on any data."""

from __future__ import annotations

import shlex
from argparse import ArgumentTypeError
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from mm_lightning.command import failure
from mm_lightning.command.configuration import CONF
from mm_lightning.command.line import LineParser

if TYPE_CHECKING:
    from mm_lightning.command.evaluation import Tested

__all__ = ["evaluate", "main", "with_overrides"]

_TAKEN = ("data", "trainer")
_GROUPS = ("attacks", "deformations", "shifts", "neighbours", "spectra")
_FLAGS = {"epsilon": ["attacks"], "layers": ["spectra", "neighbours"], "k": ["neighbours"]}
_MORE = f"more: {', '.join(_GROUPS)}, with commas between"
_ABOUT = """\
Test a trained model, on the data of its run or on other data, and if it is a classifier measure accuracy, likelihood,
Brier score and calibration errors, also after temperature scaling with the run's validation data. --with measures more.
Prints the numbers, and writes them to the run's folder. mm-evaluate is short for python -m mm_lightning.evaluate."""
_EXAMPLES = """\
examples:
  mm-evaluate outputs/train/2026-01-31_12-00-00-000000
  mm-evaluate outputs/.../checkpoints/last.ckpt data.root=/data/other_digits
  mm-evaluate outputs/... data=spirals data.noise=0.5 trainer=gpu
  mm-evaluate outputs/... --with attacks,deformations --epsilon 0.1,0.3
  mm-evaluate outputs/... --all

RUN is the folder of a run, whose best checkpoint is taken, or a checkpoint in it. Overrides are of data and trainer,
as mm-train takes them; the model is the run's own. docs/evaluation.md says what each number is."""


def evaluate(
    run: Path,
    overrides: Sequence[str] = (),
    config_dir: Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Tested:
    """Test the model of a run.

    Args:
        run: Folder of the run, or a checkpoint in it.
        overrides: Of the groups ``data`` and ``trainer``.
        config_dir: Folder of groups and options of one's own.
        settings: Of :class:`mm_lightning.diagnostics.Evaluation`.

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
    changed = with_overrides(config, overrides, config_dir)
    own_data = None if changed.data == config.data else config.data
    return tested(checkpoint, config_path.parent, changed, list(overrides), settings, own_data)


def with_overrides(config: DictConfig, words: Sequence[str], config_dir: Path | None = None) -> DictConfig:
    """Return a run's configuration with other data or another trainer.

    Args:
        config: Resolved. Not changed.
        words: Overrides; one that chooses an option replaces the whole node of the group.
        config_dir: Folder of groups and options of one's own.

    Raises:
        ValueError: If an override is of another group, names a key that is not there, or sets none.
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
            if override.is_delete() or override.is_sweep_override():
                raise ValueError(f"{override.input_line!r} must be KEY=VALUE; mm-evaluate deletes and sweeps nothing.")
            if not override.is_add() and OmegaConf.select(changed, key, default=_composed) is _composed:
                names = ", ".join(str(name) for name in changed[top] if name != "_target_")
                raise ValueError(f"There is no {key!r}. Names there: {names}. A new one is added with +{key}=...")
            OmegaConf.update(changed, key, override.value(), force_add=True)
    return changed


def main() -> None:
    """Run the command line. Exit code 0 on success, 1 otherwise."""
    with failure.as_one_line("--out FILE"):
        arguments = _parser().parse_intermixed_args()
        if arguments.config_dir is not None and not arguments.config_dir.is_dir():
            raise FileNotFoundError(f"--config-dir {arguments.config_dir} is not a folder. Name one, or leave it out.")
        settings = _settings(arguments)
        found = evaluate(arguments.run, arguments.overrides, arguments.config_dir, settings)
        if found.is_global_zero:
            _show(found, arguments.out or _free(found.folder))


def _show(found: Tested, path: Path) -> None:
    """Print the numbers, then write them: a folder that cannot be written costs nothing that was measured."""
    from mm_lightning.command.evaluation_files import keep
    from mm_lightning.command.evaluation_table import table

    lines = [f"Checkpoint   {found.checkpoint}", f"Test         {found.line()}"]
    lines += [text] if (text := table(found.evaluation)) else []
    lines += [f"Note         {remark}" for remark in found.left_out()]
    if (fitted := found.evaluation.fitted) is not None:
        kept = found.folder / "temperature.json"
        lines.append(
            f"Temperature  {fitted.temperature:.4g}, 95 % interval {fitted.low:.4g} to {fitted.high:.4g}: {kept}"
        )
    print("\n".join(lines), flush=True)
    events = keep(found, path)
    print(f"Numbers      {path}\nTensorBoard  tensorboard --logdir {shlex.quote(str(events))}")


def _parser() -> LineParser:
    usage = "mm-evaluate [options] RUN [data=... overrides]"
    parser = LineParser(prog="mm-evaluate", usage=usage, description=_ABOUT, epilog=_EXAMPLES)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, or a checkpoint in it")
    parser.add_argument("overrides", nargs="*", metavar="data=...", help="other data, or another trainer")
    parser.add_argument("--with", dest="groups", type=_groups, default=[], metavar="GROUPS", help=_MORE)
    parser.add_argument("--all", action="store_true", help="all of these groups")
    parser.add_argument(
        "--epsilon", type=_numbers, metavar="E,...", help="of attacks, in pixels in [0, 1] or the range"
    )
    parser.add_argument("--k", type=int, metavar="K", help="neighbours; default: 5")
    parser.add_argument("--layers", type=_names, metavar="LAYER,...", help="of spectra, the last of neighbours")
    parser.add_argument("--logits", default="output", metavar="LAYER", help="where the logits are; default: output")
    parser.add_argument("--rows", type=int, default=10_000, metavar="N", help="of the groups; default: 10,000")
    parser.add_argument("--out", type=Path, metavar="FILE", help="of the numbers; default: evaluation.json in the run")
    parser.add_config_dir("of groups and options of your own")
    return parser


def _settings(arguments: Any) -> dict[str, Any]:
    """The arguments of the line as those of the callback."""
    from mm_lightning.evaluation import FGSM, PGD, Neighbours

    wanted: dict[str, Any] = dict.fromkeys(_GROUPS if arguments.all else arguments.groups, True)
    for flag, groups in _FLAGS.items():
        if getattr(arguments, flag) is not None and wanted.keys().isdisjoint(groups):
            raise ValueError(f"--{flag} is of {' and '.join(groups)}, not asked for. Add --with {groups[0]}.")
    if arguments.epsilon and "attacks" in wanted:
        wanted["attacks"] = [*map(FGSM, arguments.epsilon), *(PGD(one, one / 4) for one in arguments.epsilon)]
    if "neighbours" in wanted:
        k = {} if arguments.k is None else {"k": arguments.k}
        wanted["neighbours"] = Neighbours(**k, layer=arguments.layers[-1] if arguments.layers else None)
    if arguments.layers and "spectra" in wanted:
        wanted["spectra"] = arguments.layers
    return {**wanted, "layer": arguments.logits, "extra_points": arguments.rows}


def _groups(text: str) -> list[str]:
    names = _names(text)
    for name in names:
        if name not in _GROUPS:
            raise ArgumentTypeError(f"there is no {name!r}; there are {', '.join(_GROUPS)}, with commas between")
    return names


def _names(text: str) -> list[str]:
    if names := [name.strip() for name in text.split(",") if name.strip()]:
        return names
    raise ArgumentTypeError(f"{text!r} names nothing; leave the flag out, or name some with commas between")


def _numbers(text: str) -> list[float]:
    try:
        return [float(name) for name in _names(text)]
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is no list of numbers, with commas between") from None


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
