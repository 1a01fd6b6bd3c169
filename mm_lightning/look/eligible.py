"""The eligible set S: which layers of the first batch's look a fit mixes at."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mm_lightning.look.look import Look
from mm_lightning.look.place import Place
from mm_lightning.look.proof import Proof, Prover
from mm_lightning.mixup import INPUT, Layer, LayerSpec, resolve_layers

__all__ = ["Proofs", "check", "choose_places", "judge", "settle_auto"]

# Shares of a network's weighted layers. Mixing gains nothing without an early layer and nothing from late ones alone
# (Verma et al., 2019, table 5): on PreActResNet18 the stages end at 0.24, 0.48, 0.71 and 0.95, and the best set is the
# input and the first two. A stem, at less than a tenth, is nearly the input.
_NEAREST, _FARTHEST = 0.1, 0.6
_WANTED = (0.2, 0.4, 0.6)

SEE = "mm_lightning.inspect(module, batch) lists the layers that can be mixed."


class Proofs:
    """The proofs of one look, each made when it is asked for.

    Args:
        look: The look.
        per_sample: Whether each row has a ``lam`` of its own.
    """

    def __init__(self, look: Look, per_sample: bool = False) -> None:
        self.look = look
        self.per_sample = per_sample
        self._prover = Prover(look)
        self._made: dict[str, Proof] = {}

    def of(self, layer: Layer) -> Proof:
        """Mix there with ``lam = 0``."""
        if layer.name not in self._made:
            proof = self._prover.prove(layer)
            if self.per_sample and not proof.problem:
                by_row = self._prover.prove(layer, per_sample=True)
                if by_row.problem:
                    way_out = "use one for the batch: per_sample=False, another ratio or interpolation"
                    problem = f"with one lam per row, {by_row.problem}; {way_out}"
                    proof = Proof(proof.way, problem, proof.has_power)
            self._made[layer.name] = proof
        return self._made[layer.name]

    def made(self, layer: Layer) -> Proof | None:
        """The proof of a layer, if it was asked for."""
        return self._made.get(layer.name)

    def explain(self, proof: Proof) -> str:
        """Say what the failure of a proof means."""
        return self._prover.explain(proof)

    def is_safe(self, place: Place) -> bool:
        """Whether mixing at a module's output is right."""
        if place.problem or place.way_around:
            return False
        return not self.of(Layer(place.name, (self.look.modules[place.name],))).problem


def settle_auto(
    proofs: Proofs, layers: LayerSpec, unfit: Callable[[Layer], str] = lambda layer: ""
) -> tuple[Layer, ...]:
    """What ``layers="auto"`` means, where there are no MixPoints.

    Args:
        proofs: Those of the look.
        layers: What the user has named.
        unfit: Says why a layer cannot be mixed in the way that is wanted; empty if it can.

    Raises:
        ValueError: If there is no place to mix at.
    """
    look = proofs.look

    def is_safe(place: Place) -> bool:
        return proofs.is_safe(place) and not unfit(Layer(place.name, (look.modules[place.name],)))

    chosen = [place.name for place in choose_places(list(look.places.values()), is_safe)]
    problem = look.entries.problem or unfit(look.input_layer)
    if not problem and (proof := proofs.of(look.input_layer)).problem:
        problem = proofs.explain(proof)
    elif not problem and chosen and not proof.has_power and not look.has_targets(look.input_layer):
        problem = "it enters a module that computes the loss, too"  # which would compare with what is mixed
    found = resolve_layers(look.module, layers, chosen if problem else [INPUT, *chosen])
    if not found:
        raise ValueError(
            f"Manifold mixup with layers='auto' found no layer of {type(look.module).__name__} that everything runs "
            f"through ({problem}). mm_lightning.inspect(module, batch) tells why; name the layers, or train "
            "without the callback."
        )
    return found


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


def judge(proofs: Proofs, layers: Sequence[Layer], *, strict: bool, warn: Callable[[str], None]) -> tuple[Layer, ...]:
    """Refuse layers that cannot be mixed, and warn of those that a path leads around.

    Raises:
        ValueError: If a layer cannot be mixed.
        RuntimeError: If features and targets would not be mixed alike.
    """
    look = proofs.look
    judged = []
    for layer in layers:
        if layer.name == INPUT:
            if look.entries.problem:
                raise ValueError(f"Layer 'input' cannot be mixed: {look.entries.problem}. {SEE}")
            layer = look.input_layer
        else:
            place = look.places[layer.name]
            if place.problem or (strict and place.way_around):
                raise ValueError(f"Layer {layer.name!r} cannot be mixed: {place.problem or place.way_around}. {SEE}")
            if place.way_around:
                if rowless := look.without_rows(layer):
                    raise RuntimeError(f"Layer {layer.name!r} cannot be mixed: {rowless}. {SEE}")
                warn(
                    f"Layer {layer.name!r} is mixed, but {place.way_around}, which carries unmixed features to the "
                    f"mixed targets. {SEE}"
                )
                judged.append(layer)
                continue
        check(proofs, layer)
        judged.append(layer)
    return tuple(judged)


def check(proofs: Proofs, layer: Layer) -> None:
    """Raise RuntimeError if features and targets would not be mixed alike at a layer."""
    proof = proofs.of(layer)
    if proof.problem:
        others = "" if layer.name == INPUT else "mix at another layer, "
        raise RuntimeError(
            f"Manifold mixup at layer {layer.name!r} would not mix features and targets alike: "
            f"{proofs.explain(proof)}; {others}compute the targets from the batch, or train without "
            "ManifoldMixupCallback."
        ) from proof.error
    if not proof.has_power and not proofs.look.has_targets(layer):
        raise RuntimeError(
            f"The hidden state would be mixed at layer {layer.name!r}, but no loss on the batch's targets was seen in "
            "what training_step returns, so there are no targets to mix. Train it without ManifoldMixupCallback."
        )


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
