"""Batches in pairs with noise, by optimal transport."""

from collections import deque
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from ebm.batches import Batches
from ebm.threads import thread_pool

Parts = tuple[Any, ...]  # images, labels or None, noise
AHEAD = 4  # batches that are paired before they are asked for
THREADS = 3  # 128 pairs of 32×32 colours take one some 5 ms


def optimal_order(x0: Tensor, x1: Tensor) -> Tensor:
    """The permutation p (B,) with the least Σ ‖x₀[p_i] − x₁[i]‖² of two batches (B, *shape): optimal transport between
    them, exact (Kuhn 1955; as pairs of a flow, Pooladian et al. 2023 and Tong et al. 2024)."""
    from scipy.optimize import linear_sum_assignment  # takes half a second to import

    products = x1.flatten(1).double() @ x0.flatten(1).double().T  # the squares are the same for all permutations
    return torch.from_numpy(linear_sum_assignment(products.numpy(), maximize=True)[1])


class PairedBatches(Batches):
    """Batches of images x₁ and, with each, noise x₀ ~ N(0, I) of the same shape, by `optimal_order`.

    They are made ahead, on the CPU, by threads and a generator of their own, seeded by the given one's seed, and
    handed out on its device. The state is that of the batch that is next: those ahead are made again. Under torchrun
    each rank pairs its share of the batch with its share of the noise.
    """

    def __init__(self, x: Tensor, batch_size: int, generator: torch.Generator, *args: Any, **kwargs: Any) -> None:
        own = torch.Generator().manual_seed((generator.initial_seed() + 2) % 2**63)  # others' numbers are not to recur
        super().__init__(x, batch_size, own, *args, **kwargs)
        self.device = generator.device
        self.waiting: deque[tuple[dict[str, Any], Future[Parts]]] = deque()

    def next(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        while len(self.waiting) <= AHEAD:
            state = super().state_dict()
            x1, y, _ = super().next()
            x0 = torch.randn(self.batch_size, *x1.shape[1:], generator=self.generator)[self.mine]
            self.waiting.append((state, thread_pool(THREADS, "pairs").submit(self._paired, x0, x1, y)))
        images, labels, noise = self.waiting.popleft()[1].result()
        labels = None if labels is None else labels.to(self.device, non_blocking=True)
        return images.to(self.device, non_blocking=True), labels, noise.to(self.device, non_blocking=True)

    def _paired(self, x0: Tensor, x1: Tensor, labels: Tensor | None) -> Parts:
        parts = (x1, labels, x0[optimal_order(x0, x1)])
        if self.device.type != "cuda":
            return parts
        return tuple(None if part is None else part.pin_memory() for part in parts)  # else a copy waits for the device

    def state_dict(self) -> dict[str, Any]:
        return self.waiting[0][0] if self.waiting else super().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.waiting.clear()
