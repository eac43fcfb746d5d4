"""The engine: runs iterations on a learner, launch by launch, captured or compiled."""

import contextlib
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from l2t_fast.bounds import check_number
from l2t_fast.choices import Memory, Mode, Precision, Scheme
from l2t_fast.engine import checks
from l2t_fast.engine.alone import one_at_a_time
from l2t_fast.engine.capture import CaptureError, Graphs
from l2t_fast.engine.checks import Images
from l2t_fast.engine.compile import Say, Steps, compiled_steps, plain_steps, shapes_of, units_of
from l2t_fast.engine.inner_step import LossFunction, parameters
from l2t_fast.engine.iteration import Iteration
from l2t_fast.engine.loss import Loss, settings_of_loss
from l2t_fast.engine.memory import advice, within_memory
from l2t_fast.engine.modes import Draws, check_capture, choose_mode
from l2t_fast.engine.optimizer import EngineOptimizer
from l2t_fast.engine.precision import arithmetic, images, lay_out, reproducible, warning
from l2t_fast.engine.shards import Shards
from l2t_fast.engine.state import Trained
from l2t_fast.engine.surroundings import surroundings_kept
from l2t_fast.engine.trials import Trials
from l2t_fast.engine.update import Rule, make_update
from l2t_fast.errors import L2TError
from l2t_fast.kernels.layers.sync_batch_norm import synchronised
from l2t_fast.learner.attributes import settings_of
from l2t_fast.learner.generators import Generators, device_drew, generators_kept, host_drew, read_generators
from l2t_fast.learner.learner import L2T
from l2t_fast.ranks import Group, together


def say_on_stderr(text: str) -> None:
    """Writes a piece of progress as it is."""
    sys.stderr.write(text)
    sys.stderr.flush()


class Engine:
    """Runs the iterations of L2T-ww (paper, algorithm 1) on a learner, exactly.

    What the target's modules are set to counts at each step: modes (a BatchNorm in evaluation mode normalises by its
    running statistics and leaves them), hooks and attributes. Hooks of parameters and backward hooks of modules act on
    the gradient of each real and simulated step; the meta-gradient differentiates what they make of it.

    Args:
        learner: an `L2T`; its target and projections (θ) and its meta-networks (φ) are trained in place.
        lr, momentum, weight_decay, nesterov: the SGD of θ, in the real and in the simulated steps alike; it reaches
            every trainable parameter, also those whose gradient is zero.
        meta_lr, meta_weight_decay: the Adam of φ.
        beta: β, the weight of the matching loss.
        inner_steps: T, the number of simulated steps on the matching loss (or, in "simulation", on the total loss).
        scheme: "transfer", the paper's; or "simulation", the ordinary bilevel scheme, which needs `val`.
        mode: "eager" launches every operation by itself. "graph" (CUDA) captures the whole iteration in one CUDA graph
            in its fourth step and replays it from then on. "compile" traces the networks, proves that the graphs
            compute the same, compiles each kind of step with torch.compile in the first step, and captures likewise on
            CUDA. "auto" picks one, says which and why, and falls back with a line where a model cannot be compiled or
            captured.
        precision: "fp32" computes in the dtype of the parameters (float64 parameters: in float64), on CUDA without
            TF32; "tf32" lets CUDA's tensor cores round the factors of products and convolutions; "bf16" computes
            networks and features in bfloat16, with float32 parameters, statistics and sums. The last two need float32
            parameters, and lay out convolutions as channels_last.
        memory: "save" keeps the activations of all simulated steps; "recompute" holds those of one step at a time,
            whatever T is, for one more forward and backward pass a step.
        accumulate: K, micro-batches that each batch is divided into; their gradients are averaged inside the
            simulation. It holds the activations of one at a time, as "recompute" does; BatchNorm sees one at a time.
        group: a torch.distributed process group, on all of whose ranks the same engine is made and called: each `step`
            gets this rank's part of the batch, and all do the iteration of the joined batch. All take rank 0's
            parameters and buffers when the engine is made (docs/many-devices.md).
        loss: L_org, and of the held-out batch L_meta: any function of the target's outputs and the labels that gives a
            scalar and has a second derivative. It is tried on the first batch.
        optimizer: of θ, `SGD(...)` or `AdamW(...)` instead of momentum, weight_decay and nesterov.
        groups: {"params": parameters, "lr": ..., "weight_decay": ...}, as torch.optim takes them; see `make_update`.
        max_grad_norm: the gradient of each real and simulated step is clipped to this global norm.
        say: gets what "auto" picks, the progress of compiling and fallbacks, as pieces of text; stderr by default.

    Attributes:
        lr, meta_lr: may be set at any time, also between replays; lr is that of all groups without one of their own.
        optimizer: a `torch.optim.Optimizer` for schedules and trainers; the engine takes its steps by itself.
        mode: the mode that runs; `why`: why "auto" picked it.
        smallest_batch: 2 with BatchNorm in the target, else 1. needs_val: whether `step` needs `val`.

    Raises:
        L2TError: a setting out of range, a mode or a precision that is not to be had here, a target without a trainable
            parameter, ranks that differ. UnfitError: a target that cannot be differentiated twice, where there are
            meta-parameters.
    """

    @one_at_a_time
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
        accumulate: int = 1,
        group: Group = None,
        loss: LossFunction = F.cross_entropy,
        optimizer: Rule | None = None,
        groups: Sequence[Mapping[str, Any]] = (),
        max_grad_norm: float | None = None,
        say: Say = say_on_stderr,
    ) -> None:
        words = {"scheme": scheme, "mode": mode, "precision": precision, "memory": memory}
        numbers = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "meta_lr": meta_lr, "beta": beta}
        numbers |= {"meta_weight_decay": meta_weight_decay, "inner_steps": inner_steps, "accumulate": accumulate}
        numbers |= {} if max_grad_norm is None else {"max_grad_norm": max_grad_norm}
        checks.check_settings(words, numbers, nesterov)
        self._device = checks.trained_parameter(learner, precision).device
        self.mode, self.why = choose_mode(mode, self._device)
        if mode == "auto":
            say(f"l2t_fast: mode '{self.mode}', {self.why}\n")
        if warned := warning(precision, self._device):
            say(f"l2t_fast: {warned}\n")
        self.learner, self.beta, self.inner_steps = learner, beta, inner_steps
        self.scheme, self.precision, self.memory, self.accumulate = scheme, precision, memory, accumulate
        self._auto, self._say = mode == "auto", say
        lay_out([*learner.sources, learner.target], precision)
        rule = checks.choose_rule(optimizer, momentum, weight_decay, nesterov)
        theta = parameters(learner)
        update = make_update(rule, lr, groups, max_grad_norm, theta)
        self._shards = Shards(accumulate, group)
        self._shards.join(learner, self.mode, {**numbers, "words": (scheme, precision), "update": update.described()})
        self.trained = Trained.of(learner, theta, update, meta_lr, meta_weight_decay)
        self.optimizer = EngineOptimizer(self, lr)
        self._meta_lr_value = float(meta_lr)
        self.loss, self._loss = loss, Loss.of(loss, learner.target_network.output_shape)
        self._iteration = Iteration(learner, self.trained, scheme, inner_steps, memory, self._shards, self._loss)
        self._plain = plain_steps(learner, beta, loss=loss)
        self._compiled: tuple[tuple[Any, ...], Steps] | None = None  # for inputs of these shapes
        self._draws: Draws | None = None  # not looked at yet
        self._evaluation_said = self._sets_attributes = False
        self._labels_seen: set[torch.dtype] = set()
        self._trials = Trials(learner, theta, self._loss, meta=bool(self.trained.phi), whole=self._shards.whole)
        self._settings = self._settings_now()
        self._graphs = self._new_graphs()
        self.needs_val = scheme == "simulation" and bool(self.trained.phi)

    @property
    def smallest_batch(self) -> int:
        """Images that a batch must have."""
        return self._shards.count * checks.smallest_batch(self.learner.target)

    @property
    def lr(self) -> float:
        """α, the learning rate of θ."""
        return float(self.optimizer.param_groups[0]["lr"])

    @lr.setter
    def lr(self, value: float) -> None:
        check_number("lr", value)
        for group, options in zip(self.trained.update.groups, self.optimizer.param_groups, strict=True):
            if group.follows:
                options["lr"] = float(value)

    @property
    def meta_lr(self) -> float:
        """The learning rate of φ."""
        return self._meta_lr_value

    @meta_lr.setter
    def meta_lr(self, value: float) -> None:
        check_number("meta_lr", value)
        self._meta_lr_value = float(value)
        self.trained.set_meta_lr(self._meta_lr_value)

    @one_at_a_time
    def step(self, x: Images, y: Images, val: tuple[Tensor, Tensor] | None = None) -> dict[str, Tensor]:
        """One iteration: the real step of θ, the simulated steps from there, Adam on φ.

        Args:
            x, y: images [B, C, H, W] and labels [B], int64, or what the loss takes, on the device of the target or on
                the CPU: under graphs those are copied while the iteration before still runs (pinned memory must not
                be overwritten while it is). With scheme "simulation" also a list or tuple of such batches, taken in
                turn by the T steps; the real step uses the first.
            val: (images, labels) of L_meta; needed by "simulation". By default "transfer" measures it on (x, y).

        Returns:
            Metrics on the device, without waiting for it: "loss" (L_org before the real step), "accuracy" (a fraction
            of the batch; for cross entropies) and, with pairs, "matching_loss" (L_wfm), "pair_losses" [P] (its terms),
            "pair_weights" [P] (λ, batch mean) and, with meta-parameters, "meta_loss" (L_meta); of each term its value,
            "NAME_loss". Where graphs are captured they are views that are written anew `capture.ROWS` iterations later.

        Raises:
            L2TError: x and y do not fit each other, the learner or the network, a label outside the classes (labels on
                a GPU are looked at in the first step only, since looking waits for it), a batch of one with BatchNorm,
                no `val`; parameters of the target that were replaced, frozen or thawed since the engine was made; in
                the first steps, a model that cannot be compiled or captured. Whatever is raised, θ, φ, momentum and
                buffers are as before.
        """
        with together(self._shards.group):
            tensors = self._check(x, y, val)
        metrics = self._step(tensors)
        self.optimizer.stepped()
        return metrics

    def _step(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        with self._computing(tensors):
            if self.mode != "eager":
                self._drop_what_is_stale()
            if self.mode == "compile" and self._compiled is None:
                self._compile(tensors)
            if self._graphs is None:
                return self._iterate(self._ready(tensors))
            before = read_generators(self._device) if self._draws is None else None
            try:
                metrics = self._graphs.run(tensors, self._ready)
            except CaptureError as error:
                self._give_up_graphs(error)
                return self._iterate(self._ready(tensors))
            if before is not None:
                self._note_draws(before)
            return metrics

    @one_at_a_time
    def meta_gradient(self, x: Images, y: Images, val: tuple[Tensor, Tensor] | None = None) -> dict[str, Tensor]:
        """dL_meta/dφ by name ("what.0.weight", ...), simulated from the present θ and momentum; changes nothing.

        Arguments and errors as for `step`. There is no real step: `step` takes this gradient after its own.
        """
        if not self.trained.phi:
            return {}
        with together(self._shards.group):
            tensors = self._ready(self._check(x, y, val))
        if self.mode != "eager":
            self._drop_what_is_stale()
        with generators_kept(self._device), surroundings_kept(self.learner.sources), self._computing(tensors):
            _, grads = self._simulate(self._steps(tensors), tensors)
        return dict(zip(self.trained.phi, grads, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Everything that `step` changes, and the learning rate: tensors, numbers and dictionaries only.

        The tensors are the engine's own, as in torch: copy them to keep them over the next step.
        """
        adam = self.trained.adam_state(self._meta_lr_value)
        rates = self.optimizer.rates()
        return {**self.trained.groups(self.learner), "adam": adam, "lr": rates if len(rates) > 1 else self.lr}

    @one_at_a_time
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave; the values are copied into the present tensors.

        Raises:
            L2TError: a state of another learner or of something else; nothing is changed then.
        """
        meta_lr, in_place = self.trained.load(state, self.learner)
        if not in_place:
            self._graphs = self._new_graphs()
        if meta_lr is not None:
            self.meta_lr = meta_lr
        self.optimizer.set_rates(state["lr"])

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FIXED and name in self.__dict__:
            raise L2TError(f"the {name} of an engine is fixed: make a new one, and load its state_dict().")
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise L2TError("an Engine cannot be copied or pickled: make a new one, and load its state_dict().")

    def _settings_now(self) -> list[Any]:
        """What a captured or compiled iteration has frozen."""
        return [settings_of(self.learner.target), settings_of_loss(self.loss)]

    @contextlib.contextmanager
    def _computing(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        group = self._shards.group
        explained = functools.partial(advice, self._iteration, self._plain, tensors, self._ready, self.precision)
        switched = arithmetic(self.precision, self._device)
        with together(group), switched, self._trials.context(), within_memory(explained), synchronised(group):
            yield

    def _new_graphs(self) -> Graphs | None:
        captures = self.mode != "eager" and self._device.type == "cuda"
        return Graphs(self._iterate, self._device, self._may_be_captured) if captures else None

    def _may_be_captured(self) -> None:
        memory: Memory = self.memory if self._shards.count == 1 else "recompute"
        check_capture([self.learner.target, *self.learner.sources], self._draws, memory)
        if self._sets_attributes:
            raise L2TError("the target's forward pass sets attributes of its modules, which a replay would not")

    def _drop_what_is_stale(self) -> None:
        """What was captured or compiled under other settings of the target's modules is made anew."""
        settings = self._settings_now()
        if settings != self._settings:
            self._settings, self._compiled, self._draws = settings, None, None
            if self._graphs is not None:
                self._graphs = self._new_graphs()

    def _note_draws(self, before: Generators) -> None:
        after = read_generators(self._device)
        self._draws = Draws(host=host_drew(before, after), device=device_drew(before, after))

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
        units = units_of(self.scheme, self.inner_steps, self.learner.uses_sources, bool(self.trained.phi))
        ready = self._ready(tensors)
        try:
            with reproducible(self._device):  # the networks are traced, and the graphs proved equal
                steps = compiled_steps(self.learner, self.beta, units, self._say, self.loss)
            with generators_kept(self._device):
                for part in self._iteration.matching(steps, ready):
                    self._iteration.real_gradient(steps, part.batches[0])
                if self.trained.phi:
                    self._simulate(steps, ready)
            self._compiled = shapes_of(tensors), steps
        except L2TError as error:
            if not self._auto:
                raise
            self.mode = "graph" if self._device.type == "cuda" else "eager"
            self._say(f"l2t_fast: {error} Going on with mode '{self.mode}'.\n")

    def _ready(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of an iteration as it takes them: images as they are computed with, on the device."""
        on_device = [t.to(self._device, non_blocking=True) for t in tensors]
        return [images(t, self.precision) if i % 2 == 0 else t for i, t in enumerate(on_device)]

    def _steps(self, tensors: Sequence[Tensor]) -> Steps:
        """Compiled ones for the shapes of the first step, plain ones for a smaller last batch."""
        if self._compiled is not None and self._compiled[0] == shapes_of(tensors):
            return self._compiled[1]
        return self._plain

    def _iterate(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        metrics = self._iteration.run(self._steps(tensors), tensors, self._may_draw)
        if self._graphs is not None:
            settings = self._settings_now()
            self._sets_attributes = settings != self._settings
            self._settings = settings
        return metrics

    def _simulate(self, steps: Steps, tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """(L_meta, dL_meta/dφ) from the present θ and momentum."""
        theta = {name: p.detach() for name, p in self.trained.theta.items()}
        parts = self._iteration.matching(steps, tensors)
        return self._iteration.meta_gradient(steps, parts, theta, self.trained.row(), draws=self._may_draw)

    @property
    def _may_draw(self) -> bool:
        return self._draws is None or any(self._draws)

    def _check(self, x: Images, y: Images, val: tuple[Tensor, Tensor] | None) -> list[Tensor]:
        """x, y of each batch and then of L_meta's own in a row, those that an iteration reads; or an L2TError."""
        meta = bool(self.trained.phi)
        self.optimizer.take_over_rates()
        batches = checks.batches_in_a_row(x, y, val, self.scheme, self.inner_steps, meta)
        smallest, like = self.smallest_batch, next(iter(self.trained.theta.values()))
        for images_, labels in batches:
            self._shards.check_batch(images_, smallest)
            look = labels.dtype not in self._labels_seen
            checks.check_batch(images_, labels, like, smallest, self.learner, self._loss, look)
            self._shards.check_labels(labels, self._loss.ignored)
        self._labels_seen |= {labels.dtype for _, labels in batches}
        checks.check_target(self.learner, self.trained.theta)
        for source in self.learner.sources:
            if any(module.training for module in source.modules()):
                source.eval()
        if not self.learner.target.training and not self._evaluation_said:
            self._say(
                "l2t_fast: the target is in evaluation mode, and trains so: BatchNorm by its running statistics, no "
                "dropout; target.train() changes that\n"
            )
            self._evaluation_said = True
        batches = batches if meta else batches[:1]
        self._trials.look(batches)
        return [tensor for batch in batches for tensor in batch]


_FIXED = frozenset(
    ("learner", "beta", "inner_steps", "scheme", "precision", "memory", "accumulate", "loss", "optimizer")
)
