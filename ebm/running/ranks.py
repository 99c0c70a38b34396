"""One model on many devices: the processes that torchrun starts, how they agree, and how chains are dealt to them."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, distributed, nn

from ebm import check
from ebm.sampling.buffer import OF_CHAINS

T = TypeVar("T")


class Ranks:
    """This process, `rank` of `size`, among those of one training; a context manager. Where there is one alone, each
    method returns what it is given.

    timeout_minutes  a rank that has waited so long for another ends with an error, > 0
    device           cpu, where no rank is to touch a GPU that is there
    """

    def __init__(self, timeout_minutes: float = 30, device: str = "auto") -> None:
        check.number("rank_timeout_minutes", timeout_minutes, 0, open_low=True)
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0)) if self.size > 1 else 0
        self.first = self.rank == 0
        if self.size > 1:
            if sys.platform == "linux":  # SIGTERM when torchrun dies: nobody else would end its ranks
                ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
            backend = "cpu:gloo,cuda:nccl" if device != "cpu" and torch.cuda.is_available() else "gloo"
            distributed.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))

    def device(self, device: torch.device) -> torch.device:
        """`device`, or this rank's own GPU where it is some GPU."""
        if self.size == 1 or device.type != "cuda":
            return device
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))

    def seed(self, seed: int) -> int:
        """A seed of this rank's own; alone, the seed itself."""
        return seed if self.size == 1 else (seed + 7_368_787 * (self.rank + 1)) % 2**63

    def share(self, key: str, total: int) -> int:
        """`total` / size. Raises ValueError naming `key` where that is no whole number."""
        if total % self.size:
            raise ValueError(f"{key} must be a multiple of the {self.size} ranks, got {total}")
        return total // self.size

    def wrap(self, energy: nn.Module) -> nn.Module:
        """`energy` with gradients that are averaged over the ranks in `backward`; the parameters are shared."""
        return energy if self.size == 1 else nn.parallel.DistributedDataParallel(energy)

    def largest(self, *values: float) -> list[float]:
        """The largest of each value over the ranks."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
        return tensor.tolist()

    def mean(self, values: Tensor) -> Tensor:
        if self.size > 1:
            distributed.all_reduce(values)
        return values / self.size

    def from_first(self, function: Callable[[], T]) -> T:
        """What `function` returns on the first rank; it runs there alone."""
        if self.size == 1:
            return function()
        value = [function() if self.first else None]
        distributed.broadcast_object_list(value)
        return value[0]  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """The value of every rank on the first; on the others it means nothing."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            distributed.gather_object(value, values if self.first else None)
        return values

    def first_then_others(self, function: Callable[[], T]) -> T:
        """`function` on the first rank, then on the others: what it downloads is there by then."""
        value = function() if self.first else None
        self.largest(0)
        return function() if value is None else value

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self.size > 1 and kind is None:  # after an error the others may not be there any more
            distributed.destroy_process_group()


def merged(shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The part of a checkpoint that is every rank's own, from each rank's {buffer, generator, default_generator, sums}:
    all chains as one buffer, and under `shards` what it takes to part them again."""
    buffers = [shard["buffer"] for shard in shards]
    whole = buffers[0] | {key: torch.cat([buffer[key].cpu() for buffer in buffers]) for key in OF_CHAINS}
    apart = [_shard(**shard) for shard in shards]
    return {"buffer": whole, "generator": shards[0]["generator"], "shards": apart}


def _shard(buffer: dict[str, Any], **others: Any) -> dict[str, Any]:
    """A rank's part, with the size and front of its buffer in place of the chains."""
    return {"size": len(buffer["chains"]), "front": buffer["front"]} | others


def redistributed(state: dict[str, Any], ranks: Ranks, capacity: int, generator: torch.Generator) -> dict[str, Any]:
    """The state of a checkpoint with this rank's own buffer of `capacity` chains, generator and sums.

    On as many ranks as wrote it each gets what was its own. On another number all chains are dealt out in turn, the
    oldest entries of a fifo first, and each rank draws from a new seed, made of its generator's and the step.
    """
    buffer = state["buffer"]
    names = [name for name in ("generator", "default_generator") if name in state]  # older files have one
    of_one_rank = {"sums": state["loop"]["sums"]} | {name: state[name] for name in names}
    shards = state.get("shards", [_shard(buffer, **of_one_rank)])
    sizes = [shard["size"] for shard in shards]
    if min(sizes) < 0 or sum(sizes) != len(buffer["chains"]):
        raise ValueError(f"its {len(shards)} ranks had {sum(sizes)} chains, the buffer holds {len(buffer['chains'])}")
    places = [sum(sizes[:i]) + torch.arange(size) for i, size in enumerate(sizes)]
    if len(shards) == ranks.size:
        mine, shard = places[ranks.rank], shards[ranks.rank]
    else:
        since = torch.cat([torch.arange(-size, 0) for size in sizes])  # the last written is -1
        by_age = torch.cat([held.roll(-shard["front"]) for held, shard in zip(places, shards, strict=True)])
        mine = by_age[since.argsort(stable=True)][ranks.rank :: ranks.size][-capacity:]
        fresh = torch.Generator(generator.device).manual_seed((generator.initial_seed() + state["step"]) % 2**63)
        shard = shards[0] | {"front": len(mine) % capacity} | dict.fromkeys(names, fresh.get_state())
    chains = {key: buffer[key][mine] for key in OF_CHAINS}
    generators: dict[str, Tensor] = {name: shard[name] for name in names}
    generators["order_generator"] = state.get("order_generator", state["generator"])
    buffer, loop = buffer | chains | {"front": shard["front"]}, state["loop"] | {"sums": shard["sums"]}
    return state | generators | {"buffer": buffer, "loop": loop}
