"""Work that is recorded once on a GPU and then replayed.

A small model is thousands of short kernels a step, and a processor takes longer to start each than a GPU to run it. A CUDA
graph starts them all at once. In: work that reads and writes the same tensors each time, of the same sizes, and waits for
nothing. Out: a function that does it again. Invariant: on other devices that function is the work itself, so that all but the
recording is the same there (`tests/test_replay.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def recorded(work: Callable[[], T], device: torch.device) -> Callable[[], T]:
    """`work` as a function that gives the same tensors each time, with new numbers in them. On a GPU, it is done once before.

    Raises: RuntimeError, from `work` or from CUDA, for work that waits for the GPU.
    """
    if device.type != "cuda":
        return work
    own, beside = torch.cuda.current_stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    beside.wait_stream(own)
    before = torch.cuda.get_sync_debug_mode()
    # what waits is found now: a recording that fails leaves the generator of random numbers behind in its middle
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Ss]ynchronization debug mode.*")
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.stream(beside):
                work()  # libraries choose and set up now what they may not while recording
        finally:
            torch.cuda.set_sync_debug_mode(before)
    own.wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            found = work()
    except BaseException:
        torch.cuda.set_stream(own)  # which a recording that fails does not
        raise

    def replay() -> T:
        graph.replay()
        return found

    return replay
