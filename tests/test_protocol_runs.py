"""scripts/protocol_runs.py: the data it writes, the commands it types, and what it keeps of runs."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from mm_lightning.command.checks import check_config
from mm_lightning.command.configuration import CONF

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("protocol_runs")


def test_jpeg_files_become_records_of_label_and_planes(tmp_path: Path) -> None:
    for split, count in (("train", 5), ("test", 1)):
        for label, name in enumerate(("ape", "bee")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (32, 32), (10 * i, 100, 200 + label)).save(folder / f"{i}.jpg", quality=100)
    line = [sys.executable, str(SCRIPTS / "protocol_runs.py"), "binary", str(tmp_path), str(tmp_path / "to")]
    subprocess.run(line, check=True, timeout=120)
    official = tmp_path / "to" / "cifar-10-batches-bin"
    assert (official / "batches.meta.txt").read_text() == "ape\nbee\n"
    read = [np.frombuffer((official / f"data_batch_{i}.bin").read_bytes(), np.uint8) for i in range(1, 6)]
    rows = np.concatenate([part.reshape(-1, 3073) for part in read])
    assert rows[:, 0].tolist() == [0] * 5 + [1] * 5
    first = rows[3, 1:].reshape(3, 1024).astype(int)  # of the fourth ape
    assert np.abs(first - [[30], [100], [200]]).max() <= 2  # JPEG is lossy
    test = np.frombuffer((official / "test_batch.bin").read_bytes(), np.uint8).reshape(-1, 3073)
    assert test[:, 0].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("method", "alpha", "layers", "has_end"),
    [
        ("none", None, None, False),
        ("input", 1.0, "input", False),
        ("manifold", 2.0, 3, False),
        ("manifold_until80", 2.0, 3, True),
    ],
)
def test_each_command_is_the_experiment_shortened(
    method: str, alpha: Any, layers: Any, has_end: bool, runs: Any
) -> None:
    words = runs.command(method, seed=3, epochs=26, more=["data.flip=false"])
    assert words[:3] == ["python", "-m", "mm_lightning.train"]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("train", [*words[3:], "trainer=cpu", "run_dir=."])
    check_config(config)
    assert (config.trainer.max_epochs, list(config.scheduler.milestones), config.seed) == (26, [13, 19], 3)
    assert (config.data.flip, config.loss._target_) == (False, "mm_lightning.losses.SoftmaxBCE")
    mixed = OmegaConf.to_container(config.mixup, resolve=True) or {}
    assert (mixed.get("alpha"), mixed.get("schedule") is not None) == (alpha, has_end)
    found = mixed.get("layers")
    assert (len(found) if isinstance(found, list) else found) == layers


def test_runs_that_fail_or_last_too_long_are_kept_as_such(runs: Any, tmp_path: Path) -> None:
    fails = ["python", "-c", "raise SystemExit('no GPU')"]
    lasts = ["python", "-c", "import time; time.sleep(60)"]
    begin = time.monotonic()
    failed, stopped = runs.train_at_once({"fails": fails, "lasts": lasts}, tmp_path, begin + 3)
    assert time.monotonic() - begin < 30
    assert (failed["method"], failed["metrics"], failed["failed"]) == ("fails", {}, "no GPU\n")
    assert (stopped["method"], stopped["failed"]) == ("lasts", "")
    (ended,) = runs.train_at_once({"ends": ["python", "-c", "pass"]}, tmp_path, math.inf)
    assert "failed" not in ended


def test_the_table_has_a_line_for_each_run_that_was_tested(runs: Any) -> None:
    metrics = {"test/acc": 0.9, "test/acc_median2": 0.8, "test/nll": 0.25, "test/ece": 0.0625, "train/acc_mixed": 0.5}
    made = [
        {"method": "none", "seed": 1, "metrics": metrics},
        {"method": "input", "seed": 1, "metrics": {}},  # stopped before its test
        {"method": "manifold", "seed": 1, "metrics": {**metrics, "test/nll": None}},
    ]
    assert runs.table(made).splitlines()[2:] == [
        "| none | 1 | 90.00 | 80.00 | 0.250 | 0.062 | 50.00 |",
        "| manifold | 1 | 90.00 | 80.00 | no number | 0.062 | 50.00 |",
    ]


def test_a_loss_that_is_no_number_is_kept_as_none(runs: Any, tmp_path: Path) -> None:
    logged = "import sys, pathlib; f = pathlib.Path(sys.argv[-1].split('=')[1], 'csv'); f.mkdir(parents=True); "
    logged += "(f / 'metrics.csv').write_text('step,train/loss,val/acc\\n0,1.5,\\n1,nan,\\n2,,0.25\\n')"
    (made,) = runs.train_at_once({"none": ["python", "-c", logged]}, tmp_path, math.inf)
    assert made["curves"] == {"val/acc": [0.25], "val/nll": [], "train/loss": [1.5, None]}


def test_a_method_that_there_is_not_is_refused(tmp_path: Path) -> None:
    line = [sys.executable, str(SCRIPTS / "protocol_runs.py"), "train", str(tmp_path), "--methods", "none,both"]
    finished = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert finished.stderr == "--methods must be of none, input, manifold, manifold_until80, got both.\n"
