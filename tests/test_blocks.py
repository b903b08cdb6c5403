"""The blocks: what the figures say, what torch does to a module, and what they refuse."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torchvision
from torch import nn

import resblocks as rb
from tests.blocks import BLOCKS, DENSE_BLOCKS, SUM_BLOCKS, image, trains_every_parameter

DIMS = pytest.mark.parametrize("dims", [1, 2, 3])
EVERY_BLOCK = pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
EVERY_SUM_BLOCK = pytest.mark.parametrize("block", SUM_BLOCKS.values(), ids=SUM_BLOCKS)


@EVERY_BLOCK
@DIMS
@pytest.mark.parametrize("skip", [True, False])
def test_block_works_alone(block, dims, skip):
    module = block(16, 32, dims=dims, skip=skip)
    y = trains_every_parameter(module, image(16, 5, dims))
    assert y.shape == (3, module.out_channels, *[5] * dims)


@EVERY_SUM_BLOCK
def test_plain_block_owns_no_shortcut_weights_and_shares_the_rest(block):
    residual, plain = block(16, 32, 2), block(16, 32, 2, skip=False)
    kept = {name for name in residual.state_dict() if not name.startswith("shortcut")}
    assert set(plain.state_dict()) == kept
    assert plain.shortcut is None


@EVERY_BLOCK
@pytest.mark.parametrize("options", [{}, {"dropout": 0.2}], ids=["default", "dropout"])
def test_block_survives_copies(block, options):
    module = block(16, 32, **options).eval()
    x = image()
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(other(x), module(x), rtol=0, atol=0)
    fresh = block(16, 32, **options).eval()
    fresh.load_state_dict(module.state_dict())
    torch.testing.assert_close(fresh(x), module(x), rtol=0, atol=0)


@EVERY_BLOCK
@pytest.mark.parametrize(
    "options", [{}, {"attention": rb.CBAM}, {"merge": rb.Gated}, {"scale": rb.Fixup, "norm": None}]
)
def test_block_from_meta_equals_block_built_under_the_same_seed(block, options):
    if options and block not in SUM_BLOCKS.values():
        options = {}
    meta = block(16, 32, device="meta", **options)
    assert all(parameter.is_meta for parameter in meta.parameters())
    torch.manual_seed(3)
    built = block(16, 32, **options).state_dict()
    empty = meta.to_empty(device="cpu")
    for tensor in empty.state_dict().values():
        tensor.fill_(7)
    torch.manual_seed(3)
    rb.init_weights(empty)
    for name, value in empty.state_dict().items():
        assert torch.equal(value, built[name]), name


@EVERY_BLOCK
def test_block_takes_dtype(block):
    module = block(16, 32, dtype=torch.float64)
    assert {p.dtype for p in module.parameters()} == {torch.float64}
    assert module(image(dtype=torch.float64)).dtype == torch.float64


@EVERY_BLOCK
def test_gradients_equal_finite_differences(block):
    module = block(8, 16, norm=partial(rb.group_norm, groups=2), activation=nn.Tanh, dtype=torch.float64)
    x = image(8, 3, batch=1, dtype=torch.float64, requires_grad=True)
    names, values = zip(*module.named_parameters(), strict=True)

    def run(x, *values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True)


HOOKED = [
    {},
    {"norm": None, "activation": nn.SiLU, "dropout": 0.3},
    {"norm": rb.LayerNorm, "conv": rb.weight_standardised},
    {"attention": rb.SE, "shortcut": "A", "drop_path": 0.3},
    {"attention": rb.ECA, "shortcut": "C", "scale": rb.LayerScale},
    {"attention": rb.CBAM, "shortcut": "D", "merge": rb.Gated},
    {"downsample": rb.blur_downsample, "merge": rb.WeightedAdd, "norm": rb.instance_norm},
    {"downsample": rb.average_downsample, "scale": rb.Fixup, "norm": None},
    {"skip": False, "norm": rb.group_norm},
]


@EVERY_BLOCK
@pytest.mark.parametrize("options", HOOKED, ids=lambda options: "-".join(options) or "default")
def test_hooks_see_values_that_are_not_overwritten(block, options):
    if block in DENSE_BLOCKS.values():
        options = {
            key: value for key, value in options.items() if key in ("norm", "activation", "dropout", "conv", "skip")
        }
    module = block(16, 32, **options) if block in DENSE_BLOCKS.values() else block(16, 32, 2, **options)
    seen, called = [], set()

    def forward_hook(layer, args, out):
        called.add(layer)
        seen.append((out, out.detach().clone()))

    def backward_hook(layer, grad_in, grad_out):
        for grad in (*grad_in, *grad_out):
            if grad is not None:
                seen.append((grad, grad.clone()))

    for layer in module.modules():
        layer.register_forward_hook(forward_hook)
        layer.register_full_backward_hook(backward_hook)
    module(image(requires_grad=True)).square().sum().backward()
    plain = options.get("skip") is False
    silent = {"shortcut", "merge", "scale", "drop_path"} if plain else set()
    for name, layer in module.named_modules():
        assert layer in called or set(name.split(".")) & silent, name
    assert all(torch.equal(value, then) for value, then in seen)


@EVERY_BLOCK
def test_block_keeps_channels_last(block):
    module = block(16, 32).to(memory_format=torch.channels_last)
    x = image().contiguous(memory_format=torch.channels_last)
    y = module(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    plain = copy.deepcopy(module).to(memory_format=torch.contiguous_format)
    torch.testing.assert_close(y, plain(x.contiguous()), rtol=1e-4, atol=1e-4)


def copied_from_torchvision(ours, theirs):
    """Copy weights by order, which is that of the figure in both."""
    branch = [
        theirs.get_submodule(name) for name in ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3") if hasattr(theirs, name)
    ]
    shortcut = list(theirs.downsample) if theirs.downsample is not None else []
    layers = [layer for layer in ours.modules() if isinstance(layer, nn.Conv2d | nn.BatchNorm2d)]
    for mine, other in zip(layers, branch + shortcut, strict=True):
        mine.load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("resnet18", rb.BasicBlock),
        ("resnet50", rb.Bottleneck),
        ("resnext50_32x4d", rb.ResNeXtBlock),
        ("wide_resnet50_2", partial(rb.Bottleneck, base_width=128)),
    ],
)
@pytest.mark.parametrize("number", [0, 1], ids=["projection", "identity"])
def test_block_equals_torchvision(name, ours, number):
    theirs = getattr(torchvision.models, name)().layer2[number]
    in_channels = theirs.conv1.in_channels
    out_channels = (theirs.conv3 if hasattr(theirs, "conv3") else theirs.conv2).out_channels
    block = ours(in_channels, out_channels, 2 if number == 0 else 1)
    copied_from_torchvision(block, theirs)
    x = image(in_channels, 6)
    torch.testing.assert_close(block(x), theirs(x), rtol=0, atol=0)
    for mine, other in zip(block.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


AT_FIRST = partial(rb.Bottleneck, stride_first=True)


@pytest.mark.parametrize("downsample", [None, rb.average_downsample])
@pytest.mark.parametrize(("block", "place"), [(rb.Bottleneck, "2"), (AT_FIRST, "1")])
def test_bottleneck_reduces_the_resolution_in_one_place(block, place, downsample):
    branch = block(16, 32, stride=2, downsample=downsample).branch
    strided = [name for name, layer in branch.named_children() if getattr(layer, "stride", (1, 1)) not in ((1, 1), 1)]
    assert strided == [f"conv{place}" if downsample is None else f"pool{place}"]


@pytest.mark.parametrize("block", [rb.BasicBlock, rb.Bottleneck, AT_FIRST, rb.PreActBasicBlock, rb.PreActBottleneck])
def test_groups_reach_every_3x3_convolution(block):
    convolutions = [layer for layer in block(16, 16, groups=2).branch if isinstance(layer, nn.Conv2d)]
    assert {layer.groups for layer in convolutions if layer.kernel_size == (3, 3)} == {2}


@pytest.mark.parametrize("block", [rb.Bottleneck, rb.PreActBottleneck, partial(rb.ResNeXtBlock, cardinality=1)])
@pytest.mark.parametrize("base_width", [32, 128])
def test_inner_width_follows_base_width_and_expansion(block, base_width):
    assert block(16, 64, base_width=base_width, expansion=2).branch.conv2.out_channels == base_width // 2


def test_dilation_reaches_dense_layers():
    assert rb.DenseLayer(8, 16, dilation=2).branch.conv2.dilation == (2, 2)


def test_preact_block_shares_the_first_activation_where_the_shape_changes():
    projecting, same = rb.PreActBasicBlock(8, 16, 2), rb.PreActBasicBlock(8, 8)
    assert [name for name, _ in projecting.preact.named_children()] == ["norm1", "act1"]
    assert isinstance(same.preact, nn.Identity)
    assert next(iter(same.branch._modules)) == "norm1"
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in projecting.shortcut.modules())


def test_dense_layer_keeps_its_input():
    layer = rb.DenseLayer(6, 10)
    x = image(6)
    y = layer(x)
    assert torch.equal(y[:, :6], x)
    torch.testing.assert_close(y[:, 6:], layer.branch(x))


def test_dense_block_equals_concatenation_by_hand():
    block = rb.DenseBlock(6, 18, growth_rate=4).eval()
    x = features = image(6)
    for layer in block:
        features = torch.cat([features, layer.branch(features)], 1)
    torch.testing.assert_close(block(x), features)


def test_dense_block_without_skip_chains_its_layers():
    block = rb.DenseBlock(6, 18, growth_rate=4, skip=False)
    assert block.out_channels == 4
    assert block(image(6)).shape[1] == 4


def test_wide_block_drops_between_its_convolutions():
    assert list(rb.WideBlock(8, 8, dropout=0.3).branch._modules) == [
        "norm1", "act1", "conv1", "norm2", "act2", "dropout", "conv2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: rb.BasicBlock(0, 8), "in_channels must be an integer of at least 1, got 0"),
        (lambda: rb.BasicBlock(8, 8, 1.5), "stride must be an integer of at least 1, got 1.5"),
        (lambda: rb.BasicBlock(8, 12, groups=8), "groups must divide out_channels of the convolution, got groups=8"),
        (lambda: rb.Bottleneck(8, 30), "out_channels must be a multiple of expansion, got 30 with expansion=4"),
        (lambda: rb.Bottleneck(64, 60, groups=32, base_width=1), "out_channels must leave each group a channel"),
        (lambda: rb.Bottleneck(8, 16, stride_first=1), "stride_first must be True or False, got 1"),
        (lambda: rb.Bottleneck(8, 16, base_width=0), "base_width must be an integer of at least 1, got 0"),
        (lambda: rb.ResNeXtBlock(8, 16, cardinality=0), "groups must be an integer of at least 1, got 0"),
        (lambda: rb.DenseLayer(8, 8), "out_channels must be above in_channels"),
        (lambda: rb.DenseLayer(8, 12, 2), "stride must be 1 in a dense block"),
        (lambda: rb.DenseLayer(8, 12, bn_size=0), "bn_size must be an integer of at least 1, got 0"),
        (lambda: rb.DenseBlock(8, 13, growth_rate=4), "out_channels - in_channels must be a multiple of growth_rate"),
        (lambda: rb.DenseBlock(8, 40, shortcut="A"), "shortcut has no meaning in a dense block"),
        (lambda: rb.DenseBlock(8, 40, scale=rb.ReZero), "scale has no meaning in a dense block"),
        (lambda: rb.Transition(8, 0), "out_channels must be an integer of at least 1, got 0"),
        (lambda: rb.Transition(8, 8, 0), "stride must be an integer of at least 1, got 0"),
    ],
)  # fmt: skip
def test_bad_block_raises(build, text):
    with pytest.raises(ValueError, match=text.replace("(", r"\(")):
        build()


@pytest.mark.parametrize("block", [*BLOCKS.values(), rb.Transition], ids=[*BLOCKS, "transition"])
def test_unknown_option_raises_and_names_the_nearest(block):
    with pytest.raises(TypeError, match=r"unknown option 'nrom' \(did you mean 'norm'\?\); the options are dims, conv"):
        block(16, 32, nrom=None)


def test_one_pixel_of_one_sample_raises_the_message_of_torch():
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        rb.BasicBlock(4, 4)(image(4, 1, batch=1))


@EVERY_BLOCK
@pytest.mark.parametrize("stride", [(2, 2, 2), (2, 0), "2", None, 0])
def test_stride_that_is_no_number_is_named(block, stride):
    with pytest.raises(ValueError, match="stride must be "):
        block(16, 32, stride)
