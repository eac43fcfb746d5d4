"""Times: CUDA events on a GPU, turns of all contenders everywhere, so that what disturbs one disturbs all."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any

import torch

WARM_UP = 3  # rounds not counted

Call = Callable[[], Any]


def milliseconds(
    calls: Mapping[str, Call], rounds: int, device: torch.device, *, cold: bool = True, repeat: int = 1
) -> dict[str, list[float]]:
    """Of each call, turn by turn.

    On CUDA after a warm-up, by events: with `cold`, what the L2 cache held is overwritten before each turn and turns
    queue up (operators); otherwise the device is idle before each turn, and a turn is `repeat` calls in a row (whole
    iterations, whose host time counts).
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    if device.type != "cuda":
        for _ in range(rounds):
            for name, call in calls.items():
                start = perf_counter()
                call()
                times[name].append(1e3 * (perf_counter() - start))
        return times
    cache = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for _ in range(WARM_UP + rounds):
        for name, call in calls.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if cold:
                cache.zero_()
            else:
                torch.cuda.synchronize(device)
            begin.record()
            for _ in range(repeat):
                call()
            end.record()
            events[name].append((begin, end))
    torch.cuda.synchronize(device)
    return {
        name: [begin.elapsed_time(end) / repeat for begin, end in turns[WARM_UP:]] for name, turns in events.items()
    }


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds, for pytest-benchmark: of the device on CUDA, which has then done all its work."""
    if device.type != "cuda":
        return perf_counter
    zero = torch.cuda.Event(enable_timing=True)
    zero.record()

    def now() -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        return zero.elapsed_time(event) / 1e3

    return now


def summary(times: Sequence[float]) -> dict[str, float]:
    """Median, p20 and p80 of milliseconds."""
    low, middle, high = _quantiles(times)
    return {"ms_median": middle, "ms_p20": low, "ms_p80": high, "rounds": len(times)}


def speedup(baseline: Sequence[float], times: Sequence[float]) -> dict[str, float]:
    """How many times as fast, of turns that belong together: what slowed one of a pair slowed the other."""
    low, middle, high = _quantiles([theirs / ours for theirs, ours in zip(baseline, times, strict=True)])
    return {"speedup": middle, "speedup_p20": low, "speedup_p80": high}


def _quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    p20, *_, p80 = statistics.quantiles(values, n=5, method="inclusive")
    return p20, statistics.median(values), p80
