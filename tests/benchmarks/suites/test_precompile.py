"""What is compiled ahead is what launches ask for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# A driver that knows the GPU it would be, so that kernels compile as they would there.
SCRIPT = """
import pickle
from types import SimpleNamespace
from unittest import mock
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from benchmarks.suites import precompile
from l2t_fast.kernels import launch
from l2t_fast.kernels.layers import batch_norm_triton
from l2t_fast.kernels.matching import triton_launch
from l2t_fast.kernels.sgd import triton_kernels as sgd
from l2t_fast.kernels.sgd.rule import SGD

gpu = SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0, get_current_stream=lambda i: 0
)
driver.set_active(gpu)
launched = []

def note(found, kernel, grid, arguments, place, warps, stages=3):
    precompile._note(found, kernel, grid, arguments, place, warps, stages)
    launched.append((kernel, arguments, warps, stages))

def problem(channels, dtype=torch.float32):
    T = torch.empty(16, channels, 8, 8, dtype=dtype).contiguous(memory_format=torch.channels_last)
    c = torch.empty(channels)
    batch_norm_triton.adjoint(T, c, c, T, T, c, c, c, c, c, True)

found = {}
with (
    mock.patch.object(launch, "launch", lambda *args: note(found, *args)),
    mock.patch.object(launch, "device_properties", return_value=("sm_90", 132)),
):
    theta = [torch.empty(8, 4, 3, 3), torch.empty(9)[1:]]  # one that is not aligned
    sgd.step(theta, theta, theta, torch.empty((), dtype=torch.float64), SGD())
    assert len(found) == 1
    problem(64)
    three = len(found)
    problem(128)  # another size, the same kernels
    assert len(found) == three == 4, found
    problem(64, torch.bfloat16)
    assert len(found) == 6, found  # the coefficients are those of float32
    T, S = torch.empty(4, 16, 8, 8), torch.empty(4, 8, 4, 4)
    r, bias = torch.empty(8, 16, 1, 1), torch.empty(8)
    triton_launch.matching_distances([T], [S], [r], [bias], [0], [0])
    assert {one.kernel for one in found} >= {"step_kernel", "sums_kernel", "combine_kernel", "difference_kernel"}
hashes = set()
for one in pickle.loads(pickle.dumps(list(found))):
    made = precompile.compiled(one, torch.device("cpu"))
    hashes.add(getattr(made, "hash", None) or made.result().hash)
for kernel, arguments, warps, stages in launched:
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    made = kernel.warmup(**arguments, grid=(1,), **options)
    assert made.hash in hashes, kernel
assert len(hashes) >= 7, hashes
"""


@pytest.mark.core
@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_what_is_compiled_ahead_is_what_launches_find() -> None:
    """In a process of its own: here kernels may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
