"""A call made ready to be timed: its first seconds, its memory, and on a GPU its CUDA graph."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.rows import unavailable

Outputs = list[list[Tensor]]  # of each output of an operator, tensors of each target layer or pair
Call = Callable[[], Outputs]


def own_stream(device: torch.device) -> None:
    """One stream for all on a GPU: autograd's backward runs where its forward ran, and a graph is captured from one."""
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))
        # The first product of a thread, autograd's too, allocates a workspace that stays: no contender's own.
        x = torch.ones(16, 16, device=device, requires_grad=True)
        (x @ x).sum().backward()


@dataclass(frozen=True)
class Ready:
    """A contender that has run."""

    call: Call  # also keeps alive what `timed` reads
    timed: Callable[[], Any]  # a replay of the call's CUDA graph, or the call
    outputs: Outputs  # of `timed`
    captured: bool | str  # or why not
    first_seconds: float  # of the first call, compilation included
    memory: int  # bytes at the peak beyond inputs and outputs


def ready(make: Callable[[], Call], device: torch.device) -> Ready:
    """Warms a contender up, measures its memory and captures it."""
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    start = perf_counter()
    call = make()
    call()
    if cuda:
        torch.cuda.synchronize()
    first_seconds = perf_counter() - start
    if not cuda:
        return Ready(call, call, call(), "no CUDA", first_seconds, 0)
    call()
    torch.cuda.reset_peak_memory_stats()
    outputs = call()
    torch.cuda.synchronize()
    memory = torch.cuda.max_memory_allocated() - before - size(outputs)
    del outputs
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            outputs = call()
    except Exception as error:  # a row says so
        torch.cuda.synchronize()
        return Ready(call, call, call(), unavailable({}, error)["unavailable"], first_seconds, memory)
    for tensors in outputs:
        for t in tensors:
            t.fill_(math.nan)  # a replay must write all of it
    graph.replay()
    torch.cuda.synchronize()
    return Ready(call, graph.replay, outputs, True, first_seconds, memory)


def launches(call: Call) -> int | None:
    """Kernels, copies and fills of one call on the device; None where the profiler cannot see them."""
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            call()
            torch.cuda.synchronize()
        events = profiled.events() or ()
    except (AssertionError, RuntimeError):  # no CUPTI, say: the times count for more
        return None
    # The synchronization is an event of its own.
    return len([e for e in events if e.device_type == DeviceType.CUDA and e.name != "Context Sync"]) or None


def size(lists: Iterable[Iterable[Tensor]]) -> int:
    """Bytes."""
    return sum(t.numel() * t.element_size() for tensors in lists for t in tensors)
