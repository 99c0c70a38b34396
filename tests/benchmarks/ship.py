"""Make the weights that ship, and their card, of the runs of a recipe's one command with several seeds:

python train.py -m experiment=joint data.root=data seed=0,1,2 hydra.sweep.dir=runs/joint
python evaluate.py -m checkpoint=runs/joint/0,runs/joint/1,runs/joint/2 data.root=data evaluation=shipped
python tests/benchmarks/ship.py joint runs/joint/0 runs/joint/1 runs/joint/2

Writes ebm/weights/joint.pt, the energy of the first run and the configuration it was trained with, and the card
joint.json: command, seeds, steps, the evaluation's protocol; by seed commit, machine, minutes, the guard's rollbacks,
numbers and curves; and what the weights are after the first steps of the command on one thread.

python tests/benchmarks/ship.py joint --more RUN_DIR …    # seeds more, run later, for the card
python tests/benchmarks/ship.py joint METRICS.json        # the first seed's numbers alone, measured anew
python tests/benchmarks/ship.py joint --first data        # the first steps alone, after a change of rounding

The card of weights that do not ship, as the published ones, is tests/benchmarks/cards/NAME.json.
"""

import json
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

sys.path.insert(0, str(Path(__file__).parents[2]))  # the scripts
import train
from ebm.evaluation import features
from ebm.running import checkpoint, maintenance
from ebm.running.ranks import Ranks

ROOT = Path(__file__).parents[2]
FIRST = 50  # steps
CURVES = ("train/cd", "chain/score_fresh", "train/accuracy", "train/twins_accuracy")
MEAN_OF = 100  # steps, a point of a curve


def composed(*overrides: str) -> DictConfig:
    """The configuration of `python train.py …`."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("train", list(overrides))


def arguments(name: str, root: str) -> list[str]:
    """Of the recipe's one command: those of train.py."""
    needs_root = "root" in composed(f"experiment={name}").data
    return [f"experiment={name}"] * (name != "quick") + [f"data.root={root}"] * needs_root


def first_steps(name: str, root: str) -> dict[str, Any]:
    """What the weights are after the first steps of the recipe's command on one thread: their hash, the sum of their
    magnitudes, and the machine."""
    cfg, threads = composed(*arguments(name, root), "device=cpu", "sampler.threads=1"), torch.get_num_threads()
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    torch.set_num_threads(1)
    try:
        run = train.build(cfg, config, Path(), Ranks(), None)
        intervals = maintenance.Intervals.of(config["train"], run.batches.steps_per_epoch)
        for step in range(FIRST):
            run.set_learning_rate(step // intervals.steps_per_epoch, intervals.progress(run.loop))
            run.loop.add(train.training_step(run))
    finally:
        torch.set_num_threads(threads)
    weights = run.energy.state_dict()
    magnitude = sum(float(value.double().abs().sum()) for value in weights.values())
    return {
        "steps": FIRST,
        "weights": features.weights_hash(weights),
        "magnitude": magnitude,
        "machine": machine(),
    }


def machine() -> str:
    """The processor, what of it torch uses, and torch: where these are the same, so are the bits."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.is_file() else "")
    name = names[0] if names else platform.processor()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def curves(run_dir: Path) -> dict[str, list[list[float]]]:
    """Of each of the CURVES [step, mean over the steps before it]; of train/phase [its first read-back, number]."""
    records: dict[int, dict[str, float]] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        records.setdefault(record["step"], {}).update(record)  # a step that was rolled back is there twice
    points: dict[str, dict[int, list[float]]] = {}
    phases: dict[int, int] = {}
    for step, record in sorted(records.items()):
        if record.get("train/phase"):
            phases.setdefault(int(record["train/phase"]), step)
        if "chain/score_fresh" in record:
            record["chain/score_fresh"] -= record["chain/score_old"]
        for key in CURVES:
            if key in record:
                points.setdefault(key, {}).setdefault(-(-step // MEAN_OF) * MEAN_OF, []).append(record[key])
    means = {key: [[step, round(sum(v) / len(v), 4)] for step, v in by.items()] for key, by in points.items()}
    return means | {"train/phase": [[step, number] for number, step in phases.items()]}


def measured(metrics: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(protocol, numbers) of an evaluation."""
    numbers = json.loads(metrics.read_text())
    protocol = numbers.pop("protocol")
    return protocol, {key: value for key, value in numbers.items() if key not in ("checkpoint", "skipped")}


def write(card: dict[str, Any], file: Path) -> None:
    """A value a line, or two."""
    text = json.dumps(card, indent=1)
    file.write_text(re.sub(r"\[\s+([\w.+-]+),\s+([\w.+-]+)\s+\]", r"[\1, \2]", text) + "\n")


def by_seed(runs: list[Path]) -> tuple[dict[str, Any], dict[str, dict[str, Any]], dict[str, Any]]:
    """The runs' checkpoints by their seeds, what a card holds of each, and the first one's protocol."""
    states = {str(state["config"]["seed"]): state for state in map(checkpoint.load, runs)}
    evaluations, curve = {}, {}
    for seed, run in zip(states, runs, strict=True):
        (metrics,) = run.glob("evaluation/*/metrics.json")
        evaluations[seed], curve[seed] = measured(metrics), curves(run)
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
    of_seeds = {
        "commit": dict.fromkeys(states, commit),
        "machine": dict.fromkeys(states, machine()),
        "minutes": {seed: round(state["loop"]["seconds"] / 60, 1) for seed, state in states.items()},
        "guard": {seed: state["guard"]["rollbacks"] for seed, state in states.items()},
        "numbers": {seed: numbers for seed, (_, numbers) in evaluations.items()},
        "curve": curve,
    }
    return states, of_seeds, next(iter(evaluations.values()))[0]


def ship(name: str, runs: list[Path]) -> None:
    states, of_seeds, protocol = by_seed(runs)
    first = next(iter(states.values()))
    config = first["config"]
    root = config["data"].get("root", "data")
    if "root" in config["data"]:  # a path of this machine
        config["data"]["root"] = "data"
    card = {
        "command": " ".join(["python train.py", *arguments(name, "data")]),
        "seeds": [int(seed) for seed in states],
        "steps": first["step"],
        "first": first_steps(name, root),
        "protocol": protocol,
    }
    kept = {key: first[key] for key in ("energy", "energy_config", "class_shares", "step", "epoch")}
    checkpoint.save(checkpoint.WEIGHTS / f"{name}.pt", kept | {"config": config})
    write(card | of_seeds, checkpoint.WEIGHTS / f"{name}.json")


def add_seeds(name: str, runs: list[Path]) -> None:
    """Raises ValueError for a run of fewer or more steps, or of a seed that the card has."""
    file = checkpoint.WEIGHTS / f"{name}.json"
    card = json.loads(file.read_text())
    states, of_seeds, _ = by_seed(runs)
    for seed, state in states.items():
        if state["step"] != card["steps"] or int(seed) in card["seeds"]:
            raise ValueError(
                f"{name} has seeds {card['seeds']} of {card['steps']} steps, got {seed} of {state['step']}"
            )
    for key, of_seed in of_seeds.items():
        card[key] |= of_seed
    card["seeds"] += map(int, states)
    write(card, file)


def replace_numbers(name: str, metrics: Path) -> None:
    file = checkpoint.WEIGHTS / f"{name}.json"
    file = file if file.is_file() else Path(__file__).parent / f"cards/{name}.json"
    card = json.loads(file.read_text()) if file.is_file() else {"numbers": {"0": {}}}
    card["protocol"], card["numbers"][next(iter(card["numbers"]))] = measured(metrics)
    write(card, file)


def replace_first(name: str, root: str) -> None:
    file = checkpoint.WEIGHTS / f"{name}.json"
    write(json.loads(file.read_text()) | {"first": first_steps(name, root)}, file)


def main(name: str, *sources: str) -> None:
    if sources[0] == "--first":
        replace_first(name, sources[1])
    elif sources[0].endswith(".json"):
        replace_numbers(name, Path(sources[0]))
    elif sources[0] == "--more":
        add_seeds(name, [Path(source) for source in sources[1:]])
    else:
        ship(name, [Path(source) for source in sources])


if __name__ == "__main__":
    main(*sys.argv[1:])
