"""Stochastic gradient Langevin dynamics over (energy, x, generator). The sampler owns no state."""

import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ebm import check

# Convolution kernels for fewer images round otherwise: whatever is split, is split into multiples of this.
GROUP = 16

Energy = Callable[[Tensor], Tensor]
Generators = torch.Generator | Sequence[torch.Generator]


class SGLD:
    """Clamped Langevin steps, x (B, *shape) → x (B, *shape), as Du & Mordatch 2019, algorithm 1:

        x ← clip(x + noise_std·ε),   x ← clip(x − step_size·clamp(∇E(x), ±grad_clamp)),   ε ~ N(0, I)

    The gradient is taken after the noise is added. `clip` is to `bounds`.

    steps                           number of steps K, >= 0
    step_size                       factor of the gradient, > 0
    noise_std                       standard deviation of the noise, >= 0, in units of x; "langevin" ties it
                                    to the step, √(2·step_size): with no clamps, the unadjusted Langevin
                                    algorithm, whose law tends to exp(−E) for small steps
    grad_clamp                      bound of every component of the gradient, > 0; None for none
    bounds                          (low, high) box of x; None for none
    final_step_size, final_noise_std  where given, the value of the last step, reached linearly (annealing)
    threads                         on the CPU the chains are split over so many threads, each of which takes
                                    its chains through the steps on one core; None for as many as torch has

    Raises ValueError for a setting out of range, naming its config key.
    """

    def __init__(
        self,
        steps: int = 60,
        step_size: float = 10.0,
        noise_std: float | str = 0.005,
        grad_clamp: float | None = 0.03,
        bounds: Sequence[float] | None = (-1.0, 1.0),
        final_step_size: float | None = None,
        final_noise_std: float | None = None,
        threads: int | None = None,
    ) -> None:
        self.steps = check.number("sampler.steps", steps, 0, integer=True)
        self.step_size = check.number("sampler.step_size", step_size, 0, open_low=True)
        self.final_step_size = step_size if final_step_size is None else final_step_size
        check.number("sampler.final_step_size", self.final_step_size, 0, open_low=True)
        self.langevin = noise_std == "langevin"
        if self.langevin and final_noise_std is not None:
            raise ValueError("sampler.final_noise_std has no meaning with sampler.noise_std=langevin")
        if isinstance(noise_std, str) and not self.langevin:
            raise ValueError(f"sampler.noise_std must be a number >= 0 or 'langevin', got {noise_std!r}")
        self.noise_std = 0.0 if self.langevin else check.number("sampler.noise_std", noise_std, 0)
        self.final_noise_std = self.noise_std if final_noise_std is None else final_noise_std
        check.number("sampler.final_noise_std", self.final_noise_std, 0)
        if grad_clamp is not None:
            check.number("sampler.grad_clamp", grad_clamp, 0, open_low=True)
        self.grad_clamp = grad_clamp
        if bounds is not None:
            if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
                raise ValueError(f"sampler.bounds must be [low, high] or null, got {bounds!r}")
            low, high = (float(check.number("sampler.bounds", bound)) for bound in bounds)
            if low >= high:
                raise ValueError(f"sampler.bounds must have low < high, got {bounds!r}")
            bounds = (low, high)
        self.bounds = bounds
        if threads is not None:
            check.number("sampler.threads", threads, 1, integer=True)
        self.threads = threads

    def settings(self, step: int, steps: int) -> tuple[float, float]:
        """(step_size, noise_std) of step 0 ≤ `step` < `steps`."""
        t = step / (steps - 1) if steps > 1 else 1.0
        step_size = self.step_size + t * (self.final_step_size - self.step_size)
        if self.langevin:
            return step_size, math.sqrt(2 * step_size)
        return step_size, self.noise_std + t * (self.final_noise_std - self.noise_std)

    def __call__(
        self,
        energy: Energy,
        x: Tensor,
        generator: Generators,
        steps: int | None = None,
        callback: Callable[[int, Tensor], Any] | None = None,
        every: int = 1,
    ) -> Tensor:
        """Chains `x` (B, *shape) after `steps` steps (default: the sampler's); `x` itself is left alone.

        generator  one: step k's noise is `torch.randn(x.shape, generator=generator)`; or one a chain:
                   then a chain is the same in whatever batch it runs
        callback   called as callback(step, x) with the start (step 0), every `every`-th step and the last;
                   x is live: copy what is kept

        The energy is run in eval mode and without parameter gradients; mode, `requires_grad`, parameter
        `.grad` and the caller's grad mode are as before afterwards, also after an exception.
        """
        steps = self.steps if steps is None else check.number("steps", steps, 0, integer=True)
        check.number("every", every, 1, integer=True)
        if not isinstance(generator, torch.Generator) and len(generator) != len(x):
            raise ValueError(f"{len(generator)} generators for {len(x)} chains: give one, or one a chain")
        with torch.inference_mode(False), torch.no_grad(), frozen(energy):
            x = x.detach().clone()
            if callback:
                callback(0, x)
            done = 0
            while done < steps:
                # Noise is drawn a few steps at a time: memory of 8 batches, and all threads wait for it.
                block = min(steps - done, every - done % every if callback else steps, 8)
                x = self._block(energy, x, generator, range(done, done + block), steps)
                done += block
                if callback and (done % every == 0 or done == steps):
                    callback(done, x)
        return x

    def trace(self, energy: Energy, x: Tensor, generator: Generators, every: int = 1, **kwargs: Any) -> Tensor:
        """Snapshots (T, B, *shape) of the chains: the start, every `every`-th step and the last one."""
        kept: list[Tensor] = []
        self(energy, x, generator, callback=lambda _, live: kept.append(live.clone()), every=every, **kwargs)
        return torch.stack(kept)

    def _block(self, energy: Energy, x: Tensor, generator: Generators, block: range, steps: int) -> Tensor:
        settings = [self.settings(step, steps) for step in block]
        noise = torch.empty(len(block), *x.shape, dtype=x.dtype, device=x.device)
        for step_noise, (_, noise_std) in zip(noise, settings, strict=True):
            if isinstance(generator, torch.Generator):
                step_noise.normal_(0, noise_std, generator=generator)
            else:
                for chain_noise, own in zip(step_noise, generator, strict=True):
                    chain_noise.normal_(0, noise_std, generator=own)
        threads = self.threads or torch.get_num_threads()
        size = GROUP * math.ceil(len(x) / threads / GROUP)
        if x.device.type != "cpu" or threads == 1 or len(x) <= size:
            return self._chains(energy, x, noise, settings)
        pool = thread_pool(threads)
        parts = zip(x.split(size), noise.split(size, dim=1), strict=True)
        jobs = [pool.submit(self._chains, energy, part, its_noise, settings) for part, its_noise in parts]
        wait(jobs)  # all of them, so that none still runs when the energy is given back
        return torch.cat([job.result() for job in jobs])

    def _chains(self, energy: Energy, x: Tensor, noise: Tensor, settings: list[tuple[float, float]]) -> Tensor:
        with torch.no_grad():  # grad mode belongs to the thread
            for step_noise, (step_size, _) in zip(noise, settings, strict=True):
                x = x + step_noise
                if self.bounds:
                    x.clamp_(*self.bounds)
                x.requires_grad_(True)
                with torch.enable_grad():
                    (gradient,) = torch.autograd.grad(energy(x).sum(), x)
                x = x.detach()
                if self.grad_clamp:
                    gradient = gradient.clamp(-self.grad_clamp, self.grad_clamp)
                x.sub_(gradient, alpha=step_size)
                if self.bounds:
                    x.clamp_(*self.bounds)
        return x


@contextmanager
def frozen(energy: Any) -> Iterator[None]:
    """`energy` in eval mode with parameters that need no gradient; each as it was found afterwards."""
    if not isinstance(energy, nn.Module):
        yield
        return
    modes = [(module, module.training) for module in energy.modules()]
    needs = [(parameter, parameter.requires_grad) for parameter in energy.parameters()]
    try:
        energy.eval().requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in needs:
            parameter.requires_grad_(requires_grad)


@functools.cache
def thread_pool(threads: int) -> ThreadPoolExecutor:
    """Worker threads that each run torch's operators on one core."""
    ours = torch.get_num_threads()
    started = threading.Barrier(threads + 1)

    def start() -> None:
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(threads, initializer=start)
    for _ in range(threads):
        pool.submit(int)
    started.wait()
    torch.set_num_threads(ours)  # the count of this thread again: set_num_threads also sets the default
    return pool


def uniform_noise(shape: Sequence[int], generator: Generators) -> Tensor:
    """Noise (B, *shape) uniform in [−1, 1] on the generator's device; one generator, or one a chain as in SGLD."""
    if isinstance(generator, torch.Generator):
        return torch.empty(*shape, device=generator.device).uniform_(-1, 1, generator=generator)
    x = torch.empty(*shape, device=generator[0].device)
    for chain, own in zip(x, generator, strict=True):
        chain.uniform_(-1, 1, generator=own)
    return x


def chain_generators(seed: int, count: int, device: str | torch.device = "cpu") -> list[torch.Generator]:
    """A generator a chain; the first ones are the same whatever the count."""
    seeds = torch.randint(2**63 - 1, (count,), generator=torch.Generator().manual_seed(seed))
    return [torch.Generator(device).manual_seed(own) for own in seeds.tolist()]


def trace_in_batches(
    sampler: SGLD,
    energy: Energy,
    x: Tensor,
    generators: Sequence[torch.Generator],
    batch_size: int = 128,
    every: int = 1,
    steps: int | None = None,
) -> Tensor:
    """`sampler.trace` of any number of chains, `batch_size` at a time on the generators' device: snapshots
    (T, B, *shape) on the CPU. The result does not depend on `batch_size`, which is rounded down to a multiple
    of GROUP (at least GROUP), and the last batch is filled up to one.
    """
    batch_size = max(batch_size // GROUP, 1) * GROUP
    parts = []
    for start in range(0, len(x), batch_size):
        part, own = x[start : start + batch_size], list(generators[start : start + batch_size])
        count, missing = len(part), -len(part) % GROUP
        part = torch.cat([part, part[:1].expand(missing, *part.shape[1:])]).to(own[0].device)
        own += [torch.Generator(part.device).manual_seed(0) for _ in range(missing)]
        parts.append(sampler.trace(energy, part, own, every=every, steps=steps)[:, :count].cpu())
    return torch.cat(parts, dim=1)
