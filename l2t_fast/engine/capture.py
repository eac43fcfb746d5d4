"""An iteration in one CUDA graph: inputs at fixed places, one replay, metrics in a ring that outlives it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3  # iterations of a shape that run launch by launch before it is captured
GRAPHS = 4  # shapes that are captured at most; further ones go on launch by launch
ROWS = 1024  # iterations whose metrics the ring holds

Metrics = dict[str, Tensor]
Iteration = Callable[[Sequence[Tensor]], Metrics]


class CaptureError(Exception):
    """An iteration cannot be captured; says why in half a sentence. Nothing has run."""


class CudaGraph:
    """A function's work on the device, recorded once without running; `replay` runs it on the current stream."""

    def __init__(self, function: Callable[[], object], stream: torch.cuda.Stream | None, pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream()
        generator = torch.cuda.default_generators[current.device_index]
        drawn = generator.get_state()
        try:
            # thread_local: other threads (loaders that pin memory) may call CUDA meanwhile.
            with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                function()
        except Exception:
            # A capture that CUDA itself broke off leaves the stream current, the allocator in the graph's pool, and the
            # generator believing that it is captured, so that nothing could be drawn any more: it gets another state.
            torch.cuda.set_stream(current)
            with suppress(Exception):
                torch._C._cuda_endAllocateToPool(current.device_index, pool)
            fresh = torch.Generator(current.device)
            fresh.set_state(drawn)
            generator.graphsafe_set_state(fresh.graphsafe_get_state())
            raise

    def replay(self) -> None:
        self._graph.replay()


class Ring:
    """Metrics of the latest iterations in one tensor on the device, written at a place that the device counts.

    A captured iteration writes its results to the same memory each time; the ring keeps them for `ROWS` iterations,
    and whoever wants them copies rows when it suits, without the queue of launches ever running dry.
    """

    def __init__(self, metrics: Metrics) -> None:
        first = next(iter(metrics.values()))
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        self._shapes = {name: value.shape for name, value in metrics.items()}
        self._sizes = [value.numel() for value in metrics.values()]
        self._rows = torch.zeros(ROWS, sum(self._sizes), dtype=dtype, device=first.device)
        self._next = torch.zeros(1, dtype=torch.int64, device=first.device)
        self._count = 0

    def write(self, metrics: Metrics) -> None:
        """On the device; what follows on the stream finds it in the next row."""
        row = torch.cat([value.detach().reshape(-1).to(self._rows.dtype) for value in metrics.values()])
        self._rows.index_copy_(0, self._next, row[None])
        self._next.add_(1).remainder_(ROWS)

    def latest(self) -> Metrics:
        """Views of the row that the iteration just launched writes; to be called once for each `write`."""
        row = self._rows[self._count % ROWS]
        self._count += 1
        values = zip(self._shapes.items(), row.split(self._sizes), strict=True)
        return {name: value.view(shape) for (name, shape), value in values}


class Inputs:
    """Tensors of an iteration at fixed places on the device, filled from the device or from the host.

    From the host a copy goes over a stream of its own into one of two stages, so that it overlaps the replay that runs;
    memory that is not pinned is copied into pinned memory first.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """tensors: as the iteration takes them, on the device."""
        self.tensors = [torch.empty_like(t) for t in tensors]
        device = self.tensors[0].device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._stages: list[_Stage] = []
        self._turn = 0

    def fill(self, tensors: Sequence[Tensor]) -> None:
        """In the order of the current stream; does not wait for the device."""
        device = self.tensors[0].device
        if self._copies is not None and any(t.device != device for t in tensors):
            if not self._stages:
                self._stages = [_Stage(len(tensors)) for _ in range(2)]
            self._turn = 1 - self._turn
            tensors = self._stages[self._turn].upload(tensors, device, self._copies)
        for ours, theirs in zip(self.tensors, tensors, strict=True):
            ours.copy_(theirs, non_blocking=True)
        if self._stages:
            self._stages[self._turn].free.record(torch.cuda.current_stream(device))


class _Stage:
    """A place on the device that copies from the host are made to, while the iteration before still runs."""

    def __init__(self, count: int) -> None:
        self._device: list[Tensor | None] = [None] * count
        self._host: list[Tensor | None] = [None] * count
        self.free, self._ready = torch.cuda.Event(), torch.cuda.Event()  # its content has been taken, is there

    def upload(self, tensors: Sequence[Tensor], device: torch.device, copies: torch.cuda.Stream) -> list[Tensor]:
        """The tensors on the device; those that are there already are left alone."""
        from_host = [i for i, tensor in enumerate(tensors) if tensor.device != device]
        places = list(tensors)
        for i in from_host:
            place = self._device[i]
            if place is None:
                place = self._device[i] = torch.empty_like(tensors[i], device=device)
                self.free.record(torch.cuda.current_stream(device))  # what the memory held before may still be read
            places[i] = place
        copies.wait_event(self.free)
        with torch.cuda.stream(copies):
            for i in from_host:
                tensor = tensors[i] if tensors[i].is_pinned() else self._pinned(i, tensors[i])
                places[i].copy_(tensor, non_blocking=True)
            self._ready.record(copies)
        torch.cuda.current_stream(device).wait_event(self._ready)
        return places

    def _pinned(self, i: int, tensor: Tensor) -> Tensor:
        host = self._host[i]
        if host is None:
            host = self._host[i] = torch.empty_like(tensor, pin_memory=True)
        else:
            self._ready.synchronize()  # the copy of two iterations ago, which did not wait for the iterations
        host.copy_(tensor)
        return host


class Graphs:
    """Runs an iteration, and from its fourth run with inputs of the same shapes and dtypes on as one replay.

    Args:
        iteration: what to run, on the tensors at their fixed places; everything it changes is changed in place.
        allowed: raises L2TError where it must not be captured; asked before each capture.
    """

    def __init__(self, iteration: Iteration, device: torch.device, allowed: Callable[[], None]) -> None:
        self._iteration, self._device, self._allowed = iteration, device, allowed
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._ring: Ring | None = None
        self._entries: dict[tuple[Any, ...], _Entry] = {}

    def run(self, tensors: Sequence[Tensor], like: Callable[[Sequence[Tensor]], list[Tensor]]) -> Metrics:
        """One iteration on `tensors`; `like` makes of them what the iteration takes, on the device.

        Returns:
            Metrics, views of a ring: they hold for `ROWS` iterations.
        """
        key = tuple((t.shape, t.dtype) for t in tensors)
        if key not in self._entries:
            self._entries[key] = _Entry(Inputs(like(tensors)))
        entry = self._entries[key]
        entry.inputs.fill(tensors)
        captured = sum(e.graph is not None for e in self._entries.values())
        if entry.graph is None and entry.runs >= WARM_UP and captured < GRAPHS:
            entry.graph = self._capture(entry)
        if entry.graph is not None:
            entry.graph.replay()
        else:
            with self._on_side():
                self._write(entry)
            entry.runs += 1
        assert self._ring is not None
        return self._ring.latest()

    def _capture(self, entry: "_Entry") -> CudaGraph:
        try:
            self._allowed()
            return CudaGraph(lambda: self._write(entry), self._stream, self._pool)
        except Exception as error:  # whatever a capture may raise
            self._pool = torch.cuda.graph_pool_handle() if self._stream is not None else None
            cause: BaseException = error  # the end of a broken capture raises as well
            while cause.__context__ is not None:
                cause = cause.__context__
            reason = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
            raise CaptureError(reason[:200].rstrip(".")) from error

    def _write(self, entry: "_Entry") -> None:
        metrics = self._iteration(entry.inputs.tensors)
        if self._ring is None:
            self._ring = Ring(metrics)
        self._ring.write(metrics)

    @contextmanager
    def _on_side(self) -> Iterator[None]:
        """On the stream of the captures, so that what is made ready for a stream is made ready for theirs."""
        if self._stream is None:
            yield
            return
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)


class _Entry:
    def __init__(self, inputs: Inputs) -> None:
        self.inputs, self.runs = inputs, 0
        self.graph: CudaGraph | None = None
