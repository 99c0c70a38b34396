"""The replay buffer: chains at rest between training steps. It never sees an energy."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ebm import check
from ebm.batches import check_affine, random_affine
from ebm.data import scaled
from ebm.sampling.chains import initial_noise

OF_CHAINS = ("chains", "ages", "labels")  # of the buffer's state: one a chain


class ReplayBuffer:
    """Up to `capacity` chains in one preallocated tensor (capacity, *shape) on `device`.

    A draw takes distinct chains; each is replaced by a fresh one with probability `reinit_probability`
    (Du & Mordatch 2019, section 3.2). What comes back goes, by `policy`,

    fifo      in at the front, and the oldest fall out at the back; starts with `initial` chains and grows
    in_place  to the places it was drawn from, so that every chain lives on until it is reinitialised;
              starts full

    Fresh chains are noise, by `start` uniform in [−1, 1] or normal, as the sampler's; with `init` "class_means" a
    random one of `class_means()` (classes, *shape) plus N(0, init_noise_std²), clamped to [−1, 1] (informative
    initialisation, Yang & Ji 2021, "JEM++"). A share `data_share` of them are, instead, random ones of `images` and
    their labels or None, plus N(0, init_noise_std²), as in contrastive divergence's first form (Hinton 2002); in all
    that is logged they count as fresh ones.

    `augment` turns, scales, shifts and mirrors drawn chains (B, C, H, W) with its `probability`, by
    `random_affine` with the rest of it (Du, Li, Tenenbaum & Mordatch 2021, section 3.2): steps that SGLD does
    not find. None: never. Chains keep their labels in [0, classes); those of fresh ones are random, all
    equally likely with `fresh_labels` "alike" and as often as `class_shares` (classes,) say with "data"; without
    `classes` they are all 0, or the number of the class mean. Raises ValueError for a setting out of range.
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
        augment: Mapping[str, float] | None = None,
        classes: int | None = None,
        fresh_labels: str = "alike",
        class_shares: Sequence[float] | None = None,
        start: str = "uniform",
        data_share: float = 0.0,
        images: tuple[Tensor, Tensor | None] | None = None,
    ) -> None:
        self.capacity = check.number("buffer.capacity", capacity, 1, integer=True)
        self.policy = check.choice("buffer.policy", policy, ("fifo", "in_place"))
        check.number("buffer.initial", initial, 1, integer=True)
        if policy == "fifo" and initial > capacity:
            raise ValueError(f"buffer.initial must be at most buffer.capacity, got {initial} > {capacity}")
        self.reinit_probability = check.number("buffer.reinit_probability", reinit_probability, 0, 1)
        self.init_noise_std = check.number("buffer.init_noise_std", init_noise_std, 0)
        self.start = check.choice("buffer.start", start, ("uniform", "normal"))
        self.data_share = check.number("buffer.data_share", data_share, 0, 1)
        self.images = images
        check.that(images or not self.data_share, "buffer.data_share needs images, the data's")
        self.class_means = None
        if check.choice("buffer.init", init, ("noise", "class_means")) == "class_means":
            if class_means is None:
                raise ValueError("buffer.init=class_means needs class_means, the data's")
            self.class_means = class_means().to(generator.device)
            if classes not in (None, len(self.class_means)):
                raise ValueError(
                    f"buffer.init=class_means needs images of each class, got {len(self.class_means)} means for "
                    f"energy.classes={classes}"
                )
        self.class_shares = None
        if check.choice("buffer.fresh_labels", fresh_labels, ("alike", "data")) == "data":
            check.that(class_shares, "buffer.fresh_labels=data needs an energy with classes (energy.classes)")
            self.class_shares = torch.tensor(class_shares, device=generator.device)
        if augment is not None and not isinstance(augment, Mapping):
            raise ValueError(f"buffer.augment must be settings of random_affine and a probability, got {augment!r}")
        self.affine = dict(augment or {})
        self.augment_probability = check.number("buffer.augment.probability", self.affine.pop("probability", 0.0), 0, 1)
        check_affine("buffer.augment", self.affine)
        if self.augment_probability and len(shape) != 3:
            raise ValueError(f"buffer.augment.probability must be 0 for data of shape {tuple(shape)}: it turns images")
        self.size = initial if policy == "fifo" else capacity  # chains at [0, size)
        self.front = self.size % capacity  # where fifo writes next
        size = 4 * math.prod(shape) + 8 + 8  # a chain, its age and label
        check.memory(f"buffer.capacity={capacity}", capacity * size, generator.device)
        self.chains = torch.zeros(capacity, *shape, device=generator.device)
        self.ages = torch.zeros(capacity, dtype=torch.int64, device=generator.device)  # SGLD steps lived
        self.labels = torch.zeros_like(self.ages)
        self.classes = classes or (1 if self.class_means is None else len(self.class_means))
        self.chains[: self.size], self.labels[: self.size] = self.fresh(self.size, generator)

    def fresh(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`count` new chains (count, *shape) and their labels (count,)."""
        x = torch.empty(count, *self.chains.shape[1:], device=self.chains.device)
        labels = torch.zeros(count, dtype=torch.int64, device=x.device)
        if self.class_shares is not None:
            labels = torch.multinomial(self.class_shares, count, replacement=True, generator=generator)
        elif self.classes > 1:
            labels.random_(self.classes, generator=generator)
        if self.class_means is None:
            x = initial_noise(x.shape, generator, self.start)
        else:
            x.normal_(0, self.init_noise_std, generator=generator)
            x.add_(self.class_means[labels]).clamp_(-1, 1)
        if self.data_share and self.images:
            images, of_images = self.images
            chosen = torch.rand(count, generator=generator, device=x.device) < self.data_share
            places = torch.randint(len(images), (int(chosen.sum()),), generator=generator, device=x.device)
            near = scaled(images[places.to(images.device)]).to(x.device)
            x[chosen] = near + torch.empty_like(near).normal_(0, self.init_noise_std, generator=generator)
            if of_images is not None and self.classes > 1:
                labels[chosen] = of_images[places.to(of_images.device)].to(labels.device)
        return x, labels

    def check_count(self, count: int) -> None:
        """ValueError where there are fewer than `count` chains to draw."""
        if count > self.size:
            key = "buffer.initial" if self.policy == "fifo" else "buffer.capacity"
            raise ValueError(f"{key} must be at least train.chains (or the batch size), got {self.size} for {count}")

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`count` distinct chains, copied: (chains (count, *shape), places, ages, labels, (count,) each)."""
        self.check_count(count)
        places = torch.randperm(self.size, generator=generator, device=self.chains.device)[:count]
        renew = torch.rand(count, generator=generator, device=self.chains.device) < self.reinit_probability
        mask = renew.view(-1, *[1] * (self.chains.dim() - 1))
        chains, labels = self.fresh(count, generator)
        chains = torch.where(mask, chains, self.chains[places])
        if self.augment_probability:
            chosen = torch.rand(count, generator=generator, device=chains.device) < self.augment_probability
            chains[chosen] = random_affine(chains[chosen], generator, **self.affine)
        labels = torch.where(renew, labels, self.labels[places])
        return chains, places, torch.where(renew, 0, self.ages[places]), labels

    def put(self, chains: Tensor, places: Tensor, ages: Tensor, labels: Tensor) -> None:
        """Take back `chains` that were drawn from `places` with these `labels` and have now lived for `ages` steps."""
        if self.policy == "fifo":
            places = (self.front + torch.arange(len(chains), device=places.device)) % self.capacity
            self.front = (self.front + len(chains)) % self.capacity
            self.size = min(self.size + len(chains), self.capacity)
        self.chains[places] = chains
        self.ages[places] = ages
        self.labels[places] = labels

    def state_dict(self) -> dict[str, Any]:
        of_chains = {name: getattr(self, name)[: self.size].clone() for name in OF_CHAINS}
        return of_chains | {"front": self.front, "class_means": self.class_means}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError where `state` is that of another buffer."""
        size, front = len(state["chains"]), state["front"]
        fits = state["chains"].shape[1:] == self.chains.shape[1:] and state["ages"].shape == (size,)
        full = size == self.capacity or self.policy == "fifo"
        if not (fits and full and 0 < size <= self.capacity and 0 <= front < self.capacity):
            raise ValueError(f"the buffer's chains are {tuple(state['chains'].shape)}, not {tuple(self.chains.shape)}")
        labels = state["labels"]
        if labels.shape != (size,) or not bool(((labels >= 0) & (labels < self.classes)).all()):
            raise ValueError(f"the labels of the buffer's chains are not in [0, {self.classes})")
        self.size, self.front = size, front
        for name in OF_CHAINS:
            getattr(self, name)[:size] = state[name]
        means, ours = state["class_means"], self.class_means
        if means is not None and (ours is None or means.shape != ours.shape):
            raise ValueError("the buffer's class means are those of other data")
        self.class_means = None if means is None else means.to(self.chains.device)
