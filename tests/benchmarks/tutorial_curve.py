"""Our first epochs of the tutorial's recipe against its published curve, in one figure.

python tests/benchmarks/tutorial_curve.py RUN_DIR/metrics.jsonl curve.csv figure.png
"""

import csv
import json
import sys
from pathlib import Path

from matplotlib.figure import Figure


def main(metrics: str, curve: str, out: str) -> None:
    records = [json.loads(line) for line in Path(metrics).read_text().splitlines()]
    ours = [record for record in records if "val/cd" in record]
    theirs = list(csv.DictReader(Path(curve).read_text().splitlines()))[: len(ours) + 4]
    figure = Figure(figsize=(6, 2.4), dpi=200, layout="constrained")
    for axes, our_key, their_key, label in zip(
        figure.subplots(1, 2),
        ("noise/score", "val/cd"),
        ("noise_score_1024", "val_contrastive_divergence"),
        ("score of uniform noise", "validation CD (noise − real)"),
        strict=True,
    ):
        epochs = [int(row["epoch"]) for row in theirs]
        axes.plot(epochs, [float(row[their_key]) for row in theirs], "o-", ms=3, color="0.6", label="published")
        axes.plot([r["epoch"] for r in ours], [r[our_key] for r in ours], "o-", ms=3, color="C0", label="ours")
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.legend(frameon=False)
    figure.savefig(out)
    for row, record in zip(theirs, ours, strict=False):
        print(row["epoch"], f"val/cd {record['val/cd']:.3f}, published {row['val_contrastive_divergence']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
