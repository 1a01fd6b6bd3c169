"""Pictures that show all methods of an experiment side by side, drawn from what its runs left behind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mm_lightning.diagnostics.clouds import half_and_all
from mm_lightning.diagnostics.plane import PlaneMap
from mm_lightning.evaluation.scores import Reliability
from mm_lightning.study.confidence_pictures import colours, confidence_maps, confidence_players
from mm_lightning.study.form import Picture, Player
from mm_lightning.study.hidden_spaces import Clouds, draw_hidden_spaces
from mm_lightning.study.jobs import Job
from mm_lightning.study.reliabilities import draw_reliability_of_methods, pooled
from mm_lightning.study.schedule_runs import SETS, ScheduleRuns
from mm_lightning.study.spectra import draw_spectra_by_class, draw_spectrum_summaries


def draw_pictures(experiment: Any, jobs: Sequence[Job], folder: Path) -> tuple[list[Picture], list[Player]]:
    """Draw what the runs of an experiment left data for.

    From the first schedule: the confidence maps, the hidden spaces, the singular values, the reliability, and the
    confidence maps epoch by epoch, also as ``EXPERIMENT_confidence_map.gif``. From any other: the confidence maps and
    the hidden spaces. Singular values and reliability are of all seeds, the others of the lowest.

    Args:
        experiment: A part of ``conf/reproduction``; the titles of its ``methods`` are read.
        jobs: Its finished runs, those of the first schedule first.
        folder: Where the files are put; the frames of the epochs in ``frames`` below it.

    Returns:
        The pictures and the players, with files relative to ``folder``.

    Raises:
        FileNotFoundError: If a run lacks data that another one of its schedule has.
        ValueError: If two methods have the same title.
    """
    titles = {str(name): str(method["title"]) for name, method in experiment["methods"].items()}
    if len(set(titles.values())) < len(titles):
        raise ValueError(f"Methods must have different titles, got {', '.join(titles.values())}.")
    pictures: list[Picture] = []
    players: list[Player] = []
    for schedule in dict.fromkeys(job.schedule for job in jobs):
        own = [job for method in titles for job in jobs if (job.method, job.schedule) == (method, schedule)]
        runs = ScheduleRuns(own, titles, folder, is_first=schedule == jobs[0].schedule)
        pictures += [*confidence_maps(runs.of_lowest_seed()), *_hidden_spaces(runs.of_lowest_seed())]
        if runs.is_first:
            pictures += [*_spectra(runs), *_reliability(runs)]
            players += confidence_players(runs.of_lowest_seed())
    return pictures, players


def _hidden_spaces(runs: ScheduleRuns) -> Iterator[Picture]:
    layer = runs.diagnostic("hidden_space.layer", "")
    for split in ("test", "train"):
        found = {title: seeds[0] for title, seeds in runs.arrays(f"hidden_space_{split}.npz").items()}
        if not found:
            continue
        maps = _maps_of_layer(runs, layer) if split == "test" else {}
        maps = maps if maps.keys() == found.keys() else {}  # a row of them needs one for each method
        clouds = {
            title: Clouds(torch.from_numpy(arrays["plane"]), torch.from_numpy(arrays["targets"]), maps.get(title))
            for title, arrays in found.items()
        }
        axes = "principal component" if any("variance" in arrays for arrays in found.values()) else "hidden unit"
        subsets = half_and_all(sorted({int(k) for arrays in found.values() for k in arrays["targets"]}))
        heading = f"Hidden states of layer {layer}, {SETS[split]}, {runs.seeds}{runs.ending}"
        figure = draw_hidden_spaces(clouds, subsets, heading, [f"{axes} 1", f"{axes} 2"])
        caption = (
            f"Axes: {axes}s 1 and 2 of layer {layer}, the same in all panels. A dot is an example of the "
            f"{SETS[split]}; its colour is the class, named in the box at the class median. Spread ratio: spread in "
            "the classes over the mean distance of the class means; lower is tighter."
        )
        if maps:
            caption += (
                f" Last row: what the rest of the network predicts there, grey where it was not asked. {colours(maps)}"
            )
        alt = f"Hidden states of layer {layer} as dots in the colours of their classes"
        yield runs.picture(f"hidden_space_{split}", figure, f"Hidden states, {SETS[split]}", caption, alt)


def _maps_of_layer(runs: ScheduleRuns, layer: str) -> dict[str, PlaneMap]:
    if runs.diagnostic("confidence_map.layer", "") != layer:
        return {}
    return {title: PlaneMap.from_arrays(seeds[0]) for title, seeds in runs.arrays("confidence_map_test.npz").items()}


def _spectra(runs: ScheduleRuns) -> Iterator[Picture]:
    for split in ("train", "test"):
        if found := runs.arrays(f"spectrum_{split}.npz"):
            break
    else:
        return
    one = next(iter(found.values()))[0]
    layers, classes = one["layers"].tolist(), one["classes"].tolist()
    spectra = {
        f"Layer {layer}": {title: np.stack([seed[f"values_{i}"] for seed in seeds]) for title, seeds in found.items()}
        for i, layer in enumerate(layers)
    }
    of = f"{SETS[split]}, {runs.seeds}"
    read = "Lines: mean over the seeds; bands: from the smallest to the largest seed. All panels have the same axes."
    for layer, (name, methods) in zip(layers, spectra.items(), strict=True):
        figure = draw_spectra_by_class(methods, classes, f"Singular values of {name.lower()} by class, {of}")
        caption = (
            f"The singular values of the {SETS[split]}'s hidden states, a panel for each class, not centred, against "
            f"their rank. The steeper a line falls, the fewer directions the class takes up. {read}"
        )
        alt = f"Singular values of {name.lower()} against their rank for each class"
        yield runs.picture(f"spectra_{layer}", figure, f"Singular values by class, {name.lower()}", caption, alt)
    figure = draw_spectrum_summaries(spectra, f"Singular values, {of}")
    caption = (
        f"Singular values of the hidden states of each class of the {SETS[split]}, not centred, mean over the classes. "
        "Left: against their rank; lines are the mean over the seeds, bands reach from the smallest to the largest. "
        "Right: bars are the mean over the seeds of the largest value and of the sum of all others, markers the seeds."
    )
    alt = "Singular values against their rank, the largest one and the sum of all others"
    yield runs.picture("spectrum_summary", figure, "Singular values", caption, alt)


def _reliability(runs: ScheduleRuns) -> Iterator[Picture]:
    found = runs.arrays("calibration_test.npz")
    if not found:
        return
    diagrams = {title: pooled([Reliability(**seed) for seed in seeds]) for title, seeds in found.items()}
    numbers = runs.mean_metrics({key: f"test/calibration/{key}" for key in ("ece", "overconfidence", "nll")})
    figure = draw_reliability_of_methods(diagrams, numbers, f"Reliability on the test set, {runs.seeds}")
    caption = (
        "Bar: share of correct predictions among the rows whose confidence is in the bin. Hatched: the gap to their "
        "mean confidence, above the bar where the classifier is too sure, inside it where it is too unsure. Below: "
        "rows in each bin, on a log axis. The rows of all seeds are in the same bins; numbers are means over the seeds."
    )
    alt = "Accuracy against confidence in bins"
    yield runs.picture("reliability", figure, "Reliability", caption, alt)
