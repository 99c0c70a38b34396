"""Divergence detection from statistics of the training. It says what to do and does nothing itself."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ebm import check

# Each test: a number that is low in a healthy run, and what it means when it is not. {0:.3g} is the number.
TESTS = {
    "score_gap": "real images score {0:.3g} below the chains",
    "gap_trend": "the score of real images against the chains' fell by {0:.3g} within ten read-backs",
    "energy_magnitude": "energies of magnitude {0:.3g}",
    "saturation": "{0:.0%} more of the chains' components lie at the bounds than of the data's",
    "clamp_share": "{0:.0%} of the gradient's components are at the clamp",
    "noise_score": "noise scores {0:.3g} above real images",
    "fresh_chains": "chains from noise end {0:.3g} below the buffer's score",
}


class Guard:
    """Watches the numbers of each read-back for signs that the training has diverged.

    action        rollback, stop, warn or off: what the caller shall do when a test fires
    max_rollbacks so many, then stop, >= 0
    lr_factor     the learning rate's factor at each rollback, in (0, 1]
    patience      read-backs in a row that a test must be over its limit to fire, >= 1
    limits        the other arguments, one a test of TESTS; None for a test that is not made

    `not_finite` has no limit and no patience. Raises ValueError for a setting out of range.
    """

    def __init__(
        self,
        action: str = "rollback",
        max_rollbacks: int = 3,
        lr_factor: float = 0.5,
        patience: int = 3,
        score_gap: float | None = 0.5,
        gap_trend: float | None = 0.3,
        energy_magnitude: float | None = 20.0,
        saturation: float | None = 0.2,
        clamp_share: float | None = 0.5,
        noise_score: float | None = 0.0,
        fresh_chains: float | None = 1.0,
    ) -> None:
        self.action = check.choice("guard.action", action, ("rollback", "stop", "warn", "off"))
        self.max_rollbacks = check.number("guard.max_rollbacks", max_rollbacks, 0, integer=True)
        self.lr_factor = check.number("guard.lr_factor", lr_factor, 0, 1, open_low=True)
        self.patience = check.number("guard.patience", patience, 1, integer=True)
        limits = (score_gap, gap_trend, energy_magnitude, saturation, clamp_share, noise_score, fresh_chains)
        self.limits = dict(zip(TESTS, limits, strict=True))
        for name, limit in self.limits.items():
            if limit is not None:
                check.number(f"guard.{name}", limit)
        self.strikes = dict.fromkeys(TESTS, 0)  # read-backs in a row over the limit
        self.gaps: list[float] = []  # of the last ten read-backs
        self.rollbacks: list[list[int]] = []  # [step of divergence, step gone back to]

    @property
    def healthy(self) -> bool:
        """Whether no test was over its limit at its last read-back."""
        return not any(self.strikes.values())

    @property
    def lr_scale(self) -> float:
        """The factor of the learning rate after the rollbacks so far."""
        return self.lr_factor ** len(self.rollbacks)

    @staticmethod
    def finite(numbers: Mapping[str, float]) -> bool:
        return all(math.isfinite(value) for value in numbers.values())

    def decide(self, trouble: str) -> str:
        """rollback, stop or warn: what is to be done about a test that fired."""
        if self.action == "warn" and trouble.startswith("not_finite"):
            return "stop"  # nothing comes of a NaN any more
        if self.action == "rollback" and len(self.rollbacks) >= self.max_rollbacks:
            return "stop"
        return self.action

    def check(self, numbers: Mapping[str, float]) -> str | None:
        """The test that fires on the logged `numbers`, and why, in a line; None while all is well."""
        if self.action == "off":
            return None
        for key, value in numbers.items():
            if not math.isfinite(value):
                return f"not_finite: {key} is {value}"
        for name, value in self._values(numbers).items():
            limit = self.limits[name]
            if limit is None:
                continue
            self.strikes[name] = self.strikes[name] + 1 if value > limit else 0
            needed = 1 if name == "noise_score" else self.patience  # validations are rare, and many images
            if self.strikes[name] and self.strikes[name] % needed == 0:  # with `warn`, not at each read-back
                return f"{name}: {TESTS[name].format(value)} (guard.{name}={limit:g})"
        return None

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
        if "train/score_real" in numbers:
            real, fake = numbers["train/score_real"], numbers["train/score_fake"]
            values["score_gap"] = fake - real
            values["energy_magnitude"] = max(abs(real), abs(fake))
            self.gaps = [*self.gaps[-9:], fake - real]
            values["gap_trend"] = self.gaps[-1] - self.gaps[0]
            values["saturation"] = numbers["chain/saturation"] - numbers["chain/saturation_real"]
            values["clamp_share"] = numbers["chain/clamp_share"]
        if "chain/score_fresh" in numbers:
            values["fresh_chains"] = numbers["chain/score_old"] - numbers["chain/score_fresh"]
        if "val/score_noise" in numbers:
            values["noise_score"] = numbers["val/score_noise"] - numbers["val/score_real"]
        return values

    def rolled_back(self, diverged: int, restored: int) -> None:
        """Take note of a rollback between two steps, and start to watch afresh."""
        self.rollbacks.append([diverged, restored])
        self.strikes, self.gaps = dict.fromkeys(TESTS, 0), []

    def before(self, step: int) -> int:
        """Checkpoints of this step and later ones are not to be gone back to: the last one led here."""
        if self.rollbacks and step <= self.rollbacks[-1][0]:
            return self.rollbacks[-1][1]
        return step + 1

    def state_dict(self) -> dict[str, Any]:
        return {"strikes": dict(self.strikes), "gaps": list(self.gaps), "rollbacks": list(self.rollbacks)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.strikes, self.gaps = dict(state["strikes"]), list(state["gaps"])
        self.rollbacks = list(state["rollbacks"])
