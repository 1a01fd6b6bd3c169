"""How tightly a layer gathers each class: one cloud of hidden states per class, drawn in the plane."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from matplotlib.figure import Figure
from torch import Tensor

from mm_lightning.diagnostics import figures
from mm_lightning.diagnostics.figures import ClassNames
from mm_lightning.diagnostics.tap import LayerTap

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

    Classes with equal means are not separated at all: ``davies_bouldin`` is then infinite. (torchmetrics 1.9 calls
    that 0, the best score, computes in float32, and is far off for more than 25 classes, where ``torch.cdist`` leaves
    its diagonal unequal to zero.)

    Args:
        hidden: Hidden states, finite, (N, D).
        targets: Class indices, integer, (N,); at least two different ones.

    Returns:
        The three numbers by name.

    Raises:
        ValueError: If the shapes do not fit, a value is not finite or fewer than two classes are present.
    """
    hidden, targets = _checked(hidden, targets)
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
    return {
        "davies_bouldin": overlap.amax(dim=1).mean().item(),
        "spread_ratio": (radius.square().mean().sqrt() / apart).item() if apart > 0 else float("inf"),
        "nearest_mean_acc": (to_means.argmin(dim=1) == own).double().mean().item(),
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

    Returns:
        A figure unknown to pyplot, so nothing needs closing.

    Raises:
        ValueError: If shapes do not fit, values are not finite or no class of the subsets is present.
    """
    hidden, targets = _checked(hidden, targets)
    if hidden.shape[1] < 2:
        raise ValueError(f"hidden must have two columns or more to be drawn, got {hidden.shape[1]}.")
    plane, axis_names = hidden, ["hidden unit 1", "hidden unit 2"]
    if hidden.shape[1] > 2:
        plane, fraction = principal_plane(hidden)
        axis_names = [f"principal component {k + 1} ({100 * fraction[k]:.0f} % of variance)" for k in range(2)]
    numbers = []
    for subset in subsets:
        member = torch.isin(targets, torch.tensor(list(subset)))
        enough = len(targets[member].unique()) > 1
        separation = class_separation(hidden[member], targets[member]) if enough else {}
        written = {key: text.format(separation[key]) if enough else "–" for key, (_, text) in CAPTIONS.items()}
        numbers.append({label: written[key] for key, (label, _) in CAPTIONS.items()})
    return figures.draw_clouds(plane, targets, subsets, numbers, axis_names, title, class_names)


class HiddenSpace(Callback):
    """Draw the hidden states of one layer, by class, while the module is validated and tested.

    The states are overheard while the module's own ``validation_step`` or ``test_step`` runs, so the cost is a copy of
    the layer's output (``max_points`` rows in main memory), not a further forward pass; a hook is on the layer only
    during the epochs that are drawn. A layer that runs several times per batch shows its last output.

    Drawn are the validation epochs n - 1, 2n - 1, ... for n = ``every_n_epochs``, the last one that ``max_epochs`` or
    ``max_steps`` allows (an early stop is not foreseen), every ``trainer.validate`` and every ``trainer.test``; not
    the sanity check. Each picture goes to the loggers and to ``dirpath``, overwriting the one before. With several
    processes the shares of all are gathered, and rank zero draws. Of several dataloaders the first is used. If values
    are not finite or only one class was seen, a warning says so and nothing is drawn. How to read the picture says
    :func:`draw_hidden_space`.

    ============================================  ======================================================
    log key                                       what it is
    ============================================  ======================================================
    ``hidden_space/val``, ``hidden_space/test``   image
    ``val/davies_bouldin``, ``test/...``          see :func:`class_separation`; lower is tighter
    ``val/spread_ratio``, ``test/...``            lower is tighter
    ``val/nearest_mean_acc``, ``test/...``        fraction, in [0, 1]
    ============================================  ======================================================

    Args:
        layer: Dotted name of the submodule whose output, (N, ...), is drawn after flattening, e.g. ``"blocks.2"``.
        every_n_epochs: Period of the validation pictures, in epochs.
        subsets: The classes of each panel; default is the lower half of the classes seen, and all of them.
        max_points: Only the first so many rows of an epoch are kept, on each process.
        dirpath: Folder of ``hidden_space_val.png`` and ``hidden_space_test.png``; default is ``figures`` in
            ``trainer.default_root_dir``.
        class_names: Text for each class, by class index; default is the index.
        targets: Finds the class indices, integer, (N,), in a batch; default takes the last integer tensor with one
            entry per row.
    """

    def __init__(
        self,
        layer: str,
        every_n_epochs: int = 5,
        subsets: Sequence[Sequence[int]] | None = None,
        max_points: int = 10_000,
        dirpath: str | Path | None = None,
        class_names: ClassNames | None = None,
        targets: Callable[[Any], Tensor] | None = None,
    ) -> None:
        for name, value in (("every_n_epochs", every_n_epochs), ("max_points", max_points)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}.")
        self.layer = layer
        self.every_n_epochs = every_n_epochs
        self.subsets = subsets
        self.dirpath = dirpath
        self.class_names = class_names
        self._tap = LayerTap(layer, max_points, targets)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fail now, not epochs later, where the layer is unknown."""
        self._tap.find(pl_module)  # not in setup, which may come before the module builds its layers

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook the layer where this epoch is drawn."""
        if not trainer.sanity_checking and (trainer.state.fn != TrainerFn.FITTING or self._is_due(trainer)):
            self._tap.open(pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook the layer."""
        self._tap.open(pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the hidden states of this batch beside its targets."""
        if dataloader_idx == 0:
            self._tap.keep(batch)

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the numbers and the picture."""
        self._publish(trainer, pl_module, "val", f"validation set, epoch {trainer.current_epoch}")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the numbers and the picture."""
        self._publish(trainer, pl_module, "test", "test set")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the hook off."""
        self._tap.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the hook off."""
        self._tap.close()

    def _is_due(self, trainer: Trainer) -> bool:
        epoch, period = trainer.current_epoch, trainer.check_val_every_n_epoch or 1
        is_last = trainer.max_epochs is not None and 0 < trainer.max_epochs <= epoch + period
        is_last = is_last or 0 < trainer.max_steps <= trainer.global_step
        return is_last or epoch % self.every_n_epochs == self.every_n_epochs - 1

    def _publish(self, trainer: Trainer, pl_module: LightningModule, split: str, occasion: str) -> None:
        collected = self._tap.collected(pl_module) if self._tap.is_open else None
        self._tap.close()
        if collected is None:
            return
        hidden, targets = collected
        classes = targets.unique().tolist()
        if len(classes) < 2 or not hidden.isfinite().all():
            what = f"only the classes {classes}" if len(classes) < 2 else "values that are not finite"
            rank_zero_warn(f"Layer {self.layer!r} has {what}, {occasion}: hidden space is neither drawn nor logged.")
            return
        numbers = class_separation(hidden, targets)
        pl_module.log_dict({f"{split}/{name}": value for name, value in numbers.items()}, sync_dist=True)
        if trainer.is_global_zero:
            self._draw(trainer, hidden, targets, classes, split, occasion)

    def _draw(
        self, trainer: Trainer, hidden: Tensor, targets: Tensor, classes: list[int], split: str, occasion: str
    ) -> None:
        title = f"Hidden states of layer {self.layer!r}, {occasion}"
        figure = draw_hidden_space(hidden, targets, self.subsets or _halves(classes), title, self.class_names)
        figures.log_figure(trainer, f"hidden_space/{split}", figure)
        folder = Path(trainer.default_root_dir, "figures") if self.dirpath is None else Path(self.dirpath)
        figures.save_figure(figure, folder / f"hidden_space_{split}.png")


def _checked(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    if hidden.ndim != 2 or targets.shape != hidden.shape[:1]:
        shapes = f"{tuple(hidden.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"hidden must be (N, D) and targets (N,), got {shapes}.")
    if wrong := int((~hidden.isfinite()).sum()):
        raise ValueError(f"hidden must be finite, got {wrong} of {hidden.numel()} values that are not.")
    return hidden.detach().cpu().double(), targets.detach().cpu()


def _halves(classes: Sequence[int]) -> list[Sequence[int]]:
    half = classes[: (len(classes) + 1) // 2]
    return [half, classes] if len(half) > 1 else [classes]
