"""What the chains' telemetry costs, as a share of the quick recipe's training steps:

python tests/benchmarks/telemetry_cost.py
"""

import time
from collections.abc import Callable

import torch

from ebm.energies import ConvEnergy
from ebm.losses import ContrastiveDivergence
from ebm.running import telemetry
from ebm.sampling.buffer import ReplayBuffer
from ebm.sampling.sgld import SGLD

LOG_EVERY = 20
generator = torch.Generator().manual_seed(0)
energy, sampler, loss = ConvEnergy().to(memory_format=torch.channels_last), SGLD(steps=15), ContrastiveDivergence()
buffer = ReplayBuffer((1, 28, 28), generator, policy="in_place")
x, _, ages, _ = buffer.draw(128, generator)


def milliseconds(call: Callable[[], object], times: int) -> float:
    """The fastest of `times`: what else the machine does only adds."""
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return 1000 * best


step = milliseconds(lambda: loss(energy, x, sampler(energy, x, generator), generator)[0].backward(), 10)
each = milliseconds(lambda: telemetry.fresh_scores(x[:, 0, 0, 0], ages), 200)
read = milliseconds(lambda: telemetry.chain_statistics(sampler, energy, buffer, x, x), 30)
print(
    f"training step {step:.1f} ms; telemetry {each:.3f} ms a step and {read:.2f} ms every {LOG_EVERY} steps: "
    f"{(each + read / LOG_EVERY) / step:.2%}"
)
