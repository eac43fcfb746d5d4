"""Settings of the whole suite."""

import os
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch

from tests.limits import limited

# Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before triton is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Many small tests: threads that wait for each other cost more than they bring, and one thread sums in one order.
torch.set_num_threads(1)

_BACKENDS: Any = torch.backends
_NEWER = [
    *(_BACKENDS, _BACKENDS.cudnn, _BACKENDS.cuda.matmul),
    *(_BACKENDS.mkldnn.matmul, _BACKENDS.cudnn.conv, _BACKENDS.cudnn.rnn),
]
_DEFAULTS = [switch.fp32_precision for switch in _NEWER]


@pytest.fixture(autouse=True)
def default_arithmetic() -> Iterator[None]:
    """PyTorch's switches for float32 belong to the process: what a test leaves of them must not meet the next one."""
    yield
    torch.set_float32_matmul_precision("highest")
    _BACKENDS.cudnn.allow_tf32 = True
    for switch, value in zip(_NEWER, _DEFAULTS, strict=True):
        switch.fp32_precision = value


@pytest.hookimpl(wrapper=True)
def _limited() -> Generator[None, object, object]:
    with limited():
        return (yield)


pytest_runtest_setup = pytest_runtest_call = pytest_runtest_teardown = _limited
