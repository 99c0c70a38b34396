"""The part `densities`: log Z and likelihood, by quadrature in two dimensions, by annealed importance sampling for
images."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ebm import densities
from ebm.data import scaled
from ebm.energies import labels_in_proportion
from ebm.evaluation import ais, figures, metrics
from ebm.evaluation.evaluation import Evaluation


def density(ev: Evaluation, of_points: Mapping[str, Any], of_images: Mapping[str, Any]) -> None:
    """`plane` of data in two dimensions, with the settings `of_points`, or `likelihood` with those `of_images`."""
    if ev.dataset.shape == (2,):
        plane(ev, **of_points)
    else:
        likelihood(ev, **of_images)


def plane(ev: Evaluation, cells: int, steps: int) -> None:
    """log Z, the test points' likelihood and the divergence from the data's law, where that is known.

    cells  of the quadrature's grid, a side
    steps  SGLD steps of the samples drawn
    """
    data = ev.dataset
    grid = densities.midpoints(cells)
    log_q = torch.from_numpy(ev.scores(grid))
    test = ev.scores(data.test)
    log_z = densities.log_integral(log_q)
    log_q = log_q - log_z
    ev.put("log_z", log_z)
    ev.put("nll", log_z - test.mean(), metrics.mean_ci95(log_z - test, ev.bootstrap, ev.rng()))
    panels = {"energy": -log_q, "density of the model": log_q.exp()}
    if data.log_prob is None:
        ev.skipped["kl"] = f"the law of data set {data.name} is not known"
    else:
        log_p = data.log_prob(grid)
        ev.put("kl", densities.kl_on_grid(log_p, log_q))
        ev.put("nll/truth", -float(data.log_prob(data.test).double().mean()))
        panels["density of the data"] = log_p.exp()
    panels = {title: values.view(cells, -1) for title, values in panels.items()}
    drawn = ev.sampled(ev.noise(4096), labels_in_proportion(ev.energies[0], 4096), steps)
    panels |= {f"samples, {steps} steps": drawn, "data": data.test[:4096]}
    ev.draw("densities.png", f"{data.name}: energy surface, densities, samples and data.", figures.points, panels)
    keys = ("log_z", "nll", "nll/truth", "kl")
    rows = {key: [key] for key in keys if key in ev.numbers}
    note = f"integrals over [−1, 1]² on {cells}² cells; nll: −log-likelihood of the test points"
    ev.section("Density", [""], {"nats": "{}"}, rows, [note])


def likelihood(
    ev: Evaluation, chains: int, temperatures: int, power: float, leapfrog: int, acceptance: float, burn_in: int
) -> None:
    """Bounds of log Z and of bits per dimension of the test images, by `ais.bracket`, whose settings these are."""
    data = ev.dataset
    dims, count = math.prod(data.shape), min(chains, len(data.test))
    generator = torch.Generator(ev.device).manual_seed(ev.seed)
    x, base = scaled(data.test[:count]).to(ev.device), densities.Uniform(data.shape, ev.device)
    betas = ais.temperatures(temperatures, power)
    how = (leapfrog, acceptance, (-1, 1), burn_in)
    with ev.progress("likelihood", total=3 * temperatures + burn_in, unit="transitions") as bar:

        def told(transitions: range) -> Iterator[int]:
            for k in transitions:
                yield k
                bar.update()

        found = ais.bracket(ev.energies[0], base, x, generator, betas, *how, told)
    mean = float(ev.scores(data.test).mean())
    quantised = math.log2(127.5) if data.test.dtype == torch.uint8 else 0.0  # a byte's width in [−1, 1] is 2/255
    for side in ("lower", "upper"):
        value, error = found.bound(side)
        ev.put(f"log_z/{side}", value, [value - 1.96 * error, value + 1.96 * error])
        bits = [(z - mean) / dims / math.log(2) + quantised for z in ev.triple(f"log_z/{side}")]
        ev.put(f"bits_per_dim/{side}", bits[0], bits[1:])
    gap = ev.numbers["log_z/upper"] - ev.numbers["log_z/lower"]
    holds = f"The upper bound, {gap:.1f} nats above the lower, holds only if chains of exp(−E) from test images have"
    short = "A model of short runs may have none: bits per dim then say little of its samples."
    notes = [f"{count} chains of AIS, {temperatures} temperatures, acceptance {found.acceptance:.2f}"]
    notes.append(f"{holds} reached its steady state. {short}")
    if "chains/steady_state" in ev.numbers:
        notes.append(f"steady state by the chains' split-R̂: {'yes' if ev.numbers['chains/steady_state'] else 'no'}")
    columns = {"lower bound": "{}/lower", "upper bound": "{}/upper"}
    rows = {"log_z": ["log Z, nats"], "bits_per_dim": ["bits per dim"]}
    ev.section("Likelihood", [""], columns, rows, notes, digits=3)
