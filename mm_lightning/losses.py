"""Losses for classifiers that torch does not have."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SoftmaxBCE"]

_NEVER = torch.iinfo(torch.int64).min  # no class is left out


class SoftmaxBCE(nn.Module):
    """Binary cross-entropy on softmax probabilities: the loss of the code of Verma et al. (2019).

    With ``p = softmax(logits)`` and one-hot ``t`` it is the mean over N rows and K classes of
    ``-t * log(p) - (1 - t) * log(1 - p)``. It is linear in ``t``: mixing losses is mixing one-hot targets.

    Where the logits are all alike, its gradient is exactly K - 1 times smaller than that of the cross-entropy: 9 times
    for 10 classes, 99 for 100. So a learning rate for one is none for the other. Unlike ``nn.BCELoss``, which takes
    probabilities, it is exact for any logits: a row that is sure of a wrong class keeps its gradient.

    Example:
        >>> SoftmaxBCE()(torch.zeros(1, 2), torch.tensor([1]))  # -log(1/2), the mean of two of them
        tensor(0.6931)
    """

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            logits: Unnormalised scores, floating point, (N, K) with K >= 2.
            targets: Class indices int64 (N,).

        Returns:
            A scalar, with the dtype of ``logits``; float32 for those of half precision.

        Raises:
            ValueError: If ``logits`` are not (N, K) with K >= 2, or ``targets`` not (N,).
            TypeError: If ``targets`` are no integers.
        """
        if logits.dim() != 2 or logits.shape[1] < 2:
            got = f"got {tuple(logits.shape)}"
            raise ValueError(f"logits must be (N, K) for K >= 2 classes, {got}. nn.BCEWithLogitsLoss takes others.")
        if targets.is_floating_point():
            way_out = "Mixing needs no other targets: ManifoldMixupCallback mixes this loss."
            raise TypeError(f"targets must be class indices, got {targets.dtype}. {way_out}")
        if targets.shape != logits.shape[:1]:
            raise ValueError(f"targets must be ({len(logits)},), got {tuple(targets.shape)}. Give one class per row.")
        log_p, log_rest = _log_p_and_rest(logits.float() if logits.dtype.itemsize == 2 else logits)
        own = F.nll_loss(log_p, targets, ignore_index=_NEVER)
        others = -log_rest.scatter(1, targets[:, None], 0.0).sum(dim=1).mean()
        return (own + others) / logits.shape[1]


def _log_p_and_rest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """``log(p)`` and ``log(1 - p)`` of softmax probabilities, both (N, K), without ``1 - p`` where p is close to 1.

    No class but the largest has more than half, so ``log1p(-p)`` is exact for it. For the largest, ``1 - p`` is the sum
    of the others.
    """
    log_p = logits.log_softmax(dim=1)
    largest = logits.argmax(dim=1, keepdim=True)
    log_others = log_p.scatter(1, largest, -torch.inf)
    rest_of_largest = log_others.logsumexp(dim=1, keepdim=True)
    return log_p, torch.log1p(-log_others.exp()).scatter(1, largest, rest_of_largest)
