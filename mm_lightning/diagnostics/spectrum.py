"""How flat the classes are in a layer: the singular values of their hidden states, drawn class by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from mm_lightning.arguments import plain
from mm_lightning.diagnostics.diagnostic import Diagnostic, Findings, Rows, SharedArguments
from mm_lightning.diagnostics.drawing import (
    GREY,
    HAIRLINE,
    INK,
    PALETTE,
    ClassNames,
    add_panel,
    check_class_names,
    class_colour,
    class_name,
    label_outer,
    titled_figure,
    write_numbers,
    write_titles,
)
from mm_lightning.evaluation.spectrum import class_spectrum, spectrum_numbers
from mm_lightning.namespaces import LightningModule, Trainer

if TYPE_CHECKING:
    from typing_extensions import Unpack

FLOOR = 1e-4  # of the largest value on an axis; smaller ones are not drawn: a log axis has no place for zero
WIDE = 40  # ranks; more are drawn on a log axis


def draw_spectra(
    spectra: Mapping[str, tuple[np.ndarray, np.ndarray]],
    classes: Sequence[int],
    title: str = "Singular values by class",
    class_names: ClassNames | None = None,
) -> Figure:
    """Draw singular values against their rank: a row per layer, left as they are, right minus the class mean.

    How to read it: each thin line is one class, the thick one their mean. The steeper a line falls, the fewer
    directions the class takes up: manifold mixup promises a large first value and small others. The step from the
    first value to the second on the left, smaller on the right, is mostly the class mean. Both panels of a row share
    the value axis, which ends at 1e-4 of the largest value; a line ends there too. More than 40 ranks are on a log
    axis. Below a panel stand the numbers of :func:`spectrum_numbers`.

    Args:
        spectra: Singular values by layer, uncentred and centred, each (K, D).
        classes: Class indices, (K,); they choose the colour.
        title: Heading of the figure.
        class_names: Text for each class, by class index; default is the index.

    Returns:
        A figure unknown to pyplot, so nothing needs closing.
    """
    width, high, step, left, right, bottom, top = 3.6, 2.75, 4.15, 0.75, 1.25, 1.05, 0.85  # inches
    height = top + high + bottom + step * (len(spectra) - 1)
    figure = titled_figure(2 * width + 0.25 + left + right, height, title, left)
    for row, (layer, pair) in enumerate(spectra.items()):
        for column, (values, kind) in enumerate(zip(pair, ("uncentred", "minus class mean"), strict=True)):
            corner = left + column * (width + 0.25), height - top - high - step * row
            axes = add_panel(figure, *corner, width, high)
            set_spectrum_axes(axes, np.concatenate(pair))
            _draw_lines(axes, values, classes, class_names)
            write_titles(axes, "" if column else f"Layer {layer}", kind)
            label_outer(axes, is_left=column == 0)
            write_numbers(axes, _captions(values), (0.7425, 0.92125))
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.03), frameon=False, fontsize=8.5, labelcolor=INK)
    return figure


def set_spectrum_axes(axes: Axes, values: np.ndarray) -> None:
    """Set a panel's axes to hold these singular values, (..., D): log values against ranks, these log if many."""
    drawn = values[values > FLOOR * values.max()]
    low, high = (drawn.min(), drawn.max()) if drawn.size else (0.1, 1.0)
    room, ranks = 1.05 * (high / low) ** 0.04, values.shape[-1]
    axes.set(yscale="log", ylim=(low / room, high * room), xlabel="rank", ylabel="singular value")
    if ranks > WIDE:
        axes.set(xscale="log", xlim=(0.85, ranks / 0.85))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda rank, _: f"{rank:.0f}"))
        axes.xaxis.set_minor_formatter(FuncFormatter(_plain_two_and_five) if ranks < 200 else NullFormatter())
    else:
        spacing = 1 if ranks <= 5 else 2 if ranks <= 12 else 5
        axes.set(xlim=(1 - 0.03 * ranks, ranks * 1.03), xticks=sorted({1, *range(spacing, ranks + 1, spacing)}))
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    few_decades = high < 100 * low
    axes.yaxis.set_minor_formatter(FuncFormatter(_plain_two_and_five) if few_decades else NullFormatter())
    axes.tick_params(which="minor", length=1.5, width=0.6, color=HAIRLINE, labelsize=8.5, labelcolor=GREY)


class Spectrum(Diagnostic):
    """Measure how flat the classes are in some layers: the singular values of each class's hidden states.

    When it looks, at which rows and at what cost says :class:`Diagnostic`; what the decomposition costs besides, on
    each process, :func:`class_spectrum`. How to read the picture says :func:`draw_spectra`. The data behind the picture
    hold ``layers``, ``classes`` (K,) and, for the layer at place i, ``values_i`` and ``values_centred_i``, each (K, D).

    ===============================================  ==========================================================
    log key                                          what it is
    ===============================================  ==========================================================
    ``spectrum/val``, ``spectrum/test``              image
    ``val/spectrum/LAYER/largest``, ``test/...``     largest singular value, mean over the classes
    ``val/spectrum/LAYER/others``, ``test/...``      sum of all others, mean over the classes; lower is flatter
    ``val/spectrum/LAYER/others_share``, ``...``     others / (largest + others), in [0, 1); lower is flatter
    ``.../largest_centred``                          the same of rows minus their class mean; so for
                                                     ``others_centred`` and ``others_share_centred``
    ===============================================  ==========================================================

    Between runs with other numbers of rows, or another scale of the layer, only the shares may be compared.

    Args:
        layers: Dotted name of the layer whose output, (N, ...), is decomposed after flattening, or several.
        class_names: Text for each class, by class index; default is the index.
        **shared: These and ``every_n_epochs``, ``max_points`` and ``name`` are those of every :class:`Diagnostic`.
    """

    def __init__(
        self,
        layers: str | Sequence[str],
        *,
        class_names: ClassNames | None = None,
        every_n_epochs: int | None = None,
        max_points: int = 10_000,
        name: str = "spectrum",
        **shared: Unpack[SharedArguments],
    ) -> None:
        several = plain(layers)
        super().__init__(
            name, several if isinstance(several, list) else [several], every_n_epochs, max_points, **shared
        )
        check_class_names(class_names)
        self.class_names = class_names

    def measure(self, trainer: Trainer, pl_module: LightningModule, rows: Rows) -> Findings:
        """Return the numbers of :func:`spectrum_numbers`, and all singular values."""
        numbers: dict[str, float] = {}
        arrays = {"layers": np.array(self.layers), "classes": rows.targets.unique().numpy()}
        for place, layer in enumerate(self.layers):
            for ending, centred in (("", False), ("_centred", True)):
                values, _ = class_spectrum(rows.hidden[layer], rows.targets, centred)
                found = spectrum_numbers(values)
                numbers |= {f"{layer}/{key}{ending}": number for key, number in found.items()}
                arrays[f"values{ending}_{place}"] = values.numpy()
        return Findings(numbers, arrays)

    def draw(self, findings: Findings, rows: Rows) -> Figure:
        """Draw the singular values."""
        spectra = {
            layer: (findings.arrays[f"values_{place}"], findings.arrays[f"values_centred_{place}"])
            for place, layer in enumerate(self.layers)
        }
        title = f"Singular values by class, {rows.occasion}"
        return draw_spectra(spectra, findings.arrays["classes"].tolist(), title, self.class_names)


def _draw_lines(axes: Axes, values: np.ndarray, classes: Sequence[int], names: ClassNames | None) -> None:
    ranks, named = np.arange(1, values.shape[1] + 1), len(classes) <= len(PALETTE)
    marker = "." if len(ranks) <= WIDE else None
    # NaN ends a line
    lines, mean = (np.where(each > axes.get_ylim()[0], each, np.nan) for each in (values, values.mean(axis=0)))
    for k, line in zip(classes, lines, strict=True):
        text = class_name(k, names) if named else None  # more classes have no colour of their own
        axes.plot(ranks, line, color=class_colour(k), lw=1.0, marker=marker, ms=3, label=text)
    axes.plot(ranks, mean, color=INK, lw=2.6, marker=marker, ms=7, label="mean")


def _captions(values: np.ndarray) -> dict[str, str]:
    found = spectrum_numbers(torch.from_numpy(np.array(values)))
    captions = {"largest": f"{found['largest']:,.4g}", "sum of the others": f"{found['others']:,.4g}"}
    return captions | {"share of the others": f"{found['others_share']:.1%}"}


def _plain(value: float, _: int | None = None) -> str:
    return f"{value:,.10g}"


def _plain_two_and_five(value: float, _: int | None = None) -> str:
    return _plain(value) if f"{value:e}"[0] in "25" else ""
