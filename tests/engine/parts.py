"""Engines on parts of batches, in several processes and in one, for the tests of ranks and micro-batches."""

import multiprocessing
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from l2t_fast import L2T, Engine
from tests.engine.shared import CLASSES, Batch, Tensors, randomise, source_net
from tests.shared import everything

STEPS = 3
Sizes = list[list[int]]  # of each rank, its micro-batches


def squares(outputs: Tensor, y: Tensor) -> Tensor:
    """A loss of which there is no accuracy."""
    return F.mse_loss(outputs, F.one_hot(y, CLASSES).to(outputs.dtype))


class Grouped(nn.BatchNorm2d):
    """BatchNorm of each part of the batch by itself, in plain PyTorch; running statistics are the parts' mean."""

    def __init__(self, channels: int, sizes: Sequence[int]) -> None:
        super().__init__(channels)
        self.sizes = list(sizes)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or len(input) != sum(self.sizes):
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        outputs, means, variances = [], [], []
        for x in input.split(self.sizes):
            mean, var = self.running_mean.clone(), self.running_var.clone()
            outputs.append(F.batch_norm(x, mean, var, self.weight, self.bias, True, 0.1, self.eps))
            means.append(mean * len(x) / len(input))
            variances.append(var * len(x) / len(input))
        self.running_mean.copy_(sum(means))  # type: ignore[arg-type]
        self.running_var.copy_(sum(variances))  # type: ignore[arg-type]
        self.num_batches_tracked.add_(1)
        return torch.cat(outputs)


@dataclass(frozen=True)
class Case:
    """A network and an engine, on a batch in parts."""

    norm: str  # "none", "batch", "sync"
    sizes: Sizes
    options: dict[str, Any] = field(default_factory=dict)
    side: int = 8
    grouped: bool = False  # a group of the vectors

    @property
    def parts(self) -> list[int]:
        return [n for rank in self.sizes for n in rank]

    def batch(self, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(sum(self.parts), 3, self.side, self.side, generator=generator, dtype=torch.float64)
        return x, torch.randint(CLASSES, (len(x),), generator=generator)

    def inputs(self, seed: int, rank: int | None) -> tuple[Any, Any, Any]:
        """Of `Engine.step`: this rank's part, or, for None, all."""

        def mine(batch: Batch) -> Batch:
            if rank is None:
                return batch
            x, y = (t.split([sum(n) for n in self.sizes])[rank] for t in batch)
            return x, y

        if self.options.get("scheme") != "simulation":
            return *mine(self.batch(seed)), None
        xs, ys = zip(*(mine(self.batch(seed + i)) for i in range(2)), strict=True)
        return xs, ys, mine(self.batch(seed + 9))

    def learner(self, *, joined: bool, seed: int = 0) -> L2T:
        """joined: the network with which one process computes the same on the whole batch."""

        def norm(channels: int) -> nn.Module:
            if self.norm == "none":
                return nn.Identity()
            if self.norm == "batch":
                return Grouped(channels, self.parts) if joined else nn.BatchNorm2d(channels)
            return nn.BatchNorm2d(channels) if joined else nn.SyncBatchNorm(channels)

        def block(c_in: int, c_out: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(c_in, c_out, 3, 2, 1), norm(c_out), nn.ReLU())

        torch.manual_seed(seed)
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES)]
        target = nn.Sequential(block(3, 5), block(5, 4), *head).double()
        example = torch.zeros(2, 3, self.side, self.side, dtype=torch.float64)
        layers = {"source_layers": ["0", "1"], "target_layers": ["0", "1"]}
        learner = L2T(source_net((2, 2)), target, example=example, **layers)
        randomise(learner)
        return learner

    def run(self, rank: int | None, group: Any = None, **more: Any) -> Tensors:
        """Numbers after some steps: state, metrics and a meta-gradient. Ranks begin with parameters of their own."""
        joined = rank is None and not more
        learner = self.learner(joined=joined, seed=rank or 0)
        options = {"lr": 0.05, "weight_decay": 1e-2, "meta_lr": 1e-2, "say": lambda text: None, **self.options, **more}
        if "optimizer" in options:
            del options["weight_decay"]
        if self.grouped:
            vectors = [p for p in learner.target.parameters() if p.dim() < 2]
            options["groups"] = [{"params": vectors, "lr": 0.02, "weight_decay": 0.0}]
        if rank is not None:
            options |= {"accumulate": len(self.sizes[rank]), "group": group}
        engine = Engine(learner, **options)
        found: Tensors = {}
        for step in range(STEPS):
            metrics = engine.step(*self.inputs(10 * step, rank))
            found |= {f"{name} of step {step}": value.clone() for name, value in metrics.items()}
        x, y, val = self.inputs(50, rank)
        found |= {f"gradient of {name}": g for name, g in engine.meta_gradient(x, y, val).items()}
        return found | everything(engine)


def _work(rank: int, count: int, store: str, function: Any, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=300)  # a busy machine is slow to start the others
    dist.init_process_group("gloo", f"file://{store}", timeout=limit, rank=rank, world_size=count)
    try:
        outcome = "gave", function(rank, dist.group.WORLD, *arguments)
    except Exception as error:
        outcome = "raised", (type(error).__name__, str(error))
    Path(f"{store}.{rank}").write_bytes(pickle.dumps(outcome))
    dist.destroy_process_group()


def in_processes(count: int, folder: Path, function: Any, *arguments: Any) -> list[tuple[str, Any]]:
    """What `function(rank, group, *arguments)` gave or raised in each of `count` processes."""
    context, store = multiprocessing.get_context("spawn"), folder / "store"
    processes = [
        context.Process(target=_work, args=(rank, count, str(store), function, arguments)) for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(360)
        process.kill()
    return [pickle.loads(Path(f"{store}.{rank}").read_bytes()) for rank in range(count)]


def run_all(rank: int, group: Any, cases: Sequence[Case]) -> tuple[list[Tensors], list[tuple[str, str]]]:
    """(what each case gave, what was raised where ranks had other settings, and where one of them failed)."""
    found = [case.run(rank, group) for case in cases]
    return found, [_raised(function, rank, group, cases[0]) for function in (_differ, _fail_on_one)]


def _raised(function: Any, *arguments: Any) -> tuple[str, str]:
    try:
        function(*arguments)
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def _fail_on_one(rank: int, group: Any, case: Case) -> None:
    """Rank 1 gets a label that there is not; the other hears of it when the process has ended."""
    engine = Engine(case.learner(joined=False), group=group, say=lambda text: None)
    x, y, _ = case.inputs(0, rank)
    for step in range(3):
        engine.step(x, y + CLASSES if rank == 1 and step == 1 else y)


def _differ(rank: int, group: Any, case: Case) -> None:
    Engine(case.learner(joined=False), group=group, lr=0.1 + rank, say=lambda text: None)
