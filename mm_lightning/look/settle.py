"""Deciding on the layers of a fit by a look at its first batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mm_lightning.look.choice import choose_places
from mm_lightning.look.look import Look, Place
from mm_lightning.look.proof import Proof, Prover
from mm_lightning.mixup import INPUT, Layer, LayerSpec, resolve_layers

__all__ = ["Proofs", "judge", "settle_auto"]

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
                    problem = f"with one lam per row, {by_row.problem}; use per_sample=False"
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


def settle_auto(proofs: Proofs, layers: LayerSpec) -> tuple[Layer, ...]:
    """What ``layers="auto"`` means, where there are no MixPoints.

    Raises:
        ValueError: If there is no place to mix at.
    """
    look = proofs.look
    chosen = [place.name for place in choose_places(list(look.places.values()), proofs.is_safe)]
    problem = look.entries.problem
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
