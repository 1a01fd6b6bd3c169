"""WHERE is the batch mixed? The eligible layers S, and the marker for "here"."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["INPUT", "Layer", "LayerSpec", "MixPoint", "resolve_layers"]

INPUT = "input"
"""Name of layer k = 0: the batch itself."""

# Attributes in which torch.compile and activation checkpointing keep the module they wrap.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")

LayerSpec = str | nn.Module | type[nn.Module] | Sequence[str | nn.Module | type[nn.Module]]


class MixPoint(nn.Module):
    """Marks "the batch may be mixed here" between two layers of any network.

    It returns its input as it is and has no parameters, buffers or ``state_dict`` keys. Where a network has MixPoints,
    ``layers="auto"`` means exactly those. (Inside an ``nn.Sequential`` it takes a place, so later layers' numbers and
    with them their ``state_dict`` keys move by one, as with any layer put in.)

    Example:
        >>> nn.Sequential(nn.Linear(4, 8), nn.ReLU(), MixPoint(), nn.Linear(8, 2))[2]
        MixPoint()
    """

    def forward(self, hidden: Tensor) -> Tensor:
        """Return ``hidden`` itself, of any shape."""
        return hidden


@dataclass(frozen=True, eq=False)
class Layer:
    """A place where the batch may be mixed: after ``module``, or in the batch itself if ``module`` is None."""

    name: str
    module: nn.Module | None


def resolve_layers(root: nn.Module, spec: LayerSpec) -> tuple[Layer, ...]:
    """Find the layers that ``spec`` names in ``root``.

    Args:
        root: The network or LightningModule.
        spec: ``"auto"`` (the network's MixPoints), ``"input"`` (the batch), a dotted module name in which ``*`` stands
            for any text without a dot, a module class, a module object, or a list of these. Naming a module means
            "after it".

    Returns:
        The layers without repetition, ``"input"`` first, the others in the order of ``root.named_modules()``.

    Raises:
        ValueError: If a part of ``spec`` matches nothing, or matches ``root`` itself.
        TypeError: If a part of ``spec`` is none of the above.
    """
    modules: dict[str, nn.Module] = {}
    for name, module in root.named_modules(remove_duplicate=False):
        if (shown := _display_name(name, module)) and module is not root:
            modules.setdefault(shown, module)
    parts = list(spec) if isinstance(spec, Iterable) and not isinstance(spec, (str, nn.Module)) else [spec]
    if not parts:
        raise ValueError("layers is empty. Name at least one layer, or use 'auto' or 'input'.")
    found: set[str] = set()
    for part in parts:
        found.update(_match(root, modules, part))
    chosen = [Layer(INPUT, None)] if INPUT in found else []
    for name, module in modules.items():  # a module with two names is one layer
        if name in found and name != INPUT and not any(layer.module is module for layer in chosen):
            chosen.append(Layer(name, module))
    return tuple(chosen)


def _match(root: nn.Module, modules: dict[str, nn.Module], part: object) -> list[str]:
    """Names of the layers that one part of a specification means."""
    if part == INPUT:
        return [INPUT]
    if part == "auto":
        return _mix_points(root, modules)
    if isinstance(part, str):
        # As in a path, the star stays within one component: "layer*" is not "layer1.0.conv".
        pattern = re.compile(r"[^.]*".join(re.escape(text) for text in part.split("*")))
        names = [name for name in modules if pattern.fullmatch(name)]
        return names or _refuse(root, modules, part)
    if part is root:
        raise ValueError(
            f"layers names the whole {type(root).__name__}. Its output is the prediction; name a module inside it."
        )
    if isinstance(part, nn.Module):
        return _where(modules, lambda module: module is part) or _refuse(root, modules, type(part).__name__)
    if isinstance(part, type) and issubclass(part, nn.Module):
        cls = part
        return _where(modules, lambda module: isinstance(module, cls)) or _refuse(root, modules, cls.__name__)
    raise TypeError(
        "layers takes 'auto', 'input', module names, module classes, module objects or a list of these, "
        f"got {part!r} of type {type(part).__name__}."
    )


def _display_name(name: str, module: nn.Module) -> str:
    """The dotted name without wrappers' parts, and never the batch's for a module of the user."""
    name = ".".join(part for part in name.split(".") if part not in _WRAPPED)
    return f"{INPUT} (module)" if name == INPUT and not isinstance(module, MixPoint) else name


def _where(modules: dict[str, nn.Module], wanted: Callable[[nn.Module], bool]) -> list[str]:
    return [name for name, module in modules.items() if wanted(module)]


def _mix_points(root: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    names = _where(modules, lambda module: isinstance(module, MixPoint))
    if not names:
        raise ValueError(
            f"layers='auto' found no MixPoint in {type(root).__name__}. Put MixPoint() between two of its layers, or "
            f"name the layers, for example layers=['input', {next(iter(modules), 'encoder')!r}]. "
            f"Top-level modules: {_listing(name for name in modules if '.' not in name)}."
        )
    return names


def _refuse(root: nn.Module, modules: dict[str, nn.Module], part: str) -> list[str]:
    nearest = difflib.get_close_matches(part, [INPUT, *modules], n=5, cutoff=0.4)
    known = f"Nearest names: {_listing(nearest)}." if nearest else f"It has {_listing([INPUT, *modules])}."
    raise ValueError(f"Layer {part!r} is not in {type(root).__name__}. {known}")


def _listing(names: Iterable[str], most: int = 12) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + more
