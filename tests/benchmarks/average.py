"""The mean of the weights of checkpoints (Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better
Generalization"), all else as in the last of them but for the step size of samples:

python tests/benchmarks/average.py OUT.pt STEP_SIZE CHECKPOINT CHECKPOINT …
"""

import sys
from pathlib import Path

import torch

from ebm.evaluation import features
from ebm.running import checkpoint

out, step_size, *sources = sys.argv[1:]
states = [checkpoint.load(source) for source in sources]
last = states[-1]
told = ("seed", "buffer", "loss")  # of each member's configuration
mean_of = [
    {"weights": features.weights_hash(state["energy"]), "steps": state["step"]}
    | {part: state["config"][part] for part in told}
    for state in states
]
weights = {name: torch.stack([state["energy"][name] for state in states]).mean(0) for name in last["energy"]}
last["config"]["sampler"]["step_size"] = float(step_size)
checkpoint.save(Path(out), last | {"energy": weights, "mean_of": mean_of})
