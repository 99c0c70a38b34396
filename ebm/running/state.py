"""The parts of a training, and where it is: what the loop works on, and what a checkpoint holds of it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ebm import check
from ebm.batches import Batches
from ebm.data import Dataset
from ebm.losses import Sum
from ebm.running.guard import Guard
from ebm.running.ranks import Ranks, merged
from ebm.sampling.buffer import ReplayBuffer
from ebm.sampling.sgld import SGLD

MAY_BE_NULL = ("epochs", "max_steps", "max_minutes", "save_every_steps", "save_every_minutes", "chains")
MAY_BE_ZERO = ("warmup_steps", "data_noise_std")
REALS = ("max_minutes", "save_every_minutes", "grad_norm_clip", "data_noise_std")


def check_settings(config: Mapping[str, Any]) -> None:
    """ValueError for a number of the loop's that is out of range in a configuration, naming its key."""
    check.number("seed", config["seed"], 0, 2**63 - 2, integer=True)
    objective, settings = config["objective"], config["train"]
    if objective != "frechet" and str(objective).partition("/")[0] not in ("train", "val", "chain", "noise"):
        raise ValueError(f"objective must be frechet or the name of a logged number, as val/cd, got {objective!r}")
    if settings["epochs"] is settings["max_steps"] is settings["max_minutes"] is None:
        raise ValueError("one of train.epochs, train.max_steps and train.max_minutes must be set, got none")
    for name, value in settings.items():
        if value is None and name in MAY_BE_NULL:
            continue
        if name in REALS:
            check.number(f"train.{name}", value, 0, open_low=name not in MAY_BE_ZERO)
        else:
            check.number(f"train.{name}", value, 0 if name in MAY_BE_ZERO else 1, integer=True)


@dataclass
class Loop:
    """Where the training is: what evolves besides the parts."""

    step: int = 0
    seconds: float = 0.0  # of training steps alone
    best: float = math.inf  # val/cd
    sums: dict[str, Tensor] = field(default_factory=dict)  # of the logs since the last read-back, on the device
    steps_logged: int = 0
    seconds_logged: float = 0.0
    phase: int = 0
    phase_began: int = 0  # at this step

    def add(self, logs: dict[str, Tensor]) -> None:
        """Count a training step with these `logs`."""
        for name, value in logs.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.step += 1

    def start_interval(self) -> None:
        """The logs have been read back: sum anew."""
        self.sums, self.steps_logged, self.seconds_logged = {}, self.step, self.seconds

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in vars(self).items():
            if type(state[name]) is not type(value):
                raise TypeError(f"loop.{name} is {state[name]!r}")
        vars(self).update({name: state[name] for name in vars(self)})


@dataclass
class Phase:
    """A part of a training: what it sets, from the share `start` of the whole to the share `end`."""

    name: str
    start: float
    end: float
    sampler: SGLD
    loss: Sum
    scheduler: Callable[[int, float], float]
    new_buffer: Callable[..., ReplayBuffer] | None  # None: that of the phase before goes on; as with the optimizer
    new_optimizer: Callable[..., torch.optim.Optimizer] | None
    chains: int  # that a step takes on, of this rank
    data_noise_std: float
    grad_norm_clip: float
    warmup_steps: int

    def check(self, shape: Sequence[int], classes: int | None) -> None:
        """ValueError where its loss has no meaning for such data, energy or sampler."""
        self.loss.check(shape, classes)
        if self.loss.needs_pairs and (self.sampler.start != "normal" or self.sampler.bounds is not None):
            got = f"sampler.start={self.sampler.start} sampler.bounds={self.sampler.bounds}"
            raise ValueError(
                f"loss.energy_matching begins at N(0, I): set sampler.start=normal sampler.bounds=null, got {got}"
            )


@dataclass
class Training:
    """A training's parts."""

    energy: nn.Module
    parallel_energy: nn.Module  # the same, its gradients averaged over the ranks
    phases: list[Phase]
    batches: Batches
    guard: Guard
    dataset: Dataset
    ranks: Ranks
    generator: torch.Generator  # of chains, their noise and the data's
    settings: dict[str, Any]  # what a checkpoint holds besides, and does not change
    loop: Loop = field(default_factory=Loop)
    last_batch: tuple[Tensor, Tensor | None, Tensor | None] | None = None  # data, negatives and their labels
    phase: Phase = field(init=False)
    buffer: ReplayBuffer = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        before = self.generator.get_state()
        for number in range(len(self.phases)):  # what is wrong with a late one is told before any step
            self.start_phase(number)
        self.generator.set_state(before)
        self.start_phase(0)

    def start_phase(self, number: int) -> None:
        """Set what the phase sets; its buffer is full of fresh chains, its optimizer has seen nothing."""
        self.phase = phase = self.phases[number]
        if phase.new_buffer:
            self.buffer = phase.new_buffer(self.dataset, self.energy, self.generator, self.ranks)
        if phase.loss.needs_negatives:
            self.buffer.check_count(phase.chains)
        if phase.new_optimizer:
            self.optimizer = phase.new_optimizer(self.energy.parameters())
            self.lr: float = self.optimizer.param_groups[0]["lr"]
        self.loop.phase, self.loop.phase_began = number, self.loop.step
        self.loop.start_interval()  # the loss may have other terms
        self.guard.start_phase()

    def phase_at(self, progress: float) -> int:
        """The number of the phase at this share of the training."""
        return sum(phase.start <= progress for phase in self.phases) - 1

    @property
    def sampler(self) -> SGLD:
        return self.phase.sampler

    @property
    def has_classes(self) -> bool:
        return getattr(self.energy, "classes", None) is not None

    @property
    def device(self) -> torch.device:
        return self.generator.device

    def parts(self) -> dict[str, Any]:
        """What evolves, by its name in a checkpoint."""
        names = ("energy", "optimizer", "buffer", "batches", "guard", "loop")
        return {name: getattr(self, name) for name in names}

    def set_learning_rate(self, epoch: int, progress: float) -> None:
        """By the phase's own warm-up and course, at this share of the training."""
        phase = self.phase
        warm = min((self.loop.step - self.loop.phase_began + 1) / max(phase.warmup_steps, 1), 1)
        course = phase.scheduler(epoch, max(progress - phase.start, 0) / (phase.end - phase.start))
        self.optimizer.param_groups[0]["lr"] = self.lr * warm * self.guard.lr_scale * course

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on, of every rank."""
        state = {name: part.state_dict() for name, part in self.parts().items()}
        state["generator"] = self.generator.get_state()
        state["default_generator"] = default_generator(self.device).get_state()
        if self.ranks.size > 1:
            of_this_rank = {name: state[name] for name in ("buffer", "generator", "default_generator")}
            shards = self.ranks.gather(of_this_rank | {"sums": self.loop.sums})
            state |= merged(shards)
        return state | self.settings | {"step": self.loop.step, "healthy": self.guard.healthy}


def default_generator(device: torch.device) -> torch.Generator:
    """torch's own generator of the device: dropout takes no other."""
    if device.type == "cuda":
        return torch.cuda.default_generators[torch.cuda.current_device()]
    return torch.default_generator
