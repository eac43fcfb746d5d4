"""Memory: what is free, what an iteration takes, and one sentence where there was too little."""

import contextlib
import dataclasses
import gc
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from l2t_fast.choices import Precision
from l2t_fast.engine.compile import Steps
from l2t_fast.engine.iteration import Iteration
from l2t_fast.engine.shards import Shards
from l2t_fast.engine.surroundings import RealSurroundings
from l2t_fast.environment import host_memory
from l2t_fast.errors import NoMemoryError, ran_out
from l2t_fast.learner.generators import generators_kept

_FEW, _MORE = 2, 4  # images (of each micro-batch) in the trials that tell what one image takes


class Alive(TorchDispatchMode):
    """Sees every tensor that a call makes until it is freed; `peak` bytes were alive at most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = self.peak = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._watch(value.untyped_storage())
        self.peak = max(self.peak, self.alive)
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._storages:
            self._storages.add(key)
            self.alive += size
            weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.alive -= size


def free_memory(device: torch.device) -> tuple[int, int]:
    """(bytes that may still be taken, bytes there are); (0, 0) where the system does not say."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total
    return host_memory()


@contextlib.contextmanager
def within_memory(explain: Callable[[], str]) -> Iterator[None]:
    """Raises NoMemoryError with what `explain` says where memory runs out; what had filled it is let go before."""
    try:
        yield
    except Exception as error:
        if not ran_out(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold what filled the memory
        raise NoMemoryError(explain()) from None


def advice(
    iteration: Iteration,
    steps: Steps,
    tensors: Sequence[Tensor],
    ready: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    precision: Precision,
) -> str:
    """How much memory an iteration on `tensors` needs, when they are made `ready`; what there is, what would help."""

    def some(count: int) -> Sequence[Tensor]:
        return ready([t[:count] for t in tensors])

    batch = len(tensors[0])
    shards = Shards(iteration.shards.count)  # the other ranks take no part in the trials
    iteration = dataclasses.replace(iteration, shards=shards)
    device = iteration.trained.device
    gc.collect()  # what had filled the memory, where it is held in circles
    if device.type == "cuda":
        torch.cuda.empty_cache()
    free, total = free_memory(device)
    recompute = dataclasses.replace(iteration, memory="recompute")
    now, least = (_affine(each, steps, some, batch) for each in (iteration, recompute))
    needed = f", which needs about {_shown(_at(now, batch))} beside the networks" if now else ""
    there = f"; {_shown(free)} of {_shown(total)} are free" if total else ""
    ways = ["a smaller batch"]
    if now and 1 < (fits := int((free - now[0]) // max(now[1], 1.0))) < batch:
        ways = [f"batches of at most {fits}"]
    if iteration.memory == "save" and shards.whole and iteration.trained.phi:
        ways.append("memory 'recompute'" + (f" (about {_shown(_at(least, batch))})" if least else ""))
    if precision != "bf16" and device.type == "cuda":
        ways.append("precision 'bf16'")
    choice = " or ".join([", ".join(ways[:-1]), ways[-1]] if len(ways) > 1 else ways)
    return f"memory ran out in an iteration on {batch} images{needed}{there}: use {choice}."


def _affine(
    iteration: Iteration, steps: Steps, some: Callable[[int], Sequence[Tensor]], batch: int
) -> tuple[float, float] | None:
    """(bytes of an iteration, more bytes for each image), by trials on few images; None where they fail as well."""
    fewest, most = (n * iteration.shards.count for n in (_FEW, _MORE))
    try:
        few, more = (_peak(iteration, steps, some(min(n, batch))) for n in (fewest, most))
    except Exception as error:  # whatever a trial raises, it is the first error that counts
        traceback.clear_frames(error.__traceback__)
        return None
    if batch < most:
        return 0.0, more / batch
    each = max(0.0, (more - few) / (most - fewest))
    return max(0.0, few - fewest * each), each


def _at(affine: tuple[float, float], batch: int) -> float:
    return affine[0] + affine[1] * batch


def _peak(iteration: Iteration, steps: Steps, tensors: Sequence[Tensor]) -> int:
    """Bytes alive at most in an iteration that changes nothing."""
    trained, device = iteration.trained, iteration.trained.device
    theta = {name: p.detach() for name, p in trained.theta.items()}
    before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    around = RealSurroundings(iteration.learner.target)
    watched = Alive()
    try:
        with generators_kept(device), watched if device.type != "cuda" else contextlib.nullcontext():
            parts = iteration.matching(steps, tensors)
            if trained.phi:
                iteration.meta_gradient(steps, parts, theta, trained.row(), draws=True)
            else:
                iteration.real_gradient(steps, parts[0].batches[0])
    finally:
        around.put_back()
    beside = sum(p.numel() * p.element_size() for p in [*theta.values(), *trained.row()])  # both after the real step
    return beside + (torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else watched.peak)


def _shown(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{max(1, round(size / 2**20))} MiB"
