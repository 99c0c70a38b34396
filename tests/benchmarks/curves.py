"""Curves of runs in one figure, and their numbers, means over 100 steps, in a .json beside it.

python tests/benchmarks/curves.py figure.png NAME=RUN_DIR …    # or NAME=FILE, such a .json that has NAME
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

from ebm.evaluation import figures

PANELS = {
    "train/cd": "score of chains − of real images",
    "chain/score_fresh": "score K steps from noise − of old chains",
    "train/accuracy": "accuracy on real images",
    "train/twins_accuracy": "twins with more energy than real images",
}
STEPS = 100


def curves(run_dir: str) -> dict[str, list[tuple[int, float]]]:
    """Of each panel (step, mean over the STEPS before it)."""
    found: dict[str, dict[int, list[float]]] = {key: defaultdict(list) for key in PANELS}
    for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "chain/score_fresh" in record:
            record["chain/score_fresh"] -= record["chain/score_old"]
        for key in PANELS.keys() & record.keys():
            found[key][-(-record["step"] // STEPS) * STEPS].append(record[key])
    return {key: [(step, sum(v) / len(v)) for step, v in sorted(by.items())] for key, by in found.items() if by}


def main(out: str, *runs: str) -> None:
    of_runs = {}
    for name, _, source in (run.partition("=") for run in runs):
        file = Path(source)
        of_runs[name] = json.loads(file.read_text())["runs"][name] if file.is_file() else curves(source)
    with figures.plot(Path(out), 7, 4.2, 2, 2, sharex=True) as grid:
        for axes, (key, title) in zip(grid.flat, PANELS.items(), strict=True):
            for name, of_run in of_runs.items():
                if key in of_run:
                    axes.plot(*zip(*of_run[key], strict=True), lw=1, label=name)
            axes.set_title(title)
        grid[0, 0].set_ylim(-0.2, 0.2)
        grid[0, 1].set_ylim(-1, 0)
        grid[1, 0].set_ylim(0.5, 1)
        grid[1, 1].set_ylim(0.8, 1)
        grid[0, 0].legend(frameon=False)
        for axes in grid[1]:
            axes.set_xlabel("training step")
    numbers = {n: {k: [[s, round(v, 4)] for s, v in c] for k, c in of_run.items()} for n, of_run in of_runs.items()}
    Path(out).with_suffix(".json").write_text(json.dumps({"steps": STEPS, "runs": numbers}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
