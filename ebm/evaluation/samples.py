"""The part `samples`: samples against test images in the judge's features, beside what validation images reach."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ebm import check
from ebm.data import scaled
from ebm.energies import labels_in_proportion
from ebm.evaluation import features, figures, metrics
from ebm.evaluation.evaluation import Evaluation
from ebm.sampling.chains import GROUP

Start = tuple[Tensor, Tensor | None]  # chains (N, *shape), and their labels (N,) or none
# Where chains start, by the suffix of their numbers' keys.
FROM = {"": "from noise", "/any": "from noise, without labels", "/buffer": "from the buffer"}


def samples(
    ev: Evaluation,
    count: int,
    steps: Sequence[int],
    neighbours: int,
    without_labels: bool = False,
    buffer: Mapping[str, Tensor] | None = None,
) -> None:
    """`count` samples, and as many validation images, against the test images.

    steps           numbers of SGLD steps, each a run from noise and one from the buffer
    neighbours      k of precision, recall, density and coverage
    without_labels  of an energy with classes, whose chains have labels: also a run of chains that go down E(x)
    buffer          `chains` (capacity, *shape) and `labels` (capacity,) of the checkpoint's replay buffer, if any
    """
    data = ev.dataset
    judge = features.judge_of(data, ev.judge)
    if judge is None:
        ev.skipped["samples"] = "no judge ships for the data, and they lack images with labels of two classes or more"
        return
    asked, count = count, min(count, len(data.test), len(data.validation))
    if count <= neighbours:
        ev.skipped["samples"] = f"{count} real images are too few for samples.neighbours={neighbours}"
        return
    check.memory(f"bootstrap={ev.bootstrap} of {count} samples", 16 * ev.bootstrap * count)
    if count < asked:
        ev.skipped[f"samples/{asked}"] = f"as many samples as real images are compared: {count}"
    starts = starts_of_chains(ev, count, without_labels, buffer)
    # Each number of steps is a run of its own, for samplers that anneal.
    images: dict[str, Tensor] = {}
    chains = math.ceil(count / GROUP) * GROUP  # the last batch is filled up
    with ev.progress("samples", total=len(starts) * sum(steps) * chains) as bar:
        for suffix, (x, labels) in starts.items():
            images |= {f"{k}{suffix}": ev.sampled(x, labels, k, bar.update) for k in steps}
    images["real"] = scaled(data.validation[ev.chosen(data.validation, count)])
    space = f"{judge}-n{count}"
    put_distances(ev, space, images, count, neighbours)
    shares = put_classes_and_copies(ev, images, count)

    draw_quality(ev, space, count, steps, starts)
    draw_images(ev, steps, images, shares)
    columns = {"Fréchet": f"frechet/{space}/{{}}", "kernel": f"kernel/{space}/{{}}"}
    columns |= {name: f"{name}/{space}/{{}}" for name in ("precision", "recall", "density", "coverage")}
    columns |= {"entropy": "class_entropy/{}", "nearest": "nearest/{}", "copies": "copies/{}"}
    versus = f"{count} samples a line against the {data.name} test images, in the features of the judge, {judge}."
    close = "nearest: median distance to a training image; copies: share of samples nearer than 99 % of the test images"
    rows = {f"{k}{suffix}": [f"{k} steps {FROM[suffix]}"] for suffix in starts for k in steps}
    rows["real"] = ["test images (hold_out=test)" if data.validation is data.test else "validation images"]
    ev.section("Samples", ["samples"], columns, rows, [versus, close], digits=3, intervals=["Fréchet", "kernel"])


def starts_of_chains(
    ev: Evaluation, count: int, without_labels: bool, buffer: Mapping[str, Tensor] | None
) -> dict[str, Start]:
    """Noise, and chains of the buffer where it has as many, by the suffix that their numbers' keys get."""
    in_proportion = labels_in_proportion(ev.energies[0], count)
    starts: dict[str, Start] = {"": (ev.noise(count), in_proportion)}
    if without_labels and in_proportion is not None:
        starts["/any"] = (ev.noise(count), None)
    held = 0 if buffer is None else len(buffer["chains"])
    if buffer is not None and held >= count:
        chosen = ev.chosen(buffer["chains"], count)
        labels = None if in_proportion is None else buffer["labels"][chosen]
        starts["/buffer"] = (buffer["chains"][chosen], labels)
    else:
        ev.skipped["samples/buffer"] = f"the checkpoint holds {held} chains of a replay buffer, {count} are needed"
    return starts


def put_distances(ev: Evaluation, space: str, images: Mapping[str, Tensor], count: int, neighbours: int) -> None:
    """The numbers in feature space: Fréchet and kernel distance, precision, recall, density and coverage."""
    classifier, _ = ev.classifier
    test = features.features_of(classifier, ev.dataset.test, **ev.how)
    as_many = test[ev.chosen(ev.dataset.test, count)]
    few = min(ev.bootstrap, 100)  # each Fréchet distance takes an eigenvalue problem
    for key, x in images.items():
        fake = features.features_of(classifier, x, **ev.how)
        ev.put(f"kernel/{space}/{key}", *metrics.kernel_distance(as_many, fake, ev.bootstrap, ev.rng()))
        low_high = metrics.frechet_ci95(test, fake, few, ev.rng())
        ev.put(f"frechet/{space}/{key}", metrics.frechet(test, fake), low_high)
        for name, values in metrics.manifold_quality(as_many, fake, neighbours).items():
            ev.put_mean(f"{name}/{space}/{key}", values)


def put_classes_and_copies(ev: Evaluation, images: Mapping[str, Tensor], count: int) -> dict[str, metrics.Array]:
    """The numbers of classes, by the judge, and of distances to the training images. Returns the share (classes,)
    of each class."""
    data, (classifier, info) = ev.dataset, ev.classifier
    of_test, _ = metrics.nearest(data.test[ev.chosen(data.test, count)], data.train)
    shares: dict[str, metrics.Array] = {}
    for key, x in images.items():
        logits = metrics.in_batches(classifier, x, **ev.how)
        counts = np.bincount(logits.argmax(dim=1).numpy(), minlength=logits.shape[1])
        shares[key] = counts / counts.sum()
        ev.put(f"class_entropy/{key}", metrics.entropy(counts), metrics.entropy_ci95(counts, ev.bootstrap, ev.rng()))
        ev.put_mean(f"confidence/{key}", logits.double().softmax(dim=1).max(dim=1).values.numpy())
        distances, _ = metrics.nearest(x, data.train)
        ev.put(f"nearest/{key}", float(np.median(distances)))
        ev.put_mean(f"copies/{key}", (distances < np.quantile(of_test, 0.01)).astype(float))
    ev.put("judge/accuracy", info["accuracy"])
    return shares


def draw_quality(ev: Evaluation, space: str, count: int, steps: Sequence[int], suffixes: Iterable[str]) -> None:
    curves = {"Fréchet": f"frechet/{space}", "kernel": f"kernel/{space}", "recall": f"recall/{space}"}
    curves |= {"precision": f"precision/{space}", "class entropy": "class_entropy"}
    panels, floors = {}, {}
    for title, key in curves.items():
        panels[title] = {FROM[end]: {k: ev.triple(f"{key}/{k}{end}") for k in steps} for end in suffixes}
        floors[title] = ev.numbers[f"{key}/real"]
    caption = f"Quality over SGLD steps, n = {count}; bands: 95 % intervals; dashed: validation images."
    ev.draw("quality.png", caption, figures.by_steps, panels, floors)


def draw_images(
    ev: Evaluation, steps: Sequence[int], images: Mapping[str, Tensor], shares: Mapping[str, metrics.Array]
) -> None:
    data, shown = ev.dataset, str(steps[len(steps) // 2])
    trace = torch.stack([images[f"{k}"][:12] for k in steps])
    caption, rows = "The same twelve chains from noise, after more and more steps.", [f"{k} steps" for k in steps]
    ev.draw("samples.png", caption, figures.labelled_rows, trace, [""] * trace.shape[1], rows)
    some = images[shown][:12]
    pairs = torch.stack([some, scaled(data.train[metrics.nearest(some, data.train)[1]])])
    caption, rows = f"Samples after {shown} steps over their nearest training images.", ["sample", "nearest"]
    ev.draw("nearest.png", caption, figures.labelled_rows, pairs, [""] * len(some), rows)
    bars = {f"{shown} steps": shares[shown], "validation images": shares["real"]}
    caption = f"Classes of samples after {shown} steps, and of validation images, by the judge."
    ev.draw("classes.png", caption, figures.histogram, bars, data.class_names)
