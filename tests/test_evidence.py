"""The script of docs/evidence.md: its tables against numbers worked out by hand, its runs against the command's."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mm_lightning.command.train import run


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scipy")
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))


@pytest.fixture
def evidence() -> Any:
    return import_module("evidence")


@pytest.fixture
def images() -> Any:
    return import_module("evidence_images")


@pytest.fixture
def small() -> Any:
    return import_module("evidence_small")


def acc(*values: float) -> dict[str, dict[str, float]]:
    return {str(seed): {"acc": value, "nll": 1 - value} for seed, value in enumerate(values)}


# --- tables ---


def test_a_difference_is_paired_by_seed_and_has_students_interval() -> None:
    tables = import_module("evidence_tables")
    # differences 2, 3 and 4 points: mean 3, deviation 1, t of 2 degrees 4.3027: 4.3027 / sqrt(3) = 2.4841
    runs = {"none": acc(0.50, 0.60, 0.70), "input": acc(0.52, 0.63, 0.74)}
    assert tables.ACCURACY.over(runs, "input", "none") == "**+3.00 ± 2.48**"
    assert tables.NLL.over(runs, "input", "none") == "**−0.030 ± 0.025**"
    assert tables.ACCURACY.over(runs, "none", "none") == ""


def test_seeds_that_only_one_has_are_left_out_of_a_difference() -> None:
    tables = import_module("evidence_tables")
    runs = {"none": acc(0.50, 0.60, 0.70), "input": acc(0.52, 0.63)}
    # 2 and 3: mean 2.5, deviation 0.7071, t of 1 degree 12.7062: 12.7062 * 0.7071 / sqrt(2) = 6.3531
    assert tables.ACCURACY.over(runs, "input", "none").startswith("+2.50 ± 6.35")
    assert tables.ACCURACY.over({**runs, "input": acc(0.52)}, "input", "none") == ""
    # and it has no line, nor its mean over other data
    assert list(tables.finished(runs)) == ["none"]


def test_methods_stand_by_their_accuracy_with_temperature() -> None:
    tables = import_module("evidence_tables")
    runs = {
        name: {"0": {"acc": value, "ece": 0.1, "temperature": 1.0}, "1": {"acc": value, "ece": 0.1, "temperature": 2.0}}
        for name, value in (("none", 0.4), ("label smoothing", 0.5))
    }
    lines = tables.of_methods(runs, [tables.ECE], with_temperature=True).splitlines()
    assert lines[2] == "| label smoothing | 0.100 | +0.000 ± 0.000 (no difference) | 1.50 |"
    assert lines[3] == "| none | 0.100 |  | 1.50 |"


def test_a_part_says_what_made_it() -> None:
    tables = import_module("evidence_tables")
    made_with = [{"python": "3.11.7", "git_revision": "0123456789", "packages": {"torch": "2.13.0", "rich": "1"}}]
    runs = {"wine": {"none": {"0": {"seconds": 10.0}, "1": {"seconds": 14.0}}, "input": {"0": {"seconds": 30.0}}}}
    content = {"small": {"command": "small", "made_with": made_with, "runs": runs}}
    assert "| `small` | 3 | 14 | Python 3.11.7, torch 2.13.0 | 0123456 |" in tables.made_with(content)
    runs["wine"] = {"none": {"0": {"acc": 1.0}}}
    assert "| `small` | 1 | – |" in tables.made_with(content)


def test_candidates_are_held_against_the_best_of_each_task() -> None:
    tables = import_module("evidence_tables")
    by_task = {
        "wine": {"auto, alpha 2": acc(0.90, 0.91, 0.92), "input, alpha 2": acc(0.80, 0.81, 0.85)},
        "digits": {"auto, alpha 2": acc(0.90, 0.99, 0.92), "input, alpha 2": acc(0.93, 0.95, 0.99)},
    }
    lines = tables.of_defaults(by_task, tables.ACCURACY).splitlines()
    assert lines[0] == "|  | wine | digits | not worse than the best |"
    of_name = {line.split(" | ")[0].strip("| "): line for line in lines}
    # −10, −10 and −7: mean −9, deviation 1.7321: ± 4.3027; 3, −4 and 7 leave the other open
    assert of_name["input, alpha 2"] == "| input, alpha 2 | −9.00 ± 4.30 (worse) | best | 1 of 2 |"
    assert of_name["auto, alpha 2"] == "| auto, alpha 2 | best | −2.00 ± 13.83 | 2 of 2 |"
    assert of_name["auto, alpha 1"] == "| auto, alpha 1 | – | – | 0 of 0 |"


def test_candidates_are_held_against_the_default() -> None:
    tables = import_module("evidence_tables")
    by_task = {"wine": {"auto, alpha 2": acc(0.50, 0.60, 0.70), "input, alpha 2": acc(0.52, 0.63, 0.74)}}
    lines = tables.over_default(by_task, tables.ACCURACY).splitlines()
    assert "| input, alpha 2 | **+3.00 ± 2.48** |" in lines
    assert "| auto, alpha 1 | – |" in lines
    assert not any(line.startswith("| auto, alpha 2 |") for line in lines)


def test_the_page_gets_each_table_in_its_place(evidence: Any, tmp_path: Path) -> None:
    page, marker = tmp_path / "page.md", "<!-- one: made by python scripts/evidence.py -->\n"
    page.write_text(f"before\n{marker}old\n{marker}after\n", encoding="utf-8")
    evidence.write_page(page, {"one": "| new |"})
    assert page.read_text(encoding="utf-8") == f"before\n{marker}| new |\n{marker}after\n"
    with pytest.raises(ValueError, match=r"must hold the line .*two: made by.* twice, got 0"):
        evidence.write_page(page, {"two": ""})


def test_the_pages_tables_are_those_of_the_results(evidence: Any, tmp_path: Path) -> None:
    page = tmp_path / "evidence.md"
    text = evidence.PAGE.read_text(encoding="utf-8")
    page.write_text(text, encoding="utf-8")
    evidence.write_page(page, {**evidence.tables(evidence.read(evidence.RESULTS)), "commands": evidence.commands()})
    assert page.read_text(encoding="utf-8") == text


# --- runs ---


def test_what_is_there_is_not_run_again(evidence: Any, tmp_path: Path) -> None:
    results, made = tmp_path / "results.json", []

    def runs(fails_at: int) -> Any:
        for seed in range(3):

            def score(seed: int = seed) -> dict[str, float]:
                if seed == fails_at:
                    raise RuntimeError("interrupted")
                made.append(seed)
                return {"acc": seed / 3}

            yield "wine", "none", seed, score

    with pytest.raises(RuntimeError, match="interrupted"):
        evidence.run_all(results, "small", "command", runs(fails_at=1))
    evidence.run_all(results, "small", "command", runs(fails_at=-1))
    assert made == [0, 1, 2]
    content = json.loads(results.read_text(encoding="utf-8"))["small"]
    assert content["runs"] == {"wine": {"none": {"0": {"acc": 0.0}, "1": {"acc": 0.33333}, "2": {"acc": 0.66667}}}}
    assert content["command"] == "command"
    assert [made_with["packages"]["torch"] for made_with in content["made_with"]] == [torch.__version__]


def test_every_way_but_tokens_is_among_the_methods(images: Any) -> None:
    files = {path.stem for path in (images.CONF / "mixup").glob("*.yaml")} - {"tokens"}
    assert files <= set(images.METHODS)
    assert [name for group in images.IMAGES["images_100"].methods for name in group] == list(images.METHODS)


def test_the_temperature_is_the_one_that_was_hidden(images: Any) -> None:
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 4, generator=rng, dtype=torch.float64)
    targets = torch.multinomial(logits.softmax(dim=1), 1, generator=rng)[:, 0]
    assert images.fitted_temperature(3 * logits, targets) == pytest.approx(3, rel=0.03)
    assert images.fitted_temperature(0.5 * logits, targets) == pytest.approx(0.5, rel=0.03)


def test_rows_are_the_first_of_each_class(images: Any) -> None:
    assert images.rows_of_each_class(torch.tensor([1, 0, 1, 1, 0, 0]), 2).tolist() == [0, 1, 2, 4]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 2)):
        for k in range(10):
            place = tmp_path / "pictures" / split / f"class {k}"
            place.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(place / f"{i}.jpg")
    return tmp_path / "pictures"


def test_a_run_is_the_one_that_the_command_makes(
    images: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "HELD_OUT", 2)
    few = replace(images.IMAGES["images_100"], per_class=3, of_class=6, epochs=1, width=2)
    with images.one_process(few, folder):
        found = {name: images.score(few, folder, name, 1) for name in ("manifold", "label smoothing", "none")}
    with images.initialize_config_dir(str(images.CONF), version_base="1.3"):
        for name, own in found.items():
            config = images.composed(few.arguments(folder, name, 1))
            config.run_dir = str(tmp_path / name)
            metrics = run(config)
            assert {key: metrics[f"test/{key}"] for key in ("acc", "nll", "ece")} == {
                key: own[key] for key in ("acc", "nll", "ece")
            }
            # a smoothed loss: a tenth of it is the mean over the classes
            assert (metrics["test/loss"] != metrics["test/nll"]) == (name == "label smoothing")
    assert len({own["nll"] for own in found.values()}) == 3
    assert all(0.05 < own["temperature"] < 20 and own["seconds"] > 0 for own in found.values())


# --- small data ---


def test_series_are_those_of_the_formula(small: Any) -> None:
    x, y, test_x, test_y = small.cylinder_bell_funnel(0, train=3000, test=3)
    assert (tuple(x.shape), tuple(test_x.shape)) == ((3000, 1, 128), (3, 1, 128))
    assert torch.bincount(y).tolist() == [1000, 1000, 1000]
    assert test_y.tolist() == [0, 1, 2]
    means = torch.stack([x[y == k, 0].mean(dim=0) for k in range(3)])
    # before t = 16 and after t = 128 nothing but noise; from t = 33 to 48 every shape has begun and none has ended
    noise = 4 / math.sqrt(1000)
    assert means[:, :15].abs().max() < 1.2 * noise
    torch.testing.assert_close(means[0, 32:47], torch.full((15,), 6.0), atol=1.2 * noise, rtol=0)
    # a bell and a funnel of the same place add up to a cylinder
    torch.testing.assert_close(means[1, 32:47] + means[2, 32:47], torch.full((15,), 6.0), atol=0.5, rtol=0)
    assert means[1, 40] < means[1, 60]
    assert means[2, 40] > means[2, 60]


def test_a_split_is_the_seeds_and_has_no_row_twice(small: Any) -> None:
    load = small.TASKS["wine"].load
    x, y, test_x, _ = load(0)
    assert (len(x), len(test_x)) == (89, 89)
    assert len(torch.cat([x, test_x]).unique(dim=0)) == len(small.datasets.load_wine().data)
    torch.testing.assert_close(x.mean(dim=0), torch.zeros(13), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(dim=0, unbiased=False), torch.ones(13))
    torch.testing.assert_close(load(0)[0], x)
    assert not torch.equal(load(1)[1], y)


def test_sentences_of_one_package_name_no_package(small: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "scipy"
    (package / "tests").mkdir(parents=True)
    (package / "a.py").write_text(
        'def f():\n    """Compute with scipy the mean of all rows. More of it.\n\n    Even more.\n    """\n'
        'def g():\n    """Too short."""\n'
    )
    (package / "tests" / "b.py").write_text('"""This sentence stands in a folder of tests."""\n')
    monkeypatch.setattr(small.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path), "purelib": str(tmp_path)})
    small.first_sentences.cache_clear()
    try:
        assert small.first_sentences("scipy") == (("compute", "with", "the", "mean", "of", "all", "rows"),)
    finally:
        small.first_sentences.cache_clear()


@pytest.mark.parametrize("name", ["wine", "diabetes", "cylinder, bell, funnel"])
def test_mixing_finds_layers_and_trains_every_network(small: Any, name: str) -> None:
    task = replace(small.TASKS[name], epochs=4)
    found = {method: small.score(task, small.METHODS[method], 0) for method in task.methods}
    keys = {"mse", "r2"} if task.is_number else {"acc", "nll", "ece"}
    assert all(set(numbers) == keys for numbers in found.values())
    # no method is another one by mistake
    key = "mse" if task.is_number else "nll"
    assert len({numbers[key] for numbers in found.values()}) == len(task.methods)
    assert small.score(task, small.METHODS["auto, alpha 2"], 0) == found["auto, alpha 2"]
