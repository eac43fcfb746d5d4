"""Layers that nobody names: the last of each resolution, or blocks on the way."""

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from l2t_fast import L2T, Engine, L2TError
from l2t_fast.errors import UnfitError
from l2t_fast.learner.candidates import find_layers, layers_of, timm_stages
from l2t_fast.networks.architectures import build_model
from l2t_fast.networks.layers import default_layers
from l2t_fast.reference import Reference
from tests.shared import error, moved_off

EXAMPLE = torch.zeros(2, 3, 16, 16)


def chosen(module: nn.Module, example: Tensor = EXAMPLE, output: bool = True) -> list[str]:
    return find_layers(module, example, role="target", output=output).chosen


def stage(*channels: int, inplace: bool = True) -> nn.Sequential:
    """A convolution a step, the first of stride 2, each with BatchNorm and ReLU."""
    layers: list[nn.Module] = []
    for i, (c, d) in enumerate(itertools.pairwise(channels)):
        layers += [nn.Conv2d(c, d, 3, 2 if i == 0 else 1, 1), nn.BatchNorm2d(d), nn.ReLU(inplace)]
    return nn.Sequential(*layers)


def head(channels: int, classes: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def pyramid() -> nn.Sequential:
    return nn.Sequential(stage(3, 4, 4), stage(4, 6, 6), stage(6, 8, 8), head(8))


class Tokens(nn.Module):
    """A ViT without attention: patches, a class token, blocks."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh()) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)  # [B, 16, 8]
        x = torch.cat([x.mean(1, keepdim=True), x], 1)  # [B, 1 + 16, 8]
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x)[:, 0])  # type: ignore[no-any-return]


def test_the_last_layer_of_each_resolution() -> None:
    found = find_layers(pyramid(), EXAMPLE, role="target", output=True)
    assert found.chosen == ["0", "1", "2"]  # as a whole, not the ReLU at its end
    assert [found.candidates[name].shape for name in found.chosen] == [(4, 8, 8), (6, 4, 4), (8, 2, 2)]
    assert "0.0" in found.candidates
    assert "0.1" not in found.candidates
    assert "3.0" not in found.candidates  # 1 x 1 is no map


def test_around_all_stages_is_none_of_them() -> None:
    wrapped = nn.Sequential(nn.Sequential(*list(pyramid())[:3]), head(8))
    assert chosen(wrapped) == ["0.0", "0.1", "0.2"]


def test_the_start_of_the_next_block_is_not_the_end_of_this_one() -> None:
    class Expanding(nn.Sequential):  # as in MobileNets: wide before it goes on to the next resolution
        def __init__(self, c: int, d: int) -> None:
            super().__init__(nn.Conv2d(c, 4 * c, 1), nn.ReLU(), nn.Conv2d(4 * c, d, 3, 2, 1))

    net = nn.Sequential(stage(3, 4, 4), Expanding(4, 6), nn.Conv2d(6, 6, 3, 1, 1), Expanding(6, 8), head(8))
    assert chosen(net) == ["0", "2", "3"]


def test_one_convolution_alone_is_a_stem_where_there_is_enough_beside() -> None:
    stem = nn.Sequential(nn.Conv2d(3, 3, 3, 2, 1), nn.ReLU())
    assert chosen(nn.Sequential(stem, *pyramid()), torch.zeros(2, 3, 32, 32)) == ["1", "2", "3"]
    alone = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1), head(4))
    assert chosen(alone) == ["0", "1"]


def test_a_pool_is_no_layer_that_learns() -> None:
    net = nn.Sequential(stage(3, 4, 4), nn.MaxPool2d(2), head(4))
    assert chosen(net) == ["0"]


def test_where_the_last_is_overwritten_the_one_before() -> None:
    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = stage(3, 4, 4), nn.Conv2d(4, 4, 3, 1, 1)
            self.head = head(4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(self.a(x))
            return self.head(x.mul_(2))  # type: ignore[no-any-return]

    assert chosen(Doubling()) == ["a"]


def test_the_logits_and_what_makes_them_are_no_feature() -> None:
    net = nn.Sequential(stage(3, 4, 4), nn.Conv2d(4, 3, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert "1" not in find_layers(net, EXAMPLE, role="target", output=True).candidates  # a map of each class


@pytest.mark.parametrize(
    ("depth", "blocks"), [(2, [0, 1]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (6, [1, 2, 4, 5]), (12, [2, 5, 8, 11])]
)
def test_blocks_at_each_quarter_of_tokens(depth: int, blocks: list[int]) -> None:
    found = find_layers(Tokens(depth), EXAMPLE, role="target", output=True)
    assert found.chosen == [f"blocks.{i}" for i in blocks]
    assert {(found.candidates[name].layout, found.candidates[name].shape) for name in found.chosen} == {
        ("tokens", (8, 4, 4))
    }


def test_what_timm_says_of_itself() -> None:
    net = pyramid()
    net.feature_info = [{"module": "0.5", "reduction": 2}, {"module": "2", "reduction": 8}]  # type: ignore[assignment]
    assert timm_stages(net) == ["0.5", "2"]
    assert chosen(net) == ["0", "2"]  # the same feature as 0.5
    net.feature_info = [{"module": "0.1"}, {"module": "2"}]  # type: ignore[assignment]
    assert chosen(net) == ["0", "1", "2"]  # 0.1 is overwritten: not as it says
    net.feature_info = "of another kind"  # type: ignore[assignment]
    assert timm_stages(net) == []
    tokens = Tokens(6)
    tokens.feature_info = [{"module": f"blocks.{i}"} for i in range(6)]  # type: ignore[assignment]
    assert chosen(tokens) == ["blocks.1", "blocks.2", "blocks.4", "blocks.5"]


def test_stages_that_are_lists_of_blocks_or_give_several_features() -> None:
    class Several(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
            x = self.block(x)
            return x, tuple(x.shape[2:])

    class Stages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.ModuleList([stage(3, 4, 4), nn.Conv2d(4, 4, 3, 1, 1)])
            self.cpe = nn.Conv2d(4, 4, 3, 1, 1)  # for all blocks, outside of them
            self.second, self.third = Several(stage(4, 6, 6)), nn.Conv2d(6, 20, 3, 2, 1)
            self.wide, self.head = nn.Conv2d(20, 200, 1), head(200)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.first:
                x = block(self.cpe(x)) if x.shape[1] == 4 else block(x)
            return self.head(self.wide(self.third(self.second(x)[0])))  # type: ignore[no-any-return]

    net = Stages()
    assert chosen(net) == ["first.1", "second.block", "wide"]  # a list is nothing that its blocks run inside of
    net.feature_info = [{"module": name} for name in ("first", "second", "third")]  # type: ignore[assignment]
    assert chosen(net) == ["first.1", "second.block", "third"]  # as told, few parameters or not
    net.feature_info = [{"module": name} for name in ("frist", "second", "third")]  # type: ignore[assignment]
    assert chosen(net) == ["first.1", "second.block", "wide"]


def test_blocks_that_give_several_features() -> None:
    class Pairs(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.flatten(), x + self.block(x)

    class Both(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            x = self.patches(x).flatten(2).transpose(1, 2)  # [B, 16, 8]
            for block in self.blocks:
                x = block(x)[1]
            return self.head(self.norm(x)[:, 0])  # type: ignore[no-any-return]

    net = Both(6)
    net.blocks = nn.ModuleList(map(Pairs, net.blocks))
    for told in ([f"blocks.{i}" for i in range(6)], [f"block.{i}" for i in range(6)], []):
        net.feature_info = [{"module": name} for name in told]  # type: ignore[assignment]
        assert chosen(net) == [f"blocks.{i}[1]" for i in (1, 2, 4, 5)]


def test_a_block_that_ends_with_a_pool_is_of_the_resolution_before() -> None:
    class Pooling(nn.Module):  # activation and pool are functions
        def __init__(self, c: int, d: int) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(c, d, 3, 1, 1), nn.BatchNorm2d(d)

        def forward(self, x: Tensor) -> Tensor:
            return F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)

    net = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), Pooling(4, 8), Pooling(8, 8), head(8))
    assert chosen(net) == ["1.norm", "2.norm"]
    compressing = nn.Sequential(nn.Conv2d(8, 4, 1), nn.AvgPool2d(2))  # as between the blocks of a DenseNet
    assert chosen(nn.Sequential(stage(3, 8, 8, 8), compressing, stage(4, 6, 6), head(6))) == ["0", "2"]


def test_a_layer_called_several_times_and_one_that_gives_several() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.same, self.head = nn.Conv2d(3, 3, 3, 2, 1), nn.Conv2d(3, 3, 3, 1, 1), head(3)
            self.both = Both()

        def forward(self, x: Tensor) -> Tensor:
            x = self.same(self.down(self.same(x)))
            return self.head(self.both(x)[1])  # type: ignore[no-any-return]

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, 2, 1)

        def forward(self, x: Tensor) -> list[Tensor]:
            return [x * 1, self.conv(x) * 2]

    names = find_layers(Twice(), EXAMPLE, role="target", output=True)
    assert {"same_0", "same_1", "both[1]"} <= set(names.candidates)
    assert names.chosen == ["same_0", "both[0]", "both[1]"]
    L2T(pyramid(), Twice(), example=EXAMPLE)  # each of these names taps it


def test_a_network_that_looks_at_numbers_runs_on_true_ones() -> None:
    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = pyramid()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x if float(x.std()) > 0 else x / 0)  # type: ignore[no-any-return]

    assert chosen(Looking()) == ["net.0", "net.1", "net.2"]


@pytest.mark.parametrize("look", [False, True])
def test_finding_leaves_no_trace(look: bool) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.seen, self.last = pyramid(), 0, torch.zeros(1)
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            self.last = x.sum()
            self.steps += 1  # type: ignore[operator, has-type]
            return self.net(x + float(x.mean() * 0) if look else x)  # type: ignore[no-any-return]

    net = Counting()
    before, generator = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    chosen(net)
    assert net.seen == 0
    assert net.last.tolist() == [0]
    assert type(net.last) is Tensor
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), before.values(), strict=True))
    assert torch.equal(torch.get_rng_state(), generator)
    assert not any(m._forward_hooks for m in net.modules())


def test_no_map_at_all_is_refused() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(768, 4), nn.Linear(4, 3))
    with pytest.raises(UnfitError, match="no layer of the target gives a map"):
        chosen(flat)
    learner = L2T([], flat, pairs=[], example=EXAMPLE)  # nothing is matched: nothing is looked for
    assert learner.target_layers == []
    with pytest.raises(L2TError, match=r"the source 0 cannot run on images \[2, 3, 16, 16\]"):
        L2T(nn.Conv2d(4, 4, 1), pyramid(), example=EXAMPLE)
    with pytest.raises(L2TError, match="has no shape yet"):
        L2T(pyramid(), nn.LazyConv2d(4, 1), example=EXAMPLE)


def test_resnets_and_vggs_keep_theirs() -> None:
    for name in ("resnet8", "vgg9_bn"):
        model = build_model(name, 3, 0.25)
        assert layers_of(model, torch.zeros(2, 3, 32, 32), role="target", output=True) == default_layers(name, model)


class Checkpointed(nn.Module):
    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        for part in self.net:
            x = torch.utils.checkpoint.checkpoint(part, x, use_reentrant=False)
        return x


@pytest.mark.parametrize("kind", ["pyramid", "tokens", "checkpointed"])
def test_without_layer_names_the_engine_is_exact(kind: str) -> None:
    torch.manual_seed(0)
    source, target = pyramid().double(), Tokens(4).double() if kind == "tokens" else pyramid().double()
    if kind == "checkpointed":
        target = Checkpointed(target)  # type: ignore[arg-type, assignment]
    x, y = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.arange(4) % 3
    plain_target = copy.deepcopy(target)
    learner = L2T(source, target, example=x)

    def grid(tokens: Tensor) -> Tensor:
        return tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4))

    maps: dict[str, Any] = {f"blocks.{i}": grid for i in range(4)} if kind == "tokens" else {}
    plain = Reference(
        source,
        plain_target,
        source_layers=["0", "1", "2"],
        target_layers=list(maps) or [f"net.{i}" if kind == "checkpointed" else str(i) for i in range(3)],
        pairs=learner.pairs,
        example=x,
        lr=0.05,
        inner_steps=1,
        target_maps=maps,
    )
    moved_off(learner, plain)
    engine = Engine(learner, lr=0.05, inner_steps=1, mode="eager", say=lambda text: None)
    assert error(engine.meta_gradient(x, y), plain.meta_gradient(x, y)) < 1e-9
