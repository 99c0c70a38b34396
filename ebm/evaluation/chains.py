"""The part `chains`: do long chains from noise and from test images come to tell of one law, and do images stay what
they were?"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ebm.data import scaled
from ebm.evaluation import features, figures, metrics
from ebm.evaluation.evaluation import Evaluation
from ebm.evaluation.metrics import Array
from ebm.sampling.chains import chain_generators

PROJECTIONS = 8  # of the pixels, on random directions


def chains(ev: Evaluation, count: int, steps: int, rhat: float) -> None:
    """`count` chains of `steps` SGLD steps from noise, and as many from test images.

    rhat  split-R̂, the largest of all statistics, below which the chains count as one law, >= 1
    """
    count = min(count, len(ev.dataset.test))
    records, statistics, distance, snapshots = run(ev, count, steps)
    groups = {"noise": slice(0, count), "data": slice(count, None)}
    quarter = len(records) // 4  # the first half is left out as warm-up, the second is split in two
    settled = {name: x[:, -2 * quarter :] for name, x in statistics.items()}
    for name, group in {"all": slice(None), **groups}.items():
        put_mixing(ev, name, {statistic: x[group] for statistic, x in settled.items()})
    for name, group in groups.items():
        ev.put(f"chains/energy/{name}", settled["energy"][group].mean())
        ev.put(f"chains/distance/{name}", distance[group, -1].mean())
    still = int((settled["pixels"] == settled["pixels"][:, :1]).all(axis=(1, 2)).sum())
    steady = still == 0 and ev.numbers.get("chains/rhat/all", np.inf) < rhat
    ev.put("chains/steady_state", float(steady))
    told = "tell of one law: a" if steady else "do not tell of one law: no"
    of_all = f"ESS is the least of {', '.join(statistics)}"
    notes = [f"{count} chains each, {steps} steps; split-R̂ and ESS of the second half, {of_all}"]
    notes.append(f"chains from noise and from test images {told} steady state of the sampler within these steps")
    if still:
        notes.append(f"{still} chains do not move")
    if "classes" in statistics:
        classes = statistics["classes"].argmax(axis=-1)[groups["data"]]
        put_same_class(ev, classes[:, 0], classes[:, -1], steps)
        notes.append(
            f"of the chains from test images {ev.numbers['chains/same_class']:.0%} end in the class they started in"
        )
        if "chains/same_class/labelled" in ev.numbers:
            notes[-1] += f", {ev.numbers['chains/same_class/labelled']:.0%} of those that keep the image's label"

    names = {"noise": "from noise", "data": "from test images", "all": "all"}
    draw_statistics(
        ev, records, {names[key]: (statistics["energy"][g, :, 0], distance[g]) for key, g in groups.items()}
    )
    if len(ev.dataset.shape) == 3:
        trace = torch.stack([torch.cat([x[:count][:4], x[count:][:4]]) for x in snapshots.values()])
        caption = "Chains from noise above, from test images below."
        ev.draw("chain_strips.png", caption, figures.strips, trace, list(snapshots))
    columns = {"energy": "chains/energy/{}", "distance": "chains/distance/{}"}
    columns |= {f"R̂ {name}": f"chains/rhat/{name}/{{}}" for name in statistics} | {"ESS": "chains/ess/{}"}
    ev.section("Chains", ["chains"], columns, {key: [name] for key, name in names.items()}, notes, digits=3)


def run(ev: Evaluation, count: int, steps: int) -> tuple[list[int], dict[str, Array], Array, dict[int, Tensor]]:
    """`count` chains from noise, then `count` from test images: the steps recorded (T,), at most about 1,000; the
    statistics there, each (2·count, T, components), and the distance from the start (2·count, T); some ten snapshots
    (2·count, *shape) by step, first and last among them.

    Statistics: `energy`; `classes`, probabilities, by the judge, where there is one; `pixels`, their projections.
    """
    start = torch.cat([ev.noise(count), scaled(ev.dataset.test[ev.chosen(ev.dataset.test, count)])]).to(ev.device)
    dims = start[0].numel()
    directions = torch.randn(dims, PROJECTIONS, generator=torch.Generator().manual_seed(ev.seed)).to(ev.device)
    every = max(1, steps // 1000)
    kept = np.unique(np.geomspace(every, steps, 8).round().astype(int) // every * every)
    classifier = ev.classifier[0] if features.judge_of(ev.dataset, ev.judge) else None
    records, distances, snapshots = [], [], {}
    statistics: dict[str, list[Array]] = {"energy": [], "pixels": []}
    if classifier:
        statistics["classes"] = []

    def record(step: int, x: Tensor) -> None:
        records.append(step)
        statistics["energy"].append(-ev.scores(x)[:, None])
        statistics["pixels"].append((x.flatten(1) @ directions / dims**0.5).double().cpu().numpy())
        if classifier:
            logits = metrics.in_batches(classifier, x, **ev.how)
            statistics["classes"].append(logits.double().softmax(dim=1).numpy())
        distances.append((x - start).flatten(1).norm(dim=1).double().cpu().numpy())
        if step in kept or step in (0, steps):
            snapshots[step] = x.cpu().clone()

    generators = chain_generators(ev.seed, 2 * count, ev.device)
    with ev.progress("chains", total=2 * count * steps) as bar:
        ev.sampler(ev.energies[0], start, generators, steps, record, every, progress=bar.update)
    along = {name: np.stack(values, axis=1) for name, values in statistics.items()}
    return records, along, np.stack(distances, axis=1), snapshots


def put_same_class(ev: Evaluation, before: Array, after: Array, steps: int) -> None:
    """The share of the chains from test images that end in the class they started in, by the judge; and of an energy
    with classes that of as many chains that have the image's label, and go down E(x, y)."""
    ev.put_mean("chains/same_class", (before == after).astype(float))
    data, classes = ev.dataset, getattr(ev.energies[0], "classes", None)
    if classes is None or data.test_labels is None or int(data.test_labels.max()) >= classes:
        return
    chosen = ev.chosen(data.test, len(before))
    with ev.progress("chains with labels", total=len(before) * steps) as bar:
        end = ev.sampled(scaled(data.test[chosen]), data.test_labels[chosen], steps, bar.update)
    classified = metrics.in_batches(ev.classifier[0], end, **ev.how).argmax(dim=1).numpy()
    ev.put_mean("chains/same_class/labelled", (before == classified).astype(float))


def put_mixing(ev: Evaluation, group: str, statistics: Mapping[str, Array]) -> None:
    """The numbers of a group of chains: split-R̂ and ESS of each of its statistics (chains, T, components), the largest
    and the least of the components, and of all statistics together. R̂ that is infinite is left out.

    What is the same in all chains all the time is no evidence, nor is a class that none ever is in.
    """
    found: dict[str, tuple[float, float]] = {}
    for name, x in statistics.items():
        components = np.unique(x.argmax(axis=-1)) if name == "classes" else np.arange(x.shape[-1])
        varying = [x[..., i] for i in components if np.ptp(x[..., i]) > 0]
        if varying:
            ess = min(metrics.effective_sample_size(values) for values in varying)
            found[f"{name}/{group}"] = (max(metrics.split_rhat(values) for values in varying), ess)
    if found:
        found[group] = (max(rhat for rhat, _ in found.values()), min(ess for _, ess in found.values()))
    for key, (rhat, ess) in found.items():
        ev.put(f"chains/ess/{key}", ess)
        if np.isfinite(rhat):
            ev.put(f"chains/rhat/{key}", rhat)
        else:
            ev.skipped[f"chains/rhat/{key}"] = "it is infinite: the chains differ, and none changes"


def draw_statistics(ev: Evaluation, records: Sequence[int], groups: Mapping[str, tuple[Array, Array]]) -> None:
    """Of groups of chains, each (energy, distance) (chains, T)."""
    panels: dict[str, dict[str, Array]] = {"energy": {}, "distance from the start": {}, "autocorrelation": {}}
    for name, (energy, distance) in groups.items():
        settled = energy[:, energy.shape[1] // 2 :]
        panels["energy"][name], panels["distance from the start"][name] = energy, distance
        if (settled != settled[:, :1]).any():
            panels["autocorrelation"][name] = metrics.autocorrelation(settled)[None, : settled.shape[1] // 2]
    caption = "Single chains (thin) and their median: energy, distance; autocorrelation of the energy."
    ev.draw("chains.png", caption, figures.chains, records, {title: drawn for title, drawn in panels.items() if drawn})
