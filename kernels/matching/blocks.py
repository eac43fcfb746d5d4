"""Block sizes of the Triton kernel, pinned for each architecture.

Those of sm_90 were measured on an H200; the others are what the assembler keeps in registers and shared memory
(`python -m benchmarks aot`). `python -m benchmarks tune` looks for better ones, on request only: tuning behind a
user's back would stall the first step and break graph capture.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Blocks:
    """Of a program.

    Attributes:
        positions: of its tile.
        channels: source channels of its tile at most.
        step: target channels at a time.
        warps, stages: of its threads; stages of its software pipeline.
    """

    positions: int
    channels: int
    step: int
    warps: int
    stages: int


# Of (adjoint, arithmetic); "ieee" is fp32 without tensor cores.
Table = dict[tuple[bool, str], Blocks]

_HOPPER: Table = {
    (False, "bf16"): Blocks(128, 64, 64, warps=8, stages=2),
    (True, "bf16"): Blocks(64, 64, 64, warps=4, stages=3),
    (False, "tf32"): Blocks(64, 32, 32, warps=4, stages=3),
    (True, "tf32"): Blocks(64, 32, 32, warps=4, stages=3),
    (False, "ieee"): Blocks(64, 16, 16, warps=8, stages=1),
    (True, "ieee"): Blocks(64, 16, 16, warps=8, stages=1),
}
# Triton's interpreter: small blocks, so that small shapes have several of each.
_INTERPRETER: Table = {key: Blocks(16, 32, 32, warps=1, stages=1) for key in _HOPPER}

BLOCKS: dict[str, Table] = {
    "sm_80": _HOPPER,
    "sm_90": _HOPPER,
    "sm_100": _HOPPER,
    "gfx942": {key: Blocks(64, 32, 32, warps=4, stages=1) for key in _HOPPER},
    "interpreter": _INTERPRETER,
}


def table(arch: str) -> Table:
    """The pinned blocks; of an unknown architecture, those of the one with the least shared memory."""
    return BLOCKS.get(arch, BLOCKS["gfx942"])


def blocks_of(arch: str, dtype: torch.dtype, precision: str, adjoint: bool) -> Blocks:
    """For features of `dtype`; precision: of float32 products, "tf32" or "ieee"."""
    return table(arch)[adjoint, "bf16" if dtype == torch.bfloat16 else precision]
