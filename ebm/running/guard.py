"""Divergence detection from statistics of the training. It says what to do and does nothing itself."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ebm import check

# Each test: what its number means once it is over the limit.
TESTS = {
    "score_gap": "the score gap between real images and chains is {:.3g} above its lowest",
    "gap_trend": "the score gap between real images and chains grew by {:.3g} over the last ten read-backs",
    "energy_magnitude": "energies have a mean magnitude of {:.3g}",
    "saturation": "of the components inside the bounds that the data have, the chains lack {:.1%}",
    "clamp_share": "{:.1%} of the gradient's components are at the clamp",
    "noise_score": "noise scores {:.3g} against real images",
    "fresh_chains": "chains from noise end {:.3g} below the score of the buffer's",
}
EVOLVES = ("strikes", "gaps", "lowest_gap", "rollbacks")


@dataclass
class Guard:
    """Watches the numbers of each read-back for signs that the training has diverged.

    action         rollback, stop, warn or off: what the caller shall do when a test fires
    max_rollbacks  so many, then stop, >= 0
    lr_factor      the learning rate's factor at each rollback, in (0, 1]
    patience       read-backs in a row that a test must be over its limit to fire, >= 1
    warmup_steps   training steps of each phase before which only `not_finite` fires, >= 0
    the others     the limits, one a test of TESTS; None for a test that is not made

    The test `not_finite` has no limit and no patience. Raises ValueError for a setting out of range.
    """

    action: str = "rollback"
    max_rollbacks: int = 3
    lr_factor: float = 0.5
    patience: int = 3
    warmup_steps: int = 300
    score_gap: float | None = 0.3
    gap_trend: float | None = 0.15
    energy_magnitude: float | None = 10.0
    saturation: float | None = 0.75
    clamp_share: float | None = 0.3
    noise_score: float | None = 0.0
    fresh_chains: float | None = 2.0

    def __post_init__(self) -> None:
        check.choice("guard.action", self.action, ("rollback", "stop", "warn", "off"))
        check.number("guard.lr_factor", self.lr_factor, 0, 1, open_low=True)
        for name, least in (("max_rollbacks", 0), ("patience", 1), ("warmup_steps", 0)):
            check.number(f"guard.{name}", getattr(self, name), least, integer=True)
        self.limits = {name: getattr(self, name) for name in TESTS if getattr(self, name) is not None}
        for name, limit in self.limits.items():
            check.number(f"guard.{name}", limit)
        self.rollbacks: list[list[int]] = []  # [step of divergence, step gone back to]
        self.start_phase()

    def start_phase(self) -> None:
        """Other chains are to come, and other gaps."""
        self.lowest_gap = math.inf  # of all read-backs since the warm-up
        self._watch_afresh()

    def _watch_afresh(self) -> None:
        self.strikes = dict.fromkeys(TESTS, 0)  # read-backs in a row over the limit
        self.gaps: list[float] = []  # of the last ten read-backs

    @property
    def healthy(self) -> bool:
        """Whether no test was over its limit at its last read-back."""
        return not any(self.strikes.values())

    @property
    def lr_scale(self) -> float:
        """The factor of the learning rate after the rollbacks so far."""
        return self.lr_factor ** len(self.rollbacks)

    def check(self, step: int, numbers: Mapping[str, float]) -> str | None:
        """The test that fires on the numbers logged at a phase's `step`, and why, in a line; None while all is well."""
        if self.action == "off":
            return None
        for key, value in numbers.items():
            if not math.isfinite(value):
                return f"not_finite: {key} is {value}"
        if step < self.warmup_steps:
            return None
        fired = None
        for name, value in self._values(numbers).items():
            limit = self.limits.get(name, math.inf)
            self.strikes[name] = self.strikes[name] + 1 if value > limit else 0
            needed = 1 if name == "noise_score" else self.patience  # validations are rare, and of many images
            if fired is None and self.strikes[name] and self.strikes[name] % needed == 0:
                fired = f"{name}: {TESTS[name].format(value)} (guard.{name}={limit:g})"
        return fired

    def check_finite(self, energy: nn.Module, chains: Tensor) -> str | None:
        """`not_finite`, if a weight or a chain is not: reads all of them, so for where they are saved."""
        if self.action == "off":
            return None
        for key, value in [*energy.state_dict().items(), ("chains", chains)]:
            if not bool(torch.isfinite(value).all()):
                return f"not_finite: {key} is not finite"
        return None

    def _values(self, numbers: Mapping[str, float]) -> dict[str, float]:
        values = {}
        if "train/score_fake" in numbers:
            real, fake = numbers["train/score_real"], numbers["train/score_fake"]
            gap = abs(real - fake)
            self.gaps = [*self.gaps[-9:], gap]
            self.lowest_gap = min(self.lowest_gap, gap)
            values["score_gap"] = gap - self.lowest_gap
            values["gap_trend"] = gap - self.gaps[0]
            values["energy_magnitude"] = max(abs(real), abs(fake))
            inside = 1 - numbers["chain/saturation_real"]
            values["saturation"] = 1 - (1 - numbers["chain/saturation"]) / inside if inside else 0.0
            values["clamp_share"] = numbers["chain/clamp_share"]
        if "chain/score_fresh" in numbers:
            values["fresh_chains"] = numbers["chain/score_old"] - numbers["chain/score_fresh"]
        if "val/score_noise" in numbers:
            values["noise_score"] = numbers["val/score_noise"] - numbers["val/score_real"]
        return values

    def decide(self, trouble: str) -> str:
        """rollback, stop or warn: what is to be done about a test that fired."""
        if self.action == "warn" and trouble.startswith("not_finite"):
            return "stop"  # nothing comes of a NaN any more
        if self.action == "rollback" and len(self.rollbacks) >= self.max_rollbacks:
            return "stop"
        return self.action

    def before(self, step: int) -> int:
        """A rollback at `step` is to a checkpoint before this step. If the run diverged again within twice the steps
        that it took the first time, the checkpoint that it went back to was on the way already: to one before that."""
        diverged, restored = self.rollbacks[-1] if self.rollbacks else (-1, -1)
        return restored if step <= 2 * diverged - restored else step + 1

    def rolled_back(self, diverged: int, restored: int) -> None:
        """Take note of a rollback between two steps, and watch afresh."""
        self.rollbacks.append([diverged, restored])
        self._watch_afresh()

    def state_dict(self) -> dict[str, Any]:
        return copy.deepcopy({name: getattr(self, name) for name in EVOLVES})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises TypeError where `state` holds other kinds of values than a guard's."""
        for name in EVOLVES:
            if type(state[name]) is not type(getattr(self, name)):
                raise TypeError(f"guard.{name} is {state[name]!r}")
        if state["strikes"].keys() != self.strikes.keys() or not all(len(pair) == 2 for pair in state["rollbacks"]):
            raise TypeError("the guard's strikes or rollbacks are others")
        vars(self).update(copy.deepcopy({name: state[name] for name in EVOLVES}))
