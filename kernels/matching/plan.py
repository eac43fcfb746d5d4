"""Which tiles of which pairs each program of a kernel works on: made once for a set of shapes, reused by every call.

Two kinds of work share one difference d = r T + bias − R(S) [positions, C_s] a tile:

- a *position* program owns positions of one target layer and goes through all pairs of that layer, so that their sum
  g_T stays in registers;
- a *channel* program owns a block of source channels of one pair and goes through the positions of some samples, so
  that g_r and g_bias stay in registers, and so does, sample by sample, Σ_ij.

A tile of BP positions is NB samples x HP positions (powers of two), so that small and ragged H·W fill it. A layer's
channels C_t are cut into chunks; a program owns one chunk of the result and goes through all of them for d.
Samples may be split among channel programs, whose partial sums are then added in order; the number of splits is what
the workspace of at most a tenth of T allows. A single split writes the result itself and needs none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from l2t_fast.kernels.matching.blocks import Config, Kernel, config

WORKSPACE = 0.1  # of the size of T
REDUCED = 1024  # elements of a program of the reduction
PROGRAM = 8  # int32 entries of a program in a table, and of a pair


@dataclass(frozen=True)
class Feature:
    """Shape of a feature [B, C, H, W]."""

    channels: int
    height: int
    width: int
    channels_last: bool

    @property
    def area(self) -> int:
        return self.height * self.width


@dataclass(frozen=True)
class Signature:
    """All that a plan depends on. `pairs` are (source, target), grouped by target."""

    batch: int
    targets: tuple[Feature, ...]
    sources: tuple[Feature, ...]
    pairs: tuple[tuple[int, int], ...]
    dtype: torch.dtype
    precision: str
    device: torch.device
    arch: str
    processors: int


class Layer(NamedTuple):
    """The constants of a target layer that kernels are compiled for, in the order in which they read them."""

    C: int
    H: int
    W: int
    channels_last: int
    CHUNK: int
    BP: int
    HP: int
    FIRST: int  # pair
    LAST: int  # pair after the last

    @property
    def NB(self) -> int:
        return self.BP // self.HP

    @property
    def chunks(self) -> int:
        return _ceil(self.C, self.CHUNK)

    @property
    def tiles(self) -> int:
        """Of one sample or of NB."""
        return _ceil(self.H * self.W, self.HP)


@dataclass(frozen=True)
class Launch:
    """One launch: a program each row of `programs`, compiled for the constants `layers`."""

    programs: Tensor  # [grid, PROGRAM] int32
    pairs: Tensor  # [pairs, PROGRAM] int32: source, C_s, h, w, channels_last
    layers: tuple[Layer, ...]
    config: Config
    block: int  # BS, source channels of a block
    source_layout: int  # 0 all contiguous, 1 all channels_last, 2 both kinds
    source_align: int  # the largest power of two up to 16 that divides every C_s


@dataclass(frozen=True)
class ChannelLaunch(Launch):
    """`workspace` elements for the partial sums of pairs that are split, added by `reduction` [grid, PROGRAM]."""

    workspace: int
    reduction: Tensor


@cache  # for good: CUDA graphs hold the tables' addresses
def position_launch(signature: Signature, adjoint: bool) -> Launch:
    """Programs (layer, chunk, first sample, tile of its positions) of g_T or v_T, those with the most work first."""
    chosen = _config(signature, "position", adjoint)
    layers = _layers(signature, chosen)
    programs = [
        (n, chunk, b, tile)
        for n, layer in enumerate(layers)
        for b in range(0, signature.batch, layer.NB)
        for tile in range(layer.tiles)
        for chunk in range(layer.chunks)
    ]
    work = [(layer.LAST - layer.FIRST) * (layer.chunks + 1) * layer.CHUNK * layer.BP for layer in layers]
    programs.sort(key=lambda program: -work[program[0]])
    return Launch(
        _table(programs, signature.device),
        _pair_table(signature),
        layers,
        chosen,
        _block(signature, chosen),
        *_source_constants(signature),
    )


@cache  # for good: CUDA graphs hold the tables' addresses
def channel_launch(signature: Signature, adjoint: bool, products: bool) -> ChannelLaunch:
    """Programs (layer, pair, block of channels, chunk, first sample, last sample, offset of the partial sums or -1).

    `products`: with g_r and g_bias; otherwise only sums over positions, which need neither chunks nor a workspace.
    """
    chosen = _config(signature, "channel", adjoint)
    layers = _layers(signature, chosen)
    block = _block(signature, chosen)
    blocks = [_ceil(signature.sources[m].channels, block) for m, _ in signature.pairs]
    sizes = [signature.sources[m].channels * (signature.targets[n].channels + 1) for m, n in signature.pairs]
    chunks = [layer.chunks if products else 1 for layer in layers]
    # Of one program and one sample: d goes through all chunks, a product adds one.
    work = [layer.tiles * layer.HP * (layer.chunks + products) * layer.CHUNK for layer in layers]
    itemsize = accumulator(signature.dtype).itemsize
    splits = _splits(
        work=[w * signature.batch for w in work],
        programs=[sum(blocks[layer.FIRST : layer.LAST]) * c for layer, c in zip(layers, chunks, strict=True)],
        limits=[_ceil(signature.batch, layer.NB) for layer in layers],
        partial=[sum(sizes[layer.FIRST : layer.LAST]) * products for layer in layers],
        budget=int(WORKSPACE * _elements(signature) * signature.dtype.itemsize / itemsize),
        goal=chosen.waves * signature.processors,
    )
    programs, reduction, workspace = [], [], 0
    for p, (m, n) in enumerate(signature.pairs):
        samples = _ceil(_ceil(signature.batch, splits[n]), layers[n].NB) * layers[n].NB
        starts = range(0, signature.batch, samples)
        split = products and len(starts) > 1
        programs += [
            (n, p, s, c, b, min(b + samples, signature.batch), workspace + i * sizes[p] if split else -1)
            for i, b in enumerate(starts)
            for s in range(blocks[p])
            for c in range(chunks[n])
        ]
        if split:
            n_r = signature.sources[m].channels * signature.targets[n].channels
            reduction += [(p, i, n_r, sizes[p], workspace, len(starts)) for i in range(0, sizes[p], REDUCED)]
            workspace += sizes[p] * len(starts)
    programs.sort(key=lambda program: -work[program[0]] * (program[5] - program[4]))
    return ChannelLaunch(
        _table(programs, signature.device),
        _pair_table(signature),
        layers,
        chosen,
        block,
        *_source_constants(signature),
        workspace,
        _table(reduction, signature.device),
    )


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _config(signature: Signature, kernel: Kernel, adjoint: bool) -> Config:
    channels_last = all(feature.channels_last for feature in (*signature.targets, *signature.sources))
    return config(signature.arch, signature.dtype, signature.precision, channels_last, kernel, adjoint)


def _layers(signature: Signature, chosen: Config) -> tuple[Layer, ...]:
    layers = []
    for n, T in enumerate(signature.targets):
        group = [p for p, (_, t) in enumerate(signature.pairs) if t == n]
        first, last = (group[0], group[-1] + 1) if group else (0, 0)
        chunk = min(max(_power(T.channels), 16), chosen.chunk)
        BP = chosen.positions_of(chunk)
        HP = _positions_of_a_sample(T.area, BP)
        layers.append(Layer(T.channels, T.height, T.width, int(T.channels_last), chunk, BP, HP, first, last))
    return tuple(layers)


def _block(signature: Signature, chosen: Config) -> int:
    """BS: the largest power of two up to the pinned one that pads the source channels by less than a sixth."""
    channels = [signature.sources[m].channels for m, _ in signature.pairs]

    def padded(block: int) -> int:
        return sum(_ceil(C_s, block) * block for C_s in channels)

    candidates = [chosen.channels >> i for i in range(chosen.channels.bit_length()) if chosen.channels >> i >= 16]
    return next((block for block in candidates if padded(block) < 7 / 6 * sum(channels)), candidates[-1])


def _positions_of_a_sample(area: int, BP: int) -> int:
    """HP: the largest power of two that wastes less than an eighth of a tile.

    Whatever the batch: it is a constant of the kernels, which a smaller last batch must not compile anew.
    """
    candidates = [BP >> i for i in range(BP.bit_length())]
    return next(HP for HP in candidates if area / (_ceil(area, HP) * HP) > 7 / 8)


def _splits(
    work: Sequence[int],
    programs: Sequence[int],
    limits: Sequence[int],
    partial: Sequence[int],
    budget: int,
    goal: int,
) -> list[int]:
    """Into how many parts each layer's samples are split, while the workspace allows.

    The longest programs first, until there are `goal` and none is so long that it would end alone.
    """
    splits = [1] * len(work)
    fair = sum(w * p for w, p in zip(work, programs, strict=True)) / goal

    def allowed(n: int) -> bool:
        more = [s + (i == n) for i, s in enumerate(splits)]
        workspace = sum(size * s for size, s in zip(partial, more, strict=True) if s > 1)
        return programs[n] > 0 and more[n] <= limits[n] and workspace <= budget

    while True:
        enough = sum(p * s for p, s in zip(programs, splits, strict=True)) >= goal
        longest = sorted(range(len(work)), key=lambda n: -work[n] / splits[n])
        longest = [n for n in longest if not enough or work[n] / splits[n] > 1.25 * fair]
        n = next(filter(allowed, longest), None)
        if n is None:
            return splits
        splits[n] += 1


def _pair_table(signature: Signature) -> Tensor:
    sources = [signature.sources[m] for m, _ in signature.pairs]
    rows = [
        (m, S.channels, S.height, S.width, int(S.channels_last))
        for (m, _), S in zip(signature.pairs, sources, strict=True)
    ]
    return _table(rows, signature.device)


def _source_constants(signature: Signature) -> tuple[int, int]:
    layouts = {S.channels_last for S in signature.sources}
    return 2 if len(layouts) == 2 else int(layouts.pop()), gcd(16, *(S.channels for S in signature.sources))


def _table(rows: Sequence[tuple[int, ...]], device: torch.device) -> Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the matching operators meet these shapes for the first time while a CUDA graph is captured: run them once "
            "before, with the same arguments."
        )
    padded = [(*row, *[0] * (PROGRAM - len(row))) for row in rows]
    return torch.tensor(padded, dtype=torch.int32, device=device).view(-1, PROGRAM)


def _elements(signature: Signature) -> int:
    return signature.batch * sum(T.channels * T.area for T in signature.targets)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()
