"""How an iteration runs."""

import copy
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from l2t_fast.choices import Memory, Mode, Precision, Scheme
from l2t_fast.engine import bilevel
from l2t_fast.engine import compile as functions
from l2t_fast.engine import inner_step as inner
from l2t_fast.engine.bilevel import Kind
from l2t_fast.engine.capture import CaptureError, Graphs
from l2t_fast.engine.compile import Functions, Say
from l2t_fast.engine.inner_step import Batch
from l2t_fast.engine.precision import arithmetic, images, lay_out
from l2t_fast.errors import L2TError, UnfitError
from l2t_fast.kernels.sgd.rule import SGD
from l2t_fast.kernels.sgd.step import sgd_step_
from l2t_fast.learner.learner import L2T

Images = Tensor | Sequence[Tensor]

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_COMPILE_FROM = 50_000  # iterations from which "auto" expects torch.compile to win back its minutes; a guess


def say_on_stderr(text: str) -> None:
    """Writes a piece of progress as it is."""
    sys.stderr.write(text)
    sys.stderr.flush()


class Engine:
    """Runs the iterations of L2T-ww (paper, algorithm 1) on a learner, exactly.

    The target is in training mode throughout: BatchNorm always uses batch statistics, also where its parameters are
    frozen, and the running statistics follow.

    Args:
        learner: an `L2T`; its target and projections (θ) and its meta-networks (φ) are trained in place.
        lr, momentum, weight_decay, nesterov: the SGD of θ, in the real and in the simulated steps alike; it reaches
            every trainable parameter, also those whose gradient is zero.
        meta_lr, meta_weight_decay: the Adam of φ.
        beta: β, the weight of the matching loss.
        inner_steps: T, the number of simulated steps on the matching loss (or, in "simulation", on the total loss).
        scheme: "transfer", the paper's; or "simulation", the ordinary bilevel scheme, which needs `val`.
        mode: "eager" launches every operation by itself. "graph" (CUDA) captures the whole iteration in one CUDA graph
            in its fourth step and replays it from then on. "compile" compiles each kind of step with torch.compile in
            the first step, and captures likewise on CUDA. "auto" picks one, says which and why, and falls back with a
            line where a model cannot be compiled or captured.
        precision: "fp32" computes in the dtype of the parameters (float64 parameters: in float64), on CUDA without
            TF32; "tf32" lets CUDA's tensor cores round the factors of products and convolutions; "bf16" computes
            networks and features in bfloat16, with float32 parameters, statistics and sums. The last two need float32
            parameters, and lay out convolutions as channels_last.
        memory: "save" keeps the activations of all simulated steps; "recompute" holds those of one step at a time,
            whatever T is, for one more forward and backward pass a step.
        iterations: how many steps are expected; "auto" compiles only for many.
        say: gets what "auto" picks, the progress of compiling and fallbacks, as pieces of text; stderr by default.

    Attributes:
        lr, meta_lr: may be set at any time, also between replays.
        mode: the mode that runs; `why`: why "auto" picked it.
        smallest_batch: 2 with BatchNorm in the target, else 1. needs_val: whether `step` needs `val`.

    Raises:
        L2TError: a setting out of range, a mode or a precision that is not to be had here, a target without a trainable
            parameter or with a Hardsigmoid (PyTorch has no second derivative of it).
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
        iterations: int | None = None,
        say: Say = say_on_stderr,
    ) -> None:
        _check_choice("scheme", scheme, ("transfer", "simulation"))
        _check_choice("mode", mode, ("auto", "eager", "graph", "compile"))
        _check_choice("precision", precision, ("fp32", "tf32", "bf16"))
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
        self._parameters = inner.parameters(learner)
        parameter = next(iter(self._parameters.values()))
        self._device = parameter.device
        if precision != "fp32" and parameter.dtype != torch.float32:
            raise L2TError(f"precision='{precision}' needs float32 networks, not {parameter.dtype}: use 'fp32'.")
        self.mode, self.why = _choose_mode(mode, self._device, iterations)
        if mode == "auto":
            say(f"l2t_fast: mode '{self.mode}', {self.why}\n")
        self.learner = learner
        self.beta = beta
        self.inner_steps = inner_steps
        self.scheme = scheme
        self.precision = precision
        self.memory = memory
        self._auto, self._say = mode == "auto", say
        lay_out([*learner.sources, learner.target], precision)
        # On the device and in double: a schedule changes it under a captured graph, and float64 loses nothing.
        self._lr = torch.full((), lr, dtype=torch.float64, device=self._device)
        self._lr_value = float(lr)
        self._rule = SGD(momentum, weight_decay, nesterov)
        self._momentum = {name: torch.zeros_like(p) for name, p in self._parameters.items()}
        self._phi = {
            **{f"what.{name}": p for name, p in learner.what.named_parameters()},
            **{f"where.{name}": p for name, p in learner.where.named_parameters()},
        }
        self._meta_lr_value = float(meta_lr)
        self._adam_options = (
            {"lr": torch.tensor(meta_lr, dtype=torch.float32, device=self._device), "fused": True, "capturable": True}
            if self._device.type == "cuda"
            else {"lr": float(meta_lr), "fused": None, "capturable": False}
        )
        self._adam = (
            torch.optim.Adam(self._phi.values(), weight_decay=meta_weight_decay, **self._adam_options)
            if self._phi
            else None
        )
        if self._adam is not None:  # it runs uncaptured first, and says so otherwise
            self._adam._warned_capturable_if_run_uncaptured = True
        self._uses_sources = bool(learner.pairs) or len(learner.terms) > 0
        self._plain = functions.plain(learner, beta)
        self._compiled: Functions | None = None
        self._compiled_shapes: tuple[Any, ...] = ()
        self._graphs = self._new_graphs()
        self._draws: _Draws | None = None  # not looked at yet
        self._labels_seen = False
        for name, module in learner.target.named_modules():
            if self._phi and isinstance(module, nn.Hardsigmoid):
                raise UnfitError(
                    f"'{name}' of the target is a Hardsigmoid, which PyTorch cannot differentiate twice: replace it, "
                    "for example by relu6(x + 3) / 6."
                )
        self.needs_val = scheme == "simulation" and bool(self._phi)
        self.smallest_batch = 2 if any(isinstance(m, _BATCH_NORMS) for m in learner.target.modules()) else 1

    @property
    def lr(self) -> float:
        """α, the learning rate of θ."""
        return self._lr_value

    @lr.setter
    def lr(self, value: float) -> None:
        self._lr_value = float(value)
        self._lr.fill_(self._lr_value)

    @property
    def meta_lr(self) -> float:
        """The learning rate of φ."""
        return self._meta_lr_value

    @meta_lr.setter
    def meta_lr(self, value: float) -> None:
        self._meta_lr_value = float(value)
        for group in self._adam.param_groups if self._adam is not None else ():
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(self._meta_lr_value)
            else:
                group["lr"] = self._meta_lr_value

    def step(self, x: Images, y: Images, val: tuple[Tensor, Tensor] | None = None) -> dict[str, Tensor]:
        """One iteration: the real step of θ, the simulated steps from there, Adam on φ.

        Args:
            x, y: images [B, C, H, W] and labels [B], int64, on the device of the target or on the CPU: under graphs
                those are copied while the iteration before still runs (pinned memory must not be overwritten while
                it is). With scheme "simulation" also a list or tuple of such batches, taken in turn by the T steps;
                the real step uses the first.
            val: (images, labels) of L_meta; needed by "simulation". By default "transfer" measures it on (x, y).

        Returns:
            Metrics on the device, without waiting for it: "loss" (L_org before the real step), "accuracy" (a fraction
            of the batch) and, with pairs, "matching_loss" (L_wfm), "pair_losses" [P] (its terms),
            "pair_weights" [P] (λ, batch mean) and, with meta-parameters, "meta_loss" (L_meta); of each term its value,
            "NAME_loss". Where graphs are captured they are views that are written anew `capture.ROWS` iterations later.

        Raises:
            L2TError: x and y do not fit each other or the learner, a label outside the classes (labels on a GPU are
                looked at in the first step only, since looking waits for it), a batch of one with BatchNorm, no `val`;
                in the first steps, a model that cannot be compiled or captured. Nothing is changed then.
        """
        tensors = self._check(x, y, val)
        with arithmetic(self.precision, self._device):
            if self.mode == "compile" and self._compiled is None:
                self._compile(tensors)
            if self._graphs is None:
                return self._iterate(self._ready(tensors))
            before = bilevel.random_states(self._device) if self._draws is None else []
            try:
                metrics = self._graphs.run(tensors, self._ready)
            except CaptureError as error:
                self._give_up_graphs(error)
                return self._iterate(self._ready(tensors))
            if before:
                after = bilevel.random_states(self._device)
                same = [torch.equal(old, new) for old, new in zip(before, after, strict=True)]
                self._draws = _Draws(host=not same[0], device=not same[-1])
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
            tensors = self._ready(self._check(x, y, val))
            with torch.random.fork_rng(devices=self._cuda_devices()), arithmetic(self.precision, self._device):
                _, grads = self._meta_gradient(tensors, *self._prepare(tensors)[:2])
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
            "adam": self._adam_state(),
            "lr": self.lr,
        }

    def _adam_state(self) -> dict[str, Any]:
        """Adam's state, the same on every device: its learning rate as a number."""
        if self._adam is None:
            return {}
        state: dict[str, Any] = self._adam.state_dict()
        for group in state["param_groups"]:
            group["lr"] = self._meta_lr_value
        return state

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
            theirs = copy.deepcopy(state["adam"])  # Adam would keep the tensors it is given
            before = dict(self._adam.state)
            try:
                meta_lr = float(theirs["param_groups"][0]["lr"])
                for group in theirs["param_groups"]:
                    group |= self._adam_options  # those of this device
                self._adam.load_state_dict(theirs)
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                raise L2TError("this state does not fit the learner: its 'adam' is of another optimizer.") from error
            for options in self._adam.param_groups:
                options["lr"] = self._adam_options["lr"]  # loading makes a copy, which no captured graph reads
            self._keep_places(before)
            self.meta_lr = meta_lr
        for group, tensors in groups.items():
            for name, tensor in tensors.items():
                tensor.copy_(state[group][name])
        self.lr = state["lr"]

    def _keep_places(self, before: dict[Tensor, dict[str, Tensor]]) -> None:
        """Puts Adam's loaded state where it was `before`, where captured graphs write it."""
        assert self._adam is not None
        for p, moments in before.items():
            loaded = self._adam.state.get(p)
            if loaded is None or loaded.keys() != moments.keys():  # a state from before the first step
                self._graphs = self._new_graphs()
                return
            for name, tensor in moments.items():
                tensor.copy_(loaded[name])
            self._adam.state[p] = moments

    def _new_graphs(self) -> Graphs | None:
        captures = self.mode != "eager" and self._device.type == "cuda"
        return Graphs(self._iterate, self._device, self._may_be_captured) if captures else None

    def _may_be_captured(self) -> None:
        draws = self._draws
        if draws is not None and draws.host:
            raise L2TError("the target draws random numbers on the CPU, which a CUDA graph would repeat")
        if draws is not None and draws.device and self.memory == "recompute":
            raise L2TError("memory='recompute' must draw the target's random numbers twice, which a CUDA graph cannot")

    def _give_up_graphs(self, error: CaptureError) -> None:
        """Goes on launch by launch where "auto" picked the mode; raises otherwise."""
        if not self._auto:
            raise L2TError(
                f"mode='{self.mode}' cannot capture the iteration ({error}): use mode='auto', which goes on without."
            ) from error
        self._say(f"l2t_fast: the iteration cannot be captured ({error}): it goes on launch by launch, slower\n")
        self._graphs = None
        self.mode = "eager" if self.mode == "graph" else self.mode

    def _compile(self, tensors: Sequence[Tensor]) -> None:
        """Compiles all that an iteration on such tensors needs; changes nothing."""
        units = functions.units(self.scheme, self.inner_steps, self._uses_sources, bool(self._phi))
        attempt = functions.compiled(self._plain, units, self._say)
        ready = self._ready(tensors)
        self._compiled, self._compiled_shapes = attempt, _shapes(tensors)
        self.learner.train()
        try:
            with torch.random.fork_rng(devices=self._cuda_devices()):
                batches, a, _ = self._prepare(ready)
                self._real_gradient(attempt, batches[0])
                if self._phi:
                    self._meta_gradient(ready, batches, a)
        except L2TError as error:
            self._compiled = None
            if not self._auto:
                raise
            self.mode = "graph" if self._device.type == "cuda" else "eager"
            self._say(f"l2t_fast: {error} Going on with mode '{self.mode}'.\n")

    def _ready(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of an iteration as it takes them: images as they are computed with, on the device."""
        on_device = [t.to(self._device, non_blocking=True) for t in tensors]
        return [images(t, self.precision) if i % 2 == 0 else t for i, t in enumerate(on_device)]

    def _functions(self, tensors: Sequence[Tensor]) -> Functions:
        """Compiled ones for the shapes of the first step, plain ones for a smaller last batch."""
        if self._compiled is not None and _shapes(tensors) == self._compiled_shapes:
            return self._compiled
        return self._plain

    def _iterate(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """One iteration; all that it changes is changed in place, and nothing waits for the device."""
        self.learner.train()
        batches, a, lam = self._prepare(tensors)
        metrics = self._real_step(self._functions(tensors), batches[0])
        if self.learner.pairs:
            metrics["pair_weights"] = torch.stack(lam[0]).detach().mean(1)
        if self._adam is not None:
            meta_loss, grads = self._meta_gradient(tensors, batches, a)
            for p, g in zip(self._phi.values(), grads, strict=True):
                p.grad = g if g.stride() == p.stride() else torch.empty_like(p).copy_(g)  # fused Adam wants them alike
            self._adam.step()
            metrics["meta_loss"] = meta_loss
        return metrics

    @torch.enable_grad()
    def _prepare(self, tensors: Sequence[Tensor]) -> tuple[list[Batch], list[list[Tensor]], list[list[Tensor]]]:
        """What an iteration needs once: (the batches, a of each with its graph to φ, λ of each)."""
        batches: list[Batch] = []
        all_a: list[list[Tensor]] = []
        all_lam: list[list[Tensor]] = []
        for x, y in self._split(tensors)[0]:
            if self._uses_sources:
                S, source_of, a, lam, given = self._functions(tensors).prepare(x, self.learner.resizes(x))
            else:
                S, source_of, a, lam, given = [], [], [], [], []
            batches.append(Batch(x, y, S, source_of, [a_p.detach() for a_p in a], given))
            all_a.append(a)
            all_lam.append(lam)
        return batches, all_a, all_lam

    def _split(self, tensors: Sequence[Tensor]) -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
        """(the batches, the batch of L_meta) of the tensors that `_check` put in a row."""
        pairs = list(zip(tensors[::2], tensors[1::2], strict=True))
        with_val = len(pairs) > 1 if self.scheme == "transfer" else self.needs_val
        return (pairs[:-1], pairs[-1]) if with_val else (pairs, pairs[0])

    @torch.no_grad()
    def _real_gradient(self, functions_: Functions, batch: Batch) -> inner.Gradient:
        theta = {name: p.detach() for name, p in self._parameters.items()}
        return functions_.gradient(Kind(0, task=True, matching=True), False, theta, batch)

    @torch.no_grad()
    def _real_step(self, functions_: Functions, batch: Batch) -> dict[str, Tensor]:
        """θ <- SGD(θ, ∇(L_org + L_wfm)); the target's buffers are updated here, once."""
        result = self._real_gradient(functions_, batch)
        parameters, grads = list(self._parameters.values()), [result.theta.get(name) for name in self._parameters]
        sgd_step_([p.detach() for p in parameters], list(self._momentum.values()), grads, self._lr, self._rule)
        buffers = self.learner.running_buffers(simulated=False)
        for dtype in {buffer.dtype for buffer in buffers.values()}:
            names = [name for name, buffer in buffers.items() if buffer.dtype == dtype]
            torch._foreach_copy_([buffers[name] for name in names], [result.buffers[name] for name in names])
        accuracy = (result.logits.argmax(1) == batch.y).to(result.loss.dtype).mean()
        metrics = {"loss": result.loss, "accuracy": accuracy}
        if self.learner.pairs:
            # Sums of terms that are not negative, in few launches.
            terms = torch._foreach_norm(torch._foreach_mul(result.distances, batch.a), 1)
            metrics["pair_losses"] = torch.stack(terms)
            metrics["matching_loss"] = metrics["pair_losses"].sum()
        return metrics | {f"{term.name}_loss": x for term, x in zip(self.learner.terms, result.terms, strict=True)}

    def _meta_gradient(
        self, tensors: Sequence[Tensor], batches: Sequence[Batch], a: list[list[Tensor]]
    ) -> tuple[Tensor, list[Tensor]]:
        """(L_meta, dL_meta/dφ): the derivative to a is summed over the steps, then pulled back through f and g once."""
        chosen, outer = self._functions(tensors), self._split(tensors)[1]

        def gradient(kind: Kind, theta: inner.Theta, of_batch: list[Tensor]) -> inner.Theta:
            return chosen.gradient(kind, True, theta, batches[kind.batch]._replace(a=of_batch)).theta

        loss, grads_a = bilevel.meta_gradient(
            bilevel.simulated_steps(self.scheme, len(batches), self.inner_steps),
            gradient,
            lambda theta: chosen.task_loss(theta, *outer),
            self._parameters,
            self._momentum,
            a,
            self._lr,
            self._rule,
            self.memory,
            random=self._draws is None or any(self._draws),
        )
        flat, flat_grads = [a_p for of_batch in a for a_p in of_batch], [g for of_batch in grads_a for g in of_batch]
        return loss, list(torch.autograd.grad(flat, list(self._phi.values()), flat_grads))

    def _check(self, x: Images, y: Images, val: tuple[Tensor, Tensor] | None) -> list[Tensor]:
        """x, y of each batch and then of L_meta's own in a row, those that an iteration reads; or an L2TError."""
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
        batches = [*zip(xs, ys, strict=True), *([val] if val is not None else [])]
        for batch in batches:
            self._check_batch(*batch)
        self._labels_seen = True
        return [tensor for batch in (batches if self._phi else batches[:1]) for tensor in batch]

    def _check_batch(self, x: Tensor, y: Tensor) -> None:
        parameter = next(iter(self._parameters.values()))
        places = (self._device, torch.device("cpu"))
        if x.dim() != 4:
            raise L2TError(f"the images must be [B, C, H, W], not {list(x.shape)}.")
        if x.device not in places or x.dtype != parameter.dtype:
            raise L2TError(
                f"the images are {x.dtype} on {x.device}, the target is {parameter.dtype} on {parameter.device}: "
                "move them to the same device and dtype."
            )
        if y.shape != x.shape[:1] or y.dtype != torch.int64 or y.device not in places:
            raise L2TError(
                f"the labels must be int64 of shape [{x.shape[0]}] on {x.device}, one an image, "
                f"not {y.dtype} {list(y.shape)} on {y.device}."
            )
        if not len(x):
            raise L2TError("the batch is empty: give images and labels.")
        if x.shape[0] < self.smallest_batch:
            raise L2TError("BatchNorm cannot train on a batch of one: give two images or more.")
        if y.device.type == "cpu" or not self._labels_seen:
            low, high = y.min().item(), y.max().item()
            if low < 0 or high >= self.learner.classes:
                raise L2TError(
                    f"the labels go from {low} to {high}, but the target has classes 0 to {self.learner.classes - 1}."
                )

    def _cuda_devices(self) -> list[torch.device]:
        return [self._device] if self._device.type == "cuda" else []


class _Draws(NamedTuple):
    """Whether an iteration draws random numbers on the CPU, and on the device."""

    host: bool
    device: bool


def _choose_mode(mode: Mode, device: torch.device, iterations: int | None) -> tuple[Mode, str]:
    """(the mode, why)."""
    if mode == "graph" and device.type != "cuda":
        raise L2TError(f"mode='graph' needs a CUDA device, but the target is on {device}: use mode='eager'.")
    if mode != "auto":
        return mode, "as asked for"
    if device.type != "cuda":
        return "eager", f"since on a {device.type} compiling takes minutes and brings nothing"
    if iterations is not None and iterations >= _COMPILE_FROM:
        return "compile", f"since {iterations} iterations are worth minutes of compiling"
    return "graph", "since replaying needs no compiling" + (
        f", which {iterations} iterations would not win back" if iterations is not None else ""
    )


def _shapes(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    return tuple(tensor.shape for tensor in tensors)


def _check_adam(state: Any, phi: Sequence[Tensor]) -> None:
    """The moments belong to φ, or there are none yet."""
    moments = state.get("state", {}) if isinstance(state, dict) else {}
    for i, moment in moments.items():
        if not i < len(phi) or any(moment[name].shape != phi[i].shape for name in ("exp_avg", "exp_avg_sq")):
            raise L2TError("this state does not fit the learner: its 'adam' is of other meta-networks.")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise L2TError(f"{name}='{value}' is not to be had: use {' or '.join(map(repr, choices))}.")
