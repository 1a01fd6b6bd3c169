"""Confidence maps of all methods side by side: at the end of the training, and epoch by epoch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from matplotlib.figure import Figure

from mm_lightning.diagnostics.confidence_figure import MAX_DRAWN, draw_confidence_maps, write_animation
from mm_lightning.diagnostics.confidence_frames import unpacked
from mm_lightning.diagnostics.hidden_states import INPUT
from mm_lightning.diagnostics.plane import PlaneMap
from mm_lightning.study.form import Picture, Player
from mm_lightning.study.hidden_spaces import Clouds, draw_hidden_spaces, in_class_distances
from mm_lightning.study.schedule_runs import SETS, Arrays, ScheduleRuns
from mm_lightning.study.small_png import save_small_png

FRAME_WIDTH = 960  # pixels


def confidence_maps(runs: ScheduleRuns) -> list[Picture]:
    """Draw the maps of the training data, or else of the test data; nothing if the runs have none.

    Args:
        runs: One for each method.
    """
    for split in ("train", "test"):
        if found := runs.arrays(f"confidence_map_{split}.npz"):
            break
    else:
        return []
    maps = {title: PlaneMap.from_arrays(seeds[0]) for title, seeds in found.items()}
    plane, axes = _plane(runs)
    figure = _draw(runs, maps, f"Confidence in the {plane}, {SETS[split]}, {runs.seeds}{runs.ending}")
    caption = f"{axes} {colours(maps)} {_dots(SETS[split])}"
    alt = f"Maps of the predicted classes over the {plane}, with the {SETS[split]} as dots"
    return [runs.picture("confidence_map", figure, f"Confidence in the {plane}", caption, alt)]


def confidence_players(runs: ScheduleRuns) -> list[Player]:
    """Draw the maps of each epoch that all methods have a frame of, also as an animation; nothing if there is none.

    Args:
        runs: One for each method.
    """
    found = {title: _frames(seeds[0]) for title, seeds in runs.arrays("confidence_map_frames.npz").items()}
    epochs = sorted(set.intersection(*(set(frames) for frames in found.values()))) if found else []
    if not epochs:
        return []
    plane, axes = _plane(runs)
    figures, files = [], []
    for epoch in epochs:
        maps = {title: frames[epoch] for title, frames in found.items()}
        figures.append(_draw(runs, maps, f"Confidence in the {plane}, epoch {epoch}, {runs.seeds}"))
        files.append(f"frames/{runs.experiment}_{epoch:0{len(str(epochs[-1]))}}.png")
        save_small_png(figures[-1], runs.folder / files[-1], FRAME_WIDTH)
    write_animation(figures.__getitem__, len(figures), runs.folder / f"{runs.experiment}_confidence_map.gif")
    caption = (
        f"{axes} {colours(maps)} {_dots('validation set')} {runs.seeds.capitalize()}, {runs.jobs[0].schedule} schedule."
    )
    return [
        Player(
            title=f"Confidence in the {plane}, epoch by epoch",
            caption=caption,
            alt=f"Maps of the predicted classes over the {plane}, for {runs.methods}",
            labels=[f"epoch {epoch}" for epoch in epochs],
            files=files,
            commands=[job.command for job in runs.jobs],
        )
    ]


def colours(maps: Mapping[str, PlaneMap]) -> str:
    """Say in words what the colours of maps mean."""
    num_classes = next(iter(maps.values())).num_classes
    if num_classes == 2:
        return (
            "Colour, on one scale for all: the probability of class 1, from 0 (blue) over 0.5 (white) to 1 (amber); "
            "black lines are at 0.5."
        )
    return (
        "Hue: the most probable class. Its fullness, on one scale for all: that class's probability, from white at "
        f"1/{num_classes} to full at 1. Black lines part the classes."
    )


def _frames(arrays: Arrays) -> dict[int, PlaneMap]:
    """By epoch, counted from 1: what ``stacked`` has put together."""
    epochs, num_classes = arrays["epochs"], torch.tensor(arrays["num_classes"])
    parts = {name: torch.from_numpy(array) for name, array in arrays.items() if name not in ("epochs", "num_classes")}
    return {
        int(epoch) + 1: unpacked({"num_classes": num_classes} | {name: part[place] for name, part in parts.items()})
        for place, epoch in enumerate(epochs)
    }


def _plane(runs: ScheduleRuns) -> tuple[str, str]:
    layer = runs.diagnostic("confidence_map.layer", INPUT)
    if layer == INPUT:
        return "plane of the inputs", "Axes: the two inputs, the same in all panels."
    return f"plane of layer {layer}", (
        f"Axes: the two units of layer {layer}, the same in all panels, moved and scaled so that the mean of the class "
        "means is 0 and their mean distance is 1; the next layer undoes scale and place, so neither means anything. "
        "Where the network was not evaluated there is grey."
    )


def _dots(data: str) -> str:
    return f"Dots: the {data}, at most {MAX_DRAWN:,} points, in the dark shades of their classes."


def _draw(runs: ScheduleRuns, maps: Mapping[str, PlaneMap], heading: str) -> Figure:
    if runs.diagnostic("confidence_map.layer", INPUT) == INPUT:
        return draw_confidence_maps(list(maps.values()), list(maps), heading)
    clouds = {}
    for title, found in maps.items():
        scaled = in_class_distances(found)
        clouds[title] = Clouds(torch.from_numpy(scaled.points), torch.from_numpy(scaled.targets), scaled)
    return draw_hidden_spaces(clouds, [], heading, ["hidden unit 1 / class distance", "hidden unit 2 / class distance"])
