"""Which entry of a checkpoint is which of a network's: by name, and else only where nothing else is possible."""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping

from torch import Tensor

from l2t_fast.errors import L2TError

State = Mapping[str, Tensor]
Kind = frozenset[tuple[str, tuple[int, ...]]]  # role and shape of each entry of one module

_AVERAGED = re.compile(r"(^|[._])ema([._]|$)|averaged|avg_model")
_OF_TRAINING = re.compile(r"criterion\.|(\w+_)?loss(_\w+)?\.")  # parts of the training, no parts of a network


def find_prefix(wanted: State, found: State, place: str) -> str:
    """What precedes the names of the network `wanted` in the checkpoint `found`, with its dot; empty for nothing.

    A network is where more than half of its entries are found by name and shape. Where there is none, the prefix is
    what all names begin with. Moving averages (EMA) count only where there are no plain weights.

    Raises L2TError when several prefixes fit alike, with all of them.
    """
    hits: Counter[str] = Counter()
    for name, value in found.items():
        parts = name.split(".")
        for i in range(len(parts)):
            ours = wanted.get(".".join(parts[i:]))
            if ours is not None and ours.shape == value.shape:
                hits["".join(f"{part}." for part in parts[:i])] += 1
    best = max(hits.values(), default=0)
    if 2 * best <= len(wanted):
        return _shared(found)
    prefixes = [prefix for prefix in hits if hits[prefix] == best]
    prefixes = [prefix for prefix in prefixes if not _AVERAGED.search(prefix)] or prefixes
    if len(prefixes) > 1 and "" not in prefixes:
        names = [prefix[:-1] for prefix in prefixes]
        raise L2TError(
            f"{place} holds several networks that fit, {', '.join(names)}; name one behind the file, as in "
            f"FILE:{names[0]}."
        )
    return "" if "" in prefixes else prefixes[0]


def correspond(wanted: State, found: State, place: str) -> dict[str, str]:
    """For each entry of the network the name of its entry in the checkpoint.

    Names decide first, behind the prefix that `find_prefix` finds. What they leave over is put together module by
    module: modules whose entries have the same roles (`weight`, `running_mean`, ...) and shapes. Where several
    modules are alike, their names must tell them apart: behind the names of the blocks they lie in, their names are
    the same on both sides, and the blocks are counted on both sides, up in the order in which they stand.

    Entries that the network lacks are left out where all of the network was found behind its prefix and they lie beside
    it, or where they belong to a loss (`criterion.`).

    Raises L2TError when they do not fit, with the first difference, and when several entries could be one of the
    network's, with their names.
    """
    prefix = find_prefix(wanted, found, place)
    pairs = {name: prefix + name for name in wanted if prefix + name in found}
    for ours, theirs in pairs.items():
        if wanted[ours].shape != found[theirs].shape:
            raise _differ(place, _unlike(wanted, ours, found, theirs))
    used = set(pairs.values())
    rest = {
        name: value
        for name, value in found.items()
        if name not in used and not _OF_TRAINING.match(name.removeprefix(prefix))
    }
    left = {name: value for name, value in wanted.items() if name not in pairs}
    named = set(_kinds({name: wanted[name] for name in pairs}))
    for ours_module, theirs_module in _pair_modules(left, rest, named, prefix, place).items():
        for name in [name for name in left if name.rpartition(".")[0] == ours_module]:
            pairs[name] = _join(theirs_module, name.rpartition(".")[2])
            del rest[pairs[name]]
    within = prefix if all(name.startswith(prefix) for name in pairs.values()) else ""
    surplus = next((name for name in rest if name.startswith(within)), None)
    if surplus is not None:
        raise _differ(place, f"the network has nothing for {surplus}")
    return pairs


def _pair_modules(left: State, rest: State, named: set[Kind], prefix: str, place: str) -> dict[str, str]:
    """For each module with entries in `left` its counterpart in `rest`; named: kinds of modules found by name."""
    ours, theirs = _kinds(left), _kinds(rest)
    if any(len(theirs.get(kind, ())) < len(modules) for kind, modules in ours.items()):
        raise _first_difference(left, rest, place)
    pairs: dict[str, str] = {}
    there: dict[str, str] = {}  # blocks of ours -> blocks of theirs
    here: dict[str, str] = {}
    for kind, modules in ours.items():
        mine, others = sorted(modules, key=_rank), sorted(theirs[kind], key=_rank)
        blocks = [_blocks(m, o.removeprefix(prefix)) for m, o in zip(mine, others, strict=False)]
        clear = (
            len(mine) == len(others)
            and all(there.setdefault(m, o) == o and here.setdefault(o, m) == m for m, o in blocks)
            # A module of this kind was found by name, and this one by a number that differs: numbered from elsewhere?
            and not (kind in named and any(_words(m) == _words(o) for m, o in blocks))
            and _in_order(modules, dict(zip(mine, (m for m, _ in blocks), strict=True)))
            and _in_order(theirs[kind], dict(zip(others, (o for _, o in blocks), strict=True)))
        )
        if not clear:
            raise _ambiguous(mine, others, place)
        pairs.update(zip(mine, others, strict=True))
    return pairs


def _kinds(state: State) -> dict[Kind, list[str]]:
    """The modules of each kind."""
    entries: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for name, value in state.items():
        module, _, role = name.rpartition(".")
        entries.setdefault(module, []).append((role, tuple(value.shape)))
    kinds: dict[Kind, list[str]] = {}
    for module, members in entries.items():
        kinds.setdefault(frozenset(members), []).append(module)
    return kinds


def _blocks(ours: str, theirs: str) -> tuple[str, str]:
    """Both names without the end that they share: layer1.0.conv1, block1.conv1 -> layer1.0, block1."""
    a, b = ours.split("."), theirs.split(".")
    while a and b and a[-1] == b[-1]:
        a.pop()
        b.pop()
    return ".".join(a), ".".join(b)


def _words(name: str) -> str:
    return re.sub(r"\d+", "", name)


def _rank(name: str) -> list[tuple[str, tuple[int, ...]]]:
    """Word (its plural alike) and numbers of each part of a name: blocks2.0 -> (block, 2), (, 0)."""
    return [(_words(part).rstrip("s"), tuple(map(int, re.findall(r"\d+", part)))) for part in name.split(".")]


def _in_order(modules: list[str], block: Mapping[str, str]) -> bool:
    """Whether the modules' blocks are counted, up as they stand: the first part that differs is one word, numbered."""
    ranks = [_rank(b) for b in dict.fromkeys(block[module] for module in modules)]
    for a, b in itertools.pairwise(ranks):
        (word, low), (other, high) = next(((x, y) for x, y in zip(a, b, strict=False) if x != y), (("", ()), ("", ())))
        if word != other or len(low) != len(high) or low >= high:
            return False
    return True


def _shared(names: Iterable[str]) -> str:
    """The parts, each with its dot, that all names begin with."""
    heads = [name.split(".")[:-1] for name in names]
    parts = itertools.takewhile(lambda same: len(set(same)) == 1, zip(*heads, strict=False))
    return "".join(f"{part[0]}." for part in parts)


def _join(module: str, role: str) -> str:
    return f"{module}.{role}" if module else role


def _unlike(wanted: State, ours: str, found: State, theirs: str) -> str:
    return f"it has {theirs} {list(found[theirs].shape)} where the network has {ours} {list(wanted[ours].shape)}"


def _first_difference(left: State, rest: State, place: str) -> L2TError:
    for ours, theirs in zip(left, rest, strict=False):
        if ours.rpartition(".")[2] != theirs.rpartition(".")[2] or left[ours].shape != rest[theirs].shape:
            return _differ(place, _unlike(left, ours, rest, theirs))
    if len(left) > len(rest):
        return _differ(place, f"it has nothing for {list(left)[len(rest)]}")
    return _ambiguous(list(left), list(rest), place)


def _differ(place: str, reason: str) -> L2TError:
    return L2TError(
        f"{place} does not fit the network: {reason}; "
        "build the network it was made with (its name, width and number of classes)."
    )


def _ambiguous(ours: list[str], theirs: list[str], place: str) -> L2TError:
    def listed(names: list[str]) -> str:
        return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")

    return L2TError(
        f"{place} does not say which of its {listed(theirs)} is which of the network's {listed(ours)}; "
        "name its entries as the state_dict() of the network does."
    )
