"""Two jobs of the quick recipe one after the other and side by side, on this machine:

python tests/benchmarks/sweep_speed.py [steps]

Seconds of the whole command, start and pictures included, and of the training steps alone, the mean of the jobs.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from ebm.running.checkpoint import load

STEPS = sys.argv[1] if len(sys.argv) > 1 else "200"
TRAIN = str(Path(__file__).parents[2] / "train.py")
for name, how in (
    ("one after the other", []),
    ("joblib", ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]),
):
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, TRAIN, "-m", *how, "seed=0,1", f"train.max_steps={STEPS}", "train.sample_steps=16"]
        start = time.perf_counter()
        done = subprocess.run(
            [*command, f"hydra.sweep.dir={folder}", "wandb.mode=disabled"], capture_output=True, text=True
        )
        seconds = time.perf_counter() - start
        if done.returncode:
            sys.exit(done.stderr)
        training = sum(load(f"{folder}/{job}")["loop"]["seconds"] for job in range(2)) / 2
        print(
            f"{name:20} {seconds:6.1f} s, a job's training {training:6.1f} s ({torch.get_num_threads()} threads here)"
        )
