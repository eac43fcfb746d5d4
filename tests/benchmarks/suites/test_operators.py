"""The suite of the matching operators says where a kernel has run out of registers."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.suites import operators
from benchmarks.suites.aot import ASIDE
from l2t_fast.kernels import launch


@pytest.mark.parametrize(
    ("kernels", "expected"),
    [
        ([(255, 0)], 0),
        ([(255, 2)], 8),
        ([(128, ASIDE // 4)], 0),
        ([(128, ASIDE // 4 + 1), (255, 1)], ASIDE + 4),
    ],
)
def test_spills(kernels: list[tuple[int, int]], expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes, of registers of 4; what the assembler puts aside while it has registers left does not count."""
    made = iter(SimpleNamespace(n_regs=registers, n_spills=spills) for registers, spills in kernels)
    monkeypatch.setattr(launch, "launch", lambda *arguments, **options: next(made))

    def call() -> Any:
        for _ in kernels:
            launch.launch(None, (1,), {}, torch.empty(1), warps=4)

    assert operators.spills(call) == expected
