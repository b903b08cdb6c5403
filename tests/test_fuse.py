"""Folding and fused operators: the same function, without norms, in evaluation only."""

import copy
import json
import pickle
import runpy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import resblocks as rb
from resblocks import fused_operators, winograd
from resblocks.fuse import FusedConv, FusedDenseBlock, FusedResidual, fuse
from resblocks.fused import Affine, AffineReLU, Clamp
from tests.blocks import count, image, trains_every_parameter

NETS = {
    "resnet18": {},
    "resnet50": {"output_stride": 8},
    "resnext50_32x4d": {},
    "preact_resnet18": {},
    "densenet_bc_100_12": {},
    "densenet_40_12": {},
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


def scattered(net):
    """The net with some of its norms' scales below zero, and some at zero."""
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.weight[::3] *= -1
                layer.weight[:2] = 0
    return net


def relative_error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("grad", [False, True], ids=["fused operators", "plain operators"])
def test_fused_net_is_the_same_function(name, grad):
    net = scattered(trained(name, **NETS[name]))
    x = image(3, 32, batch=2).requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        assert relative_error(fuse(net)(x), net(x)) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)])
@pytest.mark.parametrize("name", NETS)
def test_fused_net_is_the_same_function_on_a_gpu(name, dtype, tolerance, layout):
    net = trained(name, **NETS[name]).cuda()
    x = image(3, 32, batch=2).cuda().to(memory_format=layout)
    fast = fuse(net, dtype=dtype)
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert relative_error(fast(x.to(dtype)).float(), net(x)) < tolerance


@pytest.mark.gpu
def test_one_operator_runs_the_block_on_a_gpu():
    assert fused_operators.has_cudnn(torch.float16)


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


@pytest.mark.parametrize("change", [nn.SyncBatchNorm.convert_sync_batchnorm, rb.freeze_norm])
@pytest.mark.parametrize("options", [{}, {"conv": rb.weight_standardised}])
def test_norms_and_convolutions_of_every_kind_are_folded(change, options):
    fast = fuse(change(trained("resnet20", **options)))
    assert (count(fast, FusedConv), count(fast, FusedResidual)) == (19, 9)


def test_fused_net_stays_what_it_is_in_a_net_that_trains():
    net, x = trained("densenet_40_12", dropout=0.2), image(3, 16, batch=2)
    fast = fuse(net)
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    nn.Sequential(fast, nn.Linear(7, 2)).train()
    assert not any(layer.training for layer in fast.modules() if isinstance(layer, (FusedConv, Clamp, Affine)))
    with torch.no_grad():
        assert relative_error(fast(x), net(x)) < 1e-5


def test_fused_net_computes_under_autocast_what_autocast_says():
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval(), image(3, 8)
    fast = fuse(net, input_size=(3, 8, 8))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert fast(x).dtype == net(x).dtype == torch.bfloat16


@pytest.mark.parametrize("dropout", [nn.Dropout, nn.Dropout2d, nn.AlphaDropout])
def test_dropouts_are_gone_and_do_not_keep_a_norm_from_folding(dropout):
    fast = fuse(nn.Sequential(nn.Conv2d(3, 8, 3), dropout(0.5), nn.BatchNorm2d(8)))
    assert [type(layer) for layer in fast] == [FusedConv]


class Doubled(rb.WSConv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_convolution_with_a_forward_of_its_own_is_not_fused():
    assert count(fuse(nn.Sequential(Doubled(3, 8, 3), nn.BatchNorm2d(8))), Doubled) == 1


def test_slices_of_fused_blocks_are_parts_of_them():
    net, x = trained("densenet_40_12"), image(16, 8)
    block, fast = net.stages[0].block, fuse(net).stages[0].block
    with torch.no_grad():
        assert relative_error(fast[:3](x), block[:3](x)) < 1e-5


def test_hook_on_a_convolution_of_two_blocks_fires_for_its_own():
    branch, seen = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)), []
    first, second = fuse(nn.Sequential(rb.Residual(branch, act=nn.ReLU()), rb.Residual(branch, act=nn.ReLU())))
    assert first.last.weight is second.last.weight
    first.last.register_forward_hook(lambda *_: seen.append(1))
    second(image(4, 4))
    assert not seen


def test_fused_under_autocast_is_what_it_is_without():
    net = trained("densenet_40_12")
    with torch.autocast("cpu", torch.bfloat16):
        under = fuse(net)
    torch.testing.assert_close(under.state_dict(), fuse(net).state_dict(), rtol=0, atol=0)


def test_branches_that_start_at_zero_are_fused():
    assert count(fuse(trained("resnet20", scale=rb.ZeroInit)), FusedResidual) == 9


def test_folding_comes_before_the_cast():
    net = trained("resnet20").double()
    x = image(3, 16, batch=2)
    exact = net(x.double())
    late = fuse(net, dtype=torch.bfloat16)(x.bfloat16()).double()
    early = net.bfloat16()(x.bfloat16()).double()
    assert relative_error(late, exact) < relative_error(early, exact)


def test_fused_net_of_half_precision_keeps_its_dtype():
    fast = fuse(trained("resnet20").bfloat16())
    assert {parameter.dtype for parameter in fast.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("build", [
    lambda act: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), act, nn.Conv2d(4, 4, 1), act),
    lambda act: nn.Sequential(*[rb.BasicBlock(4, 4)] * 2),
    lambda act: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), act),
    lambda act: nn.Sequential(nn.Conv2d(4, 4, 3, padding="same"), nn.BatchNorm2d(4), act),
    lambda act: nn.Sequential(nn.BatchNorm2d(4), act, nn.AvgPool2d(3, 2, padding=1), nn.Conv2d(4, 4, 1)),
    lambda act: nn.Sequential(nn.BatchNorm2d(4), act, nn.Conv2d(4, 4, 3, padding=1)),
], ids=["shared ReLU", "shared block", "circular", "same", "padded pool", "padded convolution"])  # fmt: skip
def test_layers_that_invite_mistakes_give_the_same(build):
    net = build(nn.ReLU()).eval()
    x = image(4, 8, batch=2)
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.bias.fill_(0.5)
        assert relative_error(fuse(net)(x), net(x)) < 1e-5


class NormAndReLU(nn.BatchNorm2d):
    """A norm of another library that is more than a norm."""

    def forward(self, x):
        return super().forward(x).relu()


class AlwaysDropout(nn.Dropout):
    """A dropout of a user that does something in evaluation, too."""

    def forward(self, x):
        return x * 2


class Tripled(nn.Identity):
    """Not what its parent is."""

    def forward(self, x):
        return x * 3


class HalfBlock(rb.BasicBlock):
    """A block of a user with a forward of its own."""

    def forward(self, x):
        return super().forward(x) / 2


class HalfRun(rb.BasicBlock):
    """A block of a user that runs in a way of its own."""

    def run(self, x):
        return super().run(x) / 2


class HalfLayer(rb.DenseLayer):
    """A dense layer of a user with a forward of its own."""

    def forward(self, x):
        return super().forward(x) / 2


def dense_block_of(layer):
    block = rb.DenseBlock(4, 8, growth_rate=4)
    block[0] = layer(4, 8)
    return block


def shared_branch(*, alone):
    branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
    first = branch if alone else rb.Residual(branch, act=nn.ReLU())
    return nn.Sequential(nn.Conv2d(4, 4, 1), first, rb.Residual(branch, act=nn.ReLU()))


@pytest.mark.parametrize("build", [
    lambda: nn.Sequential(nn.Conv2d(4, 4, 1), NormAndReLU(4), nn.Conv2d(4, 4, 1)),
    lambda: nn.Sequential(nn.Conv2d(4, 4, 1), AlwaysDropout()),
    lambda: nn.Sequential(nn.Conv2d(4, 4, 1), Tripled(), nn.ReLU()),
    lambda: HalfBlock(4, 4),
    lambda: HalfRun(4, 4),
    lambda: rb.Residual(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), act=nn.ReLU()),
    lambda: dense_block_of(HalfLayer),
    lambda: rb.Residual(nn.Sequential(nn.Conv2d(4, 4, 1)), drop_path=AlwaysDropout()),
    lambda: shared_branch(alone=True),
    lambda: shared_branch(alone=False),
])  # fmt: skip
def test_modules_of_other_libraries_stay_what_they_are(build):
    net, x = build().eval(), image(4, 8, batch=2)
    with torch.no_grad():
        assert relative_error(fuse(net)(x), net(x)) < 1e-5


def doubled(module, args, y):
    return 2 * y


@pytest.mark.parametrize("name", [
    *("stem.conv", "stem.norm", "stem.act", "stages.0.0", "stages.0.0.branch.conv2", "stages.0.0.branch.norm2"),
    *("stages.0.0.branch", "stages.0.0.merge", "stages.0.0.act", "stages.0.0.scale"),
])  # fmt: skip
def test_hooks_go_on_to_be_called(name):
    net, x = trained("resnet20"), image(3, 16, batch=2)
    net.get_submodule(name).register_forward_hook(doubled)
    with torch.no_grad():
        assert relative_error(fuse(net)(x), net(x)) < 1e-5


@pytest.mark.parametrize("name", ["stages.0.block.0", "stages.0.block.0.branch.norm1", "stages.0.block.0.merge"])
def test_hooks_of_dense_layers_go_on_to_be_called(name):
    net, x = trained("densenet_40_12"), image(3, 16, batch=2)
    name = name.replace("block.0", "block." + next(iter(net.stages[0].block._modules)))
    net.get_submodule(name).register_forward_hook(doubled)
    with torch.no_grad():
        assert relative_error(fuse(net)(x), net(x)) < 1e-5


def test_scale_too_small_to_divide_by_is_none():
    net = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)).eval()
    x = image(4, 8, batch=2)
    with torch.no_grad():
        net[0].weight[:] = torch.tensor([1e-40, -1e-40, 1e-40, 1.0])
        net[0].bias[:] = torch.tensor([-0.1, 0.1, 0.1, 0.1])
        assert relative_error(fuse(net)(x), net(x)) < 1e-5


@pytest.mark.parametrize("name", ["resnet20", "densenet_bc_100_12"])
@pytest.mark.parametrize("options", [{}, {"input_size": (3, 16, 16), "batch_size": 2}], ids=["", "prepacked"])
def test_fused_net_exports_compiles_and_traces(name, options):
    net = trained(name)
    fast, x = fuse(net, **options), image(3, 16, batch=2)
    with torch.no_grad():
        expected = net(x)
        exported = torch.export.export(fast, (x,)).module()
        torch.testing.assert_close(exported(x), expected, rtol=1e-4, atol=1e-5)
        compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
        assert relative_error(torch.vmap(fast)(x[:, None])[:, 0], expected) < 1e-5
    if name == "resnet20":
        assert relative_error(torch.fx.symbolic_trace(fast)(x), expected) < 1e-5


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU])
def test_norms_that_no_convolution_takes_in_are_traced(act):
    net, x = nn.Sequential(nn.BatchNorm2d(3), act(), nn.Conv2d(3, 4, 3, padding=1)).eval(), image(3, 8, batch=2)
    with torch.no_grad():
        fast = fuse(net)
        assert isinstance(fast[0], Affine)
        assert relative_error(torch.fx.symbolic_trace(fast)(x), net(x)) < 1e-5
        assert relative_error(torch.export.export(fast, (x,)).module()(x), net(x)) < 1e-5


def test_fused_net_survives_copies():
    fast, x = fuse(trained("resnet20")), image(3, 16, batch=2)
    with torch.no_grad():
        for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert torch.equal(other(x), fast(x))


def test_operators_that_are_missing_or_wrong_are_not_used(monkeypatch):
    net = trained("resnet20")
    for name, test in {
        "_convolution_pointwise": fused_operators.has_onednn,
        "_convolution_pointwise_": fused_operators.can_write_over,
        "_reorder_convolution_weight": fused_operators.has_layouts,
    }.items():
        test.cache_clear()
        monkeypatch.setattr(torch.ops.mkldnn, name, None, raising=False)
    x = image(3, 16, batch=2)
    with torch.no_grad():
        assert relative_error(fuse(net, input_size=(3, 16, 16), batch_size=2)(x), net(x)) < 1e-5
    for test in (fused_operators.has_onednn, fused_operators.can_write_over, fused_operators.has_layouts):
        test.cache_clear()


def onednn_computes_in(dtype):
    """What torch says of it, without our own trials."""
    return torch.backends.mkldnn.is_available() and (
        dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"input_size": (3, 16, 16)}], ids=["fused", "prepacked"])
def test_one_operator_runs_the_block_where_torch_has_it(dtype, options):
    if not onednn_computes_in(dtype):
        pytest.skip("this torch has no oneDNN for it")
    fast = fuse(trained("resnet20"), dtype=dtype, **options)
    x = image(3, 16, batch=1).to(dtype).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        fast(x)  # tries the operators, against the plain ones
        with torch.profiler.profile() as profile:
            fast(x)
    names = {event.key for event in profile.key_averages()}
    assert any("_convolution_pointwise" in name for name in names)
    assert not names & {"aten::relu", "aten::relu_", "aten::clamp_min_", "aten::batch_norm", "aten::add"}
    assert all(weight is not None and weight.is_mkldnn for weight in layouts(fast))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("lay_out", [
    lambda x: x,
    lambda x: x.contiguous(memory_format=torch.channels_last),
    lambda x: x[:, :, :1, :1],
    lambda x: x[:1].contiguous(memory_format=torch.channels_last).expand(2, -1, -1, -1),
    lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, :8],
    lambda x: x[:, :, ::2],
], ids=["contiguous", "channels_last", "one position", "expanded", "slice", "every second line"])  # fmt: skip
def test_fused_operator_takes_every_layout(dtype, kernel, lay_out):
    x, other = (lay_out(torch.randn(2, 8, 6, 6).to(dtype)) for _ in range(2))
    weight = torch.randn(8, 8, kernel, kernel).to(dtype)
    geometry = fused_operators.Geometry([1, 1], [kernel // 2] * 2, [1, 1], 1)
    given = (x, weight, torch.randn(8).to(dtype), other, True, geometry)
    truth = fused_operators.plain_conv_add_relu(*[part.double() if torch.is_tensor(part) else part for part in given])
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    with torch.no_grad():
        assert relative_error(fused_operators.conv_add_relu(*given).double(), truth) < tolerance


@pytest.fixture
def written(monkeypatch):
    """The sums that were written over a shortcut, by their shapes."""
    shapes, write = [], fused_operators._onednn_over

    def noted(x, weight, bias, other, *rest):
        shapes.append(tuple(other.shape))
        return write(x, weight, bias, other, *rest)

    if not fused_operators.can_write_over(torch.float32):
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(fused_operators, "_onednn_over", noted)
    return shapes


def large_stage():
    """Three fused blocks with sums of 256 KiB, the last with a projection."""
    blocks = [rb.BasicBlock(64, 64), rb.BasicBlock(64, 64), rb.BasicBlock(64, 64, shortcut="C")]
    return fuse(nn.Sequential(*blocks).eval()), image(64, 32, batch=1).contiguous(memory_format=torch.channels_last)


def test_large_sums_are_written_over_shortcuts(written):
    stage, x = large_stage()
    with torch.no_grad():
        before = x.clone()
        y = stage(x)
        assert written == [(1, 64, 32, 32)] * 2
        assert torch.equal(x, before)
        for block in stage:
            x = block(x)
    assert torch.equal(x, y)
    assert len(written) == 3  # a block alone writes over its projection, never over its input


@pytest.mark.parametrize("place", ["1", "1.branch.conv1", "1.last", "0.last", "0", "2.shortcut"])
def test_what_hooks_see_of_a_stage_is_not_written_over(written, place):
    stage, x = large_stage()
    kept = []

    def keep(module, args, y):
        kept.extend((seen, seen.clone()) for seen in (*args[:2], y))

    stage.get_submodule(place).register_forward_hook(keep)
    with torch.no_grad():
        stage(x)
    assert kept
    assert all(torch.equal(seen, copied) for seen, copied in kept)


class Probe(nn.Module):
    """A part of a user that keeps what it reads."""

    def forward(self, x):
        self.seen = x
        self.copied = x.clone()
        return x


def test_input_that_a_stranger_keeps_is_not_written_over(written):
    blocks = [
        rb.Residual(nn.Sequential(Probe(), nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64)), act=nn.ReLU())
        for _ in range(3)
    ]
    stage = fuse(nn.Sequential(*blocks).eval())
    with torch.no_grad():
        stage(image(64, 32, batch=1).contiguous(memory_format=torch.channels_last))
    probes = [part for part in stage.modules() if isinstance(part, Probe)]
    assert len(probes) == 3
    assert all(torch.equal(probe.seen, probe.copied) for probe in probes)


def test_maps_of_a_pyramid_are_not_written_over(written):
    net = trained("resnet50")
    x = image(3, 128, batch=1).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        maps, wanted = fuse(net).features(x), net.features(x)
    assert written
    for ours, theirs in zip(maps, wanted, strict=True):
        assert relative_error(ours, theirs) < 1e-5


def test_branch_that_reads_the_shortcut_itself_is_not_written_over_it(written):
    blocks = [rb.Residual(rb.layers.named(conv=nn.Conv2d(64, 64, 1), norm=nn.BatchNorm2d(64))) for _ in range(3)]
    net = nn.Sequential(*blocks).eval()
    x = image(64, 32, batch=1).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert relative_error(fuse(net)(x), net(x)) < 1e-5
    assert not written


def test_shapes_that_would_broadcast_are_refused():
    block = rb.BasicBlock(4, 4, shortcut=lambda i, o, s: nn.AdaptiveAvgPool2d(1)).eval()
    with pytest.raises(ValueError, match="same shape to be added"), torch.no_grad():
        fuse(block)(image(4))


def test_channels_last_is_the_layout_of_the_weights_unless_told():
    net = trained("resnet20")
    assert fuse(net).stages[0][0].last.weight.is_contiguous(memory_format=torch.channels_last)
    assert fuse(net, channels_last=False).stages[0][0].last.weight.is_contiguous()
    assert partial(fuse, dtype=torch.float64)(net).head.weight.dtype == torch.float64


def prepacked(net, batch=2):
    return fuse(net, input_size=(3, 16, 16), batch_size=batch)


def layouts(net):
    return [conv.packed.weight for conv in net.modules() if isinstance(conv, FusedConv) and conv.packed is not None]


@pytest.mark.parametrize("name", ["resnet20", "preact_resnet18", "densenet_bc_100_12"])
@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (1, 3, 16, 16), (2, 3, 33, 24)])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_prepacked_net_is_right_for_every_input(name, shape, memory_format):
    net = trained(name)
    x = torch.randn(shape).contiguous(memory_format=memory_format)
    with torch.no_grad():
        assert relative_error(prepacked(net)(x), net(x)) < 1e-5


@pytest.mark.skipif(not fused_operators.has_layouts(torch.float32), reason="this torch has no layouts of oneDNN")
@pytest.mark.parametrize("change", [
    copy.deepcopy,
    lambda net: pickle.loads(pickle.dumps(net)),
    lambda net: net.to(memory_format=torch.contiguous_format),
    lambda net: net.double().float(),
    lambda net: fuse(net),
])  # fmt: skip
def test_layouts_follow_the_weights(change):
    fast, x = prepacked(trained("resnet20")), image(3, 16, batch=2)
    with torch.no_grad():
        other = change(copy.deepcopy(fast))
        assert len(layouts(other)) == count(other, FusedConv) == 19
        assert all(weight is not None and weight.is_mkldnn for weight in layouts(other))
        assert relative_error(other(x), fast(x)) < 1e-6


@pytest.mark.parametrize("change", [
    lambda conv, weight: conv.weight.copy_(weight),
    lambda conv, weight: setattr(conv, "weight", nn.Parameter(weight)),
])  # fmt: skip
def test_layout_of_another_weight_is_not_used(change):
    conv, x = nn.Conv2d(64, 64, 3, padding=1, bias=False), image(64, 16, batch=2)
    fast = fuse(nn.Sequential(conv), input_size=(64, 16, 16), batch_size=2)
    with torch.no_grad():
        fast(x)
        weight = torch.randn_like(conv.weight)
        change(fast[0], weight)
        assert relative_error(fast(x), nn.functional.conv2d(x, weight, padding=1)) < 1e-5


def test_weights_of_a_functional_call_are_used():
    conv, x = nn.Conv2d(64, 64, 3, padding=1, bias=False), image(64, 16, batch=2)
    fast, weight = fuse(nn.Sequential(conv), input_size=(64, 16, 16), batch_size=2), torch.randn_like(conv.weight)
    with torch.no_grad():
        y = torch.func.functional_call(fast, {"0.weight": weight}, x)
        assert relative_error(y, nn.functional.conv2d(x, weight, padding=1)) < 1e-5


@pytest.mark.parametrize("name", ["resnet20", "densenet"])
def test_thawed_weights_get_their_gradients(name):
    net = rb.DenseNet(8, (2, 2), stem="cifar") if name == "densenet" else rb.create_model(name)
    trains_every_parameter(fuse(net.eval()).requires_grad_(), image(3, 32))


class Detached(nn.Module):
    def forward(self, x):
        return x.detach()


def test_gradient_of_a_shortcut_passes_a_branch_that_gets_none():
    block = rb.Residual(nn.Sequential(Detached(), nn.Conv2d(4, 4, 1)), rb.LayerScale(4)).eval()
    fused, x = fuse(block), torch.randn(1, 4, 5, 5, requires_grad=True)
    fused.shortcut.requires_grad_()
    fused(x).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 1e-5))
    torch.testing.assert_close(fused.shortcut.weight.grad, x.sum((0, 2, 3)))


def test_defaults_of_torch_do_not_matter():
    net, x = trained("resnet18", stem="cifar"), image(3, 16, batch=2)
    fused_operators.winograd_is_faster.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        fast = fuse(net, input_size=(3, 16, 16), batch_size=2)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        assert relative_error(fast(x), net(x)) < 1e-5


def test_one_sample_without_a_batch_and_nets_of_several_dims_work():
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()).eval()
    mixed = nn.ModuleList([net, nn.Sequential(nn.Conv3d(4, 4, 3), nn.ReLU())]).eval()
    x = image(4, 8, batch=1)[0]
    with torch.no_grad():
        assert relative_error(fuse(net)(x), net(x)) < 1e-5
        assert (
            relative_error(
                fuse(mixed)[1](x[None, :, None].expand(1, 4, 3, 8, 8)), mixed[1](x[None, :, None].expand(1, 4, 3, 8, 8))
            )
            < 1e-5
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_prepacked_net_is_right_in_every_dtype(dtype):
    net, x = trained("resnet20"), image(3, 16, batch=2)
    fast = fuse(net, dtype=dtype, input_size=(3, 16, 16), batch_size=2)
    with torch.inference_mode():
        assert relative_error(fast(x.to(dtype)).float(), net(x)) < (0.05 if dtype == torch.bfloat16 else 1e-5)


def test_net_without_convolutions_has_nothing_to_prepack():
    x = torch.randn(2, 3)
    assert torch.equal(fuse(nn.ReLU(), input_size=(3,))(x), x.relu())


def swap(weight, other):
    torch.utils.swap_tensors(weight, other)


def replace_data(weight, other):
    weight.data = other.data


def write(weight, other):
    with torch.no_grad():
        weight.copy_(other)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", [swap, replace_data, write])
def test_weights_changed_behind_a_layout_are_used(mode, change):
    x = image(3, 64, batch=4)
    with mode():
        fast = fuse(trained("resnet18"), input_size=(3, 64, 64), batch_size=4)
    other = fuse(trained("resnet18"))
    with torch.no_grad():
        wanted = other(x)
    for weight, new in zip(fast.parameters(), other.parameters(), strict=True):
        change(weight, new)
    with torch.no_grad():
        assert relative_error(fast(x), wanted) < 1e-4


def test_weights_are_loaded_into_a_net_fused_in_inference_mode():
    with torch.inference_mode():
        fast = fuse(trained("resnet20"))
    fast.load_state_dict(fuse(trained("resnet20")).state_dict())


def test_net_fused_in_inference_mode_is_right():
    net, x = trained("resnet20"), image(3, 16, batch=2)
    with torch.inference_mode():
        fast, expected = prepacked(net), net(x)
    with torch.no_grad():
        assert relative_error(fast(x), expected) < 1e-5


def test_state_dict_knows_no_layouts():
    net, x = trained("resnet20"), image(3, 16, batch=2)
    plain, fast = fuse(net), prepacked(trained("resnet20"))
    assert list(plain.state_dict()) == list(fast.state_dict())
    fast.load_state_dict(plain.state_dict())
    with torch.no_grad():
        assert relative_error(fast(x), net(x)) < 1e-5


def test_layouts_do_not_leave_the_cpu():
    fast = prepacked(trained("resnet20")).to("meta")
    assert not any(weight is not None for weight in layouts(fast))
    assert fast(torch.empty(2, 3, 16, 16, device="meta")).shape == (2, 7)


@pytest.mark.parametrize(("sizes", "message"), [
    ({"input_size": (16, 16)}, r"input_size must be one sample that the net takes, .* batch dimension, got \(16, 16\)"),
    ({"input_size": (4, 16, 16)}, r"input_size must be one sample that the net takes, .* got \(4, 16, 16\)"),
    ({"input_size": ()}, r"input_size must be positive integers, one sample without the batch, got \(\)"),
    ({"input_size": 224}, "input_size must be positive integers, one sample without the batch, got 224"),
    ({"input_size": (3, 8.0, 8)}, r"input_size must be positive integers, .* got \(3, 8.0, 8\)"),
    ({"input_size": (3, 0, 8)}, r"input_size must be positive integers, .* got \(3, 0, 8\)"),
    ({"input_size": (3, 8, 8), "batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
    ({"batch_size": 8}, "batch_size must be 1 without input_size, got 8"),
])  # fmt: skip
def test_sizes_that_cannot_be_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        fuse(rb.BasicBlock(3, 3), **sizes)


def test_dense_blocks_write_into_one_buffer():
    fast, x = fuse(trained("densenet_bc_100_12")), image(3, 16, batch=2)
    assert count(fast, FusedDenseBlock) == 3
    assert count(fast, Clamp) == 48 + 2  # before each 1x1 convolution, of layers and transitions
    assert (count(fast, AffineReLU), count(fast, nn.BatchNorm2d)) == (1, 0)  # the last, before the pool
    with torch.profiler.profile() as profile, torch.no_grad():
        fast(x)
    assert "aten::cat" not in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("block", [rb.PreActBasicBlock, rb.WideBlock])
def test_no_batch_norm_is_left_that_a_quantiser_could_fold_wrongly(block, dims):
    net = scattered(rb.ResNet(block, (1, 1), (8, 16), stem="cifar", stem_width=8, num_classes=3, dims=dims).eval())
    fast, x = fuse(net), image(3, 8, dims, batch=2)
    assert not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in fast.modules())
    assert count(fast, AffineReLU) > 0
    with torch.no_grad():
        assert relative_error(fast(x), net(x)) < 1e-5
        assert relative_error(torch.export.export(fast, (x,)).module()(x), net(x)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [4, 96])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [slice(0, 16), slice(4, 12)], ids=["whole", "slice"])
def test_norm_and_relu_are_one_operator_on_large_maps_in_bfloat16(dtype, size, last, channels):
    norm = scattered(nn.BatchNorm2d(channels.stop - channels.start)).eval()
    fast = fuse(nn.Sequential(norm, nn.ReLU()), dtype=dtype)
    x = torch.randn(1, 16, size, size, dtype=dtype)
    x = (x.contiguous(memory_format=torch.channels_last) if last else x)[:, channels]
    with torch.no_grad():
        fast(x)  # tries the operators
        with torch.profiler.profile() as profile:
            y = fast(x)
        assert relative_error(y.double(), norm(x.float()).relu().double()) < (1e-6 if dtype == torch.float32 else 0.02)
    names = {event.key for event in profile.key_averages()}
    one = last and size == 96 and channels.start == 0 and dtype == torch.bfloat16 and onednn_computes_in(dtype)
    assert ("mkldnn::_convolution_pointwise" in names) is one
    assert ("aten::relu_" in names) is not one


def test_norm_whose_digits_would_cancel_is_not_taken_apart():
    block = rb.DenseBlock(8, 16, growth_rate=4).eval()
    first = block[0].branch.norm1
    first.running_mean.fill_(1e4)
    x = 1e4 + image(8, 8)
    with torch.no_grad():
        fast = fuse(block)
        assert relative_error(fast(x)[:, 8:], block(x)[:, 8:]) < 1e-5
    assert count(fast, Clamp) == 1
    assert count(fuse(block, dtype=torch.bfloat16), Clamp) == 0


@pytest.mark.parametrize("size", [(1, 1), (4, 8), (7, 7), (9, 14), (21, 20)])  # the last one sample by sample
@pytest.mark.parametrize("bias", [True, False])
def test_winograds_algorithm_is_a_convolution(size, bias):
    conv, x = nn.Conv2d(64, 48, 3, padding=1, bias=bias), torch.randn(3, 64, *size).relu()
    with torch.no_grad():
        y = winograd.convolve(x, winograd.transform_weight(conv.weight), conv.bias)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert relative_error(y.double(), conv.double()(x.double())) < 5e-6


@pytest.mark.skipif(not fused_operators.has_layouts(torch.float32), reason="this torch has no layouts of oneDNN")
@pytest.mark.parametrize("change", [lambda conv: conv, copy.deepcopy, lambda conv: pickle.loads(pickle.dumps(conv))])
def test_convolution_by_winograd_adds_and_rectifies(change):
    conv, norm = nn.Conv2d(64, 64, 3, padding=1).eval(), nn.BatchNorm2d(64).eval()
    x, other = image(64, 12, batch=4), image(64, 12, batch=4)
    fast = FusedConv(conv, norm)
    fast.relu = True
    fast.pack(x.shape, by_winograd=True)
    fast = change(fast)
    assert fast.packed.by_winograd
    with torch.no_grad():
        assert relative_error(fast(x, other), torch.relu(norm(conv(x)) + other)) < 1e-5
        assert relative_error(fast(x), torch.relu(norm(conv(x)))) < 1e-5
        with pytest.raises(ValueError, match="same shape to be added"):
            fast(x, other[:1])


@pytest.mark.parametrize("conv", [
    nn.Conv2d(64, 64, 3, 2, 1), nn.Conv2d(64, 64, 1), nn.Conv2d(64, 64, 3, padding=1, groups=2),
    nn.Conv2d(64, 64, 3, padding=2, dilation=2), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 32, 3, padding=1),
    nn.Conv2d(64, 64, 3, padding=1, dtype=torch.float64), nn.Conv3d(64, 64, 3, padding=1),
], ids=repr)  # fmt: skip
def test_winograds_algorithm_is_left_out_where_it_does_not_fit(conv):
    fast = FusedConv(conv)
    fast.pack((32, 64, *[12] * (fast.weight.dim() - 2)), by_winograd=True)
    assert not fast.packed.by_winograd


def test_choice_of_an_algorithm_draws_no_random_numbers():
    block, before = rb.BasicBlock(64, 64), torch.get_rng_state()
    fuse(block, input_size=(64, 8, 8), batch_size=8)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def benchmark(monkeypatch):
    folder = Path(__file__).parent.parent / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    return runpy.run_path(str(folder / "inference.py"))


def test_benchmark_compares_nets_of_one_output(benchmark):
    pytest.importorskip("timm")
    case = benchmark["measure"]("resnet18", 1, 224, torch.float32, 1, torch.get_num_threads(), False)
    assert {"torchvision", "timm", "resblocks fused, prepacked"} <= set(case["rows"])
    assert all(row["right"] and len(row["seconds"]) == 1 for row in case["rows"].values())


def test_benchmark_keeps_one_case_of_a_setting(benchmark, tmp_path):
    case = {"net": "resnet50", "batch": 1, "size": 224, "threads": 1, "dtype": "float32"}
    case["environment"] = {"device": "cpu (x86_64, AVX2, 2 cores)"}
    for new in ({**case, "rows": 1}, {**case, "net": "resnet18"}, {**case, "rows": 2}):
        benchmark["keep"](new, tmp_path / "file.json")
    kept = json.loads((tmp_path / "file.json").read_text())["cases"]
    assert kept == [{**case, "net": "resnet18"}, {**case, "rows": 2}]


def test_net_that_was_pruned_and_has_run_is_fused():
    net = rb.create_model("resnet20").eval()
    for layer in [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]:
        prune.random_unstructured(layer, "weight", amount=0.5)
    x = torch.randn(2, 3, 32, 32)
    expected = net(x)
    torch.testing.assert_close(fuse(net)(x), expected, rtol=1e-4, atol=1e-5)
