"""Sweeps, as Hydra starts them: their jobs, one of which may fail, and what is said when the last one is through."""

import atexit
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from hydra.utils import get_class
from omegaconf import DictConfig

import ebm
from ebm.evaluation import report
from ebm.files import write_whole
from ebm.running.cli import cause_of, one_line_errors, writable


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
            atexit.unregister(report.sweep)  # the summary there is the other sweep's
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


class TrainingSweep(Callback):
    """Says in one line where the output folder cannot be made, and sums a sweep up after its last job; the exit code is
    1 where a job failed."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        with one_line_errors():
            writable("hydra.run.dir", config.hydra.run.dir)

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
            writable("hydra.sweep.dir", config.hydra.sweep.dir)
        self.jobs: dict[int, list[str]] = {}
        note_jobs(get_class(launcher._target_), self.jobs)
        # Also where the launcher or the sweeper itself ends with an error, as Optuna's without a single whole trial:
        atexit.register(report.sweep, Path(config.hydra.sweep.dir), config.objective, self.jobs)
        scripts = str(Path(ebm.__file__).parents[1])
        paths = (scripts, os.environ.get("PYTHONPATH"))
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)  # for jobs in other processes

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        atexit.unregister(report.sweep)
        with one_line_errors():
            if report.sweep(Path(config.hydra.sweep.dir), config.objective, self.jobs):
                sys.exit(1)


def note_jobs(launcher: Any, jobs: dict[int, list[str]]) -> None:
    """Let the class of a launcher note the overrides of the `jobs` that it starts, by number: no file tells of one that
    dies before it begins, and Hydra tells nobody."""
    launch = launcher.launch

    def noted(self: Any, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Any:
        jobs.update(enumerate(map(list, job_overrides), initial_job_idx))
        return launch(self, job_overrides, initial_job_idx)

    launcher.launch = noted
