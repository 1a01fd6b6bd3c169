"""What a closer look at a classifier is made of: what is asked for, what that means, and what of it fits the inputs."""

from __future__ import annotations

from typing import Any

from mm_lightning.arguments import is_flag, plain, refusal
from mm_lightning.evaluation.attacks import FGSM, PGD
from mm_lightning.evaluation.deformations import paper_deformations
from mm_lightning.evaluation.neighbours import Neighbours
from mm_lightning.evaluation.shifts import Noise, shifts_of_five_strengths

__all__ = ["GROUPS", "chosen", "fitting"]

GROUPS = ("attacks", "deformations", "shifts")  # of changed inputs
_ATTACKS = (FGSM(2 / 255), FGSM(8 / 255), PGD(8 / 255))


def chosen(name: str, value: Any) -> Any:
    """Return an argument that chooses a group: True or False, or the list of what is chosen.

    Raises:
        TypeError: If it is none of that.
        ValueError: If two have the same name.
    """
    if is_flag(value):
        if name == "neighbours":
            return Neighbours() if value else False
        return bool(value)
    if name == "neighbours":
        if isinstance(value, Neighbours):
            return value
        raise refusal(name, value, "True, False or Neighbours(...)", "True takes the five nearest.")
    several = [value] if name == "spectra" and isinstance(value, str) else plain(value)
    if not isinstance(several, list):
        raise refusal(name, value, "True, False or a list", "True takes the usual ones.")
    names: list[Any] = several if name == "spectra" else [getattr(one, "name", None) for one in several]
    if not all(isinstance(one, str) for one in names) or (name != "spectra" and not all(map(callable, several))):
        way_out = "Layers are texts." if name == "spectra" else "See mm_lightning.evaluation."
        raise refusal(name, value, "a list of layers" if name == "spectra" else f"a list of {name}", way_out)
    if twice := sorted({one for one in names if names.count(one) > 1}):
        raise ValueError(f"{name} must be different from each other, got {', '.join(twice)} twice. Leave one out.")
    return several


def fitting(group: str, asked: Any, are_images: bool) -> tuple[list[Any], str]:
    """Return what of a group of changed inputs is possible, and the name of what is not; empty if all of it is.

    Args:
        group: One of ``GROUPS``.
        asked: What :func:`chosen` has returned for it.
        are_images: Whether inputs are (N, C, H, W).
    """
    if group == "attacks":
        return list(_ATTACKS) if asked is True else list(asked), ""
    usual = paper_deformations if group == "deformations" else lambda: shifts_of_five_strengths(are_images)
    wanted = usual() if asked is True else list(asked)
    possible = wanted if are_images else [one for one in wanted if isinstance(one, Noise)]
    return possible, "" if len(possible) == len(wanted) else "blur and contrast" if possible else group
