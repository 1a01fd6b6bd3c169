"""What is built, and what it does in an environment of its own: an editable install, and one of the wheel."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from mm_lightning.command.configuration import CONF

ROOT = Path(__file__).parents[1]
NOT_SOURCE = ".git .venv venv .*_cache .coverage* build dist *.egg-info lightning_logs shared".split()
NOT_SOURCE += "outputs multirun reproduction reproduction_quick exp".split()  # of runs, at the top
PIP = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
SCRIPTS = ["mm-train", "mm-inspect", "mm-evaluate", "mm-compare", "mm-reproduce", "mm-study"]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.cfg").is_file(), reason="needs the source tree")


def run(*command: str | Path, cwd: Path, code: int = 0, **environment: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


class Built(NamedTuple):
    source: Path
    sdist: Path
    wheel: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A copy of the source tree, its sdist, and the wheel that is built from the sdist."""
    source = tmp_path_factory.mktemp("source") / "checkout"
    top = shutil.ignore_patterns(*NOT_SOURCE)
    caches = shutil.ignore_patterns("__pycache__")
    # setuptools writes beside the sources
    shutil.copytree(ROOT, source, ignore=lambda folder, names: (top if Path(folder) == ROOT else caches)(folder, names))
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", source.parent, source, cwd=source.parent)
    (sdist,), (wheel,) = source.parent.glob("*.tar.gz"), source.parent.glob("*.whl")
    return Built(source, sdist, wheel)


class Environment(NamedTuple):
    package: Path  # where it is imported from
    conf: Path
    bin: Path
    folder: Path  # empty

    def run(self, *command: str | Path, code: int = 0) -> str:
        """Run a command that the environment holds."""
        place = {"PYTHONPATH": "", "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}"}
        name, *arguments = command
        return run(shutil.which(str(name), path=self.bin) or name, *arguments, cwd=self.folder, code=code, **place)


@pytest.fixture(scope="module", params=["editable", "wheel"])
def installed(request: pytest.FixtureRequest, built: Built, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """A new environment with this package; all others are those of the environment that runs the tests."""
    place = tmp_path_factory.mktemp(request.param) / "environment"
    builder = venv.EnvBuilder(with_pip=False)
    context = builder.ensure_directories(place)
    builder.create(place)
    (site,) = {*place.glob("lib/python*/site-packages"), *place.glob("Lib/site-packages")}
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "zz_others.pth").write_text("\n".join(others))  # after the package's own
    what = ["--editable", built.source] if request.param == "editable" else [built.wheel]
    folder = place.parent / "empty"
    folder.mkdir()
    run(context.env_exe, "-m", "pip", "install", *PIP, *what, cwd=folder, PYTHONPATH="")
    top = built.source if request.param == "editable" else site
    conf = top / "conf" if request.param == "editable" else top / "mm_lightning" / "conf"
    return Environment(top / "mm_lightning", conf, Path(context.bin_path), folder)


def files_below(folder: Path) -> set[str]:
    paths = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return {path.as_posix() for path in paths if "__pycache__" not in path.parts and ".egg-info" not in path.parts[0]}


# --- what is built


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(built: Built) -> None:
    package = {f"mm_lightning/{name}" for name in files_below(built.source / "mm_lightning")}
    conf = {f"mm_lightning/conf/{name}" for name in files_below(built.source / "conf")}
    images = {f"mm_lightning/data/mnist_files/{which}-images-idx3-ubyte.xz" for which in ("train", "t10k")}
    others = {
        "mm_lightning/py.typed",
        "mm_lightning/conf/reproduction/spiral.yaml",
        "mm_lightning/study/report.html.jinja",
    }
    archive = zipfile.ZipFile(built.wheel)
    names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert files_below(CONF) == files_below(built.source / "conf")
    assert names == package | conf
    assert images | others < names
    assert archive.read("mm_lightning/conf/__init__.py") == (built.source / "conf" / "__init__.py").read_bytes()


@pytest.mark.slow
def test_sdist_holds_the_source_tree(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
        assert not [member.name for member in archive.getmembers() if member.issym() or member.islnk()]
    own = {name for name in names if name != "PKG-INFO" and ".egg-info/" not in name}
    assert own == files_below(built.source) - {"PKG-INFO"}


@pytest.mark.slow
def test_a_package_index_takes_both(built: Built) -> None:
    out = run(sys.executable, "-m", "twine", "check", "--strict", built.sdist, built.wheel, cwd=built.source.parent)
    assert out.count("PASSED") == 2


@pytest.mark.slow
def test_wheel_says_what_it_is(built: Built) -> None:
    archive = zipfile.ZipFile(built.wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = archive.read(name).decode()
    assert "\nName: mm-lightning\n" in metadata
    assert f"\nVersion: {importlib.import_module('mm_lightning').__version__}\n" in metadata
    assert ": Apache-2.0 AND CC-BY-SA-3.0\n" in metadata  # License-Expression or License, by setuptools' version
    assert "\nRequires-Dist: lightning" in metadata
    labels = [line.split()[1] for line in metadata.splitlines() if line.startswith("Project-URL: ")]
    assert labels == ["Source,", "Documentation,", "Changelog,", "Issues,"]
    licences = [name for name in archive.namelist() if ".dist-info/licenses/" in name]
    assert sorted(name.split("/licenses/")[1] for name in licences) == [
        "LICENSE",
        "mm_lightning/data/mnist_files/LICENSE",
    ]


@pytest.mark.slow
def test_the_tests_of_the_sdist_run(built: Built, tmp_path: Path) -> None:
    with tarfile.open(built.sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    pytest_there = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q"]
    collected = run(*pytest_there, "--collect-only", "-m", "slow or not slow", cwd=folder, PYTHONPATH=str(folder))
    files = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.glob("tests/**/test_*.py")}
    of_extras = {name for name, text in files.items() if re.search(r"importorskip\(", text)}  # maybe as a whole
    found = {line.split("::")[0] for line in collected.splitlines() if "::" in line}
    assert files.keys() - of_extras <= found <= files.keys()
    some = ["test_architecture.py", "test_readme.py", "test_mutate.py", "mixup/test_plan.py"]
    some += ["test_conf.py::test_folders_of_a_sweep_carry_neither_brackets_nor_paths"]
    done = run(*pytest_there, *(f"tests/{name}" for name in some), cwd=folder, PYTHONPATH=str(folder))
    assert " passed" in done


# --- what is installed

USER = """\
import mm_lightning
import mm_lightning.conf
from mm_lightning import BetaRatio, ManifoldMixupCallback, inspect
from mm_lightning.inspect import Inspection

module, batch = object(), object()
reveal_type(BetaRatio(alpha=2.0).alpha)
reveal_type(ManifoldMixupCallback(alpha=2.0).summary())
reveal_type(mm_lightning.inspect(module, batch))
reveal_type(inspect(module, batch).safe)
reveal_type(mm_lightning.__version__)
report: Inspection = mm_lightning.inspect(module, batch, batch_size="6")
"""


@pytest.mark.slow
def test_a_type_checker_sees_the_types(installed: Environment) -> None:
    (installed.folder / "user.py").write_text(USER)
    # others are left out for their size: a LightningModule is Any here
    settings = "[mypy]\n[mypy-torch.*,torchmetrics.*,lightning.*,numpy.*]\nfollow_imports = skip\n"
    (installed.folder / "mypy.ini").write_text(settings)
    out = installed.run("python", "-m", "mypy", "--config-file", "mypy.ini", "user.py", code=1)
    lines = [line.partition(": ")[2] for line in out.splitlines() if line.startswith("user.py:")]
    revealed = ["float", "dict[str, int]", "mm_lightning.look.inspection.Inspection", "tuple[str, ...]", "str"]
    notes = [f'note: Revealed type is "{name}"' for name in revealed]
    assert [line.replace("builtins.", "") for line in lines] == [
        *notes,
        'error: Argument "batch_size" to "inspect" has incompatible type "str"; expected "int | None"  [arg-type]',
    ]


@pytest.mark.slow
def test_conf_is_a_package_of_its_files(installed: Environment) -> None:
    code = """\
import importlib.resources, mm_lightning.conf, mm_lightning.conf as conf
print(mm_lightning.__file__, conf.__file__, *conf.__path__, importlib.resources.files(conf), sep="\\n")
print(sorted(path.name for path in importlib.resources.files("mm_lightning.conf").iterdir() if path.suffix))
"""
    conf = installed.conf
    *places, names = installed.run("python", "-c", code).splitlines()
    assert places == list(map(str, [installed.package / "__init__.py", conf / "__init__.py", conf, conf]))
    assert names == "['__init__.py', 'inspect.yaml', 'reproduce.yaml', 'study.yaml', 'train.yaml']"


APP = """\
import hydra
from omegaconf import DictConfig, OmegaConf


@hydra.main(version_base="1.3", config_path="own", config_name="app")
def main(config: DictConfig) -> None:
    print(OmegaConf.to_yaml(config))


main()
"""


@pytest.mark.slow
def test_another_hydra_application_finds_the_options(installed: Environment) -> None:
    folder = installed.folder / "foreign"
    (folder / "own").mkdir(parents=True)
    (folder / "app.py").write_text(APP)
    hydra = {"searchpath": ["pkg://mm_lightning.conf"], "run": {"dir": "foreign"}, "output_subdir": None}
    (folder / "own" / "app.yaml").write_text(
        yaml.safe_dump({"defaults": [{"mixup": "none"}], "seed": 3, "hydra": hydra})
    )
    config = yaml.safe_load(installed.run("python", folder / "app.py", "mixup=manifold", "mixup.alpha=0.5"))
    assert config["mixup"]["_target_"] == "mm_lightning.ManifoldMixupCallback"
    assert (config["mixup"]["alpha"], config["seed"]) == (0.5, 3)


@pytest.mark.slow
def test_every_command_has_a_script(installed: Environment) -> None:
    for script in SCRIPTS:
        assert installed.run(script, "--version").startswith("mm-lightning ")
    assert sorted(path.stem for path in installed.bin.iterdir() if path.name.startswith("mm-")) == sorted(SCRIPTS)
    table = installed.run("mm-inspect", "+experiment=mnist_bottleneck", "data.limit=600")
    assert table.splitlines()[-1] == "layers=\"auto\" mixes at 'mix_before.3', 'mix_before.4'."


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("line", "choices"),
    [
        ("mm-train mixup=n", ["mixup=nearest", "mixup=nfm", "mixup=none"]),
        (
            "mm-inspect +experiment=mnist_",
            ["+experiment=mnist_1000", "+experiment=mnist_bottleneck", "+experiment=mnist_flatness"],
        ),
        ("mm-reproduce qu", ["quick="]),
    ],
)
def test_bash_completes(installed: Environment, line: str, choices: list[str]) -> None:
    script = shlex.split(line)[0]
    code = f"""\
eval "$({script} --shell-completion install=bash)"
COMP_LINE={shlex.quote(line)} COMP_POINT={len(line)} COMP_WORDS=({line}) COMP_CWORD=1
$(complete -p {script} | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    assert installed.run("bash", "-c", code).split() == choices


@pytest.mark.slow
def test_the_command_trains_from_any_folder(installed: Environment) -> None:
    overrides = ["+experiment=mnist_bottleneck", "trainer=smoke", "model.blocks.sizes=[784,16,16,2,16,16,10]"]
    out = installed.run("mm-train", *overrides)
    (metrics,) = installed.folder.glob("outputs/mnist_bottleneck/*/metrics.json")
    assert f"Run folder   {metrics.parent}" in out
    assert '"git_revision": null' in metrics.read_text()
    assert (metrics.parent / "train.log").is_file()


# --- the source tree


def test_source_tree_works_from_any_folder(tmp_path: Path) -> None:
    package = importlib.import_module("mm_lightning")
    place = run(sys.executable, "-c", "import mm_lightning; print(mm_lightning.__file__)", cwd=tmp_path).strip()
    assert Path(place) == Path(str(package.__file__))


def test_conf_is_at_the_top() -> None:
    assert ROOT / "conf" == CONF
    assert [path.name for path in (ROOT / "mm_lightning" / "conf").glob("*.*")] == ["__init__.py"]


def test_every_subpackage_is_listed() -> None:
    # setup.cfg lists packages by hand: one that is forgotten would be missing from the wheel alone
    packages = {path.parent for path in (ROOT / "mm_lightning").rglob("*.py")}
    names = {path.relative_to(ROOT).as_posix().replace("/", ".") for path in packages}
    lines = (ROOT / "setup.cfg").read_text().split("\npackages =\n")[1].split("\n")
    listed = {line.strip() for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith(" "))]}
    assert listed == names
