"""Stochastic gradient Langevin dynamics over (energy, x, generator). The sampler owns no state."""

import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ebm import check
from ebm.energies import temperature_of
from ebm.sampling.chains import GROUP, Energy, Generators, Given, initial_noise, with_generators
from ebm.sampling.compiled import Box, NotCompilable, Steps, check_hooks, compiled_steps
from ebm.sampling.cuda import cuda_graph, state_of
from ebm.threads import thread_pool


class SGLD:
    """Clamped Langevin steps, x (B, *shape) → x (B, *shape), as Du & Mordatch 2019, algorithm 1:

        x ← clip(x + noise_std·ε),   x ← clip(x − step_size·clamp(∇E(x), ±grad_clamp)),   ε ~ N(0, I)

    The gradient is taken after the noise is added. `clip` is to `bounds`.

    steps                           number of steps K, >= 0
    step_size                       factor of the gradient, > 0
    noise_std                       standard deviation of the noise, >= 0, in units of x; "langevin" ties it
                                    to the step, √(2·step_size·T), T the energy's temperature: with no clamps, the
                                    unadjusted Langevin algorithm, whose law tends to exp(−E/T) for small steps
    grad_clamp                      bound of every component of the gradient, > 0; None for none
    bounds                          (low, high) box of x; None for none
    final_step_size, final_noise_std  where given, the value of the last step, reached linearly (annealing)
    quiet                           share of the steps, the first ones, that have no noise, in [0, 1]
    start                           where chains from noise start (`initial`): uniform, in [−1, 1], or normal, N(0, I)
    threads                         on the CPU the chains are split over so many threads, each of which takes
                                    its chains through the steps on one core; None for as many as torch has
    backend                         how the steps are run. They are the same but for rounding:
                                    eager       autograd; any energy, any device
                                    compile     compiled code on the CPU (compiled.py), for energies that are
                                                chains of convolutions, linear layers and SiLU
                                    cuda_graph  on CUDA, a block of steps recorded once and launched at once
                                    auto        compile on the CPU and cuda_graph on CUDA where they can run
                                    What cannot run falls back to eager; what was taken is said once, on stderr

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
        quiet: float = 0.0,
        start: str = "uniform",
        threads: int | None = None,
        backend: str = "auto",
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
        self.quiet = check.number("sampler.quiet", quiet, 0, 1)
        self.start = check.choice("sampler.start", start, ("uniform", "normal"))
        self.grad_clamp = check.optional("sampler.grad_clamp", grad_clamp, 0, open_low=True)
        if bounds is not None:
            if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
                raise ValueError(f"sampler.bounds must be [low, high] or null, got {bounds!r}")
            low, high = (float(check.number("sampler.bounds", bound)) for bound in bounds)
            if low >= high:
                raise ValueError(f"sampler.bounds must have low < high, got {bounds!r}")
            bounds = (low, high)
        self.bounds = bounds
        self.threads = check.optional("sampler.threads", threads, 1, 1024, integer=True)
        self.backend = check.choice("sampler.backend", backend, ("auto", "eager", "compile", "cuda_graph"))
        # What the last graphs were recorded from, and they: recording one takes as long as some hundred steps.
        self._recorded: tuple[Any, dict[tuple[int, bool], Steps]] = (None, {})

    def settings(self, step: int, steps: int, temperature: float = 1.0) -> tuple[float, float]:
        """(step_size, noise_std) of step 0 ≤ `step` < `steps` with an energy of this temperature."""
        t = step / (steps - 1) if steps > 1 else 1.0
        step_size = self.step_size + t * (self.final_step_size - self.step_size)
        if step < self.quiet * steps:
            return step_size, 0.0
        if self.langevin:
            return step_size, math.sqrt(2 * step_size * temperature)
        return step_size, self.noise_std + t * (self.final_noise_std - self.noise_std)

    def initial(self, shape: Sequence[int], generator: Generators) -> Tensor:
        """Where chains (B, *shape) from noise start; one generator, or one a chain, on their device."""
        return initial_noise(shape, generator, self.start)

    def __call__(
        self,
        energy: Energy,
        x: Tensor,
        generator: Generators,
        steps: int | None = None,
        callback: Callable[[int, Tensor], Any] | None = None,
        every: int = 1,
        labels: Tensor | None = None,
        given: Given | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> Tensor:
        """Chains `x` (B, *shape) after `steps` steps (default: the sampler's); `x` itself is left alone.

        generator  one: step k's noise is `torch.randn(x.shape, generator=generator)`; or one a chain:
                   then a chain is the same in whatever batch it runs
        callback   called as callback(step, x) with the start (step 0), every `every`-th step and the last;
                   x is live: copy what is kept, and leave the energy as it is
        labels     y (B,), where the steps are to go down E(x, y) = energy(x, y); of any integer type and in
                   [0, energy.classes) where the energy has classes. ValueError otherwise, but on a GPU, where to
                   look would be to wait: there the energy's own gather fails
        given      (mask, values), both like x, the mask boolean: pixels that are set to their values at the start
                   and after every step, so that they are these values bit for bit
        progress   told after each block of steps how many were made: of all chains, chains · steps

        The energy is run in eval mode and without parameter gradients; mode, `requires_grad`, parameter
        `.grad` and the caller's grad mode are as before afterwards, also after an exception.
        """
        steps = self.steps if steps is None else check.number("steps", steps, 0, integer=True)
        check.number("every", every, 1, integer=True)
        if not isinstance(generator, torch.Generator) and len(generator) != len(x):
            raise ValueError(f"{len(generator)} generators for {len(x)} chains: give one, or one a chain")
        if given and not given[0].shape == given[1].shape == x.shape:
            got = " and ".join(str(tuple(part.shape)) for part in given)
            raise ValueError(f"given must be a mask and values {tuple(x.shape)} like the chains, got {got}")
        labels = checked_labels(labels, x, getattr(energy, "classes", None))
        temperature = temperature_of(energy)
        with torch.inference_mode(False), torch.no_grad(), frozen(energy):
            x = x.detach().clone(memory_format=torch.contiguous_format)
            if given:
                x[given[0]] = given[1][given[0]]
            _, run = self.run_as(energy, x, labelled=labels is not None)
            if callback:
                callback(0, x)
            self._run(run, x, generator, steps, temperature, callback, every, labels, given, progress)
        return x

    def _run(
        self,
        run: Steps,
        x: Tensor,
        generator: Generators,
        steps: int,
        temperature: float,
        callback: Callable[[int, Tensor], Any] | None,
        every: int,
        labels: Tensor | None,
        given: Given | None,
        progress: Callable[[int], Any] | None,
    ) -> None:
        """The steps, block by block: the noise of the next block is drawn while the threads work on this one."""
        longest = 1 if given else 8
        blocks, done = [], 0
        while done < steps:
            until_callback = every - done % every if callback else steps
            length = min(steps - done, until_callback, longest)
            blocks.append(range(done, done + length))
            done += length
        if not blocks:
            return
        memory = torch.empty(2, max(map(len, blocks)), *x.shape, dtype=x.dtype, device=x.device)
        noise = self._noise(memory[0], generator, blocks[0], steps, temperature)
        for i, block in enumerate(blocks):
            jobs = self._start(run, x, noise, [self.settings(step, steps)[0] for step in block], labels)
            try:
                if i + 1 < len(blocks):
                    noise = self._noise(memory[(i + 1) % 2], generator, blocks[i + 1], steps, temperature)
            finally:
                wait(jobs)  # all of them, so that none still runs when the energy is given back
            for job in jobs:
                job.result()
            if given:
                torch.where(given[0], given[1], x, out=x)
            if progress:
                progress(len(block) * len(x))
            if callback and (block.stop % every == 0 or block.stop == steps):
                callback(block.stop, x)

    def trace(self, energy: Energy, x: Tensor, generator: Generators, every: int = 1, **kwargs: Any) -> Tensor:
        """Snapshots (T, B, *shape) of the chains: the start, every `every`-th step and the last one."""
        kept: list[Tensor] = []
        self(energy, x, generator, callback=lambda _, live: kept.append(live.clone()), every=every, **kwargs)
        return torch.stack(kept)

    def _noise(self, memory: Tensor, generator: Generators, block: range, steps: int, temperature: float) -> Tensor:
        """The noise of a block of steps (block, B, *shape), drawn into `memory`."""
        noise = memory[: len(block)]
        for step_noise, step in zip(noise, block, strict=True):
            noise_std = self.settings(step, steps, temperature)[1]
            for part, its_generator in with_generators(step_noise, generator):
                part.normal_(0, noise_std, generator=its_generator)
        return noise

    def _start(
        self, run: Steps, x: Tensor, noise: Tensor, step_sizes: Sequence[float], labels: Tensor | None
    ) -> list[Future[None]]:
        """Run the steps in place; on the CPU on threads, which have yet to be waited for."""
        threads = self.threads or torch.get_num_threads()
        size = GROUP * math.ceil(len(x) / threads / GROUP)
        if x.device.type != "cpu" or threads == 1 or len(x) <= size:
            run(x, noise, step_sizes, labels)
            return []
        pool, parts = thread_pool(threads, "chains"), x.split(size)
        labels_of = [None] * len(parts) if labels is None else labels.split(size)
        split = zip(parts, noise.split(size, dim=1), labels_of, strict=True)
        return [pool.submit(run, part, its_noise, step_sizes, its_labels) for part, its_noise, its_labels in split]

    def run_as(self, energy: Energy, x: Tensor, labelled: bool = False) -> tuple[str, Steps]:
        """(backend, its steps) for this energy, as it is now, and chains like `x`, with labels or without."""
        steps, reason, backend = eager_steps(energy, self.grad_clamp, self.bounds), "", self.backend
        if backend == "auto":
            backend = {"cpu": "compile", "cuda": "cuda_graph"}.get(x.device.type, "eager")
        try:
            if backend != "eager":
                check_hooks(energy, x.device.type)
                if backend == "cuda_graph" and x.device.type != "cuda":
                    raise NotCompilable(f"a CUDA graph takes chains on CUDA, and these are on {x.device}")
                if labelled and getattr(energy, "classes", None) is None:
                    raise NotCompilable("there are labels, and the energy has no classes")
            if backend == "compile":
                steps = compiled_steps(energy, x, self.grad_clamp, self.bounds)
            elif backend == "cuda_graph":
                steps = self._graph(energy, x, steps)
        except (NotCompilable, RecursionError) as error:
            backend, reason = "eager", f", because {error}"
        say_once(f"sampler.backend={self.backend}: {backend}{reason}")
        return backend, steps

    def _graph(self, energy: Energy, x: Tensor, eager: Steps) -> Steps:
        """`eager` as CUDA graphs, one a length of block. They read the weights where these lie now.

        Raises NotCompilable where a graph would not do what `eager` does, or that cannot be told."""
        if not isinstance(energy, nn.Module):
            raise NotCompilable(f"a CUDA graph takes an nn.Module, and this is a {type(energy).__name__}")
        if self.final_step_size != self.step_size:
            raise NotCompilable("a CUDA graph holds its step sizes, and here they are annealed")
        state = state_of(energy)
        recorded_from = (state, x.shape, x.dtype, x.device, self.step_size, self.grad_clamp, self.bounds)

        if self._recorded[0] != recorded_from:
            self._recorded = (recorded_from, {})
        graphs = self._recorded[1]

        def steps(x: Tensor, noise: Tensor, step_sizes: Sequence[float], labels: Tensor | None) -> None:
            block = (len(noise), labels is None)
            if block not in graphs:
                try:
                    graphs[block] = cuda_graph(eager, x, noise, step_sizes, labels)
                    if state_of(energy) != state:
                        raise NotCompilable("the energy changes as it runs")
                except (NotCompilable, RuntimeError) as error:  # what is wrong with the energy, eager says again
                    reason = (str(error).splitlines() or [""])[0]
                    say_once(f"sampler.backend={self.backend}: eager, because no CUDA graph can be recorded: {reason}")
                    graphs[block] = eager
            graphs[block](x, noise, step_sizes, labels)

        return steps


def checked_labels(labels: Tensor | None, x: Tensor, classes: int | None) -> Tensor | None:
    """`labels` (B,) for chains `x` as the compiled steps read them. Raises ValueError where they do not fit."""
    if labels is None:
        return None
    if len(labels) != len(x):
        raise ValueError(f"{len(labels)} labels for {len(x)} chains")
    if classes is None:
        return labels
    if labels.dim() != 1 or labels.dtype == torch.bool or labels.is_floating_point():
        raise ValueError(f"labels must be integers (B,), got {labels.dtype} {tuple(labels.shape)}")
    labels = labels.to(x.device, torch.int64).contiguous()
    if labels.device.type == "cpu" and bool(((labels < 0) | (labels >= classes)).any()):
        raise ValueError(f"labels must be in [0, {classes}), got {labels.min()} to {labels.max()}")
    return labels


def eager_steps(energy: Energy, grad_clamp: float | None, bounds: Box) -> Steps:
    """The steps by autograd, x (B, *shape) in place; `noise` (steps, B, *shape) as it is to be added."""
    clamp, (low, high) = grad_clamp or math.inf, bounds or (-math.inf, math.inf)

    def steps(x: Tensor, noise: Tensor, step_sizes: Sequence[float], labels: Tensor | None) -> None:
        with torch.no_grad():  # grad mode belongs to the thread
            now = x
            for step_noise, step_size in zip(noise, step_sizes, strict=True):
                now = now + step_noise  # not in place: autograd would take another thread's chains for these
                now.clamp_(low, high).requires_grad_(True)
                with torch.enable_grad():
                    energies = energy(now) if labels is None else energy(now, labels)
                    (gradient,) = torch.autograd.grad(energies.sum(), now)
                now = now.detach().sub_(gradient.clamp(-clamp, clamp), alpha=step_size).clamp_(low, high)
            x.copy_(now)

    return steps


@functools.cache
def say_once(line: str) -> None:
    print(line, file=sys.stderr)


@contextmanager
def frozen(energy: Any) -> Iterator[None]:
    """`energy` in eval mode with parameters that need no gradient; each as it was found afterwards."""
    energy = energy if isinstance(energy, nn.Module) else nn.Module()  # a function has neither
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
