"""What the pictures show: tiles are the images' bytes, curves and bars the numbers, labels the names."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import bytes_of, tiles
from PIL import Image
from sklearn.metrics import roc_curve

from ebm.evaluation import figures
from ebm.sampling.chains import uniform_noise

RNG = np.random.default_rng(0)


def noise(*shape: int) -> torch.Tensor:
    return uniform_noise(shape, torch.Generator().manual_seed(0))


@pytest.fixture
def drawn(figures_saved: list[Any], tmp_path: Path) -> Any:
    """The axes of what a function of `figures` draws."""

    def axes(name: str, *what: Any) -> list[Any]:
        getattr(figures, name)(tmp_path / "x.png", *what)
        return figures_saved[-1].axes

    return axes


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_is_made_of_the_images(channels: int, tmp_path: Path) -> None:
    x = noise(7, channels, 28, 20)
    figures.grid(tmp_path / "x.png", x, columns=3)
    with Image.open(tmp_path / "x.png") as picture:
        found = tiles(picture, (28, 20), factor=4, columns=3)
    assert len(found) == 9 and np.array_equal(found[:7], bytes_of(x)) and (found[7:] == 255).all()


def test_an_animation_is_made_of_the_snapshots(tmp_path: Path) -> None:
    trace = noise(5, 4, 1, 28, 28)
    figures.animation(tmp_path / "x.gif", trace, columns=2)
    with Image.open(tmp_path / "x.gif") as picture:
        assert picture.n_frames == 5 and picture.info["loop"] == 0
        for i, x in enumerate(trace):
            picture.seek(i)
            assert picture.info["duration"] == (2000 if i == 4 else 80)
            assert np.abs(tiles(picture, (28, 28), factor=2, columns=2) - bytes_of(x).astype(int)).max() <= 2


def test_strips_have_a_row_a_chain_and_a_column_a_snapshot(drawn: Any) -> None:
    trace = noise(3, 2, 1, 8, 8)
    (axes,) = drawn("strips", trace, [0, 5, 10])
    found = tiles(Image.fromarray(axes.images[0].get_array()), (8, 8), columns=3)
    assert np.array_equal(found, bytes_of(trace.transpose(0, 1).flatten(0, 1)))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["step 0", "5", "10"]
    assert axes.get_xticks() == pytest.approx(28 * (np.arange(3) + 0.5) / 3)  # three images and two gaps are 28 wide


def test_scores_are_histograms_of_their_own_height(drawn: Any) -> None:
    sets = {"test": RNG.normal(0, 0.1, 500), "far": RNG.normal(-20, 1, 500)}
    (axes,) = drawn("scores", sets)
    assert [label.get_text() for label in axes.get_yticklabels()] == list(sets)
    for i, (values, stairs) in enumerate(zip(sets.values(), axes.patches, strict=True)):
        heights, edges, _ = stairs.get_data()
        counts, _ = np.histogram(np.arcsinh(values / 0.1), edges)
        assert heights + i == pytest.approx(0.9 * counts / counts.max())
    assert 0.1 * math.sinh(axes.lines[0].get_xdata()[0]) == pytest.approx(np.median(sets["test"]))


def test_roc_is_that_of_scikit_learn(drawn: Any) -> None:
    inliers, outliers = RNG.normal(1, 1, 300), RNG.normal(0, 1, 200)
    (axes,) = drawn("roc", inliers, {"far": outliers})
    fpr, tpr, _ = roc_curve(np.repeat([1, 0], [300, 200]), np.concatenate([inliers, outliers]), drop_intermediate=False)
    found = axes.lines[0].get_xydata()
    apart = np.abs(found[:, None] - np.stack([fpr, tpr], axis=1)).max(axis=2)
    assert (apart.min(axis=1) < 1e-9).all()  # every point drawn is one of the curve's, and they reach from end to end
    assert found[0].tolist() == [0, 0] and np.diff(found, axis=0).max() < 0.1 and found[-1, 1] == 1


def test_intervals_and_curves_lie_at_their_numbers(drawn: Any) -> None:
    series = {"a": {2: (1.0, 0.5, 1.5), 8: (3.0, 2.0, 5.0)}, "b": {2: (2.0, 1.0, 2.5), 8: (0.5, 0.25, 1.0)}}
    (axes,) = drawn("intervals", {"title": series})
    assert [text.get_text() for text in axes.get_yticklabels()] == ["2", "8"] and axes.get_title("left") == "title"
    for dots, lines, values in zip(axes.lines, axes.collections, series.values(), strict=True):
        assert dots.get_xdata().tolist() == [value for value, _, _ in values.values()]
        assert [segment[:, 0].tolist() for segment in lines.get_segments()] == [[a, b] for _, a, b in values.values()]
    (axes,) = drawn("by_steps", {"title": series}, {"title": 0.75})
    *curves, floor = axes.lines
    assert [curve.get_xydata().tolist() for curve in curves] == [[[2, 1], [8, 3]], [[2, 2], [8, 0.5]]]
    assert floor.get_ydata() == [0.75, 0.75] and [curve.get_label() for curve in curves] == ["a", "b"]
    for band, values in zip(axes.collections, series.values(), strict=True):
        corners = band.get_paths()[0].vertices.tolist()
        assert all([k, end] in corners for k, (_, low, high) in values.items() for end in (low, high))


def test_bars_are_shares(drawn: Any) -> None:
    shares = {"samples": np.array([0.2, 0.5, 0.3]), "real": np.array([0.3, 0.3, 0.4])}
    (axes,) = drawn("histogram", shares, ["cat", "dog", "cow"])
    assert [bar.get_height() for bar in axes.patches] == [*shares["samples"], *shares["real"]]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["cat", "dog", "cow"]


def test_reliability_is_accuracy_by_confidence(drawn: Any) -> None:
    confidence, correct = np.array([0.11, 0.12, 0.61, 0.62, 0.65, 0.65]), np.array([1.0, 0, 1, 1, 1, 0])
    left, right = drawn("reliability", confidence, correct, 10)
    assert left.patches[0].get_data()[0].tolist() == [0, 0.5, 0, 0, 0, 0, 0.75, 0, 0, 0]
    assert right.patches[0].get_data()[0] == pytest.approx([0, 2 / 6, 0, 0, 0, 0, 4 / 6, 0, 0, 0])


def test_chains_are_drawn_with_their_median(drawn: Any) -> None:
    values = RNG.normal(size=(3, 4))
    (axes,) = drawn("chains", [0, 10, 20, 30], {"energy": {"from noise": values}})
    *single, median = axes.lines
    assert [line.get_ydata().tolist() for line in single] == values.tolist()
    assert median.get_xydata() == pytest.approx(np.stack([[0, 10, 20, 30], np.median(values, axis=0)], axis=1))
    scores, ages = {"buffer": RNG.normal(size=90), "real": RNG.normal(size=30)}, RNG.integers(0, 9, 200) * 20
    left, right = drawn("chain_state", scores, ages)
    for axes, series in ((left, scores), (right, {"": ages})):
        heights = np.array([bar.get_height() for bar in axes.patches]).reshape(len(series), -1)
        assert heights.sum(axis=1) == pytest.approx(1)
    counts = np.bincount(ages // 20)
    assert [bar.get_height() for bar in right.patches][: len(counts)] == pytest.approx(counts / 200)


def test_points_and_scored_images_and_paths(drawn: Any) -> None:
    points, surface = noise(5, 2), noise(4, 4)
    left, right, *_ = drawn("points", {"samples": points, "energy": surface})
    assert np.allclose(left.collections[0].get_offsets(), points)
    assert np.allclose(right.images[0].get_array(), surface) and right.images[0].origin == "lower"
    sets, scores = {"a": noise(2, 1, 8, 8), "b": -noise(2, 1, 8, 8)}, {"a": np.array([1.0, 2]), "b": np.array([3.0, 4])}
    grid = drawn("scored_images", sets, scores)  # row by row
    assert [axes.get_xlabel() for axes in grid] == ["1.0000", "3.0000", "2.0000", "4.0000"]
    shown = [axes.images[0].get_array()[..., 0] for axes in grid]
    assert np.array_equal(shown, [bytes_of(sets[name])[i, ..., 0] for i in range(2) for name in "ab"])
    linear, relaxed = noise(1, 3, 1, 8, 8), -noise(1, 3, 1, 8, 8)
    energies = {"linear": torch.tensor([[1.0, 2, 1]]), "relaxed": torch.tensor([[1.0, 0.5, 1]])}
    left, right = drawn("paths", {"linear": linear, "relaxed": relaxed}, energies)
    found = tiles(Image.fromarray(left.images[0].get_array()), (8, 8), columns=3)
    assert np.array_equal(found, bytes_of(torch.cat([linear[0], relaxed[0]])))
    assert [line.get_ydata().tolist() for line in right.lines] == [[1, 2, 1], [1, 0.5, 1]]
