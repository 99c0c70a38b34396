"""Evaluate an energy by one pinned protocol:  python evaluate.py checkpoint=RUN_DIR [evaluation=ood] [key=value …]

Runs of evaluations that are there already, in one table and one figure:  python evaluate.py compare=[RUN_A,RUN_B]
"""

import json
import math
import platform
import shutil
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

import ebm
from ebm import ais, check, checkpoint, densities, features, figures, metrics, report, tracking
from ebm.cli import one_line_errors, output_folder, pick_device
from ebm.data import Dataset, scaled
from ebm.outliers import OTHERS, folder_of, outliers
from ebm.sampler import SGLD, chain_generators, trace_in_batches, uniform_noise
from sample import dataset_of, sampler_of

OTHER_SCORES = ("gradient_norm", "typicality")


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

    def put(self, key: str, value: float, ci95: list[float] | None = None) -> None:
        if not np.isfinite([value, *(ci95 or [])]).all():
            raise ValueError(f"{key} is {value}, its interval {ci95}")
        self.numbers[key] = float(value)
        if ci95 is not None:
            self.numbers[f"{key}/ci95"] = ci95

    def put_mean(self, key: str, values: metrics.Array) -> None:
        self.put(key, float(values.mean()), metrics.mean_ci95(values, self.cfg.bootstrap, self.rng()))

    def shown(self, key: str, digits: int = 4) -> str:
        """The number with its interval, for a table."""
        if key not in self.numbers:
            return "—"
        ci95 = self.numbers.get(f"{key}/ci95")
        between = f" [{ci95[0]:.{digits}f}, {ci95[1]:.{digits}f}]" if ci95 else ""
        return f"{self.numbers[key]:.{digits}f}{between}"

    def triple(self, key: str) -> list[float]:
        """(value, low, high) for a figure."""
        return [self.numbers[key], *self.numbers.get(f"{key}/ci95", [self.numbers[key]] * 2)]

    def rng(self) -> np.random.Generator:
        """The bootstrap's generator; a new one a quantity, so that none depends on what else is evaluated."""
        return np.random.default_rng(self.cfg.seed)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.cfg.seed)

    @cached_property
    def classifier(self) -> tuple[features.Classifier, dict[str, Any]]:
        return features.cached_classifier(self.dataset, self.cfg.cache, self.device)


def ood(ev: Evaluation) -> None:
    """Scores of outliers and how well they are told from the test images."""
    cfg, data = ev.cfg.ood, ev.dataset
    root = cfg.root or ev.cfg.data.root or ev.state["config"].get("data", {}).get("root") or "data"
    how = {"batch_size": ev.cfg.batch_size, "device": ev.device}
    scores: dict[str, dict[str, metrics.Array]] = {"score": {}}  # by the score's name, then the set's
    members: dict[str, list[metrics.Array]] = {}  # scores by every energy of the ensemble
    examples: dict[str, Tensor] = {}
    for name in dict.fromkeys(["train", "test", *cfg.sets]):
        key = folder_of(name)
        if OTHERS.get(name, "") == data.name:
            ev.skipped[f"ood/{key}"] = "it is the data set itself"
            continue
        try:
            x = outliers(name, data, root, ev.cfg.noise_std, ev.cfg.seed)
        except ValueError as error:
            if str(error).startswith("ood.sets"):
                raise
            ev.skipped[f"ood/{key}"] = str(error)
            continue
        members[key] = [metrics.scores(energy, x, **how) for energy in ev.energies]
        scores["score"][key] = members[key][0]
        for other in cfg.scores:
            values = (
                metrics.gradient_norms(ev.energies[0], x, **how)
                if other == "gradient_norm"
                else metrics.typicality(members[key][0], members["train"][0])
            )
            scores.setdefault(other, {})[key] = values
        if len(ev.energies) > 1:
            for other, values in zip(
                ("ensemble_mean", "ensemble_spread"), metrics.ensemble(members[key], members["train"]), strict=True
            ):
                scores.setdefault(other, {})[key] = values
        if key != "train":
            examples[key] = scaled(x[:: max(len(x) // 4, 1)][:4] if name == "constant" else x[:4])

    for key, values in scores["score"].items():
        ev.put(f"score/{key}/mean", values.mean())
        ev.put(f"score/{key}/std", values.std(ddof=1))
    for score, sets in scores.items():
        suffix = "" if score == "score" else f"/{score}"
        for key, values in sets.items():
            numbers = metrics.separation(sets["test"], values)
            ci95 = metrics.separation_ci95(sets["test"], values, ev.cfg.bootstrap, ev.rng())
            for name, value in numbers.items():
                ev.put(f"{name}/{key}{suffix}", value, ci95[name])

    plain = scores["score"]
    pictures = {"scores.png": "Scores −E(x) of every set, each to its own height."}
    figures.scores(ev.folder / "scores.png", plain)
    outside = {key: values for key, values in plain.items() if key != "test"}
    figures.roc(ev.folder / "roc.png", plain["test"], outside)
    pictures["roc.png"] = f"Test images accepted over outliers accepted as the threshold on −E(x) falls ({data.name})."
    if len(scores) > 1:
        by_score = {s: {k: ev.triple(f"auroc/{k}" + f"/{s}" * (s != "score")) for k in outside} for s in scores}
        figures.intervals(ev.folder / "auroc.png", {"AUROC": by_score})
        pictures["auroc.png"] = "AUROC by set and score, with 95 % bootstrap intervals."
    if len(data.shape) == 3:
        figures.scored_images(
            ev.folder / "examples.png", examples, {k: plain[k][: len(x)] for k, x in examples.items()}
        )
        pictures["examples.png"] = "Four images of every set with their scores."
    others = [s for s in scores if s != "score"]
    header = ["set", "images", "score", "± std", "AUROC", "AUPR", "FPR95", *(f"AUROC {s}" for s in others)]
    rows = [
        [key, str(len(v)), f"{v.mean():.4f}", f"{v.std(ddof=1):.4f}", ev.shown(f"auroc/{key}")]
        + [f"{ev.numbers[f'{name}/{key}']:.4f}" for name in ("aupr", "fpr95")]
        + [f"{ev.numbers[f'auroc/{key}/{s}']:.4f}" for s in others]
        for key, v in plain.items()
    ]
    notes = [f"score: −E(x), higher is more likely.  AUROC: of the {data.name} test images against the set"]
    ev.sections.append(report.Section("Outliers", header, rows, notes, pictures))


def drawn(ev: Evaluation, count: int) -> dict[str, Tensor]:
    """Images to compare with the test images, by key: after each number of steps from noise and from the buffer, and
    `count` training images ("real"). Each number of steps is a run of its own, for samplers that anneal."""
    cfg, data = ev.cfg.samples, ev.dataset
    starts = {"": uniform_noise((count, *data.shape), chain_generators(ev.cfg.seed + 1, count))}
    held = ev.state["buffer"]["chains"] if "buffer" in ev.state else torch.empty(0)
    if len(held) >= count:
        starts["/buffer"] = held[torch.randperm(len(held), generator=ev.generator())[:count]]
    else:
        ev.skipped["samples/buffer"] = f"the checkpoint holds {len(held)} chains of a replay buffer, {count} are needed"
    images = {}
    for suffix, start in starts.items():
        for steps in cfg.steps:
            generators = chain_generators(ev.cfg.seed, count, ev.device)
            images[f"{steps}{suffix}"] = trace_in_batches(
                ev.sampler, ev.energies[0], start, generators, ev.cfg.batch_size, steps, steps
            )[-1]
    images["real"] = scaled(data.train[torch.randperm(len(data.train), generator=ev.generator())[:count]])
    return images


def samples(ev: Evaluation) -> None:
    """Samples against test images in feature space, by number of SGLD steps, beside what real images reach."""
    cfg, data = ev.cfg.samples, ev.dataset
    if len(data.shape) != 3 or data.train_labels is None:
        ev.skipped["samples"] = "features come from a classifier, which needs images with labels"
        return
    count = min(cfg.count, len(data.test), len(data.train))
    if count < cfg.count:
        ev.skipped[f"samples/{cfg.count}"] = f"as many samples as real images are compared: {count}"
    classifier, info = ev.classifier
    spaces: dict[str, features.Classifier | features.Inception] = {f"classifier-n{count}": classifier}
    if cfg.inception is None:
        ev.skipped["samples/inception"] = "no weights of torch-fidelity's Inception were given (samples.inception)"
    else:
        spaces[f"inception-n{count}"] = features.Inception(cfg.inception).to(ev.device)
    how = {"batch_size": ev.cfg.batch_size, "device": ev.device}
    images = drawn(ev, count)
    pick = torch.randperm(len(data.test), generator=ev.generator())[:count]
    for space, net in spaces.items():
        test = features.features_of(net, data.test, **how)
        for key, x in images.items():
            fake = features.features_of(net, x, **how)
            ev.put(f"kid/{space}/{key}", *metrics.kernel_distance(test[pick], fake, ev.cfg.bootstrap, ev.rng()))
            few = min(ev.cfg.bootstrap, 100)  # each takes an eigenvalue problem
            low_high = metrics.frechet_ci95(test, fake, few, ev.rng())
            ev.put(f"frechet/{space}/{key}", metrics.frechet(test, fake), low_high)
            for name, values in metrics.manifold_quality(test[pick], fake, cfg.neighbours).items():
                ev.put_mean(f"{name}/{space}/{key}", values)
    real_distances, _ = metrics.nearest(data.test[pick], data.train)
    shares: dict[str, metrics.Array] = {}
    for key, x in images.items():
        logits = metrics.in_batches(classifier, x, **how)
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
    starts = {"from noise": ""} | ({"from the buffer": "/buffer"} if f"{shown}/buffer" in images else {})
    panels = {
        title: {name: {s: ev.triple(f"{key}/{s}{suffix}") for s in cfg.steps} for name, suffix in starts.items()}
        for title, key in curves.items()
    }
    figures.by_steps(ev.folder / "quality.png", panels, {title: ev.numbers[f"{k}/real"] for title, k in curves.items()})
    rows = torch.stack([images[f"{steps}"][:12] for steps in cfg.steps])
    figures.labelled_rows(ev.folder / "samples.png", rows, [""] * rows.shape[1], [f"{s} steps" for s in cfg.steps])
    _, index = metrics.nearest(images[shown][:12], data.train)
    pairs = torch.stack([images[shown][:12], scaled(data.train[index])])
    figures.labelled_rows(ev.folder / "nearest.png", pairs, [""] * pairs.shape[1], ["sample", "nearest"])
    figures.histogram(ev.folder / "classes.png", {f"{shown} steps": shares[shown], "real images": shares["real"]})
    pictures = {
        "quality.png": f"Quality over SGLD steps, n = {count}; bands: 95 % intervals; dashed: training images.",
        "samples.png": "The same twelve chains from noise, after more and more steps.",
        "nearest.png": f"Samples after {shown} steps over their nearest training images.",
        "classes.png": f"Classes of samples after {shown} steps, and of real images.",
    }
    header = [
        "samples",
        "Fréchet",
        "kernel",
        "precision",
        "recall",
        "density",
        "coverage",
        "entropy",
        "nearest",
        "copies",
    ]
    table = [
        [_name(key), *(ev.shown(f"{metric}/{space}/{key}", 3) for metric in ("frechet", "kid"))]
        + [f"{ev.numbers[f'{m}/{space}/{key}']:.3f}" for m in ("precision", "recall", "density", "coverage")]
        + [f"{ev.numbers[f'{m}/{key}']:.3f}" for m in ("class_entropy", "nearest", "copies")]
        for key in images
    ]
    notes = [
        f"{count} samples a line against the {data.name} test images; features: the classifier's, not Inception's.",
        "nearest: median distance to a training image; copies: share of samples nearer than 99 % of the test images",
    ]
    ev.sections.append(report.Section("Samples", header, table, notes, pictures))


def _name(key: str) -> str:
    steps, _, buffer = key.partition("/")
    return "training images" if key == "real" else f"{steps} steps from {buffer or 'noise'}"


def chains(ev: Evaluation) -> None:
    """Long chains from noise and from data: do they come to tell of one law, and do images stay what they were?"""
    cfg, data = ev.cfg.chains, ev.dataset
    count = min(cfg.count, len(data.test))
    start = torch.cat(
        [uniform_noise((count, *data.shape), chain_generators(ev.cfg.seed + 1, count)), scaled(data.test[:count])]
    ).to(ev.device)
    every = max(1, cfg.steps // 1000)
    kept = np.unique(np.geomspace(every, cfg.steps, 8).round().astype(int) // every * every)
    steps, energies, distances, snapshots = [], [], [], {}

    def record(step: int, x: Tensor) -> None:
        steps.append(step)
        energies.append(-metrics.scores(ev.energies[0], x, len(x), ev.device))
        distances.append((x - start).flatten(1).norm(dim=1).double().cpu().numpy())
        if step in kept or step in (0, cfg.steps):
            snapshots[step] = x.cpu().clone()

    generators = chain_generators(ev.cfg.seed, 2 * count, ev.device)
    ev.sampler(ev.energies[0], start, generators, cfg.steps, record, every)
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
    if len(data.shape) == 3 and data.train_labels is not None:
        net = ev.classifier[0]
        before, after = (
            metrics.in_batches(net, snapshots[s][count:], ev.cfg.batch_size, ev.device).argmax(dim=1)
            for s in (0, cfg.steps)
        )
        ev.put("chains/same_class", float((before == after).double().mean()))
        notes.append(f"of the chains from data {ev.numbers['chains/same_class']:.0%} end in the class they started in")

    lags = settled.shape[1] // 2
    panels = {
        "energy": {f"from {name}": energy[own] for name, own in groups.items()},
        "distance from the start": {f"from {name}": distance[own] for name, own in groups.items()},
        "autocorrelation": {
            f"from {name}": metrics.autocorrelation(settled[own])[None, :lags] for name, own in groups.items()
        },
    }
    figures.chains(ev.folder / "chains.png", steps, panels)
    pictures = {"chains.png": "Single chains (thin) and their median: energy, distance; autocorrelation of the energy."}
    if len(data.shape) == 3:
        shown = [*range(min(4, count)), *range(count, count + min(4, count))]
        trace = torch.stack([x[shown] for x in snapshots.values()])
        figures.strips(ev.folder / "chain_strips.png", trace, list(snapshots))
        pictures["chain_strips.png"] = "Chains from noise above, from test images below."
    rows = [
        [f"from {name}" if name in groups else "all"]
        + [ev.shown(f"chains/{what}/{name}", 3) for what in ("energy", "distance", "rhat", "ess")]
        for name in ("noise", "data", "all")
    ]
    header = ["chains", "energy", "distance", "split-R̂", "ESS"]
    ev.sections.append(report.Section("Chains", header, rows, notes, pictures))


def density(ev: Evaluation) -> None:
    """log Z and likelihood: by quadrature in two dimensions, by annealed importance sampling for images."""
    (plane if ev.dataset.shape == (2,) else likelihood)(ev)


def plane(ev: Evaluation) -> None:
    grid = densities.midpoints(ev.cfg.densities.cells)
    log_q = torch.from_numpy(metrics.scores(ev.energies[0], grid, ev.cfg.batch_size, ev.device))
    test = metrics.scores(ev.energies[0], ev.dataset.test, ev.cfg.batch_size, ev.device)
    log_z = densities.log_integral(log_q)
    log_q = log_q - log_z
    ev.put("log_z", log_z)
    ev.put("nll", log_z - test.mean(), metrics.mean_ci95(log_z - test, ev.cfg.bootstrap, ev.rng()))
    generators = chain_generators(ev.cfg.seed, 4096, ev.device)
    noise = uniform_noise((4096, 2), chain_generators(ev.cfg.seed + 1, 4096))
    steps = ev.cfg.densities.steps
    x = trace_in_batches(ev.sampler, ev.energies[0], noise, generators, ev.cfg.batch_size, steps, steps)[-1]
    square = (ev.cfg.densities.cells, -1)
    panels = {"energy": (-log_q).view(square), "density of the model": log_q.exp().view(square)}
    if ev.dataset.log_prob is None:
        ev.skipped["kl"] = f"the law of data set {ev.dataset.name} is not known"
    else:
        log_p = ev.dataset.log_prob(grid)
        ev.put("kl", densities.kl_on_grid(log_p, log_q))
        truth = -float(ev.dataset.log_prob(ev.dataset.test).double().mean())
        ev.put("nll/truth", truth)
        panels["density of the data"] = log_p.exp().view(square)
    figures.points(ev.folder / "densities.png", panels | {f"samples, {steps} steps": x, "data": ev.dataset.test[:4096]})
    keys = ("log_z", "nll", "nll/truth", "kl")
    rows = [[key, ev.shown(key)] for key in keys if key in ev.numbers]
    pictures = {"densities.png": f"{ev.dataset.name}: energy surface, densities, samples and data."}
    notes = [f"integrals over [−1, 1]² on {ev.cfg.densities.cells}² cells; nll: −log-likelihood of the test points"]
    ev.sections.append(report.Section("Density", ["", "nats"], rows, notes, pictures))


def likelihood(ev: Evaluation) -> None:
    cfg, data = ev.cfg.ais, ev.dataset
    energy, dims = ev.energies[0], math.prod(data.shape)
    generator = torch.Generator(ev.device).manual_seed(ev.cfg.seed)
    count = min(cfg.chains, len(data.test))
    x = scaled(data.test[:count]).to(ev.device)
    betas = ais.temperatures(cfg.temperatures, cfg.power)
    base = densities.Uniform(data.shape, ev.device)
    found = ais.bracket(energy, base, x, generator, betas, cfg.leapfrog, cfg.acceptance, (-1, 1), cfg.burn_in)
    mean = float(metrics.scores(energy, data.test, ev.cfg.batch_size, ev.device).mean())
    quantised = math.log2(127.5) if data.test.dtype == torch.uint8 else 0.0  # a byte's width in [−1, 1] is 2/255
    for side in ("lower", "upper"):
        value, error = found.bound(side)
        ev.put(f"log_z/{side}", value, [value - 1.96 * error, value + 1.96 * error])
        bits = [(z - mean) / dims / math.log(2) + quantised for z in ev.triple(f"log_z/{side}")]
        ev.put(f"bits_per_dim/{side}", bits[0], bits[1:])
    gap = ev.numbers["log_z/upper"] - ev.numbers["log_z/lower"]
    rows = [
        [name, *(ev.shown(f"{key}/{side}", 3) for side in ("lower", "upper"))]
        for key, name in (("log_z", "log Z, nats"), ("bits_per_dim", "bits per dim"))
    ]
    notes = [
        f"{count} chains of AIS, {cfg.temperatures} temperatures, acceptance {found.acceptance:.2f}",
        f"The upper bound, {gap:.1f} nats above the lower, holds only if chains of exp(−E) from test images have "
        "reached its steady state. A model of short runs may have none: bits per dim then say little of its samples.",
    ]
    if "chains/steady_state" in ev.numbers:
        notes.append(f"steady state by the chains' split-R̂: {'yes' if ev.numbers['chains/steady_state'] else 'no'}")
    ev.sections.append(report.Section("Likelihood", ["", "lower bound", "upper bound"], rows, notes, {}))


PARTS = {"ood": ood, "samples": samples, "chains": chains, "densities": density}


def check_numbers(cfg: DictConfig) -> None:
    """ValueError for a number of the protocol that is out of range, naming its key."""
    check.number("seed", cfg.seed, 0, 2**63 - 3, integer=True)
    check.number("noise_std", cfg.noise_std, 0)
    check.number("chains.rhat", cfg.chains.rhat, 1)
    check.number("ais.power", cfg.ais.power, 0, open_low=True)
    check.number("ais.burn_in", cfg.ais.burn_in, 0, integer=True)
    least = {"batch_size": 1, "bootstrap": 2, "samples.count": 8, "samples.neighbours": 1, "chains.count": 2}
    least |= {"chains.steps": 16, "densities.cells": 2, "densities.steps": 1, "ais.chains": 2, "ais.temperatures": 1}
    for key, low in least.items():
        check.number(key, OmegaConf.select(cfg, key), low, integer=True)
    if not OmegaConf.is_list(cfg.samples.steps) or len(cfg.samples.steps) == 0:
        raise ValueError(f"samples.steps must be a list of numbers of steps, got {cfg.samples.steps!r}")
    for steps in cfg.samples.steps:
        check.number("samples.steps", steps, 1, integer=True)
    for part in cfg.evaluation.parts:
        check.choice("evaluation.parts", part, tuple(PARTS))
    for score in cfg.ood.scores:
        check.choice("ood.scores", score, OTHER_SCORES)


def protocol(ev: Evaluation) -> dict[str, Any]:
    """Everything the numbers depend on, and nothing that they do not: the same on every run of the same evaluation."""
    config: Any = OmegaConf.to_container(ev.cfg, resolve=True)
    for key in ("wandb", "out", "cache", "batch_size", "compare", "checkpoint", "data", "device"):
        config.pop(key)
    config["ood"].pop("root")
    config["sampler"] = {k: v for k, v in vars(ev.sampler).items() if k != "threads" and not k.startswith("_")}
    example = torch.empty(1, *ev.dataset.shape, device=ev.device)
    config["sampler"]["backend"] = ev.sampler.run_as(ev.energies[0], example)[0]
    used = ("torch", "torchvision", "torchmetrics", "scikit-learn", "numpy")
    return config | {
        "weights": [features.weights_hash(energy.state_dict()) for energy in ev.energies],
        "step": ev.state["step"],
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
    paths = list(cfg.checkpoint) if OmegaConf.is_list(cfg.checkpoint) else [cfg.checkpoint]
    if not paths:
        raise ValueError("checkpoint must be a run directory, a checkpoint file or a list of them, got []")
    states = [checkpoint.load(path) for path in paths]
    energies = [checkpoint.build_energy(s, path).to(device) for s, path in zip(states, paths, strict=True)]
    for path, state in zip(paths, states, strict=True):
        if checkpoint.input_shape(state) != checkpoint.input_shape(states[0]):
            raise ValueError(f"checkpoint: {path} takes other images than {paths[0]}, they make no ensemble")
    dataset = dataset_of(cfg, states[0])
    sampler = sampler_of(cfg, states[0])
    sub = "" if number is None or (cfg.out is None and Path(paths[0]).is_dir()) else f"/{number}"
    if cfg.out is not None and Path(cfg.out).is_file():
        raise ValueError(f"out must be a directory, got the file {cfg.out}")
    with tempfile.TemporaryDirectory(prefix="evaluation-") as aside:
        ev = Evaluation(cfg, states[0], energies, dataset, sampler, device, Path(aside))
        for part in cfg.evaluation.parts:
            shown = len(ev.sections)
            PARTS[part](ev)
            for section in ev.sections[shown:]:
                print(section.text(), flush=True)
        numbers = ev.numbers | {"checkpoint": str(paths[0]), "skipped": ev.skipped, "protocol": protocol(ev)}
        title = f"{cfg.evaluation.name}: {Path(paths[0]).name} on {dataset.name}"
        report.write(ev.folder / "report.html", title, ev.sections, ev.skipped, numbers["protocol"])
        (ev.folder / "metrics.json").write_text(json.dumps(numbers, indent=2, allow_nan=False) + "\n")
        out = output_folder(cfg.out and cfg.out + sub, paths[0], f"evaluation/{cfg.evaluation.name}{sub}")
        for file in sorted(ev.folder.iterdir(), key=lambda file: file.suffix == ".json"):  # the numbers last
            shutil.move(file, out / file.name)
    pictures = {Path(name).stem: out / name for section in ev.sections for name in section.pictures}
    logged: Any = OmegaConf.to_container(cfg, resolve=True)
    tracking.log_evaluation(out, numbers, pictures, logged, **logged["wandb"])
    for key, reason in ev.skipped.items():
        print(f"skipped      {key}: {reason}")
    print(f"numbers      {out / 'metrics.json'}")
    print(f"pictures     {' '.join(str(file) for file in pictures.values())}")
    print(f"report       {out / 'report.html'}")
    return out


class Comparison(Callback):
    """Compares the evaluations of a sweep after its last job."""

    def __init__(self) -> None:
        self.folders: list[Path] = []

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        if isinstance(job_return._return_value, str):
            self.folders.append(Path(job_return._return_value))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if len(self.folders) > 1:
            with one_line_errors():
                report.compare(self.folders, output_folder(config.out, ".", "evaluation/compare"))


def launch(cfg: DictConfig, number: int | None = None) -> str:
    """Evaluate or compare; the folder of an evaluation as a string, "" of a comparison."""
    with one_line_errors():
        if cfg.compare is None:
            return str(evaluate(cfg, number))
        given = cfg.compare if OmegaConf.is_list(cfg.compare) else [cfg.compare]
        report.compare([Path(str(path)) for path in given], output_folder(cfg.out, ".", "evaluation/compare"))
    return ""


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(cfg: DictConfig) -> str:
    job = HydraConfig.get()
    return launch(cfg, job.job.num if job.mode == RunMode.MULTIRUN else None)


if __name__ == "__main__":
    main()
