from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from numpy.testing import assert_allclose

SCRIPTS = Path(__file__).parents[1] / "scripts"
MACHINE = {
    "threads": 2,
    "processor": "Some CPU, AVX2",
    "python": "3.12.1",
    "platform": "Linux-6",
    "processors": 4,
    "packages": {"torch": "2.13.0", "lightning": "2.6.6"},
    "git_revision": "0123456789abcdef",
}


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("bench.report")
    passages = tmp_path / "commentary.md"
    passages.write_text("<!-- How to write here. -->\n")
    monkeypatch.setattr(module, "COMMENTARY", passages)
    return module


@pytest.fixture
def plots(report: Any) -> Any:
    return importlib.import_module("bench.plots")


def _row(case: str, against: str, seconds: dict[str, list[float]], targets: Any = None, **facts: Any) -> dict[str, Any]:
    """A row as of ``timing.compare``, its quartiles by sorting: of five runs the second, third and fourth."""
    ratios = {}
    for side in seconds.keys() - {against}:
        low, lower, median, upper, high = sorted(
            one / other for one, other in zip(seconds[side], seconds[against], strict=True)
        )
        ratios[side] = {"lower_quartile": lower, "median": median, "upper_quartile": upper, "min": low, "max": high}
    return {
        "case": case,
        "against": against,
        **facts,
        "seconds": seconds,
        "median_seconds": {side: sorted(runs)[2] for side, runs in seconds.items()},
        "ratios": {side: ratios[side] for side in seconds if side != against},
        "targets": targets or {},
    }


STEP = _row(
    "MLP",
    "no mixup",
    {
        "no mixup": [0.010] * 5,
        "ManifoldMixupCallback": [0.0100, 0.0101, 0.0102, 0.0103, 0.0110],
        "textbook": [0.03] * 5,
    },
    {"ManifoldMixupCallback": 1.03},
)
MIX = {
    "copies": [0.001] * 5,
    "mix": [0.0012, 0.0013, 0.0014, 0.0015, 0.0016],
    "textbook": [0.0030, 0.0031, 0.0032, 0.0033, 0.0034],
}
INTERPOLATION = [
    _row("1 MB", "copies", MIX, {"mix": 1.25}, bytes=1e6, dtype="float32", layout="contiguous", per_sample=False),
    _row("1 MB", "mix", {name: MIX[name] for name in ("mix", "textbook")}, {"textbook": -2.0}, bytes=1e6),
]


def _growing(vary: str, value: int) -> dict[str, Any]:
    sides = {
        "no mixup": [0.010] * 5,
        "ManifoldMixupCallback": [0.0098, 0.0099, 0.0101, 0.0102, 0.0104],
        "textbook": [0.010 + value * extra for extra in (1e-6, 2e-6, 3e-6, 4e-6, 5e-6)],
    }
    return _row(f"{vary} {value}", "no mixup", sides, vary=vary, value=value)


def _write(folder: Path, name: str, rows: list[dict[str, Any]], **extra: Any) -> None:
    folder.mkdir(exist_ok=True)
    content = {"benchmark": name, "what": f"what {name} is", "command": f"python scripts/benchmark.py {name}"}
    (folder / f"{name}.json").write_text(json.dumps({**content, "rows": rows, **MACHINE, **extra}))


def _report(report: Any, tmp_path: Path) -> str:
    report.write(tmp_path / "benchmarks", tmp_path / "docs")
    return (tmp_path / "docs" / "performance.md").read_text(encoding="utf-8")


def test_targets_of_both_signs_are_said_to_be_met_or_missed(report: Any, tmp_path: Path) -> None:
    _write(tmp_path / "benchmarks", "step", [STEP])
    _write(tmp_path / "benchmarks", "interpolation", INTERPOLATION)
    text = _report(report, tmp_path)
    summary = text.split("## Summary\n\n")[1].split("\n\n## ")[0]
    assert summary.splitlines() == [
        "2 of 3 targets are met.",
        "",
        "| target | measured | command |",
        "| --- | --- | --- |",
        "| [interpolation](#interpolation), 1 MB: mix at most 1.25 times copies "
        "| 1.400 (1.300 to 1.500), **missed** | `python scripts/benchmark.py interpolation` |",
        "| [interpolation](#interpolation), 1 MB: textbook at least 2 times mix "
        "| 2.29 (2.20 to 2.38), met | `python scripts/benchmark.py interpolation` |",
        "| [step](#step), MLP: ManifoldMixupCallback at most 1.03 times no mixup "
        "| 1.020 (1.010 to 1.030), met | `python scripts/benchmark.py step` |",
    ]


def test_all_targets_met_and_none_at_all(report: Any, tmp_path: Path) -> None:
    _write(tmp_path / "benchmarks", "step", [STEP])
    assert "\n\n1 of 1 targets are met.\n\n" in _report(report, tmp_path)
    _write(tmp_path / "benchmarks", "step", [{**STEP, "targets": {}}])
    assert "\n\nNone of the benchmarks below has a target.\n\n" in _report(report, tmp_path)


def test_section_has_sentence_command_passage_table_and_notes(report: Any, tmp_path: Path) -> None:
    _write(tmp_path / "benchmarks", "step", [STEP], notes=["One note.", "Another."], callback_us=312.34)
    report.COMMENTARY.write_text(
        "<!-- how -->\n\n## step\n\nBy hand.\n\n### More\n\nOf it.\n\n## summary\n\nIn short.\n"
    )
    text = _report(report, tmp_path)
    assert text.split("\n\n## step\n\n")[1].split("\n\n## ")[0] == (
        "What step is: `python scripts/benchmark.py step`, [numbers](../benchmarks/step.json).\n\n"
        "By hand.\n\n### More\n\nOf it.\n\n"
        "| case | side | median | times | quartiles | target |\n"
        "| --- | --- | ---: | ---: | ---: | --- |\n"
        "| MLP | no mixup | 10 ms | 1 |  |  |\n"
        "|  | ManifoldMixupCallback | 10.2 ms | 1.020 | 1.010 to 1.030 | at most 1.03 ✓ |\n"
        "|  | textbook | 30 ms | 3.00 | 3.00 to 3.00 |  |\n\n"
        "- Callback: 312 µs\n- One note.\n- Another."
    )
    assert "\n\nIn short.\n\n## step\n\n" in text
    assert "<!--" not in text


def test_benchmarks_stand_in_order_and_those_without_numbers_at_the_end(report: Any, tmp_path: Path) -> None:
    for name in ("step", "layers", "memory"):
        _write(tmp_path / "benchmarks", name, [])
    text = _report(report, tmp_path)
    headings = [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["Summary", "memory", "step", "layers", "Not measured"]
    missing = text.split("## Not measured\n\n")[1].splitlines()
    assert len(missing) == 13
    assert missing[1] == (
        "- mixed_loss, the mixed cross-entropy against the plain one: `python scripts/benchmark.py mixed_loss`"
    )


def test_quick_run_is_called_one(report: Any, tmp_path: Path) -> None:
    _write(tmp_path / "benchmarks", "step", [STEP], command="python scripts/benchmark.py step --quick")
    assert "**A quick run, too short to conclude anything from it.**" in _report(report, tmp_path)
    _write(tmp_path / "benchmarks", "step", [STEP])
    assert "quick" not in _report(report, tmp_path)


def test_machine_is_described_once_and_differences_by_benchmark(report: Any, tmp_path: Path) -> None:
    _write(tmp_path / "benchmarks", "memory", [])
    _write(tmp_path / "benchmarks", "step", [STEP], git_revision="fedcba98765432100-dirty")
    _write(tmp_path / "benchmarks", "layers", [], threads=1)
    text = _report(report, tmp_path)
    assert [line for line in text.split("## Summary")[0].splitlines() if line.startswith("- ")] == [
        "- Processor: Some CPU, AVX2",
        "- Cores and threads: 4 and 2 (memory, step); 4 and 1 (layers)",
        "- System: Linux-6",
        "- Versions: Python 3.12.1, torch 2.13.0, lightning 2.6.6",
        "- Git revision: `0123456789` (memory, layers); `fedcba9876` with changes not committed (step)",
    ]


def test_lists_of_numbers_become_tables_with_units(report: Any, tmp_path: Path) -> None:
    rows = [
        {"case": "26 MB", "way": "a|b", "kept_bytes": 1024, "peak_forward_bytes": 25_690_112, "step_ms": 3.14159},
        {"case": "26 MB", "way": "textbook", "kept_bytes": 0, "peak_forward_bytes": None, "gflops": 12345.6},
    ]
    _write(tmp_path / "benchmarks", "memory", [], memory=rows, cores=2)
    text = _report(report, tmp_path)
    assert (
        "Memory:\n\n"
        "| case | way | kept | peak forward | step | GFLOP/s |\n"
        "| --- | --- | ---: | ---: | ---: | ---: |\n"
        "| 26 MB | a\\|b | 1.02 kB | 25.7 MB | 3.14 ms | – |\n"
        "| 26 MB | textbook | 0 B | – | – | 12,300 |\n\n"
        "- Cores: 2\n\n"
    ) in text


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("kept_bytes", 999.9e6, "1 GB"),
        ("kept_bytes", 12, "12 B"),
        ("run_seconds", 0.0456, "45.6 ms"),
        ("callback_us", 0.98765, "0.988 µs"),
        ("share", 0.12345, "0.123"),
        ("batches", 50_000, "50,000"),
        ("is_fused", True, "yes"),
        ("side", "mix", "mix"),
        ("share", None, "–"),
    ],
)
def test_quantity_has_three_digits_and_the_unit_of_its_key(report: Any, key: str, value: Any, text: str) -> None:
    assert importlib.import_module("bench.markdown").quantity(key, value) == text


def test_rows_of_a_table_have_as_many_cells_as_its_head(report: Any, tmp_path: Path) -> None:
    _write(tmp_path / "benchmarks", "interpolation", INTERPOLATION)
    _write(tmp_path / "benchmarks", "scaling", [_growing("batch", 16), _growing("batch", 32)])
    _write(tmp_path / "benchmarks", "step", [STEP], parts=[{"side": "a", "forward_ms": 1.0}, {"forward_ms": 2.0}])
    blocks = [block.splitlines() for block in _report(report, tmp_path).split("\n\n") if block.startswith("|")]
    assert len(blocks) == 5
    for head, rule, *lines in blocks:
        assert {line.replace("\\|", "").count("|") for line in (rule, *lines)} == {head.count("|")}


def test_no_numbers_at_all_says_how_to_get_them(report: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no numbers\. Measure first: python scripts/benchmark\.py all"):
        report.write(tmp_path, tmp_path / "docs")


def test_file_of_another_form_is_refused(report: Any, tmp_path: Path) -> None:
    (tmp_path / "step.json").write_text('{"networks": []}')
    with pytest.raises(
        ValueError, match=r"step\.json has no 'rows'.*Measure again: python .* step --json .*step\.json"
    ):
        report.load(tmp_path)


def test_passage_about_no_benchmark_is_refused(report: Any) -> None:
    with pytest.raises(ValueError, match=r"commentary is about \['stap'\], expected 'summary' or one of \['interp"):
        report.commentary("## step\n\nText.\n\n## stap\n\nText.\n")


def test_passages_of_the_repository_are_about_benchmarks(report: Any) -> None:
    text = (SCRIPTS / "bench" / "commentary.md").read_text(encoding="utf-8")
    assert list(report.commentary(text)) == [line[3:] for line in text.splitlines() if line.startswith("## ")]


def test_pictures_stand_above_a_folded_table_and_say_their_numbers(report: Any, tmp_path: Path) -> None:
    _write(tmp_path / "benchmarks", "scaling", [_growing("batch", 1024), _growing("batch", 16), _growing("layers", 2)])
    _write(tmp_path / "benchmarks", "interpolation", INTERPOLATION)
    text = _report(report, tmp_path)
    assert (
        "\n\n![Time of a training step as a ratio to no mixup, by batch size: ManifoldMixupCallback 1.01 at 16 and "
        "1.01 at 1,024; textbook 1 at 16 and 1.31 at 1,024](performance_scaling_batch.png)\n\n![Time of a training step"
    ) in text
    assert "(performance_scaling_layers.png)\n\n<details>\n<summary>Table</summary>\n\n| case |" in text
    assert (
        "![Time of mixing as a ratio to copies, by size. float32: mix 1.4 at 1 MB; textbook 3.2 at 1 "
        "MB](performance_interpolation.png)"
    ) in text
    pictures = sorted(path.name for path in (tmp_path / "docs").glob("*.png"))
    names = ("interpolation", "scaling_batch", "scaling_layers")
    assert pictures == [f"performance_{name}.png" for name in names]
    for name in pictures:
        assert (tmp_path / "docs" / name).read_bytes().startswith(b"\x89PNG")


def test_curve_has_quartiles_of_ratios_and_of_extra_milliseconds(plots: Any) -> None:
    base = [0.010, 0.020, 0.040, 0.010, 0.020]
    ours = [0.011, 0.022, 0.041, 0.014, 0.021]  # ratios 1.1, 1.1, 1.025, 1.4, 1.05; differences 1, 2, 1, 4, 1 ms
    rows = [_row("b", "base", {"base": [0.1] * 5, "ours": [0.2] * 5}, value=512)]
    rows.insert(1, _row("a", "base", {"base": base, "ours": ours}, value=128))
    found = plots.curves(rows, "value", unit=2)
    assert list(found) == ["ours"]
    assert_allclose(found["ours"].values, [64, 256])
    assert_allclose(found["ours"].ratio, [[1.05, 2], [1.1, 2], [1.1, 2]])
    assert_allclose(found["ours"].extra, [[1, 100], [1, 100], [2, 100]])


def test_growth_is_drawn_as_ratio_and_as_milliseconds(plots: Any) -> None:
    found = plots.curves([_growing("batch", value) for value in (16, 1000)], "value")
    ratios, extra = plots.draw_growth(found, "batch", "no mixup").axes
    for axes, medians in ((ratios, [[1.01, 1.01], [1.0048, 1.3]]), (extra, [[0.1, 0.1], [0.048, 3.0]])):
        lines = [line for line in axes.lines if line.get_marker() in ("o", "s")]
        assert_allclose([line.get_ydata() for line in lines], medians)
        assert_allclose([line.get_xdata() for line in lines], [[16, 1000]] * 2)
        # a name has the colour of its line
        assert [to_hex(line.get_color()) for line in lines] == [to_hex(text.get_color()) for text in axes.texts[:2]]
    assert [text.get_text() for text in ratios.texts] == ["ManifoldMixupCallback  1.01", "textbook  1.30", "no mixup"]
    assert [text.get_text() for text in extra.texts] == ["ManifoldMixupCallback  0.1 ms", "textbook  3 ms", "no mixup"]
    (lower,) = [path.vertices[:, 1].min() for path in ratios.collections[1].get_paths()]
    (upper,) = [path.vertices[:, 1].max() for path in ratios.collections[1].get_paths()]
    assert_allclose((lower, upper), (1.0032, 1.4))
    assert extra.get_xlabel() == "batch size"
    assert [tick.get_text() for tick in extra.get_xticklabels()] == ["16", "1,000"]


def test_interpolation_has_a_panel_for_each_dtype_on_one_axis(plots: Any) -> None:
    facts = {"layout": "contiguous", "per_sample": False}
    slow = {**MIX, "textbook": [4 * one for one in MIX["textbook"]]}
    rows = [
        _row("", "copies", MIX, bytes=8e6, dtype="float32", **facts),
        _row("", "copies", MIX, bytes=1e6, dtype="float32", **facts),
        _row("", "copies", slow, bytes=8e6, dtype="bfloat16", **facts),
        _row("", "copies", slow, bytes=8e6, dtype="float32", **{**facts, "layout": "channels-last"}),
        _row("", "copies", slow, bytes=8e6, dtype="float32", **{**facts, "per_sample": True}),
        _row("", "copies", {name: MIX[name] for name in ("copies", "mix")}, bytes=8e6, dtype="float32", **facts),
    ]
    panels = plots.interpolation_panels([*rows, INTERPOLATION[1]])
    assert list(panels) == ["float32", "bfloat16"]
    contiguous, channels_last = panels["float32"]
    assert_allclose(contiguous["mix"].values, [1, 8])
    assert_allclose(contiguous["textbook"].ratio[1], [3.2, 3.2])
    assert_allclose(channels_last["textbook"].ratio[1], [12.8])
    assert panels["bfloat16"][1] == {}
    left, right = plots.draw_interpolation(panels).axes
    assert left.get_ylim() == right.get_ylim()
    assert left.get_ylim()[0] <= 0.9
    assert left.get_ylim()[1] > 12.8
    assert [text.get_text() for text in right.texts] == ["mix", "textbook", "three copies"]
    hollow = [line for line in left.lines if line.get_markerfacecolor() == "none"]
    assert_allclose([line.get_ydata() for line in hollow], [[1.4], [12.8]])


@pytest.mark.parametrize(
    ("places", "moved"),
    [
        ([0.0, 3.0, 10.0], [0.0, 3.0, 10.0]),
        ([5.0, 4.0], [5.5, 3.5]),
        ([1.0, 1.0, 1.0], [-1.0, 1.0, 3.0]),
        ([0.0, 1.0, 2.5], [-5 / 6, 7 / 6, 19 / 6]),
        ([3.0], [3.0]),
    ],
    ids=["far", "two", "equal", "chain", "one"],
)
def test_names_are_moved_apart_around_their_middle(report: Any, places: list[float], moved: list[float]) -> None:
    got = importlib.import_module("bench.lines").apart(places, 2.0)
    assert_allclose(got, moved, atol=1e-12)
    assert np.mean(got) == pytest.approx(np.mean(places))
