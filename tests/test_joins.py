"""Drop path, scales and merges: against their equations."""

from functools import partial

import pytest
import torch
from torch import nn

import resblocks as rb
from tests.blocks import image


class Affine(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x):
        return x * self.weight


@pytest.mark.parametrize("norm", [Affine, nn.Identity, rb.FrozenBatchNorm, None])
def test_zero_init_starts_as_the_shortcut_whatever_the_norm(norm):
    block = rb.BasicBlock(4, 4, norm=norm, scale=rb.ZeroInit).eval()
    assert torch.equal(block(x := torch.randn(2, 4, 4, 4)), x.relu())


@pytest.mark.parametrize(
    ("scale", "norm"), [(rb.ZeroInit, rb.instance_norm), (rb.Fixup, nn.BatchNorm2d), (rb.Fixup, rb.group_norm)]
)
def test_start_that_a_norm_undoes_is_refused(scale, norm):
    with pytest.raises(ValueError, match="starts the last convolution at zero, which needs no norm behind it"):
        rb.BasicBlock(8, 8, norm=norm, scale=scale)


def test_fixup_refuses_standardised_weights():
    with pytest.raises(ValueError, match="scale Fixup needs convolutions that keep the size of their weights"):
        rb.BasicBlock(8, 8, norm=rb.FrozenBatchNorm, scale=rb.Fixup, conv=rb.weight_standardised)


@pytest.mark.parametrize("layer", [rb.SkipInit, rb.ReZero, rb.Fixup, rb.LayerScale, rb.WeightedAdd])
def test_no_weight_is_a_scalar_which_fsdp_could_not_shard(layer):
    assert all(weight.dim() == 1 for weight in layer(4).parameters())


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    x = torch.ones(20000, 3, 2)
    y = rb.DropPath(0.25)(x)
    kept = y[:, 0, 0] != 0
    assert torch.equal(y[kept], torch.full_like(y[kept], 1 / 0.75))
    assert not y[~kept].any()
    assert y.mean() == pytest.approx(1, abs=0.02)
    assert torch.equal(rb.DropPath(0.25).eval()(x), x)


def test_drop_path_drops_by_sample_under_vmap():
    drop = rb.DropPath(0.5)
    y = torch.func.vmap(drop, randomness="different")(torch.ones(4, 64, 3, 2))
    each = y.flatten(2)
    assert (each == each[..., :1]).all()
    assert 0 < (each[..., 0] == 0).sum() < 4 * 64


@pytest.mark.parametrize("p", [-0.1, 1, 1.5])
def test_drop_path_out_of_range_raises(p):
    with pytest.raises(ValueError, match=r"^p must be at least 0 and below 1, got"):
        rb.DropPath(p)


@pytest.mark.parametrize(
    ("scale", "factor"), [(rb.SkipInit, 0), (rb.ReZero, 0), (partial(rb.LayerScale, initial=0.1), 0.1)]
)
def test_scale_starts_at_its_factor(scale, factor):
    x = image(4)
    torch.testing.assert_close(scale(4)(x), factor * x)


def test_weighted_and_gated_merges_equal_their_equations():
    shortcut, branch = image(4), image(4)
    weighted = rb.WeightedAdd(4)
    torch.testing.assert_close(weighted(shortcut, branch), shortcut + branch)
    nn.init.constant_(weighted.shortcut_weight, 2)
    nn.init.constant_(weighted.branch_weight, 3)
    torch.testing.assert_close(weighted(shortcut, branch), 2 * shortcut + 3 * branch)
    gated = rb.Gated(4)
    gate = torch.sigmoid(gated.gate(shortcut) - 2)
    torch.testing.assert_close(gated(shortcut, branch), gate * branch + (1 - gate) * shortcut)


@pytest.mark.parametrize("merge", [rb.WeightedAdd(4), rb.Gated(4)])
def test_merges_refuse_shapes_that_would_broadcast(merge):
    with pytest.raises(ValueError, match="same shape to be added"):
        merge(image(4, 5), image(4, 1))


def test_layer_scale_takes_channels_in_any_dimension():
    weights, x = torch.randn(4), torch.randn(2, 3, 4)
    scale = rb.LayerScale(4, dim=-1)
    with torch.no_grad():
        scale.weight.copy_(weights)
    torch.testing.assert_close(rb.Residual(nn.Identity(), scale=scale)(x), x + x * weights)


@pytest.mark.parametrize("scale", [rb.SkipInit, rb.ReZero])
def test_one_factor_needs_no_number_of_channels(scale):
    x = torch.randn(2, 3)
    torch.testing.assert_close(rb.Residual(nn.Linear(3, 3), scale=scale())(x), x)
