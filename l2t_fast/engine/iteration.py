"""One iteration: the real step of θ, the simulated steps from there, Adam on φ (paper, algorithm 1)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from l2t_fast.choices import Memory, Scheme
from l2t_fast.engine import bilevel
from l2t_fast.engine.bilevel import Kind
from l2t_fast.engine.compile import Steps
from l2t_fast.engine.inner_step import Gradient, StepInput, Theta
from l2t_fast.engine.loss import Loss
from l2t_fast.engine.shards import WHOLE, Part, RealBuffers, Shards
from l2t_fast.engine.state import Trained
from l2t_fast.engine.surroundings import RealSurroundings, SimulatedSurroundings
from l2t_fast.kernels.beside import beside, joined
from l2t_fast.learner.learner import L2T

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class Matching:
    """A part of the batches of an iteration, with what it needs of the sources once."""

    batches: list[StepInput]
    a: list[list[Tensor]]  # of each batch: ω a [B, C_s] of each pair, with its graph to φ
    lam: list[list[Tensor]]  # λ [B] likewise
    outer: tuple[Tensor, Tensor]  # the batch of L_meta
    outer_weight: Tensor | None  # ω of it; None is 1


@dataclass(frozen=True)
class Iteration:
    """What iterates on `trained`; everything that it changes is changed in place, and nothing waits for the device.

    Until the last gradient is there nothing has been changed: whatever raises leaves all as it was.
    """

    learner: L2T
    trained: Trained
    scheme: Scheme
    inner_steps: int
    memory: Memory
    shards: Shards = WHOLE
    loss: Loss = field(default_factory=Loss)

    def run(self, steps: Steps, tensors: Sequence[Tensor], draws: bool) -> Metrics:
        """One iteration on images and labels in a row (`split`); draws: a forward pass may draw random numbers."""
        trained = self.trained
        parts = self.matching(steps, tensors)
        around = RealSurroundings(self.learner.target)
        try:
            theta, state = [p.detach() for p in trained.theta.values()], trained.row()
            grads, metrics = self._real(steps, parts, theta, around)
            if trained.adam is None:
                trained.update.step_(theta, state, grads)
                return metrics
            new_theta, new_state, _ = trained.update.step(theta, state, grads)
            start = dict(zip(trained.theta, new_theta, strict=True))
            del grads  # what is kept for the simulated steps is enough
            metrics["meta_loss"], of_phi = self.meta_gradient(steps, parts, start, new_state, draws=draws)
        except BaseException:
            around.put_back()
            raise
        torch._foreach_copy_(theta, new_theta)
        torch._foreach_copy_(state, new_state)
        for p, g in zip(trained.phi.values(), of_phi, strict=True):
            p.grad = g if g.stride() == p.stride() else torch.empty_like(p).copy_(g)  # fused Adam wants them alike
        trained.adam.step()
        return metrics

    def _real(
        self, steps: Steps, parts: Sequence[Matching], theta: Sequence[Tensor], around: RealSurroundings
    ) -> tuple[Part, Metrics]:
        """(∇(L_org + L_wfm) of the joined batch, see `Engine.step`); buffers change."""
        shards, buffers = self.shards, None
        if not shards.whole:
            buffers = RealBuffers(self.learner.target, shards)
        grads: Part | None = None
        values: Part | None = None
        for i, matched in enumerate(parts):
            real = self.real_gradient(steps, matched.batches[0])
            around.settle(real.buffers)
            metrics = self._metrics(real, matched)
            grads = shards.plus(grads, [real.theta.get(name) for name in self.trained.theta], theta)
            values = shards.plus(values, list(metrics.values()), list(metrics.values()))
            if buffers is not None and (weight := matched.batches[0].weight) is not None:
                buffers.take(weight, first=i == 0)
            del real  # before the next part's is made
        assert grads is not None
        assert values is not None
        if buffers is not None:
            buffers.settle()
        found = shards.over_ranks([*grads, *values], [*theta, *metrics.values()])
        return found[: len(grads)], dict(zip(metrics, (x for x in found[len(grads) :] if x is not None), strict=True))

    @torch.enable_grad()
    def matching(self, steps: Steps, tensors: Sequence[Tensor]) -> list[Matching]:
        """What an iteration needs once, of each part.

        In a capture the source pass is made beside the target's first forward pass, if there is one alone.
        """
        parts = self.shards.split(tensors)
        found: list[Matching] = []
        alone = self.shards.count == 1
        for part, weights in zip(parts, self.shards.weights(parts), strict=True):
            pairs, outer = self.split(part)
            batches: list[StepInput] = []
            all_a: list[list[Tensor]] = []
            all_lam: list[list[Tensor]] = []
            for (x, y), weight in zip(pairs, weights[: len(pairs)], strict=True):
                if self.learner.uses_sources:
                    with beside(x, when=alone and not steps.functional):
                        # R(S) of all micro-batches would take more memory than one of them.
                        S, source_of, a, lam, kept = steps.source_pass(x, alone and self.learner.resizes(x))
                        a = a if weight is None else [weight * a_p for a_p in a]
                else:
                    S, source_of, a, lam, kept = [], [], [], [], []
                batches.append(StepInput(x, y, S, source_of, [a_p.detach() for a_p in a], kept, weight))
                all_a.append(a)
                all_lam.append(lam)
            found.append(Matching(batches, all_a, all_lam, outer, weights[-1 if len(weights) > len(pairs) else 0]))
        return found

    def split(self, tensors: Sequence[Tensor]) -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
        """(the batches, the batch of L_meta) of images and labels in a row, those of L_meta's own batch last."""
        pairs = list(zip(tensors[::2], tensors[1::2], strict=True))
        with_val = len(pairs) > 1 if self.scheme == "transfer" else self.trained.adam is not None
        return (pairs[:-1], pairs[-1]) if with_val else (pairs, pairs[0])

    @torch.no_grad()
    def real_gradient(self, steps: Steps, batch: StepInput) -> Gradient:
        """∇(L_org + L_wfm) at θ; the forward pass changes the target's buffers, or gives them back changed."""
        theta = {name: p.detach() for name, p in self.trained.theta.items()}
        if not steps.functional:
            theta = {name: p.requires_grad_() for name, p in theta.items()}
        buffers = dict(self.learner.target.named_buffers()) if steps.functional else {}
        found = steps.gradient(Kind(0, task=True, matching=True), False, theta, batch, buffers)
        joined(batch.x)
        return found

    def meta_gradient(
        self, steps: Steps, parts: Sequence[Matching], theta: Theta, state: list[Tensor], *, draws: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """(L_meta, dL_meta/dφ) simulated from θ and its optimizer's state; these, buffers and attributes stay.

        The derivative to a is summed over the steps, then pulled back through f and g once.
        """
        network = self.learner.target_network
        device, several = self.trained.device, len(parts) > 1
        arounds = [SimulatedSurroundings(network, device, draws, several=several) for _ in parts]

        def gradient(kind: Kind, part: int, theta: Theta, a: list[Tensor]) -> Theta:
            around = arounds[part]
            around.begin()
            batch = parts[part].batches[kind.batch]._replace(a=a)
            found = steps.gradient(kind, True, theta, batch, around.buffers)
            around.buffers = found.buffers
            around.end()
            return found.theta

        def outer(part: int, theta: Theta) -> Tensor:
            around, matched = arounds[part], parts[part]
            around.begin()
            loss = steps.task_loss(theta, *matched.outer, around.buffers)
            around.end()
            return loss if matched.outer_weight is None else loss * matched.outer_weight

        try:
            loss, grads_a = bilevel.meta_gradient(
                bilevel.simulated_steps(self.scheme, len(parts[0].batches), self.inner_steps),
                gradient,
                outer,
                theta,
                state,
                [matched.a for matched in parts],
                self.trained.update,
                self.memory,
                arounds,
                self.shards,
            )
        finally:
            arounds[0].leave()
        flat = [a_p for matched in parts for of_batch in matched.a for a_p in of_batch]
        flat_grads = [g for part in grads_a for of_batch in part for g in of_batch]
        phi = list(self.trained.phi.values())
        of_phi = self.shards.over_ranks(torch.autograd.grad(flat, phi, flat_grads), phi)
        return loss, [g for g in of_phi if g is not None]

    @torch.no_grad()
    def _metrics(self, real: Gradient, matched: Matching) -> Metrics:
        """See `Engine.step`; those of a part times its ω, which the pairs' losses have by a."""
        batch = matched.batches[0]
        metrics = {"loss": real.loss}
        if self.loss.classes:
            metrics["accuracy"] = self.loss.accuracy(real.logits, batch.y, real.loss.dtype)
        if self.learner.pairs:
            # Sums of terms that are not negative, in few launches.
            metrics["pair_losses"] = torch.stack(torch._foreach_norm(torch._foreach_mul(real.distances, batch.a), 1))
            metrics["matching_loss"] = metrics["pair_losses"].sum()
            metrics["pair_weights"] = torch.stack(matched.lam[0]).detach().mean(1)
        values = zip(self.learner.terms, real.terms, strict=True)
        metrics |= {f"{term.name}_loss": value for term, value in values}
        if (weight := batch.weight) is None:
            return metrics
        have_it = ("pair_losses", "matching_loss")
        return {name: value if name in have_it else value * weight for name, value in metrics.items()}
