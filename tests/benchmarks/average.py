"""The mean of the weights of checkpoints (Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better
Generalization"), all else as in the last of them:

python tests/benchmarks/average.py OUT.pt CHECKPOINT CHECKPOINT …
"""

import sys
from pathlib import Path

import torch

from ebm import checkpoint, features

out, *sources = sys.argv[1:]
states = [checkpoint.load(source) for source in sources]
mean_of = [{"weights": features.weights_hash(state["energy"]), "steps": state["step"]} for state in states]
weights = {name: torch.stack([state["energy"][name] for state in states]).mean(0) for name in states[-1]["energy"]}
checkpoint.save(Path(out), states[-1] | {"energy": weights, "mean_of": mean_of})
