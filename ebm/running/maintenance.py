"""What is done between two training steps: what of it is due, a pure function, and the doing."""

import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ebm.running import checkpoint, pictures, telemetry
from ebm.running.cli import Signals
from ebm.running.ranks import Ranks
from ebm.running.resume import roll_back
from ebm.running.state import Loop, Training
from ebm.running.tracking import Tracker, logged_name
from ebm.sampling.chains import uniform_noise


@dataclass(frozen=True)
class Intervals:
    """When a training is maintained and ends; math.inf for never."""

    steps_per_epoch: int
    log_every: int = 20
    validate_every_epochs: int = 1
    sample_every_epochs: int = 5
    max_steps: float = math.inf
    max_seconds: float = math.inf  # of training steps
    save_every_steps: float = math.inf
    save_every_seconds: float = math.inf  # of wall clock

    @classmethod
    def of(cls, settings: Mapping[str, Any], steps_per_epoch: int) -> "Intervals":
        """By the configuration's section `train`, in which None is never, epochs are steps, and minutes seconds."""
        names = ("log_every", "validate_every_epochs", "sample_every_epochs")
        limits = [settings["max_steps"]]
        if settings["epochs"] is not None:
            limits.append(settings["epochs"] * steps_per_epoch)
        return cls(
            steps_per_epoch,
            max_steps=min((limit for limit in limits if limit is not None), default=math.inf),
            max_seconds=60 * (settings["max_minutes"] or math.inf),
            save_every_steps=settings["save_every_steps"] or math.inf,
            save_every_seconds=60 * (settings["save_every_minutes"] or math.inf),
            **{name: settings[name] for name in names},
        )

    def progress(self, loop: Loop) -> float:
        """Share of the training that is over, by the limit that is furthest along; 1 and more: all of it."""
        return max(loop.step / self.max_steps, loop.seconds / self.max_seconds)


@dataclass(frozen=True)
class Due:
    """What is to be done before the next training step."""

    epoch: int
    done: bool  # there is no next one
    stop: int  # the signal that asked to stop, 0 for none
    read_back: bool
    validate: bool
    pictures: bool
    save: bool
    numbered: bool  # the checkpoint is one to roll back to


def what_is_due(
    intervals: Intervals, loop: Loop, since_save: float, fresh: bool, stop: int, save: bool, pictures_left: bool
) -> Due:
    """What is due after loop.step steps.

    since_save     seconds of wall clock since the last checkpoint
    fresh          whether the step has yet to be maintained: one that was resumed has been, before its checkpoint
    stop, save     what signals ask for, and the first step
    pictures_left  whether pictures were due already, and were not drawn
    """
    epoch, position = divmod(loop.step, intervals.steps_per_epoch)
    done = intervals.progress(loop) >= 1
    epoch_ends = fresh and position == 0
    validates_epoch = epoch_ends and epoch % intervals.validate_every_epochs == 0
    validate = validates_epoch or (done and not pictures_left)
    pictures_due = pictures_left or done or (epoch_ends and epoch % intervals.sample_every_epochs == 0)
    # What a rollback goes back to must not depend on when a run was stopped, or on the clock.
    numbered = loop.step % intervals.save_every_steps == 0
    if intervals.save_every_steps == math.inf:
        numbered = validates_epoch or loop.step == 0
    asked = save or stop > 0 or since_save >= intervals.save_every_seconds
    return Due(
        epoch=epoch,
        done=done,
        stop=stop,
        read_back=fresh and (loop.step % intervals.log_every == 0 or done),
        validate=validate,
        pictures=pictures_due,
        save=validate or pictures_due or asked or (fresh and numbered),
        numbered=numbered,
    )


def settings(config: dict[str, Any], state: dict[str, Any] | None) -> dict[str, Any]:
    """What `Maintenance` takes of the run's configuration, and of the checkpoint that it goes on from."""
    found = {name: config["train"][name] for name in ("sample_steps", "eval_batch_size", "keep")}
    found |= {name: config[name] for name in ("seed", "judge", "cache")}
    found["with_frechet"] = logged_name(config["objective"]) == "val/frechet"
    found["pictures_left"] = bool(state and state.get("pictures_due"))
    return found


@dataclass
class Maintenance:
    """Reads logs back, watches them, validates, saves and draws, when it is due."""

    training: Training
    run_dir: Path
    intervals: Intervals
    tracker: Tracker
    bar: "tqdm[Any]"
    seed: int
    sample_steps: int  # SGLD steps from noise for the pictures
    eval_batch_size: int  # images at once
    keep: int  # numbered checkpoints that stay
    judge: str | None = None  # of the samples, and the folder of a data set's own: as `features.judge` has them
    cache: str | None = None
    with_frechet: bool = False  # whether the Fréchet distance of samples is taken at the end
    pictures_left: bool = False  # whether the run was cut off before pictures that were due

    def __post_init__(self) -> None:
        self.pictures: dict[str, Path] = {}  # the last ones, by the name under which they are logged
        self.maintained = self.training.loop.step  # the checkpoint was taken after the maintenance of its step
        self.save_asked = True  # a run can always be resumed, with the limits of this start, and rolled back
        self.saved_at = time.monotonic()
        shape, count = self.training.dataset.shape, len(self.training.dataset.validation)
        generator = torch.Generator().manual_seed(self.seed + 1)  # the same noise at every validation
        self.noise = uniform_noise((count, *shape), generator)
        self.noise_1024 = uniform_noise((1024, *shape), generator)

    def due(self, signals: Signals) -> Due:
        """What is due now, on all ranks alike."""
        loop = self.training.loop
        since_save = time.monotonic() - self.saved_at
        found = self.training.ranks.largest(signals.stop, signals.save, loop.seconds, since_save)
        stop, save, loop.seconds, since_save = found
        fresh = loop.step > self.maintained
        save_asked = self.save_asked or save > 0
        if save > 0:
            signals.save = False
        return what_is_due(self.intervals, loop, since_save, fresh, int(stop), save_asked, self.pictures_left)

    def __call__(self, due: Due) -> bool:
        """Do what is due. False after a rollback, when something else is due. Raises ValueError where the training has
        diverged and is to stop."""
        guard, loop, best = self.training.guard, self.training.loop, False
        self.pictures_left = due.pictures
        trouble = self.read_back(due) if due.read_back else None
        if trouble is None and due.save:
            trouble = self.check_finite()
        if due.validate and (trouble is None or guard.decide(trouble) == "warn"):
            numbers = self.validate(due)
            trouble = trouble or guard.check(loop.step - loop.phase_began, numbers)
            best = guard.healthy and numbers["val/cd"] < loop.best
            if best:
                loop.best = numbers["val/cd"]
        if trouble and self.react(trouble, due) == "rollback":
            return False
        if due.save:
            self.save(due, best)
            self.save_asked, self.saved_at = False, time.monotonic()
        if due.pictures:  # after the save: what fails here loses nothing
            if self.training.ranks.first:
                self.draw(due)
            self.pictures_left = False
            self.save(due, best)
        return True

    def read_back(self, due: Due) -> str | None:
        """Log the means since the last read-back; what the guard says of them."""
        training, loop = self.training, self.training.loop
        assert training.last_batch is not None  # a step has been made
        x_data, x_model, y_model = training.last_batch
        chains: dict[str, Tensor] = {}
        if x_model is not None:
            of_chains = (training.sampler, training.energy, training.buffer, x_data, x_model, y_model)
            chains = telemetry.chain_statistics(*of_chains)
        numbers = means_since_last(loop, chains, training.ranks)
        steps_per_s = (loop.step - loop.steps_logged) / (loop.seconds - loop.seconds_logged)
        numbers["train/lr"] = training.optimizer.param_groups[0]["lr"]
        numbers["train/images_per_s"] = steps_per_s * training.batches.batch_size
        numbers["train/sgld_steps_per_s"] = steps_per_s * (training.sampler.steps if chains else 0)
        trouble = training.guard.check(loop.step - loop.phase_began, numbers)
        numbers["train/phase"] = loop.phase
        if trouble is None or not trouble.startswith("not_finite"):
            for kind in ("train/", "chain/"):
                of_kind = {name: value for name, value in numbers.items() if name.startswith(kind)}
                self.tracker.log(loop.step, due.epoch, of_kind)
            gap = f"score gap {-numbers['train/cd']:+.4f}, " if chains else ""
            rate = f"{numbers['train/images_per_s']:.0f} images/s"
            self.bar.set_postfix_str(f"loss {numbers['train/loss']:.4f}, {gap}{rate}")
        if loop.step % self.intervals.log_every == 0:  # the last, odd interval goes on if the run is made longer
            loop.start_interval()
        return trouble

    def check_finite(self) -> str | None:
        """What the guard says of the weights, and of the chains of all ranks."""
        training, buffer = self.training, self.training.buffer
        trouble = training.guard.check_finite(training.energy, buffer.chains[: buffer.size])
        if training.ranks.largest(trouble is not None)[0]:
            return trouble or "not_finite: a chain of another rank is not finite"
        return None

    def validate(self, due: Due) -> dict[str, float]:
        training = self.training
        how = {"batch_size": self.eval_batch_size, "device": training.device}
        real = training.dataset.validation
        validation = partial(pictures.validation_scores, training.energy, real, self.noise, self.noise_1024, **how)
        numbers = training.ranks.from_first(validation)
        self.tracker.log(training.loop.step, due.epoch, numbers)
        return numbers

    def react(self, trouble: str, due: Due) -> str:
        """Tell of what the guard saw, and do what it says."""
        training, step = self.training, self.training.loop.step
        action = training.guard.decide(trouble)
        self.tracker.alert(step, due.epoch, trouble, action)
        if training.ranks.first:
            tqdm.write(f"guard: step {step}: {trouble}: {action}", file=sys.stderr)
        if action == "stop":
            raise ValueError(
                f"the training diverged at step {step} ({trouble}), {len(training.guard.rollbacks)} rollbacks before: "
                "lower optimizer.lr or raise sampler.steps; the checkpoints step_*.pt and best.pt were healthy"
            )
        if action == "rollback":
            roll_back(training, self.run_dir, self.seed)
            self.maintained, self.save_asked = training.loop.step, True
            self.bar.n = training.loop.step
        return action

    def save(self, due: Due, best: bool) -> None:
        state = self.training.state_dict()
        state |= {"tracker": self.tracker.state_dict(), "epoch": due.epoch, "pictures_due": self.pictures_left}
        if self.training.ranks.first:
            checkpoint.save_run(self.run_dir / "checkpoints", state, self.keep, best, due.numbered)

    def draw(self, due: Due) -> None:
        """Pictures, and the numbers that come with them."""
        training, step = self.training, self.training.loop.step
        self.pictures, numbers, scores = pictures.draw_samples(training, self.run_dir, self.sample_steps, self.seed)
        self.tracker.log(step, due.epoch, numbers)
        energies = {f"energy/{name}": -value for name, value in scores.items()}
        self.tracker.log_media(step, due.epoch, self.pictures, energies)
        if due.done and self.with_frechet:
            how = (self.sample_steps, self.seed, self.eval_batch_size)
            self.tracker.log(step, due.epoch, {"val/frechet": pictures.frechet(training, *how, self.judge, self.cache)})


def means_since_last(loop: Loop, chains: Mapping[str, Tensor], ranks: Ranks) -> dict[str, float]:
    """The means of the logs since the last read-back and statistics of the chains, over all ranks, in one transfer
    from the device."""
    count = loop.step - loop.steps_logged
    means = {f"train/{name}": total / count for name, total in loop.sums.items()}
    means |= {f"chain/{name}": value for name, value in chains.items()}
    values = ranks.mean(torch.stack([value.float() for value in means.values()])).tolist()
    numbers = dict(zip(means, values, strict=True))
    fresh, old, score, reached = (numbers.pop(f"train/{name}", 0.0) for name in telemetry.OF_FRESH)  # a step
    if fresh > 0 and old > 0:
        numbers["chain/score_fresh"] = score / fresh
        numbers["chain/fresh_reached"] = reached / fresh
        numbers["chain/score_old"] = (numbers["train/score_fake"] * (fresh + old) - score) / old
    return numbers
