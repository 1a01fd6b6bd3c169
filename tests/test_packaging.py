import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mm_lightning.command.configuration import CONF

ROOT = CONF.parent
NOT_SOURCE = shutil.ignore_patterns(".*", "outputs", "multirun", "build", "dist", "*.egg-info", "__pycache__", "exp")

pytestmark = pytest.mark.skipif(not (ROOT / "setup.cfg").is_file(), reason="needs the source tree")


def run(*arguments: str | Path, cwd: Path, **environment: str) -> str:
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source") / "checkout"
    shutil.copytree(ROOT, source, ignore=NOT_SOURCE)  # setuptools writes beside the sources
    run("-m", "build", "--wheel", "--no-isolation", "--outdir", source.parent, cwd=source)
    (path,) = source.parent.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    options = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    run("-m", "pip", "install", *options, "--target", folder, wheel, cwd=folder)
    return folder


def files_below(folder: Path, *patterns: str) -> set[str]:
    return {path.relative_to(ROOT).as_posix() for pattern in patterns for path in folder.rglob(pattern)}


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    modules = files_below(ROOT / "mm_lightning", "*.py", "*.jinja", "py.typed")
    data = files_below(ROOT / "mm_lightning" / "data" / "mnist_files", "*.xz", "LICENSE")
    conf = {f"mm_lightning/{name}" for name in files_below(CONF, "*.yaml")}
    assert (len(data), len(conf) > 15, "mm_lightning/conf/train.yaml" in conf) == (5, True, True)
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == modules | data | conf


@pytest.mark.slow
def test_wheel_says_what_it_is(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = archive.read(name).decode()
    assert "\nName: mm-lightning\n" in metadata
    assert ": Apache-2.0 AND CC-BY-SA-3.0\n" in metadata  # License-Expression or License, by setuptools' version
    assert "\nRequires-Dist: lightning>=2.6\n" in metadata
    licences = [name for name in archive.namelist() if ".dist-info/licenses/" in name]
    assert sorted(name.split("/licenses/")[1] for name in licences) == [
        "LICENSE",
        "mm_lightning/data/mnist_files/LICENSE",
    ]


@pytest.mark.slow
def test_installed_wheel_trains_from_any_folder(installed: Path, tmp_path: Path) -> None:
    code = "from mm_lightning import train; print(train.__file__, train.CONF, sep='\\n'); train.main()"
    overrides = ["+experiment=mnist_bottleneck", "trainer=smoke", "model.blocks.sizes=[784,16,16,2,16,16,10]"]
    out = run("-c", code, *overrides, cwd=tmp_path, PYTHONPATH=str(installed))
    package = installed / "mm_lightning"
    assert out.splitlines()[:2] == [str(package / "train.py"), str(package / "conf")]
    (metrics,) = tmp_path.glob("outputs/mnist_bottleneck/*/metrics.json")
    assert f"Run folder   {metrics.parent}" in out
    assert '"git_revision": null' in metrics.read_text()


def test_source_tree_works_from_any_folder(tmp_path: Path) -> None:
    package = importlib.import_module("mm_lightning")
    place = run("-c", "import mm_lightning; print(mm_lightning.__file__)", cwd=tmp_path).strip()
    assert Path(place) == Path(str(package.__file__))


def test_every_subpackage_is_listed() -> None:
    # setup.cfg lists packages by hand: one that is forgotten would be missing from the wheel alone
    packages = {path.parent for path in (ROOT / "mm_lightning").rglob("*.py")}
    names = {path.relative_to(ROOT).as_posix().replace("/", ".") for path in packages} | {"mm_lightning.conf"}
    lines = (ROOT / "setup.cfg").read_text().split("\npackages =\n")[1].split("\n")
    listed = {line.strip() for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith(" "))]}
    assert listed == names
