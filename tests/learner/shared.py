"""Modules that move axes, and what their layers give, for the tests of layouts."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2t_fast.learner.layout import FeatureMap, find_layout, parse_layer, pick
from l2t_fast.learner.trail import AxisTrail


def features_of(network: nn.Module, layers: Sequence[str], x: Tensor) -> tuple[list[Tensor], AxisTrail]:
    """What `layers` give at their last call, as hooks see it."""
    seen: dict[str, Tensor] = {}

    def record(layer: str) -> Callable[[nn.Module, object, object], None]:
        return lambda _module, _inputs, output: seen.update({layer: pick(output, layer, "target")})

    handles = [network.get_submodule(parse_layer(layer)[0]).register_forward_hook(record(layer)) for layer in layers]
    with AxisTrail(x) as trail:
        network(x)
    for handle in handles:
        handle.remove()
    return [seen[layer] for layer in layers], trail


def images(height: int, width: int, batch: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(0))


def find(module: nn.Module, x: Tensor, option: str | None = None) -> FeatureMap:
    """What the whole module gives."""
    network = nn.Sequential(module)
    (feature,), trail = features_of(network, ["0"], x)
    return find_layout(feature, trail, "0", "target", option)


class Do(nn.Module):
    """A function as a module; `f` is given the module's own layers after x."""

    def __init__(self, f: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.f, self.layers = f, nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x, *self.layers)


def permute(*dims: int) -> nn.Module:
    return Do(lambda x: x.permute(dims))


def tokens() -> nn.Module:
    return Do(lambda x: x.flatten(2).transpose(1, 2))


def prefixed(count: int) -> nn.Module:
    return Do(lambda x: torch.cat([torch.zeros(1, count, x.shape[2]).expand(len(x), -1, -1), x], dim=1))


def attend(x: Tensor, qkv: nn.Module) -> Tensor:
    """Self-attention of two heads, written out."""
    b, n, c = x.shape
    q, k, v = qkv(x).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
    weights = (q @ k.transpose(-2, -1)).softmax(dim=-1)  # [B, heads, N, N]
    return x + (weights @ v).transpose(1, 2).reshape(b, n, c)


def windows(x: Tensor, size: int = 4) -> Tensor:
    """[B, H, W, C] -> [B * windows, size * size, C]."""
    b, h, w, c = x.shape
    x = x.view(b, h // size, size, w // size, size, c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, size * size, c)


def grouped_windows(x: Tensor) -> Tensor:
    """As in Twins: tokens of 8 x 12 positions, in windows of 4 x 4, and two heads."""
    x = x.view(2, 2, 4, 3, 4, 8).transpose(2, 3).reshape(2, 6, 16, 2, 4).transpose(2, 3)  # [B, windows, heads, 16, 4]
    x = F.scaled_dot_product_attention(x, x, x).transpose(2, 3).reshape(2, 2, 3, 4, 4, 8)
    return x.transpose(2, 3).reshape(2, 96, 8)


def shifted_windows(x: Tensor, norm: nn.Module) -> Tensor:
    b, h, w, c = x.shape
    y = norm(windows(x.roll((-2, -1), dims=(1, 2))))
    y = y.view(b, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
    return y.roll((2, 1), dims=(1, 2))


def mixer(x: Tensor, norm: nn.Module, mix: nn.Module) -> Tensor:
    return x + mix(norm(x).transpose(1, 2)).transpose(1, 2)


def cube(*after: nn.Module) -> nn.Module:
    """On images 8 x 8 all sizes are 8."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *after)


def stem(*after: nn.Module) -> nn.Module:
    """On images 16 x 24 positions are 8 x 12; 8 channels, as many as rows."""
    return nn.Sequential(nn.Conv2d(3, 8, 2, stride=2), *after)
