"""Which of the layers that are safe to mix at: the input and the ends of the early stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mm_lightning.look.look import Place

__all__ = ["choose_places"]

# Shares of a network's weighted layers. Mixing gains nothing without an early layer and nothing from late ones alone
# (Verma et al., 2019, table 5): on PreActResNet18 the stages end at 0.24, 0.48, 0.71 and 0.95, and the best set is the
# input and the first two. A stem, at less than a tenth, is nearly the input.
_NEAREST, _FARTHEST = 0.1, 0.6
_WANTED = (0.2, 0.4, 0.6)


def choose_places(places: Sequence[Place], is_safe: Callable[[Place], bool]) -> list[Place]:
    """Choose at most three ends of early stages.

    A stage is a module at the outermost level of nesting at which modules end early enough; of several that end at the
    same depth the last one counts, after the activation say.

    Args:
        places: The places of all modules, in the order of ``named_modules``.
        is_safe: Proves a place, which costs a forward pass; asked of those only that would be chosen.

    Returns:
        The chosen ones in the order of the computation; none if no module in the first part of the network is safe.
    """
    unsafe: set[Place] = set()
    for nearest in (_NEAREST, 0.0):
        level = _children(places, "")
        while level:
            early = [p for p in level if nearest < p.depth <= _FARTHEST and not p.problem and not p.way_around]
            while chosen := _spread([place for place in early if place not in unsafe]):
                refused = {place for place in chosen if not is_safe(place)}
                if not refused:
                    return chosen
                unsafe |= refused
            level = [child for place in level for child in _children(places, place.name)]
    return []


def _children(places: Sequence[Place], parent: str) -> list[Place]:
    """The modules right below ``parent``; for one that does not run itself, such as a list, those below it."""
    prefix = f"{parent}." if parent else ""
    children = []
    for place in places:
        if place.name.startswith(prefix) and "." not in place.name[len(prefix) :]:
            children.extend([place] if place.shape is not None else _children(places, place.name))
    return children


def _spread(early: Sequence[Place]) -> list[Place]:
    ends = {place.depth: place for place in sorted(early, key=lambda place: place.order)}
    if len(ends) <= len(_WANTED):
        return list(ends.values())
    chosen = {min(ends, key=lambda depth: abs(depth - wanted)) for wanted in _WANTED}
    return [place for depth, place in ends.items() if depth in chosen]
