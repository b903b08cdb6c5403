"""The layers: against torch, timm and formulas."""

import pytest
import timm.layers
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import resblocks as rb
from resblocks.layers import pad_apart
from tests.blocks import count, image


@pytest.mark.parametrize("channels", [1, 2, 8, 16, 32, 64, 72, 256])
def test_group_norm_takes_any_channel_count(channels):
    norm = rb.group_norm(channels)
    assert channels % norm.num_groups == 0
    assert norm.num_groups == {8: 4, 16: 8, 32: 16, 64: 32, 72: 8, 256: 32, 1: 1, 2: 1}[channels]


def test_group_norm_takes_the_groups_that_are_asked_for():
    assert rb.group_norm(32, groups=32).num_groups == 32
    assert rb.group_norm(24, groups=16).num_groups == 8


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_layer_norm_normalises_the_channels_of_each_position(dims):
    norm = rb.LayerNorm(6)
    x = image(6, 4, dims)
    expected = nn.functional.layer_norm(x.movedim(1, -1), (6,)).movedim(-1, 1)
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_weight_standardised_convolution_has_filters_of_mean_0_and_variance_1(dims):
    conv = rb.weight_standardised[dims - 1](4, 6, 3, padding=1)
    weight = conv.standardised().flatten(1)
    torch.testing.assert_close(weight.mean(1), torch.zeros(6), atol=1e-6, rtol=0)
    torch.testing.assert_close(weight.var(1, correction=0), torch.ones(6), atol=1e-2, rtol=0)
    plain = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[dims - 1]
    x = image(4, 5, dims)
    torch.testing.assert_close(conv(x), plain(x, conv.standardised(), conv.bias, padding=1))


def trained_norm():
    norm = nn.BatchNorm2d(5)
    for _ in range(3):
        norm(3 * image(5) + 1)
    nn.init.normal_(norm.weight)
    return norm


def test_frozen_batch_norm_equals_evaluation_and_stays_so_in_training():
    norm = trained_norm()
    frozen = rb.FrozenBatchNorm.from_norm(norm).train()
    x = image(5)
    torch.testing.assert_close(frozen(x), norm.eval()(x))
    torch.testing.assert_close(dict(frozen.state_dict()), dict(norm.state_dict()), rtol=0, atol=0)
    assert list(frozen.parameters()) == []


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_frozen_norm_has_the_eps_of_the_norm_and_values_of_its_own(kind):
    norm, x = kind(5, eps=0.5), image(5)
    frozen = rb.FrozenBatchNorm.from_norm(norm)
    norm.running_mean.fill_(7)
    torch.testing.assert_close(frozen(x), x / 1.5**0.5)


def test_freeze_norm_survives_train_and_keeps_the_state_dict():
    net = rb.ResNet(rb.Bottleneck, (1, 1), (16, 32), num_classes=2)
    net(image(3, 32))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x = image(3, 32)
    expected = net.eval()(x)
    frozen = rb.freeze_norm(net).train()
    torch.testing.assert_close(frozen(x), expected)
    torch.testing.assert_close(dict(frozen.state_dict()), before, rtol=0, atol=0)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in frozen.modules())


def test_freeze_norm_finds_a_norm_under_each_of_its_names():
    norm = nn.BatchNorm2d(4)
    net = rb.freeze_norm(nn.Sequential(norm, nn.ReLU(), norm))
    assert [type(net[0]), type(net[2])] == [rb.FrozenBatchNorm] * 2


def test_norm_without_statistics_is_not_frozen():
    with pytest.raises(ValueError, match="norm must keep running statistics to be frozen, got BatchNorm2d"):
        rb.freeze_norm(nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False)))


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: rb.CBAM(8, dims=0), "dims must be 1, 2 or 3, got 0"),
        (lambda: rb.Gated(8, dims=4), "dims must be 1, 2 or 3, got 4"),
        (lambda: rb.BlurPool(8, 2, dims=0), "dims must be 1, 2 or 3, got 0"),
        (lambda: rb.BlurPool(8, 0), "stride must be an integer of at least 1, got 0"),
        (lambda: rb.BlurPool(8, 2, border="zero"), "border must be replicate, reflect or constant, got 'zero'"),
    ],
)
def test_layer_that_cannot_be_says_why(build, text):
    with pytest.raises(ValueError, match=text):
        build()


def test_freeze_norm_without_batch_norm_raises():
    with pytest.raises(ValueError, match="net must have a batch norm to freeze, got Linear without any"):
        rb.freeze_norm(nn.Linear(2, 2))


def test_freeze_norm_of_a_net_on_the_meta_device_stays_there():
    net = rb.freeze_norm(rb.create_model("resnet20", device="meta"))
    assert all(tensor.is_meta for tensor in net.state_dict().values())
    assert count(net, rb.FrozenBatchNorm) == 19


def test_frozen_norm_keeps_the_digits_of_float64():
    norm = nn.BatchNorm2d(3).double()
    nn.init.constant_(norm.running_mean, 1 / 3)
    assert torch.equal(rb.FrozenBatchNorm.from_norm(norm).running_mean, norm.running_mean)


def test_freeze_norm_of_a_norm_alone_says_what_makes_one():
    with pytest.raises(
        ValueError, match=r"net must hold the norms to freeze, got BatchNorm2d\(3.*FrozenBatchNorm\.from"
    ):
        rb.freeze_norm(nn.BatchNorm2d(3))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_frozen_norm_of_a_parametrized_one_has_its_weight():
    norm = trained_norm()
    parametrize.register_parametrization(norm, "weight", Doubled())
    x = image(5)
    torch.testing.assert_close(rb.FrozenBatchNorm.from_norm(norm)(x), norm.eval()(x))


class NormAndReLU(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


def pruned_norm(channels):
    return prune.l1_unstructured(nn.BatchNorm2d(channels), "weight", amount=0.5)


@pytest.mark.parametrize("norm", [NormAndReLU, pruned_norm])
def test_freeze_norm_of_more_than_a_norm_raises_and_changes_nothing(norm):
    net = nn.Sequential(nn.BatchNorm2d(4), norm(4))
    before = list(net)
    with pytest.raises(ValueError, match="norm must be torch's and without hooks to be frozen"):
        rb.freeze_norm(net)
    assert list(net) == before


@pytest.mark.parametrize("to_device", [lambda net: net.to_empty(device="cpu"), lambda net: net])
def test_net_with_blur_from_the_meta_device_loads_a_state_dict(to_device):
    net = rb.create_model("resnet20", downsample=rb.blur_downsample).eval()
    with torch.device("meta"):
        empty = rb.create_model("resnet20", downsample=rb.blur_downsample).eval()
    loaded = to_device(empty)
    loaded.load_state_dict(net.state_dict(), assign=True)
    x = image(3, 16)
    assert torch.equal(loaded(x), net(x))


@pytest.mark.parametrize("size", [5, 8])
def test_blur_pool_equals_timm(size):
    ours, theirs = rb.BlurPool(4, 2, border="reflect"), timm.layers.BlurPool2d(4, filt_size=3, stride=2)
    x = image(4, size)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("border", ["replicate", "reflect"])
def test_compiled_blur_pool_pads_alike(dims, border):
    x = image(4, 5, dims)
    assert torch.equal(pad_apart(x, dims, 1, border), nn.functional.pad(x, (1, 1) * dims, mode=border))
    pool = rb.BlurPool(4, 2, dims, border)
    torch.testing.assert_close(torch.compile(pool, backend="aot_eager")(x), pool(x))
    assert torch.equal(pad_apart(x[0], dims, 1, border), pad_apart(x, dims, 1, border)[0])


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 7, 9])
@pytest.mark.parametrize(("border", "dilation"), [("replicate", 2), ("replicate", 3), ("reflect", 2), ("constant", 2)])
def test_dilated_blur_pool_blurs_each_map_of_positions_that_lie_apart(size, border, dilation):
    x = image(4, size, 1)
    pool, dilated = rb.BlurPool(4, 1, 1, border), rb.BlurPool(4, 1, 1, border, dilation)
    if border == "reflect" and size <= dilation:
        with pytest.raises(ValueError, match="border must be replicate or constant on maps of one position"):
            dilated(x)
        return
    blurred = dilated(x)
    maps = [slice(start, None, dilation) for start in range(min(dilation, size))]
    for apart in maps if border != "reflect" else maps[: size - dilation]:  # a map of one position reflects nothing
        torch.testing.assert_close(blurred[..., apart], pool(x[..., apart]))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_blur_pool_keeps_a_constant_map(dims, size):
    y = rb.blur_downsample[dims - 1](4, 2)(torch.full((1, 4, *[size] * dims), 3.0))
    torch.testing.assert_close(y, torch.full((1, 4, *[-(-size // 2)] * dims), 3.0))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_average_downsample_means_the_positions_that_exist(dims, size):
    pool = rb.average_downsample[dims - 1](1, 2)
    x = torch.arange(float(size)).expand(1, 1, *[size] * dims)
    line = torch.tensor([chunk.mean() for chunk in torch.arange(float(size)).split(2)])
    torch.testing.assert_close(pool(x), line.expand(1, 1, *[-(-size // 2)] * dims))


@pytest.mark.parametrize(
    ("layer", "said"),
    [(rb.WSConv2d(3, 4, 3, eps=0.1), "eps=0.1"), (rb.LayerScale(4, 0.5), "initial=0.5"), (rb.Gated(4), "start=-2.0")],
    ids=lambda value: type(value).__name__,
)
def test_settings_that_change_the_result_are_in_the_repr_which_config_compares(layer, said):
    assert said in layer.extra_repr()


def test_norms_that_are_frozen_stay_so():
    net = rb.freeze_norm(nn.Sequential(nn.BatchNorm2d(4)))
    frozen = net[0]
    assert rb.freeze_norm(net)[0] is frozen


class ScaledConv(rb.WSConv2d):
    """A standardised convolution of a user that keeps the size of its map."""


def test_standardised_convolution_of_ones_own_needs_no_norm():
    assert isinstance(rb.BasicBlock(4, 4, conv=ScaledConv, norm=None).branch.conv1, ScaledConv)
    with pytest.raises(ValueError, match="conv must have a norm behind it"):
        rb.BasicBlock(4, 4, conv=rb.WSConv2d, norm=None)
