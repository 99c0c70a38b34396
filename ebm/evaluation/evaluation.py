"""An evaluation: what its parts read, what they find, and the protocol that their numbers depend on."""

import platform
import sys
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import ebm
from ebm.data import Dataset
from ebm.energies import temperature_of
from ebm.evaluation import features, metrics, report
from ebm.sampling.chains import Chains, chain_generators
from ebm.sampling.sgld import SGLD

# Settings that no number depends on, or that the protocol has in another form.
LEFT_OUT = ("wandb", "out", "cache", "compare", "checkpoint", "modules", "data", "device")
PACKAGES = ("torch", "torchvision", "torchmetrics", "scikit-learn", "numpy")


@dataclass
class Evaluation:
    """What the parts read, and what they find: `numbers` under flat keys, `skipped` with reasons, `sections`.

    energies    the one evaluated, then the rest of the ensemble
    folder      that pictures are written to
    device      that the energies lie on
    bootstrap   resamples for the 95 % intervals, >= 2
    batch_size  images at once; on the CPU it changes memory and time, not one number
    judge       of those that ship (`features.SHIPPED`); None for the data set's
    cache       folder of judges that are trained here; None for plain-ebm in the user's cache folder
    """

    energies: list[nn.Module]
    dataset: Dataset
    sampler: SGLD
    folder: Path
    device: torch.device
    seed: int = 0
    bootstrap: int = 200
    batch_size: int = 256
    judge: str | None = None
    cache: str | None = None
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
        self.put(key, float(values.mean()), metrics.mean_ci95(values, self.bootstrap, self.rng()))

    def triple(self, key: str) -> list[float]:
        return report.triple(self.numbers, key)

    def draw(self, name: str, caption: str, figure: Callable[..., None], *what: Any) -> None:
        """A file that `figure` makes of `what`, for the next section."""
        figure(self.folder / name, *what)
        self.pictures[name] = caption

    def section(
        self,
        title: str,
        header: list[str],
        columns: dict[str, str],
        rows: dict[str, list[str]],
        notes: list[str],
        digits: int = 4,
        intervals: Container[str] | None = None,
    ) -> None:
        """A table, printed, with the pictures so far: rows[key] are the cells under `header`, and each of the `columns`
        has the number under its key, made of the row's; those of `intervals` (None: all) with the interval."""

        def number(row: str, column: str) -> str:
            with_interval = intervals is None or column in intervals
            return report.shown(self.numbers, columns[column].format(row), digits, with_interval)

        table = [[*cells, *(number(row, column) for column in columns)] for row, cells in rows.items()]
        self.sections.append(report.Section(title, [*header, *columns], table, notes, self.pictures))
        self.pictures = {}
        print(self.sections[-1].text(), flush=True)

    def rng(self) -> np.random.Generator:
        """The bootstrap's generator; a new one a quantity, so that none depends on what else is evaluated."""
        return np.random.default_rng(self.seed)

    def chosen(self, x: Tensor, count: int) -> Tensor:
        """`count` random places of `x`, the same at each call."""
        return torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed))[:count]

    @property
    def how(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "device": self.device}

    def scores(self, x: Tensor) -> metrics.Array:
        return metrics.scores(self.energies[0], x, **self.how)

    def noise(self, count: int) -> Tensor:
        """Where chains start: the first ones are the same whatever the count."""
        return self.sampler.initial((count, *self.dataset.shape), chain_generators(self.seed + 1, count))

    def progress(
        self, part: str, what: Iterable[Any] | None = None, total: int | None = None, unit: str = "steps"
    ) -> "tqdm[Any]":
        """A bar for `part` on stderr, over `what` or to `total`; where that is no terminal, a line of its name."""
        if not sys.stderr.isatty():
            print(f"{part} …", file=sys.stderr, flush=True)
        how = {"unit": f" {unit}", "unit_scale": True, "dynamic_ncols": True, "disable": None}
        return tqdm(what, desc=part, total=total, **how)

    def sampled(
        self, x: Tensor, labels: Tensor | None, steps: int, progress: Callable[[int], Any] | None = None
    ) -> Tensor:
        """Chains `x` after `steps` steps, of these labels or none, on the CPU, images as pictures have them: in
        [−1, 1]. `progress` as in SGLD."""
        trace = partial(self.sampler.trace, progress=progress)
        chains = Chains(trace, self.seed, self.batch_size, frames=1, device=self.device)
        samples = chains.run(self.energies[0], x, steps, labels)[0][-1]
        return samples.clamp(-1, 1) if samples.dim() == 4 else samples

    @cached_property
    def classifier(self) -> tuple[features.Classifier, dict[str, Any]]:
        """The judge, and what it is."""
        return features.judge(self.dataset, self.judge, self.cache, self.device)


def protocol(
    ev: Evaluation, settings: Mapping[str, Any], step: int, class_shares: list[float] | None
) -> dict[str, Any]:
    """Everything the numbers depend on, and nothing that they do not: the same on every run of the same evaluation.

    settings            of the whole evaluation, as conf/evaluate.yaml has them
    step, class_shares  of the checkpoint
    """
    kept = {key: value for key, value in settings.items() if key not in LEFT_OUT}
    if ev.device.type == "cpu":  # kernels of other devices round as the size of a batch has it
        del kept["batch_size"]
    kept["ood"] = {key: value for key, value in settings["ood"].items() if key != "root"}
    sampler = {k: v for k, v in vars(ev.sampler).items() if k != "threads" and not k.startswith("_")}
    example = torch.empty(1, *ev.dataset.shape, device=ev.device)
    sampler["backend"] = ev.sampler.run_as(ev.energies[0], example)[0]
    weights = [features.weights_hash(energy.state_dict()) for energy in ev.energies]
    temperatures = [temperature_of(energy) for energy in ev.energies]
    data = {"name": ev.dataset.name, "hash": features.data_hash(ev.dataset)}
    judge = ev.classifier[1] if "classifier" in vars(ev) else None  # where a part asked for it
    versions = {"plain-ebm": ebm.__version__, "python": platform.python_version()}
    versions |= {name: version(name) for name in PACKAGES}
    made = {
        "sampler": sampler,
        "weights": weights,
        "temperatures": temperatures,
        "step": step,
        "class_shares": class_shares,
        "data": data,
    }
    on = {"judge": judge, "device": ev.device.type, "threads": torch.get_num_threads(), "versions": versions}
    return kept | made | on
