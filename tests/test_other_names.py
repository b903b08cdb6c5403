"""Nets of transformers, MONAI, pytorchcv and torchvision.video are the nets that the tables say; so are your own."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import theirs
import torch
from blocks import count, image, trains_every_parameter
from test_interop import assert_same, randomise, shapes
from torch import nn

from resblocks import (
    SE,
    BasicBlock,
    Bottleneck,
    DenseNet,
    LayerScale,
    ResNet,
    average_downsample,
    create_model,
    draw_like_torch,
    from_config,
    group_norm,
    to_config,
    weight_standardised,
)
from resblocks.fuse import fuse
from resblocks.interop import (
    NAMES,
    FactorisedBlock,
    biased_projection,
    centred_padding,
    differences,
    load,
    spatial_convolution,
    to_vocabulary,
    unstrided_stem,
)
from resblocks.interop.vocabularies import VOCABULARIES
from resblocks.interop.words import translate

pytest.importorskip("monai")
pytest.importorskip("pytorchcv")
pytest.importorskip("transformers")

# One or two for each thing that a table can get wrong: stem, block, shortcut, attention, transition, head.
FAMILIES = (
    *("transformers:resnet-18", "transformers:resnet-26", "monai:resnet10", "pytorchcv:resnet10"),
    *("pytorchcv:resnetbc26b", "pytorchcv:seresnet10", "pytorchcv:resnext14_32x2d", "pytorchcv:resnet20_cifar10"),
    *("pytorchcv:resnet164bn_cifar10", "pytorchcv:preresnet20_svhn", "pytorchcv:preresnet164bn_cifar10"),
    *("pytorchcv:seresnet20_cifar10", "pytorchcv:resnext20_32x2d_cifar100", "pytorchcv:wrn16_10_cifar10"),
    *("pytorchcv:resnet50", "pytorchcv:densenet40_k12_cifar10", "pytorchcv:densenet40_k12_bc_cifar10"),
)


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    library, _, short = name.partition(":")
    return theirs.BUILD[library](short), NAMES[library][short]()


@pytest.mark.parametrize("name", FAMILIES)
def test_net_gives_equal_logits_and_gradients(name: str) -> None:
    torch.manual_seed(0)
    model, net = pair(name)
    assert load(net, randomise(model)) == []
    size = (1, 16, 16, 16) if name.startswith("monai") else (3, 32, 32)
    assert_same(net, model, torch.randn(2, *size))


@pytest.mark.parametrize("name", NAMES["torchvision.video"])
def test_video_net_is_fused_and_recomputed_like_any_other(name: str) -> None:
    torch.manual_seed(0)
    build, small = NAMES["torchvision.video"][name], {"depths": (1, 1, 1, 1), "widths": (8, 16, 16, 16)}
    net, x = build(**small), torch.randn(2, 3, 4, 16, 16)
    rebuilt = build(**small, checkpoint="norms")
    rebuilt.load_state_dict(net.state_dict())
    for one in (net, rebuilt):
        one(x).square().sum().backward()
    for again, once in zip(rebuilt.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(again.grad, once.grad, rtol=0, atol=0)
    torch.testing.assert_close(fuse(net.eval())(x), net(x), rtol=1e-4, atol=1e-5)


def test_mixed_net_stays_mixed_with_another_convolution() -> None:
    net = NAMES["torchvision.video"]["mc3_18"](depths=(1, 1, 1, 1), conv=weight_standardised)
    assert [stage[0].branch.conv1.kernel_size for stage in net.stages] == [(3, 3, 3), *[(1, 3, 3)] * 3]


def test_any_net_of_videos_can_look_at_each_image_alone() -> None:
    net = NAMES["torchvision.video"]["r3d_18"](depths=(1, 1, 1, 1), conv=spatial_convolution).eval()
    assert {conv.kernel_size[0] for conv in net.modules() if isinstance(conv, nn.Conv3d)} == {1}
    images = torch.randn(1, 3, 1, 16, 16)
    torch.testing.assert_close(net(images.expand(-1, -1, 8, -1, -1)), net(images))


@pytest.mark.parametrize(
    ("name", "convolutions", "stem"),
    [
        ("r3d_18", ["Conv3DSimple"] * 4, "BasicStem"),
        ("mc3_18", ["Conv3DSimple"] + ["Conv3DNoTemporal"] * 3, "BasicStem"),
        ("r2plus1d_18", ["Conv2Plus1D"] * 4, "R2Plus1dStem"),
    ],
)
def test_video_net_gives_equal_logits_and_gradients(name: str, convolutions: list[str], stem: str) -> None:
    from torchvision.models.video import resnet

    torch.manual_seed(0)
    made_of: Any = [getattr(resnet, convolution) for convolution in convolutions]
    model = resnet.VideoResNet(resnet.BasicBlock, made_of, [1, 1, 1, 1], getattr(resnet, stem))
    net = NAMES["torchvision.video"][name](depths=(1, 1, 1, 1))
    assert load(net, randomise(model)) == []
    assert shapes(to_vocabulary(net, "torchvision.video")) == shapes(model.state_dict())
    assert_same(net, model, torch.randn(2, 3, 4, 16, 16))


def test_factorised_block_takes_every_option_of_a_block() -> None:
    options: Any = {"norm": group_norm, "activation": nn.ELU, "dropout": 0.5, "attention": SE, "shortcut": "D"}
    block = FactorisedBlock(8, 16, (1, 2, 2), drop_path=0.5, scale=LayerScale, **options)
    assert (count(block, nn.GroupNorm), count(block, nn.ELU), count(block, nn.Dropout)) == (5, 4, 1)
    assert trains_every_parameter(block, image(8, 6, dims=3)).shape == (3, 16, 6, 3, 3)
    dilated = FactorisedBlock(8, 8, dilation=2, skip=False)
    assert {conv.dilation for conv in dilated.modules() if isinstance(conv, nn.Conv3d)} == {(2, 2, 2)}
    assert dilated(image(8, 6, dims=3)).shape == (3, 8, 6, 6, 6)
    net = ResNet(FactorisedBlock, (1, 1), (8, 16), dims=3, stem="cifar", stem_width=8, output_stride=1)
    assert net.features(image(3, 6, dims=3))[1].shape == (3, 16, 6, 6, 6)
    pooled = FactorisedBlock(8, 16, 2, downsample=average_downsample)
    assert {conv.stride for conv in pooled.modules() if isinstance(conv, nn.Conv3d)} == {(1, 1, 1)}
    assert pooled(image(8, 6, dims=3)).shape == (3, 16, 3, 3, 3)


def test_factorised_block_has_the_weights_of_the_basic_block_and_is_for_videos_alone() -> None:
    pairs = [sum(weight.numel() for weight in block(64, 64, dims=3).branch.parameters() if weight.dim() > 1)
             for block in (FactorisedBlock, BasicBlock)]  # fmt: skip
    assert pairs == [64 * 144 * 9 * 2 + 144 * 64 * 3 * 2, 64 * 64 * 27 * 2]
    assert pairs[0] == pairs[1]
    with pytest.raises(ValueError, match="dims must be 3 in a block for videos, got 2"):
        FactorisedBlock(8, 8, dims=2)
    with pytest.raises(ValueError, match="out_channels must be an integer of at least 1, got 0"):
        FactorisedBlock(8, 0)


def test_dense_net_of_monai_gives_equal_logits_and_gradients() -> None:
    from monai.networks.nets import DenseNet as Monai

    torch.manual_seed(0)
    model = Monai(spatial_dims=1, in_channels=1, out_channels=4, init_features=16, growth_rate=8, block_config=(2, 2))
    net = DenseNet(growth_rate=8, depths=(2, 2), in_channels=1, num_classes=4, dims=1)
    assert load(net, randomise(model)) == []
    assert shapes(to_vocabulary(net, "monai")) == shapes(model.state_dict())
    assert_same(net, model, torch.randn(4, 1, 64))


OTHERS = [f"{library}:{name}" for library in [*theirs.BUILD][1:] if library != "timm" for name in NAMES[library]]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in FAMILIES else pytest.mark.slow)
        for name in OTHERS
        if name in FAMILIES or not theirs.is_another_head(name)
    ],
)
def test_name_has_its_keys_and_shapes(name: str) -> None:
    with torch.device("meta"):
        model, net = pair(name)
    assert shapes(to_vocabulary(net, name.partition(":")[0])) == shapes(model.state_dict())
    assert to_config(from_config(to_config(net))) == to_config(net)


def test_medical_net_with_padded_shortcuts_gives_equal_logits_and_gradients_that_monai_cuts() -> None:
    torch.manual_seed(0)
    model, net = pair("monai:resnet18")
    assert load(net, randomise(model)) == []
    found = differences(net, model, torch.randn(2, 1, 16, 16, 16))
    assert max(found["logits"], found["train_logits"]) < 1e-6
    assert found["input_gradient"] > 0.1  # MONAI's shortcut A takes x.data: no gradient flows through it


@pytest.mark.parametrize(
    ("theirs_options", "ours"),
    [
        ({}, {"stem": unstrided_stem}),
        ({"conv1_t_stride": 2}, {}),
        ({"conv1_t_stride": 2, "no_max_pool": True}, {"stem_pool": nn.Identity}),
        ({"conv1_t_stride": 2, "bias_downsample": False}, {"shortcut": "B"}),
        ({"conv1_t_stride": 2, "widen_factor": 0.5}, {"widths": (32, 64, 128, 256), "stem_width": 32}),
    ],
)
def test_options_of_monai_have_the_words_that_the_page_says(theirs_options: Any, ours: Any) -> None:
    from monai.networks.nets import ResNet as Monai

    torch.manual_seed(0)
    blocks: Any = ("basic", [1, 1, 1, 1], [64, 128, 256, 512])
    model = randomise(Monai(*blocks, spatial_dims=1, n_input_channels=2, num_classes=3, **theirs_options))
    options = {"depths": (1, 1, 1, 1), "shortcut": biased_projection, **ours}
    net = create_model("resnet18", dims=1, in_channels=2, num_classes=3, **options)
    assert load(net, model) == []
    assert_same(net, model, torch.randn(4, 2, 64))


def test_biased_projection_is_that_of_monai() -> None:
    from monai.networks.nets import resnet10

    torch.manual_seed(0)
    model = randomise(resnet10(spatial_dims=2, n_input_channels=3, num_classes=5))
    options: dict[str, Any] = {"depths": (1, 1, 1, 1), "stem": unstrided_stem, "shortcut": biased_projection}
    net = create_model("resnet18", num_classes=5, **options)
    assert to_config(from_config(to_config(net))) == to_config(net)
    assert load(net, model) == []
    assert_same(net, model, torch.randn(2, 3, 32, 32))
    net.init_weights(draw_like_torch)
    assert net.get_parameter("stages.1.0.shortcut.conv.bias") is not None


@pytest.mark.parametrize(
    ("theirs_options", "ours"),
    [
        ({"downsample_in_bottleneck": True}, {"block": partial(Bottleneck, stride_first=True)}),
        ({"downsample_in_first_stage": True}, {"strides": (2, 2)}),
        ({}, {"num_classes": 0}),
    ],
)
def test_options_of_transformers_have_the_words_that_the_page_says(theirs_options: Any, ours: Any) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification, ResNetModel

    torch.manual_seed(0)
    config = ResNetConfig(depths=[1, 2], hidden_sizes=[256, 512], num_labels=3, **theirs_options)
    model = randomise((ResNetModel if "num_classes" in ours else ResNetForImageClassification)(config))
    net = create_model("resnet50", **{"depths": (1, 2), "widths": (256, 512), "num_classes": 3, **ours})
    assert load(net, model) == []
    assert shapes(to_vocabulary(net, "transformers")) == shapes(model.state_dict())
    assert_same(net, model, torch.randn(2, 3, 32, 32))


def test_model_that_puts_out_no_tensor_is_refused() -> None:
    class Lists(nn.Module):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [model(x)]

    model = create_model("resnet20")
    net, lists = create_model("resnet20"), Lists()
    lists._modules.update(model._modules)
    with pytest.raises(ValueError, match="model must put out a tensor, or logits or pooler_output, got list"):
        differences(net, lists, torch.randn(1, 3, 8, 8))


def test_activation_of_timm_has_the_word_that_the_page_says() -> None:
    import timm

    torch.manual_seed(0)
    model = randomise(timm.create_model("resnet18", act_layer="silu", num_classes=3))
    net = NAMES["timm"]["resnet18"](activation=nn.SiLU, num_classes=3)
    assert load(net, model) == []
    assert_same(net, model, torch.randn(2, 3, 32, 32))


# --- the scripts for CIFAR that many repositories took over


def like_pytorch_cifar(name: str) -> str:
    """torchvision's name of a layer, as kuangliu/pytorch-cifar spells it."""
    return name.replace("downsample", "shortcut").replace("fc.", "linear.")


def test_checkpoint_of_pytorch_cifar_loads() -> None:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model = randomise(resnet18(num_classes=10))
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    state = {f"module.{like_pytorch_cifar(key)}": tensor for key, tensor in model.state_dict().items()}
    net = create_model("resnet18", stem="cifar", num_classes=10)
    assert load(net, {"net": state, "acc": 93.0, "epoch": 7}) == []
    assert_same(net, model, torch.randn(2, 3, 16, 16))
    assert {f"module.{key}" for key in to_vocabulary(net, "pytorch-cifar")} == state.keys()


@pytest.mark.parametrize("shortcut", [biased_projection, centred_padding])
def test_shortcuts_of_other_libraries_take_the_pool_of_downsample(shortcut: Callable[..., nn.Module]) -> None:
    block = BasicBlock(8, 16, 2, shortcut=shortcut, downsample=average_downsample)
    assert type(block.shortcut.pool) is type(block.branch.pool1) is nn.AvgPool2d
    assert block(torch.randn(2, 8, 6, 6)).shape == (2, 16, 3, 3)


def test_backbone_of_a_detector_loads() -> None:
    from torchvision.models import resnet50

    torch.manual_seed(0)
    model = randomise(resnet50())
    state = {}
    model.fc = nn.Identity()
    for key, tensor in model.state_dict().items():  # as detectron2 spells it, whose frozen norms count no batches
        layer = re.sub(r"^layer(\d)", lambda stage: f"res{int(stage[1]) + 1}", key).replace("downsample.0", "shortcut")
        layer = re.sub(r"bn(\d)", r"conv\1.norm", layer.replace("downsample.1", "shortcut.norm"))
        name = layer if layer.startswith("res") else f"stem.{layer}"
        if not name.endswith("num_batches_tracked"):
            state[f"backbone.bottom_up.{name}"] = tensor
    net = create_model("resnet50", num_classes=0)
    notes = load(net, {"model": {**state, "proposal_generator.anchors": torch.ones(1)}}, prefix="backbone.bottom_up.")
    assert [note.partition(":")[0] for note in notes] == [
        "1 keys that do not begin with 'backbone.bottom_up.'",
        "53 num_batches_tracked",
    ]
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(net.eval()(x), model.eval()(x))
    with pytest.raises(ValueError, match=r"prefix='backbone\.bottom_up\.' would find its names"):
        load(net, state)


@pytest.mark.parametrize("num_classes", [0, 100])
def test_head_tells_whose_names_they_are_where_it_is_dropped(num_classes: int) -> None:
    state = to_vocabulary(create_model("resnet20"), "pytorch-cifar")
    notes = load(create_model("resnet20", num_classes=num_classes), state, drop_head=True)
    assert notes[0] == "head.weight (pytorch-cifar: linear.weight): dropped, (10, 64) in the source"


def test_centred_padding_is_that_of_akamaster() -> None:
    x = torch.randn(2, 8, 6, 6)
    padded = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
    assert torch.equal(BasicBlock(8, 16, 2, shortcut=centred_padding).shortcut(x), padded)
    assert isinstance(BasicBlock(8, 8, shortcut=centred_padding).shortcut, nn.Identity)
    net, behind = create_model("resnet20", shortcut=centred_padding), create_model("resnet20")
    assert to_config(from_config(to_config(net))) == to_config(net)
    assert load(net, to_vocabulary(behind, "pytorch-cifar")) == []
    (doubt,) = load(behind, to_vocabulary(net, "pytorch-cifar"))
    assert doubt.endswith("akamaster's are on both sides (shortcut=centred_padding)")


# --- tables of one's own

OWN = {
    "stem.conv": "body.first",
    "stem.norm": "body.first_bn",
    "stages.{s}.{b}.branch.conv{n}": "body.level{s+1}.unit{b+1}.c{n-1}",
    "stages.{s}.{b}.branch.norm{n}": "body.level{s+1}.unit{b+1}.b{n-1}",
    "head": "top",
}


def test_table_of_ones_own_is_read_in_both_directions() -> None:
    net, other = create_model("resnet20"), create_model("resnet20")
    state = to_vocabulary(other, OWN)
    assert {"body.first.weight", "body.level2.unit1.c0.weight", "top.bias"} < state.keys()
    assert load(net, state, vocabulary=OWN) == []
    assert all(torch.equal(weight, other.get_parameter(name)) for name, weight in net.named_parameters())
    with pytest.raises(
        ValueError, match=r"missing in the source: stages\.1\.0\.branch\.conv1.* \(your table: body\.lev"
    ):
        load(net, {key: tensor for key, tensor in state.items() if "level2" not in key}, vocabulary=OWN)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"stem.conv": "a"}, "must have a name in your table, but these have none: stem.norm"),
        ({"stages.{s}.{b}": "layer{s}"}, "must have the same numbers in both names, got 'stages.{s}.{b}': 'layer{s}'"),
        ({"stem.conv": 3}, "must give names of layers as text, got 'stem.conv': 3"),
        ({"stages.{0}.{b}": "c{0}.{b}"}, "must have numbers as {s}, {stage} or {s+1}, got 'stages.{0}.{b}'"),
        ({"stages.{s + 1}": "c{s}"}, "must have numbers as {s}, {stage} or {s+1}, got 'stages.{s + 1}'"),
        (["stem.conv"], "vocabulary must be one of resblocks, torchvision"),
        (
            {**OWN, "stages.{s}.{b}.branch.norm{n}": "b{s}{b}{n}", "stem.norm": "b001"},
            "a name for each layer, got 'b001.weight' for stem.norm.weight and stages.0.0.branch.norm1.weight",
        ),
    ],
)
@pytest.mark.parametrize("call", [lambda net, t: to_vocabulary(net, t), lambda net, t: load(net, {}, vocabulary=t)])
def test_table_that_cannot_be_is_refused(table: Any, said: str, call: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        call(create_model("resnet20"), table)


def test_table_of_ones_own_needs_no_pools_and_takes_pointwise_convolutions() -> None:
    import timm

    table = {
        "stem.conv": "conv1",
        "stem.norm": "bn1",
        "stages.{stage}.{block}.branch.conv{n}": "layer{stage+1}.{block}.conv{n}",
        "stages.{stage}.{block}.branch.norm{n}": "layer{stage+1}.{block}.bn{n}",
        "stages.{stage}.{block}.branch.attention.reduce": "layer{stage+1}.{block}.se.fc1",
        "stages.{stage}.{block}.branch.attention.expand": "layer{stage+1}.{block}.se.fc2",
        "stages.{stage}.{block}.shortcut.conv": "layer{stage+1}.{block}.downsample.0",
        "stages.{stage}.{block}.shortcut.norm": "layer{stage+1}.{block}.downsample.1",
        "head": "fc",
    }
    model, net = timm.create_model("seresnet18"), NAMES["timm"]["seresnet18"]()
    assert load(net, model, vocabulary=table) == []
    assert max(differences(net, model, torch.randn(2, 3, 32, 32), vocabulary=table).values()) < 1e-4


def test_number_that_comes_twice_in_a_name_is_one_number() -> None:
    table = {"a{s}": "stage{s+1}.trans{s+1}"}
    assert translate("a3", table) == "stage4.trans4"
    back = {theirs: ours for ours, theirs in table.items()}
    assert translate("stage4.trans4", back) == "a3"
    assert translate("stage4.trans5", back) is None
    assert translate("stage0.trans0", back) is None  # would be a-1


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_no_two_layers_of_a_table_have_one_name(vocabulary: str) -> None:
    may_share = {"stages.{s}.{b}.preact.norm{n}", "stem.conv"}  # a norm is in either place, one or three convolutions
    for table in VOCABULARIES[vocabulary]:
        names = [name for ours, name in table.items() if ours not in may_share]
        assert len(names) == len({*names})
