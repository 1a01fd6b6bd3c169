"""What tests need that the lowest versions do not have."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

LIGHTNING = tuple(map(int, pl.__version__.split(".")[:2]))

compiles = pytest.mark.skipif(torch.__version__ < "2.8", reason="torch.compile is refused below torch 2.8")
WeightAveraging = getattr(pl.callbacks, "WeightAveraging", pl.Callback)
averages = pytest.mark.skipif(LIGHTNING < (2, 6), reason="WeightAveraging is of lightning 2.6")


def answers(error: type[BaseException]) -> AbstractContextManager[Any]:
    """What a trainer answers an exception with: a Ctrl-C with ``SystemExit``, and before lightning 2.4 with nothing."""
    if error is KeyboardInterrupt:
        return pytest.raises(SystemExit) if LIGHTNING >= (2, 4) else nullcontext()
    return pytest.raises(error)
