"""The rows of a batch, whatever it is made of: tensors, arrays, lists, dicts, dataclasses and other objects."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mm_lightning.arguments import check_integer, refusal

__all__ = [
    "Layout",
    "Path",
    "check_batch_size",
    "check_leaf_name",
    "fresh",
    "guess_layout",
    "layouts",
    "leaf_named",
    "leaves_of",
    "map_leaves",
    "signature_of",
    "tensors_of",
]

Path = tuple[Any, ...]
"""Keys, positions and names that lead to a part of a batch."""

_DEEPEST = 8  # levels of nesting that are looked into
_NO_BATCH = (str, bytes, type, nn.Module, torch.Generator, torch.device, torch.dtype, np.generic)


@dataclass(frozen=True)
class Layout:
    """Where the rows of a batch are.

    Attributes:
        source: Path of the leaf whose length is the number of rows, and the dimension. None if ``size`` is given.
        size: Number of rows, where the user has said it.
        prefers_second: Whether rows stand in dimension 1 of tensors in which both of the first two could hold them.
    """

    source: tuple[Path, int] | None
    size: int | None = None
    prefers_second: bool = False

    def rows_of(self, batch: Any) -> int:
        """The number of rows, N.

        Raises:
            TypeError: If the batch has no leaf where those had it that were seen before.
        """
        if self.size is not None or self.source is None:
            return self.size or 0
        path, dim = self.source
        length = _length(leaf_at(batch, path), dim)
        if length is None:
            raise TypeError(
                f"Manifold mixup tells the number of rows by what the batch has at {_shown(path)}, and this batch has "
                "nothing of a length there. Give batches one form, or say it: ManifoldMixupCallback(batch_size=...)."
            )
        return length

    def dim_of(self, leaf: Any, rows: int) -> int | None:
        """Which dimension of a leaf holds the rows; None if it has none for each of them."""
        dims = (1, 0) if self.prefers_second else (0, 1)
        return next((dim for dim in dims if _length(leaf, dim) == rows), None)

    def permuted(self, batch: Any, order: Tensor, skip: Callable[[Any], bool] = lambda leaf: False) -> Any:
        """A batch with the rows of ``batch`` in another order. ``batch`` itself is not changed.

        Args:
            batch: The batch.
            order: Which row comes to each place, int64 (N,).
            skip: Whether a tensor, an array or a list stays as it is.
        """
        places = order.tolist()

        def exchange(leaf: Any) -> Any:
            dim = self.dim_of(leaf, len(places))
            if dim is None or skip(leaf):
                return leaf
            if isinstance(leaf, Tensor):
                return leaf.index_select(dim, order.to(leaf.device))
            if isinstance(leaf, np.ndarray):
                return leaf.take(places, axis=dim)
            return type(leaf)([leaf[place] for place in places])

        return map_leaves(exchange, batch, len(places))


def tensors_of(batch: Any) -> list[Tensor]:
    """The tensors of a batch."""
    if type(batch) in (list, tuple) and all(isinstance(part, Tensor) for part in batch):
        return list(batch)
    return [leaf for _, leaf in leaves_of(batch) if isinstance(leaf, Tensor)]


def map_leaves(function: Callable[[Any], Any], batch: Any, rows: int | None = None) -> Any:
    """Rebuild a batch with a function applied to its tensors, arrays and lists of rows. What stays alike is not copied.

    Args:
        function: Of a leaf. The same leaf is asked for once and stays one.
        batch: Not changed.
        rows: Lists of this length are leaves, unless they are made of tensors of that length; None looks into all.
    """
    done: dict[int, Any] = {}

    def walk(value: Any, depth: int) -> Any:
        if id(value) not in done:
            done[id(value)] = value  # of what contains itself
            done[id(value)] = step(value, depth)
        return done[id(value)]

    def step(value: Any, depth: int) -> Any:
        is_structure = depth == 0 and (isinstance(value, tuple) or _starts_with_tensor(value))
        if isinstance(value, (Tensor, np.ndarray)) or (
            rows is not None and not is_structure and _is_list_of_rows(value, rows)
        ):
            return function(value)
        if value is None or isinstance(value, (int, float, complex, *_NO_BATCH)) or depth > _DEEPEST:
            return value
        if isinstance(value, Mapping):
            items = {key: walk(item, depth + 1) for key, item in value.items()}
            return value if all(items[key] is value[key] for key in items) else _with_items(value, items)
        if isinstance(value, (list, tuple)):
            parts = [walk(item, depth + 1) for item in value]
            if all(new is old for new, old in zip(parts, value, strict=True)):
                return value
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        fields = _attributes(value)
        changed = {name: new for name, old in fields.items() if (new := walk(old, depth + 1)) is not old}
        if not changed:
            return value
        twin = copy.copy(value)
        for name, new in changed.items():
            object.__setattr__(twin, name, new)  # past the checks of frozen and validated ones
        return twin

    return walk(batch, 0)


def fresh(batch: Any) -> Any:
    """A batch in new dicts and lists, with the same tensors."""
    if isinstance(batch, dict):
        return _with_items(batch, {key: fresh(item) for key, item in batch.items()})
    if type(batch) in (list, tuple):
        return type(batch)(fresh(item) for item in batch)
    return batch


def leaves_of(batch: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every tensor, array, list and tuple of a batch with its path; of a list's items those that are of use."""
    if isinstance(batch, (Tensor, np.ndarray)):
        yield path, batch
    elif isinstance(batch, Mapping):
        for key, item in batch.items():
            yield from _inside(item, (*path, key))
    elif isinstance(batch, (list, tuple)):
        yield path, batch
        for number, item in enumerate(batch):
            yield from _inside(item, (*path, number))
    elif batch is not None and not isinstance(batch, (int, float, complex, *_NO_BATCH)):
        for name, item in _attributes(batch).items():
            yield from _inside(item, (*path, name))


def leaf_at(batch: Any, path: Path) -> Any:
    """What a batch has at a path; None if there is nothing."""
    for key in path:
        batch = _at(batch, key)
    return batch


def check_leaf_name(argument: str, name: Any, way_out: str) -> None:
    """Raise TypeError unless ``name`` may name a part of a batch: a string, or an integer for a position."""
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        raise refusal(argument, name, "the name of a part of the batch", way_out)


def leaf_named(batch: Any, name: str | int, argument: str) -> Any:
    """What a batch has at a dotted name, such as ``"labels"``, ``"1"`` or ``"meta.labels"``.

    Args:
        batch: The batch.
        name: Keys, positions and attributes with dots between them; or one position.
        argument: What the user has given the name as.

    Raises:
        ValueError: If there is nothing.
    """
    value = batch
    for key in str(name).split("."):
        # A named tuple's items are known by positions elsewhere; people know them by name.
        found = getattr(value, key, None) if key in getattr(value, "_fields", ()) else _at(value, key)
        value = _at(value, int(key)) if found is None and key.isdecimal() else found
    if value is None:
        known = ", ".join(dict.fromkeys(repr(".".join(map(str, path))) for path, _ in leaves_of(batch) if path))
        raise ValueError(f"{argument} must name a part of the batch, got {name!r}. It has {known or 'none'}.")
    return value


def check_batch_size(batch_size: Any) -> None:
    """Raise TypeError unless ``batch_size`` is an integer, and ValueError unless it is positive."""
    check_integer("batch_size", batch_size, "an integer >= 1", lambda size: size >= 1, "Give the number of rows.")


def guess_layout(batch: Any, size: int | None = None) -> Layout:
    """The most plausible layout, from lengths alone.

    Raises:
        TypeError: If the batch has no tensor of one dimension or more.
    """
    found = layouts(batch, size)
    if not found:
        raise TypeError(f"Manifold mixup needs tensors in the batch, got {type(batch).__name__} without any.")
    return found[0]


def layouts(batch: Any, size: int | None = None) -> list[Layout]:
    """What the layout may be, the most plausible first: the length that most parts of the batch share.

    A list of tensors counts once with its own length and once with each of theirs, so that boxes of many images do not
    outvote the images.
    """
    if not any(tensor.dim() for tensor in tensors_of(batch)):
        return []
    if size is not None:
        return [Layout(None, size), Layout(None, size, prefers_second=True)]
    votes: Counter[int] = Counter()
    sources: dict[int, tuple[Path, int]] = {}
    seconds: dict[int, tuple[Path, int]] = {}
    counted: set[Any] = set()
    for path, leaf in leaves_of(batch):
        length, is_list = _length(leaf, 0), isinstance(leaf, (list, tuple))
        if length is None or (is_list and not _may_hold_rows(leaf, path)):
            continue
        place, is_inside = _place_of(path, batch)
        if (place, length) not in counted:
            counted.add((place, length))
            votes[length] += 1 if is_inside else 2 if is_list else 4
        if length not in sources or (not is_inside and not is_list):
            sources[length] = sources[length] if length in sources and not is_list else (path, 0)
        if not is_list and not is_inside and (second := _length(leaf, 1)) is not None:
            seconds.setdefault(second, (path, 1))
    ranked = [Layout(sources[length]) for length, _ in votes.most_common() if votes[length]]
    return ranked[:3] + [Layout(source, prefers_second=True) for source in list(seconds.values())[:2]]


def signature_of(batch: Any) -> tuple[Any, ...]:
    """What batches have in common that are used alike: their tensors' types and numbers of dimensions.

    Names, values and lengths do not count, nor how many tensors a list of them holds.
    """
    if type(batch) in (list, tuple) and all(type(part) is Tensor for part in batch):
        return (type(batch), *[(part.dtype, part.dim()) for part in batch])  # what most batches are, at less cost
    found: dict[Any, None] = {}
    for path, leaf in leaves_of(batch):
        if isinstance(leaf, Tensor):
            inside_list = path and isinstance(path[-1], int) and len(path) > 1
            found[(path[:-1] if inside_list else path, leaf.dtype, leaf.dim())] = None
    return (type(batch), *found)


def _may_hold_rows(items: Any, path: Path) -> bool:
    """Whether a list or a tuple may have an item for each row. Named and outermost tuples are structure."""
    if not items or hasattr(items, "_fields") or (not path and isinstance(items, tuple)):
        return False
    return not _is_structure(items) and (path != () or not _starts_with_tensor(items))


def _starts_with_tensor(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Tensor)


def _is_structure(items: Any) -> bool:
    """Whether the tensors in a list have one length, and no less than the list: a part of each row, not a row each."""
    lengths = {_length(leaf, 0) for item in items for _, leaf in leaves_of(item) if isinstance(leaf, Tensor)}
    length = lengths.pop() if len(lengths) == 1 else None
    return length is not None and length >= len(items)


def _place_of(path: Path, batch: Any) -> tuple[Path, bool]:
    """A path with numbers in lists of unlike things left out, and whether it leads through such a list."""
    place: list[Any] = []
    is_inside, value = False, batch
    for depth, key in enumerate(path):
        is_list = (
            isinstance(value, (list, tuple)) and not hasattr(value, "_fields") and (depth > 0 or type(value) is list)
        )
        is_inside |= is_list and not _is_structure(value)
        place.append("*" if is_list else key)
        value = _at(value, key)
    return tuple(place), is_inside


def _at(value: Any, key: Any) -> Any:
    """What a batch has at a key, a position or a name; None if there is nothing."""
    if isinstance(value, Mapping):
        return value.get(key)
    if isinstance(value, (list, tuple)):
        return value[key] if isinstance(key, int) and key < len(value) else None
    return getattr(value, key, None) if isinstance(key, str) else None


def _inside(item: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    return leaves_of(item, path) if len(path) <= _DEEPEST else iter(())


def _length(leaf: Any, dim: int) -> int | None:
    if isinstance(leaf, (Tensor, np.ndarray)):
        if isinstance(leaf, Tensor) and leaf.is_nested:
            return None
        return int(leaf.shape[dim]) if leaf.ndim > dim else None
    return len(leaf) if dim == 0 and isinstance(leaf, (list, tuple)) else None


def _is_list_of_rows(value: Any, rows: int) -> bool:
    """Whether a list has an item for each row, rather than being a part of the batch's structure."""
    if type(value) not in (list, tuple) or len(value) != rows:
        return False
    return not all(isinstance(item, (Tensor, np.ndarray)) and _length(item, 0) == rows for item in value) and not any(
        isinstance(item, (Mapping, list, tuple)) and any(_length(leaf, 0) == rows for _, leaf in leaves_of(item))
        for item in value
    )


def _attributes(value: Any) -> dict[str, Any]:
    """What an object of the user's holds: a dataclass, a namespace, a graph."""
    if callable(value) or type(value).__module__.partition(".")[0] in ("builtins", "types", "functools"):
        return dict(vars(value)) if type(value).__name__ == "SimpleNamespace" else {}
    names = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ()) if hasattr(value, name)]
    return {**{name: getattr(value, name) for name in names}, **getattr(value, "__dict__", {})}


def _with_items(mapping: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    if type(mapping) is dict:
        return items
    twin: Any = copy.copy(mapping)
    for key, item in items.items():
        twin[key] = item
    return twin


def _shown(path: Path) -> str:
    return "".join(f"[{key!r}]" for key in path) or "its top"
