"""The README's figure of a diverging run without and with the guard:

python tests/benchmarks/guard_figure.py WITHOUT_RUN WITH_RUN guard_figure.png
"""

import json
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

from ebm.evaluation.figures import mosaic
from ebm.running.checkpoint import load_energy
from ebm.sampling.chains import uniform_noise
from ebm.sampling.sgld import SGLD


def main(without: str, guarded: str, out: str) -> None:
    figure = Figure(figsize=(9, 3.6), dpi=160, layout="constrained")
    grid = figure.subplot_mosaic(
        [["gap", "without", "guarded"], ["fresh", "without", "guarded"]], width_ratios=[2, 1, 1]
    )
    for name, run, color, label in (
        ("without", Path(without), "C3", "without the guard"),
        ("guarded", Path(guarded), "C0", "with it (dotted: rollbacks)"),
    ):
        gaps, fresh = [], []
        for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
            if line.get("guard/action") == "rollback":
                gaps.append((line["step"], float("nan")))  # the line breaks here
                fresh.append(gaps[-1])
                for key in ("gap", "fresh"):
                    grid[key].axvline(line["step"], color=color, ls=":", lw=1)
            if "train/cd" in line:
                gaps.append((line["step"], -line["train/cd"]))
            if "chain/score_old" in line:
                fresh.append((line["step"], line["chain/score_old"] - line["chain/score_fresh"]))
        for key, values in (("gap", gaps), ("fresh", fresh)):
            grid[key].plot(*zip(*values, strict=True), color=color, lw=1, label=label)
        generator = torch.Generator().manual_seed(0)
        x = SGLD(steps=256)(load_energy(run), uniform_noise((64, 1, 28, 28), generator), generator)
        grid[name].imshow(mosaic(x.view(8, 8, *x.shape[1:])), interpolation="nearest")
        grid[name].set(title=label.partition(" (")[0], xticks=[], yticks=[])
    grid["gap"].set(ylabel="score gap\nreal − chains")
    grid["gap"].legend(facecolor="white", edgecolor="none", framealpha=1)
    grid["fresh"].set(ylabel="score\nold − fresh chains", xlabel="step")
    figure.savefig(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
