"""The tables of docs/unreproduced.md, from the numbers of docs/results/unreproduced.json."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from statistics import mean, stdev
from typing import Any, NamedTuple

from tables import markdown_table
from unreproduced_runs import NUMBERS

Pair = tuple[float, float]  # the largest singular value, and the sum of all others; means over the classes
Record = dict[str, Any]

PUBLISHED: dict[str, Pair] = {
    "none": (51.73, 78.67),
    "weight decay": (33.76, 73.36),
    "dropout": (28.83, 77.47),
    "input": (33.46, 66.89),
    "manifold": (31.65, 40.98),
}
SCALINGS = ("s", "s / √n", "s² / n")
SHOWN_ROWS = 500  # of each class, where a table has one number of rows


class Way(NamedTuple):
    """A way to take the two numbers: in which layer, of how many rows of each class, and how."""

    layer: str
    rows: int
    centred: bool
    scaling: str

    def __str__(self) -> str:
        centred = ", centred" if self.centred else ""
        return (
            f"layer {self.layer.replace('linear', 'before its activation')}, {self.rows} rows, {self.scaling}{centred}"
        )


def pair(record: Record, way: Way) -> Pair:
    """The two numbers of a run, taken that way; of the squares the largest is the square of the mean."""
    found = dict(zip(NUMBERS, record["spectra"][way.layer][str(way.rows)], strict=True))
    ending = "_centred" if way.centred else ""
    largest, others, squared = (found[f"{name}{ending}"] for name in ("largest", "others", "others_squared"))
    if way.scaling == "s² / n":
        return largest**2 / way.rows, squared / way.rows
    factor = 1 / math.sqrt(way.rows) if way.scaling == "s / √n" else 1.0
    return factor * largest, factor * others


def factor_off(found: Iterable[float], published: Iterable[float]) -> float:
    """By which factor, at most, one of the numbers is larger or smaller than published; 1 at best."""
    return math.exp(max(abs(math.log(one / other)) for one, other in zip(found, published, strict=True)))


def ways(record: Record) -> Iterator[Way]:
    """All ways to take the numbers of a run."""
    for layer, by_rows in record["spectra"].items():
        for rows in by_rows:
            for centred in (False, True):
                for scaling in SCALINGS:
                    yield Way(layer, int(rows), centred, scaling)


def chosen(runs: list[Record], group: str, **fixed: Any) -> dict[tuple[str, str], list[Record]]:
    """The runs of a group by change and method, one for each seed."""
    found: dict[tuple[str, str], list[Record]] = {}
    for record in runs:
        if record["group"] == group and all(record[name] == value for name, value in fixed.items()):
            found.setdefault((record["change"], record["method"]), []).append(record)
    return found


def spread(values: list[float], digits: int) -> str:
    """Mean ± standard deviation, or the one value."""
    return f"{mean(values):,.{digits}f}" + (f" ± {stdev(values):,.{digits}f}" if len(values) > 1 else "")


def ratios(records: list[Record], nones: list[Record], way: Way, which: int) -> str:
    """One of the two numbers (0 the largest, 1 the others) over that without mixup, paired by seed; — where not run."""
    none_of = {record["seed"]: record for record in nones}
    both = [(record, none_of[record["seed"]]) for record in records if record["seed"] in none_of]
    if not both or not all(_has(one, way) for runs in both for one in runs):
        return "—"
    return spread([pair(own, way)[which] / pair(none, way)[which] for own, none in both], 2)


def _has(record: Record, way: Way) -> bool:
    return str(way.rows) in record["spectra"].get(way.layer, {})


def effects(runs: list[Record], group: str, methods: dict[str, str]) -> str:
    """For each change: the numbers without mixup, and what of them is left with it."""
    first = Way("1", SHOWN_ROWS, False, "s")
    head = [
        "changed",
        "accuracy, %",
        "largest",
        "others",
        *(f"{what}, {title}" for title in methods.values() for what in ("others", "largest")),
    ]
    found, lines = chosen(runs, group), []
    for change in dict.fromkeys(change for change, _ in found):
        # what concerns mixing alone has the run without mixup of the defaults
        nones = found.get((change, "none"), found.get(("", "none"), []))
        own = found.get((change, "none"))
        cells = [change or "nothing"]
        cells += [spread([100 * one["test_acc"] for one in nones], 2)] if own else [""]
        is_there = own and all(_has(one, first) for one in own)
        missing = "diverged" if own else ""
        cells += [spread([pair(one, first)[i] for one in nones], 1) if is_there else missing for i in (0, 1)]
        for method in methods:
            cells += [ratios(found.get((change, method), []), nones, first, which) for which in (1, 0)]
        lines.append(cells)
    return markdown_table(head, lines)


def places(runs: list[Record], group: str) -> str:
    """The defaults, one line for each method: what is left of the numbers in the layers up to the bottleneck."""
    found = chosen(runs, group, change="")
    nones = found.get(("", "none"), [])
    layers = ("1", "2", "3", "4 linear", "4")
    head = ["", "accuracy, %", "layer 1, largest", *(f"layer {one}, others" for one in layers)]
    lines = []
    for (_, method), records in found.items():
        cells = [method, spread([100 * one["test_acc"] for one in records], 2)]
        cells.append(ratios(records, nones, Way("1", SHOWN_ROWS, False, "s"), 0))
        cells += [ratios(records, nones, Way(layer, SHOWN_ROWS, False, "s"), 1) for layer in layers]
        lines.append(cells)
    none = PUBLISHED["none"]
    for method, (largest, others) in PUBLISHED.items():
        lines.append(
            [f"published, {method}", "", f"{largest / none[0]:.2f}", f"{others / none[1]:.2f}", "", "", "", ""]
        )
    return markdown_table(head, lines)


def networks(runs: list[Record]) -> str:
    """Other networks: what is left of the numbers in the first hidden and in the narrow layer."""
    found = chosen(runs, "networks")
    titles = dict.fromkeys(change for change, _ in found)
    head = [
        "network",
        "method",
        "accuracy, %",
        "layer 1, largest",
        "layer 1, others",
        "narrow, largest",
        "narrow, others",
    ]
    lines = []
    # methods of one network stand together, in whatever order they were run
    for (change, method), records in sorted(found.items(), key=lambda one: list(titles).index(one[0][0])):
        nones = found[change, "none"]
        narrow = list(records[0]["spectra"])[-1]
        cells = [change, method, spread([100 * one["test_acc"] for one in records], 2)]
        cells += [
            ratios(records, nones, Way(layer, SHOWN_ROWS, False, "s"), i) for layer in ("1", narrow) for i in (0, 1)
        ]
        lines.append(cells)
    return markdown_table(head, lines)


def nearest(runs: list[Record], groups: tuple[str, ...], layers: tuple[str, ...] | None, count: int) -> str:
    """The ways and settings that come nearest to the published numbers without mixup; seed 0."""
    candidates = []
    for record in runs:
        if record["group"] in groups and record["method"] == "none" and record["seed"] == 0:
            for way in ways(record):
                if layers is None or way.layer in layers:
                    candidates.append((factor_off(pair(record, way), PUBLISHED["none"]), record, way))
    candidates.sort(key=lambda one: one[0])
    head = [f"of {len(candidates):,} candidates", "how", "largest", "others", "off by a factor of"]
    lines = [
        [_named(record), str(way), *(f"{number:.2f}" for number in pair(record, way)), f"{off:.3f}"]
        for off, record, way in candidates[:count]
    ]
    return markdown_table(head, [["published", "", "51.73", "78.67", ""], *lines])


def both(runs: list[Record], groups: tuple[str, ...], layers: tuple[str, ...] | None, count: int) -> str:
    """The same, for the four numbers without mixup and with it, wherever it mixes; seed 0."""
    none_of = {(one["group"], one["change"]): one for one in runs if one["method"] == "none" and one["seed"] == 0}
    wanted = (*PUBLISHED["none"], *PUBLISHED["manifold"])
    candidates = []
    for record in runs:
        if (
            record["group"] not in groups
            or record["seed"]
            or record["method"] not in ("bottleneck", "first", "second", "before the bottleneck", "narrow")
        ):
            continue
        none = none_of.get((record["group"], record["change"])) or none_of[record["group"], ""]
        for way in ways(record):
            if (layers is None or way.layer in layers) and _has(none, way):
                four = (*pair(none, way), *pair(record, way))
                candidates.append((factor_off(four, wanted), record, way, four))
    candidates.sort(key=lambda one: one[0])
    head = [
        f"of {len(candidates):,} candidates",
        "mixed in",
        "how",
        "none: largest",
        "others",
        "mixed: largest",
        "others",
        "off by a factor of",
    ]
    lines = [
        [_named(record), record["method"], str(way), *(f"{number:.2f}" for number in four), f"{off:.3f}"]
        for off, record, way, four in candidates[:count]
    ]
    return markdown_table(head, [["published", "", "", *(f"{number:.2f}" for number in wanted), ""], *lines])


def _named(record: Record) -> str:
    return record["change"] or "nothing changed"


# Group, change, which method is manifold mixup, and the layer: all with all methods.
BESIDE = (
    ("flatness", "", "bottleneck", "1"),
    *(("networks", f"{units} units after the first layer", "narrow", "2") for units in (12, 16, 20, 30)),
    *(("two units", change, "bottleneck", "1") for change in ("1 turn", "1 turn, 160 epochs")),
)


def beside_published(runs: list[Record], beside: tuple[tuple[str, str, str, str], ...] = BESIDE) -> str:
    """All methods beside the published numbers, uncentred, of as many rows as bring "none" nearest."""
    head = ["", "method", "accuracy, %", "largest", "others", "largest over none", "others over none"]
    none = PUBLISHED["none"]
    lines = [
        ["published", method, "", f"{one[0]}", f"{one[1]}", f"{one[0] / none[0]:.2f}", f"{one[1] / none[1]:.2f}"]
        for method, one in PUBLISHED.items()
    ]
    for group, change, manifold, layer in beside:
        found = chosen(runs, group, change=change)
        nones = found.get((change, "none"), [])
        candidates = [
            way
            for one in nones[:1]
            for way in ways(one)
            if way.layer == layer and not way.centred and way.scaling == "s"
        ]
        if not candidates:
            continue
        way = min(candidates, key=lambda one: factor_off(pair(nones[0], one), none))
        for method in PUBLISHED:
            records = found.get((change, manifold if method == "manifold" else method), [])
            if records:
                cells = [f"{change or 'nothing changed'}: layer {layer}, {way.rows} rows", method]
                cells.append(spread([100 * one["test_acc"] for one in records], 2))
                cells += [spread([pair(one, way)[i] for one in records], 2) for i in (0, 1)]
                lines.append([*cells, *(ratios(records, nones, way, i) for i in (0, 1))])
    return markdown_table(head, lines)


def spiral_runs(runs: list[Record]) -> str:
    """Accuracies on the spirals."""
    head = ["changed", "method", "seeds", "test accuracy, %", "training accuracy, %", "test NLL, nats"]
    lines = [
        [
            change or "nothing",
            method,
            str(len(records)),
            spread([100 * one["test_acc"] for one in records], 2),
            spread([100 * one["train_acc"] for one in records], 2),
            spread([one["test_nll"] for one in records], 3),
        ]
        for (change, method), records in chosen(runs, "spirals").items()
    ]
    return markdown_table(head, lines)


def geometry_table(found: list[Record]) -> str:
    """The labels of mixed points."""
    head = [
        "turns",
        "noise",
        "alpha",
        "nearest point of the other class, %",
        "of pairs of one class, %",
        "right by the average, %",
    ]
    return markdown_table(
        head,
        [
            [
                f"{one['turns']:.2f}",
                f"{one['noise']}",
                f"{one['alpha']}",
                *(f"{100 * one[key]:.1f}" for key in ("wrong", "wrong_same", "best_accuracy")),
            ]
            for one in found
        ],
    )


def tables(content: Record) -> dict[str, str]:
    """All tables by name."""
    runs = content["runs"]
    mixed = {"bottleneck": "mixed in the bottleneck", "first": "mixed in layer 1"}
    nets = ("flatness", "networks", "two units")
    return {
        "places": places(runs, "flatness"),
        "effects": effects(runs, "flatness", mixed),
        "networks": networks(runs),
        "nearest first": nearest(runs, nets, ("1 linear", "1"), 6),
        "nearest any": nearest(runs, nets, None, 6),
        "both first": both(runs, nets, ("1 linear", "1"), 6),
        "both any": both(runs, nets, None, 6),
        "beside": beside_published(runs),
        "spirals": spiral_runs(runs),
        "geometry": geometry_table(content["geometry"]),
    }
