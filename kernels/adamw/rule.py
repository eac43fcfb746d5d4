"""The rule of Adam with decoupled weight decay, as `torch.optim.AdamW` (Loshchilov & Hutter 2019).

t' = t + 1,   m' = β₁ m + (1 − β₁) ∇,   s' = β₂ s + (1 − β₂) ∇²,
θ' = (1 − α wd) θ − α̂ m' / D   with   α̂ = α / (1 − β₁^t'),   D = ρ √s' + ε,   ρ = 1 / √(1 − β₂^t')
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class AdamW:
    """β₁ and β₂, ε, wd; the learning rate α is given at each step."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
