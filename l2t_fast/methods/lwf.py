"""Learning without Forgetting: an extra head keeps what the source answers."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2t_fast.errors import UnfitError
from l2t_fast.learner.network import Outputs
from l2t_fast.learner.terms import Term, TermNetworks
from l2t_fast.methods.base import Method


class LwF(Term):
    """λ_o Σ_sources mean_b CE(p, q): p = softmax(z_s / τ) of the source, q = softmax(h(t) / τ) of a new head h.

    h is linear and reads what the target's own classifier reads. CE without the factor τ². Li & Hoiem, "Learning
    without Forgetting", ECCV 2016, eq. 2-4: the outputs' roots by τ = 2, λ_o = 1.
    """

    name = "lwf"

    def __init__(self, networks: TermNetworks, weight: float = 1.0, temperature: float = 2.0) -> None:
        super().__init__()
        if not networks.target.hidden:
            raise UnfitError("lwf adds a head beside the target's classifier, so that it must end in an nn.Linear.")
        self.weight, self.temperature = weight, temperature
        self.heads = nn.ModuleList(nn.Linear(networks.target.hidden, source.classes) for source in networks.sources)

    def prepare(self, x: Tensor, sources: Sequence[Outputs], run: Callable[[int, Tensor], Outputs]) -> list[Tensor]:
        dtype = self.heads[0].get_parameter("weight").dtype
        softened = []
        for source in sources:
            assert source.logits is not None
            softened.append((source.logits.to(dtype) / self.temperature).softmax(1))  # [B, classes of the source]
        return softened

    def forward(self, given: list[Tensor], x: Tensor, target: Outputs, run: Callable[[Tensor], Outputs]) -> Tensor:
        assert target.hidden is not None
        hidden = target.hidden.to(given[0].dtype)  # [B, C]
        answers = [head(hidden) / self.temperature for head in self.heads]  # [B, classes of the source]
        terms = [F.cross_entropy(z, p) for z, p in zip(answers, given, strict=True)]
        return self.weight * torch.stack(terms).sum()


LWF = Method("Li & Hoiem, Learning without Forgetting, ECCV 2016", terms=(LwF,))
