"""Going on with a run: what may be another than before, its state given back, and the way back after a divergence."""

import fcntl
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ebm import check
from ebm.running import allowed, checkpoint
from ebm.running.ranks import redistributed
from ebm.running.state import Training, default_generator

# What may differ when a run is resumed; anything else would make it another run.
MAY_CHANGE = re.compile(
    r"cache|judge|device|objective|rank_timeout_minutes|data\.(root|file)|sampler\.(threads|backend)|(guard|wandb)\..*"
    r"|train\.(?!batch_size|chains|grad_norm_clip|data_noise_std).*"
)


def resumed(
    given: dict[str, Any], run_dir: Path, overrides: Sequence[str] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration of the run in `run_dir`, with the `overrides` of the one that is `given` now (None: all of it
    counts), and its newest whole checkpoint. Raises ValueError, with what differs, where that would be another run."""
    if not (run_dir / "config.yaml").is_file():
        raise ValueError(f"resume={run_dir} is not the directory of a run: it has no config.yaml")
    if links := [path.name for path in run_dir.iterdir() if path.is_symlink()]:
        raise ValueError(
            f"resume={run_dir} would write where links lead: {', '.join(links)}; put what they lead to there"
        )
    state = checkpoint.load(run_dir)
    if "loop" not in state:
        raise ValueError(f"resume={run_dir}: its checkpoint holds an energy, but no state to go on from")
    if overrides is None:
        config = dict(given)
    else:
        try:
            allowed.check_config(state["config"])
        except ValueError as error:
            raise ValueError(f"resume={run_dir}: its configuration is refused: {error}") from error
        config = overridden(state["config"], given, overrides)
    config["resume"] = None
    # The file does not choose where else is written.
    config["wandb"], config["cache"] = config["wandb"] | {"dir": given["wandb"]["dir"]}, given["cache"]
    if unknown := config["wandb"].keys() - given["wandb"].keys():
        raise ValueError(f"resume={run_dir}: its wandb has settings that there are none of: {', '.join(unknown)}")
    was, now = flat(state["config"]), flat(config)
    changed = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
    refused = [f"{k} is {was.get(k)} there and {now.get(k)} here" for k in changed if not MAY_CHANGE.fullmatch(k)]
    if refused:
        raise ValueError(f"resume={run_dir} would be another run: {'; '.join(refused)}")
    return config, state


def overridden(config: Mapping[str, Any], given: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of a run's `config` in which the keys of `overrides` have the values that they have in `given`, as do keys
    that an older run lacks. Raises ValueError for an override of what the run does not have."""
    result = {**given, **config}
    for override in overrides:
        path = override.partition("=")[0].lstrip("+~").split(".")
        inner, values = result, given
        try:
            for name in path[:-1]:
                inner[name] = dict(inner[name])
                inner, values = inner[name], values[name]
            if override.startswith("~") or path[-1] not in inner:
                raise KeyError(path[-1])
            inner[path[-1]] = values[path[-1]]
        except (KeyError, TypeError, ValueError) as error:
            given_as = override.removeprefix("++")
            raise ValueError(f"resume= goes on with the run's own configuration: leave out {given_as}") from error
    return result


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted keys."""
    if not isinstance(config, dict):
        return {prefix: config}
    return {k: v for key, value in config.items() for k, v in flat(value, f"{prefix}.{key}".lstrip(".")).items()}


def forced(arguments: Sequence[str]) -> list[str]:
    """The command line; where it resumes a run, with ++ before each key, which is the run's: the default configuration,
    which Hydra reads, may not have it."""
    if not any(argument.startswith("resume=") for argument in arguments):
        return list(arguments)
    return [re.sub(r"^(?!hydra\.)(?=\w+\.[\w.]+=)", "++", argument) for argument in arguments]


def load_state(training: Training, state: dict[str, Any], source: Path, with_guard: bool = True) -> None:
    """Give the parts and the generators their states back. Raises CheckpointError where one does not fit."""
    generator, optimizer = training.generator, training.optimizer
    try:
        if not isinstance(state["tracker"], dict):
            raise TypeError("tracker is no dict")
        phase = check.number("its phase", state["loop"]["phase"], 0, len(training.phases) - 1, integer=True)
        for number in range(phase + 1) if phase != training.loop.phase else []:
            training.start_phase(number)  # one goes on with what another before it has built
        state = redistributed(state, training.ranks, training.buffer.capacity, generator)
        groups = optimizer.state_dict()["param_groups"]  # settings are the run's, not the file's
        lr = state["optimizer"]["param_groups"][0]["lr"]  # of the last step
        groups[0]["lr"] = check.number("its optimizer's lr", lr, 0)
        state["optimizer"] = {"state": state["optimizer"]["state"], "param_groups": groups}
        for name, part in training.parts().items():
            if name != "guard" or with_guard:
                part.load_state_dict(state[name])
        if "generator" not in state["batches"]:  # of an older file
            training.batches.generator.set_state(state["order_generator"])  # alone, the one generator
        generator.set_state(state["generator"])
        if "default_generator" in state:  # older files have none
            default_generator(generator.device).set_state(state["default_generator"])
        for parameter, moments in optimizer.state.items():
            for key, value in moments.items():
                if (value.numel() > 1 and value.shape != parameter.shape) or not bool(value.isfinite().all()):
                    raise ValueError(f"the optimizer's {key} is not finite or of another shape than its weights")
        sums = training.loop.sums
        training.loop.sums = {name: value.to(generator.device) for name, value in sums.items()}
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise checkpoint.CheckpointError(f"{source}: its checkpoint does not fit this run: {error!r}") from error


def roll_back(training: Training, run_dir: Path, seed: int) -> None:
    """Back to the last checkpoint that was healthy when it was taken, weights, optimizer and chains, with another
    seed. Where the rollback before did not help for long, to one before the checkpoint that it went back to."""
    guard, loop = training.guard, training.loop
    files = checkpoint.healthy(run_dir / "checkpoints")
    earlier = [file for file in files if checkpoint.step_of(file) < guard.before(loop.step)]
    state = checkpoint.newest_whole(reversed(earlier or files[:1]), run_dir)
    diverged, seconds = loop.step, loop.seconds
    load_state(training, state, run_dir, with_guard=False)
    loop.seconds_logged += seconds - loop.seconds  # the time is spent: only the steps come back
    loop.seconds = seconds
    guard.rolled_back(diverged, loop.step)
    for generator in (training.generator, default_generator(training.device)):
        generator.manual_seed((training.ranks.seed(seed) + 1_000_003 * len(guard.rollbacks)) % 2**63)
    for file in files if training.ranks.first else []:
        if checkpoint.step_of(file) > loop.step:
            file.unlink()


@contextmanager
def alone_in(run_dir: Path) -> Iterator[None]:
    """ValueError where another process trains in this directory. The lock goes with the process, however it ends."""
    folder = os.open(run_dir, os.O_RDONLY)
    try:
        with suppress(OSError):  # of a file system without locks
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{run_dir} is being trained by another process: stop that one first") from None
        yield
    finally:
        os.close(folder)


def remove_if_empty(run_dir: Path) -> None:
    """Of a run that nothing came of no empty directory is left: runs/DATE/TIME."""
    for folder in (run_dir, *run_dir.parents[:2]):
        if folder.is_dir() and folder != Path.cwd() and not any(folder.iterdir()):
            folder.rmdir()
