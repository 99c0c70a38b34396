"""Threads of one core each."""

import functools
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import torch


@functools.cache
def thread_pool(threads: int, purpose: str) -> ThreadPoolExecutor:
    """Worker threads that each run torch's operators on one core; others for another purpose."""
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


def _after_fork() -> None:
    """A child of a process with such threads has none of them, and none of torch's own: it would wait for
    them for ever."""
    if thread_pool.cache_info().currsize:
        thread_pool.cache_clear()
        torch.set_num_threads(1)


os.register_at_fork(after_in_child=_after_fork)
