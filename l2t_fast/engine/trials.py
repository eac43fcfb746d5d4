"""What is found out by tiny trials before anything is trained: how the target and the loss must run."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor

from l2t_fast.engine.inner_step import Theta
from l2t_fast.engine.loss import Loss, check_mean, check_unread, try_loss
from l2t_fast.engine.precision import arithmetic, reproducible
from l2t_fast.engine.second_order import SecondOrder, examine
from l2t_fast.learner.generators import generators_kept
from l2t_fast.learner.hooks import act_on_gradients, sweeping
from l2t_fast.learner.learner import L2T
from l2t_fast.learner.reach import check_reach
from l2t_fast.learner.undisturbed import undisturbed


class Trials:
    """What the trials of an engine found; that of the target is made again where its modes have changed since.

    theta: its parameters. meta: whether steps will be differentiated. whole: whether batches are not divided.
    """

    def __init__(self, learner: L2T, theta: Theta, loss: Loss, *, meta: bool, whole: bool = True) -> None:
        self._learner, self._theta, self._loss, self._meta, self._whole = learner, theta, loss, meta, whole
        self._modes, self._target = self._modes_now(), try_target(learner, theta, meta=meta)
        self._losses: dict[tuple[torch.dtype, int], SecondOrder] = {}  # of each kind of labels

    def look(self, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Before an iteration on these. The usual loss needs no trial, others one for each kind of labels.

        Raises:
            L2TError: what they refuse.
        """
        if (modes := self._modes_now()) != self._modes:  # which another forward pass may come from
            self._target, self._modes = try_target(self._learner, self._theta, meta=self._meta), modes
        for x, y in batches if self._loss.function is not F.cross_entropy else ():
            if (kind := (y.dtype, y.dim())) not in self._losses:
                device = next(iter(self._theta.values())).device
                with arithmetic("fp32", device), SecondOrder().context():
                    self._losses[kind] = self._try_loss_on(x.to(device), y.to(device))

    def context(self) -> AbstractContextManager[None]:
        """For forward passes."""
        ways = [self._target, *self._losses.values()]
        return SecondOrder(replace=any(way.replace for way in ways)).context()

    def _try_loss_on(self, x: Tensor, y: Tensor) -> SecondOrder:
        """How the loss runs, so that it can be differentiated twice if somebody will, on the outputs of a batch.

        Raises:
            L2TError: see `try_loss` and `check_unread`; and `check_mean`, where batches are divided.
        """
        network, target = self._learner.target_network, self._learner.target
        names = [name for name, p in network.parameters.items() if p.requires_grad]
        with torch.enable_grad(), undisturbed(target, x.device):
            buffers = [(b, b.clone()) for b in target.buffers()]
            stand_ins = {name: network.parameters[name].detach().clone().requires_grad_() for name in names}
            outputs = network.run(x, stand_ins).logits
            assert outputs is not None
            changed = [b for b, before in buffers if b.shape != before.shape or not torch.equal(b, before)]
            # What the pass has left in attributes (an auxiliary loss), the loss may read.
            found = try_loss(self._loss.function, outputs, y, twice=self._meta, through=list(stand_ins.values()))
            if not self._whole:
                check_mean(self._loss, outputs, y)
            check_unread(self._loss.function, outputs, y, [*(network.parameters[name] for name in names), *changed])
        return found

    def _modes_now(self) -> list[bool]:
        target = self._learner.target
        return [act_on_gradients(target), *(module.training for module in target.modules())]


def try_target(learner: L2T, theta: Theta, *, meta: bool) -> SecondOrder:
    """How the target's forward pass runs, so that it can be differentiated twice if somebody will (`meta`).

    Raises:
        L2TError: see `check_reach`. UnfitError: it cannot be differentiated twice.
    """
    network, like = learner.target_network, next(iter(theta.values()))
    x = torch.zeros(2, *learner.image_shape, dtype=like.dtype, device=like.device)
    with generators_kept(x.device):
        x.normal_()
    with reproducible(x.device), SecondOrder().context():
        check_reach(network, x, again=meta)
    if not meta:
        return SecondOrder()
    stand_ins = {name: p.detach().requires_grad_() for name, p in network.parameters.items() if p.requires_grad}
    with sweeping():  # hooks may have consequences of their own
        return examine(learner.target, lambda: network.run(x, stand_ins), list(stand_ins.values()))
