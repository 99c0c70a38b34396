"""The replay buffer: chains at rest between training steps. It never sees an energy."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ebm import check


class ReplayBuffer:
    """Up to `capacity` chains in one preallocated tensor (capacity, *shape) on `device`.

    A draw takes distinct chains; each is replaced by a fresh one with probability `reinit_probability`
    (Du & Mordatch 2019, section 3.2). What comes back goes, by `policy`,

    fifo      in at the front, and the oldest fall out at the back; starts with `initial` chains and grows
    in_place  to the places it was drawn from, so that every chain lives on until it is reinitialised;
              starts full

    Fresh chains are uniform noise in [−1, 1], the box of the data; with `init` "class_means" a random one of
    `class_means()` (classes, *shape) plus N(0, init_noise_std²), clamped to the box (informative
    initialisation, Yang & Ji 2021, "JEM++"). Raises ValueError for a setting out of range.
    """

    def __init__(
        self,
        shape: Sequence[int],
        generator: torch.Generator,
        capacity: int = 8192,
        initial: int = 128,
        reinit_probability: float = 0.05,
        policy: str = "fifo",
        init: str = "noise",
        init_noise_std: float = 0.3,
        class_means: Callable[[], Tensor] | None = None,
    ) -> None:
        self.capacity = check.number("buffer.capacity", capacity, 1, integer=True)
        self.policy = check.choice("buffer.policy", policy, ("fifo", "in_place"))
        check.number("buffer.initial", initial, 1, integer=True)
        if policy == "fifo" and initial > capacity:
            raise ValueError(f"buffer.initial must be at most buffer.capacity, got {initial} > {capacity}")
        self.reinit_probability = check.number("buffer.reinit_probability", reinit_probability, 0, 1)
        self.init_noise_std = check.number("buffer.init_noise_std", init_noise_std, 0)
        self.class_means = None
        if check.choice("buffer.init", init, ("noise", "class_means")) == "class_means":
            if class_means is None:
                raise ValueError("buffer.init=class_means needs class_means, the data's")
            self.class_means = class_means().to(generator.device)
        self.size = initial if policy == "fifo" else capacity  # chains at [0, size)
        self.front = self.size % capacity  # where fifo writes next
        self.chains = torch.zeros(capacity, *shape, device=generator.device)
        self.ages = torch.zeros(capacity, dtype=torch.int64, device=generator.device)  # SGLD steps lived
        self.chains[: self.size] = self.fresh(self.size, generator)

    def fresh(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` new chains (count, *shape)."""
        x = torch.empty(count, *self.chains.shape[1:], device=self.chains.device)
        if self.class_means is None:
            return x.uniform_(-1, 1, generator=generator)
        classes = torch.randint(len(self.class_means), (count,), generator=generator, device=x.device)
        x.normal_(0, self.init_noise_std, generator=generator)
        return x.add_(self.class_means[classes]).clamp_(-1, 1)

    def check_count(self, count: int) -> None:
        """ValueError where there are fewer than `count` chains to draw."""
        if count > self.size:
            key = "buffer.initial" if self.policy == "fifo" else "buffer.capacity"
            raise ValueError(f"{key} must be at least the batch size, got {self.size} for {count} chains")

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """`count` distinct chains: (chains (count, *shape), places (count,), ages (count,)), all copies."""
        self.check_count(count)
        places = torch.randperm(self.size, generator=generator, device=self.chains.device)[:count]
        renew = torch.rand(count, generator=generator, device=self.chains.device) < self.reinit_probability
        mask = renew.view(-1, *[1] * (self.chains.dim() - 1))
        chains = torch.where(mask, self.fresh(count, generator), self.chains[places])
        return chains, places, torch.where(renew, 0, self.ages[places])

    def put(self, chains: Tensor, places: Tensor, ages: Tensor) -> None:
        """Take back `chains` that were drawn from `places` and have now lived for `ages` steps."""
        if self.policy == "fifo":
            places = (self.front + torch.arange(len(chains), device=places.device)) % self.capacity
            self.front = (self.front + len(chains)) % self.capacity
            self.size = min(self.size + len(chains), self.capacity)
        self.chains[places] = chains
        self.ages[places] = ages

    def state_dict(self) -> dict[str, Any]:
        used = slice(0, self.size)
        return {
            "chains": self.chains[used].clone(),
            "ages": self.ages[used].clone(),
            "front": self.front,
            "class_means": self.class_means,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.size, self.front = len(state["chains"]), state["front"]
        self.chains[: self.size] = state["chains"]
        self.ages[: self.size] = state["ages"]
        self.class_means = state["class_means"]
