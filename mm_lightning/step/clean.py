"""A run of the step on the unmixed batch, beside the mixed one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mm_lightning.mixup.batch import Path, leaf_at, map_leaves
from mm_lightning.step.effects import Attributes, Contents, Effects, held_by
from mm_lightning.step.host import Host
from mm_lightning.step.replay import RandomState
from mm_lightning.step.run import loss_of

__all__ = ["Clean", "clean_run"]


@dataclass(frozen=True)
class Clean:
    """What came of the unmixed batch.

    Attributes:
        loss: Its loss; None if the step returned none.
        logits: Scores of classes (N, K), as the step's first cross-entropy got them; None without one.
    """

    loss: Tensor | None
    logits: Tensor | None

    def checked_logits(self, rows: int) -> Tensor:
        """The scores.

        Raises:
            ValueError: If there are none for each row.
        """
        if self.logits is None or self.logits.dim() != 2 or len(self.logits) != rows:
            raise ValueError(
                "The pairing or the ratio asks for logits, but training_step calls no "
                "torch.nn.functional.cross_entropy on scores of shape (N, K), where they would be seen. Choose another."
            )
        return self.logits


def clean_run(
    host: Host,
    effects: Effects,
    step: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    written: frozenset[Path],
    keeps_graph: bool,
    wants_logits: bool,
) -> Clean:
    """Run the step on the batch as it is, and put all of its effects back; the batch and random states, too.

    Args:
        host: The LightningModule around the step.
        effects: What a run of the step was seen to change.
        step: The user's ``training_step``.
        args: Its arguments, the batch first.
        kwargs: Its keyword arguments.
        written: Tensors of the batch that the step writes into.
        keeps_graph: Whether its loss is trained on.
        wants_logits: Whether the scores are to be seen.
    """
    random_state, contents = RandomState(), Contents(args[0])
    scores = _Scores()
    own = [id(leaf_at(args[0], path)) for path in written]
    batch = map_leaves(lambda leaf: leaf.clone() if id(leaf) in own else leaf, args[0]) if own else args[0]
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(keeps_graph))
            stack.enter_context(_all_of(host.module, effects).start().put_back())
            stack.enter_context(host.silent(_no_backward))
            if wants_logits:
                stack.enter_context(scores)
            loss = loss_of(step(batch, *args[1:], **kwargs))
    finally:
        contents.restore()
        random_state.restore()
    return Clean(loss if keeps_graph else None, scores.logits)


def _all_of(module: nn.Module, seen: Effects) -> Effects:
    """What was seen to change, and whatever might: all buffers, attributes and what they hold.

    Of parameters that are not trained, those that were seen: to keep all would cost as much as the network.
    """
    parts = list(module.modules())
    known = {at[:2] for at in seen.containers}
    held = [(part, name, False) for part in parts for name, _ in held_by(part) if (part, name) not in known]
    tensors = [name for part in parts for name, tensor in Attributes(part).tensors()]
    kept = [name for name in tensors if name[1] != "_parameters"]
    return Effects(parts, [*seen.containers, *held], list(dict.fromkeys([*seen.tensors, *kept])))


class _Scores(TorchFunctionMode):
    """Keeps the scores that the first cross-entropy gets."""

    logits: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.cross_entropy and self.logits is None:
            self.logits = (*args, kwargs.get("input"))[0].detach()
        return func(*args, **kwargs)


def _no_backward(*_: Any, **__: Any) -> None:
    return None
