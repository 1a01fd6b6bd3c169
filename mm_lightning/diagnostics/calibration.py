"""Whether a classifier is as often right as it claims, while it is validated and tested."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from matplotlib.figure import Figure

from mm_lightning.arguments import check_count, check_flag
from mm_lightning.diagnostics.diagnostic import Diagnostic, Findings, Rows, SharedArguments
from mm_lightning.diagnostics.reliability import draw_reliability_diagrams
from mm_lightning.evaluation.scores import Reliability, calibration_numbers, reliability
from mm_lightning.namespaces import LightningModule, Trainer

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Calibration(Diagnostic):
    """Draw a reliability diagram, and measure the calibration errors, while the module is validated and tested.

    When it looks, at which rows and at what cost says :class:`Diagnostic`. How to read the picture says
    :func:`draw_reliability_diagrams`, and what the numbers are :func:`calibration_numbers`. The data behind the picture
    hold ``edges``, ``counts``, ``confidence`` and ``accuracy`` of the bins; see :class:`Reliability`.

    =================================================  ===========================================================
    log key                                            what it is
    =================================================  ===========================================================
    ``calibration/val``, ``calibration/test``          image
    ``val/calibration/ece``, ``test/...``              expected calibration error, in [0, 1]; lower is better
    ``val/calibration/mce``, ``test/...``              maximum calibration error, in [0, 1]; lower is better
    ``val/calibration/overconfidence``, ``test/...``   mean confidence - accuracy, in [-1, 1]; 0 is best
    ``val/calibration/nll``, ``test/...``              negative log likelihood, in nats; lower is better
    ``val/calibration/brier``, ``test/...``            Brier score over all classes, in [0, 2]; lower is better
    =================================================  ===========================================================

    ``MixableModule`` logs ``val/ece`` itself, from 15 bins and all rows: the same number up to float32, if no more than
    ``max_points`` rows were seen and no probability lies on an edge.

    Args:
        layer: Where the logits are, (N, K), or (N,) or (N, 1) for the logit of class 1 of two: the dotted name of a
            submodule, or ``"output"`` for the module's own ``forward``.
        num_bins: Bins of equal width between 0 and 1.
        probabilities: Whether the layer gives probabilities, not logits.
        **shared: These and ``every_n_epochs``, ``max_points`` and ``name`` are those of every :class:`Diagnostic`.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If a number is outside its range.
    """

    def __init__(
        self,
        layer: str = "output",
        *,
        num_bins: int = 15,
        probabilities: bool = False,
        every_n_epochs: int | None = 5,
        max_points: int = 100_000,
        name: str = "calibration",
        **shared: Unpack[SharedArguments],
    ) -> None:
        super().__init__(name, [layer], every_n_epochs, max_points, **shared)
        check_count("num_bins", num_bins, 1, "15 is usual.")
        check_flag("probabilities", probabilities, "False takes the layer's output for logits.")
        self.layer = layer
        self.num_bins = num_bins
        self.probabilities = probabilities

    def measure(self, trainer: Trainer, pl_module: LightningModule, rows: Rows) -> Findings:
        """Return the numbers of :func:`calibration_numbers`, and the bins."""
        output, targets = rows.hidden[self.layer], rows.targets.long()
        if self.probabilities:
            both = torch.cat([1 - output, output], dim=1) if output.shape[1] == 1 else output
            bins, log_probabilities = reliability(both, targets, self.num_bins), both.double().log()
        else:
            # two classes by one logit z: softmax of (0, z) is (1 - sigmoid(z), sigmoid(z))
            both = torch.cat([torch.zeros_like(output), output], dim=1) if output.shape[1] == 1 else output
            log_probabilities = both.double().log_softmax(dim=1)
            bins = reliability(both.double().softmax(dim=1), targets, self.num_bins)
        return Findings(calibration_numbers(bins, log_probabilities, targets), bins._asdict())

    def draw(self, findings: Findings, rows: Rows) -> Figure:
        """Draw the reliability diagram."""
        bins, title = Reliability(**findings.arrays), rows.occasion.capitalize()
        return draw_reliability_diagrams([bins], [title], [findings.numbers])
