"""Runs side by side, from folders made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mm_lightning.command.compare import compare, finished_runs
from mm_lightning.study.form import Measure
from mm_lightning.study.markdown import heading, markdown


def make(root: Path, place: str, overrides: list[str], acc: float, seed: int = 0, **settings: Any) -> Path:
    folder = root / place
    folder.mkdir(parents=True)
    config = {
        **{"name": "mine", "seed": seed, "run_dir": str(folder), "mixup": {"alpha": 1.0, "seed": seed}},
        **{"data": {"seed": seed}, "logger": {"save_dir": str(folder)}, "trainer": {"limit": None}, **settings},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    metrics = {"test/acc": acc, "train/loss": 1.0}
    content = {"seed": seed, "overrides": [*overrides, f"seed={seed}"], "metrics": metrics}
    (folder / "metrics.json").write_text(json.dumps({**content, "total_seconds": 2.0, "epochs": 1}))
    return folder


def columns(folders: list[Path]) -> dict[str, list[float | None]]:
    (experiment,) = compare(folders)
    titles = {method["name"]: method["title"] for method in experiment["methods"]}
    return {titles[cell["method"]]: cell["values"] for cell in experiment["cells"]}


def test_runs_that_differ_in_the_seed_are_one_column(tmp_path: Path) -> None:
    folders = [make(tmp_path, f"a{seed}", ["alpha=1"], 0.5 + seed, seed) for seed in range(2)]
    folders.append(make(tmp_path, "b", ["alpha=2"], 0.25, mixup={"alpha": 2.0}))
    assert columns(folders) == {"alpha=1": [0.5, 1.5], "alpha=2": [0.25]}


def test_what_only_watches_makes_no_column(tmp_path: Path) -> None:
    folders = [
        make(tmp_path, "a", ["logger=csv"], 0.5),
        make(tmp_path, "b", [], 0.7, 1, logger=None, diagnostics={"x": 1}),
    ]
    assert columns(folders) == {"as configured": [0.5, 0.7]}


def test_the_run_that_has_downloaded_the_data_is_one_of_them(tmp_path: Path) -> None:
    given: dict[str, Any] = {"root": "data", "num_validation": 0}
    folders = [
        make(tmp_path, "a", ["data.root=data", "data.download=true"], 0.5, data={**given, "download": True, "seed": 0}),
        make(tmp_path, "b", ["data.root=data"], 0.7, 1, data={**given, "download": False, "seed": 1}),
    ]
    assert columns(folders) == {"data.root=data": [0.5, 0.7]}


def test_cut_short_run_is_not_another_seed(tmp_path: Path) -> None:
    folders = [make(tmp_path, "a", [], 0.5), make(tmp_path, "b", ["trainer=smoke"], 0.1, 1, trainer={"limit": 20})]
    assert columns(folders) == {"trainer.limit=None": [0.5], "trainer.limit=20": [0.1]}


def test_what_all_were_given_names_no_column(tmp_path: Path) -> None:
    given = ["data=spirals", "max_epochs=3"]
    folders = [make(tmp_path, f"a{i}", [f"alpha={i}", *given], float(i), mixup={"alpha": i}) for i in (1, 2)]
    assert columns(folders) == {"alpha=1": [1.0], "alpha=2": [2.0]}
    folders = [make(tmp_path, "b1", given, 1.0), make(tmp_path, "b2", [*given, "x=2"], 2.0, mixup={"alpha": 2.0})]
    assert columns(folders) == {"mixup.alpha=1.0": [1.0], "mixup.alpha=2.0": [2.0]}


def test_table_holds_mean_and_deviation(tmp_path: Path) -> None:
    folders = [make(tmp_path, f"a{seed}", ["alpha=1"], acc, seed) for seed, acc in enumerate([0.5, 0.7, 0.9])]
    (experiment,) = compare(folders)
    assert experiment["schedules"][0]["seconds_per_run"] == 2.0
    assert markdown(experiment).splitlines() == [
        "## mine",
        "",
        "|  | alpha=1 |",
        "| --- | --- |",
        "| test/acc ↑ | 0.7000 ± 0.2000 |",
        "",
        "Seeds: alpha=1: 0 1 2.",
    ]


def sweep(root: Path, accuracies: dict[int, dict[int, float]]) -> list[Path]:
    """Runs by alpha and seed."""
    return [
        make(root, f"{alpha}/{seed}", [f"alpha={alpha}"], acc, seed, mixup={"alpha": alpha})
        for alpha, seeds in accuracies.items()
        for seed, acc in seeds.items()
    ]


def test_columns_are_held_against_the_first_seed_by_seed(tmp_path: Path) -> None:
    first = {0: 0.50, 1: 0.60, 2: 0.70}
    runs = sweep(
        tmp_path,
        {
            1: first,
            2: {0: 0.53, 1: 0.64, 2: 0.75},  # 0.03, 0.04, 0.05: 0.04 ± 4.302653 * 0.01 / sqrt(3)
            3: {0: 0.52, 1: 0.63, 2: 0.74},  # 0.02, 0.03, 0.04
            4: {2: 0.65, 0: 0.43, 1: 0.54, 3: 0.99},  # -0.07, -0.06, -0.05; the last one is alone
            5: {0: 0.501, 1: 0.600, 2: 0.699},
            6: first,
        },
    )
    (experiment,) = compare(runs)
    assert markdown(experiment).splitlines()[4:] == [
        "| test/acc ↑ | 0.6000 ± 0.1000 | 0.6400 ± 0.1100 | 0.6300 ± 0.1100 | 0.6525 ± 0.2423 | 0.6000 ± 0.0990 "
        "| 0.6000 ± 0.1000 |",
        "",
        "Seeds: alpha=1: 0 1 2, alpha=2: 0 1 2, alpha=3: 0 1 2, alpha=4: 2 0 1 3, alpha=5: 0 1 2, alpha=6: 0 1 2.",
        "",
        "Against alpha=1: the mean of the differences, paired by seed, ± half its 95 % interval (Student's t); not "
        "corrected for the number of intervals.",
        "",
        "|  | alpha=2 | alpha=3 | alpha=4 | alpha=5 | alpha=6 |",
        "| --- | --- | --- | --- | --- | --- |",
        "| test/acc ↑ | +0.0400 ± 0.0248, better | +0.0300 ± 0.0248, better | −0.0600 ± 0.0248, worse "
        "| 0.0000 ± 0.0025, no difference larger than 0.005 | 0.0000 ± 0.0000, no difference larger than 0.005 |",
        "",
        "Left out, as only one of both has these seeds: alpha=4: 3.",
    ]


def test_what_three_seeds_cannot_tell_is_not_distinguishable(tmp_path: Path) -> None:
    (experiment,) = compare(sweep(tmp_path, {1: {0: 0.5, 1: 0.6, 2: 0.7}, 2: {0: 0.51, 1: 0.62, 2: 0.73}}))
    text = markdown(experiment)
    assert "| test/acc ↑ | +0.0200 ± 0.0248, not distinguishable (5 seeds needed) |" in text
    assert "**" not in text  # though higher in every seed


def test_what_is_better_than_every_other_column_is_bold(tmp_path: Path) -> None:
    (experiment,) = compare(sweep(tmp_path, {1: {0: 0.5, 1: 0.6, 2: 0.7}, 2: {0: 0.53, 1: 0.64, 2: 0.75}}))
    assert "| test/acc ↑ | 0.6000 ± 0.1000 | **0.6400 ± 0.1100** |" in markdown(experiment)


def test_one_seed_tells_nothing(tmp_path: Path) -> None:
    (experiment,) = compare(sweep(tmp_path, {1: {0: 0.5}, 2: {0: 0.6}}))
    assert markdown(experiment).splitlines()[-1] == (
        "One seed tells nothing about a difference. Train several, as with -m seed=0,1,2,3,4."
    )


def test_runs_without_a_seed_in_common_are_not_compared(tmp_path: Path) -> None:
    (experiment,) = compare(sweep(tmp_path, {1: {0: 0.5, 1: 0.6}, 2: {2: 0.6, 3: 0.7}}))
    assert experiment["verdicts"] == []
    assert markdown(experiment).splitlines()[-1] == (
        "alpha=2 has no seed in common with alpha=1, so they are not compared. Train both with the same seeds."
    )


def test_known_experiment_has_its_own_measures(tmp_path: Path) -> None:
    folders = [make(tmp_path, "a", [], 0.5)]
    config = yaml.safe_load((folders[0] / "config.yaml").read_text())
    (folders[0] / "config.yaml").write_text(yaml.safe_dump({**config, "name": "spiral"}))
    metrics = json.loads((folders[0] / "metrics.json").read_text())
    metrics["metrics"]["test/low_confidence"] = 0.25
    (folders[0] / "metrics.json").write_text(json.dumps(metrics))
    (experiment,) = compare(folders)
    assert "| plane below 0.9, % ↑ | 25.0 |" in markdown(experiment)
    assert "| test accuracy, % ↑ | 50.00 |" in markdown(experiment)


def test_experiments_have_a_table_each(tmp_path: Path) -> None:
    folders = [make(tmp_path, "a", [], 0.5), make(tmp_path, "b", [], 0.5, name="other")]
    assert [experiment["name"] for experiment in compare(folders)] == ["mine", "other"]


def test_mistakes_are_named(tmp_path: Path) -> None:
    twins = [make(tmp_path, "a", [], 0.5), make(tmp_path, "b", [], 0.6)]
    with pytest.raises(ValueError, match=r"a and .*b are the same mine with seed 0, as configured. Name only one"):
        compare(twins)
    (twins[0] / "metrics.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"a holds no metrics\.json, so no finished run"):
        compare(twins)
    untested = make(tmp_path, "c", [], 0.5)
    (untested / "metrics.json").write_text(json.dumps({"seed": 0, "metrics": {}, "total_seconds": 1, "epochs": 1}))
    with pytest.raises(ValueError, match=r"The runs of mine have no test/\.\.\. number"):
        compare([untested])


def test_heading_points_to_the_better_side() -> None:
    measure = Measure(key="k", title="time", unit="s", factor=1, digits=0, better="lower", meaning="", margin=None)
    assert heading(measure) == "time, s ↓"
    assert heading({**measure, "unit": "", "better": None}) == "time"


def test_a_folder_of_ones_own_describes_measures(tmp_path: Path) -> None:
    folders = [make(tmp_path, "a", [], 0.5)]
    (tmp_path / "own" / "reproduction").mkdir(parents=True)
    about = {"title": "hits", "unit": "%", "factor": 100, "digits": 1, "better": "higher", "meaning": "Share of hits."}
    described = {"mine": {"measures": {"test/acc": {**about, "claim": True}}}}
    (tmp_path / "own" / "reproduction" / "mine.yaml").write_text(yaml.safe_dump(described))
    (experiment,) = compare(folders, tmp_path / "own")
    assert "| hits, % ↑ | 50.0 |" in markdown(experiment)
    with pytest.raises(FileNotFoundError, match=r"config_dir 'nowhere' is not a folder\. Name one, or leave it out\."):
        compare(folders, Path("nowhere"))


def test_a_folder_of_a_sweep_stands_for_its_finished_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make(tmp_path, f"multirun/mine/date/{i}_seed-{i}", [], 0.5, i) for i in (0, 2, 10)]
    cut_short = tmp_path / "multirun/mine/date/3_seed-3"
    (cut_short / ".hydra").mkdir(parents=True)
    for folder in (cut_short, cut_short / ".hydra"):
        (folder / "config.yaml").touch()
    assert finished_runs([tmp_path / "multirun"]) == runs
    assert capsys.readouterr().err == f"Left out, not finished: {cut_short}\n"
    assert finished_runs([runs[1], tmp_path / "multirun/mine/date"]) == [runs[1], runs[0], runs[2]]
    (experiment,) = compare(finished_runs([tmp_path / "multirun"]))
    assert [run["seed"] for run in experiment["runs"]] == [0, 2, 10]
    with pytest.raises(FileNotFoundError, match=r"holds no metrics\.json, so no finished run"):
        compare(finished_runs([tmp_path / "elsewhere"]))
