"""Kernels beside each other: where a CUDA graph is captured, independent work becomes branches of it.

The layers of a network are small: many a kernel leaves most multiprocessors idle, and the gaps between kernels are as
long as some of them. In a replay branches fill both. Launched one by one they would cost the host more than they bring,
so that outside of a capture everything stays on one stream.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def beside(place: Tensor, *, when: bool = True) -> Iterator[None]:
    """What is launched inside runs beside what is launched after it, until `joined`; what was launched before is done.

    Memory that is taken inside may be used after `joined`: it is given out again only to what runs inside, which waits
    for everything launched until then.
    """
    if not (when and captured(place)):
        yield
        return
    current = torch.cuda.current_stream(place.device)
    branch = _branch_of(current)
    branch.wait_stream(current)
    with torch.cuda.stream(branch):
        yield


def joined(place: Tensor) -> None:
    """What follows waits for what was launched `beside`, if anything was."""
    if captured(place):
        current = torch.cuda.current_stream(place.device)
        branch = _branch_of(current)
        with torch.cuda.stream(branch):
            begun = torch.cuda.is_current_stream_capturing()
        if begun:
            current.wait_stream(branch)


def captured(place: Tensor) -> bool:
    """Whether work on the device of `place` is being captured."""
    return place.is_cuda and type(place) is Tensor and torch.cuda.is_current_stream_capturing()


@functools.cache
def _branch_of(stream: torch.cuda.Stream) -> torch.cuda.Stream:
    """The second stream of a stream: graphs of other streams have others, and with them workspaces of their own."""
    return torch.cuda.Stream(stream.device)
