"""Options: each reaches every layer it names, in every block, in 1D, 2D and 3D, or is refused with its name."""

import copy
import pickle
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import resblocks as rb
from resblocks.layers import batch_norm, convolution
from tests.blocks import BLOCKS, SUM_BLOCKS, count, image, trains_every_parameter

DIMS = pytest.mark.parametrize("dims", [1, 2, 3])
SUM_BLOCK_NAMES = pytest.mark.parametrize("name", SUM_BLOCKS)
BLOCK_NAMES = pytest.mark.parametrize("name", BLOCKS)

# how many of each layer the paper's figure has, for a block that changes the shape: (convolutions, norms, activations)
FIGURE = {
    "basic": (2, 2, 2),
    "bottleneck": (3, 3, 3),
    "resnext": (3, 3, 3),
    "preact_basic": (2, 2, 2),
    "preact_bottleneck": (3, 3, 3),
    "wide": (2, 2, 2),
    "dense_layer": (2, 2, 2),
    "dense_block": (4, 4, 4),
}
POST = ("basic", "bottleneck", "resnext")


class Norm(nn.Module):
    """A foreign norm that only takes the channel count, and has no weight."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels

    def forward(self, x):
        assert x.shape[1] == self.channels
        return x / (1 + x.abs().amax())


def net_of(name, dims=2, **options):
    """Two stages of two blocks: the first keeps the shape, the second changes it."""
    options = {"dims": dims, "stem": "deep", "stem_width": 16, "num_classes": 3, **options}
    if name.startswith("dense"):
        return rb.DenseNet(8, (2, 2), **options)
    return rb.ResNet(SUM_BLOCKS[name], (2, 2), (16, 32), **options)


def places(name):
    """Norms of a whole net outside its branches: those of stem, shortcut, transition and head."""
    stem = 3 if name in POST or name.startswith("dense") else 2
    return stem + {True: 1, False: 1}[name in POST] + (1 if name.startswith("dense") else 0)


def norms_of_net(name):
    branches = 4 * FIGURE["dense_layer" if name.startswith("dense") else name][1]
    return branches + places(name)


@BLOCK_NAMES
@DIMS
def test_norm_reaches_stem_branch_shortcut_and_head(name, dims):
    net = net_of(name, dims, norm=Norm)
    assert count(net, Norm) == norms_of_net(name)
    assert count(net, batch_norm[dims - 1]) == 0
    assert count(net_of(name, dims), batch_norm[dims - 1]) == norms_of_net(name)
    assert count(net_of(name, dims, norm=None), batch_norm[dims - 1]) == 0


@BLOCK_NAMES
@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d, rb.group_norm, rb.LayerNorm, rb.instance_norm, rb.FrozenBatchNorm, None]
)
def test_every_norm_trains(name, norm):
    net = net_of(name, norm=norm)
    trains_every_parameter(net, image(3, 16))
    biased = [layer.bias is not None for layer in net.modules() if isinstance(layer, nn.Conv2d)]
    assert set(biased) == {norm is None}


@BLOCK_NAMES
@DIMS
def test_activation_reaches_every_place(name, dims):
    net = net_of(name, dims, activation=partial(nn.LeakyReLU, 0.2))
    assert count(net, nn.LeakyReLU) == count(net_of(name, dims), nn.ReLU)
    assert count(net, nn.ReLU) == 0
    assert count(net, nn.LeakyReLU) >= 4 * 2 + 2


@BLOCK_NAMES
@DIMS
def test_conv_reaches_every_place(name, dims):
    net = net_of(name, dims, conv=rb.weight_standardised)
    standardised = rb.weight_standardised[dims - 1]
    assert count(net, convolution[dims - 1]) == 0
    assert count(net, standardised) == count(net_of(name, dims), convolution[dims - 1])


@SUM_BLOCK_NAMES
@DIMS
@pytest.mark.parametrize("attention", [rb.SE, rb.ECA, rb.cbam])
def test_attention_is_last_in_every_branch(name, dims, attention):
    net = net_of(name, dims, attention=attention)
    last = [list(block.branch.children())[-1] for block in rb.residuals(net).values()]
    kind = rb.CBAM if attention is rb.cbam else attention
    assert [type(layer) for layer in last] == [kind] * 4
    trains_every_parameter(net, image(3, 16, dims, batch=2))


@BLOCK_NAMES
def test_dropout_reaches_every_branch(name):
    assert count(net_of(name, dropout=0.3), nn.Dropout) == 4
    assert count(net_of(name), nn.Dropout) == 0


@SUM_BLOCK_NAMES
@pytest.mark.parametrize("scale", [rb.ZeroInit, rb.SkipInit, rb.ReZero, rb.LayerScale, rb.Fixup])
def test_scale_reaches_every_block_and_starts_as_the_shortcut(name, scale):
    net = net_of(name, scale=scale, norm=None)
    assert count(net, scale) == 4
    block = net.stages[0][1]
    x = image(16, 6).relu()
    torch.testing.assert_close(block(x), x, rtol=0, atol=1e-3 if scale is rb.LayerScale else 0)


@SUM_BLOCK_NAMES
def test_zero_init_leaves_no_block_dead(name):
    net = net_of(name, scale=rb.ZeroInit)
    trains_every_parameter(net, image(3, 16))
    for block in rb.residuals(net).values():
        assert any(parameter.grad.any() for parameter in block.branch.parameters())


@SUM_BLOCK_NAMES
@DIMS
@pytest.mark.parametrize(("merge", "kind"), [(rb.WeightedAdd, rb.WeightedAdd), (rb.gated, rb.Gated)])
def test_merge_reaches_every_block(name, dims, merge, kind):
    net = net_of(name, dims, merge=merge)
    assert count(net, kind) == 4
    assert count(net, rb.Add) == 0
    trains_every_parameter(net, image(3, 16, dims, batch=2))


@SUM_BLOCK_NAMES
@DIMS
@pytest.mark.parametrize("downsample", [rb.average_downsample, rb.blur_downsample])
def test_downsample_takes_every_stride_of_the_blocks(name, dims, downsample):
    net = net_of(name, dims, downsample=downsample)
    strides = [layer.stride[0] for layer in net.stages.modules() if isinstance(layer, convolution[dims - 1])]
    assert set(strides) == {1}
    kinds = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, rb.BlurPool)
    assert sum(isinstance(layer, kinds) for layer in net.stages.modules()) == 2  # branch and shortcut
    strided = net_of(name, dims).eval()
    x = image(3, 17, dims, batch=1)
    assert net.eval().forward_features(x).shape == strided.forward_features(x).shape


@BLOCK_NAMES
@DIMS
def test_checkpoint_changes_nothing_but_memory(name, dims):
    options = {"dims": dims, "dropout": 0.3}
    if name in SUM_BLOCKS:
        options["drop_path"] = 0.3
    if name == "dense_block":
        options["memory"] = "plain"  # the other modes sum in another order
    kept, recomputed = (BLOCKS[name](8, 16, checkpoint=checkpoint, **options) for checkpoint in (False, True))
    recomputed.load_state_dict(kept.state_dict())
    x = image(8, 4, dims, batch=8)
    outs = []
    for block in (kept, recomputed):
        torch.manual_seed(5)
        outs.append(block(x))
        outs[-1].square().sum().backward()
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=0)
    for ours, theirs in zip(recomputed.parameters(), kept.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    for ours, theirs in zip(recomputed.buffers(), kept.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    tracked = [norm.num_batches_tracked for norm in recomputed.modules() if isinstance(norm, batch_norm[dims - 1])]
    assert tracked
    assert all(count == 1 for count in tracked)


def test_checkpoint_keeps_fewer_tensors():
    def kept(checkpoint):
        sizes = []
        block = rb.Bottleneck(16, 64, checkpoint=checkpoint)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            block(image(16, 8))
        return sum(sizes)

    assert kept(True) < kept(False) / 4


@SUM_BLOCK_NAMES
@DIMS
def test_drop_path_reaches_every_block(name, dims):
    net = net_of(name, dims, drop_path=0.2)
    assert [block.drop_path.p for block in rb.residuals(net).values()] == pytest.approx([0.05, 0.1, 0.15, 0.2])


class Draws(TorchDispatchMode):
    """Counts how many tensors are drawn uniformly."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.uniform_.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("conv", [convolution, rb.weight_standardised])
def test_what_constructors_draw_is_left_out(conv):
    with Draws() as draws:
        block = rb.BasicBlock(8, 16, 2, conv=conv)
    assert draws.count == 3  # one for each convolution, by `init_new_layers`
    assert all(weight.std() > 0.01 for weight in block.parameters() if weight.dim() > 1)


def test_sync_batch_norm_converts_by_torch():
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net_of("bottleneck"))
    assert count(net, nn.SyncBatchNorm) == norms_of_net("bottleneck")


def unmade():
    return torch.relu


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dims": 4}, "dims must be 1, 2 or 3, got 4"),
        ({"dims": 3, "norm": nn.BatchNorm2d}, "norm must fit dims=3, got BatchNorm2d, which is for dims=2"),
        ({"dims": 1, "norm": nn.InstanceNorm2d}, "norm must fit dims=1, got InstanceNorm2d, which is for dims=2"),
        ({"dims": 3, "conv": nn.Conv2d}, "conv must fit dims=3, got Conv2d, which is for dims=2"),
        ({"dims": 1, "downsample": rb.BlurPool}, "downsample must fit dims=1, got BlurPool, which is for dims=2"),
        ({"dims": 1, "merge": rb.Gated}, "merge must fit dims=1, got Conv2d, which is for dims=2"),
        ({"dims": 1, "attention": rb.CBAM}, "attention must fit dims=1, got Conv2d, which is for dims=2"),
        ({"activation": partial(nn.ReLU, inplace=True)}, "activation must work out of place"),
        ({"activation": torch.relu}, "activation .*relu.* refused the arguments"),
        ({"activation": unmade}, "activation must return a torch.nn.Module, got .*relu"),
        ({"norm": nn.BatchNorm2d(8)}, "norm must be a class or callable that makes layers, got one already made"),
        ({"norm": nn.LayerNorm}, "norm must normalise over channels, got torch.nn.LayerNorm.*resblocks.LayerNorm"),
        ({"norm": nn.RMSNorm}, "norm must normalise over channels, got torch.nn.RMSNorm.*resblocks.LayerNorm"),
        ({"downsample": nn.AvgPool2d}, "downsample must take channels and stride, got AvgPool2d, which takes the size"),
        ({"norm": "batch"}, "norm must be a class or callable that returns a torch.nn.Module, got 'batch'"),
        ({"norm": partial(nn.GroupNorm, 32)}, "norm .*GroupNorm.* refused the arguments .16,.: num_channels"),
        ({"norm": (nn.BatchNorm1d, nn.BatchNorm2d)}, "norm must be one layer or a triple, for 1D, 2D and 3D, got"),
        ({"dims": True}, "dims must be 1, 2 or 3, got True"),
        ({"dtype": "float16"}, "dtype must be a torch.dtype of floating point numbers or None, got 'float16'"),
        ({"dtype": torch.int8}, "dtype must be a torch.dtype of floating point numbers or None, got torch.int8"),
        ({"drop_path": "0.1"}, "drop_path must be at least 0 and below 1, got '0.1'"),
        ({"attention": partial(rb.SE, reduction=0)}, "reduction must be an integer of at least 1, got 0"),
        ({"attention": partial(rb.CBAM, kernel_size=4)}, "kernel_size must be odd to keep the size of the map, got 4"),
        ({"norm": partial(rb.group_norm, groups=-4)}, "groups must be an integer of at least 1, got -4"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"drop_path": -0.1}, "drop_path must be at least 0 and below 1, got -0.1"),
        ({"dilation": 2, "first_dilation": 1}, "stride must be 1 where a dilation replaces it, got 2 with dilation=2"),
        ({"dilation": 3, "first_dilation": 2}, "first_dilation must divide dilation, got 2 with dilation=3"),
        ({"activation": lambda: nn.Sequential(nn.ReLU(inplace=True))}, "activation must work out of place"),
        ({"skip": False, "merge": rb.Gated}, "merge must be None with skip=False"),
        ({"skip": False, "drop_path": 0.1}, "drop_path must be None with skip=False"),
        ({"skip": False, "scale": rb.ReZero}, "scale must be None with skip=False"),
    ],
)
def test_bad_option_raises(options, text):
    with pytest.raises(ValueError, match=text):
        rb.BasicBlock(8, 16, 2, **options)


# --- combinations

KINDS = {
    "norm": [Norm, rb.group_norm, rb.LayerNorm, rb.instance_norm, rb.FrozenBatchNorm, None],
    "activation": [nn.GELU, nn.SiLU, partial(nn.LeakyReLU, 0.1), nn.Tanh],
    "conv": [rb.weight_standardised],
    "dropout": [0.3],
    "checkpoint": [True],
}
SUM_KINDS = {
    "attention": [rb.SE, rb.ECA, rb.cbam],
    "shortcut": ["A", "B", "C", "D"],
    "downsample": [rb.average_downsample, rb.blur_downsample],
    "drop_path": [0.3],
    "scale": [rb.ZeroInit, rb.SkipInit, rb.ReZero, rb.LayerScale, rb.Fixup],
    "merge": [rb.WeightedAdd, rb.gated],
    "dilation": [2],
}


@st.composite
def built_blocks(draw):
    name = draw(st.sampled_from(sorted(BLOCKS)))
    summed = name in SUM_BLOCKS
    kinds = KINDS | (SUM_KINDS if summed else {})
    dims = draw(st.integers(1, 3))
    options = {key: draw(st.sampled_from(values)) for key, values in kinds.items() if draw(st.booleans())}
    if draw(st.booleans()):
        options = {key: value for key, value in options.items() if key not in ("scale", "merge", "drop_path")}
        options["skip"] = False
    out_channels = draw(st.sampled_from([8, 16])) if summed else 16
    stride = draw(st.integers(1, 2)) if summed else 1
    # instance norm refuses maps of one position
    smallest = 3 if options.get("norm") is rb.instance_norm else 1
    return name, (8, out_channels, stride), {"dims": dims, **options}, draw(st.integers(smallest, 5))


def is_refused(name, options):
    """Whether the options undo each other."""
    norm, scale = options.get("norm", "batch"), options.get("scale")
    activated = not name.startswith(("preact", "wide"))
    return any(
        (
            "conv" in options and (norm is None or scale is rb.Fixup),
            scale is rb.Fixup and activated and norm not in (None, rb.FrozenBatchNorm),
            scale is rb.ZeroInit and activated and norm is rb.instance_norm,
            options.get("merge") is rb.gated and ("scale" in options or "drop_path" in options),
            options.get("attention") in (rb.SE, rb.ECA) and activated and norm is rb.instance_norm,
        )
    )


@given(built_blocks())
@settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_any_combination_builds_trains_and_copies(built):
    name, shape, options, size = built
    if is_refused(name, options):
        with pytest.raises(ValueError, match=r"^(conv|scale|merge|attention) "):
            BLOCKS[name](*shape, **options)
        return
    block = BLOCKS[name](*shape, **options)
    out = block(image(8, size, options["dims"], batch=2))
    assert out.shape[:2] == (2, block.out_channels)
    assert out.shape[2:] == (-(-size // shape[2]),) * options["dims"]
    out.square().sum().backward()
    assert [name for name, parameter in block.named_parameters() if parameter.grad is None] == []
    block.eval()
    x = image(8, size, options["dims"], batch=2)
    fresh = BLOCKS[name](*shape, **options).eval()
    fresh.load_state_dict(block.state_dict())
    with torch.no_grad():
        expected = block(x)
        for other in (fresh, copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
            torch.testing.assert_close(other(x), expected, rtol=0, atol=0, equal_nan=True)
