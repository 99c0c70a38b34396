"""The part `classification`, of an energy with classes: how well p(y | x) tells the test images' labels, and how sure
it is of itself."""

import torch

from ebm.energies import temperature_of
from ebm.evaluation import figures, metrics
from ebm.evaluation.evaluation import Evaluation


def classification(ev: Evaluation) -> None:
    """Accuracy, confidence and calibration of p(y | x) = softmax(−E(x, y)/T) on the test images."""
    data, energy = ev.dataset, ev.energies[0]
    classes = getattr(energy, "classes", None)
    if classes is None or data.test_labels is None:
        ev.skipped["classification"] = "it takes an energy with classes (energy.classes) and labelled images"
        return
    if (highest := int(data.test_labels.max())) >= classes:
        ev.skipped["classification"] = f"there are labels up to {highest}, the energy has {classes} classes"
        return
    every_label = torch.arange(classes, device=ev.device)
    energies = []
    with torch.no_grad():
        for part in ev.progress("classification", data.test.split(1024), unit="batches"):
            energies.append(metrics.in_batches(lambda x: energy(x, every_label.expand(len(x), -1)), part, **ev.how))
    found = metrics.classification(-torch.cat(energies) / temperature_of(energy), data.test_labels)
    for name in ("accuracy", "confidence", "nll"):
        ev.put_mean(f"classification/{name}", found[name])
    ev.put("classification/calibration_error", found["calibration_error"].item())
    caption = "Share of right labels by confidence, max p(y | x); a calibrated classifier lies on the diagonal."
    ev.draw("reliability.png", caption, figures.reliability, found["confidence"], found["accuracy"])
    columns = {name: f"classification/{name}" for name in ("accuracy", "confidence", "nll", "calibration_error")}
    note = "p(y | x) = softmax(−E(x, y)/T); calibration error: mean of |accuracy − confidence|, 15 bins of confidence"
    ev.section("Classification", ["set"], columns, {"": [f"{data.name} test"]}, [note])
