"""The version, and that it costs nothing to ask for it."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import mm_lightning

CODE = """\
import sys
from time import perf_counter

begin = perf_counter()
import mm_lightning
mm_lightning.__version__
print(perf_counter() - begin, *sys.modules)
"""


def test_the_version_is_that_of_the_metadata() -> None:
    assert mm_lightning.__version__ == version("mm-lightning")
    assert "__version__" in dir(mm_lightning)


def test_the_version_is_had_in_20_ms_without_torch() -> None:
    seconds = []
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
        time, *modules = done.stdout.split()
        seconds.append(float(time))
        assert not {"torch", "lightning", "pytorch_lightning", "hydra", "omegaconf", "numpy"} & set(modules)
    assert min(seconds) < 0.02, seconds
