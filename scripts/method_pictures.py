"""The pictures of the method cards: what a way does to two images or feature maps, to a batch, or as time goes on.

Which picture a way gets is told by what it sets. What is drawn is computed by the package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from mm_lightning.data.mnist import load_mnist
from mm_lightning.diagnostics.drawing import (
    GREY,
    HAIRLINE,
    INK,
    add_legend,
    add_panel,
    class_colour,
    pixels,
    titled_figure,
    write_titles,
)
from mm_lightning.files import whole_file
from mm_lightning.mixup import (
    BetaRatio,
    FixedRatio,
    LabelDistance,
    PlanSource,
    Progress,
    RandomPermutation,
    interpolate,
)
from mm_lightning.mixup.seen import HIDDEN, call_with, seen_by

__all__ = ["draw"]

DPI = 150
COLOURS = 128  # of a PNG
OWN, PARTNER = class_colour(0), class_colour(3)
LAM = 0.6  # of the row itself, in pictures of one lam
EPOCHS = 100


def draw(config: Mapping[str, Any], settings: Mapping[str, Any], title: str, path: Path) -> None:
    """Draw a way and write the picture.

    Args:
        config: All settings of the callback.
        settings: Those that are not manifold mixup's.
        title: Heading.
        path: Of the PNG.
    """
    made = {key: instantiate(value) for key, value in config.items() if isinstance(value, dict)}
    if "schedule" in made:
        figure = _curve(made["schedule"], title)
    elif "pairing" in made:
        figure = _pairs(made["pairing"], title)
    elif "ratio" in made and "interpolation" not in made:
        figure = _histogram(made["ratio"], title)
    elif settings.get("clean_weight"):
        figure = _beside(float(settings["clean_weight"]), title)
    elif config["layers"] == "input" or _is_of_tokens(made.get("interpolation")):
        figure = _images(made.get("interpolation"), title)
    else:
        ratio = made.get("ratio", FixedRatio(LAM))
        figure = _maps(made.get("interpolation"), ratio, title)
    figure.set_dpi(DPI)
    image = Image.fromarray(pixels(figure)).quantize(COLOURS, dither=Image.Dither.NONE)
    with whole_file(path) as file:
        image.save(file, format="PNG", optimize=True)


# --- two images


def _images(interpolation: Any, title: str) -> Figure:
    """Two digits, and the first mixed with the second at three ratios. A sequence is made of an image's rows."""
    rows, shape = _digits(), (28, 28)
    tokens = _is_of_tokens(interpolation)
    rows = rows[:, 0] if tokens else rows
    note = "28 tokens, the rows of an image: blue of the row itself, red of its partner" if tokens else ""
    figure = _figure(5, 1, title, note or "blue: of the row itself, red: of its partner")
    nothing = torch.zeros(shape)
    _show(figure, 0, 0, (rows[0].reshape(shape), nothing, nothing), "row itself")
    _show(figure, 1, 0, (nothing, rows[1].reshape(shape), nothing), "partner")
    for place, lam in enumerate((0.75, 0.5, 0.25), 2):
        parts, weight = _parts(rows, interpolation, FixedRatio(lam))
        name = f"lam = {lam}" + ("" if interpolation is None else f"\nin the loss {weight:.2f}")
        _show(figure, place, 0, tuple(part.reshape(shape) for part in parts), name)
    return figure


def _beside(clean_weight: float, title: str) -> Figure:
    rows, nothing = _digits(), torch.zeros(28, 28)
    figure = _figure(3, 1, title, "two forward passes, of the rows and of the mixed rows")
    _show(figure, 0, 0, (rows[0, 0], nothing, nothing), f"row itself\nits loss × {clean_weight:g}")
    _show(figure, 1, 0, (nothing, rows[1, 0], nothing), "partner")
    parts, _ = _parts(rows, None, FixedRatio(0.5))
    _show(figure, 2, 0, tuple(part[0] for part in parts), "lam = 0.5\nmixed loss × 1")
    return figure


def _maps(interpolation: Any, ratio: Any, title: str) -> Figure:
    """Six feature maps of two digits, and of the first mixed with the second."""
    rows = _feature_maps(_digits())
    channels = rows.shape[1]
    note = "blue: of the row itself, red: of its partner" + (", grey: noise" if "Noisy" in str(interpolation) else "")
    figure = _figure(channels, 3, title, f"six feature maps; {note}", left=1.05)
    nothing = torch.zeros(rows.shape[1:])
    parts, weight = _parts(rows, interpolation, ratio)
    lam = float(ratio(np.random.default_rng(0), 2)[0])
    mixed = f"mixed\nlam = {lam:g}" + ("" if abs(weight - lam) < 1e-6 else f"\nin the loss {weight:.2f}")
    shown = [(rows[0], nothing, nothing), (nothing, rows[1], nothing), parts]
    for line, (images, name) in enumerate(zip(shown, ("row itself", "partner", mixed), strict=True)):
        for channel in range(channels):
            _show(figure, channel, line, tuple(part[channel] for part in images), "", left=1.05)
        y = 1 - (_ABOVE + line * (_SIDE + _GAP) + _SIDE / 2) / figure.get_figheight()
        figure.text(0.12 / figure.get_figwidth(), y, name, va="center", fontsize=8.5, color=INK)
    return figure


_SIDE, _GAP, _ABOVE = 1.05, 0.1, 0.62  # inches: of a small panel, between two, above the first
_PAPER = 0.12  # ink where an image is empty, so that it is seen whose part that is
_SEED = 0  # of the plan that is drawn


def _figure(columns: int, lines: int, title: str, note: str, left: float = 0.12) -> Figure:
    below = 0.5 if lines == 1 else 0.12
    width = max(left + columns * (_SIDE + _GAP) + 0.02, 3.9)
    return _noted(width, _ABOVE + lines * (_SIDE + _GAP) - _GAP + below, title, note)


def _noted(width: float, height: float, title: str, note: str) -> Figure:
    figure = titled_figure(width, height, title, 0.12)
    figure.text(0.12 / width, 1 - 0.38 / height, note, va="top", fontsize=8.5, color=GREY)
    return figure


def _show(figure: Figure, column: int, line: int, parts: Sequence[Tensor], name: str, left: float = 0.12) -> None:
    bottom = figure.get_figheight() - _ABOVE - line * (_SIDE + _GAP) - _SIDE
    axes = add_panel(figure, left + column * (_SIDE + _GAP), bottom, _SIDE, _SIDE)
    axes.imshow(_coloured(*parts), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.text(0.5, -0.06, name, transform=axes.transAxes, ha="center", va="top", fontsize=8.5, color=INK)


def _coloured(own: Tensor, partner: Tensor, noise: Tensor) -> np.ndarray:
    """Each part as ink of its colour on white, (H, W) -> (H, W, 3)."""
    picture = torch.ones(*own.shape, 3)
    for part, colour in ((own, OWN), (partner, PARTNER), (noise, INK)):
        absorbed = 1 - torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        picture -= part[..., None] * absorbed
    return picture.clamp(0, 1).numpy()


def _parts(rows: Tensor, interpolation: Any, ratio: Any) -> tuple[tuple[Tensor, Tensor, Tensor], float]:
    """What is the row's, the partner's and nobody's in the first mixed row, and the weight of the row in the loss.

    Any interpolation adds what it makes of the one to what it makes of the other, and to what it adds to nothing.
    """
    source = PlanSource(["input"], ratio=ratio, pairing=_other, interpolation=interpolation, seed=_SEED)
    plan = source.draw(2, batch=None)

    def mixed(own: Tensor, partner: Tensor) -> Tensor:
        return interpolate(torch.stack((own, partner)), plan)[0][0]

    nothing = torch.zeros_like(rows[0])
    noise = mixed(nothing, nothing)
    own, partner = mixed(rows[0], nothing) - noise, mixed(nothing, rows[1]) - noise
    return (own, partner, noise), float(interpolate(rows, plan)[1].lam[0])


def _other(rng: np.random.Generator, batch_size: int) -> np.ndarray:
    return np.arange(batch_size)[::-1]


def _is_of_tokens(interpolation: Any) -> bool:
    problem_with = getattr(interpolation, "problem_with", lambda shape: "")
    return bool(problem_with((2, 6, 28, 28)))


def _digits() -> Tensor:
    """A three and a seven of MNIST on tinted paper, (2, 1, 28, 28), in [0, 1]."""
    data = load_mnist()
    places = [int((data.train_labels == digit).nonzero()[number]) for digit, number in ((3, 0), (7, 4))]
    return _PAPER + (1 - _PAPER) * data.train_images[places].unsqueeze(1).float() / 255


def _feature_maps(images: Tensor) -> Tensor:
    """Blurred, and the edges of five directions, as a first layer finds them, (N, 6, 28, 28), in [0, 1]."""
    up = torch.tensor([[-1.0, -2, -1], [0, 0, 0], [1, 2, 1]])
    slope = torch.tensor([[-2.0, -1, 0], [-1, 0, 1], [0, 1, 2]])
    filters = torch.stack((torch.ones(3, 3), up, up.T, -up, -up.T, slope))[:, None]
    maps = F.conv2d(images - _PAPER, filters, padding=1).relu()
    return _PAPER + (1 - _PAPER) * maps / maps.amax(dim=(0, 2, 3), keepdim=True)


# --- a batch


def _pairs(pairing: Any, title: str) -> Figure:
    """A batch of 24 rows, each joined with its partner: at random, and by the pairing."""
    points, classes = _batch()
    by_label = isinstance(pairing, LabelDistance)
    is_sure = "logits" in seen_by(pairing)
    scores = -torch.cdist(points, torch.stack([points[classes == k].mean(dim=0) for k in range(3)])).square() / 3
    targets = points[:, 1] * 2 if by_label else classes
    seen = {"hidden": points, "targets": targets, "logits": scores, "batch": None}
    sizes = 6 + 110 * scores.softmax(dim=1).amax(dim=1).sub(1 / 3).square().numpy() * 2 if is_sure else 28
    note = "arrows lead from each row to its partner; a ring is a row that is its own"
    figure = _noted(6.4, 3.75, title, note + ("; large dots: sure" if is_sure else ""))
    colours = [OWN if by_label else class_colour(int(k)) for k in classes]
    for place, (way, name) in enumerate(((RandomPermutation(), "at random"), (pairing, _name(pairing)))):
        partner = torch.as_tensor(call_with(way, (np.random.default_rng(1), len(points)), seen)).numpy()
        axes = add_panel(figure, 0.4 + place * 3.0, 0.35, 2.85, 2.6)
        _join(axes, points.numpy(), partner, colours)
        axes.scatter(*points.T.numpy(), s=sizes, c=colours, zorder=3)
        axes.set(xticks=[], yticks=[], xlim=(-2.7, 2.7), ylim=(-2.4, 2.6))
        axes.set_xlabel("a feature" if by_label else "hidden states, coloured by class", size=8.5, color=GREY)
        axes.set_ylabel(("label" if by_label else "") if place == 0 else "", size=8.5, color=GREY)
        write_titles(axes, name)
    return figure


def _join(axes: Axes, points: np.ndarray, partner: np.ndarray, colours: list[str]) -> None:
    for row, other in enumerate(partner):
        if row == other:
            axes.scatter(*points[row], s=110, facecolors="none", edgecolors=colours[row], linewidths=1.0)
            continue
        style = {"arrowstyle": "-|>", "color": colours[row], "lw": 0.8, "alpha": 0.75, "shrinkA": 3, "shrinkB": 3.5}
        style |= {"mutation_scale": 7, "connectionstyle": "arc3,rad=0.12"}
        axes.annotate("", points[other], points[row], arrowprops=style)


def _batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    centres = torch.tensor([[-1.3, -0.9], [1.3, -0.8], [0.0, 1.2]])
    classes = torch.arange(24) % 3
    return centres[classes] + 0.55 * torch.randn(24, 2, generator=generator), classes


# --- lam


def _histogram(ratio: Any, title: str) -> Figure:
    """How often each lam is drawn."""
    rng = np.random.default_rng(0)
    figure = titled_figure(6.4, 2.9, title, 0.12)
    axes = add_panel(figure, 0.55, 0.5, 3.6, 1.9)
    bins = np.linspace(0, 1, 41)
    if HIDDEN in seen_by(ratio):
        hidden = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0))
        partner = torch.from_numpy(rng.permutation(4096))
        lam = np.stack([ratio(rng, 4096, hidden, partner) for _ in range(8)])
        distance = (hidden - hidden[partner]).square().sum(dim=1).numpy()
        near, far = np.quantile(distance, (1 / 3, 2 / 3))
        parts = {"nearest third of pairs": lam[:, distance < near], "farthest third": lam[:, distance > far]}
    else:
        parts = {_name(ratio): np.stack([ratio(rng, 1) for _ in range(40_000)])}
    for (name, drawn), colour in zip(parts.items(), (OWN, PARTNER), strict=False):
        axes.hist(drawn.ravel(), bins, density=True, histtype="stepfilled", color=colour, alpha=0.5, label=name)
    plain = BetaRatio(per_sample=True)(rng, 400_000)
    axes.hist(plain, bins, density=True, histtype="step", color=INK, label="manifold mixup: Beta(2, 2)")
    axes.set(xlabel="lam, the weight of the row itself", ylabel="density", xlim=(0, 1))
    if axes.get_ylim()[1] > 6:
        axes.set_ylim(0, 6)
        write_titles(axes, "", "bars are cut off at 6")
    add_legend(figure, axes, 4.3, 0.5)
    return figure


# --- time


def _curve(schedule: Any, title: str) -> Figure:
    """The factor of the probability as training goes on."""
    figure = titled_figure(6.4, 2.3, title, 0.12)
    axes = add_panel(figure, 0.55, 0.5, 5.65, 1.3)
    shares = np.linspace(0, 1, 20 * EPOCHS, endpoint=False)
    factors = [schedule(Progress(share, int(share * EPOCHS + 1e-9))) for share in shares]
    axes.fill_between(shares, factors, step="post", color=OWN, alpha=0.25, linewidth=0)
    axes.step(shares, factors, where="post", color=OWN, linewidth=1.0)
    axes.set(xlabel="share of training", ylabel="factor", xlim=(0, 1), ylim=(0, 1.08), yticks=[0, 0.5, 1])
    axes.grid(axis="y", color=HAIRLINE, linewidth=0.6)
    axes.set_axisbelow(True)
    write_titles(axes, "", f"factor of the probability, {EPOCHS} epochs")
    return figure


def _name(way: Any) -> str:
    return type(way).__name__
