"""What an evaluation leaves in the folder of its run: numbers, the temperature, and events for TensorBoard."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from mm_lightning.command.evaluation import Tested
from mm_lightning.command.evaluation_table import table
from mm_lightning.files import write_json

__all__ = ["keep"]


def keep(found: Tested, path: Path) -> Path:
    """Write the numbers, ``temperature.json`` beside the run's checkpoints folder, and events.

    Args:
        found: The test.
        path: File of the numbers.

    Returns:
        The folder of the events: named like the file of the numbers, beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, found.content())
    fitted = found.evaluation.fitted
    if fitted is not None:
        about = {"is_uncertain": fitted.is_uncertain, "checkpoint": str(found.checkpoint)}
        write_json(found.folder / "temperature.json", {**fitted._asdict(), **about})
    events = path.with_suffix("")
    if events == path:
        events = path.with_name(f"{path.name}_events")
    _write_events(found, events)
    return events


def _write_events(found: Tested, folder: Path) -> None:
    evaluation = found.evaluation
    with SummaryWriter(str(folder)) as writer:
        for key, value in {**found.metrics, **evaluation.logged}.items():
            writer.add_scalar(key, value, 0)
        if text := table(evaluation):
            writer.add_text("evaluation/table", "\n".join(f"    {line}" for line in text.splitlines()), 0)
        if evaluation.bins and find_spec("matplotlib"):
            from mm_lightning.diagnostics.reliability import draw_reliability_diagrams

            titles = {"plain": "As it is", "scaled": "After temperature scaling"}
            numbers = [evaluation.scores[which] for which in evaluation.bins]
            names = [titles[which] for which in evaluation.bins]
            figure = draw_reliability_diagrams(list(evaluation.bins.values()), names, numbers)
            writer.add_figure("evaluation/reliability", figure, 0, close=False)  # not made by pyplot
