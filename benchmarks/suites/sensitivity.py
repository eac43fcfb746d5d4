"""How much of the meta-gradient is signal, along a training.

At several iterations of L2T-ww, in float64, on batches of the training images:

- noise: how far the meta-gradient moves, relative to its length, when the images move by 1e-6 of their scale: kinks of
  ReLU and max-pool make it chaotic at a fresh target;
- agreement: the mean cosine of the meta-gradients of different batches at the same θ and φ, and its signal-to-noise
  ratio |mean|/std: a meta-learner can only follow what they have in common;
- dead: the fraction of pairs that learn nothing, as no gradient of λ reaches g from any image, and of those that are
  held at an end of relu6 on every image (`at_0`, `at_6`); `--pairs-alone`: this alone, in float32, of all training
  images;
- share: the part of the real step's gradient that is the matching loss's, |∇L_wfm|/(|∇L_wfm| + |∇L_org|) on the target.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.rows import Row, add_row_arguments, begin, say, write
from l2t_fast import L2T, Engine
from l2t_fast.data.options import DataConfig
from l2t_fast.data.splits import Data, load_data
from l2t_fast.engine import inner_step as inner
from l2t_fast.engine.inner_step import StepInput
from l2t_fast.networks.architectures import build_model
from l2t_fast.networks.layers import default_layers
from l2t_fast.networks.weights import checkpoint_classes, load_weights

_NOISE = 1e-6
_BATCHES = 4  # at which meta-gradients are compared
_AT_ONCE = 250  # images that pass the source together


def sensitivity_rows(arguments: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """A row for each seed and each of the iterations asked for."""
    dtype = torch.float32 if arguments.pairs_alone else torch.float64
    for seed in arguments.seeds:
        config = DataConfig(arguments.dataset, data_root=arguments.data_root, per_class=arguments.per_class)
        data = load_data(config, seed)
        engine = _engine(arguments, data, seed, device, dtype)
        epochs = range(-(-max(arguments.iterations) // data.train.num_batches(arguments.batch)))
        batches = [(x.to(device, dtype), y.to(device)) for epoch in epochs for x, y in _epoch(data, arguments, epoch)]
        batches = batches or [(x.to(device, dtype), y.to(device)) for x, y in _epoch(data, arguments, 0)]
        images = torch.cat([x for x, _ in data.train.eval_batches(_AT_ONCE)]).to(device, dtype)
        done = 0
        for wanted in sorted(arguments.iterations):
            for batch in batches[done:wanted]:
                engine.step(*batch)
            done = wanted
            told = {"where": arguments.where, "beta": arguments.beta, "meta_lr": arguments.meta_lr}
            row = {"kind": "sensitivity", "seed": seed, "iteration": done, **told}
            found = {} if arguments.pairs_alone else measure(engine, batches[:_BATCHES])
            yield row | found | pairs(engine.learner, images)


def _engine(arguments: argparse.Namespace, data: Data, seed: int, device: torch.device, dtype: torch.dtype) -> Engine:
    source = build_model("resnet32", checkpoint_classes(arguments.source_weights, "resnet32"))
    load_weights(source, arguments.source_weights)
    torch.manual_seed(seed)
    target = build_model("vgg9_bn", data.num_classes, arguments.width)
    learner = L2T(
        source.to(device, dtype),
        target.to(device, dtype),
        source_layers=default_layers("resnet32", source),
        target_layers=default_layers("vgg9_bn", target),
        where=arguments.where,
        example=torch.zeros(2, *data.image_shape, dtype=dtype, device=device),
    )
    return Engine(learner, lr=arguments.lr, meta_lr=arguments.meta_lr, beta=arguments.beta, mode="eager")


def _epoch(data: Data, arguments: argparse.Namespace, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    yield from data.train.batches(arguments.batch, seed=0, epoch=epoch)


def pairs(learner: L2T, images: Tensor) -> Row:
    """Mean λ of each pair; the fractions of pairs that get no gradient, whether λ is to rise or to fall, and of those
    that are at an end of relu6 on all of the images."""
    pooled = [learner.source_features(x) for x in images.split(_AT_ONCE)]
    lam = torch.cat([torch.stack(learner.weights(S)[1]) for S in pooled], 1)  # [P, N]
    alive = torch.zeros(len(lam), dtype=torch.bool)
    for sign in (1, -1):
        grads = torch.autograd.grad(sign * lam.sum(), list(learner.where.parameters()), retain_graph=True)
        named = zip(learner.where.named_parameters(), grads, strict=True)
        for p in {int(name.partition(".")[0]) for (name, _), grad in named if grad.count_nonzero()}:
            alive[p] = True
    ends = {f"at_{end}": (lam == end).all(1).double().mean().item() for end in (0, 6)}
    return {"dead": 1 - alive.double().mean().item(), **ends, "pair_weights": lam.mean(1).tolist()}


def measure(engine: Engine, batches: list[tuple[Tensor, Tensor]]) -> Row:
    """All of it, at the engine's present state."""
    learner = engine.learner
    grads = torch.stack([_flat(engine.meta_gradient(*batch)) for batch in batches])  # [batches, φ]
    x, y = batches[0]
    generator = torch.Generator().manual_seed(0)
    moved = x + _NOISE * x.std() * torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    noise = (_flat(engine.meta_gradient(moved, y)) - grads[0]).norm() / grads[0].norm()
    units = grads / grads.norm(dim=1, keepdim=True)
    cosines = (units @ units.T)[~torch.eye(len(units), dtype=torch.bool)]
    with torch.no_grad():
        S = learner.source_features(x)
        theta = inner.parameters(learner)
        batch = StepInput(
            x, y, *learner.matching_sources(S, learner.resizes(x)), learner.coefficients(S, engine.beta)[0]
        )
        parts = [
            torch.cat(
                [g.flatten() for n, g in inner.gradient(learner, theta, batch, **which).theta.items() if "target" in n]
            )
            for which in ({"task": True, "matching": False}, {"task": False, "matching": True})
        ]
    return pairs(learner, x) | {
        "noise": noise.item(),
        "cosine": cosines.mean().item(),
        "signal_to_noise": (grads.mean(0).norm() / grads.var(0).sum().sqrt()).item(),
        "share": (parts[1].norm() / (parts[0].norm() + parts[1].norm())).item(),
    }


def _flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def show(row: Row) -> None:
    """One line of the table."""
    names = ("noise", "cosine", "signal_to_noise", "dead", "at_0", "at_6", "share")
    say(
        f"seed {row['seed']}, iteration {row['iteration']}",
        [f"  {name} {row[name]:.2g}" for name in names if name in row],
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_row_arguments(parser)
    parser.add_argument("--dataset", default="fashion-mnist")
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--source-weights", type=Path, required=True, help="a checkpoint of a ResNet32")
    parser.add_argument("--per-class", type=int, default=50)
    parser.add_argument("--width", type=float, default=0.125, help="of the VGG9-bn")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--meta-lr", type=float, default=0.01)
    parser.add_argument("--where", default="relu6")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--pairs-alone", action="store_true", help="only which pairs are dead, which is quick")
    parser.add_argument("--iterations", type=int, nargs="+", default=[0, 5, 20, 60])


def run(arguments: argparse.Namespace) -> None:
    """One training, looked at now and then."""
    device = begin("sensitivity", arguments)
    write(arguments.output, sensitivity_rows(arguments, device), show)
