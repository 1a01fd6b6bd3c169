"""WHERE is the batch mixed? The eligible layers S, and the marker for "here"."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from mm_lightning.arguments import plain, refusal

__all__ = [
    "INPUT",
    "Hook",
    "Layer",
    "LayerSpec",
    "MixPoint",
    "check_layers",
    "has_auto",
    "named_layers",
    "names_beside_auto",
    "resolve_layers",
]

INPUT = "input"
"""Name of layer k = 0: the batch itself."""

# Attributes in which torch.compile and activation checkpointing keep the module they wrap.
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")

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


class Hook:
    """What the hooks that stay on modules during a fit have in common."""

    @property
    def __name__(self) -> str:
        # TorchScript alone asks for it, in order to compile the hook. To all others this is a hook without a name.
        raise AttributeError(
            "torch.jit.script cannot compile a module that manifold mixup has hooked. Script the module itself after "
            "the fit, or use torch.jit.trace or torch.export, which take it unmixed."
        )


@dataclass(frozen=True, eq=False)
class Layer:
    """A place where the batch may be mixed.

    Attributes:
        name: Dotted name of the module, or ``"input"``.
        modules: The module whose output is mixed. For ``"input"`` those that embed integers of the batch.
    """

    name: str
    modules: tuple[nn.Module, ...] = ()


def check_layers(spec: LayerSpec) -> None:
    """Refuse a specification of layers that is none in any network.

    Raises:
        ValueError: If it is empty.
        TypeError: If a part of it is no name, module class or module object.
    """
    parts = _parts(spec)
    if not parts:
        raise ValueError(f"layers must name at least one layer, got {spec!r}. Give 'auto', or 'input' for the batch.")
    for part in parts:
        is_class = isinstance(part, type) and issubclass(part, nn.Module)
        if not is_class and not isinstance(part, (str, nn.Module)):
            expected = "'auto', 'input', module names, module classes, module objects or a list of these"
            raise refusal("layers", part, expected, "mm_lightning.inspect(module, batch) lists the names.")


def has_auto(root: nn.Module, spec: LayerSpec) -> bool:
    """Whether a forward pass must be looked at to tell what ``spec`` means in ``root``."""
    is_auto = any(isinstance(part, str) and part == "auto" for part in _parts(spec))
    return is_auto and not any(isinstance(module, MixPoint) for module in root.modules())


def names_beside_auto(root: nn.Module, spec: LayerSpec) -> set[str]:
    """Names of the layers that ``spec`` names itself, and leaves to no choice."""
    named = [part for part in _parts(spec) if not (isinstance(part, str) and part == "auto")]
    return {layer.name for layer in resolve_layers(root, named)} if named else set()  # type: ignore[arg-type]


def resolve_layers(root: nn.Module, spec: LayerSpec, chosen: Sequence[str] | None = None) -> tuple[Layer, ...]:
    """Find the layers that ``spec`` names in ``root``.

    Args:
        root: The network or LightningModule.
        spec: ``"auto"`` (the network's MixPoints; where there are none, ``chosen``), ``"input"`` (the batch), a dotted
            module name in which ``*`` stands for any text without a dot, a module class, a module object, or a list of
            these. Naming a module means "after it".
        chosen: What ``"auto"`` means in a network without MixPoints.

    Returns:
        The layers without repetition, ``"input"`` first, the others in the order of ``root.named_modules()``.

    Raises:
        ValueError: If a part of ``spec`` matches nothing, or matches ``root`` itself.
        TypeError: If a part of ``spec`` is none of the above.
    """
    modules = named_layers(root)
    check_layers(spec)
    found: set[str] = set()
    for part in _parts(spec):
        found.update(_match(root, modules, part, chosen))
    layers = [Layer(INPUT)] if INPUT in found else []
    for name, module in modules.items():  # a module with two names is one layer
        if name in found and name != INPUT and not any(module in layer.modules for layer in layers):
            layers.append(Layer(name, (module,)))
    return tuple(layers)


def named_layers(root: nn.Module) -> dict[str, nn.Module]:
    """The modules below ``root`` by the names that layers have: as in ``named_modules``, without wrappers' parts."""
    modules: dict[str, nn.Module] = {}
    for name, module in root.named_modules(remove_duplicate=False):
        if (shown := _display_name(name, module)) and module is not root:
            modules.setdefault(shown, module)
    return modules


def _parts(spec: LayerSpec) -> list[object]:
    parts = plain(spec)
    return parts if isinstance(parts, list) else [parts]


def _match(root: nn.Module, modules: dict[str, nn.Module], part: object, chosen: Sequence[str] | None) -> Iterable[str]:
    """Names of the layers that one part of a specification means."""
    if isinstance(part, str) and part == INPUT:
        return [INPUT]
    if isinstance(part, str) and part == "auto":
        points = _where(modules, lambda module: isinstance(module, MixPoint))
        return points or chosen or []
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
    assert isinstance(part, type)
    cls = part
    return _where(modules, lambda module: isinstance(module, cls)) or _refuse(root, modules, cls.__name__)


def _display_name(name: str, module: nn.Module) -> str:
    """The dotted name without wrappers' parts, and never the batch's for a module of the user."""
    name = ".".join(part for part in name.split(".") if part not in WRAPPED)
    return f"{INPUT} (module)" if name == INPUT and not isinstance(module, MixPoint) else name


def _where(modules: dict[str, nn.Module], wanted: Callable[[nn.Module], bool]) -> list[str]:
    return [name for name, module in modules.items() if wanted(module)]


def _refuse(root: nn.Module, modules: dict[str, nn.Module], part: str) -> list[str]:
    names = list(dict.fromkeys([INPUT, *modules]))
    nearest = difflib.get_close_matches(part, names, n=5, cutoff=0.4)
    known = f"Nearest names: {_listing(nearest)}." if nearest else f"It has {_listing(names)}."
    raise ValueError(
        f"Layer {part!r} is not in {type(root).__name__}. {known} mm_lightning.inspect(module, batch) lists all layers."
    )


def _listing(names: Iterable[str], most: int = 12) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + more
