"""CIFAR-10 by energy matching, with and without its second phase, and by contrastive divergence, at the same price:

python tests/benchmarks/colour.py OUT data 10                            # ten minutes of training each, and the table
python tests/benchmarks/colour.py OUT data 10 --only divergence          # one of them
python tests/benchmarks/colour.py OUT data 4 --device cpu data.image_size=16 energy.width=16 energy.stem=16

`data` is torchvision's root, or a folder with train/ and test/, whose images `data.image_size` may resize. A run in OUT
has goes on from where it was stopped. Writes OUT/colour.json of the runs that are complete. Distances are also in units
of that of the test images blurred by a 3×3 mean, which no size of the features changes. A set of outliers that --others
lacks is left out.
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
    # without the second phase there is no law to end with: the way from noise alone
    "matching": ["experiment=cifar10", "phases=null", "sampler.quiet=1", "sampler.steps=100", "train.sample_steps=100"],
    "matching_then_divergence": ["experiment=cifar10"],
    "divergence": ["experiment=cifar10_divergence"],
}
SETS = ("rotated", "grey", "blurred", "halves", "noise", "fashion_mnist", "mnist")
COLUMNS = {
    "what": "trained by",
    "steps": "training steps",
    "speed": "a second",
    "distance": "distance",
    "in_blurred": "in units of a 3×3 mean's",
    "real": "validation images",
    **dict(zip(SETS, ("AUROC: upside down", "grey", "blurred", "halves", "noise", "clothes", "digits"), strict=True)),
    "sgld_steps": "SGLD steps",
    "seconds": "seconds of sample.py, 64 images",
}


def python(script: str, *overrides: str) -> float:
    """Seconds that the command took. Raises CalledProcessError where it failed."""
    command = [sys.executable, str(ROOT / script), *overrides]
    began = time.perf_counter()
    with subprocess.Popen(command) as child:  # run() kills it on Ctrl-C, before it has saved
        try:
            failed = child.wait()
        except KeyboardInterrupt:
            child.wait()
            raise
    if failed:
        raise subprocess.CalledProcessError(failed, command)
    return time.perf_counter() - began


def is_complete(run: Path, minutes: float) -> bool:
    return (run / "checkpoints" / "last.pt").is_file() and checkpoint.load(run)["loop"]["seconds"] >= 60 * minutes


def train(run: Path, recipe: str, given: list[str], minutes: float) -> None:
    if is_complete(run, minutes):
        return
    if (run / "checkpoints" / "last.pt").is_file():
        python("train.py", f"resume={run}")
    else:
        python("train.py", *RECIPES[recipe], *given, f"train.max_minutes={minutes}", f"hydra.run.dir={run}")


def row(run: Path, recipe: str, others: str, device: str) -> dict[str, Any]:
    """The numbers of a run that is complete, drawn with as many steps as its pictures."""
    state = checkpoint.load(run)
    steps = state["config"]["train"]["sample_steps"]
    sets = f"ood.sets=[{','.join(SETS)}]"
    protocol = ["evaluation=shipped", "evaluation.parts=[ood,samples]", f"samples.steps=[{steps}]", sets]
    data = dataset_of(state)
    its_judge = "cifar10" if data.shape == (3, 32, 32) else None  # else one of the data's own
    judged = [f"judge={its_judge}"] if its_judge else []
    on, numbers_in, sheet_in = f"device={device}", run / "evaluation" / "colour", run / "sheet"
    python("evaluate.py", f"checkpoint={run}", *protocol, *judged, f"ood.root={others}", f"out={numbers_in}", on)
    seconds = python("sample.py", f"checkpoint={run}", "num_samples=64", f"out={sheet_in}", on)
    numbers = json.loads((numbers_in / "metrics.json").read_text())
    net, _ = judge(data, its_judge, device=device)
    test = features_of(net, data.test, device=device)
    mean = functional.avg_pool2d(functional.pad(scaled(data.test), [1] * 4, mode="replicate"), 3, stride=1)
    blurred = frechet(test, features_of(net, mean[:2000], device=device))
    (key,) = [key for key in numbers if key.startswith("frechet/") and key.endswith(f"/{steps}")]
    distance, real = numbers[key], numbers[key.replace(f"/{steps}", "/real")]
    return {
        "what": recipe,
        "steps": state["step"],
        "speed": f"{state['step'] / state['loop']['seconds']:.1f}",
        "distance": f"{distance:.1f}",
        "in_blurred": f"{distance / blurred:.2f}",
        "real": f"{real:.1f}",
        **{key: f"{numbers[f'auroc/{key}']:.3f}" for key in SETS if f"auroc/{key}" in numbers},
        "sgld_steps": steps,
        "seconds": f"{seconds:.0f}",
    }


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("out", type=Path)
parser.add_argument("data", type=Path)
parser.add_argument("minutes", type=float)
parser.add_argument("--only", choices=RECIPES)
parser.add_argument("--others", default="data", help="torchvision's root with MNIST and Fashion-MNIST")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
given, overrides = parser.parse_known_args()
if not given.data.is_dir():
    parser.error(f"{given.data} is no folder")
if any(override.startswith("device=") for override in overrides):
    parser.error("give --device")
in_folders = (given.data / "train").is_dir()
where = [f"data.root={given.data}", *(["data=folder"] if in_folders else [])]
settings = [*where, f"device={given.device}", *overrides]
asked, noted = " ".join([f"{given.minutes:g} minutes", *settings]), given.out / "settings.txt"
if noted.is_file() and noted.read_text() != asked:
    parser.error(f"{given.out} holds runs of {noted.read_text()}, not of {asked}: give those, or another OUT")
given.out.mkdir(parents=True, exist_ok=True)
noted.write_text(asked)
for recipe in [given.only] if given.only else RECIPES:
    train(given.out / recipe, recipe, settings, given.minutes)
complete = [recipe for recipe in RECIPES if is_complete(given.out / recipe, given.minutes)]
rows = [row(given.out / recipe, recipe, given.others, given.device) for recipe in complete]
name = "CIFAR-10 (JPEG)" if in_folders else "CIFAR-10"
options, on_gpu = [f"{given.minutes:g}", "--device", given.device], torch.device(given.device).type == "cuda"
table = {
    "command": " ".join(["python tests/benchmarks/colour.py OUT data", *options, *overrides]),
    "note": f"{name}, {given.minutes:g} minutes of training each; distance to the test images, and in units of what "
    "these have where a 3×3 mean blurs them",
    "machine": torch.cuda.get_device_name(given.device) if on_gpu else f"{torch.get_num_threads()} CPU threads",
    "date": str(date.today()),
    "columns": COLUMNS,
    "rows": rows,
}
(given.out / "colour.json").write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n")
