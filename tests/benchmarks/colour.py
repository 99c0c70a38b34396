"""CIFAR-10 by energy matching, with and without its second phase, and by contrastive divergence, at the same price:

python tests/benchmarks/colour.py OUT data 10                            # ten minutes of training each, and the table
python tests/benchmarks/colour.py OUT data 10 --only divergence          # one of them
python tests/benchmarks/colour.py OUT data 4 data.image_size=16 energy.width=16 energy.stem=16 device=cpu

`data` is torchvision's root, or a folder with train/ and test/. A run that OUT has goes on from where it was stopped.
Writes results/colour.json of the runs that are complete. Distances are also in units of that of the test images blurred
by a 3×3 mean, which no size of the features changes.
"""

import argparse
import json
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from ebm.data import scaled
from ebm.evaluation.features import features_of, judge
from ebm.evaluation.metrics import frechet
from ebm.running import checkpoint
from ebm.running.trained import dataset_of

ROOT = Path(__file__).parents[2]
RECIPES = {
    "matching": ["experiment=cifar10", "phases=null"],
    "both": ["experiment=cifar10"],
    "divergence": ["experiment=cifar10_divergence"],
}
SETS = ("rotated", "grey", "blurred", "halves", "noise", "fashion_mnist", "mnist")
COLUMNS = {
    "what": "trained by",
    "steps": "training steps",
    "speed": "a second",
    "distance": "distance",
    "in_blurred": "in units of blurred images'",
    "real": "validation images",
    **dict(zip(SETS, ("AUROC: upside down", "grey", "blurred", "halves", "noise", "clothes", "digits"), strict=True)),
    "seconds": "seconds for 64 samples",
}


def python(script: str, *overrides: str) -> float:
    """Seconds that the command took. Raises CalledProcessError where it failed."""
    began = time.perf_counter()
    subprocess.run([sys.executable, str(ROOT / script), *overrides], check=True)
    return time.perf_counter() - began


def is_complete(run: Path) -> bool:
    if not (run / "checkpoints" / "last.pt").is_file():
        return False
    state = checkpoint.load(run)
    return state["loop"]["seconds"] >= 60 * state["config"]["train"]["max_minutes"]


def train(run: Path, recipe: str, given: list[str], minutes: float) -> None:
    if (run / "checkpoints" / "last.pt").is_file() and not is_complete(run):
        python("train.py", f"resume={run}")
    elif not run.exists():
        python("train.py", *RECIPES[recipe], *given, f"train.max_minutes={minutes}", f"hydra.run.dir={run}")


def row(run: Path, recipe: str, fits_judge: bool, others: str, device: list[str]) -> dict[str, Any]:
    """The numbers of a run that is complete, drawn with as many steps as its pictures."""
    state = checkpoint.load(run)
    steps = state["config"]["train"]["sample_steps"]
    sets = f"ood.sets=[{','.join(SETS)}]"
    protocol = ["evaluation=shipped", "evaluation.parts=[ood,samples]", f"samples.steps=[{steps}]", sets]
    named = ["judge=cifar10"] * fits_judge
    numbers_in, sheet_in = run / "evaluation" / "colour", run / "sheet"
    python("evaluate.py", f"checkpoint={run}", *protocol, *named, f"ood.root={others}", f"out={numbers_in}", *device)
    seconds = python("sample.py", f"checkpoint={run}", "num_samples=64", f"out={sheet_in}", *device)
    numbers = json.loads((numbers_in / "metrics.json").read_text())
    data = dataset_of(state)
    on = "cuda" if torch.cuda.is_available() else "cpu"
    net, _ = judge(data, "cifar10" if fits_judge else None, device=on)
    test = features_of(net, data.test, device=on)
    mean = functional.avg_pool2d(functional.pad(scaled(data.test), [1] * 4, mode="replicate"), 3, stride=1)
    blurred = frechet(test, features_of(net, mean[:2000], device=on))
    (key,) = [key for key in numbers if key.startswith("frechet/") and key.endswith(f"/{steps}")]
    distance, real = numbers[key], numbers[key.replace(f"/{steps}", "/real")]
    return {
        "what": recipe,
        "steps": state["step"],
        "speed": f"{state['step'] / state['loop']['seconds']:.1f}",
        "distance": f"{distance:.1f}",
        "in_blurred": f"{distance / blurred:.2f}",
        "real": f"{real:.1f}",
        **{name: f"{numbers[f'auroc/{name}']:.3f}" for name in SETS},
        "seconds": f"{seconds:.0f}",
    }


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("out", type=Path)
parser.add_argument("data", type=Path)
parser.add_argument("minutes", type=float)
parser.add_argument("--only", choices=RECIPES)
parser.add_argument("--others", default="data", help="torchvision's root with MNIST and Fashion-MNIST")
given, overrides = parser.parse_known_args()
in_folders = (given.data / "train").is_dir()
where = [f"data.root={given.data}", *(["data=folder"] if in_folders else [])]
is_whole = not any(override.startswith("data.image_size=") for override in overrides)
device = [override for override in overrides if override.startswith("device=")]
for recipe in [given.only] if given.only else RECIPES:
    train(given.out / recipe, recipe, where + overrides, given.minutes)
runs = {recipe: given.out / recipe for recipe in RECIPES}
rows = [row(run, recipe, is_whole, given.others, device) for recipe, run in runs.items() if is_complete(run)]
table = {
    "command": f"python tests/benchmarks/colour.py OUT data {given.minutes:g} {' '.join(overrides)}".strip(),
    "note": "CIFAR-10 (JPEG)" if in_folders else "CIFAR-10",
    "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    "date": str(date.today()),
    "columns": COLUMNS,
    "rows": rows,
}
(Path(__file__).parent / "results" / "colour.json").write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n")
