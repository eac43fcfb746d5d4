"""What an all-reduce takes: a model of links, and turns of real ones between processes of this machine.

The latencies are those that NCCL itself picks its algorithms by (NVIDIA/nccl, src/graph/tuning.cc at 01afd20,
`baseLat` and `hwLat`): a ring in the protocol Simple, a tree in LL128. The speeds are the links' own, in one direction:
NVLink 4 of an H100 or H200 (its data sheet: 900 GB/s both ways), eight InfiniBand NDR ports of a node of eight GPUs
(DGX H100's data sheet: 400 Gb/s each), one port of 100 Gb/s Ethernet a node. Real ones reach less, so that times of
transfer are floors.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, NamedTuple

import torch

NODE = 8  # GPUs
NVLINK = 450e9  # bytes a second of a GPU, in one direction
NETWORKS = {"8 x InfiniBand 400 Gb/s": 8 * 50e9, "100 GbE": 12.5e9}  # bytes a second of a node, in one direction


class Latency(NamedTuple):
    """Seconds: of a start, of a hop inside a node, of a hop between nodes."""

    start: float
    inside: float
    between: float


RING = Latency(8.4e-6, 3.4e-6, 9.6e-6)
TREE = Latency(4.4e-6, 1.2e-6, 8.5e-6)


@dataclass(frozen=True)
class AllReduce:
    """Of one tensor over `gpus`, in nodes of eight."""

    by: str  # "ring" or "tree"
    gpus: int
    network: float  # bytes a second of a node

    @property
    def latency(self) -> float:
        """Seconds that an empty one takes; none on one GPU."""
        nodes = math.ceil(self.gpus / NODE)
        if self.gpus == 1:
            return 0.0
        if self.by == "ring":
            between = 2 * (nodes - 1)
            return RING.start + (2 * (self.gpus - 1) - between) * RING.inside + between * RING.between
        inside = 2 * (min(self.gpus, NODE) - 1) * TREE.inside
        return TREE.start + inside + 2 * math.ceil(math.log2(nodes)) * TREE.between

    def wire(self, size: float) -> float:
        """Bytes that a GPU sends; in a tree on average about as many."""
        return 2 * (self.gpus - 1) / self.gpus * size

    def transfer(self, size: float) -> float:
        """Seconds that the slowest link takes for them."""
        return self.wire(size) / (NVLINK if self.gpus <= NODE else min(NVLINK, self.network))


# Measured


class Turn(NamedTuple):
    """Seconds of all-reduces, one after the other, of the slowest process; whether all sums were right."""

    seconds: float
    correct: bool


def turns(sizes: Sequence[Sequence[int]], processes: int, rounds: int) -> list[list[Turn]]:
    """Of each list of sizes (numbers of float32) the turns of its all-reduces between processes, by gloo."""
    import torch.multiprocessing as mp

    with TemporaryDirectory() as folder:
        mp.spawn(_rank, (processes, folder, sizes, rounds), nprocs=processes)
        ranks: list[list[list[Turn]]] = [torch.load(Path(folder) / str(rank)) for rank in range(processes)]
    return [
        [Turn(max(t[0] for t in turn), all(t[1] for t in turn)) for turn in zip(*of_ranks, strict=True)]
        for of_ranks in zip(*ranks, strict=True)
    ]


def join(rank: int, processes: int, folder: str) -> Any:
    """The process group of processes that share a folder."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    return dist.group.WORLD


def _rank(rank: int, processes: int, folder: str, sizes: Sequence[Sequence[int]], rounds: int) -> None:
    import torch.distributed as dist

    join(rank, processes, folder)
    tensors = [[torch.empty(size) for size in some] for some in sizes]
    found: list[list[tuple[float, bool]]] = [[] for _ in sizes]
    for i in range(1 + rounds):  # the first warms up
        for some, times in zip(tensors, found, strict=True):
            for tensor in some:
                tensor.fill_(rank + 1)
            dist.barrier()
            start = perf_counter()
            for tensor in some:
                dist.all_reduce(tensor)
            seconds = perf_counter() - start
            total = processes * (processes + 1) / 2
            if i:
                times.append((seconds, all(bool((tensor == total).all()) for tensor in some)))
    torch.save(found, Path(folder) / str(rank))
    dist.destroy_process_group()
