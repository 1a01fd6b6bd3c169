"""What the package needs: not more than it says, and nothing that replaces what a project has."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.cfg").is_file(), reason="needs the source tree")


@pytest.fixture(scope="module")
def matrix() -> ModuleType:
    spec = importlib.util.spec_from_file_location("matrix", ROOT / "scripts" / "matrix.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["matrix"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)


def test_lower_bounds_are_those_that_the_tests_have_passed_with(matrix: ModuleType) -> None:
    lowest = json.loads(matrix.RECORD.read_text(encoding="utf-8"))["lowest"]
    asked = dict(line.split("==") for line in lowest["asked"])
    bounds = matrix.lower_bounds()
    assert {name: asked[name] for name in bounds} == bounds
    assert (lowest["outcome"], lowest["failed"]) == ("passed", [])
    assert lowest["passed"] > 2500
    for name, version in lowest["versions"].items():
        assert version.split("+")[0].startswith(asked.get(name, version)), name


def test_no_requirement_has_an_upper_bound(matrix: ModuleType) -> None:
    assert all(set(line) & set("<=!~") <= set(">=") and line.count("=") <= 1 for line in matrix.requirements())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ManifoldMixupCallback", "MixableModule", "inspect"])
def test_attaching_imports_nothing_that_only_commands_and_reports_need(name: str) -> None:
    hidden = ["hydra", "omegaconf", "matplotlib", "jinja2", "PIL", "tensorboard", "mm_lightning.diagnostics"]
    done = run(
        "import sys\nimport lightning.pytorch, pytorch_lightning, torchmetrics  # which may import matplotlib\n"
        f"for name in {hidden}: sys.modules[name] = None\nimport mm_lightning\nmm_lightning.{name}.__call__"
    )
    assert done.returncode == 0, done.stderr


DRAWN = "Diagnostics draw with matplotlib and Pillow"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("missing", "line", "said"),
    [
        ("matplotlib", "from mm_lightning.diagnostics import Calibration", DRAWN),
        ("PIL", "from mm_lightning.diagnostics import Calibration", DRAWN),
        ("jinja2", "import mm_lightning.study.report", "Reports are written with jinja2"),
    ],
)
def test_a_report_without_what_it_is_made_with_says_what_to_install(missing: str, line: str, said: str) -> None:
    done = run(f"import sys\nsys.modules['{missing}'] = None\n{line}")
    assert done.stderr.splitlines()[-1] == f"ImportError: {said}: pip install 'mm-lightning[report]'."


@pytest.mark.slow
def test_comparing_runs_needs_nothing_to_draw_with() -> None:
    hidden = ["matplotlib", "jinja2", "PIL", "scipy"]
    done = run(f"import sys\nfor name in {hidden}: sys.modules[name] = None\nimport mm_lightning.command.compare")
    assert done.returncode == 0, done.stderr


class Site:
    """An environment that holds packages in name alone, for the resolver."""

    def __init__(self, folder: Path) -> None:
        builder = venv.EnvBuilder(with_pip=False)
        context = builder.ensure_directories(folder)
        builder.create(folder)
        self.python = context.env_exe
        (self.packages,) = {*folder.glob("lib/python*/site-packages"), *folder.glob("Lib/site-packages")}

    def hold(self, versions: dict[str, str]) -> None:
        for name, version in versions.items():
            place = self.packages / f"{name.replace('-', '_')}-{version}.dist-info"
            place.mkdir()
            (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    def answer(self, *what: str | Path) -> set[str] | None:
        """What pip would install, offline; None if it would have to get something else."""
        report = self.packages / "report.json"
        command = [sys.executable, "-m", "pip", f"--python={self.python}", "install", "--dry-run", "--no-index"]
        command += ["--quiet", "--no-build-isolation", f"--report={report}", *map(str, what)]
        environment = {**os.environ, "PYTHONPATH": "", "PIP_CONFIG_FILE": os.devnull}  # which may cap versions
        if subprocess.run(command, capture_output=True, check=False, env=environment).returncode:
            return None
        return {entry["metadata"]["name"] for entry in json.loads(report.read_text())["install"]}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(ROOT)], check=True)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
@pytest.mark.parametrize("versions", ["lowest", "newer"])
def test_installing_replaces_nothing_that_is_new_enough(
    matrix: ModuleType, wheel: Path, tmp_path: Path, versions: str
) -> None:
    bounds = matrix.lower_bounds()
    site = Site(tmp_path / "site")
    site.hold({name: version if versions == "lowest" else "99.0" for name, version in bounds.items()} | {"scipy": "1"})
    assert site.answer(wheel) == {"mm-lightning"}
    assert site.answer(f"{wheel}[report]") == {"mm-lightning"}


@pytest.mark.slow
def test_a_version_below_the_bound_is_not_enough(matrix: ModuleType, wheel: Path, tmp_path: Path) -> None:
    site = Site(tmp_path / "site")
    site.hold({**matrix.lower_bounds(), "torch": "2.3.1"})
    assert site.answer(wheel) is None


@pytest.mark.slow
def test_constraints_leave_a_newer_torch_alone(matrix: ModuleType, wheel: Path, tmp_path: Path) -> None:
    lines = [line.partition(";")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pinned = dict(line.split("==") for line in reversed(lines) if "==" in line and not line.startswith("#"))
    pinned = {name.lower(): version for name, version in pinned.items()}
    site = Site(tmp_path / "site")
    site.hold({**{name: pinned[name] for name in [*matrix.lower_bounds(), "scipy"] if name in pinned}, "torch": "99.0"})
    assert site.answer("-c", ROOT / "constraints.txt", f"{wheel}[report]") == {"mm-lightning"}
