"""The matching operators of one target layer in the Gram form, for layers whose H W is much larger than C_t.

With a row of ones under T and the bias beside r, T̃ = [T; 1], r̃ = [r, bias], and per sample

    X = T̃ T̃ᵀ        Z = R(S) T̃ᵀ        and in a direction (u_T, u_r), ũ_T = [u_T; 0]:   Y = ũ_T T̃ᵀ     V = R(S) ũ_Tᵀ

the formulas of `aten` need d = r T + bias − R(S) nowhere; nothing has H W times ΣC_s entries, and S is met at its own
resolution, as R(S) T̃ᵀ = S (Rᵀ T̃ᵀ), where that is the lower one:

    E = (1/HW) (Σ_c (r̃ X − 2 Z) ∘ r̃ + Σ_ij R(S)²)
    g_T = rᵀ k a (r̃ T̃) − R(rᵀ k a S)                                          g_r̃ = Σ_b k a (r̃ X − Z)
    v_T = (rᵀ k a r̃) ũ_T + (rᵀ k a ũ_r + u_rᵀ k a r̃) T̃ − R(u_rᵀ k a S)       v_r̃ = Σ_b k a (r̃ (Y + Yᵀ) + ũ_r X − V)
    v_a = k Σ_c ((r̃ Y + ũ_r X − V) ∘ r̃ − Z ∘ ũ_r)

Where d is small these are differences of large numbers: in float32 the results are up to 20 times further from float64
than PyTorch's (`python -m benchmarks gram`). So they are computed in the next wider precision, of which CPUs have
enough; on GPUs it would cost more than it saves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

WIDER = {torch.bfloat16: torch.float32, torch.float32: torch.float64}
GAIN = 4  # times fewer products that pay for their precision (measured: `python -m benchmarks gram`)

Shape = Sequence[int]


def serves(feature: Tensor) -> bool:
    """Whether features like this one may be matched in the Gram form."""
    return feature.device.type == "cpu" and feature.dtype in WIDER


def pays(target: Shape, sources: Sequence[Shape]) -> bool:
    """Whether it does for a target feature [B, C_t, H, W] and the source features [B, C_s, h, w] of its pairs."""
    return GAIN * flops(target, sources) < direct_flops(target, sources)


def flops(target: Shape, sources: Sequence[Shape]) -> int:
    """Of the gradient: rᵀ k a r, that times T, X, r X, and both products with S."""
    B, C_t, *size = target
    area, K = prod(size), sum(S[1] for S in sources)
    met = sum(S[1] * min(prod(S[2:]), area) for S in sources)
    return 2 * B * C_t * (2 * K * C_t + 2 * C_t * area + 2 * met)


def direct_flops(target: Shape, sources: Sequence[Shape]) -> int:
    """Of the gradient in the direct form: d, g_T, g_r."""
    return 3 * 2 * prod(target) * sum(S[1] for S in sources)


@dataclass(frozen=True)
class Point:
    """A target layer with its K = ΣC_s source channels, all in the precision of the computation."""

    T: Tensor  # T̃ [B, C_t + 1, HW]
    r: Tensor  # r̃ [K, C_t + 1]
    sources: list[Tensor]  # R(S), or S where it has fewer positions
    size: tuple[int, int]
    Z: Tensor  # [B, K, C_t + 1]

    @property
    def area(self) -> int:
        return self.size[0] * self.size[1]

    def scaled(self, a: Tensor) -> Tensor:
        """k a [B, K, 1] of a [B, K]."""
        return a.to(self.T.dtype).mul(2 / self.area).unsqueeze(2)


def point(feature: Tensor, sources: Sequence[Tensor], r: Tensor, bias: Tensor, dtype: torch.dtype) -> Point:
    """feature [B, C_t, H, W], sources [B, C_s, h, w], r [K, C_t], bias [K]."""
    H, W = feature.shape[2:]
    T = F.pad(feature.to(dtype).flatten(2), (0, 0, 0, 1), value=1.0)
    r = torch.cat([r.to(dtype), bias.to(dtype)[:, None]], 1)
    met = [S.to(dtype) if S[0, 0].numel() <= H * W else _resized(S.to(dtype), (H, W)) for S in sources]
    return Point(T, r, met, (H, W), _met(T, met, (H, W)))


def distances(at: Point) -> Tensor:
    """E [B, K]."""
    squares = torch.cat([_resized(S, at.size).square().sum((2, 3)) for S in at.sources], 1)
    rX = at.r @ (at.T @ at.T.mT)  # [B, K, C_t + 1]
    return ((rX - 2 * at.Z).mul_(at.r).sum(2) + squares) / at.area


def gradient(at: Point, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(g_T [B, C_t, H, W], g_r [K, C_t], g_bias [K]) of coefficients a [B, K]."""
    ka = at.scaled(a)
    r = at.r[:, :-1]
    back = (ka * r).mT  # rᵀ k a [B, C_t, K]
    g_T = (back @ at.r @ at.T).view(len(back), -1, *at.size).sub_(_from_sources(back, at))
    g_r = (at.r @ (at.T @ at.T.mT) - at.Z).mul_(ka).sum(0)
    return g_T, g_r[:, :-1], g_r[:, -1]


def adjoint(
    at: Point, a: Tensor, u_feature: Tensor, u_r: Tensor, u_bias: Tensor, primal: bool
) -> tuple[tuple[Tensor, Tensor, Tensor] | None, Tensor]:
    """((v_T, v_r, v_bias) where `primal`, v_a [B, K]); shapes as of `gradient`."""
    dtype = at.T.dtype
    u_T = F.pad(u_feature.to(dtype).flatten(2), (0, 0, 0, 1))  # ũ_T [B, C_t + 1, HW]
    u_r = torch.cat([u_r.to(dtype), u_bias.to(dtype)[:, None]], 1)  # ũ_r [K, C_t + 1]
    Y, V = u_T @ at.T.mT, _met(u_T, at.sources, at.size)
    H = at.r @ Y + u_r @ (at.T @ at.T.mT)  # that times T̃ᵀ [B, K, C_t + 1]
    v_a = ((H - V) * at.r - at.Z * u_r).sum(2).mul_(2 / at.area)
    if not primal:
        return None, v_a
    ka = at.scaled(a)
    back, u_back = (ka * at.r[:, :-1]).mT, (ka * u_r[:, :-1]).mT
    v_T = (back @ at.r @ u_T).add_((back @ u_r + u_back @ at.r) @ at.T).view(len(back), -1, *at.size)
    v_r = (H + at.r @ Y.mT - V).mul_(ka).sum(0)
    return (v_T.sub_(_from_sources(u_back, at)), v_r[:, :-1], v_r[:, -1]), v_a


def _resized(S: Tensor, size: tuple[int, int]) -> Tensor:
    if S.shape[2:] == size:
        return S
    return F.interpolate(S, size=size, mode="bilinear", align_corners=False)


def _met(T: Tensor, sources: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """R(S) Tᵀ of all sources [B, K, C] for T [B, C, HW]."""
    seen = {size: T.mT}  # Rᵀ Tᵀ [B, hw, C] of each resolution
    for h, w in {tuple(S.shape[2:]) for S in sources} - {size}:
        shape = [*T.shape[:2], h, w]
        small = torch.ops.aten.upsample_bilinear2d_backward(T.unflatten(2, size), size, shape, False)
        seen[h, w] = small.flatten(2).mT
    return torch.cat([S.flatten(2) @ seen[S.shape[2], S.shape[3]] for S in sources], 1)


def _from_sources(back: Tensor, at: Point) -> Tensor:
    """R(Σ back S) [B, C_t, H, W] for back [B, C_t, K]: the sums at each resolution, and then their resizes."""
    sums: dict[tuple[int, int], Tensor] = {}
    parts = back.split([S.shape[1] for S in at.sources], 2)
    for part, S in zip(parts, at.sources, strict=True):
        size, product = (S.shape[2], S.shape[3]), part @ S.flatten(2)
        sums[size] = sums[size].add_(product) if size in sums else product
    resized = [_resized(x.unflatten(2, size), at.size) for size, x in sums.items()]
    return torch.stack(resized).sum(0) if len(resized) > 1 else resized[0]
