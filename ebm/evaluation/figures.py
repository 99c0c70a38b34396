"""Pictures from numbers. Images are (…, C, H, W) in [−1, 1]; every function writes one file."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from ebm.files import opened

Panels = Mapping[str, Mapping[str, Mapping[Any, Sequence[float]]]]  # [title][series][row] is (value, low, high)


def _figure(width: float, height: float, **kwargs: Any) -> Any:
    """An empty figure, in inches."""
    import matplotlib  # takes half a second to import
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    return Figure(figsize=(width, height), dpi=200, **kwargs)


@contextmanager
def plot(path: Path, width: float, height: float, rows: int = 1, columns: int = 1, **kwargs: Any) -> Iterator[Any]:
    """Axes (rows, columns) of a figure, in inches, that is saved afterwards."""
    figure = _figure(width, height, layout="constrained")
    yield figure.subplots(rows, columns, squeeze=False, **kwargs)
    figure.savefig(path)


def plain(text: str) -> str:
    """`text` that others wrote, a class's name, for matplotlib: no mathematics, one line of 24 letters at most."""
    text = " ".join(text.encode(errors="replace").decode().split()).replace("$", r"\$")
    return text if len(text) <= 24 else text[:23] + "…"


def pixels(x: Tensor) -> NDArray[np.uint8]:
    """(…, C, H, W) in [−1, 1] → bytes (…, H, W, 3). One channel is grey, three are RGB; of any other number each is a
    grey picture of its own, one below the other with a white line between: (…, C·(H + 1) − 1, W, 3)."""
    if x.shape[-3] not in (1, 3):
        x = functional.pad(x, (0, 0, 0, 1), value=1).flatten(-3, -2)[..., None, :-1, :]
    x = x.detach().cpu().float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return x.expand(*x.shape[:-3], 3, *x.shape[-2:]).movedim(-3, -1).numpy()


def mosaic(x: Tensor, gap: int = 2) -> NDArray[np.uint8]:
    """Rows of images (R, N, C, H, W) → one picture (height, width, 3), white gaps between."""
    tiles = np.pad(pixels(x), [(0, 0), (0, 0), (0, gap), (0, gap), (0, 0)], constant_values=255)
    rows, columns, height, width, _ = tiles.shape
    return tiles.swapaxes(1, 2).reshape(rows * height, columns * width, 3)[:-gap, :-gap]


def _sheet(x: Tensor, columns: int, side: int) -> Image.Image:
    """Images (N, C, H, W) in rows of `columns`, the last row filled up with white. Every pixel as a square of pixels,
    about `side` an image, so that viewers do not blur it."""
    x = torch.cat([x, x.new_ones(-len(x) % columns, *x.shape[1:])])
    factor = max(1, round(side / x.shape[-1]))
    picture = mosaic(x.unflatten(0, (-1, columns)))
    return Image.fromarray(picture.repeat(factor, axis=0).repeat(factor, axis=1))


def grid(path: Path, x: Tensor, columns: int = 8, rows: Sequence[str] = ()) -> None:
    """Images (N, C, H, W) in rows of `columns`, about 100 pixels an image, with the names of the `rows` before them."""
    if rows:
        labelled_rows(path, x.unflatten(0, (-1, columns)), [""] * columns, [plain(row) for row in rows])
    else:
        _sheet(x, columns, 84).save(path)


def _show(axes: Any, picture: NDArray[np.uint8], columns: Sequence[str], rows: Sequence[str]) -> None:
    """A `mosaic` without a frame, with a label over each of the columns and before each of the rows."""
    height, width = picture.shape[:2]
    axes.imshow(picture, interpolation="nearest")
    axes.set_xticks([(i + 0.5) * width / len(columns) for i in range(len(columns))], columns)
    axes.set_yticks([(i + 0.5) * height / len(rows) for i in range(len(rows))], rows)
    axes.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)


def labelled_rows(path: Path, x: Tensor, columns: Sequence[str], rows: Sequence[str]) -> None:
    """Images (R, N, C, H, W) with a label over each column and before each row ("" for none)."""
    picture = mosaic(x)
    longest = max(len(line) for row in rows for line in row.split("\n"))
    margin = max(0.8, 0.1 + 0.066 * longest) if longest else 0.0
    inches, top = 0.6 * x.shape[1], 0.25 * any(columns)
    tall = inches * picture.shape[0] / picture.shape[1]
    figure = _figure(margin + inches, tall + top)
    axes = figure.add_axes((margin / (margin + inches), 0, inches / (margin + inches), tall / (tall + top)))
    _show(axes, picture, columns, rows)
    axes.tick_params(axis="x", labelsize=6)
    figure.savefig(path)


def paths(path: Path, images: Mapping[str, Tensor], energies: Mapping[str, Tensor]) -> None:
    """The first four paths of n images, images[name] (P, n, C, H, W): a block a path with a row a name, and beside it
    the energies (P, n) along both, image over image."""
    count, length = next(iter(images.values()))[:4].shape[:2]
    size = (0.5 * length + 2.6, (0.46 * len(images) + 0.25) * count)
    with plot(path, *size, count, 2, width_ratios=(0.5 * length, 2)) as grid:
        for i, (left, right) in enumerate(grid):
            _show(left, mosaic(torch.stack([x[i] for x in images.values()])), (), list(images))
            for j, (name, values) in enumerate(energies.items()):
                right.plot(values[i].numpy(), ("o--", "o-")[j], color=("0.6", "C0")[j], ms=2, lw=1, label=name)
            right.set(xticks=[], ylabel="E(x)")
        grid[0, 1].legend(frameon=False, fontsize=6)
        grid[-1, 1].set_xlabel("along the path")


def strips(path: Path, trace: Tensor, steps: Sequence[int]) -> None:
    """Snapshots (T, N, C, H, W) of N chains, a row a chain, a column a snapshot under its SGLD step."""
    labels = [f"step {steps[0]}"] + [str(step) for step in steps[1:]]
    labelled_rows(path, trace.transpose(0, 1), labels, [""] * trace.shape[1])


def animation(path: Path, trace: Tensor, columns: int = 8, milliseconds: int = 80) -> None:
    """Snapshots (T, N, C, H, W) as a GIF that rests on the last one for two seconds and starts again."""
    frames = [_sheet(x, columns, 56) for x in trace]
    durations = [milliseconds] * (len(frames) - 1) + [2000]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def scores(path: Path, sets: Mapping[str, NDArray[np.float64]]) -> None:
    """Histograms of scores (N,), a row a set, each to its own height.

    The axis is linear within ±0.1 around 0, where images lie, and logarithmic beyond, where noise does.
    """
    linear = 0.1
    warped = np.arcsinh(np.concatenate(list(sets.values())) / linear)
    edges = np.linspace(warped.min(), warped.max(), 160)
    powers = [10.0**k for k in range(-1, 9)]
    ticks = [t for t in [*(-p for p in powers), 0, *powers] if edges[0] <= np.arcsinh(t / linear) <= edges[-1]]
    middle = np.arcsinh(np.median(sets["test"]) / linear) if "test" in sets else 0
    with plot(path, 5, 0.6 + 0.28 * len(sets)) as ((axes,),):
        for i, (name, values) in enumerate(sets.items()):
            counts, _ = np.histogram(np.arcsinh(values / linear), edges)
            colour = "0.35" if name in ("train", "test") else "C0"
            axes.stairs(0.9 * counts / counts.max() - i, edges, baseline=-i, fill=True, color=colour, lw=0)
        axes.axvline(middle, color="0.35", lw=0.6, zorder=0)
        axes.set_xticks(np.arcsinh(np.array(ticks) / linear), [f"{t:g}".replace("-", "−") for t in ticks])
        axes.set_yticks([0.2 - i for i in range(len(sets))], list(sets))
        axes.set(ylim=(1 - len(sets), 1), xlabel="score −E(x)")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)


def scored_images(path: Path, sets: Mapping[str, Tensor], scores: Mapping[str, NDArray[np.float64]]) -> None:
    """A column a set, a row an image (N, C, H, W), each with its score (N,) below it."""
    rows = len(next(iter(sets.values())))
    with plot(path, 1.1 * len(sets), 1.25 * rows + 0.2, rows, len(sets)) as grid:
        for column, (name, images) in zip(grid.T, sets.items(), strict=True):
            column[0].set_title(name)
            for axes, image, score in zip(column, images, scores[name], strict=False):
                axes.imshow(pixels(image), interpolation="nearest")
                axes.set(xlabel=f"{score:.4f}", xticks=[], yticks=[])


def chain_state(path: Path, sets: Mapping[str, NDArray[np.float64]], ages: NDArray[np.int64]) -> None:
    """Histograms of the scores (N,) of several sets on one axis, and of the chains' ages (N,) in SGLD steps."""
    edges = np.histogram_bin_edges(np.concatenate(list(sets.values())), 60)
    grain = max(int(np.gcd.reduce(ages)), 1)  # ages are multiples of K: bins of whole ones, or some stay empty
    width = grain * -(-(int(ages.max()) + grain) // (60 * grain))
    with plot(path, 7, 2.4, 1, 2) as ((left, right),):
        for name, values in sets.items():
            left.hist(values, edges, weights=np.full(len(values), 1 / len(values)), alpha=0.5, label=name)
        left.set(xlabel="score −E(x)", ylabel="share of the images")
        left.legend(frameon=False)
        right.hist(ages, np.arange(0, ages.max() + 2 * width, width), weights=np.full(len(ages), 1 / len(ages)))
        right.set(xlabel="age, SGLD steps", ylabel="share of the chains")


def roc(path: Path, inliers: NDArray[np.float64], sets: Mapping[str, NDArray[np.float64]]) -> None:
    """ROC curves of scores (N,): share of inliers over share of outliers above a threshold, the latter to log scale."""
    thresholds = np.quantile(inliers, np.linspace(1, 0, 400))
    tpr = np.concatenate([[0], (inliers[None] >= thresholds[:, None]).mean(axis=1)])
    with plot(path, 4.6, 2.8) as ((axes,),):
        for i, (name, values) in enumerate(sets.items()):
            fpr = 1 - np.searchsorted(np.sort(values), thresholds, side="left") / len(values)
            style = ("-", "--", ":")[i // 10 % 3]
            axes.plot(np.concatenate([[0], fpr]), tpr, style, color=f"C{i % 10}", lw=1, label=name)
        axes.axhline(0.95, color="0.6", lw=0.6)
        axes.set_xscale("symlog", linthresh=1e-3)
        axes.set(xlim=(0, 1), ylim=(0, 1.01), xlabel="outliers accepted", ylabel="test images accepted")
        axes.set_xticks([0, 1e-3, 1e-2, 1e-1, 1], ["0", "0.1 %", "1 %", "10 %", "100 %"])
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), fontsize=6)


def intervals(path: Path, panels: Panels) -> None:
    """Panels of dots with intervals: panels[title][series][row] is (value, low, high); a colour a series."""
    rows: dict[str, list[Any]] = {}  # of each panel, in the order of their first series
    names: list[str] = []  # of all series
    for title, panel in panels.items():
        rows[title] = list(dict.fromkeys(row for series in panel.values() for row in series))
        names += [name for name in panel if name not in names]
    heights = [max(len(its_rows), 2) for its_rows in rows.values()]
    size = (6, 0.8 + sum(0.17 * height + 0.5 for height in heights))
    with plot(path, *size, len(panels), height_ratios=heights) as grid:
        for (axes,), (title, panel) in zip(grid, panels.items(), strict=True):
            for name, values in panel.items():
                i = names.index(name)
                y = [rows[title].index(row) + 0.5 * ((i + 0.5) / len(names) - 0.5) for row in values]
                x, low, high = np.array(list(values.values())).T
                axes.hlines(y, low, high, color=f"C{i % 10}", lw=1)
                axes.plot(x, y, "o", color=f"C{i % 10}", ms=3, label=name)
            axes.set_yticks(range(len(rows[title])), rows[title])
            axes.set_ylim(len(rows[title]) - 0.5, -0.5)
            axes.grid(axis="x", lw=0.3)
            axes.set_title(title, loc="left")
        if len(names) > 1:
            handles = grid[0, 0].get_legend_handles_labels()
            axes.figure.legend(*handles, frameon=False, loc="outside lower center", ncols=3)


def by_steps(path: Path, panels: Panels, floors: Mapping[str, float]) -> None:
    """Panels of curves with intervals over SGLD steps: panels[title][series][steps] is (value, low, high).
    A dashed line at floors[title], what validation images reach."""
    with plot(path, 2.1 * len(panels), 2.2, 1, len(panels)) as (row,):
        for axes, (title, series) in zip(row, panels.items(), strict=True):
            for i, (name, values) in enumerate(series.items()):
                steps, (value, low, high) = list(values), np.array(list(values.values())).T
                axes.fill_between(steps, low, high, color=f"C{i}", alpha=0.2, lw=0)
                axes.plot(steps, value, "o-", color=f"C{i}", ms=2.5, lw=1, label=name)
            axes.axhline(floors[title], color="0.3", lw=0.8, ls="--", label="validation images")
            axes.set_xscale("log", base=2)
            axes.set_xticks(steps, [str(step) for step in steps])
            axes.set(title=title, xlabel="SGLD steps")
            axes.tick_params(labelsize=6)
        handles = axes.get_legend_handles_labels()
        axes.figure.legend(*handles, frameon=False, loc="outside lower center", ncols=len(handles[0]))


def histogram(path: Path, shares: Mapping[str, NDArray[np.float64]], names: Sequence[str] | None = None) -> None:
    """Bars of shares per class (classes,), a colour a series, the classes' `names` below them."""
    width, below = 0.8 / len(shares), [plain(name) for name in names or ()]
    with plot(path, 5, 1.8 + 0.07 * max(map(len, below), default=0)) as ((axes,),):
        for i, (name, values) in enumerate(shares.items()):
            x = np.arange(len(values))
            axes.bar(x + (i - (len(shares) - 1) / 2) * width, values, width, color=f"C{i}", label=name)
        axes.set(xticks=x, xlabel="class, by the classifier", ylabel="share")
        if below:
            axes.set_xticks(x, below[: len(x)], rotation=90, fontsize=min(8, 250 / len(x)))
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def reliability(path: Path, confidence: NDArray[np.float64], correct: NDArray[np.float64], bins: int = 15) -> None:
    """Share of `correct` (N,) in equal bins of `confidence` (N,) in [0, 1], and the share of images in each."""
    edges = np.linspace(0, 1, bins + 1)
    counts, right = np.histogram(confidence, edges)[0], np.histogram(confidence, edges, weights=correct)[0]
    with plot(path, 5, 2.4, 1, 2) as ((left, axes),):
        left.stairs(np.divide(right, counts, out=np.zeros(bins), where=counts > 0), edges, fill=True)
        left.plot([0, 1], [0, 1], color="0.3", lw=0.8, ls="--")
        left.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
        axes.stairs(counts / counts.sum(), edges, fill=True, color="0.6")
        axes.set(xlabel="confidence", ylabel="share of the images", xlim=(0, 1))


def chains(path: Path, steps: Sequence[int], panels: Mapping[str, Mapping[str, NDArray[np.float64]]]) -> None:
    """Statistics of chains (chains, records) by SGLD step, a thin line a chain, a thick one for their median."""
    with plot(path, 2.4 * len(panels), 2.3, 1, len(panels)) as (row,):
        for axes, (title, groups) in zip(row, panels.items(), strict=True):
            for i, (name, values) in enumerate(groups.items()):
                x = np.array(steps[: values.shape[1]])
                axes.plot(x, values.T, color=f"C{i}", lw=0.3, alpha=0.5)
                axes.plot(x, np.median(values, axis=0), color=f"C{i}", lw=1.2, label=name)
            axes.set_xscale("symlog", linthresh=max(steps[1], 1))
            axes.set_xlim(0, steps[-1])
            if title == "energy":
                axes.set_yscale("symlog", linthresh=0.1)  # as in `scores`
            axes.set(title=title, xlabel="SGLD steps" if title != "autocorrelation" else "lag, SGLD steps")
        axes.legend(frameon=False)


def contact_sheet(path: Path, tiles: Mapping[str, tuple[Path | None, str | None]], columns: int = 4) -> None:
    """A picture file a tile under its label, or what went wrong instead; both where there are both."""
    columns, lines = min(columns, len(tiles)), max(label.count("\n") + 1 for label in tiles)
    rows = -(-len(tiles) // columns)
    with plot(path, 2.6 * columns, (2.6 + 0.14 * lines) * rows, rows, columns) as grid:
        for axes in grid.flat:
            axes.set_axis_off()
        for axes, (label, (file, error)) in zip(grid.flat, tiles.items(), strict=False):
            if file:
                axes.imshow(np.asarray(opened(file, "RGB")))
            else:
                what = textwrap.fill(error or "no samples", 36)[:400]
                axes.text(0.5, 0.5, what, ha="center", va="center", fontsize=6)
            axes.set_title(label, fontsize=6, color="C3" if error else "0.1")


def parallel_coordinates(path: Path, names: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """An axis a name, a line a job of values by name, coloured by the last, grey where that is "nan".

    Positive numbers that span a factor of ten lie on a logarithmic axis; what is no number in the order given.
    """
    from matplotlib import colormaps

    heights: list[Any] = []
    with plot(path, 1.5 + 1.3 * len(names), 3) as ((axes,),):
        for i, column in enumerate(zip(*lines, strict=True)):
            try:
                y = np.array([float(value) for value in column])
            except ValueError:
                y = np.array([float(column.index(value)) for value in column])
            low, high = np.nanmin(y, initial=np.inf), np.nanmax(y, initial=-np.inf)
            if low > 0 and high >= 10 * low:
                y, low, high = np.log(y), np.log(low), np.log(high)
            heights.append((y - low) / (high - low) if high > low else 0 * y + 0.5)
            axes.axvline(i, color="0.3", lw=0.8)
            ticks = {place: text for place, text in zip(heights[i], column, strict=True) if np.isfinite(place)}
            for place in sorted(ticks)[:: len(ticks) // 12 + 1]:  # as many as can be read
                axes.text(i + 0.03, place, ticks[place], fontsize=6, va="center")
        colours = colormaps["viridis"](np.nan_to_num(1 - heights[-1]))
        for line, colour in zip(np.array(heights).T, colours, strict=True):
            axes.plot(line, color=colour if np.isfinite(line[-1]) else "0.7", lw=1, zorder=0)
        axes.set_xticks(range(len(names)), names, fontsize=6)
        axes.set(yticks=[], xlim=(-0.1, len(names) - 0.6))
        axes.spines[:].set_visible(False)


def points(path: Path, panels: Mapping[str, Tensor]) -> None:
    """A panel each of points (N, 2) in [−1, 1]² or values (cells, cells) there, row by row from the bottom."""
    with plot(path, 2.2 * len(panels), 2.4, 1, len(panels)) as (row,):
        for axes, (title, x) in zip(row, panels.items(), strict=True):
            if x.shape[1] == 2:
                axes.scatter(*x.cpu().numpy().T, s=1, lw=0, color="C0")
            else:
                image = axes.imshow(x.numpy(), origin="lower", extent=(-1, 1, -1, 1), cmap="viridis")
                bar = axes.figure.colorbar(image, ax=axes, location="bottom", shrink=0.9, pad=0.02)
                bar.ax.tick_params(labelsize=6)
            axes.set(xlim=(-1, 1), ylim=(-1, 1), aspect="equal", xticks=[], yticks=[], title=title)
            axes.spines[:].set_visible(True)
