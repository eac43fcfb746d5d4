"""Compiles every Triton kernel ahead of time, for every architecture with pinned blocks; needs no GPU.

    python -m benchmarks aot            the shapes of the cases cifar and imagenet; minutes
    python -m benchmarks aot --quick    one small case with every kind of layer; what CI runs

prints a row a kernel and keeps it in `benchmarks/results/aot.jsonl` (`--output`): registers, spills and shared memory
as the assembler reports them, the programs that a multiprocessor holds by that, and the instructions that decide the
speed. The inputs have the dtypes that an engine gives them. Ends with an error where a rule is broken: each kernel must
compile, not run out of registers, stay within the architecture's shared memory, use its tensor cores for bf16 and tf32
(wgmma on Hopper), round the operands of tf32, and read what is contiguous in channels 16 bytes at a time.
"""

import argparse
import concurrent.futures
import contextlib
import itertools
import json
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.rows import RESULTS
from benchmarks.shapes import MATCHING_SHAPES
from l2t_fast.kernels import launch
from l2t_fast.kernels.layers import batch_norm_kernels, batch_norm_triton, max_pool_triton
from l2t_fast.kernels.matching import triton_launch
from l2t_fast.kernels.sgd import triton_kernels as sgd
from l2t_fast.kernels.sgd.rule import SGD

# Target, KiB of shared memory of a multiprocessor (CUDA programming guide; CDNA3 ISA), tensor-core instruction.
ARCHITECTURES = {
    "sm_80": (GPUTarget("cuda", 80, 32), 164, "mma.sync"),
    "sm_90": (GPUTarget("cuda", 90, 32), 228, "wgmma.mma_async"),
    "sm_100": (GPUTarget("cuda", 100, 32), 228, "tcgen05.mma"),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64, "v_mfma"),
}
RESERVED = 1024  # bytes of shared memory that CUDA keeps of each program
ASIDE = 32  # bytes that the assembler may put aside for more threads at a time, while it has registers left
ARITHMETIC = {"bf16": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32}
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}

POOLINGS = [((2, 2), (2, 2), (0, 0), (1, 1), False), ((3, 3), (2, 2), (1, 1), (1, 1), False)]  # of VGG and of ResNet


@dataclass(frozen=True)
class Binary:
    """What became of one kernel. Instructions are counted in the code, not as executed."""

    arch: str
    case: str
    arithmetic: str
    layout: str
    kernel: str
    registers: int
    spills: int  # bytes of a thread's stack (NVIDIA), registers (AMD)
    shared: int  # bytes
    resident: int  # programs that a multiprocessor holds at a time
    unrounded: int  # operands of tf32 products that are cut off
    tensor: int  # tensor-core instructions
    wide: int  # 16-byte loads and asynchronous copies from global memory
    narrow: int  # loads of single 2-byte elements
    wide_stores: int

    def broken_rules(self) -> list[str]:
        """What is wrong with it, one sentence each."""
        _, _, instruction = ARCHITECTURES[self.arch]
        channels_last = self.layout == "channels_last"
        products = self.kernel.startswith("difference") and self.arithmetic != "ieee"
        # SGD goes through parameters as they lie in memory, whatever the features' layout.
        flat, small = self.kernel.startswith("sgd"), self.kernel.startswith(("norm coefficients", "norm running"))
        tiles = channels_last and not small and (products or self.kernel.startswith(("norm", "max pool")))
        checks = {
            f"it spills {self.spills}": self.spills > (ASIDE if self.registers < 255 else 0),
            f"{self.shared} bytes of shared memory are too many": self.resident == 0,
            f"it cuts {self.unrounded} operands": self.unrounded > 0,
            f"it has no {instruction}": self.tensor == 0 and products,
            "it has no 16-byte loads": self.wide == 0 and (flat or tiles),
            f"it has {self.narrow} narrow loads": self.narrow > 0 and tiles,
        }  # fmt: skip
        return [rule for rule, broken in checks.items() if broken]


@dataclass(frozen=True)
class Kernel:
    """One launch of an operator, on tensors without data."""

    name: str
    function: Any
    arguments: dict[str, Any]  # constants included
    options: dict[str, Any]


@contextlib.contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Chooses their arithmetic, as a user does, and puts back what was there."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def kernels(case: str, arithmetic: str, layout: str, arch: str) -> list[Kernel]:
    """All kernels that the operators launch, each once."""
    dtype = ARITHMETIC[arithmetic]
    batch, sources, targets = MATCHING_SHAPES[case]
    pairs = list(itertools.product(range(len(sources)), range(len(targets))))

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    # θ is float32, and so are the cotangents of its gradient.
    T = [empty(batch, *shape).to(memory_format=LAYOUTS[layout]) for shape in targets]
    S = [empty(batch, *shape).to(memory_format=LAYOUTS[layout]) for shape in sources]
    r = [empty(sources[m][0], targets[n][0], 1, 1, dtype=torch.float32) for m, n in pairs]
    bias = [empty(sources[m][0], dtype=torch.float32) for m, _ in pairs]
    a = [empty(batch, sources[m][0], dtype=torch.float32) for m, _ in pairs]
    indices = [m for m, _ in pairs], [n for _, n in pairs]
    launched: dict[str, Kernel] = {}

    def record(
        function: Any, grid: tuple[int, ...], arguments: dict[str, Any], place: Tensor, warps: int, stages: int = 3
    ) -> None:
        part = function.__name__.removesuffix("_kernel")
        if function.fn.__module__ == sgd.__name__:
            name = f"sgd {part}"
        elif function.fn.__module__ == batch_norm_kernels.__name__:
            flags = [flag.lower() for flag in ("FIRST", "ADDEND", "ALSO", "PLUS") if arguments.get(flag)]
            name = " ".join([f"norm {part}", *flags, *["", "relu by x", "relu by y"][arguments.get("MASK", 0) :][:1]])
            name = f"{name.strip()}{' of a variance' if arguments.get('EPS') and 'ADDEND' in arguments else ''}"
        elif function.fn.__module__ == max_pool_triton.__name__:
            name = f"{part.replace('_', ' ')} {arguments['KH']} at {arguments['SH']}"
        else:
            words = [part, "adjoint" if arguments["ADJOINT"] else "gradient"]
            name = " ".join([*words, *(flag.lower() for flag in ("PRODUCTS", "SUMS", "WHOLE") if arguments[flag])])
        options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
        launched[name] = Kernel(name, function, arguments, options)

    with (
        float32_products(tf32=arithmetic == "tf32"),
        mock.patch.object(launch, "launch", record),
        mock.patch.object(launch, "device_properties", return_value=(arch, 132)),
    ):
        channel = empty(T[0].shape[1], dtype=torch.float32)
        of_x = (T[0], *[channel] * 3)
        batch_norm_triton.forward(T[0], *[channel] * 4, T[0], True)
        batch_norm_triton.forward(T[0], *[channel] * 4, T[0], True, 1e-5)
        tracked = empty(dtype=torch.int64)
        batch_norm_triton.track(T[0], channel, channel, 1e-5, channel, channel, tracked, 0.1)
        for mask in (None, (channel, None), (channel, T[0])):
            passed = mask is not None and mask[1] is not None
            batch_norm_triton.gradient(T[0], *of_x, mask, T[0], passed)
            batch_norm_triton.gradient(T[0], *of_x, mask, T[0], passed, channel, T[0])
            u_passed = None if mask is None else mask[1]
            for also in (None, T[0]):
                us = (T[0], channel, channel, T[0], *of_x, channel, channel)
                batch_norm_triton.adjoint(*us, True, mask, u_passed, also)
        if layout == "channels_last":  # what the matching operators make of any features; ATen pools what is contiguous
            triton_launch.matching_distances(T, S, r, bias, *indices)
            triton_launch.matching_gradient(T, S, r, bias, a, *indices, True)
            triton_launch.matching_gradient(T, S, r, bias, a, *indices, False)
            triton_launch.matching_adjoint(T, S, r, bias, a, T, r, bias, *indices, True)
            triton_launch.matching_adjoint(T, S, r, bias, a, T, r, bias, *indices, False)
            for geometry in POOLINGS:
                _, places = max_pool_triton.forward(T[0], geometry)
                max_pool_triton.backward(max_pool_triton.adjoint(T[0], places, geometry), T[0], places, geometry)
            theta = [empty(64, 64, 3, 3, dtype=torch.float32)] * 8
            lr = empty(dtype=torch.float64)
            sgd.step(theta, theta, [p.to(dtype) for p in theta], lr, SGD())
            sgd.adjoint(theta, theta, [dtype] * 8, lr, SGD())
    return list(launched.values())


def compiled(kernel: Kernel, arch: str) -> Any:
    """The kernel as Triton's launcher would compile it: every pointer aligned to 16 bytes."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    aligned = [["tt.divisibility", 16]]
    for i, name in enumerate(kernel.function.arg_names):
        argument = kernel.arguments[name]
        if isinstance(argument, Tensor):
            signature[name], attributes[i,] = POINTERS[argument.dtype], aligned
        elif isinstance(argument, tuple) and isinstance(argument[0], Tensor):
            signature[name] = tuple(POINTERS[t.dtype] for t in argument)
            attributes |= {(i, j): aligned for j in range(len(argument))}
        elif kernel.function.params[i].is_constexpr:
            signature[name], constants[i,] = "constexpr", argument
        else:
            signature[name] = "i32"
            if argument % 16 == 0:
                attributes[i,] = aligned
    source = ASTSource(kernel.function, signature, constants, attributes)
    return triton.compile(source, target=ARCHITECTURES[arch][0], options=kernel.options)


def binary(arch: str, case: str, arithmetic: str, layout: str, kernel: Kernel) -> Binary:
    """Compiles a kernel and reads its resources and instructions."""
    made = compiled(kernel, arch)
    amd = arch.startswith("gfx")
    shared, instruction = made.metadata.shared, ARCHITECTURES[arch][2]
    counts = (_amd if amd else _nvidia)(made.asm, instruction)
    return Binary(
        arch,
        case,
        arithmetic,
        layout,
        kernel.name,
        shared=shared,
        resident=resident(arch, counts["registers"], shared, made.metadata.num_warps),
        unrounded=0 if amd else unrounded(made.asm["ttir"]),
        **counts,
    )


def resident(arch: str, registers: int, shared: int, warps: int) -> int:
    """Programs that a multiprocessor holds at a time."""
    memory = ARCHITECTURES[arch][1] * 1024
    if arch.startswith("gfx"):  # four SIMDs, of 512 registers a lane and eight wavefronts at most
        fit = 4 * min(8, 512 // (-(-registers // 8) * 8)) // warps
        return min(fit, memory // max(shared, 1))
    fit = min(64, 65536 // (-(-registers // 8) * 8 * 32)) // warps
    return min(fit, 32, memory // (shared + RESERVED))


def unrounded(ttir: str) -> int:
    """Operands of TF32 products that come from elsewhere than the rounding, transposed or not."""
    made: dict[str, tuple[str, str]] = {}  # value -> (operation, its first operand), as last defined
    count = 0
    for name, operation, operands in re.findall(r"(%\w+) = ([\w.]+) ([^\n]*)", ttir):
        values = re.findall(r"%\w+", operands)
        made[name] = operation, values[0] if values else ""
        if operation == "tt.dot" and "inputPrecision = tf32" in operands:
            for value in values[:2]:
                while made.get(value, ("", ""))[0] == "tt.trans":
                    value = made[value][1]
                count += made.get(value, ("", ""))[0] != "tt.elementwise_inline_asm"
    return count


def _nvidia(asm: dict[str, Any], instruction: str) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    ptx = asm["ptx"]
    copies = [int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (0x\w+|\d+),", ptx)]
    return {
        "registers": int(registers),
        "spills": int(stack),
        "tensor": ptx.count(instruction),
        "wide": copies.count(16) + len(re.findall(r"ld\.global\S*\.(?:v4\.b32|v2\.b64)", ptx)),
        "narrow": len(re.findall(r"ld\.global\S*\.b16", ptx)),
        "wide_stores": len(re.findall(r"st\.global\S*\.(?:v4\.b32|v2\.b64)", ptx)),
    }


def _amd(asm: dict[str, Any], instruction: str) -> dict[str, int]:
    code = asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", code).group(1))  # type: ignore[union-attr]

    return {
        "registers": field("vgpr_count"),
        "spills": field("vgpr_spill_count"),
        "tensor": code.count(instruction),
        "wide": len(re.findall(r"(?:global|buffer)_load_dwordx4", code)),
        "narrow": len(re.findall(r"(?:global|buffer)_load_(?:ushort|short)", code)),
        "wide_stores": len(re.findall(r"(?:global|buffer)_store_dwordx4", code)),
    }


def binaries(job: tuple[str, str, str, str]) -> list[Binary]:
    """All kernels of one (arch, case, arithmetic, layout)."""
    arch, case, arithmetic, layout = job
    return [binary(*job, kernel) for kernel in kernels(case, arithmetic, layout, arch)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="one small case instead of cifar and imagenet")
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument(
        "--output", type=Path, help="where the rows go (default: kept in benchmarks/results, not if quick)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Whether any kernel breaks a rule."""
    kinds = list(itertools.product(ARITHMETIC, LAYOUTS))
    cases = ["quick"] if arguments.quick else ["cifar", "imagenet"]
    jobs = [(arch, case, *kind) for arch in arguments.arch for case in cases for kind in kinds]
    output = arguments.output or (None if arguments.quick else RESULTS / "aot.jsonl")
    lines, broken = [], 0
    with concurrent.futures.ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as pool:
        for found in itertools.chain.from_iterable(pool.map(binaries, jobs)):
            rules = found.broken_rules()
            broken += bool(rules)
            lines.append(json.dumps({**asdict(found), "triton": triton.__version__, "torch": torch.__version__}))
            print(
                f"{found.arch:7}{found.case:9}{found.arithmetic:5}{found.layout:14}{found.kernel:40}"
                f"{found.registers:4} registers {found.spills:4} spilled {found.shared // 1024:4} KiB shared "
                f"{found.resident:3} resident "
                f"{found.tensor:4} tensor {found.wide:4} wide {found.narrow:4} narrow  {'; '.join(rules)}",
                flush=True,
            )
    if output is not None:
        output.write_text("\n".join(lines) + "\n")
    print(f"{len(lines)} kernels, {broken} with a broken rule")
    return broken > 0
