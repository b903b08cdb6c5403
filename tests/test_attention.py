"""Attention: against timm and its equations."""

from functools import partial

import pytest
import timm.layers
import torch
from torch import nn

import resblocks as rb
from tests.blocks import image


@pytest.mark.parametrize("channels", [8, 32, 64, 256, 2048])
def test_eca_has_the_kernel_of_timm(channels):
    theirs = timm.layers.EcaModule(channels)
    ours = rb.ECA(channels)
    assert ours.weight.shape == theirs.conv.weight.shape
    ours.weight.data.copy_(theirs.conv.weight)
    x = image(channels, 3)
    torch.testing.assert_close(ours(x), theirs(x))


def test_se_equals_timm():
    theirs = timm.layers.SEModule(64, rd_ratio=1 / 16, rd_divisor=1, bias=True)
    ours = rb.SE(64, reduction=16)
    hidden = theirs.fc1.out_channels
    ours.reduce, ours.expand = nn.Linear(64, hidden), nn.Linear(hidden, 64)
    for mine, other in ((ours.reduce, theirs.fc1), (ours.expand, theirs.fc2)):
        mine.weight.data.copy_(other.weight.flatten(1))
        mine.bias.data.copy_(other.bias)
    x = image(64, 3)
    torch.testing.assert_close(ours(x), theirs(x))


def test_hidden_layer_has_the_width_that_reduction_says():
    assert [rb.SE(channels).reduce.out_features for channels in (4, 64, 256)] == [4, 8, 16]
    assert rb.CBAM(256, reduction=4).reduce.out_features == 64


def test_cbam_equals_its_equations():
    cbam = rb.CBAM(16)
    x = image(16)

    def mlp(values):
        return cbam.expand(torch.relu(cbam.reduce(values)))

    channel = torch.sigmoid(mlp(x.mean((2, 3))) + mlp(x.amax((2, 3))))[..., None, None]
    y = x * channel
    spatial = torch.sigmoid(cbam.spatial(torch.stack([y.amax(1), y.mean(1)], 1)))
    torch.testing.assert_close(cbam(x), y * spatial)


@pytest.mark.parametrize("attention", [rb.SE, rb.ECA, partial(rb.CBAM, reduction=4)])
def test_attention_gates_between_0_and_1(attention):
    x = image(16).abs()
    y = attention(16)(x)
    assert (y >= 0).all()
    assert (y <= x).all()
