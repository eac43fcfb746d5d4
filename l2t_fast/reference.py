"""The paper in plain PyTorch: the oracle that the fast path is tested against, and the baseline it is timed against.

"Learning What and Where to Transfer" (Jang et al., ICML 2019, arXiv 1905.05901), computed as the authors compute it:
the simulated steps change the real modules through `torch.optim.SGD`, the state before each of them is copied, and
the meta-gradient comes from replaying the steps backwards (reverse mode by recomputation). The source networks run
again at every matching step and every replay of one. Nothing is hoisted, fused or cached, and nothing of the fast
path is imported. How the user's networks run is said, and done, in `reference_networks.py`.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2t_fast.errors import L2TError
from l2t_fast.reference_networks import (
    Generators,
    Maps,
    Replaced,
    forward_with_features,
    select,
    split,
    switched_hooks,
    twice_differentiable,
)
from l2t_fast.reference_steps import State, adjoint, take_step

What = Literal["softmax", "uniform"]
Where = Literal["relu6", "relu", "relu-avg", "softplus", "fixed"]
Scheme = Literal["transfer", "simulation"]
Batch = tuple[Tensor, Tensor]


class ConstantWeight(nn.Module):
    """The pair weight λ = softplus(10 a), the same for every image."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(like.new_zeros(()))

    def forward(self, pooled: Tensor) -> Tensor:
        return F.softplus(10 * self.a).expand(len(pooled), 1)  # [B, 1]


@dataclass(frozen=True)
class _State:
    """All that a simulated step changes: parameters and buffers, the optimizer's state, the random generators."""

    tensors: list[Tensor]
    optimizer: dict[str, Any]
    generators: Generators


class Reference:
    """L2T-ww: a target network and the meta-networks that say what and where to transfer to it.

    Symbols: θ = the target's trainable parameters and the projections r; φ = the parameters of `what` (f) and
    `where` (g); S^m, T^n = feature maps of source layer m and target layer n; R = bilinear resize to the size of T^n.

    L_wfm(θ|x,φ) = β Σ_pairs mean_b λ_b Σ_c w_bc (1/HW) Σ_ij (r(T^n(x)) − R(S^m(x)))²_bcij   (paper, section 2.1)
    with w_b = softmax(f(pool S^m)) and λ_b = relu6(g(pool S^m)), pool = global average;
    L_total = L_org + L_wfm, L_org = `loss` of outputs and labels, cross entropy by default.

    Args:
        sources: source network, or several; they are put into eval mode and frozen.
        target: target network; it is trained in place, in the modes that its modules are in. One that is in evaluation
            mode as a whole is put into training mode here, once.
        source_layers: names (as for `forward_with_features`) of the tapped layers, a list of them for each source.
        target_layers: names of the tapped layers of the target.
        source_maps, target_maps: what turns the outputs of some of these layers into [B, C, H, W], by their names.
        logits: where the target returns several outputs, the position, key or attribute of the logits.
        pairs: (source, m, n): indices of a source, of one of its layers and of a target layer.
        what: "softmax" as above, or "uniform": w = 1/C_s.
        where: "relu6" as above; "relu"; "relu-avg": relu of g(pool S^m / C_s); "softplus": softplus(10 a), one
            number a for each pair; "fixed": λ = 1.
        example: images [B, 3, H, W], from which the channel counts are learnt.
        lr, momentum, weight_decay, nesterov: SGD for θ, in real and in simulated steps.
        optimizer: or what makes of θ, by name, a torch.optim.SGD or AdamW, with groups of parameters as it likes.
        max_grad_norm: the gradient of each real and simulated step is clipped to this global norm.
        meta_lr, meta_weight_decay: Adam for φ.
        beta: β.
        inner_steps: T.
        scheme: "transfer" simulates T steps on L_wfm, then one on L_org, all on the batch of the real step (paper,
            section 2.2); "simulation" simulates T steps on L_total over batches x_1..x_T (ordinary bilevel scheme).

    Attributes:
        projections: Conv2d(C_t, C_s, 1), one for each pair.
        what: Linear(C_s, C_s), zero at start, one for each pair; empty for "uniform".
        where: Linear(C_s, 1), bias one at start (for "softplus" one number `a`, zero at start); empty for "fixed".
        optimizer, meta_optimizer: SGD and Adam; a learning-rate schedule may be attached to either.

    Raises:
        L2TError: unknown layer or option, or a pair out of range.
    """

    def __init__(
        self,
        sources: nn.Module | Sequence[nn.Module],
        target: nn.Module,
        *,
        source_layers: Sequence[str] | Sequence[Sequence[str]],
        target_layers: Sequence[str],
        pairs: Sequence[tuple[int, int, int]],
        example: Tensor,
        what: What = "softmax",
        where: Where = "relu6",
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        nesterov: bool = False,
        meta_lr: float = 1e-4,
        meta_weight_decay: float = 1e-4,
        beta: float = 0.5,
        inner_steps: int = 2,
        scheme: Scheme = "transfer",
        source_maps: Maps | None = None,
        target_maps: Maps | None = None,
        logits: int | str | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        optimizer: Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer] | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        for value, options in ((what, What), (where, Where), (scheme, Scheme)):
            if value not in get_args(options):
                raise L2TError(f"Unknown option {value!r}; choose one of {', '.join(get_args(options))}.")
        if isinstance(sources, nn.Module):
            sources, source_layers = [sources], [cast(Sequence[str], source_layers)]
        self.sources = [source.eval().requires_grad_(False) for source in sources]
        self.source_layers = [list(names) for names in source_layers]
        self.target = target
        self.target_layers = list(target_layers)
        self.pairs = list(pairs)
        self.where_kind = where
        self.beta, self.inner_steps, self.scheme = beta, inner_steps, scheme
        self.source_maps, self.target_maps, self.logits, self.loss = source_maps, target_maps, logits, loss
        if len(self.sources) != len(self.source_layers):
            raise L2TError("Give a list of layers for each source network.")
        for model, layers in zip([*self.sources, target], [*self.source_layers, self.target_layers], strict=True):
            if unknown := {name for name in layers if split(name)[0] not in dict(model.named_modules())}:
                raise L2TError(f"No layer {min(unknown)!r}; name layers as in named_modules().")

        modes = [(module, module.training) for module in target.modules()]
        tables = [(module._buffers, dict(module._buffers)) for module in target.modules()]
        buffers = copy.deepcopy(dict(target.named_buffers()))
        generators = Generators.get(example.device)
        target.eval()
        source_features = self._source_features(example)
        with torch.no_grad(), Replaced() as replaced:
            _, target_features = forward_with_features(target, self.target_layers, example, target_maps)
        self._replaced = replaced.met
        for module, training in modes:
            module.training = training
        for table, held in tables:
            table.update(held)
        with torch.no_grad():
            for name, buffer in target.named_buffers():
                buffer.copy_(buffers[name])
        generators.set()
        if not target.training:
            target.train()
        self.projections, self.what, self.where = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for s, m, n in self.pairs:
            try:
                feature, c_t = source_features[s][m], target_features[n].shape[1]
            except IndexError:
                raise L2TError(f"Pair {(s, m, n)} is out of range; give (source, m, n) from zero.") from None
            c_s = feature.shape[1]
            self.projections.append(nn.Conv2d(c_t, c_s, 1, device=feature.device, dtype=feature.dtype))
            if what == "softmax":
                f = nn.Linear(c_s, c_s, device=feature.device, dtype=feature.dtype)
                nn.init.zeros_(f.weight)
                nn.init.zeros_(f.bias)
                self.what.append(f)
            if where == "softplus":
                self.where.append(ConstantWeight(feature))
            elif where != "fixed":
                g = nn.Linear(c_s, 1, device=feature.device, dtype=feature.dtype)
                nn.init.ones_(g.bias)
                self.where.append(g)

        self.theta = {
            f"{part}.{name}": p
            for part, module in (("target", target), ("projections", self.projections))
            for name, p in module.named_parameters()
            if p.requires_grad
        }
        self.phi = {
            f"{part}.{name}": p
            for part, module in (("what", self.what), ("where", self.where))
            for name, p in module.named_parameters()
        }
        self.max_grad_norm = max_grad_norm
        self.optimizer = (
            torch.optim.SGD(self.theta.values(), lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
            if optimizer is None
            else optimizer(self.theta)
        )
        self.meta_optimizer = (
            torch.optim.Adam(self.phi.values(), lr=meta_lr, weight_decay=meta_weight_decay) if self.phi else None
        )

    def matching_loss(self, x: Tensor, beta: float = 1.0) -> Tensor:
        """L_wfm on images x [B, 3, H, W] with the given β, the target in the mode it is in; a scalar."""
        _, features = forward_with_features(self.target, self.target_layers, x, self.target_maps)
        return beta * self._matching(x, features)

    def step(
        self, x: Tensor | Sequence[Tensor], y: Tensor | Sequence[Tensor], val: Batch | None = None
    ) -> dict[str, Tensor]:
        """One iteration: the real step of θ, the simulation from there, and the Adam step of φ.

        Args:
            x, y: images [B, 3, H, W] and labels [B]; for scheme "simulation" also T of each (the real step
                uses the first).
            val: images and labels of L_meta; needed for scheme "simulation", else the batch itself by default.

        Returns:
            L_org ("loss") and L_wfm ("matching_loss") of the real step, and L_meta ("meta_loss") where there is a φ.

        Raises:
            L2TError: no `val` for scheme "simulation", or a number of batches other than T.
        """
        batches = self._batches(x, y, val)
        with twice_differentiable(self._replaced):
            org, matching = self._losses(*batches[0])
            self._sgd_step(org + matching)
        metrics = {"loss": org.detach(), "matching_loss": matching.detach()}
        if self.meta_optimizer is not None:
            with twice_differentiable(self._replaced):
                metrics["meta_loss"], gradient = self.simulate(batches, val)
            for p, g in zip(self.phi.values(), gradient, strict=True):
                p.grad = g
            self.meta_optimizer.step()
        return metrics

    def meta_gradient(
        self, x: Tensor | Sequence[Tensor], y: Tensor | Sequence[Tensor], val: Batch | None = None
    ) -> dict[str, Tensor]:
        """dL_meta/dφ by parameter name, simulated from the current θ and momentum; arguments as for `step`.

        Parameters, buffers, momentum and random generators are left as they were. Without φ: empty.
        """
        batches = self._batches(x, y, val)
        if not self.phi:
            return {}
        start = self._save()
        with twice_differentiable(self._replaced):
            _, gradient = self.simulate(batches, val)
        self._restore(start)
        return dict(zip(self.phi, gradient, strict=True))

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Copies of the states of target, projections, what and where, and the momentum v of each parameter in θ."""
        state = self.optimizer.state
        momentum = {
            name: state.get(p, {}).get("momentum_buffer", torch.zeros_like(p)) for name, p in self.theta.items()
        }
        return copy.deepcopy(
            {
                "target": self.target.state_dict(),
                "projections": self.projections.state_dict(),
                "what": self.what.state_dict(),
                "where": self.where.state_dict(),
                "momentum": momentum,
            }
        )

    def _source_features(self, x: Tensor) -> list[list[Tensor]]:
        with torch.no_grad():
            return [
                forward_with_features(source, layers, x, self.source_maps)[1]
                for source, layers in zip(self.sources, self.source_layers, strict=True)
            ]

    def _pair_weight(self, i: int, pooled: Tensor) -> Tensor:
        """λ of pair i for pooled source features [B, C_s]: [B, 1]."""
        if self.where_kind == "fixed":
            return torch.ones_like(pooled[:, :1])
        head: Tensor = self.where[i](pooled / pooled.shape[1] if self.where_kind == "relu-avg" else pooled)
        if self.where_kind == "softplus":
            return head
        return F.relu6(head) if self.where_kind == "relu6" else F.relu(head)

    def _matching(self, x: Tensor, target_features: list[Tensor]) -> Tensor:
        """L_wfm with β = 1."""
        loss = x.new_zeros(())
        if not self.pairs:
            return loss
        source_features = self._source_features(x)
        for i, (s, m, n) in enumerate(self.pairs):
            t = target_features[n]  # [B, C_t, H, W]
            feature = source_features[s][m]  # [B, C_s, H_s, W_s]
            pooled = feature.mean((2, 3))  # [B, C_s]
            if feature.shape[2:] != t.shape[2:]:
                feature = F.interpolate(feature, size=t.shape[2:], mode="bilinear", align_corners=False)
            distance = (self.projections[i](t) - feature).square().mean((2, 3))  # [B, C_s]
            w = F.softmax(self.what[i](pooled), 1) if self.what else 1 / distance.shape[1]  # [B, C_s]
            loss = loss + (self._pair_weight(i, pooled) * w * distance).sum(1).mean()
        return loss

    def _org(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(select(self.target(x), self.logits), y)

    def _losses(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """L_org and L_wfm of a batch."""
        output, features = forward_with_features(self.target, self.target_layers, x, self.target_maps)
        return self.loss(select(output, self.logits), y), self.beta * self._matching(x, features)

    def _total(self, x: Tensor, y: Tensor) -> Tensor:
        org, matching = self._losses(x, y)
        return org + matching

    def _batches(self, x: Tensor | Sequence[Tensor], y: Tensor | Sequence[Tensor], val: Batch | None) -> list[Batch]:
        """The batches of the simulated steps, the first of which is the batch of the real step."""
        if self.phi and self.scheme == "simulation" and val is None:
            raise L2TError('Scheme "simulation" needs a held-out batch; pass val=(x_val, y_val).')
        count = max(self.inner_steps, 1) if self.scheme == "simulation" else 1
        xs = [x] * count if isinstance(x, Tensor) else list(x)
        ys = [y] * count if isinstance(y, Tensor) else list(y)
        if not len(xs) == len(ys) == count:
            raise L2TError(f"This scheme needs {count} batch(es) of images and labels, not {len(xs)} and {len(ys)}.")
        return list(zip(xs, ys, strict=True))

    def _sgd_step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        take_step(self.optimizer, list(self.theta.values()), self.max_grad_norm)

    def _tensors(self) -> list[Tensor]:
        return [t for m in (self.target, self.projections) for t in (*m.parameters(), *m.buffers())]

    def _device(self) -> torch.device:
        return next(iter(self.theta.values())).device

    def _save(self) -> _State:
        tensors = [t.detach().clone() for t in self._tensors()]
        return _State(tensors, copy.deepcopy(self.optimizer.state_dict()), Generators.get(self._device()))

    def _restore(self, state: _State) -> None:
        with torch.no_grad():
            for t, saved in zip(self._tensors(), state.tensors, strict=True):
                t.copy_(saved)
        self.optimizer.load_state_dict(state.optimizer)
        state.generators.set()

    def simulate(self, batches: list[Batch], val: Batch | None) -> tuple[Tensor, list[Tensor]]:
        """L_meta after the simulated steps, and dL_meta/dφ; rolls everything back but the random generators."""
        x, y = batches[0]
        objectives: list[Callable[[], Tensor]]
        if self.scheme == "transfer":
            objectives = [partial(self.matching_loss, x, self.beta)] * self.inner_steps
            objectives.append(partial(self._org, x, y))
        else:
            objectives = [partial(self._total, *batch) for batch in batches[: self.inner_steps]]

        start = self._save()
        saved = []
        for objective in objectives:
            saved.append(self._save())
            self._sgd_step(objective())
        theta, phi = list(self.theta.values()), list(self.phi.values())
        for p in (*theta, *phi):
            p.grad = None
        with switched_hooks(self.target) as off:
            off.append("L_meta is no step")
            meta_loss = self._org(*(val or (x, y)))
            meta_loss.backward()
        generators = Generators.get(self._device())

        adjoint_p = [torch.zeros_like(p) if p.grad is None else p.grad for p in theta]
        adjoint_state: State | None = None
        for objective, state in zip(reversed(objectives), reversed(saved), strict=True):
            self._restore(state)
            for p in theta:
                p.grad = None
            with switched_hooks(self.target) as off:
                gradient = torch.autograd.grad(objective(), theta, create_graph=True, allow_unused=True)
                adjoint_g, adjoint_p, adjoint_state = adjoint(
                    self.optimizer, self.max_grad_norm, theta, gradient, adjoint_p, adjoint_state
                )
                products = [(g * a).sum() for g, a in zip(gradient, adjoint_g, strict=True) if g is not None]
                off.append("the adjoint")
                torch.stack(products).sum().backward()  # adds to the gradients of φ
            adjoint_p = [p if x.grad is None else p + x.grad for p, x in zip(adjoint_p, theta, strict=True)]
        self._restore(replace(start, generators=generators))
        meta_gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in phi]
        for p in (*theta, *phi):
            p.grad = None
        return meta_loss.detach(), meta_gradient
