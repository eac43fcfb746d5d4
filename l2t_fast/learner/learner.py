"""The learner: sources, target, projections r and the meta-networks f ("what") and g ("where")."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

from l2t_fast.bounds import shown
from l2t_fast.choices import What, Where
from l2t_fast.errors import L2TError
from l2t_fast.kernels.matching import gram, ops
from l2t_fast.kernels.matching.aten import resize
from l2t_fast.learner.candidates import layers_of
from l2t_fast.learner.network import Network, Outputs, Runs
from l2t_fast.learner.pairs import Pair, PairSpec, resolve_pairs
from l2t_fast.learner.taps import are_names, check_names, unwrapped
from l2t_fast.learner.terms import MakeTerm, Shapes, TermNetworks
from l2t_fast.learner.traced import trace
from l2t_fast.learner.weights import channel_weights, check_kinds, pair_weights, what_head, where_head

Layout = Mapping[str, str]


@dataclass(frozen=True)
class Networks:
    """What runs: the sources and the target, as they are or traced."""

    sources: Sequence[Runs]
    target: Runs
    traced: bool = False


class L2T(nn.Module):
    """Learns what and where to transfer from frozen sources to a target (paper, section 2).

    Args:
        sources: a source network or several, any modules; frozen, always in evaluation mode.
        target: the target network, any module from images [B, C, H, W] to logits [B, classes], or to what else
            the loss of the engine takes.
        source_layers: names as in `named_modules()`; for several sources a list for each. `relu_1` is the second call
            of `relu`, `stage2[1]` the second of several features that a layer returns. By default those that
            `candidates.layers_of` finds.
        target_layers: names likewise.
        pairs: "all-to-all", "one-to-one", "single", a list of (m, n) or of (source, m, n); see `resolve_pairs`.
            An empty list is plain training.
        what: channel weights w: "softmax" of a linear map of the pooled source feature, or "uniform" (1/C_s).
        where: pair weights λ: "relu6", "relu" or "relu-avg" (of the pooled feature divided by C_s) of a linear map,
            "relu6-inward" (relu6 that pairs come back from: at 0 and 6 a gradient passes if it leads inwards),
            "softplus" (a constant softplus(10 a) for each pair), or "fixed" (1).
        terms: what else L_total has beside cross entropy and matching loss (`l2t_fast.learner.terms`): each is made of
            the shapes of the networks, and its parameters are trained together with the target.
        layout: {layer: "NCHW", "NHWC" or "tokens"} of the target's layers whose layout cannot be found out, and
            {"source 0:LAYER": ...} of a source's; see `learner.layout`.
        logits: which of the target's outputs are the logits, by position or key, where it returns several.
        example: images [B, C, H, W] as the networks will get them; only their shape, device and dtype matter.

    Attributes:
        pairs: list of (source, m, n).
        projections: r, a Conv2d(C_t, C_s, 1) for each pair; trained together with the target.
        what, where: f and g, one for each pair; the meta-parameters φ.
        terms: nn.ModuleList of what `terms` made.
        sources, target: the networks themselves; `classes` of the target, `source_layers`, `target_layers`.
        source_networks, target_network: how they are run; `networks`: both. image_shape: (C, H, W) of the example.

    The networks are run as they are, not copied: training the learner trains the `target` given here, in the modes and
    with the hooks and settings that its modules have in that moment. A target that is in evaluation mode as a whole is
    put in training mode once, here; its modes are the caller's from then on. The sources are put in evaluation mode and
    frozen.

    Raises:
        L2TError: see `find_taps` and `resolve_pairs`; also sources and target on different devices or dtypes.
    """

    def __init__(
        self,
        sources: nn.Module | Sequence[nn.Module],
        target: nn.Module,
        *,
        source_layers: Sequence[str] | Sequence[Sequence[str]] | None = None,
        target_layers: Sequence[str] | None = None,
        pairs: PairSpec = "all-to-all",
        what: What = "softmax",
        where: Where = "relu6",
        terms: Sequence[MakeTerm] = (),
        layout: Layout | None = None,
        logits: int | str | None = None,
        example: Tensor,
    ) -> None:
        super().__init__()
        check_kinds(what, where)
        modules = _each(sources)
        modules = [unwrapped(module, f"source {s}") for s, module in enumerate(modules)]
        target = unwrapped(target, "target")
        _check_placement(modules, target, example)
        unmatched = pairs in ([], ()) and not terms
        if source_layers is None:
            roles = [(m.eval(), f"source {s}") for s, m in enumerate(modules)]
            source_layers = [
                [] if unmatched else layers_of(m, example, role=role, output=bool(terms)) for m, role in roles
            ]
        layers = _layers_of_each(modules, source_layers)
        if target_layers is None:
            target_layers = [] if unmatched else layers_of(target, example, role="target", output=True)
        check_names(target_layers, "target")
        layouts = _layouts_of_each(layout or {}, layers, target_layers)
        if not target.training:
            target.train()
        source_networks = [
            Network(m.eval(), names, example, role=f"source {s}", output=bool(terms), layout=layouts[s])
            for s, (m, names) in enumerate(zip(modules, layers, strict=True))
        ]
        target_network = Network(
            target, target_layers, example, role="target", output=True, logits=logits, layout=layouts[-1]
        )
        self.source_networks, self.target_network = source_networks, target_network
        self.networks = Networks(source_networks, target_network)
        self.sources = nn.ModuleList(modules).requires_grad_(False)
        self.target = target
        self.source_layers = layers
        self.target_layers = list(target_layers)
        self.classes = target_network.classes
        self.pairs: list[Pair] = resolve_pairs(pairs, [n.shapes for n in source_networks], target_network.shapes)
        self._what, self._where = what, where

        # Only layers that some pair uses reach the operators.
        self._used_sources = sorted({(pair.source, pair.m) for pair in self.pairs})
        self._used_targets = sorted({pair.n for pair in self.pairs})
        self.source_of = [self._used_sources.index((pair.source, pair.m)) for pair in self.pairs]
        self.target_of = [self._used_targets.index(pair.n) for pair in self.pairs]
        self._resizes = {in_gram_form: self._resizes_of(in_gram_form) for in_gram_form in (False, True)}
        self.image_shape = example.shape[1:]

        self.projections = nn.ModuleList()
        self.what = nn.ModuleList()
        self.where = nn.ModuleList()
        for pair in self.pairs:
            C_s = source_networks[pair.source].shapes[pair.m][0]
            C_t = target_network.shapes[pair.n][0]
            self.projections.append(nn.Conv2d(C_t, C_s, 1))
            for heads, head in ((self.what, what_head(what, C_s)), (self.where, where_head(where, C_s))):
                if head is not None:
                    heads.append(head)
        makers = _each(terms)
        if not all(map(callable, makers)):
            raise L2TError(f"terms must be a list of functions that make them, not {shown(terms)}.")
        *of_sources, of_target = (Shapes(n.shapes, n.classes, n.hidden) for n in (*source_networks, target_network))
        self.terms = nn.ModuleList(make(TermNetworks(tuple(of_sources), of_target)) for make in makers)
        for heads in (self.projections, self.what, self.where, self.terms):
            # Not what is there already: tensors without numbers (`candidates`) cannot be exchanged.
            if any((p.dtype, p.device) != (example.dtype, example.device) for p in heads.parameters()):
                heads.to(example)

    def train(self, mode: bool = True) -> "L2T":
        """Training mode for the target; the sources stay in evaluation mode."""
        super().train(mode)
        self.sources.eval()
        return self

    @property
    def uses_sources(self) -> bool:
        """Whether anything is learned from the sources."""
        return bool(self.pairs) or len(self.terms) > 0

    def traced_networks(self) -> Networks:
        """The networks as graphs, for a compiler, traced and proved equal.

        Raises:
            L2TError: one cannot be traced, or its graph computes something else.
        """
        if self.target_network.statistics_matter:
            raise L2TError("the target reads running statistics in training mode, which graphs of it leave out.")
        like = next(self.projections.parameters(), next(self.target.parameters()))
        example = like.detach().new_zeros(2, *self.image_shape)
        *sources, target = (trace(network, example) for network in (*self.source_networks, self.target_network))
        return Networks(sources, target, traced=True)

    def source_features(self, x: Tensor, networks: Networks | None = None) -> list[Tensor]:
        """S: a feature [B, C_s, h, w] of each source layer that some pair uses; no gradient."""
        used = {s for s, _ in self._used_sources}
        with torch.no_grad():
            features = {s: self.source_outputs(s, x, networks).features for s in used}
        return [features[s][m] for s, m in self._used_sources]

    def source_pass(self, x: Tensor, networks: Networks | None = None) -> tuple[list[Tensor], list[list[Tensor]]]:
        """What an iteration needs of the sources: (S as `source_features`, what each term keeps); no gradient."""
        if not self.terms:
            return self.source_features(x, networks), []
        with torch.no_grad():
            outputs = [self.source_outputs(s, x, networks) for s in range(len(self.sources))]
            kept = [
                term.prepare(x, outputs, lambda s, z: self.source_outputs(s, z, networks))  # type: ignore[operator]
                for term in self.terms
            ]
        return [outputs[s].features[m] for s, m in self._used_sources], kept

    def source_outputs(self, s: int, x: Tensor, networks: Networks | None = None) -> Outputs:
        """Of source s; differentiable in x.

        On bfloat16 images the network is computed in bfloat16, its BatchNorms' statistics in float32.
        """
        network = (networks or self.networks).sources[s]
        return network.run(x, network.in_precision(x.dtype, {}))

    def resizes(self, x: Tensor) -> bool:
        """Whether the operators get R(S) for images x, instead of S.

        ATen's operators resize in memory: once an iteration is cheaper. Triton's gather from S itself. So do all of
        them for images of another size than the example's.
        """
        return x.shape[1:] == self.image_shape and ops.reads_resized(x)

    def matching_sources(self, S: Sequence[Tensor], resized: bool) -> tuple[list[Tensor], list[int]]:
        """(source features for the operators, which of them each pair has), from `source_features`.

        resized: R(S) [B, C_s, H, W] at every resolution that a paired target layer has; S itself for layers in the
        Gram form.
        """
        if not resized:
            return list(S), self.source_of
        resizes, of_pairs = self._resizes[len(S) > 0 and gram.serves(S[0])]
        return [resize(S[m], size) for m, size in resizes], of_pairs

    def _resizes_of(self, in_gram_form: bool) -> tuple[list[tuple[int, tuple[int, int]]], list[int]]:
        """((source layer, H x W) of each feature that the operators read, which of them each pair has).

        in_gram_form: whether layers may be matched so, where it pays.
        """
        shapes = [(1, *self.source_networks[s].shapes[m]) for s, m in self._used_sources]
        needed = []
        for m, pair in zip(self.source_of, self.pairs, strict=True):
            target = (1, *self.target_network.shapes[pair.n])
            beside = [shapes[i] for i, other in zip(self.source_of, self.pairs, strict=True) if other.n == pair.n]
            own = in_gram_form and gram.pays(target, beside)
            needed.append((m, (shapes[m] if own else target)[2:]))
        resizes = sorted(set(needed))
        return resizes, [resizes.index(resized) for resized in needed]

    def target_outputs(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(logits [B, classes], T: a feature [B, C_t, H, W] of each target layer that some pair uses).

        An ordinary forward pass of the target, in the modes that it is in.
        """
        outputs = self.networks.target.run(x)
        assert outputs.logits is not None
        return outputs.logits, self.paired(outputs)

    def paired(self, outputs: Outputs) -> list[Tensor]:
        """T: of the target's outputs, a feature [B, C_t, H, W] of each layer that some pair uses."""
        return [outputs.features[n] for n in self._used_targets]

    def weights(self, S: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """(w^{mn} of eq. 2: a [B, C_s] for each pair, λ^{mn} of eq. 3: a [B] for each pair), from `source_features`."""
        return self._by_pair(self._grouped_weights(S))

    def coefficients(self, S: Sequence[Tensor], beta: float) -> tuple[list[Tensor], list[Tensor]]:
        """(a = (β/B) λ w, so that L_wfm = Σ a E: a [B, C_s] for each pair, λ: a [B] for each pair)."""
        return self._by_pair(
            (group, ((beta / w.shape[1]) * lam[:, :, None] * w).contiguous(), lam)
            for group, w, lam in self._grouped_weights(S)
        )

    def _by_pair(self, groups: Iterable[tuple[list[int], Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
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
            w = channel_weights(self._what, self.what, group, pooled)
            yield group, w, pair_weights(self._where, self.where, group, pooled)

    def matching_loss(self, x: Tensor) -> Tensor:
        """L_wfm(θ | x, φ) of eq. 3 with β = 1, a scalar; differentiable twice in θ, r and φ.

        x: images [B, C, H, W]. An ordinary forward pass of the target, in the modes that it is in.
        """
        if not isinstance(x, Tensor):
            raise L2TError(f"x must be images [B, C, H, W], not {shown(x)}.")
        S = self.source_features(x)
        _, T = self.target_outputs(x)
        E = ops.matching_distances(T, S, *self.projection_tensors(), self.source_of, self.target_of) if T else []
        a, _ = self.coefficients(S, beta=1.0)
        return torch.stack([(a_p * E_p).sum() for a_p, E_p in zip(a, E, strict=True)]).sum() if a else x.new_zeros(())

    def projection_tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """(r: a [C_s, C_t, 1, 1] for each pair, their biases: a [C_s] for each pair)."""
        convolutions = [r for r in self.projections if isinstance(r, nn.Conv2d)]
        return [r.weight for r in convolutions], [r.bias for r in convolutions if r.bias is not None]


def _layouts_of_each(
    layout: Layout, source_layers: Sequence[Sequence[str]], target_layers: Sequence[str]
) -> list[dict[str, str]]:
    """The layouts given for each source, and for the target.

    Raises:
        L2TError: a layer that is not tapped.
    """
    found: list[dict[str, str]] = [{} for _ in (*source_layers, target_layers)]
    if not isinstance(layout, Mapping) or not are_names([*layout, *layout.values()]):
        raise L2TError(f"layout must be a dictionary of names of layers and of layouts, not {shown(layout)}.")
    for key, value in layout.items():
        source, colon, name = key.partition(":")
        places = [f"source {s}" for s in range(len(source_layers))]
        s = places.index(source) if colon and source in places else -1
        layer = name if s >= 0 else key
        if layer not in [*source_layers, list(target_layers)][s]:
            raise L2TError(
                f"layout names '{key}', which is no tapped layer: give a layer of the target, or 'source 0:LAYER'."
            )
        found[s][layer] = value
    return found


def _layers_of_each(
    networks: Sequence[nn.Module], source_layers: Sequence[str] | Sequence[Sequence[str]]
) -> list[list[str]]:
    if isinstance(source_layers, str):
        raise L2TError(f"source_layers must be a list of names, not '{source_layers}'.")
    if len(networks) == 1 and are_names(source_layers):
        return [list(map(str, source_layers))]
    names: list[Any] = list(source_layers) if isinstance(source_layers, Sequence) else [source_layers]
    if not all(are_names([entry]) or are_names(entry) for entry in names):
        raise L2TError(f"source_layers must be names of layers, not {shown(source_layers)}.")
    if len(names) != len(networks) or any(isinstance(name, str) for name in names):
        raise L2TError(
            f"source_layers must hold one list of names for each of the {len(networks)} sources, not {source_layers!r}."
        )
    return [list(layers) for layers in names]


def _each(given: Any) -> list[Any]:
    """What may be one or several as a list."""
    several = isinstance(given, Iterable) and not isinstance(given, nn.Module | str)
    return list(given) if several else [given]


def _places_of(network: nn.Module) -> Iterator[tuple[int, str]]:
    """(memory that holds tensors of it, which)."""
    for what, tensors in (("buffers", network.buffers()), ("parameters", network.parameters())):
        for tensor in tensors:
            if not is_lazy(tensor) and tensor.layout == torch.strided and tensor.untyped_storage().nbytes():
                yield tensor.untyped_storage()._cdata, what


def _check_apart(target: nn.Module) -> None:
    """Raises L2TError for parameters that share memory, whose steps would undo each other."""
    found: list[tuple[int, int, int, str]] = []  # (the memory, first and last entry, the parameter)
    for name, p in target.named_parameters():
        if not is_lazy(p) and p.layout == torch.strided and p.numel():
            span = sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True))
            overlap = any(size > 1 and not stride for size, stride in zip(p.shape, p.stride(), strict=True))
            first = int(p.storage_offset())
            found += [(p.untyped_storage()._cdata, first, first + span, name)] * (1 + overlap)
    found.sort()
    for (memory, _, last, one), (other_memory, first, _, other) in itertools.pairwise(found):
        if memory == other_memory and first <= last:
            raise L2TError(
                f"parameters '{one}' and '{other}' of the target share memory: make them one parameter, or give each a "
                "copy, nn.Parameter(p.clone())."
            )


@torch.no_grad()
def _check_placement(networks: Sequence[nn.Module], target: nn.Module, example: Tensor) -> None:
    if not isinstance(example, Tensor) or example.dim() != 4:
        what = f"a tensor of shape {list(example.shape)}" if isinstance(example, Tensor) else shown(example)
        raise L2TError(f"example must be images [B, C, H, W], not {what}.")
    if example.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise L2TError(f"{example.dtype} is not to be had: give networks and example float32, float64 or bfloat16.")
    shared = {place: what for network in networks for place, what in _places_of(network)}
    both = [shared[place] for place, _ in _places_of(target) if place in shared]
    if both:
        raise L2TError(f"a source and the target share {max(both)}: give the target a copy, copy.deepcopy(network).")
    _check_apart(target)
    for role, module in [*((f"source {s}", network) for s, network in enumerate(networks)), ("target", target)]:
        for name, p in module.named_parameters():
            if p.device != example.device or p.dtype != example.dtype:
                raise L2TError(
                    f"parameter '{name}' of the {role} is {p.dtype} on {p.device}, but example is {example.dtype} on "
                    f"{example.device}: move all networks and the example to one device and dtype first."
                )
            finite = None if is_lazy(p) or p.is_meta else p.isfinite().all()
            if finite is not None and not isinstance(finite, FakeTensor) and not finite:
                raise L2TError(f"parameter '{name}' of the {role} is not finite: load good weights into it.")
