"""Every Triton kernel compiles for every architecture, as the rules of the suite `aot` want it; no GPU needed."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.suites.aot import ASIDE, Binary, resident, unrounded

ROOT = Path(__file__).parents[3]
GOOD = Binary(
    "sm_90", "quick", "bf16", "channels_last", "difference gradient products whole", 255, 0, 100_000, 1, 0, 36, 90, 0, 8
)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
@pytest.mark.parametrize("arch", [pytest.param("sm_90", marks=pytest.mark.core), "sm_80", "sm_100", "gfx942"])
def test_kernels_compile_ahead_of_time(arch: str) -> None:
    """In a process of its own: here kernels may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks", "aot", "--quick", "--arch", arch]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith(" kernels, 0 with a broken rule")


@pytest.mark.parametrize(
    ("change", "rules"),
    [
        ({}, 0),
        ({"spills": 8}, 1),
        ({"spills": ASIDE, "registers": 128}, 0),
        ({"spills": ASIDE + 8, "registers": 128}, 1),
        ({"resident": 0}, 1),
        ({"unrounded": 1}, 1),
        ({"tensor": 0}, 1),
        ({"tensor": 0, "arithmetic": "ieee"}, 0),
        ({"wide": 0}, 1),
        ({"narrow": 1}, 1),
        ({"wide": 0, "narrow": 1, "layout": "contiguous"}, 0),
        ({"wide": 0, "narrow": 1, "tensor": 0, "resident": 0, "spills": 8}, 5),
    ],
    ids=str,
)
def test_rules_can_be_broken(change: dict, rules: int) -> None:
    assert len(dataclasses.replace(GOOD, **change).broken_rules()) == rules


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "expected"),
    [
        ("sm_90", 128, 0, 8, 2),
        ("sm_90", 129, 0, 8, 1),
        ("sm_90", 255, 113 * 1024, 4, 2),
        ("sm_90", 32, 114 * 1024, 4, 1),
        ("sm_90", 32, 228 * 1024, 4, 0),
        ("sm_80", 16, 0, 4, 16),
        ("gfx942", 128, 0, 8, 2),
        ("gfx942", 256, 33 * 1024, 4, 1),
    ],
)
def test_programs_of_a_multiprocessor(arch: str, registers: int, shared: int, warps: int, expected: int) -> None:
    assert resident(arch, registers, shared, warps) == expected


def test_operands_that_are_cut() -> None:
    """Found through transpositions; a name may be used again."""
    ttir = """
      %x = tt.load %p : tensor<16x16x!tt.ptr<f32>>
      %y = tt.elementwise_inline_asm "cvt.rna.tf32.f32 $0, $1;" {pack = 1 : i32} %x : tensor<16x16xf32>
      %z = tt.trans %y {order = array<i32: 1, 0>} : tensor<16x16xf32> -> tensor<16x16xf32>
      %d = tt.dot %y, %z, %c, inputPrecision = tf32 : tensor<16x16xf32> * tensor<16x16xf32> -> tensor<16x16xf32>
      %z = tt.trans %x {order = array<i32: 1, 0>} : tensor<16x16xf32> -> tensor<16x16xf32>
      %e = tt.dot %x, %z, %d, inputPrecision = ieee : tensor<16x16xf32> * tensor<16x16xf32> -> tensor<16x16xf32>
    """
    assert unrounded(ttir) == 0
    assert unrounded(ttir.replace("ieee", "tf32")) == 2
