"""Every Triton kernel compiles for every architecture, as the rules of the suite `aot` want it; no GPU needed."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.suites.aot import ASIDE, Binary

ROOT = Path(__file__).parents[3]
GOOD = Binary("sm_90", "quick", "bf16", "channels_last", "position gradient", 255, 0, 100_000, 36, 90, 0, 8)


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
        ({"shared": 300_000}, 1),
        ({"tensor": 0}, 1),
        ({"tensor": 0, "arithmetic": "ieee"}, 0),
        ({"wide": 0}, 1),
        ({"narrow": 1}, 1),
        ({"wide": 0, "narrow": 1, "layout": "contiguous"}, 0),
        ({"wide": 0, "narrow": 1, "tensor": 0, "shared": 300_000, "spills": 8}, 5),
    ],
    ids=str,
)
def test_rules_can_be_broken(change: dict, rules: int) -> None:
    assert len(dataclasses.replace(GOOD, **change).broken_rules()) == rules
