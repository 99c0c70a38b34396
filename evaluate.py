"""Evaluate an energy by one pinned protocol:  python evaluate.py checkpoint=RUN_DIR [evaluation=ood] [key=value …]

Runs of evaluations that are there already, in one table and one figure:  python evaluate.py compare=[RUN_A,RUN_B]
"""

if __name__ == "__main__":  # first, for the other imports take seconds
    from ebm.running.cli import end_at_once, handle_signals, run_main

    handle_signals(end_at_once)

import json
import math
import os
import platform
import sys
import traceback
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

import ebm
from ebm import check, densities
from ebm.data import Dataset, scaled
from ebm.energies import labels_in_proportion
from ebm.evaluation import ais, features, figures, metrics, report
from ebm.evaluation.outliers import keys_of, outliers
from ebm.files import whole_files
from ebm.running import checkpoint, tracking, trained
from ebm.running.cli import cause_of, one_line_errors, output_folder, pick_device
from ebm.sampling.chains import chain_generators, trace_in_batches, uniform_noise
from ebm.sampling.sgld import SGLD
from sample import Folders, background_of, dataset_of

OTHER_SCORES = {  # of images x whose scores are s, beside those of the training images
    "gradient_norm": lambda ev, x, s, train: metrics.gradient_norms(ev.energies[0], x, **ev.how),
    "typicality": lambda ev, x, s, train: metrics.typicality(s, train),
}


@dataclass
class Evaluation:
    """What the parts read, and what they find: `numbers` under flat keys, `skipped` with reasons, `sections`.

    Pictures are written to `folder`, which lies aside until all parts are through.
    """

    cfg: DictConfig
    state: dict[str, Any]
    energies: list[nn.Module]  # the one evaluated, then the rest of the ensemble
    dataset: Dataset
    sampler: SGLD
    device: torch.device
    folder: Path
    numbers: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    sections: list[report.Section] = field(default_factory=list)
    pictures: dict[str, str] = field(default_factory=dict)  # of the next section: captions by file name

    def put(self, key: str, value: float, ci95: list[float] | None = None) -> None:
        if not np.isfinite([value, *(ci95 or [])]).all():
            raise ValueError(f"{key} is {value}, its interval {ci95}")
        self.numbers[key] = float(value)
        if ci95 is not None:
            self.numbers[f"{key}/ci95"] = ci95

    def put_mean(self, key: str, values: metrics.Array) -> None:
        self.put(key, float(values.mean()), metrics.mean_ci95(values, self.cfg.bootstrap, self.rng()))

    def triple(self, key: str) -> list[float]:
        return report.triple(self.numbers, key)

    def draw(self, name: str, caption: str, figure: Callable[..., None], *what: Any) -> None:
        """A file that `figure` makes of `what`, for the next section."""
        figure(self.folder / name, *what)
        self.pictures[name] = caption

    def section(
        self, title: str, header: list[str], columns: dict[str, str], rows: dict[str, list[str]], notes: list[str],
        digits: int = 4, intervals: Container[str] | None = None,
    ) -> None:  # fmt: skip
        """A table, printed, with the pictures so far: rows[key] are the cells under `header`, and each of the `columns`
        has the number under its key, made of the row's; those of `intervals` (None: all) with the interval."""
        table = [list(cells) for cells in rows.values()]
        for key, line in zip(rows, table, strict=True):
            for name, of in columns.items():
                line.append(report.shown(self.numbers, of.format(key), digits, intervals is None or name in intervals))
        self.sections.append(report.Section(title, [*header, *columns], table, notes, self.pictures))
        self.pictures = {}
        print(self.sections[-1].text(), flush=True)

    def rng(self) -> np.random.Generator:
        """The bootstrap's generator; a new one a quantity, so that none depends on what else is evaluated."""
        return np.random.default_rng(self.cfg.seed)

    def chosen(self, x: Tensor, count: int) -> Tensor:
        """`count` random places of `x`, the same at each call."""
        return torch.randperm(len(x), generator=torch.Generator().manual_seed(self.cfg.seed))[:count]

    @property
    def how(self) -> dict[str, Any]:
        return {"batch_size": self.cfg.batch_size, "device": self.device}

    def scores(self, x: Tensor) -> metrics.Array:
        return metrics.scores(self.energies[0], x, **self.how)

    def noise(self, count: int) -> Tensor:
        """Where chains start: the first ones are the same whatever the count."""
        return uniform_noise((count, *self.dataset.shape), chain_generators(self.cfg.seed + 1, count))

    def sampled(self, x: Tensor, labels: Tensor | None, steps: int) -> Tensor:
        """Chains `x` after `steps` steps, of these labels or none, on the CPU."""
        generators = chain_generators(self.cfg.seed, len(x), self.device)
        how = (self.cfg.batch_size, steps, steps, labels)
        return trace_in_batches(self.sampler.trace, self.energies[0], x, generators, *how)[-1]

    @cached_property
    def classifier(self) -> tuple[features.Classifier, dict[str, Any]]:
        return features.cached_classifier(self.dataset, self.cfg.cache, self.device)


def ood(ev: Evaluation) -> None:
    """Scores of outliers and how well they are told from the test images."""
    cfg, data = ev.cfg.ood, ev.dataset
    root = cfg.root or ev.cfg.data.get("root") or ev.state["config"].get("data", {}).get("root") or "data"
    scores: dict[str, dict[str, metrics.Array]] = {}  # by the score's name, then the set's
    members: dict[str, list[metrics.Array]] = {}  # scores by every energy of the ensemble
    examples: dict[str, Tensor] = {}
    labels: dict[str, metrics.Array] = {}  # their scores
    for key, name in keys_of(["train", "test", *cfg.sets]).items():
        try:
            x = outliers(name, data, root, ev.cfg.noise_std, ev.cfg.seed, background_of(ev.cfg, ev.state))
            if len(x) < 2:
                raise ValueError("one image has no spread")
        except Exception as error:  # whatever reading images can raise
            ev.skipped[f"ood/{key}"] = " ".join(str(error).split()) or type(error).__name__
            continue
        members[key] = [metrics.scores(energy, x, **ev.how) for energy in ev.energies]
        plain, train = members[key][0], members["train"][0]
        found = {"score": plain} | {other: OTHER_SCORES[other](ev, x, plain, train) for other in cfg.scores}
        if len(ev.energies) > 1:
            found["ensemble_mean"], found["ensemble_spread"] = metrics.ensemble(members[key], members["train"])
        for other, values in found.items():
            scores.setdefault(other, {})[key] = values
        if key != "train":
            every = max(len(x) // 4, 1) if name == "constant" else 1  # black to white
            examples[key], labels[key] = scaled(x[::every][:4]), plain[::every][:4]

    by_set = scores["score"]
    for key, values in by_set.items():
        ev.put(f"score/{key}/mean", values.mean())
        ev.put(f"score/{key}/std", values.std(ddof=1))
    suffixes = {score: "" if score == "score" else f"/{score}" for score in scores}
    for kind, sets in scores.items():
        for key, values in sets.items():
            ci95 = metrics.separation_ci95(sets["test"], values, ev.cfg.bootstrap, ev.rng())
            for name, value in metrics.separation(sets["test"], values).items():
                ev.put(f"{name}/{key}{suffixes[kind]}", value, ci95[name])

    ev.draw("scores.png", "Scores −E(x) of every set, each to its own height.", figures.scores, by_set)
    outside = {key: values for key, values in by_set.items() if key != "test"}
    caption = f"Test images accepted over outliers accepted as the threshold on −E(x) falls ({data.name})."
    ev.draw("roc.png", caption, figures.roc, by_set["test"], outside)
    if len(scores) > 1:
        by_score = {score: {k: ev.triple(f"auroc/{k}{suffix}") for k in outside} for score, suffix in suffixes.items()}
        caption = "AUROC by set and score, with 95 % bootstrap intervals."
        ev.draw("auroc.png", caption, figures.intervals, {"AUROC": by_score})
    if len(data.shape) == 3:
        ev.draw("examples.png", "Four images of every set with their scores.", figures.scored_images, examples, labels)
    columns = {"score": "score/{}/mean", "± std": "score/{}/std"}
    columns |= {"AUROC": "auroc/{}", "AUPR": "aupr/{}", "FPR95": "fpr95/{}"}
    columns |= {f"AUROC {score}": f"auroc/{{}}/{score}" for score in scores if score != "score"}
    rows = {key: [key, str(len(values))] for key, values in by_set.items()}
    notes = [f"score: −E(x), higher is more likely.  AUROC: of the {data.name} test images against the set"]
    ev.section("Outliers", ["set", "images"], columns, rows, notes, intervals=["AUROC"])


def samples(ev: Evaluation) -> None:
    """Samples against test images in feature space, by number of SGLD steps, beside what real images reach."""
    cfg, data = ev.cfg.samples, ev.dataset
    if not features.has_classes(data):
        ev.skipped["samples"] = "features come from a classifier, which needs images with labels of two classes or more"
        return
    count = min(cfg.count, len(data.test), len(data.train))
    if count <= cfg.neighbours:
        ev.skipped["samples"] = f"{count} real images are too few for samples.neighbours={cfg.neighbours}"
        return
    check.memory(f"bootstrap={ev.cfg.bootstrap} of {count} samples", 16 * ev.cfg.bootstrap * count)
    if count < cfg.count:
        ev.skipped[f"samples/{cfg.count}"] = f"as many samples as real images are compared: {count}"
    classifier, info = ev.classifier
    spaces: dict[str, features.Classifier | features.Inception] = {f"classifier-n{count}": classifier}
    if cfg.inception is None:
        ev.skipped["samples/inception"] = "no weights of torch-fidelity's Inception were given (samples.inception)"
    else:
        spaces[f"inception-n{count}"] = features.Inception(cfg.inception).to(ev.device)
    in_turn = labels_in_proportion(ev.energies[0], count)
    starts = {"": (ev.noise(count), in_turn)}
    held = ev.state["buffer"]["chains"] if "buffer" in ev.state else torch.empty(0)
    if len(held) >= count:
        chosen = ev.chosen(held, count)
        starts["/buffer"] = (held[chosen], None if in_turn is None else ev.state["buffer"]["labels"][chosen])
    else:
        ev.skipped["samples/buffer"] = f"the checkpoint holds {len(held)} chains of a replay buffer, {count} are needed"
    # Each number of steps is a run of its own, for samplers that anneal.
    images = {f"{k}{suffix}": ev.sampled(*start, k) for suffix, start in starts.items() for k in cfg.steps}
    images["real"] = scaled(data.train[ev.chosen(data.train, count)])
    pick = ev.chosen(data.test, count)
    few = min(ev.cfg.bootstrap, 100)  # each Fréchet distance takes an eigenvalue problem
    for space, net in spaces.items():
        test = features.features_of(net, data.test, **ev.how)
        for key, x in images.items():
            fake = features.features_of(net, x, **ev.how)
            ev.put(f"kid/{space}/{key}", *metrics.kernel_distance(test[pick], fake, ev.cfg.bootstrap, ev.rng()))
            low_high = metrics.frechet_ci95(test, fake, few, ev.rng())
            ev.put(f"frechet/{space}/{key}", metrics.frechet(test, fake), low_high)
            for name, values in metrics.manifold_quality(test[pick], fake, cfg.neighbours).items():
                ev.put_mean(f"{name}/{space}/{key}", values)
    real_distances, _ = metrics.nearest(data.test[pick], data.train)
    shares: dict[str, metrics.Array] = {}
    for key, x in images.items():
        logits = metrics.in_batches(classifier, x, **ev.how)
        counts = np.bincount(logits.argmax(dim=1).numpy(), minlength=logits.shape[1])
        shares[key] = counts / counts.sum()
        low_high = metrics.entropy_ci95(counts, ev.cfg.bootstrap, ev.rng())
        ev.put(f"class_entropy/{key}", metrics.entropy(counts), low_high)
        ev.put_mean(f"confidence/{key}", logits.double().softmax(dim=1).max(dim=1).values.numpy())
        distances = real_distances if key == "real" else metrics.nearest(x, data.train)[0]
        ev.put(f"nearest/{key}", float(np.median(distances)))
        ev.put_mean(f"copies/{key}", (distances < np.quantile(real_distances, 0.01)).astype(float))
    if "accuracy" in info:
        ev.put("classifier/accuracy", info["accuracy"])

    space, shown = next(iter(spaces)), str(cfg.steps[len(cfg.steps) // 2])
    curves = {name: f"{key}/{space}" for name, key in (("Fréchet", "frechet"), ("kernel", "kid"), ("recall", "recall"))}
    curves |= {"precision": f"precision/{space}", "class entropy": "class_entropy"}
    named = dict(zip(("from noise", "from the buffer"), starts, strict=False))
    panels = {
        title: {name: {s: ev.triple(f"{key}/{s}{suffix}") for s in cfg.steps} for name, suffix in named.items()}
        for title, key in curves.items()
    }
    caption = f"Quality over SGLD steps, n = {count}; bands: 95 % intervals; dashed: training images."
    floors = {title: ev.numbers[f"{key}/real"] for title, key in curves.items()}
    ev.draw("quality.png", caption, figures.by_steps, panels, floors)
    trace = torch.stack([images[f"{steps}"][:12] for steps in cfg.steps])
    caption, labels = "The same twelve chains from noise, after more and more steps.", [f"{s} steps" for s in cfg.steps]
    ev.draw("samples.png", caption, figures.labelled_rows, trace, [""] * trace.shape[1], labels)
    some = images[shown][:12]
    pairs = torch.stack([some, scaled(data.train[metrics.nearest(some, data.train)[1]])])
    caption, labels = f"Samples after {shown} steps over their nearest training images.", ["sample", "nearest"]
    ev.draw("nearest.png", caption, figures.labelled_rows, pairs, [""] * len(some), labels)
    bars = {f"{shown} steps": shares[shown], "real images": shares["real"]}
    caption = f"Classes of samples after {shown} steps, and of real images."
    ev.draw("classes.png", caption, figures.histogram, bars, data.class_names)
    columns = {"Fréchet": f"frechet/{space}/{{}}", "kernel": f"kid/{space}/{{}}"}
    columns |= {name: f"{name}/{space}/{{}}" for name in ("precision", "recall", "density", "coverage")}
    columns |= {"entropy": "class_entropy/{}", "nearest": "nearest/{}", "copies": "copies/{}"}
    notes = [
        f"{count} samples a line against the {data.name} test images; features: the classifier's, not Inception's.",
        "nearest: median distance to a training image; copies: share of samples nearer than 99 % of the test images",
    ]
    rows = {f"{k}{suffix}": [f"{k} steps from {suffix[1:] or 'noise'}"] for suffix in starts for k in cfg.steps}
    rows["real"] = ["training images"]
    ev.section("Samples", ["samples"], columns, rows, notes, digits=3, intervals=["Fréchet", "kernel"])


def chains(ev: Evaluation) -> None:
    """Long chains from noise and from data: do they come to tell of one law, and do images stay what they were?"""
    cfg, data = ev.cfg.chains, ev.dataset
    count = min(cfg.count, len(data.test))
    start = torch.cat([ev.noise(count), scaled(data.test[:count])]).to(ev.device)
    every = max(1, cfg.steps // 1000)
    kept = np.unique(np.geomspace(every, cfg.steps, 8).round().astype(int) // every * every)
    steps, energies, distances, snapshots = [], [], [], {}

    def record(step: int, x: Tensor) -> None:
        steps.append(step)
        energies.append(-ev.scores(x))
        distances.append((x - start).flatten(1).norm(dim=1).double().cpu().numpy())
        if step in kept or step in (0, cfg.steps):
            snapshots[step] = x.cpu().clone()

    ev.sampler(ev.energies[0], start, chain_generators(ev.cfg.seed, 2 * count, ev.device), cfg.steps, record, every)
    energy, distance = np.stack(energies, axis=1), np.stack(distances, axis=1)
    groups = {"noise": slice(0, count), "data": slice(count, None)}
    settled = energy[:, energy.shape[1] // 2 :]  # the first half is left out as warm-up
    for name, own in {"all": slice(None), **groups}.items():
        ev.put(f"chains/rhat/{name}", metrics.split_rhat(settled[own]))
        ev.put(f"chains/ess/{name}", metrics.effective_sample_size(settled[own]))
    for name, own in groups.items():
        ev.put(f"chains/energy/{name}", settled[own].mean())
        ev.put(f"chains/distance/{name}", distance[own, -1].mean())
    steady = ev.numbers["chains/rhat/all"] < cfg.rhat
    ev.put("chains/steady_state", float(steady))
    notes = [
        f"{count} chains each, {cfg.steps} steps; R̂ and ESS of the energy in the second half",
        f"chains from noise and from data {'tell' if steady else 'do not tell'} of one law: "
        f"{'a' if steady else 'no'} steady state of the sampler within these steps",
    ]
    if features.has_classes(data):
        ends = (snapshots[step][count:] for step in (0, cfg.steps))
        before, after = (metrics.in_batches(ev.classifier[0], x, **ev.how).argmax(dim=1) for x in ends)
        ev.put("chains/same_class", float((before == after).double().mean()))
        notes.append(f"of the chains from data {ev.numbers['chains/same_class']:.0%} end in the class they started in")

    named = {f"from {name}": own for name, own in groups.items()}
    lags = settled.shape[1] // 2
    panels = {
        "energy": {name: energy[own] for name, own in named.items()},
        "distance from the start": {name: distance[own] for name, own in named.items()},
        "autocorrelation": {name: metrics.autocorrelation(settled[own])[None, :lags] for name, own in named.items()},
    }
    caption = "Single chains (thin) and their median: energy, distance; autocorrelation of the energy."
    ev.draw("chains.png", caption, figures.chains, steps, panels)
    if len(data.shape) == 3:
        trace = torch.stack([torch.cat([x[:count][:4], x[count:][:4]]) for x in snapshots.values()])
        caption = "Chains from noise above, from test images below."
        ev.draw("chain_strips.png", caption, figures.strips, trace, list(snapshots))
    columns = {"energy": "chains/energy/{}", "distance": "chains/distance/{}"}
    columns |= {"split-R̂": "chains/rhat/{}", "ESS": "chains/ess/{}"}
    rows = {"noise": ["from noise"], "data": ["from data"], "all": ["all"]}
    ev.section("Chains", ["chains"], columns, rows, notes, digits=3)


def density(ev: Evaluation) -> None:
    """log Z and likelihood: by quadrature in two dimensions, by annealed importance sampling for images."""
    (plane if ev.dataset.shape == (2,) else likelihood)(ev)


def plane(ev: Evaluation) -> None:
    cfg, data = ev.cfg.densities, ev.dataset
    grid = densities.midpoints(cfg.cells)
    log_q = torch.from_numpy(ev.scores(grid))
    test = ev.scores(data.test)
    log_z = densities.log_integral(log_q)
    log_q = log_q - log_z
    ev.put("log_z", log_z)
    ev.put("nll", log_z - test.mean(), metrics.mean_ci95(log_z - test, ev.cfg.bootstrap, ev.rng()))
    panels = {"energy": -log_q, "density of the model": log_q.exp()}
    if data.log_prob is None:
        ev.skipped["kl"] = f"the law of data set {data.name} is not known"
    else:
        log_p = data.log_prob(grid)
        ev.put("kl", densities.kl_on_grid(log_p, log_q))
        ev.put("nll/truth", -float(data.log_prob(data.test).double().mean()))
        panels["density of the data"] = log_p.exp()
    panels = {title: values.view(cfg.cells, -1) for title, values in panels.items()}
    drawn = ev.sampled(ev.noise(4096), labels_in_proportion(ev.energies[0], 4096), cfg.steps)
    panels |= {f"samples, {cfg.steps} steps": drawn, "data": data.test[:4096]}
    ev.draw("densities.png", f"{data.name}: energy surface, densities, samples and data.", figures.points, panels)
    keys = ("log_z", "nll", "nll/truth", "kl")
    rows = {key: [key] for key in keys if key in ev.numbers}
    notes = [f"integrals over [−1, 1]² on {cfg.cells}² cells; nll: −log-likelihood of the test points"]
    ev.section("Density", [""], {"nats": "{}"}, rows, notes)


def likelihood(ev: Evaluation) -> None:
    cfg, data = ev.cfg.ais, ev.dataset
    dims, count = math.prod(data.shape), min(cfg.chains, len(data.test))
    generator = torch.Generator(ev.device).manual_seed(ev.cfg.seed)
    x, base = scaled(data.test[:count]).to(ev.device), densities.Uniform(data.shape, ev.device)
    betas = ais.temperatures(cfg.temperatures, cfg.power)
    found = ais.bracket(ev.energies[0], base, x, generator, betas, cfg.leapfrog, cfg.acceptance, (-1, 1), cfg.burn_in)
    mean = float(ev.scores(data.test).mean())
    quantised = math.log2(127.5) if data.test.dtype == torch.uint8 else 0.0  # a byte's width in [−1, 1] is 2/255
    for side in ("lower", "upper"):
        value, error = found.bound(side)
        ev.put(f"log_z/{side}", value, [value - 1.96 * error, value + 1.96 * error])
        bits = [(z - mean) / dims / math.log(2) + quantised for z in ev.triple(f"log_z/{side}")]
        ev.put(f"bits_per_dim/{side}", bits[0], bits[1:])
    gap = ev.numbers["log_z/upper"] - ev.numbers["log_z/lower"]
    notes = [
        f"{count} chains of AIS, {cfg.temperatures} temperatures, acceptance {found.acceptance:.2f}",
        f"The upper bound, {gap:.1f} nats above the lower, holds only if chains of exp(−E) from test images have "
        "reached its steady state. A model of short runs may have none: bits per dim then say little of its samples.",
    ]
    if "chains/steady_state" in ev.numbers:
        notes.append(f"steady state by the chains' split-R̂: {'yes' if ev.numbers['chains/steady_state'] else 'no'}")
    columns = {"lower bound": "{}/lower", "upper bound": "{}/upper"}
    rows = {"log_z": ["log Z, nats"], "bits_per_dim": ["bits per dim"]}
    ev.section("Likelihood", [""], columns, rows, notes, digits=3)


def classification(ev: Evaluation) -> None:
    """Of an energy with classes: how well p(y | x) tells the test images' labels, and how sure it is of itself."""
    data, energy = ev.dataset, ev.energies[0]
    classes = getattr(energy, "classes", None)
    if classes is None or data.test_labels is None:
        ev.skipped["classification"] = "it takes an energy with classes (energy.classes) and labelled images"
        return
    if (highest := int(data.test_labels.max())) >= classes:
        ev.skipped["classification"] = f"there are labels up to {highest}, the energy has {classes} classes"
        return
    labels = torch.arange(classes, device=ev.device)
    with torch.no_grad():
        every = metrics.in_batches(lambda x: energy(x, labels.expand(len(x), -1)), data.test, **ev.how)
    found = metrics.classification(-every / getattr(energy, "temperature", 1.0), data.test_labels)
    for name in ("accuracy", "confidence", "nll"):
        ev.put_mean(f"classification/{name}", found[name])
    ev.put("classification/calibration_error", found["calibration_error"].item())
    caption = "Share of right labels by confidence, max p(y | x); a calibrated classifier lies on the diagonal."
    ev.draw("reliability.png", caption, figures.reliability, found["confidence"], found["accuracy"])
    columns = {name: f"classification/{name}" for name in ("accuracy", "confidence", "nll", "calibration_error")}
    note = "p(y | x) = softmax(−E(x, y)/T); calibration error: mean of |accuracy − confidence|, 15 bins of confidence"
    ev.section("Classification", ["set"], columns, {"": [f"{data.name} test"]}, [note])


PARTS = {"ood": ood, "samples": samples, "classification": classification, "chains": chains, "densities": density}


def check_numbers(cfg: DictConfig) -> None:
    """ValueError for a number of the protocol that is out of range, naming its key."""
    check.number("seed", cfg.seed, 0, 2**63 - 3, integer=True)
    check.number("noise_std", cfg.noise_std, 0)
    check.number("chains.rhat", cfg.chains.rhat, 1)
    check.number("ais.power", cfg.ais.power, 0, open_low=True)
    least = {"ais.burn_in": 0}
    least |= {"batch_size": 1, "bootstrap": 2, "samples.count": 8, "samples.neighbours": 1, "chains.count": 2}
    least |= {"chains.steps": 16, "densities.cells": 2, "densities.steps": 1, "ais.chains": 2, "ais.temperatures": 1}
    for key, low in least.items():
        check.number(key, OmegaConf.select(cfg, key), low, integer=True)
    if not OmegaConf.is_list(cfg.samples.steps) or len(cfg.samples.steps) == 0:
        raise ValueError(f"samples.steps must be a list of numbers of steps, got {cfg.samples.steps!r}")
    for steps in cfg.samples.steps:
        check.number("samples.steps", steps, 1, integer=True)
    for key, accepted in (("evaluation.parts", PARTS), ("ood.scores", OTHER_SCORES)):
        names = OmegaConf.select(cfg, key)
        if not OmegaConf.is_list(names) or (key == "evaluation.parts" and not names):
            raise ValueError(f"{key} must be a list of {', '.join(accepted)}, got {names!r}")
        for name in names:
            check.choice(key, name, tuple(accepted))
    if Path(str(cfg.evaluation.name)).name != cfg.evaluation.name:
        raise ValueError(f"evaluation.name must be the name of a folder, got {cfg.evaluation.name!r}")
    if not OmegaConf.is_list(cfg.ood.sets):
        raise ValueError(f"ood.sets must be a list of names, got {cfg.ood.sets!r}")
    keys_of(cfg.ood.sets)
    check.memory(f"densities.cells={cfg.densities.cells}", 64 * cfg.densities.cells**2)
    check.memory(f"ais.temperatures={cfg.ais.temperatures}", 8 * cfg.ais.temperatures)


def protocol(ev: Evaluation) -> dict[str, Any]:
    """Everything the numbers depend on, and nothing that they do not: the same on every run of the same evaluation."""
    config: Any = OmegaConf.to_container(ev.cfg, resolve=True)
    for key in ("wandb", "out", "cache", "batch_size", "compare", "checkpoint", "modules", "data", "device"):
        config.pop(key)
    config["ood"].pop("root")
    config["sampler"] = {k: v for k, v in vars(ev.sampler).items() if k != "threads" and not k.startswith("_")}
    example = torch.empty(1, *ev.dataset.shape, device=ev.device)
    config["sampler"]["backend"] = ev.sampler.run_as(ev.energies[0], example)[0]
    used = ("torch", "torchvision", "torchmetrics", "scikit-learn", "numpy")
    return config | {
        "weights": [features.weights_hash(energy.state_dict()) for energy in ev.energies],
        "step": ev.state["step"],
        "class_shares": ev.state.get("class_shares"),
        "data": {"name": ev.dataset.name, "hash": features.data_hash(ev.dataset)},
        "classifier": ev.classifier[1] if "classifier" in vars(ev) else None,
        "device": ev.device.type,
        "threads": torch.get_num_threads(),
        "versions": {"plain-ebm": ebm.__version__, "python": platform.python_version()} | {k: version(k) for k in used},
    }


def evaluate(cfg: DictConfig, number: int | None = None) -> Path:
    """Run the parts and write what they found, all or nothing, to the folder returned. `number`: of a sweep's job."""
    check_numbers(cfg)
    device = pick_device(cfg.device)
    paths = [str(path) for path in (cfg.checkpoint if OmegaConf.is_list(cfg.checkpoint) else [cfg.checkpoint])]
    if not paths:
        raise ValueError("checkpoint must be a run directory, a checkpoint file or a list of them, got []")
    states = [checkpoint.load(path) for path in paths]
    built = [checkpoint.build_energy(s, path, cfg.modules) for s, path in zip(states, paths, strict=True)]
    energies = [energy.to(device) for energy in built]
    for path, state in zip(paths, states, strict=True):
        if checkpoint.input_shape(state) != checkpoint.input_shape(states[0]):
            raise ValueError(f"checkpoint: {path} takes other images than {paths[0]}, they make no ensemble")
    dataset = dataset_of(cfg, states[0])
    for split, x in (("train", dataset.train), ("test", dataset.test)):
        if len(x) < 2:
            raise ValueError(f"data set {dataset.name}: one {split} image has no spread, at least 2 are needed")
    sub = "" if number is None or (cfg.out is None and checkpoint.is_run(paths[0])) else f"/{number}"
    out = output_folder(cfg.out and f"{cfg.out}{sub}", paths[0], f"evaluation/{cfg.evaluation.name}{sub}")
    with whole_files(out) as aside:
        ev = Evaluation(cfg, states[0], energies, dataset, trained.sampler_of(states[0], cfg.sampler), device, aside)
        for part in cfg.evaluation.parts:
            PARTS[part](ev)
        numbers = ev.numbers | {"checkpoint": paths[0], "skipped": ev.skipped, "protocol": protocol(ev)}
        title = f"{cfg.evaluation.name}: {Path(paths[0]).name} on {dataset.name}"
        report.write(ev.folder / "report.html", title, ev.sections, ev.skipped, numbers["protocol"])
        (ev.folder / "metrics.json").write_text(json.dumps(numbers, indent=2, allow_nan=False) + "\n")
    pictures = {Path(name).stem: out / name for section in ev.sections for name in section.pictures}
    logged: Any = OmegaConf.to_container(cfg, resolve=True)
    tracking.log_evaluation(out, numbers, pictures, logged, **logged["wandb"])
    for key, reason in ev.skipped.items():
        print(f"skipped      {key}: {reason}")
    print(f"numbers      {out / 'metrics.json'}")
    print(f"pictures     {' '.join(str(file) for file in pictures.values())}")
    print(f"report       {out / 'report.html'}")
    return out


class Comparison(Folders):
    """Compares the evaluations of a sweep after its last job; the exit code is 1 where one failed."""

    def __init__(self) -> None:
        self.folders: list[Path] = []
        self.failed: list[str] = []

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        if job_return._return_value:
            self.folders.append(Path(job_return._return_value))
        elif job_return._return_value is None:
            self.failed.append(" ".join(job_return.overrides))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if len(self.folders) > 1:
            with one_line_errors():
                report.compare(self.folders, output_folder(config.out, ".", "evaluation/compare"))
        if self.failed:
            print(f"error: {len(self.failed)} evaluations failed: {'; '.join(self.failed)}", file=sys.stderr)
            sys.exit(1)


def evaluate_or_compare(cfg: DictConfig, number: int | None = None) -> str:
    """The folder of an evaluation, "" of a comparison."""
    if cfg.compare is None:
        return str(evaluate(cfg, number))
    given = cfg.compare if OmegaConf.is_list(cfg.compare) else [cfg.compare]
    if not given:
        raise ValueError("compare must be a list of evaluations, or of runs that have one, got []")
    report.compare([Path(str(path)) for path in given], output_folder(cfg.out, ".", "evaluation/compare"))
    return ""


def launch(cfg: DictConfig) -> str:
    with one_line_errors():
        return evaluate_or_compare(cfg)


def job_of_sweep(cfg: DictConfig, number: int) -> str | None:
    """As `launch`, but the sweep goes on past a failure; None then."""
    try:
        return evaluate_or_compare(cfg, number)
    except Exception as error:  # whatever a job can die of
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            traceback.print_exc()
        reason = " ".join(str(cause_of(error)).split()) or type(error).__name__
        print(f"error: job {number}: {reason} (HYDRA_FULL_ERROR=1 shows where)", file=sys.stderr)
        return None


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(cfg: DictConfig) -> str | None:
    job = HydraConfig.get()
    if job.job.chdir:
        os.chdir(job.runtime.cwd)  # paths are relative to where the user stands
    return job_of_sweep(cfg, job.job.num) if job.mode == RunMode.MULTIRUN else launch(cfg)


if __name__ == "__main__":
    run_main(main)
