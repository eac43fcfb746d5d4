"""Counts that do not depend on noise: FLOPs, aten calls, launches, bytes kept for backward."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.utils.flop_counter import flop_registry

from l2t_fast.engine.memory import Alive


@dataclass(frozen=True)
class Counts:
    """Of one call."""

    flops: int  # as torch.utils.flop_counter counts: products of matrices and convolutions
    calls: int  # of aten and of the registered operators
    launches: int  # those that compute or write: a GPU gets a kernel for each, or a few
    saved_bytes: int  # alive at most where a loss has just been computed: what is kept for backward
    peak_bytes: int  # alive at most


def count(call: Callable[[], Any]) -> Counts:
    """Runs `call` and counts; what was alive before is left out. Tensors may be fake: shapes are enough."""
    with _Calls() as calls:
        call()
    return Counts(calls.flops, calls.calls, calls.launches, calls.saved, calls.peak)


class _Calls(Alive):
    """Sees every call below autograd, and every tensor that one makes until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.calls = self.launches = self.saved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        name = func._schema.name
        self.calls += 1
        if (flops := flop_registry.get(func.overloadpacket)) is not None:
            self.flops += flops(*args, **(kwargs or {}), out_val=result)
        self.launches += not (func.is_view or name in FREE)
        if name == "aten::nll_loss_forward":
            self.saved = max(self.saved, self.alive)
        return result


FREE = {
    "prim::device",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
}
