"""Block sizes of the Triton kernels, pinned for each architecture.

They are what the assembler keeps in registers and shared memory (`python -m benchmarks aot`); no GPU has
timed them yet. `python -m benchmarks tune` looks for better ones, on request only: tuning behind a
user's back would stall the first step and break graph capture.
"""

from dataclasses import dataclass
from typing import Literal

import torch

Kernel = Literal["position", "channel"]


@dataclass(frozen=True)
class Config:
    """Blocks of one kernel.

    Attributes:
        chunk: target channels of a program's result at most.
        tile: positions x chunk at most.
        positions: positions of a tile at most.
        channels: source channels of a block at most.
        step: target channels at a time, of products over more than `chunk`.
        warps, stages: of a program; stages of its software pipeline.
        waves: channel programs for each multiprocessor, where splitting the samples can make them.
    """

    chunk: int
    tile: int
    positions: int
    channels: int
    step: int
    warps: int
    stages: int
    waves: int = 2

    def positions_of(self, chunk: int) -> int:
        """Positions of a tile of `chunk` channels."""
        return max(16, min(self.positions, self.tile // chunk))


# Of (kernel, adjoint, arithmetic): "bf16" and "tf32" where all features are channels_last, "scattered" where not,
# because then every element that is gathered needs an address of its own; "ieee" is fp32 without tensor cores.
Table = dict[tuple[Kernel, bool, str], Config]

_HOPPER: Table = {
    ("position", False, "bf16"): Config(256, 64 * 256, 128, 64, 64, warps=8, stages=2),
    ("position", True, "bf16"): Config(128, 128 * 128, 128, 32, 64, warps=8, stages=2),
    ("channel", False, "bf16"): Config(128, 64 * 128, 64, 32, 64, warps=4, stages=3),
    ("channel", True, "bf16"): Config(128, 64 * 128, 64, 32, 64, warps=8, stages=2),
    ("position", False, "tf32"): Config(128, 64 * 128, 64, 32, 32, warps=8, stages=2),
    ("position", True, "tf32"): Config(64, 64 * 64, 64, 16, 32, warps=4, stages=2),
    ("channel", False, "tf32"): Config(128, 64 * 128, 64, 32, 32, warps=8, stages=1),
    ("channel", True, "tf32"): Config(64, 64 * 64, 64, 16, 32, warps=8, stages=1),
    ("position", False, "scattered"): Config(64, 64 * 64, 64, 32, 64, warps=8, stages=1),
    ("position", True, "scattered"): Config(64, 64 * 64, 64, 16, 64, warps=8, stages=1),
    ("channel", False, "scattered"): Config(64, 64 * 64, 64, 32, 64, warps=8, stages=1),
    ("channel", True, "scattered"): Config(32, 64 * 32, 64, 16, 32, warps=8, stages=1),
    ("position", False, "ieee"): Config(16, 64 * 16, 64, 16, 16, warps=8, stages=1),
    ("position", True, "ieee"): Config(16, 32 * 16, 32, 16, 16, warps=4, stages=1),
    ("channel", False, "ieee"): Config(16, 64 * 16, 64, 16, 16, warps=8, stages=1),
    ("channel", True, "ieee"): Config(16, 64 * 16, 64, 16, 16, warps=8, stages=1),
}
_AMPERE: Table = {
    **_HOPPER,
    ("position", False, "tf32"): Config(64, 64 * 64, 64, 32, 32, warps=4, stages=2),
    ("channel", False, "tf32"): Config(64, 64 * 64, 64, 32, 32, warps=8, stages=1),
    ("position", False, "bf16"): Config(128, 64 * 128, 64, 32, 64, warps=4, stages=2),
    ("position", True, "bf16"): Config(64, 64 * 64, 64, 16, 64, warps=4, stages=2),
    ("channel", True, "bf16"): Config(64, 64 * 64, 64, 16, 64, warps=4, stages=2),
    ("channel", True, "tf32"): Config(32, 64 * 32, 64, 16, 32, warps=8, stages=2),
    ("position", False, "scattered"): Config(64, 64 * 64, 64, 16, 64, warps=8, stages=1),
    ("position", True, "scattered"): Config(64, 64 * 64, 64, 16, 32, warps=4, stages=2),
    ("channel", False, "scattered"): Config(64, 64 * 64, 64, 16, 64, warps=8, stages=1),
    ("channel", True, "scattered"): Config(64, 64 * 64, 64, 16, 32, warps=8, stages=2),
    ("position", False, "ieee"): Config(16, 32 * 16, 32, 16, 16, warps=4, stages=1),
}
_BLACKWELL: Table = {
    **_HOPPER,
    ("channel", True, "bf16"): Config(64, 64 * 64, 64, 32, 64, warps=4, stages=2),
    ("channel", False, "tf32"): Config(64, 64 * 64, 64, 32, 32, warps=8, stages=1),
    ("position", False, "bf16"): Config(128, 64 * 128, 64, 32, 64, warps=4, stages=2),
    ("position", False, "tf32"): Config(64, 64 * 64, 64, 16, 32, warps=4, stages=2),
    ("position", True, "scattered"): Config(32, 64 * 32, 64, 16, 32, warps=4, stages=1),
    ("channel", True, "scattered"): Config(64, 64 * 64, 64, 16, 64, warps=8, stages=1),
    ("channel", True, "ieee"): Config(16, 32 * 16, 32, 16, 16, warps=4, stages=1),
}
_CDNA3: Table = {
    **_HOPPER,
    ("channel", True, "bf16"): Config(64, 64 * 64, 64, 32, 64, warps=4, stages=2),
    ("position", False, "tf32"): Config(64, 64 * 64, 64, 32, 32, warps=4, stages=2),
    ("position", False, "bf16"): Config(64, 64 * 64, 64, 32, 64, warps=4, stages=1),
    ("position", True, "bf16"): Config(64, 64 * 64, 64, 16, 64, warps=4, stages=1),
    ("channel", False, "tf32"): Config(64, 64 * 64, 64, 16, 32, warps=8, stages=1),
    ("channel", False, "scattered"): Config(32, 64 * 32, 64, 16, 32, warps=8, stages=1),
}
# Triton's interpreter: small blocks, so that small shapes have several of each.
_INTERPRETER: Table = {key: Config(64, 32 * 64, 64, 32, 32, warps=1, stages=1, waves=1) for key in _HOPPER}

CONFIGS: dict[str, Table] = {
    "sm_80": _AMPERE,
    "sm_90": _HOPPER,
    "sm_100": _BLACKWELL,
    "gfx942": _CDNA3,
    "interpreter": _INTERPRETER,
}


def table(arch: str) -> Table:
    """The pinned blocks; of an unknown architecture, those of the one with the least shared memory."""
    return CONFIGS.get(arch, CONFIGS["gfx942"])


def config(arch: str, dtype: torch.dtype, precision: str, channels_last: bool, kernel: Kernel, adjoint: bool) -> Config:
    """The blocks of one kernel."""
    if dtype == torch.bfloat16:
        arithmetic = "bf16" if channels_last else "scattered"
    elif precision == "tf32":
        arithmetic = "tf32" if channels_last else "scattered"
    else:
        arithmetic = "ieee"
    return table(arch)[kernel, adjoint, arithmetic]
