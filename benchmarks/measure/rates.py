"""What the device can do at most, measured: bytes a second of a copy, FLOPs a second of a matrix product."""

from collections.abc import Callable, Sequence

import torch

from benchmarks.measure.timing import milliseconds

DTYPES = {
    "bf16": torch.bfloat16,
    "tf32": torch.float32,
    "fp32": torch.float32,
    "fp64": torch.float64,
}


def set_precision(precision: str) -> None:
    """Of float32 products, those of cuDNN's convolutions included."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def device_rates(precisions: Sequence[str], device: torch.device) -> dict[str, float]:
    """FLOPs a second of a large matrix product in each precision, and under "copy" the bytes a second of a copy."""
    measured = {precision: product_rate(precision, device) for precision in precisions}
    set_precision("fp32")
    return {**measured, "copy": copy_rate(device)}


def copy_rate(device: torch.device) -> float:
    """Bytes a second that a copy on the device reads and writes."""
    x = torch.randn(2**28 if device.type == "cuda" else 2**25, device=device)
    y = torch.empty_like(x)
    y.copy_(x)
    return 2e3 * x.nbytes / _fastest(lambda: y.copy_(x), device)


def product_rate(precision: str, device: torch.device) -> float:
    """FLOPs a second of a large matrix product."""
    set_precision(precision)
    n = 8192 if device.type == "cuda" else 1024
    x, y = (torch.randn(n, n, device=device).to(DTYPES[precision]) for _ in range(2))
    x @ y
    return 2e3 * n**3 / _fastest(lambda: x @ y, device)


def _fastest(call: Callable[[], object], device: torch.device) -> float:
    """Of what else a machine does, a rate of the device knows nothing."""
    return min(milliseconds({"": call}, 20, device)[""])
