"""The Triton operators against those in ATen: on a GPU, or in Triton's interpreter where there is none."""

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from benchmarks.shapes import MATCHING_SHAPES
from l2t_fast.kernels import launch
from l2t_fast.kernels.matching import aten, blocks, ops, triton_launch
from tests.kernels.shared import MANY, SHAPES, SMALL_SHAPES, flat, random_inputs
from tests.kernels.triton_shared import (
    DEVICE,
    INTERPRETED,
    LAYOUTS,
    assert_same,
    check,
    gradient_and_adjoint,
    laid_out,
    problem,
)

pytestmark = pytest.mark.core


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The grid of each launch of the kernel."""
    grids: list[tuple[int, ...]] = []
    run = triton_launch.difference_kernel.run

    def recorded(*args: Any, grid: tuple[int, ...], **kwargs: Any) -> Any:
        grids.append(grid)
        return run(*args, grid=grid, **kwargs)

    monkeypatch.setattr(triton_launch.difference_kernel, "run", recorded)
    return grids


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that tiny shapes have several of each, and one sample in a slice."""
    arch = launch.device_properties(DEVICE)[0]
    table = {key: dataclasses.replace(b, positions=16, channels=16, step=16) for key, b in blocks.table(arch).items()}
    monkeypatch.setitem(blocks.BLOCKS, arch, table)
    monkeypatch.setattr(triton_launch, "SLICE", 1)


@pytest.mark.parametrize("name", SHAPES)
def test_operators(name: str) -> None:
    inputs, u = problem(SHAPES[name])
    *tensors, a, source_of, target_of = inputs
    ours = check(inputs, u)
    assert_same(triton_launch.matching_distances(*tensors, source_of, target_of), ours[: len(a)])
    E, *gradient = triton_launch.matching_gradient(*inputs, False)
    assert E == []
    assert_same(flat(gradient), ours[len(a) :][: len(flat(gradient))])
    *primal, v_a = triton_launch.matching_adjoint(*inputs[:5], *u, source_of, target_of, False)
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
    (T, S, projections, biases, a, *indices), (u_T, u_r, u_bias) = problem(MANY)
    projections, u_r = ([x.transpose(0, 1).contiguous().transpose(0, 1) for x in xs] for xs in (projections, u_r))
    biases, u_bias = ([x[:1].expand_as(x) for x in xs] for xs in (biases, u_bias))
    a = [x.T.contiguous().T for x in a]
    check([T, S, projections, biases, a, *indices], [u_T, u_r, u_bias])


def test_small_blocks(small_blocks: None, launches: list[tuple[int, ...]]) -> None:
    """Several blocks of C_s, steps of C_t, tiles of H·W, and slices of the samples."""
    shapes = [(18, 3, 3), (3, 5, 4)], [(33, 5, 4), (17, 2, 2)], [(0, 0), (1, 1)]
    inputs, u = problem(shapes, batch=5)
    check(laid_out(inputs, ["contiguous", "channels last"], ["channels last", "contiguous"]), u)
    assert launches == ([(1, 1)] * 5 + [(2, 2)] * 5) * 2  # the largest layer last


MARGIN = 64  # elements; keeps the alignment


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, int]]:
    """Whatever is allocated is NaN, and so are its margins: each (margin | elements | margin) and how many elements."""
    buffers: list[tuple[Tensor, int]] = []
    empty = torch.empty  # which others of PyTorch's may call

    def poison(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> Tensor:
            x = allocate(*args, **kwargs)
            if not x.is_floating_point() or x.numel() == 0 or x.is_meta:
                return x
            elements = x.untyped_storage().nbytes() // x.itemsize
            buffer = empty((elements + 2 * MARGIN,), dtype=x.dtype, device=x.device).fill_(torch.nan)
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
    poisoned = request.getfixturevalue("poisoned")
    for (inputs, u), targets in zip(problems, (["contiguous", "channels last"], ["permuted"]), strict=True):
        ours = check(laid_out(inputs, targets, ["channels last", "sliced"]), u)
        assert len(poisoned) > len(ours)  # a workspace, too
        for buffer, elements in poisoned:
            assert buffer[:MARGIN].isnan().all()
            assert buffer[MARGIN + elements :].isnan().all()
        poisoned.clear()


@pytest.mark.parametrize("pairs", [1, 12])
def test_launches(pairs: int, launches: list[tuple[int, ...]]) -> None:
    """One for each target layer, whatever the number of pairs."""
    sources, targets = [(3, 2, 2), (5, 1, 1), (4, 3, 3), (2, 1, 1)], [(4, 2, 2), (3, 2, 2), (2, 2, 2)]
    every = [(m, n) for m in range(4) for n in range(3)][:pairs]
    inputs, u = problem((sources, targets, every), batch=8)

    def launched(operator: Callable[..., Any], *arguments: Any) -> int:
        launches.clear()
        operator(*arguments)
        return len(launches)

    layers = len({n for _, n in every})
    assert launched(triton_launch.matching_distances, *inputs[:4], *inputs[5:]) == layers
    for distances in (True, False):
        assert launched(triton_launch.matching_gradient, *inputs, distances) == layers
    for primal in (True, False):
        assert launched(triton_launch.matching_adjoint, *inputs[:5], *u, *inputs[5:], primal) == layers


@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
@pytest.mark.parametrize("bytes_of_a_sample", [0, 1, 2**20, triton_launch.SLICE - 1, 3 * triton_launch.SLICE])
def test_slices(batch: int, bytes_of_a_sample: int) -> None:
    """They cover all samples once, and hold the workspace to its bound where one sample is within it."""
    slices = list(triton_launch._slices(batch, bytes_of_a_sample))
    assert [b for part in slices for b in range(batch)[part]] == list(range(batch))
    longest = max(part.stop - part.start for part in slices)
    assert longest == 1 or longest * bytes_of_a_sample <= triton_launch.SLICE


@pytest.mark.cuda
@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("case", ["cifar", "imagenet"])
def test_the_workspace_is_within_its_bound(case: str) -> None:
    """Beside the results: a slice of G, its sums, and what stands side by side."""
    batch, sources, targets = MATCHING_SHAPES[case]
    pairs = [(m, n) for m in range(len(sources)) for n in range(len(targets))]
    inputs, u = problem((sources, targets, pairs), batch, features=torch.bfloat16, parameters=torch.float32)
    inputs = laid_out(inputs, ["channels last"], ["channels last"])
    u[0] = [LAYOUTS["channels last"](x) for x in u[0]]
    for primal in (True, False):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = triton_launch.matching_adjoint(*inputs[:5], *u, *inputs[5:], primal)
        kept = torch.cuda.memory_allocated() - before
        assert torch.cuda.max_memory_allocated() - before - kept < 1.5 * triton_launch.SLICE
        del results


@pytest.mark.parametrize("blocks", ["pinned", "small"])
def test_the_same_bits_again(blocks: str, request: pytest.FixtureRequest) -> None:
    """And the table of blocks is made once."""
    if blocks == "small":
        request.getfixturevalue("small_blocks")
    inputs, u = problem(MANY, features=torch.float32)
    first = gradient_and_adjoint(triton_launch, inputs, u)
    misses = triton_launch._table.cache_info().misses
    assert all(map(torch.equal, first, gradient_and_adjoint(triton_launch, inputs, u)))
    assert triton_launch._table.cache_info().misses == misses


@pytest.mark.parametrize(
    ("is_cuda", "dtype", "precision", "elements", "expected"),
    [
        (True, torch.bfloat16, "highest", 1, triton_launch),
        (True, torch.float32, "high", 1, triton_launch),
        (True, torch.float32, "highest", 1, aten),
        (True, torch.float64, "high", 1, aten),
        (True, torch.bfloat16, "highest", 0, aten),
        (False, torch.bfloat16, "high", 1, aten),
        (False, torch.float32, "high", 1, aten),
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
    monkeypatch.setattr(ops, "implementation", lambda feature: triton_launch)


def test_opcheck(registered: None) -> None:
    """Schema, fake kernel, autograd registration and AOT dispatch."""
    inputs, u = problem(SMALL_SHAPES["an unpaired layer"], batch=2)
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
    targets, sources, projections, biases, a, *indices = random_inputs([(2, 2, 2)], [(2, 3, 2)], [(0, 0)], batch=2)

    def distances(T: Tensor, r: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return tuple(ops.matching_distances([T], sources, [r], [bias], *indices))

    def gradient(T: Tensor, r: Tensor, bias: Tensor, a: Tensor) -> tuple[Tensor, ...]:
        return flat(ops.matching_gradient([T], sources, [r], [bias], [a], *indices, True))

    fast = {"fast_mode": True, "check_undefined_grad": False}
    primal = [x.requires_grad_() for x in flat((targets, projections, biases))]
    assert torch.autograd.gradcheck(distances, primal, **fast)
    assert torch.autograd.gradcheck(gradient, (*primal, a[0].requires_grad_()), **fast)
    assert torch.autograd.gradgradcheck(distances, primal, **fast)
