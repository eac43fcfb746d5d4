"""Jacobian matching: the target's largest activation depends on the image as the source's does."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from l2t_fast.learner.network import Outputs
from l2t_fast.learner.pairs import resolve_pairs
from l2t_fast.learner.terms import Term, TermNetworks, input_gradient
from l2t_fast.methods.attention import activation_map
from l2t_fast.methods.base import Method


class Jacobian(Term):
    """α Σ_sources mean_b ‖ J_t/‖J_t‖ − J_s/‖J_s‖ ‖²,  J = ∂A_i/∂x,  A = mean_c (feature)² at position i [H·W].

    i is where the source's map A of this image is largest; the layers are the deepest pair of equal resolution. The
    target's pass has batch statistics, through which J is differentiated as well, and its dropout draws anew.
    Srinivas & Fleuret, "Knowledge Transfer with Jacobian Matching", ICML 2018, section 4: the normalised Jacobian of
    the largest value of an attention map. Their maps are pooled first, ours are not; α = 1 is ours.
    """

    name = "jacobian"

    def __init__(self, networks: TermNetworks, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight
        pairs = resolve_pairs("one-to-one", [s.layers for s in networks.sources], networks.target.layers)
        self.pairs = [[pair for pair in pairs if pair.source == s][-1] for s in range(len(networks.sources))]

    def prepare(self, x: Tensor, sources: Sequence[Outputs], run: Callable[[int, Tensor], Outputs]) -> list[Tensor]:
        """For each source: positions i [B, 1], normalised J_s [B, C·H·W]."""
        given: list[Tensor] = []
        for s, m, _ in self.pairs:
            place = activation_map(sources[s].features[m]).argmax(1, keepdim=True)  # [B, 1]
            given += [place, _jacobian(partial(run, s), m, x, place)]
        return given

    def forward(self, given: list[Tensor], x: Tensor, target: Outputs, run: Callable[[Tensor], Outputs]) -> Tensor:
        value = given[1].new_zeros(())
        for pair, place, J in zip(self.pairs, given[::2], given[1::2], strict=True):
            value = value + (_jacobian(run, pair.n, x, place) - J).square().sum(1).mean()
        return self.weight * value


def _jacobian(run: Callable[[Tensor], Outputs], layer: int, x: Tensor, place: Tensor) -> Tensor:
    """J/‖J‖ [B, C·H·W] of A at `place` [B, 1]."""
    J = input_gradient(lambda z: activation_map(run(z).features[layer]).gather(1, place).sum(), x)
    return F.normalize((J.float() if J.dtype == torch.bfloat16 else J).flatten(1), dim=1)


JACOBIAN = Method("Srinivas & Fleuret, Knowledge Transfer with Jacobian Matching, ICML 2018", terms=(Jacobian,))
