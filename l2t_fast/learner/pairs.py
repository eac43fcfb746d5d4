"""Which source layers teach which target layers."""

from collections.abc import Sequence
from typing import NamedTuple

from l2t_fast.bounds import shown
from l2t_fast.choices import PairRule
from l2t_fast.errors import L2TError, UnfitError

Shape = tuple[int, int, int]  # (C, H, W) of a feature

PairSpec = PairRule | Sequence[tuple[int, int]] | Sequence[tuple[int, int, int]]


class Pair(NamedTuple):
    """Layer m of a source network, matched by layer n of the target; all three are indices."""

    source: int
    m: int
    n: int


def resolve_pairs(spec: PairSpec, sources: Sequence[Sequence[Shape]], target: Sequence[Shape]) -> list[Pair]:
    """The candidate pairs C of the paper (section 2.1), from a rule or a list.

    - "all-to-all": every source layer with every target layer.
    - "one-to-one": layers of equal H x W; where several have it, they are joined from the deepest up, each once.
    - "single": the last layer of each source with the last of the target.
    - a list of (m, n), taken for every source, or of (source, m, n).

    `sources` holds the (C, H, W) of each tapped layer of each source, `target` those of the target.

    Raises:
        L2TError: unknown rule, index out of range, a pair given twice, no layers of equal resolution.
    """
    if isinstance(spec, str):
        for role, layers in [*((f"source {s}", layers) for s, layers in enumerate(sources)), ("target", target)]:
            if not layers:
                raise L2TError(f"no layer of the {role} is tapped: name at least one, or give pairs=[].")
        if spec == "all-to-all":
            return [
                Pair(s, m, n)
                for s, layers in enumerate(sources)
                for m in range(len(layers))
                for n in range(len(target))
            ]
        if spec == "one-to-one":
            return _one_to_one(sources, target)
        if spec == "single":
            return [Pair(s, len(source) - 1, len(target) - 1) for s, source in enumerate(sources)]
        raise L2TError(f"pairs={shown(spec)} is unknown: use 'all-to-all', 'one-to-one', 'single' or a list of (m, n).")

    if not isinstance(spec, Sequence) or not all(
        isinstance(entry, Sequence) and all(isinstance(index, int) for index in entry) for entry in spec
    ):
        raise L2TError(
            f"pairs={shown(spec)} is not to be had: use a rule or a list of (m, n) or (source, m, n), all whole."
        )
    pairs: list[Pair] = []
    for entry in spec:
        if len(entry) == 3:
            pairs.append(Pair(*entry))
        elif len(entry) == 2:
            pairs.extend(Pair(s, *entry) for s in range(len(sources)))
        else:
            raise L2TError(f"pair {tuple(entry)} has {len(entry)} numbers: give (m, n) or (source, m, n).")
    for pair in pairs:
        _check_range(pair, sources, target)
    if len(set(pairs)) < len(pairs):
        twice = next(pair for pair in pairs if pairs.count(pair) > 1)
        raise L2TError(f"pair {tuple(twice)} is given more than once: list each (source, m, n) once.")
    return pairs


def _one_to_one(sources: Sequence[Sequence[Shape]], target: Sequence[Shape]) -> list[Pair]:
    pairs: list[Pair] = []
    for s, layers in enumerate(sources):
        free = list(range(len(target)))
        joined = []
        for m in reversed(range(len(layers))):
            n = next((n for n in reversed(free) if target[n][1:] == layers[m][1:]), None)
            if n is not None:
                free.remove(n)
                joined.append(Pair(s, m, n))
        if not joined:
            raise UnfitError(
                f"pairs='one-to-one' finds no layers of equal resolution: source {s} has {_sizes(layers)}, "
                f"the target {_sizes(target)}; choose other layers or list the pairs."
            )
        pairs.extend(reversed(joined))
    return pairs


def _check_range(pair: Pair, sources: Sequence[Sequence[Shape]], target: Sequence[Shape]) -> None:
    for what, index, count in (
        ("source", pair.source, len(sources)),
        ("source layer", pair.m, len(sources[pair.source]) if 0 <= pair.source < len(sources) else 0),
        ("target layer", pair.n, len(target)),
    ):
        if not 0 <= index < count:
            raise L2TError(
                f"pair {tuple(pair)} (source, m, n) is out of range: there is no {what} {index}, "
                f"{count} given, counted from 0."
            )


def _sizes(layers: Sequence[Shape]) -> str:
    return ", ".join(f"{h}x{w}" for _, h, w in layers)
