"""Where a run's numbers and pictures go: metrics.jsonl, PNG files and Weights & Biases, alike."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import wandb

from ebm import check


def _start(run_dir: Path, config: dict[str, Any], mode: str, tags: Sequence[str] = (), **names: Any) -> Any:
    """A W&B run with its files in `run_dir`/wandb. Raises ValueError where W&B cannot start."""
    try:
        return wandb.init(
            mode=mode,  # type: ignore[arg-type]
            tags=list(tags),
            dir=run_dir,
            config=config,
            settings=wandb.Settings(console="off", quiet=True, silent=True),
            **names,
        )
    except wandb.Error as error:
        raise ValueError(
            f"W&B cannot start with wandb.mode={mode}: {error} (wandb.mode=offline needs no account)"
        ) from error


def log_evaluation(
    folder: Path,
    numbers: Mapping[str, Any],
    pictures: Mapping[str, Path],
    config: dict[str, Any],
    mode: str = "offline",
    **names: Any,
) -> None:
    """An evaluation as a W&B run in `folder`: each number as eval/KEY, all of them with their intervals as the table
    eval/table, pictures as eval/NAME. `names` as for `Tracker`. Nothing where `mode` is disabled."""
    if check.choice("wandb.mode", mode, ("online", "offline", "disabled")) == "disabled":
        return
    single = {key: value for key, value in numbers.items() if isinstance(value, float)}
    table = wandb.Table(columns=["metric", "value", "low", "high"])
    for key, value in single.items():
        table.add_data(key, value, *numbers.get(f"{key}/ci95", (None, None)))
    images = {f"eval/{name}": wandb.Image(str(path)) for name, path in pictures.items()}
    with _start(folder, config, mode, **names) as run:
        run.log({f"eval/{key}": value for key, value in single.items()} | images | {"eval/table": table})


class Tracker:
    """Logs to `run_dir`/metrics.jsonl, `run_dir`/samples/*.png and W&B; a context manager, so that the W&B
    run ends with it, marked as failed after an exception.

    mode    online, offline (a run in `run_dir`/wandb, to be synced later) or disabled (no W&B)
    config  the resolved configuration, a plain dict; becomes the W&B run's config
    state   of a tracker whose run this one goes on with: what that one has logged since goes from metrics.jsonl

    Raises ValueError where W&B cannot start.
    """

    def __init__(
        self,
        run_dir: Path,
        config: dict[str, Any],
        mode: str = "offline",
        project: str = "plain-ebm",
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        notes: str | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        check.choice("wandb.mode", mode, ("online", "offline", "disabled"))
        self.run_dir = run_dir
        self.run = None
        self.rows = state["rows"] if state else 0  # W&B's own step: what the server has already, it drops
        self.wandb_id = state["wandb_id"] if state else None
        if mode != "disabled":
            names: dict[str, Any] = {"project": project, "entity": entity, "name": name, "group": group, "notes": notes}
            names["id"] = self.wandb_id
            names["resume"] = "allow" if self.wandb_id and mode == "online" else None  # offline, the id alone does it
            self.run = _start(run_dir, config, mode, tags, allow_val_change=True, **names)
            self.wandb_id = self.run.id
            self.run.define_metric("step")
            self.run.define_metric("*", step_metric="step")
        self.file = open(run_dir / "metrics.jsonl", "ab")  # noqa: SIM115 — closed in __exit__
        if state:
            self.file.truncate(min(state["bytes"], self.file.tell()))

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
            self.run.alert(
                title=f"guard: {text.partition(':')[0]}", text=f"step {step}: {text}: {action}", level="WARN"
            )

    def log_picture(self, step: int, epoch: int, key: str, path: Path) -> None:
        """A PNG file of the run directory under `key`, captioned with the step."""
        if self.run:
            picture = wandb.Image(str(path), caption=f"step {step}")
            self._to_wandb({"step": step, "epoch": epoch, key: picture})

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

    @property
    def wandb_dir(self) -> Path | None:
        """The W&B run's directory (offline: what `wandb sync` takes)."""
        return Path(self.run.dir).parent if self.run else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
        if self.run:
            self.run.finish(exit_code=0 if kind is None else 1)
