"""What several test files need: small engines for the tests of modes, precisions and captures; rows of benchmarks."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import CASES
from l2t_fast import L2T, Engine
from l2t_fast.networks.architectures import build_model
from l2t_fast.networks.layers import default_layers
from l2t_fast.reference import Reference

CLASSES = 3


def batch(seed: int, size: int = 4, dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Images [size, 3, 32, 32], each brighter or darker as a whole, and labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, 32, 32, generator=generator) + torch.randn(size, 3, 1, 1, generator=generator)
    return x.to(device, dtype), torch.randint(CLASSES, (size,), generator=generator).to(device)


def learner(
    dtype: torch.dtype = torch.float64, device: str = "cpu", width: float = 0.06, dropout: nn.Module | None = None
) -> L2T:
    """ResNet8 -> a narrow VGG9-bn, 15 pairs, always with the same weights."""
    torch.manual_seed(0)
    source, target = build_model("resnet8", 5, 0.25), build_model("vgg9_bn", CLASSES, width)
    layers = {
        "source_layers": default_layers("resnet8", source),
        "target_layers": default_layers("vgg9_bn", target),
    }
    if dropout is not None:
        target.avgpool = nn.Sequential(nn.AdaptiveAvgPool2d(1), dropout)
    x = batch(0, 2, dtype, device)[0]
    return L2T(source.to(device, dtype), target.to(device, dtype), example=x, **layers)


def engine(subject: L2T | None = None, **options: Any) -> Engine:
    """Of a new learner unless one is given; quiet unless told otherwise."""
    settings = {"lr": 0.02, "meta_lr": 1e-3, "say": lambda text: None, **options}
    return Engine(learner() if subject is None else subject, **settings)


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten().double() for name in sorted(tensors)])


def error(tensors: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Relative."""
    wanted = flat(exact).cpu()
    return ((flat(tensors).cpu() - wanted).norm() / wanted.norm()).item()


@torch.no_grad()
def moved_off(subject: L2T, plain: Reference) -> None:
    """Moves φ of the reference off its start, where w is uniform, and gives the learner its φ and projections."""
    for p in plain.phi.values():
        p.add_(0.1 * torch.randn_like(p))
    for part in ("projections", "what", "where"):
        getattr(subject, part).load_state_dict(getattr(plain, part).state_dict())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """To the last bit."""
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def everything(subject: Engine) -> dict[str, Tensor]:
    """Copies of all numbers that an iteration changes, in one dictionary."""
    state = copy.deepcopy(subject.state_dict())
    tensors = {
        f"{group}.{name}": t for group in state if group not in ("adam", "lr") for name, t in state[group].items()
    }
    moments = {
        f"adam.{i}.{name}": t for i, moment in state["adam"].get("state", {}).items() for name, t in moment.items()
    }
    return tensors | moments


def load_as(subject: Engine, state: dict[str, Any]) -> None:
    """A state of other precision or of another device; Adam starts anew."""
    values = copy.deepcopy(state)
    dtype = next(iter(subject.state_dict()["theta"].values())).dtype
    for group in ("theta", "momentum", "buffers", "phi"):
        values[group] = {n: t.to(dtype) if t.is_floating_point() else t for n, t in values[group].items()}
    subject.load_state_dict({**values, "adam": subject.state_dict()["adam"]})


# Benchmarks

SMALL_CASE = replace(CASES["tiny"], batch=4, inner_steps=1)


def result_row(T: int, by: str, ms: float, **more: Any) -> dict[str, Any]:
    row = {"kind": "iteration", "case": "tiny", "batch": 4, "inner_steps": T, "by": by, "mode": "eager"}
    row |= {"precision": "fp32", "memory": "save", "correct": True, "telemetry": "no NVML: x", "rounds": 3}
    row |= {"ms_median": ms, "ms_p20": ms, "ms_p80": ms, "peak_bytes": 10**6 * T, "flops": 10**9}
    row |= {"floor_ms": 1.0, "floor_bound": "flops", "floor_bytes": 1e6, "floor_flops": 1e9, "floor_fraction": 0.1}
    return row | more


TWICE = {"speedup_over_reference": 2.0, "speedup_p20_over_reference": 1.9, "speedup_p80_over_reference": 2.1}
RESULT_ROWS = [
    {"kind": "run", "device": "Some GPU", "threads": 2, "torch": "2.11.0", "commit": "abc", "time": "2026"},
    {"kind": "rates", "rates": {"copy": 3e12, "fp32": 5e13}},
    result_row(1, "reference", 30.0),
    result_row(1, "engine", 15.0, **TWICE),
    result_row(2, "reference", 40.0),
    result_row(2, "engine", 20.0, **TWICE),
    {"kind": "iteration", "case": "tiny", "by": "official", "unavailable": "no checkout"},
]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
