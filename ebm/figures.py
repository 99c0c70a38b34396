"""Pictures from numbers. Images are (…, C, H, W) in [−1, 1]; every function writes one file."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

matplotlib.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})


def pixels(x: Tensor) -> NDArray[np.uint8]:
    """(…, C, H, W) in [−1, 1] → bytes (…, H, W, 3)."""
    x = x.detach().cpu().float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return x.expand(*x.shape[:-3], 3, *x.shape[-2:]).movedim(-3, -1).numpy()


def mosaic(x: Tensor, gap: int = 2) -> NDArray[np.uint8]:
    """Rows of images (R, N, C, H, W) → one picture (height, width, 3), white gaps between."""
    tiles = np.pad(pixels(x), [(0, 0), (0, 0), (0, gap), (0, gap), (0, 0)], constant_values=255)
    rows, columns, height, width, _ = tiles.shape
    return tiles.swapaxes(1, 2).reshape(rows * height, columns * width, 3)[:-gap, :-gap]


def _rows(x: Tensor, columns: int) -> Tensor:
    """(N, …) → (R, columns, …), the last row filled up with white."""
    missing = -len(x) % columns
    return torch.cat([x, x.new_ones(missing, *x.shape[1:])]).unflatten(0, (-1, columns))


def enlarged(picture: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """Every pixel as factor × factor pixels, so that viewers do not blur it."""
    return picture.repeat(factor, axis=-3).repeat(factor, axis=-2)


def grid(path: Path, x: Tensor, columns: int = 8) -> None:
    """Images (N, C, H, W) in rows of `columns`, about 100 pixels an image."""
    factor = max(1, round(84 / x.shape[-1]))
    Image.fromarray(enlarged(mosaic(_rows(x, columns)), factor)).save(path)


def labelled_rows(path: Path, x: Tensor, columns: Sequence[str], rows: Sequence[str], title: str = "") -> None:
    """Images (R, N, C, H, W) with a label over each column and before each row ("" for none)."""
    picture = mosaic(x)
    height, width = picture.shape[:2]
    inches, margin, top = 0.6 * x.shape[1], 0.8 if any(rows) else 0.0, 0.5 if title else 0.25
    tall = inches * height / width
    figure = Figure(figsize=(margin + inches, tall + top), dpi=200)
    axes = figure.add_axes((margin / (margin + inches), 0, inches / (margin + inches), tall / (tall + top)))
    axes.imshow(picture, interpolation="nearest")
    axes.set_xticks([(i + 0.5) * width / x.shape[1] for i in range(x.shape[1])], columns)
    axes.set_yticks([(i + 0.5) * height / x.shape[0] for i in range(x.shape[0])], rows)
    axes.tick_params(axis="x", labelsize=6)
    axes.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    if title:
        axes.set_title(title)
    figure.savefig(path)


def strips(path: Path, trace: Tensor, steps: Sequence[int]) -> None:
    """Snapshots (T, N, C, H, W) of N chains, a row a chain, a column a snapshot under its SGLD step."""
    labels = [f"step {steps[0]}"] + [str(step) for step in steps[1:]]
    labelled_rows(path, trace.transpose(0, 1), labels, [""] * trace.shape[1])


def animation(path: Path, trace: Tensor, columns: int = 8, milliseconds: int = 80) -> None:
    """Snapshots (T, N, C, H, W) as a GIF that rests on the last one for two seconds and starts again."""
    factor = max(1, round(56 / trace.shape[-1]))
    frames = [Image.fromarray(enlarged(mosaic(_rows(x, columns)), factor)) for x in trace]
    durations = [milliseconds] * (len(frames) - 1) + [2000]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def scores(path: Path, sets: Mapping[str, NDArray[np.float64]]) -> None:
    """Histograms of scores (N,) of several sets, each to its own height.

    The axis is linear within ±0.1 around 0, where images lie, and logarithmic beyond, where noise does.
    """
    linear = 0.1
    figure = Figure(figsize=(5, 2.4), dpi=200, layout="constrained")
    axes = figure.add_subplot()
    warped = np.arcsinh(np.concatenate(list(sets.values())) / linear)
    edges = np.linspace(warped.min(), warped.max(), 120)
    for i, (name, values) in enumerate(sets.items()):
        counts, _ = np.histogram(np.arcsinh(values / linear), edges)
        axes.stairs(counts / counts.max(), edges, fill=True, color=f"C{i}", alpha=0.2)
        axes.stairs(counts / counts.max(), edges, color=f"C{i}", label=name)
    powers = [10.0**k for k in range(-1, 9)]
    ticks = [t for t in [*(-p for p in powers), 0, *powers] if edges[0] <= np.arcsinh(t / linear) <= edges[-1]]
    axes.set_xticks(np.arcsinh(np.array(ticks) / linear), [f"{t:g}".replace("-", "−") for t in ticks])
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("score −E(x)")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path)


def scored_images(path: Path, sets: Mapping[str, Tensor], scores: Mapping[str, NDArray[np.float64]]) -> None:
    """A column a set, a row an image (N, C, H, W), each with its score (N,) below it."""
    rows = len(next(iter(sets.values())))
    figure = Figure(figsize=(1.1 * len(sets), 1.25 * rows + 0.2), dpi=200, layout="constrained")
    axes = figure.subplots(rows, len(sets), squeeze=False)
    for column, (name, images) in enumerate(sets.items()):
        axes[0, column].set_title(name)
        for row in range(rows):
            axes[row, column].imshow(pixels(images[row]), interpolation="nearest")
            axes[row, column].set_xlabel(f"{scores[name][row]:.4f}")
            axes[row, column].set(xticks=[], yticks=[])
    figure.savefig(path)


def chains(path: Path, sets: Mapping[str, NDArray[np.float64]], ages: NDArray[np.int64]) -> None:
    """Histograms of the scores (N,) of several sets on one axis, and of the chains' ages (N,) in SGLD steps."""
    figure = Figure(figsize=(7, 2.4), dpi=200, layout="constrained")
    left, right = figure.subplots(1, 2)
    edges = np.histogram_bin_edges(np.concatenate(list(sets.values())), 60)
    for name, values in sets.items():
        left.hist(values, edges, weights=np.full(len(values), 1 / len(values)), alpha=0.5, label=name)
    left.set(xlabel="score −E(x)", ylabel="share of the images")
    left.legend(frameon=False)
    right.hist(ages, 60, weights=np.full(len(ages), 1 / len(ages)))
    right.set(xlabel="age, SGLD steps", ylabel="share of the chains")
    figure.savefig(path)
