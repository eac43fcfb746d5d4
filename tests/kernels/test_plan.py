"""Plans of the Triton kernels: every program has its own work, all work is done once, and the workspace is small."""

from collections import Counter
from typing import Any

import pytest
import torch

from benchmarks.shapes import MATCHING_SHAPES
from l2t_fast.kernels.matching import plan

pytestmark = pytest.mark.core


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
    planned = plan.position_launch(signature(batch, sources, targets, dtype, precision, pairs), adjoint)
    seen = []
    for (C, H, W), (_, _, _, _, CHUNK, BP, HP, _, _) in zip(targets, planned.layers, strict=True):
        assert BP % HP == 0
        seen.append(torch.zeros(batch, H * W, -(-C // CHUNK), dtype=torch.int32))
    for n, chunk, b, tile, *_ in planned.programs.tolist():
        _, _, _, _, _, BP, HP, _, _ = planned.layers[n]
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
    planned = plan.channel_launch(shapes, adjoint, products)
    blocks = [-(-sources[m][0] // planned.block) for m, _ in shapes.pairs]
    chunks = [-(-targets[n][0] // planned.layers[n][4]) if products else 1 for _, n in shapes.pairs]
    sizes = [sources[m][0] * (targets[n][0] + 1) for m, n in shapes.pairs]  # of g_r and g_bias
    seen = [torch.zeros(blocks[p], chunks[p], batch, dtype=torch.int32) for p in range(len(shapes.pairs))]
    partial: dict[tuple[int, int], int] = {}  # (pair, first sample) -> offset
    for n, p, block, chunk, start, end, offset, _ in planned.programs.tolist():
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

    written = torch.zeros(planned.workspace, dtype=torch.int32)
    for (p, _), offset in partial.items():
        written[offset : offset + sizes[p]] += 1
    added = torch.zeros(planned.workspace, dtype=torch.int32)
    for p, start, r_size, size, offset, splits, *_ in planned.reduction.tolist():
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
