"""Where nobody differentiates twice, a CPU runs PyTorch's own layers."""

import pytest
import torch
from torch import nn

from l2t_fast.kernels.layers.autograd import differentiated_once
from l2t_fast.kernels.layers.twins import Twins
from tests.kernels.test_layers import assert_close, images, plain_network

pytestmark = pytest.mark.core


def nodes(y: torch.Tensor) -> set[str]:
    """Names of the nodes of the graph behind y."""
    found, left = set(), [y.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.add(node)
            left += [next_node for next_node, _ in node.next_functions]
    return {type(node).__name__ for node in found}


@pytest.mark.parametrize("simulated", [True, False])
def test_plain_layers_only_where_nobody_differentiates_twice(simulated: bool) -> None:
    ours, theirs = plain_network(), plain_network()
    x = images()
    before = ours[1].running_mean.clone()
    with Twins(ours).taken(simulated=simulated):
        twice = ours(x)
        with differentiated_once():
            once = ours(x)
    plain = theirs(x)
    theirs(x)
    assert "ConvolutionBackward" in nodes(twice)
    assert "ConvolutionBackward0" in nodes(once)
    assert not {"ConvolutionBackward", "BatchNormBackward", "MaxPoolBackward"} & nodes(once)
    assert torch.equal(ours[1].running_mean, before) == simulated
    for name, buffer in theirs.named_buffers():
        assert simulated or buffer.dtype == torch.int64 or (ours.get_buffer(name) - buffer).abs().max() < 1e-12
    for y in (twice, once):
        assert_close(y, plain)
        grads = torch.autograd.grad(y.square().sum(), list(ours.parameters()))
        wanted = torch.autograd.grad(plain.square().sum(), list(theirs.parameters()), retain_graph=True)
        for p, g, g_plain in zip(ours.parameters(), grads, wanted, strict=True):
            if p.dim() > 1 or p.shape[0] != 6:  # biases in front of BatchNorm have rounding errors alone
                torch.testing.assert_close(g, g_plain, rtol=1e-10, atol=1e-9)


def test_bfloat16_beside_float32() -> None:
    """BatchNorm's parameters stay float32; a convolution computes in the dtype of its weight."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d(2))
    network[0].to(torch.bfloat16)
    x = images().to(torch.bfloat16)
    with Twins(network).taken(simulated=False):
        twice = network(x)
        mean = network[1].running_mean.clone()
        network[1].reset_running_stats()
        with differentiated_once():
            once = network(x)
    assert twice.dtype == once.dtype == torch.bfloat16
    torch.testing.assert_close(once, twice, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(network[1].running_mean, mean, rtol=1e-3, atol=1e-4)
