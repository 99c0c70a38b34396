"""Samples as files: samples.npz, and pictures of them and of the chains that led there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ebm.evaluation import figures
from ebm.files import whole_files

SHOWN = 400  # images of a grid, at most


@dataclass
class Samples:
    """What chains made, and how it is to be shown."""

    trace: Tensor  # snapshots (T, B, *shape)
    steps: list[int]  # after which they were taken
    samples: Tensor | None = None  # (N, *shape); None for the last snapshot
    labels: Tensor | None = None  # (N,)
    class_names: Sequence[str] = ()
    columns: int = 0  # of the grid; 0 for about as many as rows
    sheet: tuple[str, Callable[[Path], None]] | None = None  # a picture more: the file's name, and what draws it
    report: str = ""  # lines to print


def write_samples(out: Path, made: Samples, snapshots: int = 8) -> None:
    """Write to the folder `out`, all or nothing, and print what was written and the report:

    samples.npz   `samples` (N, *shape) and, where there are any, `labels` (N,)
    grid.png      images in a grid, a row a class where there are several
    strips.png    eight chains at the start and at `snapshots` moments after it
    chains.gif    64 chains on their way
    and the sheet. Raises ValueError where the samples are not finite, OSError where the files cannot be written.
    """
    trace, labels, columns = made.trace, made.labels, made.columns
    samples = trace[-1] if made.samples is None else made.samples
    if not bool(torch.isfinite(samples).all()):
        way_out = "lower sampler.step_size, or set sampler.grad_clamp and bounds"
        raise ValueError(f"samples are not finite: the steps diverge; {way_out}")
    if samples.dim() == 4:  # as pictures have them; chains without bounds may end beyond
        samples = samples.clamp(-1, 1)
    arrays = {"samples": samples.numpy()} | ({} if labels is None else {"labels": labels.numpy()})
    shown = samples
    row_names: list[str] = []
    if labels is not None and len(labels) > len(labels.unique()) > 1:
        shown, columns, row_names = by_class(samples, labels, made.class_names)
    pictures = ("grid.png", "strips.png", "chains.gif") if samples.dim() == 4 else ()
    lines = [f"samples      {out / 'samples.npz'}  {tuple(samples.shape)} in [{shown.min():.3g}, {shown.max():.3g}]"]
    with whole_files(out) as aside:
        np.savez_compressed(aside / "samples.npz", **arrays)  # type: ignore[arg-type]
        if pictures:
            columns = columns or max(1, min(round(len(shown[:SHOWN]) ** 0.5), 20))
            figures.grid(aside / "grid.png", shown[:SHOWN], columns, row_names)
            moments = sorted({round(i * (len(trace) - 1) / snapshots) for i in range(snapshots + 1)})
            figures.strips(aside / "strips.png", trace[moments, :8], [made.steps[i] for i in moments])
            figures.animation(aside / "chains.gif", trace[:, :64])
            lines.append(f"pictures     {' '.join(str(out / name) for name in pictures)}")
        if made.sheet:
            name, draw = made.sheet
            draw(aside / name)
            lines.append(f"sheet        {out / name}")
    print("\n".join(lines))
    if made.report:
        print(made.report)


def by_class(x: Tensor, labels: Tensor, class_names: Sequence[str] = ()) -> tuple[Tensor, int, list[str]]:
    """Of x (N, *shape) as many of each class, one class after the other, how many that are, and the names of the rows:
    numbers beyond the `class_names`, nothing where there are none."""
    classes = labels.unique()
    columns = max(1, min(int(labels.bincount()[classes].amin()), SHOWN // len(classes)))
    rows = torch.cat([x[labels == label][:columns] for label in classes])
    names = [class_names[label] if label < len(class_names) else str(label) for label in classes.tolist()[:SHOWN]]
    return rows, columns, names if class_names else []
