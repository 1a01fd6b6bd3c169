"""In a source tree: sends whoever imports ``mm_lightning.conf`` to ``conf/`` at the top of the repository.

A built package holds the files of that folder here, this one's namesake among them (``setup.py``).
"""

from importlib.util import spec_from_file_location
from pathlib import Path

_CONF = Path(__file__).resolve().parents[2] / "conf"

__file__ = str(_CONF / "__init__.py")
__path__ = [str(_CONF)]
# importlib.resources, and so Hydra's pkg://, asks the spec where the files are
__spec__ = spec_from_file_location(__name__, __file__, submodule_search_locations=__path__)  # type: ignore[assignment]
