import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex

from mm_lightning.diagnostics.clouds import square_frame
from mm_lightning.diagnostics.hidden_space import class_separation
from mm_lightning.diagnostics.plane import PlaneMap
from mm_lightning.study.hidden_spaces import UNMAPPED, Clouds, draw_hidden_spaces, in_class_distances


def _clouds(scale: float, classes: int = 4, mapped: tuple[float, float] | None = None) -> Clouds:
    rng = torch.Generator().manual_seed(0)
    targets = torch.arange(1200) % classes
    means = 3 * torch.randn(classes, 2, generator=rng, dtype=torch.float64)
    points = scale * (means[targets] + torch.randn(1200, 2, generator=rng, dtype=torch.float64))
    if mapped is None:
        return Clouds(points, targets)
    axis = np.linspace(*mapped, 5)
    confidence, predicted = np.full((5, 5), 0.6, np.float32), np.zeros((5, 5), np.int16)
    found = PlaneMap(axis, axis, confidence, predicted, classes, points.float().numpy(), targets.numpy())
    return Clouds(points, targets, found)


def test_the_frame_holds_the_frame_of_every_method():
    clouds = {"a": _clouds(1.0), "b": _clouds(5.0)}
    panels = draw_hidden_spaces(clouds, [range(2), range(4)]).axes
    assert len(panels) == 4
    assert len({axes.get_xlim() + axes.get_ylim() for axes in panels}) == 1
    x, y = panels[0].get_xlim(), panels[0].get_ylim()
    assert np.ptp(x) == pytest.approx(np.ptp(y))
    frames = torch.stack([torch.stack(square_frame(each.points)) for each in clouds.values()])  # (methods, ends, axes)
    low, high = frames[:, 0].amin(dim=0), frames[:, 1].amax(dim=0)
    assert np.ptp(x) == pytest.approx(float((high - low).max()))
    assert x[0] <= low[0] + 1e-9
    assert y[0] <= low[1] + 1e-9
    assert x[1] >= high[0] - 1e-9
    assert y[1] >= high[1] - 1e-9


def test_panels_tell_their_classes_the_spread_ratio_and_what_is_outside():
    clouds = _clouds(1.0)
    clouds.points[:3] = 1e3  # of the classes 0, 1 and 2
    upper, lower = draw_hidden_spaces({"a": clouds}, [[1, 3], range(4)]).axes
    for axes, classes, outside in ((upper, [1, 3], 1), (lower, [0, 1, 2, 3], 3)):
        member = torch.isin(clouds.targets, torch.tensor(classes))
        ratio = class_separation(clouds.points[member], clouds.targets[member])["spread_ratio"]
        assert axes.get_title("right") == f"spread ratio {ratio:.3f}, {outside} outside"
        points = next(c for c in axes.collections if isinstance(c, PathCollection)).get_offsets()
        assert len(points) == int(member.sum())
    assert (upper.get_title("left"), lower.get_title("left")) == ("Classes 1, 3", "Classes 0–3")
    assert (upper.get_xlabel(), lower.get_xlabel()) == ("", "hidden unit 1")


def test_one_class_has_no_spread_ratio_and_absent_ones_have_no_points():
    one, none = draw_hidden_spaces({"a": _clouds(1.0)}, [[2], [7]]).axes
    assert one.get_title("right") == none.get_title("right") == ""
    assert not none.collections


@pytest.mark.parametrize(("classes", "ticks"), [(2, ["0", "0.25", "0.5", "0.75", "1"]), (3, ["cat", "dog", "eel"])])
def test_maps_stand_on_grey_below_the_clouds_with_a_key(classes: int, ticks: list[str]):
    clouds = {"a": _clouds(1.0, classes, (-3.0, 3.0)), "b": _clouds(1.0, classes, (-40.0, 60.0))}
    figure = draw_hidden_spaces(clouds, [range(classes)], class_names=["cat", "dog", "eel"])
    *panels, key = figure.axes
    assert {axes.get_xlim() + axes.get_ylim() for axes in panels} == {(-40.0, 60.0, -40.0, 60.0)}
    assert [len(axes.get_images()) for axes in panels] == [0, 1, 0, 1]
    assert [to_hex(axes.get_facecolor()) for axes in panels] == ["#ffffff", UNMAPPED, "#ffffff", UNMAPPED]
    assert panels[1].get_images()[0].get_extent() == [-3.75, 3.75, -3.75, 3.75]
    assert [tick.get_text() for tick in key.get_xticklabels()] == ticks
    texts = [text.get_text() for text in figure.texts]
    assert ("probability of dog" if classes == 2 else "confidence, 33 to 100 %") in texts


def test_maps_alone_are_of_one_size_whatever_they_show():
    sizes = {
        tuple(draw_hidden_spaces({"a": _clouds(scale, 3, (-scale, scale))}, []).get_size_inches()) for scale in (1, 9)
    }
    assert len(sizes) == 1


@pytest.mark.parametrize(
    ("clouds", "subsets", "message"),
    [
        ({"a": _clouds(1.0, 4, (-1, 1)), "b": _clouds(1.0)}, [range(4)], "for all of 2 methods .* got 1"),
        ({"a": _clouds(1.0)}, [], "with subsets, for none, got 0"),
    ],
    ids=["some maps", "nothing"],
)
def test_misfits_are_refused(clouds: dict[str, Clouds], subsets: list[range], message: str):
    with pytest.raises(ValueError, match=message):
        draw_hidden_spaces(clouds, subsets)


def test_class_distances_agree_with_loops():
    found = _clouds(2.5, 5, (-7.0, 8.0)).found
    assert found is not None
    means = [found.points[found.targets == k].astype(float).mean(axis=0) for k in range(5)]
    distances = [np.hypot(*(a - b)) for i, a in enumerate(means) for b in means[:i]]
    centre, unit = sum(means) / 5, sum(distances) / len(distances)
    got = in_class_distances(found)
    np.testing.assert_allclose(got.points, (found.points - centre) / unit, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.x, (found.x - centre[0]) / unit, rtol=1e-5)
    np.testing.assert_allclose(got.y, (found.y - centre[1]) / unit, rtol=1e-5)
    assert got.confidence is found.confidence
