"""The Triton operators against those in ATen: on a GPU, or in Triton's interpreter where there is none."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map_only
from triton.runtime import interpreter

from benchmarks.shapes import MATCHING_SHAPES
from l2t_fast.kernels.matching import aten as torch_impl
from l2t_fast.kernels.matching import blocks as configs
from l2t_fast.kernels.matching import ops, plan
from l2t_fast.kernels.matching import triton_launch as triton_impl
from tests.kernels.matching_cases import CASES, flat, random_inputs

pytestmark = pytest.mark.core

INTERPRETED = not torch.cuda.is_available()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
EXACT = torch.float64 if INTERPRETED else torch.float32  # on a GPU float64 goes to ATen
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}[EXACT]  # of the largest element

# Several sources x several targets, in no order, one pair twice, one target layer unpaired.
MANY = (
    [(3, 2, 2), (5, 8, 8), (2, 4, 4)],
    [(4, 4, 4), (3, 2, 2), (2, 1, 1), (6, 3, 5)],
    [(1, 2), (0, 3), (2, 0), (1, 0), (2, 2), (0, 0), (1, 0), (2, 3)],
)
SHAPES = {
    **CASES,
    "many pairs": MANY,
    "two source networks": ([(3, 4, 4), (5, 2, 2)] * 2, [(4, 4, 4), (6, 2, 2)], [(0, 0), (1, 1), (2, 0), (3, 1)]),
    "3 channels, up by 2": ([(17, 7, 7)], [(3, 14, 14)], [(0, 0)]),
    "17 channels, down by 2": ([(3, 14, 14)], [(17, 7, 7)], [(0, 0)]),
    "64 channels, up by 7/3": ([(64, 3, 3)], [(64, 7, 7)], [(0, 0)]),
    "65 channels, down by 7/3": ([(17, 7, 7)], [(65, 3, 3)], [(0, 0)]),
    "65 channels, up by 2": ([(65, 1, 1)], [(65, 2, 2)], [(0, 0)]),
    "1 x 1, down by 4": ([(17, 4, 4)], [(64, 1, 1)], [(0, 0)]),
    "one side the same": ([(3, 4, 8), (2, 8, 4)], [(3, 4, 4)], [(0, 0), (1, 0)]),
    "up by 4 and down by 2": ([(3, 2, 8)], [(3, 8, 4)], [(0, 0)]),
}
# The same numbers in other strides.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "sliced channels last": lambda x: LAYOUTS["channels last"](torch.cat([x, x], 3))[..., : x.shape[3]],
}


def problem(
    shapes: tuple, batch: int = 3, seed: int = 0, features: torch.dtype = EXACT, parameters: torch.dtype | None = None
) -> tuple[list, list]:
    """(inputs, u): features of one dtype, all else of another; u = (u_T, u_r, u_bias) is a second draw of the same."""
    dtypes = [features, features, *[parameters or features] * 3]

    def draw(seed: int) -> list:
        *lists, source_of, target_of = random_inputs(*shapes, batch, seed)
        cast = [[x.to(DEVICE, dtype) for x in tensors] for tensors, dtype in zip(lists, dtypes, strict=True)]
        return [*cast, source_of, target_of]

    u_T, _, u_r, u_bias, *_ = draw(seed + 1000)
    return draw(seed), [u_T, u_r, u_bias]


def laid_out(inputs: list, targets: Sequence[str], sources: Sequence[str]) -> list:
    """`inputs` with these layouts of the targets and of the sources in turn."""
    T = [LAYOUTS[layout](t) for t, layout in zip(inputs[0], itertools.cycle(targets), strict=False)]
    S = [LAYOUTS[layout](s) for s, layout in zip(inputs[1], itertools.cycle(sources), strict=False)]
    return [T, S, *inputs[2:]]


def gradient_and_adjoint(implementation: Any, inputs: list, u: list) -> tuple[Tensor, ...]:
    """(E..., g_T..., g_r..., g_bias..., v_T..., v_r..., v_bias..., v_a...)."""
    gradient = implementation.matching_gradient(*inputs, True)
    return flat((*gradient, *implementation.matching_adjoint(*inputs[:5], *u, *inputs[5:], True)))


def in_float64(inputs: list, u: list) -> tuple[Tensor, ...]:
    return gradient_and_adjoint(torch_impl, *tree_map_only(Tensor, Tensor.double, (inputs, u)))


def assert_same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for x, y in zip(ours, theirs, strict=True):
        assert x.shape == y.shape
        largest = y.abs().max().item()
        torch.testing.assert_close(x.double(), y.double(), rtol=TOLERANCE, atol=TOLERANCE * largest)


def check(inputs: list, u: list) -> tuple[Tensor, ...]:
    """Gradient and adjoint are ATen's, in the promised strides; returns them."""
    ours = gradient_and_adjoint(triton_impl, inputs, u)
    assert_same(ours, in_float64(inputs, u))
    targets, _, weights, biases, a, *_ = inputs
    g_T = [torch.empty_like(t) for t in targets]
    others = [[torch.empty_like(x, memory_format=torch.contiguous_format) for x in xs] for xs in (a, weights, biases)]
    E, g_r, g_bias = others
    promised = flat((E, g_T, g_r, g_bias, g_T, g_r, g_bias, E))
    assert [x.stride() for x in ours] == [x.stride() for x in promised]
    return ours


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels, as they are launched."""
    names: list[str] = []
    kernels = {
        "position": triton_impl.position_kernel,
        "channel": triton_impl.channel_kernel,
        "reduction": triton_impl.reduction_kernel,
    }
    for name, kernel in kernels.items():

        def run(*args: Any, name: str = name, original: Callable[..., Any] = kernel.run, **kwargs: Any) -> Any:
            names.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(kernel, "run", run)
    return names


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks so small, and a workspace so large, that tiny shapes have several of each, and split samples."""
    table = {
        key: dataclasses.replace(pinned, chunk=16, tile=256, positions=16, channels=16, step=16, waves=100)
        for key, pinned in configs.CONFIGS["interpreter"].items()
    }
    monkeypatch.setitem(configs.CONFIGS, triton_impl.device_properties(DEVICE)[0], table)
    monkeypatch.setattr(plan, "WORKSPACE", 100.0)
    for module in (plan, triton_impl):
        monkeypatch.setattr(module, "REDUCED", 64)
    clear_plans()
    yield
    clear_plans()


def clear_plans() -> None:
    plan.position_launch.cache_clear()
    plan.channel_launch.cache_clear()


@pytest.mark.parametrize("name", SHAPES)
def test_operators(name: str) -> None:
    inputs, u = problem(SHAPES[name])
    *tensors, a, source_of, target_of = inputs
    ours = check(inputs, u)
    assert_same(triton_impl.matching_distances(*tensors, source_of, target_of), ours[: len(a)])
    E, *gradient = triton_impl.matching_gradient(*inputs, False)
    assert E == []
    assert_same(flat(gradient), ours[len(a) :][: len(flat(gradient))])
    *primal, v_a = triton_impl.matching_adjoint(*inputs[:5], *u, source_of, target_of, False)
    assert primal == [[], [], []]
    assert_same(v_a, ours[-len(a) :])


@pytest.mark.parametrize("sources", [["contiguous"], ["channels last"], ["contiguous", "channels last", "sliced"]])
@pytest.mark.parametrize("targets", [*([layout] for layout in LAYOUTS), ["contiguous", "channels last"]])
def test_layouts(targets: list[str], sources: list[str]) -> None:
    inputs, u = problem(MANY)
    check(laid_out(inputs, targets, sources), u)


@pytest.mark.parametrize("targets", ["contiguous", "channels last"])
@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
def test_layouts_of_the_direction(targets: str, layout: str) -> None:
    inputs, (u_T, u_r, u_bias) = problem(MANY)
    u_T = [x[:1, :1].expand_as(x) if layout == "expanded" else LAYOUTS[layout](x) for x in u_T]
    check(laid_out(inputs, [targets], ["contiguous"]), [u_T, u_r, u_bias])


def test_parameters_need_not_be_contiguous() -> None:
    (T, S, weights, biases, a, *of), (u_T, u_r, u_bias) = problem(MANY)
    weights, u_r = ([x.transpose(0, 1).contiguous().transpose(0, 1) for x in xs] for xs in (weights, u_r))
    biases, u_bias = ([x[:1].expand_as(x) for x in xs] for xs in (biases, u_bias))
    a = [x.T.contiguous().T for x in a]
    check([T, S, weights, biases, a, *of], [u_T, u_r, u_bias])


def test_small_blocks(small_blocks: None, launches: list[str]) -> None:
    """Several chunks of C_t, blocks of C_s, steps of both products, tiles of H·W, and splits of the samples."""
    shapes = [(18, 3, 3), (3, 5, 4)], [(33, 5, 4), (17, 2, 2)], [(0, 0), (1, 1)]
    inputs, u = problem(shapes, batch=5)
    check(laid_out(inputs, ["contiguous", "channels last"], ["channels last", "contiguous"]), u)
    assert launches == ["position", "channel", "reduction"] * 2


@st.composite
def problems(draw: Any) -> tuple[list, list]:
    """(inputs, u) of any shape and layout."""
    side = st.integers(1, 9)
    features = st.lists(st.tuples(st.integers(1, 40), side, side), min_size=1, max_size=3)
    layouts = st.lists(st.sampled_from(list(LAYOUTS)), min_size=1, max_size=3)
    sources, targets = draw(features), draw(features)
    pair = st.tuples(st.integers(0, len(sources) - 1), st.integers(0, len(targets) - 1))
    pairs = draw(st.lists(pair, min_size=1, max_size=4))
    inputs, u = problem((sources, targets, pairs), batch=draw(st.integers(1, 5)))
    return laid_out(inputs, draw(layouts), draw(layouts)), u


# A GPU compiles the kernels anew for every example, and the interpreter is too slow to look for a smaller one.
@settings(max_examples=25 if INTERPRETED else 5, deadline=None, derandomize=True, phases=[Phase.generate])
@given(problems())
def test_any_shapes(drawn: tuple[list, list]) -> None:
    check(*drawn)


@pytest.fixture
def rounding_of_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the interpreter is less exact than a GPU: it cuts float32 to bfloat16, and adds a column one by one."""
    if not INTERPRETED:
        return
    convert = interpreter._convert_float

    def rounded(x: np.ndarray, source: tl.dtype, target: tl.dtype, mode: Any) -> np.ndarray:
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.tensor(x).bfloat16().view(torch.uint16).numpy()
        return convert(x, source, target, mode)

    def pairwise(self: Any, x: tl.tensor) -> tl.tensor:
        rows = np.ascontiguousarray(np.moveaxis(x.handle.data, self.axis, -1))
        return self.to_tensor(rows.sum(-1), x.dtype)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
    monkeypatch.setattr(interpreter.ReduceOps, "sum", pairwise)


@pytest.mark.parametrize(
    ("features", "parameters"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=["fp32", "bf16", "bf16 and fp32"],
)
def test_precision(features: torch.dtype, parameters: torch.dtype, rounding_of_hardware: None) -> None:
    """The error of every output is at most 1.2 times ATen's in the same dtypes.

    Error: the difference to float64 on the same rounded inputs, as a Frobenius norm relative to the output's; the root
    mean square of 6 draws.
    """
    shapes = [(12, 5, 5), (20, 3, 3)], [(24, 5, 5), (40, 3, 3)], [(0, 0), (1, 1)]
    ours, atens = [], []
    for seed in range(6):
        inputs, u = problem(shapes, 4, seed, features, parameters)
        exact = in_float64(inputs, u)
        results = [gradient_and_adjoint(implementation, inputs, u) for implementation in (triton_impl, torch_impl)]
        assert [x.dtype for x in results[0]] == [x.dtype for x in results[1]]
        for result, errors in zip(results, (ours, atens), strict=True):
            errors.append([((x.double() - y).norm() / y.norm()).item() for x, y in zip(result, exact, strict=True)])
    our, aten = (torch.tensor(errors).square().mean(0).sqrt() for errors in (ours, atens))
    assert (our <= 1.2 * aten).all(), our / aten


MARGIN = 64  # elements; keeps the alignment


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, int]]:
    """Whatever is allocated is NaN, and so are its margins: each (margin | elements | margin) and how many elements."""
    buffers: list[tuple[Tensor, int]] = []

    def poison(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> Tensor:
            x = allocate(*args, **kwargs)
            if not x.is_floating_point() or x.numel() == 0:
                return x
            elements = x.untyped_storage().nbytes() // x.itemsize
            buffer = torch.full((elements + 2 * MARGIN,), torch.nan, dtype=x.dtype, device=x.device)
            buffers.append((buffer, elements))
            return buffer.as_strided(x.shape, x.stride(), MARGIN)

        return allocate_poisoned

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
    return buffers


@pytest.mark.parametrize("blocks", ["pinned", "small"])
def test_poisoned_memory(blocks: str, request: pytest.FixtureRequest) -> None:
    """All of each output is written, nothing is read before, and nothing is written beside it."""
    if blocks == "small":
        request.getfixturevalue("small_blocks")
    problems = [problem(shapes) for shapes in (MANY, ([(17, 3, 3)], [(33, 5, 3)], [(0, 0)]))]
    launches, poisoned = request.getfixturevalue("launches"), request.getfixturevalue("poisoned")
    for (inputs, u), targets in zip(problems, (["contiguous", "channels last"], ["permuted"]), strict=True):
        ours = check(laid_out(inputs, targets, ["channels last", "sliced"]), u)
        assert len(poisoned) > len(ours)  # a workspace, too
        for buffer, elements in poisoned:
            assert buffer[:MARGIN].isnan().all()
            assert buffer[MARGIN + elements :].isnan().all()
        poisoned.clear()
    assert blocks == "pinned" or "reduction" in launches


@pytest.mark.parametrize("pairs", [1, 12])
def test_launches(pairs: int, launches: list[str], small_blocks: None) -> None:
    """One for each kernel at most, whatever the number of pairs, targets and splits."""
    sources, targets = [(3, 2, 2), (5, 1, 1), (4, 3, 3), (2, 1, 1)], [(4, 2, 2), (3, 2, 2), (2, 2, 2)]
    every = [(m, n) for m in range(4) for n in range(3)][:pairs]
    inputs, u = problem((sources, targets, every), batch=8)

    def launched(operator: Callable[..., Any], *arguments: Any) -> list[str]:
        launches.clear()
        operator(*arguments)
        return launches.copy()

    three = ["position", "channel", "reduction"]
    assert launched(triton_impl.matching_distances, *inputs[:4], *inputs[5:]) == ["channel"]
    assert launched(triton_impl.matching_gradient, *inputs, True) == three
    assert launched(triton_impl.matching_gradient, *inputs, False) == three
    assert launched(triton_impl.matching_adjoint, *inputs[:5], *u, *inputs[5:], True) == three
    assert launched(triton_impl.matching_adjoint, *inputs[:5], *u, *inputs[5:], False) == ["channel"]


@pytest.mark.cuda
@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_launches_of_a_profile() -> None:
    """Nothing else runs on the GPU: no copies, no casts."""
    inputs, u = problem(MANY)

    def kernels(operator: Callable[..., Any], *arguments: Any) -> int:
        operator(*arguments)  # compiles, and makes the plan
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            operator(*arguments)
            torch.cuda.synchronize()
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())

    assert kernels(triton_impl.matching_distances, *inputs[:4], *inputs[5:]) == 1
    assert 2 <= kernels(triton_impl.matching_gradient, *inputs, True) <= 3
    assert 2 <= kernels(triton_impl.matching_adjoint, *inputs[:5], *u, *inputs[5:], True) <= 3
    assert kernels(triton_impl.matching_adjoint, *inputs[:5], *u, *inputs[5:], False) == 1


@pytest.mark.parametrize("blocks", ["pinned", "small"])
def test_the_same_bits_again(blocks: str, request: pytest.FixtureRequest) -> None:
    """And the plan is made once."""
    if blocks == "small":
        request.getfixturevalue("small_blocks")
    inputs, u = problem(MANY, features=torch.float32)
    first = gradient_and_adjoint(triton_impl, inputs, u)
    caches = plan.position_launch, plan.channel_launch
    misses = [cache.cache_info().misses for cache in caches]
    assert all(map(torch.equal, first, gradient_and_adjoint(triton_impl, inputs, u)))
    assert [cache.cache_info().misses for cache in caches] == misses


def signature(
    batch: int, sources: Any, targets: Any, dtype: torch.dtype, precision: str, pairs: Any = None
) -> plan.Signature:
    """Of an H100, channels_last; every pair, where none are given."""
    every = tuple((m, n) for n in range(len(targets)) for m in range(len(sources)))
    T, S = (tuple(plan.Feature(*shape, True) for shape in shapes) for shapes in (targets, sources))
    device = torch.device("cpu")
    return plan.Signature(batch, T, S, every if pairs is None else pairs, dtype, precision, device, "sm_90", 132)


ARITHMETIC = pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")]
)
PLANS = {
    **{name: (*MATCHING_SHAPES[name], None) for name in ("quick", "cifar", "imagenet")},
    "ragged": (
        5,
        [(17, 7, 5), (40, 3, 3)],
        [(65, 7, 5), (300, 3, 3), (3, 14, 14), (64, 1, 1)],
        ((0, 0), (1, 0), (1, 3), (0, 2)),
    ),
    "one sample": (1, [(3, 4, 4)], [(200, 14, 14), (5, 1, 1)], None),
    "many samples": (1000, [(100, 2, 2)], [(130, 2, 2), (16, 3, 3)], ((0, 0), (0, 0), (0, 1))),
    "1025 elements to add": (500, [(25, 4, 4)], [(40, 4, 4)], None),
}


@ARITHMETIC
@pytest.mark.parametrize("case", ["cifar", "imagenet"])
def test_memory(case: str, dtype: torch.dtype, precision: str) -> None:
    """Workspace and tables of an operator: at most a tenth of the target features."""
    shapes = signature(*MATCHING_SHAPES[case], dtype, precision)
    batch, _, targets = MATCHING_SHAPES[case]
    features = dtype.itemsize * batch * sum(C * H * W for C, H, W in targets)
    for adjoint in (False, True):
        position, channel = plan.position_launch(shapes, adjoint), plan.channel_launch(shapes, adjoint, True)
        tables = [position.programs, position.pairs, channel.programs, channel.pairs, channel.reduction]
        workspace = channel.workspace * plan.accumulator(dtype).itemsize
        assert workspace + sum(table.nbytes for table in tables) <= 0.1 * features
        assert plan.channel_launch(shapes, adjoint, False).workspace == 0


@ARITHMETIC
@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("case", PLANS)
def test_position_programs_cover_all(case: str, adjoint: bool, dtype: torch.dtype, precision: str) -> None:
    """Every channel chunk at every position of every sample once, unpaired layers too."""
    batch, sources, targets, pairs = PLANS[case]
    launch = plan.position_launch(signature(batch, sources, targets, dtype, precision, pairs), adjoint)
    seen = []
    for (C, H, W), (_, _, _, _, CHUNK, BP, HP, _, _) in zip(targets, launch.layers, strict=True):
        assert BP % HP == 0
        seen.append(torch.zeros(batch, H * W, -(-C // CHUNK), dtype=torch.int32))
    for n, chunk, b, tile, *_ in launch.programs.tolist():
        _, _, _, _, _, BP, HP, _, _ = launch.layers[n]
        assert chunk < seen[n].shape[2]
        seen[n][b : b + BP // HP, tile * HP : (tile + 1) * HP, chunk] += 1
    assert all((count == 1).all() for count in seen)


@ARITHMETIC
@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("case", PLANS)
def test_channel_programs_cover_all(
    case: str, adjoint: bool, products: bool, dtype: torch.dtype, precision: str
) -> None:
    """Every channel block and chunk of every sample of every pair once; partial sums apart, and each added once."""
    batch, sources, targets, pairs = PLANS[case]
    shapes = signature(batch, sources, targets, dtype, precision, pairs)
    launch = plan.channel_launch(shapes, adjoint, products)
    blocks = [-(-sources[m][0] // launch.block) for m, _ in shapes.pairs]
    chunks = [-(-targets[n][0] // launch.layers[n][4]) if products else 1 for _, n in shapes.pairs]
    sizes = [sources[m][0] * (targets[n][0] + 1) for m, n in shapes.pairs]  # of g_r and g_bias
    seen = [torch.zeros(blocks[p], chunks[p], batch, dtype=torch.int32) for p in range(len(shapes.pairs))]
    partial: dict[tuple[int, int], int] = {}  # (pair, first sample) -> offset
    for n, p, block, chunk, start, end, offset, _ in launch.programs.tolist():
        assert n == shapes.pairs[p][1]
        assert 0 <= start < end <= batch
        assert block < blocks[p]
        assert chunk < chunks[p]
        seen[p][block, chunk, start:end] += 1
        if offset >= 0:
            assert partial.setdefault((p, start), offset) == offset
        else:
            assert not products or (start, end) == (0, batch)  # the only program of its block, or nothing but sums
    assert all((count == 1).all() for count in seen)

    written = torch.zeros(launch.workspace, dtype=torch.int32)
    for (p, _), offset in partial.items():
        written[offset : offset + sizes[p]] += 1
    added = torch.zeros(launch.workspace, dtype=torch.int32)
    for p, start, r_size, size, offset, splits, *_ in launch.reduction.tolist():
        m, n = shapes.pairs[p]
        assert (r_size, size) == (sources[m][0] * targets[n][0], sizes[p])
        assert {offset + i * size for i in range(splits)} == {o for (q, _), o in partial.items() if q == p}
        for i in range(splits):
            added[offset + i * size :][start : min(start + plan.REDUCED, size)] += 1
    assert (written == 1).all()
    assert (added == 1).all()


def test_plans_split_samples() -> None:
    """The tests above have seen splits."""
    for case, (batch, sources, targets, pairs) in PLANS.items():
        shapes = signature(batch, sources, targets, torch.bfloat16, "ieee", pairs)
        parts = Counter(row[1] for row in plan.channel_launch(shapes, False, False).programs.tolist())
        assert max(parts.values()) > 1 or case == "one sample"


@pytest.mark.parametrize(
    ("is_cuda", "dtype", "precision", "elements", "expected"),
    [
        (True, torch.bfloat16, "highest", 1, triton_impl),
        (True, torch.float32, "high", 1, triton_impl),
        (True, torch.float32, "highest", 1, torch_impl),
        (True, torch.float64, "high", 1, torch_impl),
        (True, torch.bfloat16, "highest", 0, torch_impl),
        (False, torch.bfloat16, "high", 1, torch_impl),
        (False, torch.float32, "high", 1, torch_impl),
    ],
)
def test_dispatch(is_cuda: bool, dtype: torch.dtype, precision: str, elements: int, expected: Any) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert ops.implementation(SimpleNamespace(is_cuda=is_cuda, dtype=dtype, numel=lambda: elements)) is expected
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "implementation", lambda feature: triton_impl)


def test_opcheck(registered: None) -> None:
    """Schema, fake kernel, autograd registration and AOT dispatch."""
    inputs, u = problem(CASES["an unpaired layer"], batch=2)
    inputs = laid_out(inputs, ["channels last"], ["sliced"])
    constants = tree_map_only(Tensor, Tensor.clone, inputs)
    for x in flat((inputs[0], *inputs[2:5])):
        x.requires_grad_()
    torch.library.opcheck(ops.matching_distances, (*inputs[:4], *inputs[5:]))
    torch.library.opcheck(ops.matching_gradient, (*inputs, True))
    for primal in (True, False):
        torch.library.opcheck(ops.matching_adjoint, (*constants[:5], *u, *constants[5:], primal))


@pytest.mark.skipif(not INTERPRETED, reason="float64 goes to ATen on a GPU")
def test_gradcheck_and_gradgradcheck(registered: None) -> None:
    targets, sources, weights, biases, a, *of = random_inputs([(2, 2, 2)], [(2, 3, 2)], [(0, 0)], batch=2)

    def distances(T: Tensor, r: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return tuple(ops.matching_distances([T], sources, [r], [bias], *of))

    def gradient(T: Tensor, r: Tensor, bias: Tensor, a: Tensor) -> tuple[Tensor, ...]:
        return flat(ops.matching_gradient([T], sources, [r], [bias], [a], *of, True))

    fast = {"fast_mode": True, "check_undefined_grad": False}
    primal = [x.requires_grad_() for x in flat((targets, weights, biases))]
    assert torch.autograd.gradcheck(distances, primal, **fast)
    assert torch.autograd.gradcheck(gradient, (*primal, a[0].requires_grad_()), **fast)
    assert torch.autograd.gradgradcheck(distances, primal, **fast)
