"""The README's Python, run as it stands there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from versions import has_onednn

import mm_lightning
from mm_lightning import ManifoldMixupCallback, fast_cpu

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
HEADINGS = [line for line in README.splitlines() if line.startswith("## ")]
_SETUP = ConfigParser()
_SETUP.read(ROOT / "setup.cfg", encoding="utf-8")
SETTINGS = _SETUP["metadata"]
REPOSITORY = SETTINGS["url"]
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


class Module(pl.LightningModule):
    """A module as a reader has one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1, self.layer2, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.head(torch.relu(self.layer2(torch.relu(self.layer1(x))))), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _run(block: str, **given: Any) -> dict[str, Any]:
    names = dict(given)
    exec(compile(block, "README.md", "exec"), names)
    return names


def test_the_readme_has_six_examples() -> None:
    assert len(BLOCKS) == 6


def test_the_callback_example_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = DataLoader(TensorDataset(torch.randn(32, 4), torch.randint(0, 3, (32,))), batch_size=8)
    block = BLOCKS[0].replace("Trainer(", "Trainer(logger=False, enable_progress_bar=False, accelerator='cpu', ")
    names = _run(block, your_module=Module(), your_dataloader=data)
    assert names["trainer"].global_step == 40
    (mixup,) = [part for part in names["trainer"].callbacks if isinstance(part, ManifoldMixupCallback)]
    assert mixup.summary().keys() == {"input", "layer1", "unmixed"}
    assert sum(mixup.summary().values()) == 40


def test_the_inspection_example_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    data = DataLoader(TensorDataset(torch.randn(32, 4), torch.randint(0, 3, (32,))), batch_size=8)
    _run(BLOCKS[1], your_module=Module(), your_dataloader=data)
    assert capsys.readouterr().out.endswith("layers=\"auto\" mixes at 'input', 'layer1'.\n")


class Validated(Module):
    """The same with validation."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)


def test_the_diagnostics_example_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = DataLoader(TensorDataset(torch.randn(32, 4), torch.arange(32) % 3), batch_size=8)
    block = BLOCKS[3].replace("Trainer(", "Trainer(logger=False, enable_progress_bar=False, accelerator='cpu', ")
    names = _run(block, your_module=Validated(), your_dataloader=data, your_validation_dataloader=data)
    for name in ("hidden_space", "spectrum", "calibration"):
        assert next(tmp_path.rglob(f"{name}_val.png")).stat().st_size > 10_000
    tags = "val/spread_ratio val/davies_bouldin val/nearest_mean_margin val/spectrum/layer1/largest val/calibration/ece"
    assert set(tags.split()) <= set(names["trainer"].callback_metrics)


@has_onednn
def test_the_fast_cpu_example_trains_with_the_faster_products(
    make_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, kept = [], []

    class Watched(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen.append(torch.get_float32_matmul_precision())
            return super().training_step(batch, batch_idx)

    monkeypatch.setattr(fast_cpu, "keep_freed_memory", lambda: kept.append(True))
    monkeypatch.setattr(fast_cpu, "products_are_exact", lambda: True)
    data = DataLoader(TensorDataset(torch.randn(32, 4), torch.arange(32) % 3), batch_size=8)
    _run(BLOCKS[2], trainer=make_trainer(), your_module=Watched(), your_dataloader=data)
    assert (seen, kept) == (["medium"] * 4, [True])
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_module_example_trains(make_trainer: Any) -> None:
    names = _run(BLOCKS[4])
    data = DataLoader(TensorDataset(torch.randn(32, 1, 28, 28), torch.randint(0, 10, (32,))), batch_size=8)
    make_trainer(names["mixup"]).fit(names["model"], data)
    assert names["mixup"].layer_names == ("input", "mix_before.1")


def test_the_loop_example_has_the_gradient_of_the_formula() -> None:
    torch.manual_seed(0)
    blocks = [nn.Linear(4, 5).double(), nn.Tanh(), nn.Linear(5, 3).double()]
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(0, 3, (6,))
    plan = _run(BLOCKS[5], batches=[(x, y)], blocks=blocks)["plan"]
    got = blocks[0].weight.grad.clone()

    lam, hidden = float(plan.lam[0]), x
    for name, block in zip(["input", "block1", "block2"], blocks, strict=True):
        if plan.layer == name:
            hidden = lam * hidden + (1 - lam) * hidden[plan.partner]
        hidden = block(hidden)
    loss = lam * F.cross_entropy(hidden, y) + (1 - lam) * F.cross_entropy(hidden, y[plan.partner])
    torch.testing.assert_close(got, torch.autograd.grad(loss, blocks[0].weight)[0], rtol=0, atol=1e-12)


def test_the_tables_are_those_of_the_study() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "readme_tables.py"), str(ROOT / "docs/results/reproduction.json")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().split("\n\n")
    assert len(printed) == 3
    for table in printed:
        assert table in README


def test_the_verdicts_are_those_of_the_runs(tmp_path: Path) -> None:
    path = tmp_path / "study.json"
    path.write_bytes((ROOT / "docs/results/reproduction.json").read_bytes())
    subprocess.run([sys.executable, str(ROOT / "scripts" / "readme_tables.py"), "--judge", str(path)], check=True)
    assert _rounded(json.loads(path.read_bytes())) == _rounded(
        json.loads((ROOT / "docs/results/reproduction.json").read_bytes())
    )


def _rounded(study: Any) -> Any:
    """Leave to the platform the last digits of what it computes."""
    return json.loads(json.dumps(study), parse_float=lambda text: f"{float(text):.9g}")


def test_links_and_pictures_resolve_anywhere_and_name_files_that_are_there() -> None:
    # a package index shows this page too, where a relative link leads nowhere
    files: dict[str, list[Path]] = {"blob": [], "raw": []}
    for shown, link in re.findall(r"(!?)\[[^]]*\]\(([^)]+)\)", README):
        if link.startswith("#"):
            assert f"## {link[1:]}".replace("-", " ") in [line.lower().replace(",", "") for line in HEADINGS]
        elif link.startswith(REPOSITORY):
            kind, branch, name = link.removeprefix(f"{REPOSITORY}/").split("/", 2)
            assert (kind, branch) == ("raw" if shown else "blob", "main")
            files[kind].append(ROOT / name)
        else:
            assert not shown
            assert link.startswith("https://")
            assert "github" not in link
    assert len(files["blob"]) > 4
    assert len(files["raw"]) == 3
    assert all(path.is_file() for path in files["blob"])
    assert all(path.stat().st_size < 600_000 for path in files["raw"])


def test_everything_names_one_repository_and_one_version() -> None:
    for link in SETTINGS["project_urls"].split("\n")[1:]:
        assert link.partition(" = ")[2] == REPOSITORY or link.partition(" = ")[2].startswith(f"{REPOSITORY}/")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["repository-code"] == REPOSITORY
    changes = re.search(r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert changes
    assert citation["version"] == changes[1] == mm_lightning.__version__
