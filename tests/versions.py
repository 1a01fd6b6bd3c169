"""What tests need that the lowest versions do not have."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

LIGHTNING = tuple(map(int, pl.__version__.split(".")[:2]))

compiles = pytest.mark.skipif(torch.__version__ < "2.8", reason="torch.compile is refused below torch 2.8")
has_onednn = pytest.mark.skipif(torch.__version__ < "2.9", reason="products are as without fast_cpu below torch 2.9")
resumes = pytest.mark.skipif(LIGHTNING < (2, 5), reason="lightning below 2.5 trains a batch twice when it resumes")
finds = pytest.mark.skipif(LIGHTNING < (2, 5), reason="lightning below 2.5 loses the batches that its finder has seen")
WeightAveraging = getattr(pl.callbacks, "WeightAveraging", pl.Callback)
averages = pytest.mark.skipif(LIGHTNING < (2, 6), reason="WeightAveraging is of lightning 2.6")

OF_WEIGHTS: dict[str, Any] = {"weights_only": True} if LIGHTNING >= (2, 6) else {}  # an argument since then


def answers(error: type[BaseException], **expected: Any) -> AbstractContextManager[Any]:
    """What a trainer answers an exception with: a Ctrl-C with ``SystemExit``, and before lightning 2.4 with nothing."""
    if error is KeyboardInterrupt:
        return pytest.raises(SystemExit, **expected) if LIGHTNING >= (2, 4) else nullcontext()
    return pytest.raises(error, **expected)
