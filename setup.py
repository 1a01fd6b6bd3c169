"""The one thing that setup.cfg cannot say: conf/ stands at the top of the repository and travels inside the package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConf(build_py):
    """Puts the files of conf/ into the built package, over the module that stands for them in a source tree."""

    def run(self) -> None:
        """Build as ever; an editable install reads the source tree and gets no copy."""
        super().run()
        if not self.editable_mode:
            place = Path(self.build_lib, "mm_lightning", "conf")
            shutil.copytree("conf", place, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithConf})
