"""The networks: torchvision's logits, any number of stages, any block, stems, heads, features and refusals."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, prune

import resblocks as rb
from resblocks import BaselineCNN, BasicBlock, Bottleneck, DenseNet, PreActBasicBlock, ResNet, create_model, list_models
from resblocks.options import with_layers
from tests.blocks import count, image, trains_every_parameter

TORCHVISION = [
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"),
    *("densenet121", "densenet161", "densenet169", "densenet201"),
]


def small(block=BasicBlock, **options):
    return ResNet(block, (1, 1), (8, 16), **{"stem": "cifar", "stem_width": 8, "num_classes": 3, **options})


def copy_by_order(ours, theirs):
    """Copy the weights layer by layer: both register their layers in the order of the figure, shortcuts last."""
    mine, other = [
        [layer for layer in net.modules() if isinstance(layer, nn.Conv2d | nn.BatchNorm2d | nn.Linear)]
        for net in (ours, theirs)
    ]
    for to, source in zip(mine, other, strict=True):
        to.load_state_dict(source.state_dict())


@pytest.mark.parametrize("name", TORCHVISION)
def test_logits_equal_torchvision_with_its_weights(name):
    theirs = getattr(torchvision.models, name)(num_classes=7).eval()
    ours = create_model(name, num_classes=7).eval()
    for layer in theirs.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
    copy_by_order(ours, theirs)
    x = image(3, 40, batch=2)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck, PreActBasicBlock, partial(rb.DenseBlock, growth_rate=4)])
@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_resnet_takes_any_number_of_stages(block, stages):
    widths = [16 * 2**stage for stage in range(stages)]
    strides = [1] * stages if isinstance(block, partial) else None
    net = ResNet(block, [1] * stages, widths, strides=strides, stem="cifar", stem_width=8, num_classes=3)
    y = trains_every_parameter(net, image(3, 16))
    assert y.shape == (3, 3)
    assert net.stage_channels == tuple(widths)


def test_each_stage_may_have_a_block_of_its_own():
    blocks = [BasicBlock, partial(Bottleneck, groups=2), partial(BasicBlock, activation=nn.GELU)]
    net = ResNet(blocks, (1, 2, 1), (8, 16, 8), stem="cifar", stem_width=8, num_classes=3, activation=nn.ELU)
    assert [[type(block) for block in stage] for stage in net.stages] == [[BasicBlock], [Bottleneck] * 2, [BasicBlock]]
    assert [conv.groups for conv in net.modules() if isinstance(conv, nn.Conv2d)].count(2) == 2
    assert [count(stage, nn.ELU) for stage in net.stages] == [2, 6, 0]
    assert [count(stage, nn.GELU) for stage in net.stages] == [0, 0, 2]
    trains_every_parameter(net, image(3, 8))
    assert rb.to_config(rb.from_config(rb.to_config(net))) == rb.to_config(net)


def test_resnet_takes_a_foreign_block_of_three_arguments():
    class Tiny(nn.Module):
        def __init__(self, in_channels, out_channels, stride):
            super().__init__()
            self.conv = nn.Conv2d(in_channels, out_channels, 3, stride, 1)
            self.out_channels = out_channels

        def forward(self, x):
            return self.conv(x).relu()

    assert trains_every_parameter(small(Tiny), image(3)).shape == (3, 3)
    with pytest.raises(
        ValueError, match=r"block Tiny takes no option 'norm', got norm=None: .*give the net a stem of your"
    ):
        small(Tiny, norm=None)
    with pytest.raises(
        ValueError, match=r"block Tiny takes no option 'skip', got skip=False: .* give the block that keyword$"
    ):
        small(Tiny, skip=False)


@pytest.mark.parametrize(("dims", "conv"), [(1, nn.Conv1d), (3, nn.Conv3d)])
def test_foreign_block_of_other_dims_need_not_know_dims(dims, conv):
    class Own(nn.Module):
        def __init__(self, in_channels, out_channels, stride=1):
            super().__init__()
            self.conv = conv(in_channels, out_channels, 3, stride, 1)
            self.out_channels = out_channels

        def forward(self, x):
            return self.conv(x).relu()

    assert trains_every_parameter(small(Own, dims=dims), image(3, dims=dims)).shape == (3, 3)


def test_block_without_out_channels_raises():
    with pytest.raises(ValueError, match="block <lambda> must have an attribute out_channels"):
        small(lambda i, o, s: nn.Identity())


@pytest.mark.parametrize(
    ("stem", "size", "kinds"),
    [
        ("imagenet", 4, ["Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d"]),
        ("cifar", 16, ["Conv2d", "BatchNorm2d", "ReLU"]),
        ("deep", 4, ["Conv2d", "BatchNorm2d", "ReLU"] * 3 + ["MaxPool2d"]),
    ],
)
def test_stem_is_built_of_its_layers(stem, size, kinds):
    net = small(stem=stem)
    assert [type(layer).__name__ for layer in net.stem] == kinds
    assert net.stem(image(3, 16)).shape == (3, 8, size, size)
    assert net.stage_strides == (16 // size, 2 * 16 // size)


def test_tiered_stem_widens_in_steps():
    net = small(stem="tiered", stem_width=64)
    convolutions = [layer for layer in net.stem if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [24, 32, 64]


@pytest.mark.parametrize("stem", ["imagenet", "deep", "tiered"])
def test_stem_pool_takes_the_place_of_the_max_pool(stem):
    for build in (small, partial(DenseNet, 8, (1, 1))):
        net = build(stem=stem, stem_pool=rb.blur_downsample)
        assert type(net.stem.pool) is rb.BlurPool
        assert count(net.stem, nn.MaxPool2d) == 0
        assert net.stem(image(3, 16)).shape[2:] == (4, 4)


@pytest.mark.parametrize("stem", ["cifar", partial(nn.Conv2d, kernel_size=4, stride=4)])
def test_stem_pool_needs_a_stem_with_a_pool(stem):
    with pytest.raises(ValueError, match="stem_pool must be None unless the stem has a pool to replace, got stem="):
        small(stem=stem, stem_pool=rb.blur_downsample)


def test_stem_takes_a_callable():
    net = small(stem=partial(nn.Conv2d, kernel_size=4, stride=4))
    assert net.stage_strides == (4, 8)
    assert net(image(3, 16)).shape == (3, 3)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_stem_marked_with_layers_honours_the_options(dims):
    @with_layers
    def stem(make, in_channels, width):
        return nn.Sequential(make.conv(in_channels, width, 3, 2), make.norm(width), make.activation())

    net = small(stem=stem, dims=dims, norm=rb.group_norm, conv=rb.weight_standardised, activation=nn.SiLU)
    assert [type(layer) for layer in net.stem] == [rb.weight_standardised[dims - 1], nn.GroupNorm, nn.SiLU]
    assert trains_every_parameter(net, image(3, 8, dims)).shape == (3, 3)


def test_stem_of_an_even_kernel_raises():
    @with_layers
    def stem(make, in_channels, width):
        return make.conv(in_channels, width, 2)

    with pytest.raises(ValueError, match="kernel_size must be odd to keep the size of the map, got 2"):
        small(stem=stem)


def test_preactivated_net_normalises_before_its_head_and_not_in_its_stem():
    net = small(PreActBasicBlock)
    assert [type(layer).__name__ for layer in net.stem] == ["Conv2d"]
    assert [type(layer).__name__ for layer in net.final] == ["BatchNorm2d", "ReLU"]
    assert isinstance(small().final, nn.Identity)


def test_head_can_be_replaced_or_left_out():
    net = small(dtype=torch.float64)
    x = image(3, dtype=torch.float64)
    net.reset_head(5)
    assert net(x).shape == (3, 5)
    assert net.head.weight.dtype == torch.float64
    net.reset_head(0)
    torch.testing.assert_close(net.eval()(x), net.forward_features(x).mean((2, 3)))
    assert small(num_classes=0)(image(3)).shape == (3, 16)
    with pytest.raises(ValueError, match="num_classes must be an integer of at least 0, got -1"):
        net.reset_head(-1)


def test_forward_is_features_then_head():
    net, x = small().eval(), image(3)
    torch.testing.assert_close(net(x), net.forward_head(net.forward_features(x)))


@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18", "resnet20"])
@pytest.mark.parametrize("size", [1, 7, 32, 33])
def test_features_have_the_channels_and_strides_that_the_net_tells(name, size):
    net = create_model(name).eval()
    maps = net.features(image(3, size, batch=1))
    for channels, stride, features in zip(net.stage_channels, net.stage_strides, maps, strict=True):
        assert features.shape == (1, channels, *[-(-size // stride)] * 2)


@pytest.mark.parametrize("net", [DenseNet(4, (1, 1, 1)), BaselineCNN((1, 1, 1), (8, 8, 8))], ids=["dense", "baseline"])
def test_pools_between_stages_count_in_the_strides(net):
    maps = net.eval().features(image(3, 32, batch=1))
    assert [32 // features.shape[-1] for features in maps] == list(net.stage_strides)


@pytest.mark.parametrize(("stages", "ran"), [((), 0), ((0,), 1), ((1, 0), 2), (None, 2)])
def test_features_runs_no_stage_behind_the_last_one_wanted(stages, ran):
    net, seen = small(), []
    for stage in net.stages:
        stage.register_forward_hook(lambda layers, given, out: seen.append(out))
    assert len(net.features(image(3, 8), stages)) == ran == len(seen)


def test_features_picks_stages_in_the_order_asked_for():
    net, x = small().eval(), image(3)
    first, last = net.features(x)
    torch.testing.assert_close(net.features(x, stages=(1, 0)), [last, first])
    torch.testing.assert_close(net.forward_features(x), last)
    with pytest.raises(ValueError, match="stages must be from 0 to 1, got 2"):
        net.features(x, stages=(2,))


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck, PreActBasicBlock])
@pytest.mark.parametrize(
    ("output_stride", "strides"), [(None, (4, 8, 16, 32)), (16, (4, 8, 16, 16)), (8, (4, 8, 8, 8))]
)
def test_output_stride_dilates_instead(block, output_stride, strides):
    widths = (8, 16, 32, 64)
    net = ResNet(block, (1, 2, 2, 2), widths, stem_width=8, num_classes=2, output_stride=output_stride).eval()
    assert net.stage_strides == strides
    assert [maps.shape[-1] for maps in net.features(image(3, 64, batch=1))] == [64 // stride for stride in strides]


AT_FIRST = partial(Bottleneck, stride_first=True)


@pytest.mark.parametrize(
    ("block", "options"),
    [
        *((block, {}) for block in (BasicBlock, PreActBasicBlock, rb.WideBlock, Bottleneck, rb.PreActBottleneck)),
        *((BasicBlock, {"shortcut": kind}) for kind in "ACD"),
        *((Bottleneck, {"shortcut": "D", "downsample": pool}) for pool in (rb.average_downsample, rb.blur_downsample)),
        *(
            (AT_FIRST, {"shortcut": kind, "downsample": pool})
            for kind, pool in (("B", None), ("D", rb.blur_downsample))
        ),
        (BasicBlock, {"dims": 1, "downsample": rb.blur_downsample}),
        (BasicBlock, {"dims": 1, "downsample": partial(rb.BlurPool, dims=1, border="reflect")}),
        (PreActBasicBlock, {"dims": 3, "shortcut": "D"}),
        (BasicBlock, {"widths": (8, 8, 8)}),
    ],
)
@pytest.mark.parametrize("size", [8, 10, 13])  # of the second and third stage without it: 4 2, 5 3, 7 4
def test_output_stride_puts_out_the_same_where_the_net_without_it_does(block, options, size):
    settings = {"depths": (1, 2, 2), "widths": (8, 16, 32), "stem": "cifar", "stem_width": 8, "dtype": torch.float64}
    net, dilated = (ResNet(block, **settings | options, output_stride=most).eval() for most in (None, 1))
    dilated.load_state_dict(net.state_dict())
    x = image(3, size, options.get("dims", 2), batch=1).double()
    for ours, theirs, stride in zip(dilated.features(x), net.features(x), net.stage_strides, strict=True):
        torch.testing.assert_close(ours[(..., *[slice(None, None, stride)] * (x.dim() - 2))], theirs)


@pytest.mark.parametrize("options", [{"shortcut": "D"}, {"downsample": rb.average_downsample}])
def test_dilated_net_with_average_pools_is_traced(options):
    net, x = small(output_stride=1, **options).eval(), image(3, 8)
    torch.testing.assert_close(torch.fx.symbolic_trace(net)(x), net(x))
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), net(x))


def test_output_stride_with_a_pool_of_ones_own_raises():
    with pytest.raises(ValueError, match="downsample must be average_downsample or blur_downsample where a dilation"):
        small(downsample=lambda channels, stride: nn.MaxPool2d(stride), output_stride=1)


class OneDilation(rb.Residual):
    def __init__(self, in_channels, out_channels, stride=1, dilation=1):
        conv = nn.Conv2d(in_channels, out_channels, 3, stride, dilation, dilation)
        super().__init__(conv, nn.Conv2d(in_channels, out_channels, 1, stride))
        self.out_channels = out_channels


class OneDilationAndOthers(OneDilation):
    def __init__(self, in_channels, out_channels, stride=1, dilation=1, **options):
        super().__init__(in_channels, out_channels, stride, dilation)


@pytest.mark.parametrize("block", [OneDilation, OneDilationAndOthers])
def test_block_that_knows_one_dilation_gets_that_of_its_input(block):
    net = ResNet(block, (1, 2, 2), (8, 8, 8), stem="cifar", stem_width=8, output_stride=1)
    assert [block.branch.dilation[0] for block in rb.residuals(net).values()] == [1, 1, 2, 2, 4]


def test_output_stride_has_the_dilations_of_torchvision():
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True])
    ours = create_model("resnet50", output_stride=8)
    mine, other = [
        [layer.dilation for layer in net.modules() if isinstance(layer, nn.Conv2d)] for net in (ours, theirs)
    ]
    assert mine == other


def test_drop_path_grows_linearly_over_the_blocks():
    net = ResNet(BasicBlock, (2, 2), (8, 16), drop_path=0.4, stem="cifar", stem_width=8)
    assert [block.drop_path.p for block in rb.residuals(net).values()] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    one = ResNet(BasicBlock, (1,), (8,), drop_path=0.4, stem="cifar", stem_width=8)
    assert one.stages[0][0].drop_path.p == 0.4


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "preact_resnet50", "wrn_16_4", "baseline_cnn"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_named_net_works_in_every_dims_and_in_channels(name, dims):
    options = {"dims": dims, "in_channels": 2, "num_classes": 3}
    net = create_model(name, **options).eval()
    assert net(image(2, 33 if "densenet" in name else 9, dims, batch=1)).shape == (1, 3)
    assert count(net, (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]) > 10


@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18", "densenet_bc_100_12", "baseline_cnn"])
def test_net_from_meta_equals_net_built_under_the_same_seed(name):
    torch.manual_seed(1)
    built = create_model(name).state_dict()
    net = create_model(name, device="meta").to_empty(device="cpu")
    torch.manual_seed(1)
    net.init_weights()
    assert all(torch.equal(value, built[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize(
    "net", [small(), small(skip=False), DenseNet(4, (2, 2), num_classes=2), BaselineCNN(norm=nn.BatchNorm2d)]
)
def test_net_survives_copies(net):
    net, x = net.eval(), image(3, 32)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(other(x), net(x), rtol=0, atol=0)


def test_densenet_without_skip_runs():
    net = DenseNet(8, (2, 2), stem="cifar", num_classes=3, skip=False)
    assert net.stage_channels == (8, 8)
    trains_every_parameter(net, image(3, 8))


def test_baseline_has_the_convolutions_of_the_plain_resnet18_without_norm():
    baseline, plain = create_model("baseline_cnn"), create_model("resnet18", stem="cifar", num_classes=10, skip=False)
    shapes = [[m.weight.shape for m in net.modules() if isinstance(m, nn.Conv2d)] for net in (baseline, plain)]
    assert shapes[0] == shapes[1]
    assert count(baseline, nn.BatchNorm2d) == 0
    assert count(create_model("baseline_cnn", norm=nn.BatchNorm2d), nn.BatchNorm2d) == 17
    trains_every_parameter(baseline, image(3, 8))


def test_fixup_knows_the_number_of_blocks_and_starts_its_head_at_zero():
    net = ResNet(BasicBlock, (2, 2), (8, 16), stem="cifar", stem_width=8, norm=None, scale=rb.Fixup)
    torch.manual_seed(0)
    net.init_weights()
    torch.manual_seed(0)
    plain = ResNet(BasicBlock, (2, 2), (8, 16), stem="cifar", stem_width=8, norm=None, scale=rb.LayerScale)
    block, reference = net.stages[0][0].branch, plain.stages[0][0].branch
    torch.testing.assert_close(block.conv1.weight, reference.conv1.weight * 4**-0.5)
    assert not block.conv2.weight.any()
    net.reset_head(3)
    assert not net.head.weight.any()
    assert not net.head.bias.any()


def test_fixup_of_bottlenecks_draws_each_of_two_convolutions_less_small():
    nets = []
    for scale in (rb.Fixup, rb.LayerScale):
        torch.manual_seed(0)
        nets.append(ResNet(Bottleneck, (2, 2), (8, 16), stem="cifar", stem_width=8, norm=None, scale=scale))
        torch.manual_seed(0)
        nets[-1].init_weights()
    for name in ("conv1", "conv2"):
        ours, theirs = (net.stages[0][0].branch.get_submodule(name).weight for net in nets)
        torch.testing.assert_close(ours, theirs * 4 ** (-1 / 4))


class Halving(nn.Module):
    """A scale of a user, which halves what the branch starts with."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x):
        return x

    def start_branch(self, branch: nn.Module) -> None:
        with torch.no_grad():
            branch.conv2.weight.mul_(0.5)


def test_scale_of_ones_own_starts_each_branch_once():
    torch.manual_seed(0)
    net = ResNet(BasicBlock, (1,), (8,), stem="cifar", stem_width=8, scale=Halving)
    torch.manual_seed(0)
    plain = ResNet(BasicBlock, (1,), (8,), stem="cifar", stem_width=8)
    torch.testing.assert_close(net.stages[0][0].branch.conv2.weight, plain.stages[0][0].branch.conv2.weight / 2)


class ZeroConv(nn.Conv2d):
    """A convolution of a user that starts at zero."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


class ZeroInside(nn.Module):
    """A layer of a user that sets the start of the layer inside it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.conv.weight)

    def forward(self, x):
        return self.conv(x)


def test_layers_of_ones_own_start_by_their_own_rule():
    net = small(conv=ZeroConv, attention=ZeroInside)
    for _ in range(2):
        assert not any(conv.weight.any() for conv in net.modules() if isinstance(conv, nn.Conv2d))
        net.init_weights()


class OpenGate(nn.Module):
    """An attention of a user that starts open, and says so in its constructor alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.conv.weight)
        nn.init.constant_(self.conv.bias, 5)

    def forward(self, x):
        return x * self.conv(x).sigmoid()


class LowRank(nn.Conv2d):
    """A convolution of a user with a second way that starts at zero."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.up = nn.Conv2d(self.in_channels, self.out_channels, 1)
        nn.init.zeros_(self.up.weight)


def test_what_a_constructor_of_ones_own_sets_is_kept():
    net = small(conv=LowRank, attention=lambda channels: nn.Sequential(OpenGate(channels)))
    gates = [layer for layer in net.modules() if isinstance(layer, OpenGate)]
    assert len(gates) == 2
    assert all((gate.conv.bias == 5).all() and not gate.conv.weight.any() for gate in gates)
    assert not any(conv.up.weight.any() for conv in net.modules() if isinstance(conv, LowRank))


class Circular(nn.Conv2d):
    """A convolution of a user without a constructor of its own."""


def test_torch_layers_from_a_function_and_classes_without_constructor_are_drawn_by_our_rule():
    torch.manual_seed(0)
    plain = small().state_dict()
    for conv in (Circular, lambda *args, **options: nn.Conv2d(*args, **options)):
        torch.manual_seed(0)
        assert all(torch.equal(value, plain[name]) for name, value in small(conv=conv).state_dict().items())


class OwnConv(nn.Module):
    """A convolution of a user that draws its weight when it is made, and has no reset_parameters."""

    def __init__(self, inside: int, outside: int, size: int, stride: int = 1, padding: int = 0, **rest) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outside, inside, size, size) * 0.1)
        self.moves = stride, padding

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight, None, *self.moves)


def legacy_weight_norm(*args, **options):
    return nn.utils.weight_norm(nn.Conv2d(*args, **options))


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("conv", [OwnConv, legacy_weight_norm])
def test_layers_that_cannot_be_drawn_anew_keep_draws_of_their_own(conv):
    net = small(conv=conv)
    block, other = net.stages[0][0].branch, BasicBlock(8, 8, conv=conv).branch
    assert not torch.equal(block.conv1.weight, block.conv2.weight)
    assert not torch.equal(block.conv1.weight, other.conv1.weight)


def computed(kind):
    """A convolution with a weight that is computed, of that kind."""
    pruned = partial(prune.random_unstructured, name="weight", amount=0.0)
    norms = parametrizations.weight_norm, parametrizations.spectral_norm
    wrap = dict(zip(("weight_norm", "spectral_norm", "pruned"), (*norms, pruned), strict=True))[kind]
    return lambda *args, **options: wrap(nn.Conv2d(*args, **options))


@pytest.mark.parametrize("kind", ["weight_norm", "pruned"])
def test_computed_weights_are_drawn_like_others(kind):
    torch.manual_seed(0)
    plain = small()
    for fresh in (small(conv=computed(kind)), small(conv=computed(kind))):
        torch.manual_seed(0)
        fresh.init_weights()
        x = image(3, 8)
        torch.testing.assert_close(fresh.eval()(x), plain.eval()(x))


def test_scale_names_weights_that_it_cannot_set():
    with pytest.raises(ValueError, match="that are parameters, not computed by a parametrization or pruning"):
        BasicBlock(8, 8, norm=None, scale=rb.ZeroInit, conv=computed("weight_norm"))


def test_skip_of_a_net_is_that_of_its_blocks():
    net = small()
    assert net.skip
    net.stages[0][0].skip = False
    assert not net.skip
    net.skip = False
    assert [block.skip for block in rb.residuals(net).values()] == [False, False]
    assert not net.skip
    with pytest.raises(ValueError, match="skip must be True or False, got 0"):
        net.skip = 0
    with pytest.raises(ValueError, match="cannot be switched on: it was built with skip=False"):
        small(skip=False).skip = True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_init_weights_repeats_construction_in_any_dtype(dtype):
    torch.manual_seed(0)
    net = small(dtype=dtype)
    built = {key: value.clone() for key, value in net.state_dict().items()}
    torch.manual_seed(0)
    net.init_weights()
    assert all(torch.equal(value, built[key]) for key, value in net.state_dict().items())


def test_weights_are_drawn_like_torch_draws_them():
    net = small(norm=None)
    net.init_weights(rb.draw_like_torch)
    for conv in (layer for layer in net.modules() if isinstance(layer, nn.Conv2d)):
        limit = conv.weight[0].numel() ** -0.5
        assert 0.9 * limit < conv.weight.abs().max() <= limit
        assert 0.5 * limit < conv.bias.abs().max() <= limit


def test_rule_that_is_no_function_changes_nothing():
    net = small()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"draw must be a function of a layer.*, got 'orthogonal'"):
        net.init_weights("orthogonal")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def orthogonal(layer):
    if isinstance(layer, nn.Conv2d):
        nn.init.orthogonal_(layer.weight)
    if isinstance(layer, nn.Linear):
        layer.bias.fill_(1)


@pytest.mark.parametrize(
    "conv", [nn.Conv2d, lambda *args, **options: parametrizations.weight_norm(nn.Conv2d(*args, **options))]
)
def test_rule_of_ones_own_draws_weights_before_scales_start(conv):
    block = BasicBlock(8, 8, conv=conv, scale=rb.ZeroInit)
    block.branch.norm1.weight.data.fill_(3)
    block.init_weights(orthogonal)
    rows = block.branch.conv1.weight.flatten(1)
    torch.testing.assert_close(rows @ rows.mT, torch.eye(8))
    assert block.branch.norm1.weight.eq(1).all()  # by our rule, which comes first
    assert not block.branch.norm2.weight.any()
    net = small(scale=rb.Fixup, norm=None)
    net.init_weights(orthogonal)
    assert not net.head.bias.any()


@pytest.mark.parametrize(("norm", "fan"), [(None, 64 * 9), (nn.BatchNorm2d, 16 * 9)])
def test_convolutions_start_by_fan_in_without_a_norm_and_by_fan_out_before_one(norm, fan):
    weight = BasicBlock(64, 16, norm=norm).branch.conv1.weight
    assert weight.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.1)


def test_stride_of_a_stem_of_ones_own_is_counted_or_asked_for():
    def patches(in_channels: int, width: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(in_channels, width, 4, 4), nn.BatchNorm2d(width), nn.ReLU())

    assert small(stem=patches).stage_strides == (4, 8)
    with pytest.raises(ValueError, match="stem must have an attribute stride, its total one"):
        small(stem=lambda in_channels, width: nn.ModuleList([patches(in_channels, width)]))


def test_stride_of_a_pixel_unshuffle_is_counted():
    def stem(in_channels, width):
        return nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(16 * in_channels, width, 1))

    assert small(stem=stem).stage_strides == (4, 8)


def test_pool_without_a_stride_has_that_of_its_window():
    def stem(in_channels, width):
        return nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1), nn.LPPool2d(2, 4))

    assert small(stem=stem).stage_strides == (4, 8)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.ConvTranspose2d(8, 8, 2, 2), "a transposed layer enlarges the map"),
        (nn.MaxUnpool2d(2), "a transposed layer enlarges the map"),
        (nn.Upsample(scale_factor=2), "its layers have no stride that counts"),
        (nn.PixelShuffle(2), "its layers have no stride that counts"),
        (nn.AdaptiveAvgPool2d(4), "its layers have no stride that counts"),
        (nn.AdaptiveMaxPool2d(4), "its layers have no stride that counts"),
        (nn.FractionalMaxPool2d(2, output_ratio=0.5), "its layers have no stride that counts"),
    ],
)
def test_stride_that_cannot_be_counted_is_asked_for(layer, why):
    def stem(in_channels, width, told=False):
        layers = nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1), layer)
        if told:
            layers.stride = 2
        return layers

    with pytest.raises(ValueError, match=f"stem must have an attribute stride, its total one, since {why}, got"):
        small(stem=stem)
    assert small(stem=partial(stem, told=True)).stage_strides == (2, 4)


def test_function_that_hides_what_its_blocks_put_out_raises():
    def make(in_channels, out_channels, stride, **options):
        return PreActBasicBlock(in_channels, out_channels, stride, **options)

    with pytest.raises(ValueError, match="block make must have the attribute preactivated of what it makes"):
        small(make)
    make.preactivated = True
    assert isinstance(small(make).final, nn.Sequential)


def test_block_without_parameters_makes_a_net():
    class Doubling(nn.Module):
        def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
            super().__init__()
            self.out_channels = in_channels

        def forward(self, x):
            return 2 * x

    assert small(Doubling)(image(3)).shape == (3, 3)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: ResNet(BasicBlock, (), ()), "depths and widths and strides must have one entry for each"),
        (lambda: ResNet(BasicBlock, (1, 1), (8,)), "got 2 depths, 1 widths, 2 strides"),
        (lambda: ResNet(BasicBlock, (1, 0), (8, 8)), r"depths\[1\] must be an integer of at least 1, got 0"),
        (lambda: small(stem="vgg"), "stem must be one of imagenet, cifar, deep, tiered or a callable, got 'vgg'"),
        (lambda: small(drop_path=1.0), "drop_path must be at least 0 and below 1, got 1.0"),
        (lambda: small(drop_path=0.1, skip=False), "drop_path must be None with skip=False"),
        (lambda: small(stem="imagenet", output_stride=2), "output_stride must be .* at least the stride of the stem"),
        (lambda: small(in_channels=0), "in_channels must be an integer of at least 1, got 0"),
        (lambda: small(num_classes=-1), "num_classes must be an integer of at least 0, got -1"),
        (lambda: small(num_classes=2.5), "num_classes must be an integer of at least 0, got 2.5"),
        (lambda: small(num_classes=True), "num_classes must be an integer of at least 0, got True"),
        (lambda: ResNet(BasicBlock, 3, (8, 8, 8)), "depths must be a list or another sequence, got 3"),
        (lambda: ResNet(BasicBlock, (1,), "8"), "widths must be a list or another sequence, got '8'"),
        (lambda: small(BasicBlock(3, 3)), "block must be a class or callable that makes blocks, got BasicBlock"),
        (lambda: small([BasicBlock]), "block must be one for all or one for each of the 2 stages of depths, got 1"),
        (lambda: small([BasicBlock, 3]), "block must be a class or callable that makes blocks, got 3"),
        (lambda: small([BasicBlock, PreActBasicBlock]), "block must be pre-activated in all stages or in none"),
        (lambda: small("BasicBlock"), "block must be a class or callable that makes blocks, got 'BasicBlock'"),
        (lambda: small(output_stride=2.5), "output_stride must be an integer of at least the stride of the stem, 1"),
        (lambda: create_model(None), "name must be one of the .* named nets, got None"),
        (lambda: small().features(image(3, 8), 1), "stages must be a list or another sequence, got 1"),
        (lambda: small().features(image(3, 8), [0.5]), "stages must be from 0 to 1, got 0.5"),
        (lambda: DenseNet(compression="a"), "compression must be above 0 and at most 1, got 'a'"),
        (lambda: DenseNet(compression=0), r"compression must be above 0 and at most 1, got 0"),
        (lambda: DenseNet(growth_rate=0), "growth_rate must be an integer of at least 1, got 0"),
        (lambda: BaselineCNN((1,), (8, 8)), "got 1 depths, 2 widths"),
    ],
)  # fmt: skip
def test_bad_net_raises(build, text):
    with pytest.raises(ValueError, match=text):
        build()


def test_unknown_option_of_a_net_raises():
    with pytest.raises(TypeError, match=r"ResNet takes no activaton \(did you mean 'activation'\?\); the options are"):
        small(activaton=nn.ReLU)
    with pytest.raises(TypeError, match=r"ResNet takes no stride \(did you mean 'strides'\?\)"):
        small(stride=2)
    with pytest.raises(TypeError, match=r"ResNet takes no output_strides \(did you mean 'output_stride'\?\)"):
        small(output_strides=8)


class OfAnother(BasicBlock):
    def __init__(self, in_channels, out_channels, stride=1, **options):
        self.kernel = options.pop("kernel", 3)
        super().__init__(in_channels, out_channels, stride, **options)


def test_options_of_a_block_of_ones_own_reach_it():
    assert small(OfAnother, kernel=5).stages[0][0].kernel == 5
    assert small(lambda *args, **options: OfAnother(*args, **options), kernel=7).stages[0][0].kernel == 7
    for block in (OfAnother, BasicBlock):
        with pytest.raises(TypeError, match="ResNet takes no dilation"):
            small(block, dilation=2)
    with pytest.raises(TypeError, match="ResNet takes no kernel; the options are block, depths"):
        small(partial(BasicBlock, groups=1), kernel=5)


@pytest.mark.parametrize("option", ["dilation", "first_dilation"])
@pytest.mark.parametrize("output_stride", [None, 1])
def test_dilation_of_a_net_is_that_of_its_output_stride(option, output_stride):
    with pytest.raises(TypeError, match=f"ResNet takes no {option}: output_stride decides"):
        small(output_stride=output_stride, **{option: 2})
    assert small(partial(BasicBlock, dilation=2)).stages[1][0].branch.conv1.dilation == (2, 2)


@pytest.mark.parametrize(
    ("name", "kind"), [("densenet121", "DenseNet"), ("densenet_bc_100_12", "DenseNet"), ("baseline_cnn", "BaselineCNN")]
)
def test_option_of_another_net_is_refused_with_all_that_this_one_has(name, kind):
    with pytest.raises(TypeError, match=rf"{kind} takes no output_stride; the options are .*depths.*num_classes.*norm"):
        create_model(name, output_stride=16)


@pytest.mark.parametrize("name", [name for name in list_models("resnet*") if name != "resnet1202"])
def test_every_residual_net_is_built_plain_too(name):
    plain = create_model(name, skip=False, device="meta")
    assert not any("shortcut" in key for key in plain.state_dict())
    assert not any(block.skip for block in rb.residuals(plain).values())


@pytest.mark.parametrize("stem", ["imagenet", "deep", "tiered"])
def test_stem_without_its_pool_counts_so_in_the_strides(stem):
    net = small(stem=stem, stem_pool=nn.Identity)
    x = image(3, 32)
    assert net.stage_strides == (2, 4)
    assert [32 // stage.shape[-1] for stage in net.features(x)] == [2, 4]
    assert small(stem=stem, stem_pool=nn.Identity, output_stride=2).stage_strides == (2, 2)


def test_pool_with_a_window_is_refused_inside_a_partial_too():
    with pytest.raises(ValueError, match="stem_pool must take channels and stride, got AvgPool2d"):
        small(stem="imagenet", stem_pool=partial(nn.AvgPool2d, 2))


@pytest.mark.parametrize("options", [{}, {"shortcut": "A"}, {"shortcut": "D"}, {"downsample": rb.blur_downsample}])
@pytest.mark.parametrize("block", [BasicBlock, rb.Bottleneck, rb.PreActBasicBlock, rb.PreActBottleneck])
def test_strides_may_differ_between_dimensions(block, options):
    net = ResNet(block, (1, 2), (8, 16), dims=3, strides=[(1, 2, 2), [2, 1, 3]], stem="cifar", stem_width=8, **options)
    x = image(3, 12, 3)
    assert net.stage_strides == ((1, 2, 2), (2, 2, 6))
    assert [tuple(y.shape[2:]) for y in net.features(x)] == [(12, 6, 6), (6, 6, 2)]
    trains_every_parameter(net, x)


@pytest.mark.parametrize("shortcut", ["A", "B", "D"])
def test_a_stride_for_each_dimension_is_that_of_all_where_they_are_alike(shortcut):
    nets = []
    for strides in ([1, 2], [(1, 1), (2, 2)]):
        torch.manual_seed(0)
        nets.append(small(strides=strides, shortcut=shortcut).eval())
    assert nets[0].stage_strides == nets[1].stage_strides
    assert repr(nets[0]) == repr(nets[1])
    x = image(3, 8)
    assert torch.equal(nets[0](x), nets[1](x))


def test_video_net_equals_torchvision():
    def stem(in_channels: int, width: int) -> nn.Module:
        conv = nn.Conv3d(in_channels, width, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False)
        return nn.Sequential(conv, nn.BatchNorm3d(width), nn.ReLU())

    torch.manual_seed(0)
    theirs = torchvision.models.video.r3d_18(num_classes=5).eval()
    net = ResNet(BasicBlock, (2, 2, 2, 2), (64, 128, 256, 512), dims=3, stem=stem, num_classes=5).eval()
    net.load_state_dict(dict(zip(net.state_dict(), theirs.state_dict().values(), strict=True)))
    assert net.stage_strides == ((1, 2, 2), (2, 4, 4), (4, 8, 8), (8, 16, 16))
    x = torch.randn(1, 3, 8, 32, 32)
    torch.testing.assert_close(net(x), theirs(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strides": [1, (2, 2, 2)]}, r"strides\[1\] must be a positive integer, or one for each of the 2 dimensions"),
        ({"strides": [1, (2, 0)]}, r"strides\[1\] must be a positive integer, or one for each of the 2 dimensions"),
        ({"strides": [1, "2"]}, r"strides\[1\] must be an integer of at least 1, got '2'"),
        ({"strides": [1, (1, 2)], "output_stride": 2}, "output_stride must be None where strides differ between dim"),
    ],
)
def test_stride_that_does_not_fit_the_dimensions_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)
