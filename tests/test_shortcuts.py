"""Shortcuts A, B, C, D: what they compute, and when they are refused."""

from functools import partial

import pytest
import torch
from torch import nn

from resblocks import BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck, average_downsample, blur_downsample
from resblocks.options import with_layers
from resblocks.shortcuts import ZeroPad
from tests.blocks import image


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_zero_pad_strides_and_pads_behind(dims):
    x = image(4, 5, dims)
    y = ZeroPad(4, 7, 2)(x)
    assert y.shape == (3, 7, *[3] * dims)
    kept = x[(slice(None), slice(None), *[slice(None, None, 2)] * dims)]
    assert torch.equal(y[:, :4], kept)
    assert torch.equal(y[:, 4:], torch.zeros_like(y[:, 4:]))


def test_zero_pad_carries_the_gradient():
    block = BasicBlock(4, 8, 2, shortcut="A")
    nn.init.zeros_(block.branch.norm2.weight)  # the branch is silent, so the gradient comes through the shortcut alone
    x = image(4, 4).requires_grad_()
    block(x.abs()).sum().backward()
    assert (x.grad[..., ::2, ::2] != 0).all()
    assert (x.grad[..., 1::2, :] == 0).all()


def test_zero_pad_refuses_fewer_channels():
    with pytest.raises(ValueError, match=r"out_channels must not be below in_channels with shortcut A.*in_channels=8"):
        ZeroPad(8, 4)


@pytest.mark.parametrize(
    ("kind", "changed", "unchanged"),
    [
        ("A", ["ZeroPad"], ["Identity"]),
        ("B", ["Conv2d", "BatchNorm2d"], ["Identity"]),
        ("C", ["Conv2d", "BatchNorm2d"], ["Conv2d", "BatchNorm2d"]),
        ("D", ["AvgPool2d", "Conv2d", "BatchNorm2d"], ["Identity"]),
    ],
)
def test_shortcut_kind_is_built_of_its_layers(kind, changed, unchanged):
    def leaves(block):
        return [type(layer).__name__ for layer in block.shortcut.modules() if not list(layer.children())]

    assert leaves(BasicBlock(8, 16, 2, shortcut=kind)) == changed
    assert leaves(BasicBlock(8, 8, shortcut=kind)) == unchanged


@pytest.mark.parametrize("downsample", [average_downsample, blur_downsample])
def test_zero_pad_takes_the_pool_of_the_block(downsample):
    block, x = BasicBlock(4, 8, 2, shortcut="A", downsample=downsample), image(4, 6)
    assert torch.equal(block.shortcut(x)[:, :4], downsample[1](4, 2)(x))


@pytest.mark.parametrize("block", [PreActBasicBlock, PreActBottleneck])
@pytest.mark.parametrize("skip", [True, False])
def test_every_projection_of_a_preactivated_block_reads_a_norm(block, skip):
    made = block(8, 8, shortcut="C", skip=skip)
    assert [type(layer) for layer in made.preact] == [nn.BatchNorm2d, nn.ReLU]
    assert not hasattr(made.branch, "norm1")


@pytest.mark.parametrize("kind", ["A", "B", "C", "D"])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 5, 6])
def test_shortcut_and_branch_agree_on_every_size(kind, dims, stride, size):
    block = BasicBlock(4, 8, stride, shortcut=kind, dims=dims)
    assert block(image(4, size, dims)).shape == (3, 8, *[-(-size // stride)] * dims)


def test_pooled_projection_averages_the_positions_that_exist():
    block = BasicBlock(1, 2, 2, shortcut="D", norm=None)
    x = torch.arange(9.0).reshape(1, 1, 3, 3)
    pooled = block.shortcut.pool(x)
    assert torch.equal(pooled, torch.tensor([[[[2.0, 3.5], [6.5, 8.0]]]]))


def test_shortcut_takes_a_callable():
    class Half(nn.Module):
        def __init__(self, in_channels, out_channels, stride):
            super().__init__()
            self.conv = nn.Conv2d(in_channels, out_channels, 1, stride)

        def forward(self, x):
            return self.conv(x) / 2

    assert isinstance(Bottleneck(8, 16, 2, shortcut=Half).shortcut, Half)


@pytest.mark.parametrize("shape", [(8, 16, 1), (8, 8, 2)])
@pytest.mark.parametrize("shortcut", ["identity", lambda i, o, s: nn.Identity()])
def test_identity_where_the_shape_changes_raises(shape, shortcut):
    with pytest.raises(ValueError, match=r"shortcut cannot be an identity where the shape changes, got in_channels=8"):
        BasicBlock(*shape, shortcut=shortcut)


@pytest.mark.parametrize("skip", [True, False])
def test_unknown_shortcut_raises(skip):
    with pytest.raises(ValueError, match="shortcut must be one of A, B, C, D, identity or a callable, got 'E'"):
        BasicBlock(8, 8, shortcut="E", skip=skip)


@with_layers
def scaled(make, in_channels, out_channels, stride, kernel_size):
    return make.conv(in_channels, out_channels, kernel_size, stride)


def test_shortcut_made_of_layers_may_be_a_partial():
    block = BasicBlock(8, 16, 2, shortcut=partial(scaled, kernel_size=3), dims=1)
    assert type(block.shortcut) is nn.Conv1d
    assert block.shortcut.kernel_size == (3,)
