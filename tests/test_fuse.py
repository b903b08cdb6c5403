"""Folding and fused operators: the same function, without norms, in evaluation only."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

import resblocks as rb
from resblocks import fuse as fuse_module
from resblocks.fuse import FusedConv, FusedResidual, fuse
from tests.blocks import count, image

NETS = {
    "resnet18": {},
    "resnet50": {"output_stride": 8},
    "resnext50_32x4d": {},
    "preact_resnet18": {},
    "densenet_bc_100_12": {},
    "wrn_16_4": {"dropout": 0.3},
    "resnet20": {"shortcut": "A"},
    "baseline_cnn": {"norm": nn.BatchNorm2d},
}


def trained(name, **options):
    """A net whose running statistics and affines are not those it starts with."""
    net = rb.create_model(name, num_classes=7, **options).eval()
    for layer in net.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0, 0.1)
    return net


def relative_error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("grad", [False, True], ids=["fused operators", "plain operators"])
def test_fused_net_is_the_same_function(name, grad):
    net = trained(name, **NETS[name])
    x = image(3, 32, batch=2).requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        assert relative_error(fuse(net)(x), net(x)) < 1e-5


@pytest.mark.parametrize("options", [
    {"norm": rb.group_norm}, {"norm": None}, {"norm": rb.FrozenBatchNorm}, {"conv": rb.weight_standardised},
    {"attention": rb.SE}, {"scale": rb.LayerScale}, {"scale": rb.ZeroInit}, {"merge": rb.gated}, {"drop_path": 0.2},
    {"activation": nn.SiLU}, {"downsample": rb.blur_downsample}, {"skip": False}, {"dims": 1}, {"dims": 3},
], ids=lambda options: "-".join(options))  # fmt: skip
def test_every_option_survives(options):
    net = rb.ResNet(rb.Bottleneck, (1, 2), (16, 32), stem="deep", stem_width=16, num_classes=3, **options).eval()
    x = image(3, 16, options.get("dims", 2), batch=2)
    with torch.no_grad():
        assert relative_error(fuse(net)(x), net(x)) < 1e-5


def test_all_norms_and_additions_of_a_resnet_are_folded():
    net = trained("resnet18")
    fast = fuse(net)
    assert count(fast, nn.BatchNorm2d) == count(fast, nn.ReLU) == count(fast, nn.Conv2d) == 0
    assert count(fast, FusedConv) == 20
    assert count(fast, FusedResidual) == 8
    assert count(net, nn.BatchNorm2d) == 20  # the net itself is as it was


def test_fused_net_cannot_train():
    fast = fuse(trained("resnet20"))
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    fast.eval()
    with pytest.raises(RuntimeError, match="a fused net cannot train"):
        fast.train()


def test_folding_comes_before_the_cast():
    net = trained("resnet20").double()
    x = image(3, 16, batch=2)
    exact = net(x.double())
    late = fuse(net, dtype=torch.bfloat16)(x.bfloat16()).double()
    early = net.bfloat16()(x.bfloat16()).double()
    assert relative_error(late, exact) < relative_error(early, exact)


def test_fused_net_exports_and_compiles():
    net = trained("resnet20")
    fast, x = fuse(net), image(3, 16, batch=2)
    with torch.no_grad():
        expected = net(x)
        exported = torch.export.export(fast, (x,)).module()
        torch.testing.assert_close(exported(x), expected, rtol=1e-4, atol=1e-5)
        compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)


def test_fused_net_survives_copies():
    fast, x = fuse(trained("resnet20")), image(3, 16, batch=2)
    with torch.no_grad():
        for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert torch.equal(other(x), fast(x))


def test_operators_that_are_missing_or_wrong_are_not_used(monkeypatch):
    net = trained("resnet20")
    monkeypatch.setattr(fuse_module, "has_onednn", lambda dtype: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_convolution_pointwise", None, raising=False)
    x = image(3, 16, batch=2)
    with torch.no_grad():
        assert relative_error(fuse(net)(x), net(x)) < 1e-5


def test_one_operator_runs_the_block_where_torch_has_it():
    if not fuse_module.has_onednn(torch.float32):
        pytest.skip("this torch has no oneDNN")
    fast, x = fuse(trained("resnet20")), image(3, 16, batch=1)
    with torch.profiler.profile() as profile, torch.no_grad():
        fast(x)
    names = {event.key for event in profile.key_averages()}
    assert any("_convolution_pointwise" in name for name in names)
    assert not names & {"aten::relu", "aten::batch_norm"}


def test_shapes_that_would_broadcast_are_refused():
    block = rb.BasicBlock(4, 4, shortcut=lambda i, o, s: nn.AdaptiveAvgPool2d(1)).eval()
    with pytest.raises(ValueError, match="same shape to be added"), torch.no_grad():
        fuse(block)(image(4))


def test_channels_last_is_the_layout_of_the_weights_unless_told():
    net = trained("resnet20")
    assert fuse(net).stages[0][0].last.weight.is_contiguous(memory_format=torch.channels_last)
    assert fuse(net, channels_last=False).stages[0][0].last.weight.is_contiguous()
    assert partial(fuse, dtype=torch.float64)(net).head.weight.dtype == torch.float64
