"""Make the weights that ship out of a run and its evaluation:

python evaluate.py checkpoint=RUN_DIR data=mnist evaluation=shipped out=A
python tests/benchmarks/ship.py mnist A/metrics.json RUN_DIR

Writes ebm/weights/mnist.pt, the energy and the configuration it was trained with, and mnist.json: recipe, seed, hash of
the data and the figures measured, and of a run that started from weights the recipe of these, and of theirs. RUN_DIR
may be a file of average.py. Without it the figures of the card alone are replaced: what ships, measured anew; the card
of weights that do not ship, as the published ones, is tests/benchmarks/cards/NAME.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

from ebm.evaluation import features
from ebm.running import checkpoint

name, metrics, *run = sys.argv[1:]
CARD = checkpoint.WEIGHTS / f"{name}.json"
numbers = json.loads(Path(metrics).read_text())
protocol = numbers.pop("protocol")
figures = {key: value for key, value in numbers.items() if key not in ("checkpoint", "skipped")}
measured = {"protocol": protocol, "figures": figures}
if not run:
    card = CARD if CARD.is_file() else Path(__file__).parent / f"cards/{name}.json"
    kept = json.loads(card.read_text()) if card.is_file() else {}
    card.write_text(json.dumps(kept | measured, indent=1) + "\n")
    sys.exit()


def before(config: dict[str, Any]) -> dict[str, Any]:
    """What the run of this configuration started from, and that from, …: weights, steps and configuration of each."""
    if not config.get("initial_weights"):
        return {}
    its = checkpoint.load(config["initial_weights"])
    beside = checkpoint.WEIGHTS / f"{config['initial_weights']}.json"
    earlier = json.loads(beside.read_text()) if beside.is_file() else before(its["config"])
    began = {"start": earlier["start"]} if "start" in earlier else {}
    if (
        Path(config["initial_weights"]).exists() or config["initial_weights"] == name
    ):  # another path, or what these replace
        config["initial_weights"], its["config"]["data"]["root"] = "RUN_DIR", "data"
    weights = features.weights_hash(its["energy"])
    return {"start": began | {"weights": weights, "steps": its["step"], "config": its["config"]}}


state = checkpoint.load(run[0])
config = state["config"]
if "root" in config["data"]:  # a path of this machine
    config["data"]["root"] = "data"
began = before(config)
kept = {key: state[key] for key in ("energy", "energy_config", "class_shares", "step", "epoch")}
checkpoint.save(checkpoint.WEIGHTS / f"{name}.pt", kept | {"config": config})
parts = ("data", "energy", "sampler", "buffer", "loss", "optimizer", "scheduler", "train", "seed")
described = began | {
    "recipe": {part: config[part] for part in parts},
    "steps": state["step"],
    "training_minutes": round(state["loop"]["seconds"] / 60, 1),
    "rollbacks": state["guard"]["rollbacks"],
}
if "mean_of" in state:
    described["mean_of"] = state["mean_of"]
CARD.write_text(json.dumps(described | measured, indent=1) + "\n")
