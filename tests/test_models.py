"""The named nets: the table, its patterns, and depths off the grid."""

import pytest

from resblocks import PreActBasicBlock, create_model, list_models, residuals
from resblocks.models import cifar_densenet, cifar_preact_bottleneck_resnet, cifar_resnet, cifar_resnext, wide_resnet


def test_list_models_takes_a_shell_pattern():
    assert list_models("wrn_*") == ["wrn_16_4", "wrn_16_8", "wrn_28_10", "wrn_40_4"]
    assert len(list_models()) == len(set(list_models())) >= 40
    assert list_models("vgg*") == []


def test_options_override_the_table():
    net = create_model("resnet20", shortcut="B", num_classes=4, device="meta")
    assert net.num_classes == 4
    assert any("shortcut" in name for name in net.state_dict())


def test_block_and_widths_override_the_table():
    net = create_model("resnet20", block=PreActBasicBlock, widths=(16, 24, 32), depths=(1, 1, 1), device="meta")
    assert net.stage_channels == (16, 24, 32)
    assert [type(block) for block in residuals(net).values()] == [PreActBasicBlock] * 3
    assert create_model("densenet121", growth_rate=8, device="meta").stage_channels[0] == 16 + 6 * 8
    assert create_model("wrn_16_4", widen_factor=2, device="meta").num_features == 128


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"num_clases": 3},
            r"ResNet takes no num_clases \(did you mean 'num_classes'\?\); the options are ",
        ),
        ({"pretrained": True}, r"takes no pretrained: resblocks\.interop\.pretrained\('resnet18'\)"),
    ],
)
def test_unknown_option_raises(options, text):
    with pytest.raises(TypeError, match=text):
        create_model("resnet18", **options)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (
            lambda: create_model("resnet19"),
            r"name must be one of the \d+ named nets, got 'resnet19'; did you mean resnet",
        ),
        (lambda: create_model("vgg"), r"list_models\(\) shows them all"),
        (lambda: create_model("resnet50d"), r"one of timm's: resblocks\.interop\.TIMM\['resnet50d'\]\(\) builds it"),
        (lambda: cifar_resnet(55), r"depth must be 6n \+ 2 \(nearest: 50, 56\), got 55"),
        (lambda: cifar_resnet(2), r"depth must be 6n \+ 2 \(nearest: 8, 14\), got 2"),
        (lambda: cifar_preact_bottleneck_resnet(110 + 1), r"depth must be 9n \+ 2 \(nearest: 110, 119\), got 111"),
        (lambda: wide_resnet(28 + 1, 10), r"depth must be 6n \+ 4"),
        (lambda: wide_resnet(28, 0), "widen_factor must be an integer of at least 1, got 0"),
        (lambda: cifar_resnext(30, 8, 64), r"depth must be 9n \+ 2"),
        (lambda: cifar_densenet(101, 12), r"depth must be 6n \+ 4"),
        (lambda: cifar_densenet(41, 12, bottleneck=False), r"depth must be 3n \+ 4"),
    ],
)
def test_bad_name_or_depth_raises(build, text):
    with pytest.raises(ValueError, match=text):
        build()
