"""The part `likelihood`: log Z and bits per dimension, between bounds by annealed importance sampling."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ebm import densities
from ebm.energies import temperature_of
from ebm.evaluation import ais
from ebm.evaluation.evaluation import Evaluation


def dequantised(x: Tensor, generator: torch.Generator) -> Tensor:
    """Bytes b as (b + u)/128 − 1, u ~ U[0, 1): a point of the byte's cell, whose 256 fill [−1, 1]."""
    return (x + torch.rand(x.shape, generator=generator)) / 128 - 1


def likelihood(
    ev: Evaluation, chains: int, temperatures: int, power: float, leapfrog: int, acceptance: float, burn_in: int
) -> None:
    """Bounds of log Z, nats, and of bits per dimension of the test images, by `ais.bracket`, whose settings these are.

    Of bytes b they are a code length: with the `dequantised` y, −log₂ P(b) <= E_u[−log₂ p(y)] − dims·log₂(1/128) (Theis
    et al. 2016, "A note on the evaluation of generative models", section 3.1). Of floats: −log₂ p(x) / dims.
    """
    data, energy = ev.dataset, ev.energies[0]
    of_bytes = data.test.dtype == torch.uint8
    x = dequantised(data.test, torch.Generator().manual_seed(ev.seed + 2)) if of_bytes else data.test
    dims, count = math.prod(data.shape), min(chains, len(x))
    generator = torch.Generator(ev.device).manual_seed(ev.seed)
    base, betas = densities.Uniform(data.shape, ev.device), ais.temperatures(temperatures, power)
    start = x[ev.chosen(x, count)].to(ev.device)
    how = (leapfrog, acceptance, (-1, 1), burn_in)
    with ev.progress("likelihood", total=3 * temperatures + burn_in, unit="transitions") as bar:

        def told(transitions: range) -> Iterator[int]:
            for k in transitions:
                yield k
                bar.update()

        found = ais.bracket(energy, base, start, generator, betas, *how, told)
    log_q = ev.scores(x) / temperature_of(energy)  # without −log Z
    spread = log_q.std() / math.sqrt(len(log_q))
    for side in ("lower", "upper"):
        value, error = found.bound(side)
        ev.put(f"log_z/{side}", value, [value - 1.96 * error, value + 1.96 * error])
        bits = (value - log_q.mean()) / dims / math.log(2) + (7 if of_bytes else 0)
        half = 1.96 * math.hypot(error, spread) / dims / math.log(2)
        ev.put(f"bits_per_dim/{side}", bits, [bits - half, bits + half])
    for way, rate in found.acceptance.items():
        ev.put(f"ais/acceptance/{way}", rate)
    columns = {"lower bound": "{}/lower", "upper bound": "{}/upper"}
    rows = {"log_z": ["log Z, nats"], "bits_per_dim": ["bits per dim"]}
    ev.section("Likelihood", [""], columns, rows, notes_of(ev, found, count, temperatures), digits=3)


def notes_of(ev: Evaluation, found: ais.Bracket, count: int, temperatures: int) -> list[str]:
    """What the bounds are of, and what they hold upon."""
    rates = " and ".join(f"{rate:.2f} {way}" for way, rate in found.acceptance.items())
    code = "bits per dim are a code length of bytes, by uniform noise of a byte's width; a flat energy has 8"
    density = "the images are no bytes: bits per dim are −log₂ of a density, and no code length"
    gap = ev.numbers["log_z/upper"] - ev.numbers["log_z/lower"]
    holds = f"The upper bound, {gap:.1f} nats above the lower, holds only if chains of exp(−E/T) from test images have"
    short = "A model of short runs may have none: bits per dim then say little of its samples."
    notes = [f"{count} chains of AIS each way, {temperatures} temperatures, acceptance {rates}"]
    notes += [code if ev.dataset.test.dtype == torch.uint8 else density, f"{holds} reached its steady state. {short}"]
    if "chains/steady_state" in ev.numbers:
        notes.append(f"steady state by the chains' split-R̂: {'yes' if ev.numbers['chains/steady_state'] else 'no'}")
    return notes
