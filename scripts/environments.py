"""Virtual environments that scripts make for themselves, and make again only if what goes into them changes."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path


def installed(environment: Path, python: str | Path, requirements: Sequence[str], seconds: int) -> Path | str:
    """The interpreter of an environment with these requirements; or what went wrong.

    Args:
        environment: Its folder. A file in it says what was installed.
        python: The interpreter that makes it.
        requirements: As pip takes them.
        seconds: After so many the installation is given up.
    """
    interpreter = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    marker = environment / "installed.json"
    if marker.exists() and json.loads(marker.read_text()) == list(requirements):
        return interpreter
    pip = [interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements]
    try:
        for command in ([python, "-m", "venv", "--clear", environment], pip):
            subprocess.run(command, check=True, timeout=seconds, capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        return f"it needs more than {seconds // 60} minutes to install"
    except subprocess.CalledProcessError as error:
        return f"it cannot be installed here ({(error.stderr.strip().splitlines() or ['?'])[-1]})"
    marker.write_text(json.dumps(list(requirements)))
    return interpreter
