"""The two diagnostics of Nijkamp et al. 2020 ("On the Anatomy of MCMC-Based Maximum Likelihood Learning of
Energy-Based Models", section 3) and what they mean for samples:

python tests/benchmarks/regimes.py FIGURE.png RUN_A RUN_B RUN_C        # conf/experiment/README.md has their commands

Left: the difference of energies of data and chains, d. Middle: the length of a step's gradient over that of the noise
that would balance it, √(2 step_size · T · dimensions). Right: chains from noise after K and 50 K steps.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from ebm.energies import temperature_of
from ebm.running import checkpoint
from ebm.sampling.chains import uniform_noise
from ebm.sampling.sgld import SGLD

figure, *runs = sys.argv[1:]
fig, axes = plt.subplots(
    len(runs), 4, figsize=(9, 2.1 * len(runs)), layout="constrained", squeeze=False, width_ratios=[2, 2, 1, 1]
)
for row, run in zip(axes, runs, strict=True):
    state = checkpoint.load(run)
    settings = {k: v for k, v in state["config"]["sampler"].items() if k != "_target_"}
    sampler, energy = SGLD(**settings), checkpoint.build_energy(state)
    lines = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    difference = [(line["step"], line["train/cd"]) for line in lines if "train/cd" in line]
    balanced = (2 * sampler.step_size * temperature_of(energy) * 2) ** 0.5
    force = [(line["step"], line["chain/step_length"] / balanced) for line in lines if "chain/step_length" in line]
    row[0].plot(*zip(*difference, strict=True), lw=0.8)
    row[0].axhline(0, color="0.6", lw=0.8)
    noise, fresh = state["config"]["sampler"]["noise_std"], state["config"]["buffer"]["reinit_probability"]
    row[0].set(ylabel=f"noise {noise},\n{fresh:.0%} fresh chains")
    row[1].plot(*zip(*force, strict=True), lw=0.8, color="C1")
    generator = torch.Generator().manual_seed(0)
    x = uniform_noise((2000, 2), generator)
    for column, steps in ((2, sampler.steps), (3, 49 * sampler.steps)):
        x = sampler(energy, x, generator, steps)
        row[column].scatter(*x.T, s=1, lw=0, color="0.2")
        row[column].set(xlim=(-1, 1), ylim=(-1, 1), xticks=[], yticks=[], aspect="equal")
titles = "d = E(data) − E(chains)", "gradient step / balanced noise", "K steps", "50 K steps"
for column, title in enumerate(titles):
    axes[0, column].set_title(title, fontsize=9)
for axis in axes[-1, :2]:
    axis.set_xlabel("training step")
fig.savefig(figure, dpi=160)
