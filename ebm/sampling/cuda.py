"""Steps on CUDA, recorded once and launched as one graph."""

import functools
import warnings
from collections.abc import Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ebm.sampling.compiled import NotCompilable, Steps


def state_of(value: Any) -> Any:
    """All that `value` is made of, to be compared with == later: of a module its class and what it holds, of a tensor
    where it lies. Raises NotCompilable for what cannot be compared: closures, and objects of other kinds."""
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return value
    if isinstance(value, dict):
        return tuple([(key, state_of(part)) for key, part in value.items()])
    if isinstance(value, (list, tuple, set)):
        return tuple(map(state_of, value))
    if isinstance(value, Tensor):
        return value.data_ptr(), value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, nn.Module):
        return type(value), state_of(vars(value))
    if isinstance(value, functools.partial):
        return state_of((value.func, value.args, value.keywords))
    if isinstance(value, FunctionType) and value.__closure__ is None:
        return value
    raise NotCompilable(f"a CUDA graph cannot tell when what the energy holds changes: {type(value).__name__}")


def cuda_graph(steps: Steps, x: Tensor, noise: Tensor, step_sizes: Sequence[float], labels: Tensor | None) -> Steps:
    """`steps` for tensors like these, recorded: one launch instead of some forty a step."""
    own_x, own_noise, own_labels = x.clone(), noise.clone(), None if labels is None else labels.clone()
    current, side = torch.cuda.current_stream(x.device), torch.cuda.Stream(x.device)
    mode = torch.cuda.get_sync_debug_mode()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(2):  # warm-up: cuDNN picks its kernels
            steps(own_x, own_noise, step_sizes, own_labels)
        try:  # what waits for the device cannot be recorded; found here, it leaves torch's generator as it was
            with warnings.catch_warnings(action="ignore"):  # the mode is a prototype, says torch
                torch.cuda.set_sync_debug_mode("error")
            steps(own_x, own_noise, step_sizes, own_labels)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):  # others may pin memory now
            steps(own_x, own_noise, step_sizes, own_labels)
    except BaseException:
        torch.cuda.set_stream(current)  # torch stays on the other one where a recording fails
        raise

    def replay(x: Tensor, noise: Tensor, step_sizes: Sequence[float], labels: Tensor | None) -> None:
        own_x.copy_(x)
        own_noise.copy_(noise)
        if own_labels is not None and labels is not None:
            own_labels.copy_(labels)
        graph.replay()
        x.copy_(own_x)

    return replay
