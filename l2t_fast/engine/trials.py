"""What is found out by tiny trials before anything is trained: how the target and the loss must run."""

import torch
from torch import Tensor

from l2t_fast.engine.inner_step import LossFunction, Theta
from l2t_fast.engine.loss import try_loss
from l2t_fast.engine.precision import reproducible
from l2t_fast.engine.second_order import SecondOrder, examine
from l2t_fast.learner.generators import generators_kept
from l2t_fast.learner.hooks import sweeping
from l2t_fast.learner.learner import L2T
from l2t_fast.learner.reach import check_reach
from l2t_fast.learner.undisturbed import undisturbed


def try_target(learner: L2T, theta: Theta, *, meta: bool) -> SecondOrder | None:
    """How the target's forward pass runs, so that it can be differentiated twice; None where nobody will (`meta`).

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
        return None
    stand_ins = {name: p.detach().requires_grad_() for name, p in network.parameters.items() if p.requires_grad}
    with sweeping():  # hooks may have consequences of their own
        return examine(learner.target, lambda: network.run(x, stand_ins), list(stand_ins.values()))


def try_loss_on(learner: L2T, function: LossFunction, x: Tensor, y: Tensor, *, meta: bool) -> SecondOrder:
    """How a loss runs, so that it can be differentiated twice if somebody will (`meta`), on the outputs of a batch.

    Raises:
        L2TError: see `try_loss`.
    """
    with torch.no_grad(), undisturbed(learner.target, x.device):
        outputs = learner.target_network.run(x, simulated=True).logits
    assert outputs is not None
    return try_loss(function, outputs, y, twice=meta)
