"""The last lines of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from mm_lightning.command.ending import ending, line_of


@pytest.mark.parametrize(
    ("tested", "line"),
    [
        ({"test/loss": 0.161, "test/acc": 0.965, "test/nll": 0.161}, "acc 0.9650  loss, nll 0.1610"),
        ({"test_acc": 0.5, "test_loss": 1.25}, "acc 0.5000  loss 1.2500"),
        ({"accuracy": 0.5, "mine/score": -2.0}, "accuracy 0.5000  mine/score -2.0000"),
        (
            {"test/ece": 0.0684, "test/calibration/ece": 0.06839, "test/calibration/mce": 0.5},
            "calibration/mce 0.5000  ece 0.0684",
        ),
        ({}, ""),
    ],
    ids=["equal", "underscores", "other names", "measured twice", "nothing"],
)
def test_whatever_was_logged_in_the_test_is_shown_once(tested: dict[str, float], line: str) -> None:
    assert line_of(tested) == line


def test_pictures_and_animations_are_listed(tmp_path: Path) -> None:
    folder = tmp_path / "a run"
    (folder / "figures").mkdir(parents=True)
    (folder / "tensorboard").mkdir()
    for name in ("b.png", "a.gif", "b.npz"):
        (folder / "figures" / name).touch()
    assert ending(folder, {}, 61.4).splitlines() == [
        "Test         nothing was logged",
        f"Run folder   {folder}  (61 s)",
        f"Figure       {folder}/figures/a.gif",
        f"Figure       {folder}/figures/b.png",
        f"TensorBoard  tensorboard --logdir '{folder}'",
    ]


def test_of_an_evaluation_the_temperature_and_the_likelihood_with_it_are_told() -> None:
    tested = {
        "test/acc": 0.9,
        "test/evaluation/acc": 0.9,
        "test/evaluation/brier": 0.2,
        "test/evaluation/fgsm/acc": 0.1,
    }
    tested |= {"test/evaluation/temperature": 1.25, "test/evaluation/nll_scaled": 0.5}
    assert line_of(tested) == "acc 0.9000  evaluation/nll_scaled 0.5000  evaluation/temperature 1.2500"
    assert line_of({"test/evaluation/acc": 0.9}) == "evaluation/acc 0.9000"
