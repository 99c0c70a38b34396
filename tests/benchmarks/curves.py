"""Curves of the weights that ship, from their cards, in one figure: a colour a recipe, a line a seed, and a dashed line
where a phase begins.

python tests/benchmarks/curves.py figure.png joint residual clothes
"""

import json
import sys
from pathlib import Path

from ebm.evaluation import figures
from ebm.running import checkpoint

PANELS = {
    "train/cd": "score of chains − of real images",
    "chain/score_fresh": "score K steps from noise − of old chains",
    "train/accuracy": "accuracy on real images",
    "train/twins_accuracy": "twins with more energy than real images",
}


def main(out: str, *names: str) -> None:
    with figures.plot(Path(out), 7, 4.2, 2, 2, sharex=True) as grid:
        for number, name in enumerate(names):
            color, card = f"C{number}", json.loads((checkpoint.WEIGHTS / f"{name}.json").read_text())
            for seed, curves in card["curve"].items():
                label = name if seed == str(card["seeds"][0]) else None
                for axes, key in zip(grid.flat, PANELS, strict=True):
                    if key in curves:
                        axes.plot(*zip(*curves[key], strict=True), color=color, lw=0.7, label=label)
                    for step, _ in curves["train/phase"]:
                        axes.axvline(step, color=color, lw=0.5, ls="--")
        for axes, title in zip(grid.flat, PANELS.values(), strict=True):
            axes.set_title(title)
        grid[0, 0].set_ylim(-0.2, 0.2)
        grid[0, 1].set_ylim(-1, 0)
        grid[1, 0].set_ylim(0.5, 1)
        grid[1, 1].set_ylim(0.8, 1)
        grid[0, 0].legend(frameon=False)
        for axes in grid[1]:
            axes.set_xlabel("training step")


if __name__ == "__main__":
    main(*sys.argv[1:])
