"""What a training has learned, in numbers for learned.json."""

from typing import Any

import torch
from torch import Tensor

from l2t_fast.learner.learner import L2T


def peakedness(w: Tensor) -> dict[str, Any]:
    """How peaked channel weights w [N, C_s] are, each row with sum 1: the "channels" entry of learned.json.

    "channels": C_s. "effective": exp(mean entropy) / C_s, the share of the channels that would have the mean entropy
    of the N rows if their weights were equal: 1 is uniform, 1/C_s a single channel. "profile": C_s * w in falling
    order within each row, mean over the rows, C_s numbers with mean 1.
    """
    w = w.detach().double().cpu()
    channels = w.shape[1]
    entropy = torch.special.entr(w).sum(1).mean()
    profile = w.sort(1, descending=True).values.mean(0) * channels
    return {"channels": channels, "effective": entropy.exp().item() / channels, "profile": profile.tolist()}


def pair_names(learner: L2T) -> list[str]:
    """ "layer2 → features.6" of each pair, with the number of the source before it where there are several."""
    several = len(learner.sources) > 1
    return [
        f"{f'{s}:' if several else ''}{learner.source_layers[s][m]} → {learner.target_layers[n]}"
        for s, m, n in learner.pairs
    ]
