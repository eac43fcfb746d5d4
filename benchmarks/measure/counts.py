"""Counts that do not depend on noise: FLOPs, aten calls, launches, bytes kept for backward."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Counts:
    """Of one call."""

    flops: int  # as torch.utils.flop_counter counts: products of matrices and convolutions
    calls: int  # of aten and of the registered operators
    launches: int  # those that compute or write: a GPU gets a kernel for each, or a few
    saved_bytes: int  # alive at most where a loss has just been computed: what is kept for backward
    peak_bytes: int  # alive at most


def count(call: Callable[[], Any]) -> Counts:
    """Runs `call` twice (the counter of FLOPs keeps tensors alive) and counts; what was alive before is left out."""
    with FlopCounterMode(display=False) as flops:
        call()
    with _Calls() as calls:
        call()
    return Counts(flops.get_total_flops(), calls.calls, calls.launches, calls.saved, calls.peak)


class _Calls(TorchDispatchMode):
    """Sees every call below autograd, and every tensor that one makes until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.launches = self.alive = self.saved = self.peak = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        self.calls += 1
        self.launches += not (func.is_view or name in FREE)
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._watch(value.untyped_storage())
        self.peak = max(self.peak, self.alive)
        if name == "aten::nll_loss_forward":
            self.saved = max(self.saved, self.alive)
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


FREE = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}
