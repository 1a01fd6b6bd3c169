"""What a study trains: methods, each at a few strengths."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["NONE", "Candidate", "StudyMethod", "methods_of"]

NONE = "none"  # the method that all others are held against


@dataclass(frozen=True)
class StudyMethod:
    """A way to train.

    Attributes:
        name: As in ``manifold_until80``; names folders, too.
        title: What the reader sees.
        words: Overrides that choose it.
        strength: Key of the setting that is searched; None where there is none.
        values: Of that setting, the usual one first.
        is_control: Whether it mixes nothing, so that its gain is one that mixing has to be better than.
    """

    name: str
    title: str
    words: tuple[str, ...]
    strength: str | None
    values: tuple[Any, ...]
    is_control: bool

    @property
    def candidates(self) -> list[Candidate]:
        """One for each value, the usual one first."""
        return [Candidate(self, value) for value in self.values] or [Candidate(self, None)]


@dataclass(frozen=True)
class Candidate:
    """A method at one strength."""

    method: StudyMethod
    value: Any

    @property
    def words(self) -> tuple[str, ...]:
        """Overrides that choose it."""
        own = () if self.method.strength is None else (f"{self.method.strength}={self.value}",)
        return (*self.method.words, *own)

    @property
    def name(self) -> str:
        """A folder's name."""
        return self.method.name if self.value is None else f"{self.method.name}-{self.value}"

    @property
    def title(self) -> str:
        """The method with its strength, as in ``manifold mixup (alpha 1.0)`` and ``label smoothing 0.1``."""
        if self.method.strength is None:
            return self.method.title
        name = self.method.strength.rpartition(".")[2].replace("_", " ")
        if self.method.title.endswith(name):
            return f"{self.method.title} {self.value}"
        return f"{self.method.title} ({name} {self.value})"


def methods_of(described: Mapping[str, Any], only: list[str] | None) -> list[StudyMethod]:
    """Read the methods of a study.

    Args:
        described: ``methods`` of ``conf/study.yaml``: by name ``title``, ``words``, and where they have them
            ``strength``, ``values`` and ``control``.
        only: Names of those that are wanted, None for all; ``none`` is among them in any case.

    Raises:
        ValueError: If there is no method of a name, none to compare, or a description lacks something.
    """
    if described.get(NONE) is None:
        raise ValueError("methods has no 'none', which all others are held against. Describe it.")
    if unknown := [name for name in only or () if name not in described]:
        raise ValueError(
            f"only names {', '.join(map(repr, unknown))}, which is no method of the study. There are "
            f"{', '.join(described)}; another one is described with methods.NAME={{...}}."
        )
    methods = [
        _method(str(name), about)
        for name, about in described.items()
        if about is not None and (only is None or name in (NONE, *only))
    ]
    if len(methods) < 2:
        raise ValueError(f"The study has no method beside 'none'. Name some in only=..., of {', '.join(described)}.")
    return sorted(methods, key=lambda method: method.name != NONE)


def _method(name: str, about: Any) -> StudyMethod:
    if not re.fullmatch(r"\w+", name):
        raise ValueError(f"methods names {name!r}, which must be letters, digits and underscores: it names folders.")
    if not isinstance(about, Mapping):
        raise ValueError(f"methods.{name} must be {{title: ..., words: [...]}}, got {about!r}.")
    missing = [key for key in ("title", "words") if key not in about]
    unknown = [key for key in about if key not in ("title", "words", "strength", "values", "control")]
    if missing or unknown:
        what = f"lacks {missing[0]!r}" if missing else f"has {unknown[0]!r}, which is not known"
        raise ValueError(f"methods.{name} {what}. It has title, words, and where it has one strength with values.")
    words, values = (_list(f"methods.{name}.{key}", about.get(key)) for key in ("words", "values"))
    strength = about.get("strength")
    if (strength is None) != (not values):
        raise ValueError(f"methods.{name} must have both strength and values, or none of them.")
    if len(set(map(str, values))) < len(values):
        raise ValueError(f"methods.{name}.values must differ, got {list(values)}: each names a folder. Leave one out.")
    is_control = bool(about.get("control", False))
    return StudyMethod(name, str(about["title"]), tuple(map(str, words)), strength, values, is_control)


def _list(name: str, value: Any) -> tuple[Any, ...]:
    if value is not None and not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} must be a list, got {value!r}. Write [{value}].")
    return tuple(value or ())
