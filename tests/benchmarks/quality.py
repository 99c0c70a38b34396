"""Sample quality against training time, from the checkpoints that runs kept (train.keep=1000):

python tests/benchmarks/quality.py DATA_ROOT MNIST.ckpt FIGURE.png NAME=MS_A_STEP:RUN_A,RUN_B,… …

1,000 samples, 256 SGLD steps from noise, against the MNIST test images in the features of
ebm/evaluation/features.py's classifier.
Training time is steps times the milliseconds of one, measured on a machine that does nothing else.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from torch import Generator

from ebm.data import scaled, torchvision_dataset
from ebm.evaluation import features, metrics
from ebm.running import checkpoint
from ebm.sampling.chains import uniform_noise
from ebm.sampling.sgld import SGLD

root, published, figure, *runs = sys.argv[1:]
data = torchvision_dataset("MNIST", root)
classifier, _ = features.cached_classifier(data)
test = features.features_of(classifier, scaled(data.test))


def distance(x):
    """(Fréchet distance, entropy of the class histogram)."""
    counts = np.bincount(classifier(x).argmax(dim=1).numpy(), minlength=10)
    return metrics.frechet(test, features.features_of(classifier, x)), metrics.entropy(counts)


def quality(file):
    state = checkpoint.load(file)
    g = Generator().manual_seed(0)
    x = SGLD(steps=256)(checkpoint.build_energy(state), uniform_noise((1000, *data.shape), g), g)
    return {"step": state["step"], "noise": distance(x)} | (
        {"buffer": distance(state["buffer"]["chains"][:2000])} if "buffer" in state else {}
    )


real, theirs = distance(scaled(data.train[:1000])), quality(published)["noise"]
print(f"real training digits {real[0]:.2f}, entropy {real[1]:.3f}; published weights {theirs[0]:.2f}, {theirs[1]:.3f}")
result = {"real": real, "published": theirs}
fig, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
for color, argument in zip(("C0", "C1", "C2"), runs, strict=False):
    name, _, rest = argument.partition("=")
    milliseconds, _, folders = rest.partition(":")
    for i, folder in enumerate(folders.split(",")):
        files = sorted(Path(folder, "checkpoints").glob("step_*.pt"), key=checkpoint.step_of)
        points = [quality(file) for file in files if int(file.stem[5:])]
        result[f"{name} {folder}"] = points
        for p in points:
            print(name, folder, json.dumps(p), flush=True)
        seconds = [p["step"] * float(milliseconds) / 1000 for p in points]
        axes.plot(seconds, [p["noise"][0] for p in points], ".-", color=color, label=None if i else name, alpha=0.8)
for value, label in ((theirs[0], "published weights"), (real[0], "real digits")):
    axes.axhline(value, color="0.4", ls=":", lw=1)
    axes.annotate(
        label, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8, color="0.4"
    )
axes.set(
    xscale="log", yscale="log", xlabel="training time [s], two CPU cores", ylabel="Fréchet distance to test digits"
)
axes.set_xticks(ticks := [20, 30, 60, 120, 200, 400], list(map(str, ticks)))
axes.set_xlim(17, 1100)  # the lines' names stand on the right
axes.minorticks_off()
axes.legend(frameon=False)
fig.savefig(figure, dpi=200)
Path(figure).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
