"""Attention transfer: the target looks where the source looks."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from l2t_fast.learner.network import Outputs
from l2t_fast.learner.pairs import resolve_pairs
from l2t_fast.learner.terms import Term, TermNetworks
from l2t_fast.methods.base import Method
from l2t_fast.methods.lwf import LwF


def activation_map(feature: Tensor) -> Tensor:
    """A [B, HW] of a feature [B, C, H, W]: the mean square over the channels."""
    wide = feature.float() if feature.dtype == torch.bfloat16 else feature
    return wide.square().mean(1).flatten(1)


def attention(feature: Tensor) -> Tensor:
    """Q [B, HW] of a feature [B, C, H, W]: each image's activation map, normalised to length 1."""
    return F.normalize(activation_map(feature), dim=1)


class Attention(Term):
    """β Σ_pairs mean_{b,ij} (Q_t − Q_s)², pairs one-to-one.

    Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017, eq. 2 with p = 2, and as in their code
    β = 1000 with the mean over images and positions.
    """

    name = "at"

    def __init__(self, networks: TermNetworks, weight: float = 1000.0) -> None:
        super().__init__()
        self.weight = weight
        self.pairs = resolve_pairs("one-to-one", [s.layers for s in networks.sources], networks.target.layers)

    def prepare(self, x: Tensor, sources: Sequence[Outputs], run: Callable[[int, Tensor], Outputs]) -> list[Tensor]:
        return [attention(sources[pair.source].features[pair.m]) for pair in self.pairs]

    def forward(self, given: list[Tensor], x: Tensor, target: Outputs, run: Callable[[Tensor], Outputs]) -> Tensor:
        maps = {n: attention(target.features[n]) for n in {pair.n for pair in self.pairs}}
        terms = [F.mse_loss(maps[pair.n], Q) for pair, Q in zip(self.pairs, given, strict=True)]
        return self.weight * torch.stack(terms).sum()


_CITES = "Zagoruyko & Komodakis, Paying More Attention to Attention, ICLR 2017"
AT = Method(_CITES, terms=(Attention,))
LWF_AT = Method(f"both: Li & Hoiem, ECCV 2016; {_CITES}", terms=(LwF, Attention))
