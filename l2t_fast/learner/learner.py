"""The learner: sources, target, projections r and the meta-networks f ("what") and g ("where")."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2t_fast.choices import What, Where
from l2t_fast.errors import L2TError
from l2t_fast.kernels.layers.autograd import cast
from l2t_fast.kernels.layers.twins import half_parameters, replace_layers, running_buffers, without_statistics
from l2t_fast.kernels.matching import ops
from l2t_fast.kernels.matching.aten import resize
from l2t_fast.learner.pairs import Pair, PairSpec, resolve_pairs
from l2t_fast.learner.taps import Outputs, tap
from l2t_fast.learner.terms import MakeTerm, Networks, Shapes

_RECTIFIERS: dict[str, Callable[[Tensor], Tensor]] = {"relu6": F.relu6, "relu": F.relu, "relu-avg": F.relu}


class Constant(nn.Module):
    """The parameter of a pair weight that does not see the image: λ = softplus(10 a)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(()))


class L2T(nn.Module):
    """Learns what and where to transfer from frozen sources to a target (paper, section 2).

    Args:
        sources: a source network or several, any modules; frozen, always in evaluation mode.
        target: the target network, any module from images [B, C, H, W] to logits [B, classes].
        source_layers: names as in `named_modules()`; for several sources a list for each.
        target_layers: names likewise.
        pairs: "all-to-all", "one-to-one", "single", a list of (m, n) or of (source, m, n); see `resolve_pairs`.
            An empty list is plain training.
        what: channel weights w: "softmax" of a linear map of the pooled source feature, or "uniform" (1/C_s).
        where: pair weights λ: "relu6", "relu" or "relu-avg" (of the pooled feature divided by C_s) of a linear map,
            "softplus" (a constant softplus(10 a) for each pair), or "fixed" (1).
        terms: what else L_total has beside cross entropy and matching loss (`l2t_fast.learner.terms`): each is made of
            the shapes of the networks, and its parameters are trained together with the target.
        example: images [B, C, H, W] as the networks will get them; only their shape, device and dtype matter.

    Attributes:
        pairs: list of (source, m, n).
        projections: r, a Conv2d(C_t, C_s, 1) for each pair; trained together with the target.
        what, where: f and g, one for each pair; the meta-parameters φ.
        terms: nn.ModuleList of what `terms` made.
        sources, target: the networks as feature extractors; `classes` of the target, `source_layers`, `target_layers`.
        half_target: names of the target's parameters that are computed with in bfloat16 on bfloat16 images.

    The networks are shared, not copied: training the learner trains the `target` given here, and the sources are set
    to evaluation mode and frozen. Modes are the learner's own: `learner.eval()`, where `target.eval()` is not enough.

    Raises:
        L2TError: see `tap` and `resolve_pairs`; also sources and target on different devices or dtypes.
    """

    def __init__(
        self,
        sources: nn.Module | Sequence[nn.Module],
        target: nn.Module,
        *,
        source_layers: Sequence[str] | Sequence[Sequence[str]],
        target_layers: Sequence[str],
        pairs: PairSpec = "all-to-all",
        what: What = "softmax",
        where: Where = "relu6",
        terms: Sequence[MakeTerm] = (),
        example: Tensor,
    ) -> None:
        super().__init__()
        if what not in ("softmax", "uniform"):
            raise L2TError(f"what='{what}' is unknown: use 'softmax' or 'uniform'.")
        if where not in (*_RECTIFIERS, "softplus", "fixed"):
            raise L2TError(
                f"where='{where}' is unknown: use {', '.join(map(repr, _RECTIFIERS))}, 'softplus' or 'fixed'."
            )
        networks = [sources] if isinstance(sources, nn.Module) else list(sources)
        layers = _layers_of_each(networks, source_layers)
        _check_placement(networks, target, example)

        source_taps = [
            tap(network.eval(), names, example, role=f"source {s}", output=bool(terms))
            for s, (network, names) in enumerate(zip(networks, layers, strict=True))
        ]
        self._target_taps = tap(target, target_layers, example, role="target", output=True)
        self._source_taps = source_taps
        self.sources = nn.ModuleList(taps.network for taps in source_taps).requires_grad_(False)
        self.target = self._target_taps.network
        for network in (*self.sources, self.target):
            replace_layers(network)
        # Not a submodule: it shares every parameter and buffer with the target.
        self._simulated = (without_statistics(self.target.train()),)
        self._half_sources = [half_parameters(network) for network in self.sources]
        self.half_target = half_parameters(self.target)
        self.source_layers = layers
        self.target_layers = list(target_layers)
        self.classes = self._target_taps.classes
        self.pairs: list[Pair] = resolve_pairs(pairs, [t.shapes for t in source_taps], self._target_taps.shapes)
        self._what, self._where = what, where

        # Only layers that some pair uses reach the operators.
        self._used_sources = sorted({(pair.source, pair.m) for pair in self.pairs})
        self._used_targets = sorted({pair.n for pair in self.pairs})
        self.source_of = [self._used_sources.index((pair.source, pair.m)) for pair in self.pairs]
        self.target_of = [self._used_targets.index(pair.n) for pair in self.pairs]
        sizes = [self._target_taps.shapes[pair.n][1:] for pair in self.pairs]
        self._resizes = sorted(set(zip(self.source_of, sizes, strict=True)))
        self._resized_of = [self._resizes.index(resized) for resized in zip(self.source_of, sizes, strict=True)]
        self._image_shape = example.shape[1:]

        self.projections = nn.ModuleList()
        self.what = nn.ModuleList()
        self.where = nn.ModuleList()
        for pair in self.pairs:
            C_s = source_taps[pair.source].shapes[pair.m][0]
            C_t = self._target_taps.shapes[pair.n][0]
            self.projections.append(nn.Conv2d(C_t, C_s, 1))
            if what == "softmax":
                self.what.append(_linear(C_s, C_s, weight=0.0, bias=0.0))
            if where == "softplus":
                self.where.append(Constant())
            elif where != "fixed":
                self.where.append(_linear(C_s, 1, bias=1.0))
        shapes = [Shapes(taps.shapes, taps.classes, taps.hidden) for taps in (*source_taps, self._target_taps)]
        self.terms = nn.ModuleList(make(Networks(tuple(shapes[:-1]), shapes[-1])) for make in terms)
        for heads in (self.projections, self.what, self.where, self.terms):
            heads.to(example)
        self.train()

    def train(self, mode: bool = True) -> "L2T":
        """Training mode for the target; the sources stay in evaluation mode."""
        super().train(mode)
        self.sources.eval()
        return self

    def source_features(self, x: Tensor) -> list[Tensor]:
        """S: a feature [B, C_s, h, w] of each source layer that some pair uses; no gradient."""
        used = {s for s, _ in self._used_sources}
        with torch.no_grad():
            features = {s: self.source_outputs(s, x).features for s in used}
        return [features[s][m] for s, m in self._used_sources]

    def prepare(self, x: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
        """What an iteration needs of the sources: (S as `source_features`, what each term keeps); no gradient."""
        if not self.terms:
            return self.source_features(x), []
        with torch.no_grad():
            outputs = [self.source_outputs(s, x) for s in range(len(self.sources))]
            given = [term.prepare(x, outputs, self.source_outputs) for term in self.terms]  # type: ignore[operator]
        return [outputs[s].features[m] for s, m in self._used_sources], given

    def source_outputs(self, s: int, x: Tensor) -> Outputs:
        """Of source s; differentiable in x.

        On bfloat16 images the network is computed in bfloat16, its BatchNorms' statistics in float32.
        """
        network, names = self.sources[s], self._half_sources[s]
        if x.dtype != torch.bfloat16 or not names:
            return self._source_taps[s].split(network(x))
        half = dict(zip(names, cast(x.dtype, *map(network.get_parameter, names)), strict=True))
        return self._source_taps[s].split(torch.func.functional_call(network, half, (x,)))

    def resizes(self, x: Tensor) -> bool:
        """Whether the operators get R(S) for images x, instead of S.

        ATen's operators resize in memory: once an iteration is cheaper. Triton's gather from S itself. So do all of
        them for images of another size than the example's.
        """
        return x.shape[1:] == self._image_shape and ops.reads_resized(x)

    def matching_sources(self, S: Sequence[Tensor], resized: bool) -> tuple[list[Tensor], list[int]]:
        """(source features for the operators, which of them each pair has), from `source_features`.

        resized: R(S) [B, C_s, H, W] at every resolution that a paired target layer has.
        """
        if not resized:
            return list(S), self.source_of
        return [resize(S[m], size) for m, size in self._resizes], self._resized_of

    def target_outputs(
        self, x: Tensor, state: dict[str, Tensor] | None = None, *, simulated: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """(logits [B, classes], T: a feature [B, C_t, H, W] of each target layer that some pair uses).

        As `all_target_outputs`, which has all tapped layers.
        """
        outputs = self.all_target_outputs(x, state, simulated=simulated)
        assert outputs.logits is not None
        return outputs.logits, self.paired(outputs)

    def paired(self, outputs: Outputs) -> list[Tensor]:
        """T: of the target's outputs, a feature [B, C_t, H, W] of each layer that some pair uses."""
        return [outputs.features[n] for n in self._used_targets]

    def all_target_outputs(
        self, x: Tensor, state: dict[str, Tensor] | None = None, *, simulated: bool = False
    ) -> Outputs:
        """Of the target.

        `state`, parameters and buffers by the names of the target, replaces its own (`torch.func.functional_call`).
        A simulated pass leaves the running statistics of BatchNorm alone, in training mode.
        """
        network = self._simulated[0] if simulated else self.target
        return self._target_taps.split(
            network(x) if state is None else torch.func.functional_call(network, state, (x,))
        )

    def running_buffers(self, *, simulated: bool) -> dict[str, Tensor]:
        """The target's buffers that such a pass may change."""
        return dict(running_buffers(self._simulated[0] if simulated else self.target))

    def weights(self, S: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """(w^{mn} of eq. 2: a [B, C_s] for each pair, λ^{mn} of eq. 3: a [B] for each pair), from `source_features`."""
        return self._of_pairs(self._grouped_weights(S))

    def cotangents(self, S: Sequence[Tensor], beta: float) -> tuple[list[Tensor], list[Tensor]]:
        """(a = (β/B) λ w, so that L_wfm = Σ a E: a [B, C_s] for each pair, λ: a [B] for each pair)."""
        return self._of_pairs(
            (group, ((beta / w.shape[1]) * lam[:, :, None] * w).contiguous(), lam)
            for group, w, lam in self._grouped_weights(S)
        )

    def _of_pairs(self, groups: Iterable[tuple[list[int], Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
        """The rows of what groups of pairs have stacked, in the order of the pairs."""
        firsts: dict[int, Tensor] = {}
        seconds: dict[int, Tensor] = {}
        for group, first, second in groups:
            firsts |= zip(group, first.unbind(), strict=True)
            seconds |= zip(group, second.unbind(), strict=True)
        pairs = range(len(self.pairs))
        return [firsts[p] for p in pairs], [seconds[p] for p in pairs]

    def _grouped_weights(self, S: Sequence[Tensor]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Of the P pairs of each source layer at once: (the pairs, w [P, B, C_s], λ [P, B])."""
        for m, feature in enumerate(S):
            group = [p for p, source in enumerate(self.source_of) if source == m]
            pooled = feature.mean((2, 3), dtype=self.projections[group[0]].get_parameter("weight").dtype)  # [B, C_s]
            yield group, self._what_weights(group, pooled), self._where_weights(group, pooled)

    def _what_weights(self, group: Sequence[int], pooled: Tensor) -> Tensor:
        P, (B, C_s) = len(group), pooled.shape
        if self._what == "uniform":
            return pooled.new_full((), 1 / C_s).expand(P, B, C_s)
        weight, bias = (torch.stack(tensors) for tensors in _parameters(self.what, group, ("weight", "bias")))
        # The weights as the first factor, so that their gradients come out laid out in memory as they are.
        logits = torch.baddbmm(bias[:, :, None], weight, pooled.T.expand(P, C_s, B))  # [P, C_s, B]
        return F.softmax(logits, 1).mT  # [P, B, C_s]

    def _where_weights(self, group: Sequence[int], pooled: Tensor) -> Tensor:
        P, (B, C_s) = len(group), pooled.shape
        if self._where == "fixed":
            return pooled.new_ones(()).expand(P, B)
        if self._where == "softplus":
            (a,) = _parameters(self.where, group, ("a",))
            return F.softplus(10 * torch.stack(a))[:, None].expand(P, B)
        weight, bias = (torch.cat(tensors) for tensors in _parameters(self.where, group, ("weight", "bias")))
        scaled = pooled / C_s if self._where == "relu-avg" else pooled
        return _RECTIFIERS[self._where](torch.addmm(bias[:, None], weight, scaled.T))  # [P, B]

    def matching_loss(self, x: Tensor) -> Tensor:
        """L_wfm(θ | x, φ) of eq. 3 with β = 1, a scalar; differentiable twice in θ, r and φ.

        x: images [B, C, H, W]. An ordinary forward pass of the target, in the mode of the learner (`learner.eval()`).
        """
        S = self.source_features(x)
        _, T = self.target_outputs(x)
        E = ops.matching_distances(T, S, *self.projection_tensors(), self.source_of, self.target_of) if T else []
        a, _ = self.cotangents(S, beta=1.0)
        return torch.stack([(a_p * E_p).sum() for a_p, E_p in zip(a, E, strict=True)]).sum() if a else x.new_zeros(())

    def projection_tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """(r: a [C_s, C_t, 1, 1] for each pair, their biases: a [C_s] for each pair)."""
        convolutions = [r for r in self.projections if isinstance(r, nn.Conv2d)]
        return [r.weight for r in convolutions], [r.bias for r in convolutions if r.bias is not None]


def _parameters(heads: nn.ModuleList, group: Sequence[int], names: Sequence[str]) -> list[list[Tensor]]:
    """Of each name, the parameters of the heads in `group`."""
    return [[getattr(heads[p], name) for p in group] for name in names]


def _linear(inputs: int, outputs: int, *, bias: float, weight: float | None = None) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.constant_(layer.bias, bias)
    if weight is not None:
        nn.init.constant_(layer.weight, weight)
    return layer


def _layers_of_each(
    networks: Sequence[nn.Module], source_layers: Sequence[str] | Sequence[Sequence[str]]
) -> list[list[str]]:
    if isinstance(source_layers, str):
        raise L2TError(f"source_layers must be a list of names, not '{source_layers}'.")
    names = list(source_layers)
    if len(networks) == 1 and all(isinstance(name, str) for name in names):
        return [[str(name) for name in names]]
    if len(names) != len(networks) or any(isinstance(name, str) for name in names):
        raise L2TError(
            f"source_layers must hold one list of names for each of the {len(networks)} sources, not {source_layers!r}."
        )
    return [list(layers) for layers in names]


def _check_placement(networks: Sequence[nn.Module], target: nn.Module, example: Tensor) -> None:
    if example.dim() != 4:
        raise L2TError(f"example must be images [B, C, H, W], not a tensor of shape {list(example.shape)}.")
    if example.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise L2TError(f"{example.dtype} is not to be had: give networks and example float32, float64 or bfloat16.")
    shared = {id(p) for network in networks for p in network.parameters()}
    if any(id(p) in shared for p in target.parameters()):
        raise L2TError("a source and the target share parameters: give the target a copy, copy.deepcopy(network).")
    for role, module in [*((f"source {s}", network) for s, network in enumerate(networks)), ("target", target)]:
        for name, p in module.named_parameters():
            if p.device != example.device or p.dtype != example.dtype:
                raise L2TError(
                    f"parameter '{name}' of the {role} is {p.dtype} on {p.device}, but example is {example.dtype} on "
                    f"{example.device}: move all networks and the example to one device and dtype first."
                )
