"""The README's figure of a diverging run without and with the guard:

python tests/benchmarks/guard_figure.py WITHOUT_RUN WITH_RUN guard_figure.png
"""

import json
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

from ebm.checkpoint import load_energy
from ebm.figures import mosaic
from ebm.sampler import SGLD, uniform_noise

runs, out = {"without": Path(sys.argv[1]), "with the guard": Path(sys.argv[2])}, sys.argv[3]
figure = Figure(figsize=(9, 3.6), dpi=160, layout="constrained")
grid = figure.subplot_mosaic([["gap", *runs], ["fresh", *runs]], width_ratios=[2.2, 1, 1])
for color, (name, run) in zip(("C3", "C0"), runs.items(), strict=True):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for key, values in {
        "gap": [(line["step"], -line["train/cd"]) for line in lines if "train/cd" in line],
        "fresh": [
            (line["step"], line["chain/score_old"] - line["chain/score_fresh"])
            for line in lines
            if "chain/score_old" in line
        ],
    }.items():
        grid[key].plot(*zip(*values, strict=True), color=color, lw=1, label=name)
    for event in (line for line in lines if line.get("guard/action") == "rollback"):
        for key in ("gap", "fresh"):
            grid[key].axvline(event["step"], color=color, ls=":", lw=1)
    generator = torch.Generator().manual_seed(0)
    x = SGLD(steps=256)(load_energy(run), uniform_noise((64, 1, 28, 28), generator), generator)
    grid[name].imshow(mosaic(x.view(8, 8, *x.shape[1:])), interpolation="nearest")
    grid[name].set(title=name, xticks=[], yticks=[])
grid["gap"].set(ylabel="score gap\nreal − chains", ylim=(-0.5, 3.5))
grid["gap"].legend(frameon=False)
grid["fresh"].set(ylabel="score\nold − fresh chains", xlabel="step")
figure.savefig(out)
