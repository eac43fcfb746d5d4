"""The matching operators in ATen: the CPU path, and the oracle of every other implementation.

Formulas (design notes: CONTRIBUTING.md). Per pair p = (m, n), with T = T^n [B, C_t, H, W], S = R(S^m) [B, C_s, H, W]:

    d = r T + bias − S                 E_bc = (1/HW) Σ_ij d²             G = k a d,  k = 2/HW
    g_T = rᵀ G (summed over the pairs of a target layer),   g_r = Σ_b G Tᵀ,   g_bias = Σ G

All pairs of a target layer are stacked along C_s, so that every product below is one batched GEMM a layer. Layers where
that saves most products go through the Gram form instead (`gram.py`).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from l2t_fast.kernels.matching import gram


def resize(source: Tensor, size: Sequence[int]) -> Tensor:
    """R(S): bilinear resize of a source feature to the target feature's H x W, where they differ."""
    if source.shape[-2:] == tuple(size):
        return source
    return F.interpolate(source, size=list(size), mode="bilinear", align_corners=False)


def matching_distances(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    projections: Sequence[Tensor],
    biases: Sequence[Tensor],
    source_of: Sequence[int],
    target_of: Sequence[int],
) -> list[Tensor]:
    """E; see `matching.ops.matching_distances`."""
    E: list[Tensor] = [r.new_empty(0) for r in projections]
    for n, feature in enumerate(targets):
        group = [p for p, t in enumerate(target_of) if t == n]
        if group:
            at = _in_gram_form(feature, projections, sources, biases, source_of, group)
            if at is None:
                E_n = _difference(feature, projections, sources, biases, source_of, group).square().mean(2)
            else:
                E_n = gram.distances(at)
            _scatter(E, group, E_n.split([projections[p].shape[0] for p in group], 1), projections)
    return E


def matching_gradient(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    projections: Sequence[Tensor],
    biases: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    source_of: Sequence[int],
    target_of: Sequence[int],
    distances: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """(E, g_T, g_r, g_bias); see `matching.ops.matching_gradient`."""
    channels = [r.shape[0] for r in projections]
    E: list[Tensor] = [r.new_empty(0) for r in projections] if distances else []
    g_r: list[Tensor] = [r.new_empty(0) for r in projections]
    g_bias: list[Tensor] = [r.new_empty(0) for r in projections]
    g_T: list[Tensor] = []
    for n, feature in enumerate(targets):
        group = [p for p, t in enumerate(target_of) if t == n]
        if not group:
            g_T.append(torch.zeros_like(feature))
            continue
        split = [channels[p] for p in group]
        if (at := _in_gram_form(feature, projections, sources, biases, source_of, group)) is not None:
            E_n = gram.distances(at) if distances else None
            of_T, of_r, of_bias = gram.gradient(at, torch.cat([coefficients[p] for p in group], 1))
        else:
            T = feature.flatten(2)  # [B, C_t, HW]
            r = _stacked(projections, group, T)  # [B, ΣC_s, C_t]
            d = _difference(feature, projections, sources, biases, source_of, group)  # [B, ΣC_s, HW]
            E_n = d.square().mean(2) if distances else None
            G = d.mul_(_scaled(coefficients, group, T.shape[2]))
            of_T, of_r, of_bias = torch.bmm(r.mT, G), torch.bmm(G, T.mT).sum(0), G.sum((0, 2))
        if E_n is not None:
            _scatter(E, group, E_n.split(split, 1), coefficients)
        _scatter(g_r, group, of_r[:, :, None, None].split(split), projections)
        _scatter(g_bias, group, of_bias.split(split), biases)
        g_T.append(_like(of_T, feature))
    return E, g_T, g_r, g_bias


def matching_adjoint(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    projections: Sequence[Tensor],
    biases: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    u_targets: Sequence[Tensor],
    u_projections: Sequence[Tensor],
    u_biases: Sequence[Tensor],
    source_of: Sequence[int],
    target_of: Sequence[int],
    primal: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """(v_T, v_r, v_bias, v_a); see `matching.ops.matching_adjoint`.

    H = r u_T + u_r T + u_bias;  v_T = rᵀ(k a H) + u_rᵀ G;  v_r = Σ_b (k a H) Tᵀ + G u_Tᵀ;
    v_bias = Σ k a H;  v_a = k Σ_ij d H.
    """
    channels = [r.shape[0] for r in projections]
    v_r: list[Tensor] = [r.new_empty(0) for r in projections] if primal else []
    v_bias: list[Tensor] = [r.new_empty(0) for r in projections] if primal else []
    v_a: list[Tensor] = [a.new_zeros(a.shape) for a in coefficients]
    v_T: list[Tensor] = []
    for n, (feature, u_feature) in enumerate(zip(targets, u_targets, strict=True)):
        group = [p for p, t in enumerate(target_of) if t == n]
        if not group:
            if primal:
                v_T.append(torch.zeros_like(feature))
            continue
        split = [channels[p] for p in group]
        if (at := _in_gram_form(feature, projections, sources, biases, source_of, group)) is not None:
            u_r, u_bias = _rows(u_projections, group), torch.cat([u_biases[p] for p in group])
            a = torch.cat([coefficients[p] for p in group], 1)
            of_primal, of_a = gram.adjoint(at, a, u_feature, u_r, u_bias, primal)
            _scatter(v_a, group, of_a.split(split, 1), coefficients)
            if of_primal is not None:
                of_T, of_r, of_bias = of_primal
                _scatter(v_r, group, of_r[:, :, None, None].split(split), projections)
                _scatter(v_bias, group, of_bias.split(split), biases)
                v_T.append(_like(of_T, feature))
            continue
        T, u_T = feature.flatten(2), u_feature.flatten(2)  # [B, C_t, HW]
        area = T.shape[2]
        r, u_r = _stacked(projections, group, T), _stacked(u_projections, group, T)  # [B, ΣC_s, C_t]
        u_bias = torch.cat([u_biases[p] for p in group]).to(T.dtype)  # [ΣC_s]
        d = _difference(feature, projections, sources, biases, source_of, group)  # [B, ΣC_s, HW]
        H = torch.baddbmm(u_bias[None, :, None], r, u_T).baddbmm_(u_r, T)  # [B, ΣC_s, HW]
        _scatter(v_a, group, (d * H).sum(2).mul_(2 / area).split(split, 1), coefficients)
        if not primal:
            continue
        ka = _scaled(coefficients, group, area)  # [B, ΣC_s, 1]
        kaH, G = H.mul_(ka), d.mul_(ka)
        v_stacked = torch.bmm(kaH, T.mT).baddbmm_(G, u_T.mT).sum(0)  # [ΣC_s, C_t]
        _scatter(v_r, group, v_stacked[:, :, None, None].split(split), projections)
        _scatter(v_bias, group, kaH.sum((0, 2)).split(split), biases)
        v_T.append(_like(torch.bmm(r.mT, kaH).baddbmm_(u_r.mT, G), feature))
    return v_T, v_r, v_bias, v_a


def _difference(
    feature: Tensor,
    projections: Sequence[Tensor],
    sources: Sequence[Tensor],
    biases: Sequence[Tensor],
    source_of: Sequence[int],
    group: Sequence[int],
) -> Tensor:
    """d = r T + bias − R(S) of the pairs in `group`, stacked along channels: [B, ΣC_s, HW]."""
    T, size = feature.flatten(2), feature.shape[-2:]
    bias = torch.cat([biases[p] for p in group]).to(T.dtype)[:, None, None]  # [ΣC_s, 1, 1]
    S = torch.cat([resize(sources[source_of[p]], size) for p in group], 1)  # [B, ΣC_s, H, W], of its own
    stacked = S.sub_(bias).flatten(2)  # [B, ΣC_s, HW]
    r = _stacked(projections, group, T)
    if stacked.is_contiguous():
        return stacked.baddbmm_(r, T, beta=-1)
    # Into channels_last CPUs multiply in a loop of their own: in bfloat16 hundreds of times slower.
    return torch.baddbmm(stacked, r, T, beta=-1)


def _in_gram_form(
    feature: Tensor,
    projections: Sequence[Tensor],
    sources: Sequence[Tensor],
    biases: Sequence[Tensor],
    source_of: Sequence[int],
    group: Sequence[int],
) -> gram.Point | None:
    """The pairs in `group`, which share this target feature, where the Gram form pays."""
    S = [sources[source_of[p]] for p in group]
    if not gram.serves(feature) or not gram.pays(feature.shape, [x.shape for x in S]):
        return None
    bias = torch.cat([biases[p] for p in group])
    return gram.point(feature, S, _rows(projections, group), bias, gram.WIDER[feature.dtype])


def _rows(projections: Sequence[Tensor], group: Sequence[int]) -> Tensor:
    """The projections r of the pairs in `group`, stacked along C_s: [ΣC_s, C_t]."""
    return torch.cat([projections[p].flatten(1) for p in group])


def _stacked(projections: Sequence[Tensor], group: Sequence[int], T: Tensor) -> Tensor:
    """The same, shared by the batch and in its dtype: [B, ΣC_s, C_t]."""
    return _rows(projections, group).to(T.dtype).expand(T.shape[0], -1, -1)


def _scaled(coefficients: Sequence[Tensor], group: Sequence[int], area: int) -> Tensor:
    """k a of the pairs in `group`, k = 2/HW: [B, ΣC_s, 1]."""
    return torch.cat([coefficients[p] for p in group], 1).mul_(2 / area).unsqueeze(2)


def _scatter(into: list[Tensor], group: Sequence[int], values: Sequence[Tensor], like: Sequence[Tensor]) -> None:
    """Own copies, because the outputs of an operator must not share storage, in the dtype of `like`."""
    for p, value in zip(group, values, strict=True):
        into[p] = value.to(like[p].dtype, copy=True, memory_format=torch.contiguous_format)


def _like(flat: Tensor, feature: Tensor) -> Tensor:
    """What has as many entries as `feature`, [B, C, HW] in order, in its shape, strides and dtype."""
    out = torch.empty_like(feature)
    own = out.is_contiguous() and flat.dtype == out.dtype
    return flat.view(feature.shape) if own else out.copy_(flat.view(feature.shape))
