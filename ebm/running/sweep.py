"""Many jobs of one command: Hydra's callbacks around them, what a job that fails leaves, and a sweep's summary.

The one module of ebm that knows Hydra."""

import atexit
import csv
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from hydra.utils import get_class
from omegaconf import DictConfig

import ebm
from ebm.evaluation import figures, report
from ebm.files import whole_files, write_whole
from ebm.running.cli import cause_of, one_line_errors, output_folder, writable
from ebm.running.tracking import last_values


class Folders(Callback):
    """Says in one line where Hydra's own folders cannot be made."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        with one_line_errors():
            writable("hydra.run.dir", config.hydra.run.dir)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        with one_line_errors():
            writable("hydra.sweep.dir", config.hydra.sweep.dir)


class TrainingSweep(Folders):
    """Sums a sweep of trainings up after its last job; the exit code is 1 where one failed."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        launcher = config.hydra.launcher
        with one_line_errors():
            if int(os.environ.get("WORLD_SIZE", 1)) > 1:
                raise ValueError(
                    "-m under torchrun would run the whole sweep once a rank: start torchrun once a job, or leave it "
                    "out and sweep with one device a job"
                )
            if 60 * launcher.get("timeout_min", math.inf) <= launcher.get("signal_delay_s", 0):
                raise ValueError(
                    f"hydra.launcher.timeout_min={launcher.timeout_min} must be more than the warning before its end, "
                    f"hydra.launcher.signal_delay_s={launcher.signal_delay_s} seconds: no job would get on"
                )
        super().on_multirun_start(config)
        self.jobs: dict[int, list[str]] = {}
        note_jobs(get_class(launcher._target_), self.jobs)
        # Also where the launcher or the sweeper itself ends with an error, as Optuna's without a single whole trial:
        atexit.register(summarise, Path(config.hydra.sweep.dir), config.objective, self.jobs)
        scripts = str(Path(ebm.__file__).parents[1])
        paths = (scripts, os.environ.get("PYTHONPATH"))
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)  # for jobs in other processes

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        atexit.unregister(summarise)
        with one_line_errors():
            if summarise(Path(config.hydra.sweep.dir), config.objective, self.jobs):
                sys.exit(1)


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


def training_job(
    train: Callable[[], float], cfg: DictConfig, run_dir: Path, overrides: Sequence[str], number: int
) -> float | None:
    """What `train` returns, the objective of a sweep's job; None after a failure, which goes to job.json, for the
    sweep's summary, while the sweep goes on.

    A job that was cut off goes on where it was when it is started again in its directory, as a cluster's requeued
    job is, and one that is complete is done.
    """
    file = run_dir / "job.json"
    before: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    job: dict[str, Any] = {"number": number, "overrides": list(overrides), "objective": None, "error": "it was cut off"}
    with one_line_errors():
        if before.get("overrides", job["overrides"]) != job["overrides"]:
            atexit.unregister(summarise)  # the summary there is the other sweep's
            raise ValueError(f"{run_dir} holds another job already (job.json says which): set another hydra.sweep.dir")
    if before.get("objective") is not None:
        return before["objective"]
    write_whole(file, json.dumps(job).encode())
    try:
        cfg.wandb.group = cfg.wandb.group or "/".join(run_dir.parts[-3:-1])  # DATE/TIME
        cfg.wandb.name = cfg.wandb.name or " ".join(overrides)
        job["objective"] = train()
        job["error"] = None
    except Exception as error:  # whatever a job can die of
        job["error"] = " ".join(str(cause_of(error)).split()) or type(error).__name__
        job["traceback"] = traceback.format_exc()
        print(f"error: job {number}: {job['error']} ({file} has the traceback)", file=sys.stderr)
    write_whole(file, json.dumps(job).encode())
    return job["objective"]


def evaluation_job(job: Callable[[], str], number: int) -> str | None:
    """What `job` returns; None where it fails, which stderr tells of, for the sweep goes on past that."""
    try:
        return job()
    except Exception as error:  # whatever a job can die of
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            traceback.print_exc()
        reason = " ".join(str(cause_of(error)).split()) or type(error).__name__
        print(f"error: job {number}: {reason} (HYDRA_FULL_ERROR=1 shows where)", file=sys.stderr)
        return None


def note_jobs(launcher: Any, jobs: dict[int, list[str]]) -> None:
    """Let the class of a launcher note the overrides of the `jobs` that it starts, by number: no file tells of one that
    dies before it begins, and Hydra tells nobody."""
    launch = launcher.launch

    def noted(self: Any, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Any:
        jobs.update(enumerate(map(list, job_overrides), initial_job_idx))
        return launch(self, job_overrides, initial_job_idx)

    launcher.launch = noted


def summarise(folder: Path, objective: str, started: Mapping[int, Sequence[str]]) -> int:
    """Of a sweep's jobs, the directories in `folder` that hold a job.json, and those `started`, by number: summary.csv
    (overrides, last metrics, why it failed), samples.png, coordinates.png and summary.html with both; the table on the
    screen. How many jobs failed."""
    jobs = _jobs(folder, started)
    if not jobs:
        return 0
    given = {run: dict(override.split("=", 1) for override in job["overrides"]) for run, job in jobs.items()}
    keys = list(dict.fromkeys(key for values in given.values() for key in values))
    swept = [key for key in keys if len({values.get(key) for values in given.values()}) > 1]
    settings = {run: [_short(given[run].get(key, "—")) for key in swept] for run in jobs}
    numbers = {run: last_values(run) for run in jobs}
    logged = list(dict.fromkeys(key for values in numbers.values() for key in values))
    shown = [key for key in dict.fromkeys((objective, "val/cd", "train/cd", "chain/saturation")) if key in logged]
    rows, tiles = [], {}
    for run, job in jobs.items():
        cells = [report.shown(numbers[run], key) for key in shown]
        rows.append([run.name, *settings[run], *cells, job["error"] or "ok"])
        label = "\n".join([f"job {run.name}", *(f"{key}={x}" for key, x in zip(swept, settings[run], strict=True))])
        files = [*sorted(run.glob("samples/points_*.png")), *sorted(run.glob("samples/generation_*.png"))]
        tiles[label] = (files[-1] if files else None, job["error"])
    pictures = {"samples.png": "The last samples of every job; a red title: it failed."}
    if swept:
        pictures = {"coordinates.png": f"Every job's overrides and its {objective}; grey: it failed."} | pictures
    failed = sum(job["error"] is not None for job in jobs.values())
    notes = [f"{len(jobs)} jobs, {failed} failed"]
    section = report.Section("Sweep", ["job", *swept, *shown, "state"], rows, notes, pictures)
    with whole_files(folder) as aside:
        with open(aside / "summary.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["job", *keys, "objective", *logged, "error"])
            for run, job in jobs.items():
                values = [*map(given[run].get, keys), job["objective"], *map(numbers[run].get, logged)]
                writer.writerow([run.name, *values, job["error"]])
        figures.contact_sheet(aside / "samples.png", tiles)
        if swept:
            results = ["nan" if job["objective"] is None else f"{job['objective']:.4g}" for job in jobs.values()]
            lines = [[*settings[run], result] for run, result in zip(jobs, results, strict=True)]
            figures.parallel_coordinates(aside / "coordinates.png", [*swept, objective], lines)
        report.write(aside / "summary.html", f"Sweep {folder.name}", [section], {}, {})
    print(f"{section.text()}\ntable        {folder / 'summary.csv'}\nreport       {folder / 'summary.html'}")
    return failed


def _jobs(folder: Path, started: Mapping[int, Sequence[str]]) -> dict[Path, dict[str, Any]]:
    """The jobs by directory, in the order of their numbers; one that was started and wrote no job.json has failed."""
    jobs = {file.parent: json.loads(file.read_text()) for file in folder.rglob("job.json")}
    for number in started.keys() - {job["number"] for job in jobs.values()}:
        job = {"number": number, "overrides": started[number], "objective": None}
        jobs[folder / str(number)] = job | {"error": "it ended before it began"}
    return dict(sorted(jobs.items(), key=lambda item: item[1]["number"]))


def _short(value: str) -> str:
    """0.0203 of 0.020304864388351435."""
    try:
        return f"{float(value):.4g}"
    except ValueError:
        return value
