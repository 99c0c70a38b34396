"""Where a run's numbers and pictures go: metrics.jsonl, PNG files and Weights & Biases, alike.

wandb takes a second to import: only where it has a run."""

import json
import math
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, Self

from ebm import check
from ebm.evaluation.metrics import Array
from ebm.running.cli import command, from_here

MODES = ("online", "offline", "disabled")
# What the run table shows of a number beside its last value. Names, no globs: of two that match W&B takes any.
SUMMARIES = {
    **dict.fromkeys(("val/cd", "val/frechet", "chain/split_rhat"), "min,last"),
    **dict.fromkeys(("chain/ess", "chain/saturation", "chain/clamp_share", "train/grad_norm"), "max,last"),
    **dict.fromkeys(("train/cd", "chain/short_long_gap"), "min,max,last"),
}


def last_values(run_dir: Path) -> dict[str, float]:
    """The last value that metrics.jsonl holds of each number, of a run that may not have got to any, or was cut off in
    the middle of a line."""
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.is_file() else []
    last: dict[str, Any] = {}
    try:
        for line in lines:
            last.update(json.loads(line))
    except ValueError as error:
        raise ValueError(f"{file} holds a line that is no record: {error}") from error
    return {key: value for key, value in last.items() if not isinstance(value, str)}


def logged_name(objective: str) -> str:
    """The name under which the number that is the objective is logged."""
    return "val/frechet" if objective == "frechet" else objective


def objective(run_dir: Path, key: str) -> float:
    """The last value of the objective `key`. Raises ValueError where there is none."""
    values = last_values(run_dir)
    if logged_name(key) not in values:
        raise ValueError(f"objective={key} was never logged; there are {', '.join(values)}")
    return values[logged_name(key)]


def _mode(settings: Mapping[str, Any]) -> str:
    given = settings.get("mode") or os.environ.get("WANDB_MODE") or "offline"
    return check.choice("wandb.mode (null: WANDB_MODE)", given, MODES)


def _start(folder: Path, config: dict[str, Any], job_type: str, settings: Mapping[str, Any], **more: Any) -> Any:
    """A W&B run with its files in `folder`/wandb and of type `job_type` unless `settings` or W&B's variables say
    otherwise; None where they say disabled. Raises ValueError where W&B cannot start."""
    names: dict[str, Any] = {"project": "plain-ebm", "job_type": job_type, "dir": os.environ.get("WANDB_DIR") or folder}
    names |= {key: value for key, value in settings.items() if value is not None and key != "checkpoint"} | more
    names |= {"mode": _mode(settings), "config": config}
    if names["mode"] == "disabled":
        return None
    import wandb

    try:
        return wandb.init(settings=wandb.Settings(console="off", quiet=True, silent=True), **names)
    except wandb.Error as error:
        hint = "wandb.mode=offline needs no account"
        raise ValueError(f"W&B cannot start with wandb.mode={names['mode']}: {error} ({hint})") from error


def log_evaluation(
    folder: Path, numbers: Mapping[str, Any], pictures: Mapping[str, Path], config: dict[str, Any], **settings: Any
) -> None:
    """An evaluation as a W&B run in `folder`: each number as eval/KEY, all of them with their intervals as the table
    eval/table, pictures as eval/NAME. `settings` as for `Tracker`; nothing where they say disabled."""
    if (run := _start(folder, config, "evaluate", settings)) is None:
        return
    import wandb

    single = {key: value for key, value in numbers.items() if isinstance(value, float)}
    table = wandb.Table(columns=["metric", "value", "low", "high"])
    for key, value in single.items():
        table.add_data(key, value, *numbers.get(f"{key}/ci95", (None, None)))
    images = {f"eval/{name}": wandb.Image(str(path)) for name, path in pictures.items()}
    with run:
        run.log({f"eval/{key}": value for key, value in single.items()} | images | {"eval/table": table})


class Tracker:
    """Logs to `run_dir`/metrics.jsonl, `run_dir`/samples/*.png and W&B; a context manager, so that the W&B
    run ends with it, marked as failed after an exception.

    config    the resolved configuration, a plain dict; becomes the W&B run's config
    state     of a tracker whose run this one goes on with: what that one has logged since goes from metrics.jsonl
    writes    False for one that logs nowhere, as of all ranks but the first
    settings  `mode`: online, offline (a run on the disk, to be synced later) or disabled (no W&B); None for what
              WANDB_MODE says, or else offline. `dir`: where wandb/ is made; None for WANDB_DIR, or else `run_dir`.
              `checkpoint`: at the end best.pt and last.pt become a W&B artifact, `best` and `latest`, where they lie:
              no copy; the others as W&B has them: project, entity, name, group, job_type, tags, notes

    Raises ValueError where W&B cannot start.
    """

    def __init__(
        self, run_dir: Path, config: dict[str, Any], state: Any = None, writes: bool = True, **settings: Any
    ) -> None:
        self.run_dir = run_dir
        self.wandb_dir: Path | None = None  # the W&B run's directory (offline: what `wandb sync` takes)
        self.url: str | None = None  # where the run can be looked at, if W&B has it already
        self.checkpoint = check.choice("wandb.checkpoint", settings.get("checkpoint", False), (True, False))
        self.rows: int = state["rows"] if state else 0  # W&B's own step: what the server has already, it drops
        self.wandb_id: str | None = state["wandb_id"] if state else None
        if self.wandb_id is not None and not re.fullmatch(r"[\w-]{1,64}", self.wandb_id, re.ASCII):
            raise ValueError(f"{self.wandb_id!r} is no id of a W&B run, as the checkpoint's should be")
        if state and (type(state["bytes"]) is not int or state["bytes"] < 0 or type(self.rows) is not int):
            raise ValueError(f"{state['bytes']!r} is no place in metrics.jsonl, or {self.rows!r} no row of W&B's")
        online = _mode(settings) == "online"
        resume = "allow" if self.wandb_id and online else None  # offline, the id alone does it
        more = {"id": self.wandb_id, "allow_val_change": True, "resume": resume}
        self.run = _start(run_dir, config, "train", settings, **more) if writes else None
        if self.run:
            self.wandb_id, self.wandb_dir = self.run.id, Path(self.run.dir).parent
            self.url = None if self.run.offline else self.run.url
            self.run.define_metric("step")
            self.run.define_metric("*", step_metric="step")
            for key, summary in SUMMARIES.items():
                self.run.define_metric(key, step_metric="step", summary=summary)
        self.file: IO[bytes] = open(run_dir / "metrics.jsonl", "ab") if writes else TemporaryFile()  # noqa: SIM115 — see __exit__
        if state and self.file.tell() < state["bytes"]:  # it was cut off: up to its last whole line
            self.file.truncate((run_dir / "metrics.jsonl").read_bytes().rfind(b"\n") + 1)
        else:
            self.file.truncate(state["bytes"] if state else 0)

    def log(self, step: int, epoch: int, numbers: Mapping[str, float]) -> None:
        """One record of `numbers` under their names, with `step` and `epoch`; NaN and infinity raise ValueError."""
        for key, value in numbers.items():
            if not math.isfinite(value):
                raise ValueError(f"{key} is {value} at step {step}")
        self._record({"step": step, "epoch": epoch} | dict(numbers))

    def alert(self, step: int, epoch: int, text: str, action: str) -> None:
        """A record of what the guard saw and what is done, and a W&B alert."""
        self._record({"step": step, "epoch": epoch, "guard/saw": text, "guard/action": action})
        if self.run:
            title = f"guard: {text.partition(':')[0]}"
            self.run.alert(title=title, text=f"step {step}: {text}: {action}", level="WARN")

    def log_media(self, step: int, epoch: int, pictures: Mapping[str, Path], values: Mapping[str, Array]) -> None:
        """PNG files of the run directory, captioned with the step, and histograms of values (N,), for W&B alone."""
        if self.run:
            import wandb

            images = {key: wandb.Image(str(path), caption=f"step {step}") for key, path in pictures.items()}
            histograms = {key: wandb.Histogram(list(value)) for key, value in values.items()}
            self._to_wandb({"step": step, "epoch": epoch} | images | histograms)

    def end(self, key: str) -> None:
        """Name the final value of the objective `key` the run's, for W&B's sweeps, and hand over the checkpoints."""
        if self.run:
            self.run.summary["objective"] = last_values(self.run_dir).get(logged_name(key))
        if self.run and self.checkpoint:
            import wandb

            best, last = (self.run_dir / f"checkpoints/{name}.pt" for name in ("best", "last"))
            same = not best.is_file() or best.samefile(last)
            files = {last: ["best", "latest"]} if same else {best: ["best"], last: ["latest"]}
            for file, aliases in files.items():
                artifact = wandb.Artifact(f"checkpoint-{self.run.id}", type="model", metadata={"file": file.stem})
                artifact.add_file(str(file), name="checkpoint.pt", policy="immutable")
                self.run.log_artifact(artifact, aliases=aliases)

    def _record(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(record).encode() + b"\n")
        self.file.flush()
        self._to_wandb(record)

    def _to_wandb(self, record: dict[str, Any]) -> None:
        if self.run:
            self.run.log(record, step=self.rows)
        self.rows += 1

    def state_dict(self) -> dict[str, Any]:
        """What a tracker needs to go on from here; all that was logged is on the disk then."""
        os.fsync(self.file.fileno())
        return {"bytes": self.file.tell(), "rows": self.rows, "wandb_id": self.wandb_id}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.file.close()
        if self.run:
            self.run.finish(exit_code=0 if kind is None else 1)


def print_whereabouts(script: Path, run_dir: Path, pictures: Mapping[str, Path], tracker: Tracker) -> None:
    """Where the run lies that `script` has trained, and what can be done with it."""
    print(f"pictures     {' '.join(str(from_here(file)) for file in pictures.values())}")
    print(f"checkpoint   {from_here(run_dir / 'checkpoints/last.pt')}")
    if tracker.wandb_dir:
        parts = shlex.quote(str(from_here(tracker.wandb_dir.parent)))  # a run that was resumed has several
        print(f"W&B run      {tracker.wandb_dir}")
        print(f"             {tracker.url or f'wandb sync {parts}/offline-run-*-{tracker.wandb_id}'}")
    print(f"try next     {command(script.with_name('sample.py'), checkpoint=run_dir)}")
    print(f"             {command(script.with_name('evaluate.py'), checkpoint=run_dir)}")
