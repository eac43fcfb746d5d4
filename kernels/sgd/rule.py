"""The rule of SGD with momentum, as `torch.optim.SGD` (dampening 0).

g = ∇ + wd θ,   v' = μ v + g,   θ' = θ − α v'   (Nesterov: θ' = θ − α (g + μ v'))
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class SGD:
    """μ, wd and Nesterov's form; the learning rate α is given at each step."""

    momentum: float = 0.9
    weight_decay: float = 1e-4
    nesterov: bool = False
