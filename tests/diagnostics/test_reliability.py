import math

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from torchmetrics.functional.classification import multiclass_calibration_error

from mm_lightning.diagnostics.reliability import TOO_SURE, TOO_UNSURE, draw_reliability_diagrams
from mm_lightning.evaluation.scores import Reliability, accuracy_intervals, calibration_numbers, reliability


def _probabilities(rows: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, classes, generator=rng, dtype=torch.float64)
    targets = torch.multinomial((0.6 * logits).softmax(dim=1), 1, generator=rng)[:, 0]
    return logits.softmax(dim=1), targets


# compute


def test_five_rows_in_two_bins_by_hand():
    # confidences 0.5 | 0.6 0.7 0.9 1.0, of which the first, the third and the last are right
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.4, 0], [0.1, 0.7, 0.2], [0, 0.1, 0.9], [1, 0, 0]])
    targets = torch.tensor([0, 1, 1, 1, 0])
    bins = reliability(probabilities.double(), targets, num_bins=2)
    assert bins.edges.tolist() == [0, 0.5, 1]
    assert bins.counts.tolist() == [1, 4]
    assert bins.confidence.tolist() == pytest.approx([0.5, 0.8])
    assert bins.accuracy.tolist() == [1, 0.5]
    got = calibration_numbers(bins, probabilities.log(), targets)
    assert got == pytest.approx(
        {
            "ece": 1 / 5 * 0.5 + 4 / 5 * 0.3,
            "mce": 0.5,
            "overconfidence": (0.5 + 0.6 + 0.7 + 0.9 + 1.0) / 5 - 3 / 5,
            "nll": -math.log(0.5 * 0.4 * 0.7 * 0.1 * 1.0) / 5,
            # squares of 0.5 0.3 0.2 | 0.6 0.6 | 0.1 0.3 0.2 | 0.9 0.9 | none
            "brier": (0.38 + 0.72 + 0.14 + 1.62 + 0) / 5,
        },
        rel=1e-6,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_probability_on_an_edge_belongs_to_the_bin_that_ends_there(dtype: torch.dtype):
    for num_bins in (5, 10, 15):
        first = num_bins // 2 + 1  # the top one of two probabilities is never below 0.5
        top = torch.tensor([b / num_bins for b in range(first, num_bins + 1)], dtype=torch.float64).to(dtype)
        bins = reliability(torch.stack([top, 1 - top], dim=1), torch.zeros(len(top), dtype=torch.long), num_bins)
        assert bins.counts.tolist() == [0] * (first - 1) + [1] * (num_bins - first + 1)


def test_float32_above_an_edge_by_one_step_is_in_the_next_bin():
    for value in (0.2, 0.6):
        on = torch.tensor(value)
        above = torch.nextafter(on, torch.tensor(1.0))
        rest = torch.stack([(1 - on) / 8, (1 - above) / 8])[:, None].expand(2, 8)
        probabilities = torch.cat([torch.stack([on, above])[:, None], rest], dim=1)
        counts = reliability(probabilities, torch.tensor([0, 0]), num_bins=5).counts
        b = round(5 * value)
        assert (counts[b - 1], counts[b]) == (1, 1)


def test_probability_one_is_in_the_last_bin_and_rounding_beyond_it_too():
    top = torch.tensor([1.0, 1.0 + 2e-7])
    assert reliability(torch.stack([top, 1 - top.clamp(max=1)], dim=1), torch.tensor([0, 1])).counts.tolist()[-1] == 2


def _reference_ece(probabilities: np.ndarray, targets: np.ndarray, num_bins: int) -> tuple[float, float]:
    gaps, weights = [], []
    for b in range(num_bins):
        inside = [(max(p), p.argmax() == t) for p, t in zip(probabilities, targets, strict=True)]
        inside = [(p, right) for p, right in inside if b / num_bins < p <= (b + 1) / num_bins]
        if inside:
            confidence, right = zip(*inside, strict=True)
            gaps.append(abs(sum(confidence) / len(inside) - sum(right) / len(inside)))
            weights.append(len(inside) / len(targets))
    return sum(g * w for g, w in zip(gaps, weights, strict=True)), max(gaps)


@pytest.mark.parametrize(("classes", "num_bins"), [(2, 4), (10, 15)])
def test_errors_agree_with_a_loop_from_the_definition_and_with_torchmetrics(classes: int, num_bins: int):
    probabilities, targets = _probabilities(400, classes)
    got = calibration_numbers(reliability(probabilities, targets, num_bins), probabilities.log(), targets)
    ece, mce = _reference_ece(probabilities.numpy(), targets.numpy(), num_bins)
    assert ece > 0.05  # so that the example can tell right from wrong
    assert (got["ece"], got["mce"]) == (pytest.approx(ece, rel=1e-10), pytest.approx(mce, rel=1e-10))
    for norm, key in (("l1", "ece"), ("max", "mce")):
        want = multiclass_calibration_error(probabilities, targets, classes, n_bins=num_bins, norm=norm)
        assert got[key] == pytest.approx(want.item(), rel=1e-5)


def test_sums_are_of_every_row():
    probabilities, targets = _probabilities(333, 4)
    bins = reliability(probabilities, targets)
    assert bins.counts.sum() == 333
    full = bins.counts > 0
    assert np.isnan(bins.accuracy[~full]).all()
    assert np.isnan(bins.confidence[~full]).all()
    right = (probabilities.argmax(dim=1) == targets).sum().item()
    assert (bins.counts * bins.accuracy)[full].sum() == pytest.approx(right)
    overconfidence = calibration_numbers(bins, probabilities.log(), targets)["overconfidence"]
    assert overconfidence == pytest.approx(probabilities.amax(dim=1).mean().item() - right / 333)


@pytest.mark.parametrize(
    ("probabilities", "targets", "message"),
    [
        (torch.tensor([[0.5, 0.5]]), torch.tensor([0, 1]), r"got \(1, 2\) and \(2,\)"),
        (torch.zeros(0, 2), torch.arange(0), r"with N >= 1, got \(0, 2\)"),
        (torch.tensor([[2.0, -1.0]]), torch.tensor([0]), "got values from -1 and sums from 1 to 1. Are they logits"),
        (torch.tensor([[2.0, 1.0]]), torch.tensor([0]), "sums from 3 to 3"),
        (torch.tensor([[math.nan, 1.0]]), torch.tensor([0]), "values from nan"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([2]), r"targets must be in \[0, 2\), got 2 to 2"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([-100]), "got -100 to -100"),
    ],
    ids=["lengths", "no rows", "negative", "sum", "nan", "class too high", "ignored"],
)
def test_reliability_refuses(probabilities: torch.Tensor, targets: torch.Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        reliability(probabilities, targets)


def test_fewer_than_one_bin_is_refused():
    with pytest.raises(ValueError, match="num_bins must be an integer >= 1, got 0"):
        reliability(torch.tensor([[0.5, 0.5]]), torch.tensor([0]), 0)


# draw

BINS = Reliability(
    edges=np.array([0, 0.25, 0.5, 0.75, 1]),
    counts=np.array([0, 10, 30, 60]),
    confidence=np.array([np.nan, 0.4, 0.6, 0.9]),
    accuracy=np.array([np.nan, 0.5, 0.3, 0.9]),
)


def test_bars_are_accuracies_and_gaps_reach_the_mean_confidence():
    figure = draw_reliability_diagrams([BINS], ["Panel"])
    upper, lower = figure.axes
    accuracy, too_sure, too_unsure = upper.containers
    assert [bar.get_height() for bar in accuracy][1:] == [0.5, 0.3, 0.9]
    assert [bar.get_x() for bar in accuracy] == [0, 0.25, 0.5, 0.75]
    for bars, place, colour in ((too_sure, 2, TOO_SURE), (too_unsure, 1, TOO_UNSURE)):
        drawn = [k for k, bar in enumerate(bars) if not np.isnan(bar.get_height())]
        assert drawn == [place]
        ends = bars[place].get_y(), bars[place].get_y() + bars[place].get_height()
        assert ends == pytest.approx((BINS.accuracy[place], BINS.confidence[place]))
        assert to_hex(bars[place].get_edgecolor()) == colour
    assert too_sure[2].get_hatch() != too_unsure[1].get_hatch()
    assert [bar.get_height() for bar in lower.containers[0]] == [0, 10, 30, 60]
    assert lower.get_yscale() == "log"
    assert upper.get_xlim() == lower.get_xlim() == (0, 1)
    # (10 * 0.5 + 30 * 0.3 + 60 * 0.9) / 100 and (10 * 0.4 + 30 * 0.6 + 60 * 0.9) / 100
    assert [line.get_xdata()[0] for line in lower.get_lines()] == pytest.approx([0.68, 0.76])
    legend = [text.get_text() for text in lower.get_legend().get_texts()]
    assert legend == ["accuracy 68.0%", "mean confidence 76.0%"]
    assert (upper.get_title("left"), upper.get_title("right")) == ("Panel", "100 rows")


def test_diagrams_side_by_side_share_their_axes_and_carry_their_numbers():
    few = BINS._replace(counts=np.array([0, 1, 1, 1]))
    numbers = [{"ece": 0.1234, "overconfidence": -0.05}, {"ece": 0.5, "overconfidence": 0.05}]
    figure = draw_reliability_diagrams([BINS, few], ["left", "right"], numbers, "Heading")
    left, below_left, right, below_right = figure.axes
    assert below_left.get_ylim() == below_right.get_ylim()
    assert (left.get_ylabel(), right.get_ylabel()) == ("accuracy", "")
    assert [text.get_text() for text in below_left.texts] == ["0.123", "ECE ↓", "−0.050", "conf. − acc."]
    assert [text.get_text() for text in below_right.texts] == ["0.500", "ECE ↓", "+0.050", "conf. − acc."]
    assert figure.texts[0].get_text() == "Heading"


def test_intervals_are_the_accuracies_that_the_normal_test_does_not_refuse():
    counts, accuracy = np.array([2, 0, 7, 5000]), np.array([1.0, np.nan, 3 / 7, 0.9])
    ends = accuracy_intervals(Reliability(np.linspace(0, 1, 5), counts, accuracy, accuracy))
    for low, high, n, a in zip(*ends, counts, accuracy, strict=True):
        if n == 0:
            assert np.isnan([low, high]).all()
            continue
        assert low < high
        for p in (low, high):
            assert (a - p) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / n, abs=1e-12)
    assert ends[:, 0] == pytest.approx([2 / (2 + 1.96**2), 1])


def test_a_bar_of_two_rows_is_fainter_than_one_of_thousands():
    accuracy = np.array([1.0, 0.9])
    bins = Reliability(np.linspace(0, 1, 3), np.array([2, 5000]), np.array([0.4, 0.95]), accuracy)
    upper = draw_reliability_diagrams([bins], ["a"]).axes[0]
    few, many = upper.patches[:2]
    assert few.get_alpha() == pytest.approx(2 / (2 + 1.96**2))
    assert many.get_alpha() > 0.98
