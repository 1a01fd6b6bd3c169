"""What all pictures share: colours, heading, panels, and the one place that hands a figure to loggers and to files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from mm_lightning.arguments import plain, refusal
from mm_lightning.files import whole_file
from mm_lightning.namespaces import Trainer, classes

ClassNames = Mapping[int, str] | Sequence[str]

FILE_DPI = 200  # dots per inch: 8 inches give 1600 pixels, sharp on a high-resolution screen
_RUN_LINE = 0.17  # inches
INK, GREY, HAIRLINE = "#1f2328", "#59636e", "#c8cfd7"
# Okabe and Ito's hues, moved apart in OKLab until any two differ by 0.17, and by 0.12 as protanopes and deuteranopes
# see them (Machado et al. 2009); matplotlib's petroff10 reaches 0.09 and 0.06.
PALETTE = (
    *("#0066dd", "#d39100", "#168266", "#d73400", "#fd9dab"),
    *("#4cd4ff", "#b2da1d", "#7a1d33", "#2f367f", "#9188c1"),
)


def titled_figure(width: float, height: float, heading: str, left: float, above: float = 0.12) -> Figure:
    """Begin a figure with its heading, which shrinks where it is too long for the width.

    Args:
        width: Inches.
        height: Inches.
        heading: Written in bold.
        left: Inches left of the heading.
        above: Inches above it.

    Returns:
        A figure unknown to pyplot, so nothing needs closing.
    """
    figure = Figure(figsize=(width, height), dpi=120, facecolor="white")
    points = min(13.0, 72 * (width - left - 0.1) / (0.68 * len(heading) + 1))  # a bold letter is about 0.68 em wide
    figure.text(left / width, 1 - above / height, heading, va="top", fontsize=points, weight="bold", color=INK)
    return figure


def add_run_title(figure: Figure, text: str) -> None:
    """Say above the heading what run a picture is of; the figure grows by the line, all else keeps its inches.

    Args:
        figure: Finished, with its heading as first text.
        text: Method, alpha and seed, say.
    """
    width, height = figure.get_size_inches()
    kept = height / (height + _RUN_LINE)
    legends = [(legend, legend.get_bbox_to_anchor()) for legend in figure.legends]
    anchors = [(legend, box.transformed(figure.transFigure.inverted())) for legend, box in legends]
    for axes in figure.axes:
        box = axes.get_position(original=True)
        axes.set_position((box.x0, box.y0 * kept, box.width, box.height * kept))
    for line in figure.texts:
        line.set_y(line.get_position()[1] * kept)
    figure.set_size_inches(width, height + _RUN_LINE)
    for legend, box in anchors:
        legend.set_bbox_to_anchor((box.x0, box.y0 * kept, box.width, box.height * kept))
    left = figure.texts[0].get_position()[0]
    points = min(8.5, 72 * width * (1 - left) / (0.6 * len(text) + 1))
    figure.text(left, 1 - 0.1 / (height + _RUN_LINE), text, va="top", fontsize=points, color=GREY)


def add_panel(
    figure: Figure, left: float, bottom: float, width: float, height: float, facecolor: str = "white"
) -> Axes:
    """Add axes in the common style, at a place in inches."""
    across, up = figure.get_size_inches()
    axes = figure.add_axes((left / across, bottom / up, width / across, height / up), facecolor=facecolor)
    axes.spines[:].set(color=HAIRLINE, linewidth=0.8)
    axes.tick_params(length=2.5, width=0.8, color=HAIRLINE, labelsize=8.5, labelcolor=GREY)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.label.set(size=10, color=INK)
    axes.yaxis.label.set(size=10, color=INK)
    return axes


def write_titles(axes: Axes, left: str, right: str = "") -> None:
    """Write a title above a panel on the left, and a note on the right."""
    axes.set_title(left, loc="left", fontsize=11, color=INK)
    axes.set_title(right, loc="right", fontsize=8.5, color=GREY)


def write_numbers(axes: Axes, numbers: Mapping[str, str], inches: tuple[float, float], size: float = 13) -> None:
    """Write numbers below a panel, evenly spread, each above its name.

    Args:
        axes: The panel.
        numbers: By name.
        inches: How far below the panel the numbers and the names stand.
        size: Of the numbers, in points.
    """
    height = axes.bbox.height / axes.figure.dpi  # in inches
    for place, (name, number) in enumerate(numbers.items()):
        x, (upper, lower) = (place + 0.5) / len(numbers), (-each / height for each in inches)
        axes.text(x, upper, number, transform=axes.transAxes, ha="center", size=size, weight="bold", color=INK)
        axes.text(x, lower, name, transform=axes.transAxes, ha="center", size=8.5, color=GREY)


def label_outer(axes: Axes, is_left: bool, is_lowest: bool = True) -> None:
    """Leave the labels of a panel that has panels with the same axes to its left, or below it, to those."""
    axes.tick_params(which="both", labelleft=is_left, labelbottom=is_lowest)
    axes.set(xlabel=axes.get_xlabel() if is_lowest else "", ylabel=axes.get_ylabel() if is_left else "")


def add_legend(figure: Figure, axes: Axes, left: float, above: float, **style: Any) -> None:
    """Add a legend of what is drawn in ``axes``, ``left`` and ``above`` inches from the figure's upper left corner."""
    width, height = figure.get_size_inches()
    place = {"loc": "upper left", "bbox_to_anchor": ((left - 0.08) / width, 1 - above / height), "borderpad": 0}
    look = {"frameon": False, "fontsize": 8.5, "labelcolor": INK}
    figure.legend(*axes.get_legend_handles_labels(), **{**place, **look, **style})


def class_colour(k: int) -> str:
    """Return the colour of a class; after ten classes the colours come again."""
    return PALETTE[k % len(PALETTE)]


def class_name(k: int, names: ClassNames | None) -> str:
    """Return the text for a class, by default its index."""
    return str(k) if names is None else names[k]


def check_class_names(names: Any) -> None:
    """Raise TypeError unless ``names`` has a text for class indices, or is None."""
    if names is not None and not isinstance(plain(names), (dict, list)):
        raise refusal(
            "class_names", names, "a list of texts, or a mapping of class indices to texts", "None takes the indices."
        )


def check_folder(dirpath: Any) -> None:
    """Raise TypeError unless ``dirpath`` is a path or None."""
    if dirpath is not None and not isinstance(dirpath, (str, PathLike)):
        raise refusal("dirpath", dirpath, "a path", "None is the folder figures of the trainer's.")


def figures_folder(trainer: Trainer, dirpath: str | Path | None) -> Path:
    """Return where pictures are put: ``dirpath``, or by default ``figures`` in ``trainer.default_root_dir``."""
    return Path(trainer.default_root_dir, "figures") if dirpath is None else Path(dirpath)


def publish(
    trainer: Trainer,
    name: str,
    part: str,
    figure: Figure,
    arrays: Mapping[str, np.ndarray],
    folder: Path,
    run_title: str = "",
) -> None:
    """Log a figure as ``NAME/PART`` and, but for a ``fast_dev_run``, write ``NAME_PART.png`` and the data behind it.

    Args:
        trainer: Its loggers get the picture.
        name: Of the diagnostic.
        part: What the picture is of.
        figure: The picture.
        arrays: What it is drawn from, for ``NAME_PART.npz``.
        folder: Of the files.
        run_title: What run the picture is of, written above its heading.
    """
    if run_title:
        add_run_title(figure, run_title)
    picture = Image.fromarray(pixels(figure, FILE_DPI))  # drawn once: that takes longer than all that follows
    width, height = (int(inches * figure.dpi) for inches in figure.get_size_inches())
    smaller = picture.resize((width, height), Image.Resampling.LANCZOS)
    log_image(trainer, f"{name}/{part}", np.array(smaller))  # a copy that may be written to
    if not trainer.fast_dev_run:  # type: ignore[attr-defined]
        path = folder / f"{name}_{part}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            picture.save(file, "png", dpi=(FILE_DPI, FILE_DPI))
        save_arrays(arrays, path.with_suffix(".npz"))


def log_image(trainer: Trainer, tag: str, image: np.ndarray) -> None:
    """Send a picture to every logger that takes images, at the step; without such a logger nothing happens.

    TensorBoard gets it by ``add_image``, any other logger (Weights & Biases, ...) by ``log_image``.

    Args:
        trainer: Its ``loggers`` are served.
        tag: Name of the picture, ``group/quantity``.
        image: RGB, (H, W, 3), uint8.
    """
    step = trainer.global_step
    for logger in trainer.loggers:
        if isinstance(logger, classes("loggers.TensorBoardLogger")):
            logger.experiment.add_image(tag, image, global_step=step, dataformats="HWC")
        elif callable(log := getattr(logger, "log_image", None)):
            log(key=tag, images=[image], step=step)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure to a file, whole or not at all; an older file of that name survives a failure.

    Args:
        figure: The picture.
        path: Target; its suffix gives the format (``.png``, ``.pdf``, ``.svg``). Missing folders are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        figure.savefig(file, format=path.suffix.lstrip(".") or "png", dpi=FILE_DPI)


def save_arrays(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Write arrays to a compressed ``.npz`` file, whole or not at all."""
    with whole_file(path) as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # any name might be allow_pickle


def pixels(figure: Figure, dpi: float | None = None) -> np.ndarray:
    """Return a figure as RGB, (H, W, 3), uint8, with so many dots per inch; None has it with its own."""
    own = figure.dpi
    try:
        figure.dpi = own if dpi is None else dpi
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()
    finally:
        figure.dpi = own
