"""How an iteration runs."""

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from l2t_fast import bilevel, inner
from l2t_fast.bilevel import Memory, Scheme
from l2t_fast.errors import L2TError
from l2t_fast.inner import SGD, Batch
from l2t_fast.transfer import L2T, cotangents

Mode = Literal["auto", "eager"]
Precision = Literal["fp32"]
Images = Tensor | Sequence[Tensor]

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Engine:
    """Runs the iterations of L2T-ww (paper, algorithm 1) on a learner, exactly.

    The target is in training mode throughout: BatchNorm always uses batch statistics, also where its parameters are
    frozen, and the running statistics follow.

    Args:
        learner: an `L2T`; its target and projections (θ) and its meta-networks (φ) are trained in place.
        lr, momentum, weight_decay, nesterov: the SGD of θ, in the real and in the simulated steps alike; it reaches
            every trainable parameter, also those whose gradient is zero. `engine.lr` may be set at any time.
        meta_lr, meta_weight_decay: the Adam of φ.
        beta: β, the weight of the matching loss.
        inner_steps: T, the number of simulated steps on the matching loss (or, in "simulation", on the total loss).
        scheme: "transfer", the paper's; or "simulation", the ordinary bilevel scheme, which needs `val`.
        mode: "eager"; "auto" picks it.
        precision: "fp32" computes in the dtype of the parameters (float64 parameters: in float64).
        memory: "save" keeps the activations of all simulated steps; "recompute" holds those of one step at a time,
            whatever T is, for one more forward and backward pass a step.

    Attributes:
        lr: see above. smallest_batch: 2 with BatchNorm in the target, else 1. needs_val: whether `step` needs `val`.

    Raises:
        L2TError: a setting out of range, a target without a trainable parameter or with a Hardsigmoid (PyTorch has no
            second derivative of it).
    """

    def __init__(
        self,
        learner: L2T,
        *,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        nesterov: bool = False,
        meta_lr: float = 1e-4,
        meta_weight_decay: float = 1e-4,
        beta: float = 0.5,
        inner_steps: int = 2,
        scheme: Scheme = "transfer",
        mode: Mode = "auto",
        precision: Precision = "fp32",
        memory: Memory = "save",
    ) -> None:
        _check_choice("scheme", scheme, ("transfer", "simulation"))
        _check_choice("mode", mode, ("auto", "eager"))
        _check_choice("precision", precision, ("fp32",))
        _check_choice("memory", memory, ("save", "recompute"))
        for name, value in (
            ("lr", lr),
            ("momentum", momentum),
            ("weight_decay", weight_decay),
            ("meta_lr", meta_lr),
            ("meta_weight_decay", meta_weight_decay),
            ("beta", beta),
            ("inner_steps", inner_steps),
        ):
            if not value >= 0:  # nor NaN
                raise L2TError(f"{name}={value} is not to be had: give zero or more.")
        if not isinstance(inner_steps, int):
            raise L2TError(f"inner_steps={inner_steps} is not to be had: give a whole number.")
        if nesterov and not momentum:
            raise L2TError("nesterov=True needs momentum > 0.")
        if not any(p.requires_grad for p in learner.target.parameters()):
            raise L2TError("the target has no parameter to train: set requires_grad of those that shall learn.")
        self.learner = learner
        self.lr = lr
        self.beta = beta
        self.inner_steps = inner_steps
        self.scheme = scheme
        self.memory = memory
        self._rule = SGD(momentum, weight_decay, nesterov)
        self._parameters = inner.parameters(learner)
        self._momentum = {name: torch.zeros_like(p) for name, p in self._parameters.items()}
        self._phi = {
            **{f"what.{name}": p for name, p in learner.what.named_parameters()},
            **{f"where.{name}": p for name, p in learner.where.named_parameters()},
        }
        self._adam = (
            torch.optim.Adam(self._phi.values(), lr=meta_lr, weight_decay=meta_weight_decay) if self._phi else None
        )
        self._labels_seen = False
        for name, module in learner.target.named_modules():
            if self._phi and isinstance(module, nn.Hardsigmoid):
                raise L2TError(
                    f"'{name}' of the target is a Hardsigmoid, which PyTorch cannot differentiate twice: replace it, "
                    "for example by relu6(x + 3) / 6."
                )
        self.needs_val = scheme == "simulation" and bool(self._phi)
        self.smallest_batch = 2 if any(isinstance(m, _BATCH_NORMS) for m in learner.target.modules()) else 1

    def step(self, x: Images, y: Images, val: tuple[Tensor, Tensor] | None = None) -> dict[str, Tensor]:
        """One iteration: the real step of θ, the simulated steps from there, Adam on φ.

        Args:
            x, y: images [B, C, H, W] and labels [B], int64. With scheme "simulation" also a list or tuple of such
                batches, taken in turn by the T steps; the real step uses the first.
            val: (images, labels) of L_meta; needed by "simulation". By default "transfer" measures it on (x, y).

        Returns:
            Metrics on the device, without waiting for it: "loss" (L_org before the real step), "accuracy" (a fraction
            of the batch) and, with pairs, "matching_loss" (L_wfm), "pair_losses" [P] (its terms),
            "pair_weights" [P] (λ, batch mean) and, with meta-parameters, "meta_loss" (L_meta).

        Raises:
            L2TError: x and y do not fit each other or the learner, a label outside the classes (on a GPU looked at
                in the first step only, since looking waits for it), a batch of one with BatchNorm, no `val`.
        """
        self.learner.train()
        pairs, outer = self._check(x, y, val)
        batches, lam, a = self._prepare(pairs)
        metrics = self._real_step(batches[0])
        if self.learner.pairs:
            metrics["pair_weights"] = torch.stack([lam_p.detach().mean() for lam_p in lam])
        if self._adam is not None:
            meta_loss, grads = self._meta_gradient(batches, outer, a)
            for p, g in zip(self._phi.values(), grads, strict=True):
                p.grad = g
            self._adam.step()
            metrics["meta_loss"] = meta_loss
        return metrics

    def meta_gradient(self, x: Images, y: Images, val: tuple[Tensor, Tensor] | None = None) -> dict[str, Tensor]:
        """dL_meta/dφ by name ("what.0.weight", ...), simulated from the present θ and momentum; changes nothing.

        Arguments and errors as for `step`. There is no real step: `step` takes this gradient after its own.
        """
        if not self._phi:
            return {}
        was_training = self.learner.training
        modes = [(module, module.training) for module in self.learner.modules()]  # the target's owner may have changed
        self.learner.train()
        try:
            pairs, outer = self._check(x, y, val)
            with torch.random.fork_rng(devices=_cuda_devices(outer[0])):
                batches, _, a = self._prepare(pairs)
                _, grads = self._meta_gradient(batches, outer, a)
        finally:
            self.learner.train(was_training)
            for module, training in modes:
                module.training = training
        return dict(zip(self._phi, grads, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Everything that `step` changes, and the learning rate: tensors, numbers and dictionaries only.

        The tensors are the engine's own, as in torch: copy them to keep them over the next step.
        """
        return {
            "theta": {name: p.detach() for name, p in self._parameters.items()},
            "momentum": dict(self._momentum),
            "buffers": dict(self.learner.target.named_buffers()),
            "phi": {name: p.detach() for name, p in self._phi.items()},
            "adam": self._adam.state_dict() if self._adam is not None else {},
            "lr": self.lr,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave; the values are copied into the present tensors.

        Raises:
            L2TError: a state of another learner or of something else; nothing is changed then.
        """
        groups: dict[str, dict[str, Tensor]] = {
            "theta": {name: p.data for name, p in self._parameters.items()},
            "momentum": self._momentum,
            "buffers": dict(self.learner.target.named_buffers()),
            "phi": {name: p.data for name, p in self._phi.items()},
        }
        if not isinstance(state, dict) or state.keys() != {*groups, "adam", "lr"}:
            raise L2TError("this is not the state of an engine: load what `state_dict` gave.")
        for group, tensors in groups.items():
            theirs = state.get(group)
            if not isinstance(theirs, dict) or theirs.keys() != tensors.keys():
                raise L2TError(
                    f"this state does not fit the learner: its '{group}' has other names; load it where it was made."
                )
            for name, tensor in tensors.items():
                shape = list(theirs[name].shape) if isinstance(theirs[name], Tensor) else theirs[name]
                if shape != list(tensor.shape):
                    raise L2TError(
                        f"this state does not fit the learner: '{name}' is {shape}, not {list(tensor.shape)}; load it "
                        "where it was made."
                    )
        if not isinstance(state["lr"], (int, float)):
            raise L2TError(f"this state is not that of an engine: its learning rate is {state['lr']!r}.")
        if self._adam is not None:
            _check_adam(state["adam"], list(self._phi.values()))
            try:
                self._adam.load_state_dict(copy.deepcopy(state["adam"]))  # it would keep the tensors it is given
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise L2TError("this state does not fit the learner: its 'adam' is of another optimizer.") from error
        for group, tensors in groups.items():
            for name, tensor in tensors.items():
                tensor.copy_(state[group][name])
        self.lr = state["lr"]

    @torch.enable_grad()
    def _prepare(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[list[Batch], list[Tensor], list[Tensor]]:
        """What an iteration needs once: (the batches, λ of the first, a of all of them with its graph to φ)."""
        batches: list[Batch] = []
        all_lam: list[Tensor] = []
        all_a: list[Tensor] = []
        for x, y in pairs:
            S = self.learner.source_features(x)
            w, lam = self.learner.weights(S)
            a = cotangents(w, lam, self.beta)
            batches.append(Batch(x, y, *self.learner.matching_sources(S, x), [a_p.detach() for a_p in a]))
            all_lam += lam
            all_a += a
        return batches, all_lam[: len(self.learner.pairs)], all_a

    @torch.no_grad()
    def _real_step(self, batch: Batch) -> dict[str, Tensor]:
        """θ <- SGD(θ, ∇(L_org + L_wfm)); the target's buffers are updated here, once."""
        theta = {name: p.detach() for name, p in self._parameters.items()}
        result = inner.gradient(self.learner, theta, batch, task=True, matching=True, distances=True)
        new_theta, new_momentum = inner.sgd_step(theta, self._momentum, result.theta, self.lr, self._rule)
        torch._foreach_copy_(list(theta.values()), list(new_theta.values()))
        torch._foreach_copy_(list(self._momentum.values()), list(new_momentum.values()))
        for name, buffer in self.learner.target.named_buffers():
            buffer.copy_(result.buffers[name])
        accuracy = (result.logits.argmax(1) == batch.y).to(result.loss.dtype).mean()
        metrics = {"loss": result.loss, "accuracy": accuracy}
        if self.learner.pairs:
            terms = [(a_p * E_p).sum() for a_p, E_p in zip(batch.a, result.distances, strict=True)]
            metrics["pair_losses"] = torch.stack(terms)
            metrics["matching_loss"] = metrics["pair_losses"].sum()
        return metrics

    def _meta_gradient(
        self, batches: Sequence[Batch], outer: tuple[Tensor, Tensor], a: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """(L_meta, dL_meta/dφ): the derivative to a is summed over the steps, then pulled back through f and g once."""
        steps = bilevel.unroll(self.learner, self.scheme, batches, self.inner_steps, self.lr, self._rule)
        loss, grads_a = bilevel.meta_gradient(
            steps,
            lambda theta: inner.task_loss(self.learner, theta, *outer),
            self._parameters,
            self._momentum,
            list(a),
            self.memory,
        )
        return loss, list(torch.autograd.grad(a, list(self._phi.values()), grads_a))

    def _check(
        self, x: Images, y: Images, val: tuple[Tensor, Tensor] | None
    ) -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
        """(the batches, the batch of L_meta), or an L2TError."""
        xs, ys = ([x] if isinstance(x, Tensor) else list(x)), ([y] if isinstance(y, Tensor) else list(y))
        if len(xs) != len(ys) or not xs:
            raise L2TError(f"there are {len(xs)} batches of images but {len(ys)} of labels: give one for each.")
        if len(xs) > 1 and self.scheme == "transfer":
            raise L2TError("scheme='transfer' takes one batch at a time: give x and y as tensors.")
        if self.scheme == "simulation":
            if val is None and self._phi:
                raise L2TError("scheme='simulation' measures L_meta on held-out data: give val=(images, labels).")
            if len(xs) not in (1, self.inner_steps):
                raise L2TError(
                    f"there are {len(xs)} batches for {self.inner_steps} inner steps: give one each, or one for all."
                )
        batches = list(zip(xs, ys, strict=True))
        outer = batches[0] if val is None else val
        for images, labels in [*batches, outer]:
            self._check_batch(images, labels)
        self._labels_seen = True
        return batches, outer

    def _check_batch(self, x: Tensor, y: Tensor) -> None:
        parameter = next(iter(self._parameters.values()))
        if x.dim() != 4:
            raise L2TError(f"the images must be [B, C, H, W], not {list(x.shape)}.")
        if x.device != parameter.device or x.dtype != parameter.dtype:
            raise L2TError(
                f"the images are {x.dtype} on {x.device}, the target is {parameter.dtype} on {parameter.device}: "
                "move them to the same device and dtype."
            )
        if y.shape != x.shape[:1] or y.dtype != torch.int64 or y.device != x.device:
            raise L2TError(
                f"the labels must be int64 of shape [{x.shape[0]}] on {x.device}, one an image, "
                f"not {y.dtype} {list(y.shape)} on {y.device}."
            )
        if not len(x):
            raise L2TError("the batch is empty: give images and labels.")
        if x.shape[0] < self.smallest_batch:
            raise L2TError("BatchNorm cannot train on a batch of one: give two images or more.")
        if x.device.type == "cpu" or not self._labels_seen:
            low, high = y.min().item(), y.max().item()
            if low < 0 or high >= self.learner.classes:
                raise L2TError(
                    f"the labels go from {low} to {high}, but the target has classes 0 to {self.learner.classes - 1}."
                )


def _check_adam(state: Any, phi: Sequence[Tensor]) -> None:
    """The moments belong to φ, or there are none yet."""
    moments = state.get("state", {}) if isinstance(state, dict) else {}
    for i, moment in moments.items():
        if not i < len(phi) or any(moment[name].shape != phi[i].shape for name in ("exp_avg", "exp_avg_sq")):
            raise L2TError("this state does not fit the learner: its 'adam' is of other meta-networks.")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise L2TError(f"{name}='{value}' is not to be had: use {' or '.join(map(repr, choices))}.")


def _cuda_devices(x: Tensor) -> list[torch.device]:
    return [x.device] if x.device.type == "cuda" else []
