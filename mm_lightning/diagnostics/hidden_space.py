"""How tightly a layer gathers each class: one cloud of hidden states per class, drawn in the plane."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from mm_lightning.arguments import plain, refusal
from mm_lightning.diagnostics.clouds import classes_in_words, draw_clouds, half_and_all, square_frame
from mm_lightning.diagnostics.diagnostic import Diagnostic, Findings, Rows, SharedArguments
from mm_lightning.diagnostics.drawing import (
    ClassNames,
    add_panel,
    check_class_names,
    label_outer,
    titled_figure,
    write_numbers,
    write_titles,
)
from mm_lightning.evaluation.rows import checked
from mm_lightning.namespaces import LightningModule, Trainer

if TYPE_CHECKING:
    from typing_extensions import Unpack

CAPTIONS = {  # of the picture; the arrow points to the better value
    "davies_bouldin": ("Davies–Bouldin ↓", "{:.2f}"),
    "spread_ratio": ("spread ratio ↓", "{:.2f}"),
    "nearest_mean_acc": ("nearest mean ↑", "{:.1%}"),
}


def class_separation(hidden: Tensor, targets: Tensor) -> dict[str, float]:
    """Measure how tight the classes are and how far apart, in float64.

    With m_k the mean of class k, r_i the distance of row i to its own class mean and K classes present:

    - ``davies_bouldin``: mean over k of max over j != k of (s_k + s_j) / |m_k - m_j|, where s_k is the mean r_i of
      class k (Davies and Bouldin 1979). Lower is tighter; 0 means that every class is one point.
    - ``spread_ratio``: sqrt(mean of r_i^2) / (mean of |m_j - m_k| over all pairs j < k). Lower is tighter.
    - ``nearest_mean_acc``: fraction of rows nearer to their own class mean than to any other, in [0, 1].
    - ``nearest_mean_margin``: mean over the rows of (d_i - r_i) / (d_i + r_i), where d_i is the distance to the
      nearest mean of another class. In [-1, 1]; 1 means that every class is one point.

    Classes with equal means are not separated at all: ``davies_bouldin`` is then infinite. (torchmetrics 1.9 calls
    that 0, the best score, computes in float32, and is far off for more than 25 classes, where ``torch.cdist`` leaves
    its diagonal unequal to zero.)

    Args:
        hidden: Hidden states, finite, (N, D).
        targets: Class indices, integer, (N,); at least two different ones.

    Returns:
        The four numbers by name.

    Raises:
        ValueError: If the shapes do not fit, a value is not finite or fewer than two classes are present.
    """
    hidden, targets = checked(hidden, targets)
    hidden = hidden.double()
    classes, own = targets.unique(return_inverse=True)  # (K,), (N,)
    if len(classes) < 2:
        raise ValueError(f"targets must hold at least two classes, got only {classes.tolist()}.")
    means = torch.stack([hidden[own == k].mean(dim=0) for k in range(len(classes))])  # (K, D)
    to_means = torch.cdist(hidden, means, compute_mode="donot_use_mm_for_euclid_dist")  # (N, K)
    radius = to_means.gather(1, own[:, None]).squeeze(1)  # (N,)
    spread = torch.stack([radius[own == k].mean() for k in range(len(classes))])  # (K,)
    between = torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist")  # (K, K)
    overlap = torch.where(between > 0, (spread[:, None] + spread) / between, torch.inf).fill_diagonal_(-torch.inf)
    apart = between.sum() / (len(classes) * (len(classes) - 1))
    other = to_means.scatter(1, own[:, None], torch.inf).amin(dim=1)  # (N,)
    return {
        "davies_bouldin": overlap.amax(dim=1).mean().item(),
        "spread_ratio": (radius.square().mean().sqrt() / apart).item() if apart > 0 else float("inf"),
        "nearest_mean_acc": (to_means.argmin(dim=1) == own).double().mean().item(),
        # 0 / 0 where two classes share a mean and the row lies on it: no margin
        "nearest_mean_margin": ((other - radius) / (other + radius)).nan_to_num(0.0).mean().item(),
    }


def principal_plane(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Project on the first two principal components, without randomness.

    Args:
        hidden: Hidden states, (N, D) with N, D >= 2.

    Returns:
        Coordinates, float64, (N, 2), where each component's loading of largest magnitude is positive, and each
        component's fraction of the variance, (2,).
    """
    centered = hidden.double() - hidden.double().mean(dim=0)
    # R of QR has the singular values and right vectors of the whole, in at most D rows
    _, scale, axes = torch.linalg.svd(torch.linalg.qr(centered, mode="r").R, full_matrices=False)
    axes = axes[:2] * axes[:2].gather(1, axes[:2].abs().argmax(dim=1, keepdim=True)).sign()  # (2, D)
    variance = scale.square()
    return centered @ axes.T, variance[:2] / variance.sum().clamp_min(torch.finfo(torch.float64).tiny)


def draw_hidden_space(
    hidden: Tensor,
    targets: Tensor,
    subsets: Sequence[Sequence[int]] = (range(5), range(10)),
    title: str = "Hidden states by class",
    class_names: ClassNames | None = None,
    plane: tuple[Tensor, Tensor] | None = None,
) -> Figure:
    """Draw hidden states as points, one panel for each subset of classes, all on the same square frame.

    How to read it: each point is one example, each colour one class, named in the box at the class median (moved a
    little where boxes would overlap). Tight clouds far apart are what manifold mixup promises. Below a panel stand
    the numbers of :func:`class_separation` for its classes. The frame holds the central 99 % of each axis and some
    margin; points beyond are counted in the last line. Layers wider than two are drawn on their first two principal
    components, while the numbers use every dimension.

    Args:
        hidden: Hidden states, finite, (N, D) with D >= 2.
        targets: Class indices, integer, (N,).
        subsets: The classes of each panel, from left to right; one with fewer than two present gets no numbers.
        title: Heading of the figure.
        class_names: Text of each class's box, by class index; default is the index.
        plane: What :func:`principal_plane` returned for ``hidden``, if it is known already.

    Returns:
        A figure unknown to pyplot, so nothing needs closing.

    Raises:
        ValueError: If shapes do not fit, values are not finite or no class of the subsets is present.
    """
    hidden, targets = checked(hidden, targets)
    hidden = hidden.double()
    if hidden.shape[1] < 2:
        raise ValueError(f"hidden must have two columns or more to be drawn, got {hidden.shape[1]}.")
    points, axis_names = hidden, ["hidden unit 1", "hidden unit 2"]
    if hidden.shape[1] > 2:
        points, fraction = principal_plane(hidden) if plane is None else plane
        axis_names = [f"principal component {k + 1} ({100 * fraction[k]:.0f} % of variance)" for k in range(2)]
    members = [torch.isin(targets, torch.tensor(list(subset))) for subset in subsets]
    shown = torch.stack(members).any(dim=0)
    if not shown.any():
        raise ValueError(f"subsets {[list(subset) for subset in subsets]} hold none of {targets.unique().tolist()}.")
    low, high = square_frame(points[shown])
    xlim, ylim = zip(low.tolist(), high.tolist(), strict=True)
    side, gap, left, right, bottom, height = 3.5, 0.25, 0.65, 0.1, 1.1, 5.35  # inches
    figure = titled_figure(left + len(subsets) * (side + gap) - gap + right, height, title, left, above=0.1498)
    for column, (subset, member) in enumerate(zip(subsets, members, strict=True)):
        axes = add_panel(figure, left + column * (side + gap), bottom, side, side)
        axes.set(xlim=xlim, ylim=ylim, aspect="equal", xlabel=axis_names[0], ylabel=axis_names[1])
        label_outer(axes, is_left=column == 0)
        if member.any():
            draw_clouds(axes, points[member], targets[member], class_names)
        outside = int(((points < low) | (points > high)).any(dim=1)[member].sum())
        note = f"{int(member.sum()):,} points" + (f", {outside:,} outside the frame" if outside else "")
        write_titles(axes, classes_in_words(subset), note)
        write_numbers(axes, _captions(hidden[member], targets[member]), (0.7525, 0.938))
    return figure


class HiddenSpace(Diagnostic):
    """Draw the hidden states of one layer, by class, while the module is validated and tested.

    When it looks, at which rows and at what cost says :class:`Diagnostic`; how to read the picture says
    :func:`draw_hidden_space`. If only one class was seen, a warning says so and nothing is drawn. The data behind the
    picture hold ``plane``, the points (N, 2), their ``targets`` (N,) and for layers wider than two ``variance``, the
    fraction on each axis (2,).

    ============================================  ======================================================
    log key                                       what it is
    ============================================  ======================================================
    ``hidden_space/val``, ``hidden_space/test``   image
    ``val/davies_bouldin``, ``test/...``          see :func:`class_separation`; lower is tighter
    ``val/spread_ratio``, ``test/...``            lower is tighter
    ``val/nearest_mean_acc``, ``test/...``        fraction, in [0, 1]
    ``val/nearest_mean_margin``, ``test/...``     higher is further apart
    ============================================  ======================================================

    Args:
        layer: Dotted name of the submodule whose output, (N, ...), is drawn after flattening, e.g. ``"blocks.2"``.
        subsets: The classes of each panel; default is the lower half of the classes seen, and all of them.
        class_names: Text for each class, by class index; default is the index.
        **shared: These and ``every_n_epochs``, ``max_points`` and ``name`` are those of every :class:`Diagnostic`.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If a number is outside its range.
    """

    unwritten_name = "hidden_space"

    def __init__(
        self,
        layer: str,
        *,
        subsets: Sequence[Sequence[int]] | None = None,
        class_names: ClassNames | None = None,
        every_n_epochs: int | None = 5,
        max_points: int = 10_000,
        name: str = unwritten_name,
        **shared: Unpack[SharedArguments],
    ) -> None:
        super().__init__(name, [layer], every_n_epochs, max_points, **shared)
        check_class_names(class_names)
        self.layer = layer
        self.subsets = None if subsets is None else _panels(subsets)
        self.class_names = class_names

    def measure(self, trainer: Trainer, pl_module: LightningModule, rows: Rows) -> Findings | str:
        """Return the numbers of :func:`class_separation`, and the points of the picture."""
        hidden = rows.hidden[self.layer]
        classes = rows.targets.unique().tolist()
        if len(classes) < 2:
            return f"layer {self.layer!r} has only the classes {classes}"
        if hidden.shape[1] < 2:
            return f"layer {self.layer!r} has a single unit, which makes no plane"
        arrays = {"plane": hidden.double(), "targets": rows.targets}
        if hidden.shape[1] > 2:
            arrays["plane"], arrays["variance"] = principal_plane(hidden)
        numbers = class_separation(hidden, rows.targets)
        return Findings(numbers, {name: array.numpy() for name, array in arrays.items()})

    def draw(self, findings: Findings, rows: Rows) -> Figure:
        """Draw the hidden states."""
        subsets = self.subsets or half_and_all(rows.targets.unique().tolist())
        title = f"Hidden states of layer {self.layer!r}, {rows.occasion}"
        arrays = {name: torch.from_numpy(array) for name, array in findings.arrays.items()}
        plane = (arrays["plane"], arrays["variance"]) if "variance" in arrays else None
        return draw_hidden_space(rows.hidden[self.layer], rows.targets, subsets, title, self.class_names, plane)


def _panels(subsets: Any) -> list[list[int]]:
    """The classes of each panel, gone through once."""
    given = plain(subsets)
    panels = [plain(panel) for panel in given] if isinstance(given, list) else [given]
    if not all(isinstance(panel, list) and panel and all(isinstance(k, Integral) for k in panel) for panel in panels):
        way_out = "None draws half of the classes, and all."
        raise refusal("subsets", given, "a list with a list of class indices for each panel", way_out)
    return panels


def _captions(hidden: Tensor, targets: Tensor) -> dict[str, str]:
    enough = len(targets.unique()) > 1
    separation = class_separation(hidden, targets) if enough else {}
    return {label: text.format(separation[key]) if enough else "–" for key, (label, text) in CAPTIONS.items()}
