"""The version, and that it costs nothing to ask for it."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import mm_lightning

CODE = """\
import sys
before = set(sys.modules)
import mm_lightning
mm_lightning.__version__
print(*set(sys.modules) - before)
"""


def test_the_version_is_that_of_the_metadata() -> None:
    assert mm_lightning.__version__ == version("mm-lightning")
    assert "__version__" in dir(mm_lightning)


def test_asking_for_the_version_imports_nothing_of_others() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    imported = {name.partition(".")[0] for name in done.stdout.split()}
    assert imported - set(sys.stdlib_module_names) == {"mm_lightning"}
    assert len(done.stdout.split()) < 50
