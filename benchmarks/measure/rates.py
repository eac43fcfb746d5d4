"""What the device can do at most, measured: bytes a second of a copy, FLOPs a second of products and convolutions."""

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from benchmarks.measure.timing import milliseconds
from benchmarks.rows import Row

DTYPES = {
    "bf16": torch.bfloat16,
    "tf32": torch.float32,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
LAYOUTS = (torch.contiguous_format, torch.channels_last)
ROUNDS = 20
# Batch, channels, pixels along a side, of 3x3 convolutions: as large as the layers of the cases, and larger.
CONVOLUTIONS = {"cuda": ((64, 256, 56), (128, 512, 28)), "cpu": ((16, 64, 32), (16, 512, 8))}


def set_precision(precision: str) -> None:
    """Of float32 products, those of cuDNN's convolutions included."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def device_rates(precisions: Sequence[str], device: torch.device) -> dict[str, float]:
    """The most FLOPs a second in each precision, and under "copy" the bytes a second of a copy.

    Of products and of convolutions, whichever is faster: a floor that one kind of work runs below is none.
    """
    measured = {p: max(product_rate(p, device), convolution_rate(p, device)) for p in precisions}
    set_precision("fp32")
    return {**measured, "copy": copy_rate(device)}


def rates_row(rates: dict[str, float]) -> Row:
    """What a results file says of them."""
    return {"kind": "rates", "of": "the faster of products and convolutions", "rates": rates}


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


@torch.no_grad()
def convolution_rate(precision: str, device: torch.device) -> float:
    """FLOPs a second of the fastest of some large convolutions, in either layout."""
    set_precision(precision)
    rates = []
    with torch.backends.cudnn.flags(benchmark=True, allow_tf32=precision == "tf32"):
        for (batch, channels, side), layout in itertools.product(CONVOLUTIONS[device.type], LAYOUTS):
            x, w = (
                torch.randn(shape, device=device).to(DTYPES[precision], memory_format=layout)
                for shape in ((batch, channels, side, side), (channels, channels, 3, 3))
            )

            def convolve(x: torch.Tensor = x, w: torch.Tensor = w) -> torch.Tensor:
                return F.conv2d(x, w, padding=1)

            convolve()
            rates.append(2e3 * x.numel() * w[0].numel() / _fastest(convolve, device))
    return max(rates)


def _fastest(call: Callable[[], object], device: torch.device) -> float:
    """Of what else a machine does, a rate of the device knows nothing."""
    return min(milliseconds({"": call}, ROUNDS, device)[""])
