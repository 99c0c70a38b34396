"""The part `density`: log Z and likelihood of points in the plane, by quadrature."""

import torch

from ebm import densities
from ebm.energies import labels_in_proportion, temperature_of
from ebm.evaluation import figures, metrics
from ebm.evaluation.evaluation import Evaluation


def density(ev: Evaluation, cells: int, steps: int) -> None:
    """log Z, the test points' likelihood and the divergence from the data's law, where that is known, in nats.

    cells  of the quadrature's grid, a side
    steps  SGLD steps of the samples drawn
    """
    data, T = ev.dataset, temperature_of(ev.energies[0])
    if data.shape != (2,):
        ev.skipped["density"] = f"quadrature takes points in the plane, of shape (2,), not {data.shape}"
        return
    grid = densities.midpoints(cells)
    log_q = torch.from_numpy(ev.scores(grid)) / T
    test = ev.scores(data.test) / T
    log_z = densities.log_integral(log_q)
    log_q = log_q - log_z
    ev.put("log_z", log_z)
    ev.put("nll", log_z - test.mean(), metrics.mean_ci95(log_z - test, ev.bootstrap, ev.rng()))
    panels = {"−log density": -log_q, "density of the model": log_q.exp()}
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
    ev.draw("density.png", f"{data.name}: energy surface, densities, samples and data.", figures.points, panels)
    keys = ("log_z", "nll", "nll/truth", "kl")
    rows = {key: [key] for key in keys if key in ev.numbers}
    note = f"integrals over [−1, 1]² on {cells}² cells; nll: −log-likelihood of the test points"
    ev.section("Density", [""], {"nats": "{}"}, rows, [note])
