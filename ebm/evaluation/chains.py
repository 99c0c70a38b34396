"""The part `chains`: do long chains from noise and from data come to tell of one law, and do images stay what they
were?"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ebm.data import scaled
from ebm.evaluation import features, figures, metrics
from ebm.evaluation.evaluation import Evaluation
from ebm.evaluation.metrics import Array
from ebm.sampling.chains import chain_generators


def chains(ev: Evaluation, count: int, steps: int, rhat: float) -> None:
    """`count` chains of `steps` SGLD steps from noise, and as many from test images.

    rhat  split-R̂ of the energy up to which the chains count as one law, >= 1
    """
    count = min(count, len(ev.dataset.test))
    records, energy, distance, snapshots = run(ev, count, steps)
    groups = {"noise": slice(0, count), "data": slice(count, None)}
    settled = energy[:, energy.shape[1] // 2 :]  # the first half is left out as warm-up
    for name, group in {"all": slice(None), **groups}.items():
        ev.put(f"chains/rhat/{name}", metrics.split_rhat(settled[group]))
        ev.put(f"chains/ess/{name}", metrics.effective_sample_size(settled[group]))
    for name, group in groups.items():
        ev.put(f"chains/energy/{name}", settled[group].mean())
        ev.put(f"chains/distance/{name}", distance[group, -1].mean())
    steady = ev.numbers["chains/rhat/all"] < rhat
    ev.put("chains/steady_state", float(steady))
    told = "tell of one law: a" if steady else "do not tell of one law: no"
    notes = [f"{count} chains each, {steps} steps; R̂ and ESS of the energy in the second half"]
    notes.append(f"chains from noise and from data {told} steady state of the sampler within these steps")
    if features.judge_of(ev.dataset, ev.judge):
        classifier, _ = ev.classifier
        before = metrics.in_batches(classifier, snapshots[0][count:], **ev.how).argmax(dim=1)
        after = metrics.in_batches(classifier, snapshots[steps][count:], **ev.how).argmax(dim=1)
        ev.put("chains/same_class", float((before == after).double().mean()))
        notes.append(f"of the chains from data {ev.numbers['chains/same_class']:.0%} end in the class they started in")

    draw_statistics(ev, records, {f"from {name}": (energy[group], distance[group]) for name, group in groups.items()})
    if len(ev.dataset.shape) == 3:
        trace = torch.stack([torch.cat([x[:count][:4], x[count:][:4]]) for x in snapshots.values()])
        caption = "Chains from noise above, from test images below."
        ev.draw("chain_strips.png", caption, figures.strips, trace, list(snapshots))
    columns = {"energy": "chains/energy/{}", "distance": "chains/distance/{}"}
    columns |= {"split-R̂": "chains/rhat/{}", "ESS": "chains/ess/{}"}
    rows = {"noise": ["from noise"], "data": ["from data"], "all": ["all"]}
    ev.section("Chains", ["chains"], columns, rows, notes, digits=3)


def run(ev: Evaluation, count: int, steps: int) -> tuple[list[int], Array, Array, dict[int, Tensor]]:
    """`count` chains from noise, then `count` from test images: the steps recorded (T,), at most about 1,000; energy
    and distance from the start there (2·count, T); some ten snapshots (2·count, *shape) by step, first and last among
    them."""
    start = torch.cat([ev.noise(count), scaled(ev.dataset.test[ev.chosen(ev.dataset.test, count)])]).to(ev.device)
    every = max(1, steps // 1000)
    kept = np.unique(np.geomspace(every, steps, 8).round().astype(int) // every * every)
    records, energies, distances, snapshots = [], [], [], {}

    def record(step: int, x: Tensor) -> None:
        records.append(step)
        energies.append(-ev.scores(x))
        distances.append((x - start).flatten(1).norm(dim=1).double().cpu().numpy())
        if step in kept or step in (0, steps):
            snapshots[step] = x.cpu().clone()

    ev.sampler(ev.energies[0], start, chain_generators(ev.seed, 2 * count, ev.device), steps, record, every)
    return records, np.stack(energies, axis=1), np.stack(distances, axis=1), snapshots


def draw_statistics(ev: Evaluation, records: Sequence[int], groups: Mapping[str, tuple[Array, Array]]) -> None:
    """Of groups of chains, each (energy, distance) (chains, T)."""
    panels: dict[str, dict[str, Array]] = {"energy": {}, "distance from the start": {}, "autocorrelation": {}}
    for name, (energy, distance) in groups.items():
        settled = energy[:, energy.shape[1] // 2 :]
        panels["energy"][name], panels["distance from the start"][name] = energy, distance
        panels["autocorrelation"][name] = metrics.autocorrelation(settled)[None, : settled.shape[1] // 2]
    caption = "Single chains (thin) and their median: energy, distance; autocorrelation of the energy."
    ev.draw("chains.png", caption, figures.chains, records, panels)
