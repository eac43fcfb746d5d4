"""What an iteration on CUDA launches and moves, counted without a GPU.

The engine runs on a CPU along the path of CUDA: Triton's kernels are noted instead of launched (their results are
whatever memory held), and what asks whether it is on CUDA is told so. An operation that is no view counts as one
launch, which reads what it is given and writes what it gives, once. cuDNN adds kernels of its own on a device, and
caches save some of the bytes. Launches do not depend on the batch, and bytes are affine in it: two small batches tell
those of any.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.cases import Case
from l2t_fast import Engine
from l2t_fast.engine.counts import FREE
from l2t_fast.kernels import launch
from l2t_fast.kernels.layers import batch_norm, convolution, max_pool, pending, twins
from l2t_fast.kernels.matching import ops, triton_launch
from l2t_fast.kernels.sgd import step as sgd

CPU = torch.device("cpu")
DEVICE = "sm_90", 132  # architecture and multiprocessors that the launches are planned for
SMALL = 2, 4  # batches


@dataclass
class Traffic:
    """Launches, and bytes read and written, by the name of the operation or kernel."""

    launches: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def note(self, name: str, values: Any) -> None:
        tensors = [t for t in tree_leaves(values) if isinstance(t, Tensor)]
        distinct = {(t.data_ptr(), t.numel()): t.numel() * t.element_size() for t in tensors}
        self.launches[name] += 1
        self.bytes[name] += sum(distinct.values())


def traffic(case: Case, precision: str) -> dict[str, int]:
    """Launches and bytes of an iteration, at the batch of the case."""
    few, more = (_counted(replace(case, batch=batch), precision) for batch in SMALL)
    bytes_few, bytes_more = few.bytes.total(), more.bytes.total()
    per_image = (bytes_more - bytes_few) / (SMALL[1] - SMALL[0])
    return {"launches": few.launches.total(), "bytes": round(bytes_few + (case.batch - SMALL[0]) * per_image)}


def _counted(case: Case, precision: Any) -> Traffic:
    learner = case.learner(CPU, torch.float32)
    x, y = case.images(0, CPU, torch.float32)
    found = Traffic()
    engine = Engine(learner, mode="eager", precision=precision, inner_steps=case.inner_steps)
    adam, phi = engine.trained.adam, list(engine.trained.phi.values())

    def step() -> None:  # one kernel on CUDA
        found.note("adam", [(p, p.grad, torch.empty(2, *p.shape)) for p in phi])

    with _as_on_cuda(found, precision), mock.patch.object(adam, "step", step), _Operations(found):
        engine.step(x, y)
    return found


@contextlib.contextmanager
def _as_on_cuda(found: Traffic, precision: str) -> Iterator[None]:
    def noted(kernel: Any, grid: Any, arguments: dict[str, Any], place: Tensor, warps: int, stages: int = 3) -> None:
        # What a flag keeps from being read, another argument stands in for, which counts once.
        found.note(kernel.fn.__name__, arguments)

    def statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        with torch.utils._python_dispatch._disable_current_modes():
            mean, rstd = x.new_zeros(x.shape[1], dtype=torch.float32), x.new_ones(x.shape[1], dtype=torch.float32)
        found.note("batch_norm_stats", (x, mean, rstd))
        return mean, rstd

    def dense(x: Tensor) -> bool:
        return type(x) is Tensor and launch.is_dense(x)

    def pools(x: Tensor, geometry: Any) -> bool:
        return precision != "fp32" and type(x) is Tensor

    matching = triton_launch if precision != "fp32" else ops.aten
    replaced = [
        *((module, "fused", dense) for module in (batch_norm, pending)),
        (batch_norm, "batch_statistics", statistics),
        (pending, "batch_statistics", statistics),
        (max_pool, "fused", pools),
        (sgd, "fused", lambda tensors: True),
        (convolution, "leaves_out_zero_sums", convolution.has_zero_sums),
        (convolution, "few_places", lambda g, w, groups: False),
        (twins, "plain_suffices", lambda x: False),
        (ops, "implementation", lambda feature: matching),
        (launch, "launch", noted),
        (launch, "device_properties", lambda device: DEVICE),
    ]
    with contextlib.ExitStack() as stack:
        for module, name, value in replaced:
            stack.enter_context(mock.patch.object(module, name, value))
        yield


class _Operations(TorchDispatchMode):
    """Notes what reaches ATen, but for the matching operators, whose own operations do."""

    def __init__(self, found: Traffic) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if not (func.is_view or name in FREE or func.namespace == "l2t" or name == "aten::detach"):
            self._found.note(name, (args, kwargs, result))
            if name in _TWO_PASSES:
                self._found.note(name, (args, kwargs))
        return result


# Two kernels on CUDA, each of which reads all.
_TWO_PASSES = {"aten::_native_batch_norm_legit", "aten::native_batch_norm_backward"}
