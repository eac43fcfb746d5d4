"""The methods of the paper's tables, as points of one space: which pairs, what and where.

A method without learned weights has no meta-parameters, so that its iteration is the real step alone.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from l2t_fast.errors import L2TError
from l2t_fast.pairs import PairRule
from l2t_fast.transfer import What, Where

MethodName = Literal["scratch", "fm-single", "fm-one-to-one", "l2t-w-single", "l2t-w-one-to-one", "l2t-ww"]


@dataclass(frozen=True)
class Method:
    """How the matching loss is made; `pairs=None` is training without a source."""

    pairs: PairRule | None
    what: What
    where: Where


METHODS: dict[MethodName, Method] = {
    "scratch": Method(None, "uniform", "fixed"),
    # Feature matching, Romero et al., "FitNets", ICLR 2015: w = 1/C_s, λ = 1.
    "fm-single": Method("single", "uniform", "fixed"),
    "fm-one-to-one": Method("one-to-one", "uniform", "fixed"),
    # Jang et al., ICML 2019: learned channels (w), learned channels and pairs (ww).
    "l2t-w-single": Method("single", "softmax", "fixed"),
    "l2t-w-one-to-one": Method("one-to-one", "softmax", "fixed"),
    "l2t-ww": Method("all-to-all", "softmax", "relu6"),
}
assert set(METHODS) == set(get_args(MethodName))


def find_method(name: str) -> Method:
    """The method called `name`.

    Raises:
        L2TError: there is none; the known ones are listed.
    """
    for known, found in METHODS.items():
        if known == name:
            return found
    raise L2TError(f"there is no method '{name}': use one of {', '.join(METHODS)}.")
