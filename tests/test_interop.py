"""Weights in and out: every name of the tables is the net it says, and what does not fit is named and not loaded."""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import resblocks as rb
from resblocks import PreActBasicBlock, ResNet, create_model, skips_off
from resblocks.attention import CBAM
from resblocks.fuse import fuse
from resblocks.interop import TIMM, TIMM_OUT, TORCHVISION, differences, load, to_timm, to_torchvision
from resblocks.interop.compare import _apart
from resblocks.interop.weights import plain_names, read
from resblocks.layers import WSConv2d, freeze_norm, group_norm, weight_standardised

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")
safetensors = pytest.importorskip("safetensors.torch")

# One name or two for each thing that a table of names can get wrong: stem, shortcut, attention, pool, norm, width.
FAMILIES = (
    *("resnet18", "resnet10t", "resnet50", "resnet50c", "resnet50s", "resnet50d", "resnet50_gn", "wide_resnet50_2"),
    *("resnext50_32x4d", "resnetrs50", "resnetblur18", "resnetblur50d", "resnetaa34d", "resnetaa50"),
    *("seresnet18", "seresnext26t_32x4d", "seresnetaa50d", "ecaresnet26t", "ecaresnetlight"),
    *("resnetv2_18", "resnetv2_18d", "resnetv2_50", "resnetv2_50t", "resnetv2_50d_gn"),
    *("densenet121", "densenet161", "densenet264d", "densenetblur121d"),
)
SHALLOW = (2, 1, 1, 1)


def randomise(model: nn.Module) -> nn.Module:
    """Random statistics and affine parameters, so that no norm is a no-op."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var") or (name.endswith("weight") and tensor.dim() == 1):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("running_mean") or tensor.dim() == 1:
                tensor.normal_(0, 0.1)
    return model


def assert_same(net: nn.Module, model: nn.Module, x: torch.Tensor) -> None:
    """The same logits and gradients but for rounding; where float32 leaves a doubt, float64 decides."""
    found = differences(net, model, x)
    if not all(value <= 1e-4 for value in found.values()):
        found = differences(net.double(), model.double(), x.double())
        assert all(value < 1e-8 for value in found.values()), found


def torchvision_net(num_classes: int = 1000, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(torchvision.models.resnet18(num_classes=num_classes))


def is_slow(name: str) -> list[pytest.MarkDecorator]:
    """The deepest names, whose thousands of layers take seconds to build."""
    deep = any(depth in name for depth in ("152", "200", "201", "269", "270", "350", "420"))
    return [pytest.mark.slow] if deep else []


# --- the tables


@pytest.mark.parametrize("name", FAMILIES)
def test_timm_family_gives_equal_logits_and_gradients(name: str) -> None:
    torch.manual_seed(0)
    depths = {"block_config" if name.startswith("densenet") else "layers": SHALLOW}
    model = randomise(timm.create_model(name, num_classes=10, **depths))
    net = TIMM[name](depths=SHALLOW, num_classes=10)
    assert load(net, model) == []
    assert_same(net, model, torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize("name", ["resnet50d", "seresnet18", "densenet121", "resnetv2_50x1_bit"])
def test_difference_in_float64_is_rounding(name: str) -> None:
    torch.manual_seed(0)
    if name == "resnetv2_50x1_bit":
        conv = partial(timm.layers.StdConv2d, eps=1e-8)
        model = timm.models.ResNetV2(SHALLOW, num_classes=10, stem_type="fixed", conv_layer=conv)
    else:
        depths = {"block_config" if name.startswith("densenet") else "layers": SHALLOW}
        model = timm.create_model(name, num_classes=10, **depths)
    net = TIMM[name](depths=SHALLOW, num_classes=10).double()
    assert load(net, randomise(model.double())) == []
    found = differences(net, model, torch.randn(2, 3, 32, 32, dtype=torch.float64))
    assert max(found.values()) < 1e-9, found


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_name_has_its_keys_and_shapes(name: str) -> None:
    with torch.device("meta"):
        model, net = torchvision.models.get_model(name, weights=None), TORCHVISION[name]()
    assert shapes(to_torchvision(net)) == shapes(model.state_dict())


@pytest.mark.parametrize("name", [pytest.param(name, marks=is_slow(name)) for name in TIMM])
def test_timm_name_has_its_keys_and_shapes(name: str) -> None:
    with torch.device("meta"):
        model, net = timm.create_model(name), TIMM[name]()
    assert shapes(to_timm(net)) == shapes(model.state_dict())


def shapes(state: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in state.items()}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", TIMM)
def test_timm_name_gives_equal_logits_and_gradients(name: str) -> None:
    torch.manual_seed(0)
    model, net = randomise(timm.create_model(name)), TIMM[name]()
    assert load(net, model) == []
    assert_same(net, model, torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", "densenet121"])
def test_torchvision_name_gives_equal_logits_and_gradients(name: str) -> None:
    torch.manual_seed(0)
    model, net = randomise(torchvision.models.get_model(name, weights=None)), TORCHVISION[name]()
    assert load(net, model) == []
    assert_same(net, model, torch.randn(2, 3, 64, 64))


def test_differences_sees_one_changed_weight() -> None:
    model, net = torchvision_net(10), create_model("resnet18", num_classes=10)
    load(net, model)
    with torch.no_grad():
        net.get_parameter("stages.2.1.branch.conv2.weight")[:, :, 1, 1] += 1
    before = {key: value.clone() for key, value in net.state_dict().items()}
    found = differences(net, model, torch.randn(2, 3, 32, 32))
    assert min(found.values()) > 1e-6
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert net.training


def test_differences_compares_frozen_parameters_and_leaves_them_frozen() -> None:
    model, net = torchvision_net(10), create_model("resnet18", num_classes=10)
    load(net, model)
    x = torch.randn(2, 3, 32, 32)
    expected = differences(net, model, x)
    net.stem.requires_grad_(False)
    model.layer1.requires_grad_(False)
    assert differences(net, model, x) == expected
    assert not any(weight.requires_grad for part in (net.stem, model.layer1) for weight in part.parameters())
    assert differences(freeze_norm(net), model, x)["logits"] == expected["logits"]


def test_differences_does_not_hide_a_nan() -> None:
    model, net = torchvision_net(10), create_model("resnet18", num_classes=10)
    load(net, model)
    net.get_parameter("stages.2.1.branch.conv2.weight").register_hook(lambda grad: grad * math.nan)
    assert math.isnan(differences(net, model, torch.randn(2, 3, 32, 32))["gradients"])


def test_every_name_of_timms_residual_files_is_in_or_out() -> None:
    files = [name for module in ("resnet", "resnetv2", "densenet", "senet") for name in timm.list_models(module=module)]
    others = [name for name in timm.list_models("*resne*") if not name.startswith(("vit_", "inception_"))]
    for name in {*files, *others}:
        out = [pattern for pattern in TIMM_OUT if fnmatch(name, pattern)]
        assert (name in TIMM) != bool(out), (name, out)


def test_every_reason_for_being_out_is_about_a_name_of_timm() -> None:
    names = timm.list_models()
    for pattern in TIMM_OUT:
        matched = [name for name in names if fnmatch(name, pattern)]
        assert matched, pattern
        assert not set(matched) & set(TIMM), pattern


def test_tables_are_as_long_as_said() -> None:
    assert set(TORCHVISION) == {
        name
        for name in torchvision.models.list_models(module=torchvision.models)
        if name.startswith(("resnet", "resnext", "wide_resnet", "densenet"))
    }
    assert len(TIMM) >= 60


# --- out and back


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_torchvision_takes_our_weights(name: str) -> None:
    net, model = create_model(name), torchvision.models.get_model(name, weights=None)
    model.load_state_dict(to_torchvision(net), strict=True)
    again = create_model(name)
    assert load(again, to_torchvision(net)) == []
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in again.state_dict().items())


@pytest.mark.parametrize("name", ["seresnet18", "ecaresnet26t", "resnetv2_18d", "densenetblur121d"])
def test_timm_takes_our_weights(name: str) -> None:
    net = TIMM[name]()
    timm.create_model(name).load_state_dict(to_timm(net), strict=True)
    again = TIMM[name]()
    assert load(again, to_timm(net), vocabulary="timm") == []
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in again.state_dict().items())


def test_layers_without_a_name_are_named() -> None:
    with pytest.raises(ValueError, match=r"every layer of the net must have a name in torchvision, .* stem\.conv1, "):
        to_torchvision(create_model("resnet18", stem="deep"))
    net = create_model("resnet20", attention=CBAM)
    with pytest.raises(ValueError, match=r"have none: .*stages\.0\.0\.branch\.attention\.spatial"):
        load(net, torchvision_net(), vocabulary="timm")


# --- files


def test_safetensors_file_loads(tmp_path: Path) -> None:
    model, net = torchvision_net(10), create_model("resnet18", num_classes=10)
    safetensors.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    assert load(net, tmp_path / "weights.safetensors") == []
    assert torch.equal(net.get_parameter("head.bias"), model.fc.bias)


@pytest.mark.parametrize(
    "wrap", [dict, lambda state: {"state_dict": state, "epoch": 3}, lambda state: {"model": state}]
)
def test_pt_file_loads(tmp_path: Path, wrap: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    model, net = torchvision_net(10), create_model("resnet18", num_classes=10)
    torch.save(wrap(model.state_dict()), tmp_path / "weights.pth")
    assert load(net, str(tmp_path / "weights.pth")) == []
    assert torch.equal(net.get_parameter("head.bias"), model.fc.bias)


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this must never run",))


def test_file_that_would_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"weight": _Payload()}, tmp_path / "weights.pt")
    with pytest.raises(
        ValueError, match=r"must hold tensors and plain types alone, 'weights\.pt' would call print when"
    ):
        read(tmp_path / "weights.pt")
    assert "never run" not in capsys.readouterr().out


class _Command:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("echo this must never run",))


def test_file_that_would_run_a_command_is_not_recommended(tmp_path: Path) -> None:
    torch.save({"weight": _Command()}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"would call (posix|nt)\.system when it is loaded.*: do not load it$"):
        read(tmp_path / "weights.pt")


def test_page_in_place_of_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_text("<html>404</html>")
    with pytest.raises(ValueError, match=r"'weights\.pt' is no file of torch\.save: was something else downloaded"):
        read(tmp_path / "weights.pt")


@pytest.mark.parametrize("content", ["", "<html>404</html>", "cut"])
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_file_that_is_not_whole_is_named(kind: str, content: str, tmp_path: Path) -> None:
    file = tmp_path / f"weights.{kind}"
    net = create_model("resnet20")
    torch.save(net.state_dict(), file) if kind == "pt" else safetensors.save_file(net.state_dict(), file)
    file.write_bytes(file.read_bytes()[:-1000] if content == "cut" else content.encode())
    with pytest.raises(ValueError, match=rf"^a file of weights must .*'weights\.{kind}'"):
        load(net, file)


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        (1, torch.zeros(2), "source must hold tensors by name, got Tensor under 1"),
        ("fc.bias", torch.zeros(2, device="meta"), "dense tensors with values, got a meta one under 'fc.bias'"),
        ("fc.bias", torch.zeros(2).to_sparse(), "dense tensors with values, got a torch.sparse_coo one under"),
    ],
)
def test_odd_source_is_refused_as_a_whole(name: Any, tensor: torch.Tensor, said: str) -> None:
    net, source = create_model("resnet18", num_classes=2), torchvision_net(2).state_dict()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=said):
        load(net, source | {name: tensor})
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("what", ["model", "args"])
def test_file_that_holds_more_than_tensors_says_what_to_do(tmp_path: Path, what: str) -> None:
    model = torchvision.models.resnet18(num_classes=3)
    held = {"model": model, "args": {"model": model.state_dict(), "args": argparse.Namespace(lr=0.1)}}[what]
    torch.save(held, tmp_path / "run.pth")
    net, kind = create_model("resnet18", num_classes=3), {"model": "torchvision", "args": "argparse.Namespace"}[what]
    with pytest.raises(ValueError, match=rf"'run.pth' holds also {kind}.*torch.load\('run.pth', weights_only=False\)"):
        load(net, tmp_path / "run.pth")
    assert load(net, torch.load(tmp_path / "run.pth", weights_only=False)) == []


def test_missing_weight_is_called_what_the_net_calls_it() -> None:
    net = ResNet(PreActBasicBlock, (1, 1), (8, 16), stem_width=8)
    missing = "stages.1.0.preact.norm1.weight"
    given = {key: value for key, value in to_timm(net).items() if not key.startswith("stages.1.blocks.0.norm1.")}
    assert missing in net.state_dict()
    with pytest.raises(ValueError, match=rf"missing in the source: {missing} \(timm: stages.1.blocks.0.norm1.weight"):
        load(net, given)


@pytest.mark.parametrize(("channels", "how"), [(1, "'sum' or 'repeat'"), (4, "'repeat'")])
def test_refused_channels_say_what_would_adapt_them(channels: int, how: str) -> None:
    with pytest.raises(ValueError, match=f"; first_conv={how} adapts the channels"):
        load(create_model("resnet18", in_channels=channels), torchvision.models.resnet18())


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be \.safetensors, \.pt, .* got 'weights\.npz'"):
        read(tmp_path / "weights.npz")
    torch.save([torch.ones(1)], tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="must hold tensors by name, got list"):
        read(tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="must hold tensors by name, got int under 'epoch'"):
        plain_names({"epoch": 3})
    with pytest.raises(ValueError, match="source must be a state dict, a module or the path of a file, got list"):
        load(create_model("resnet20"), [])  # type: ignore[arg-type]


def test_part_of_a_larger_model_is_found_by_its_prefix() -> None:
    net, model = create_model("resnet18", num_classes=10), torchvision_net(10)
    whole = {f"backbone.{key}": tensor for key, tensor in model.state_dict().items()} | {"neck.weight": torch.ones(2)}
    with pytest.raises(ValueError, match=r"source must have the names of .*; prefix='backbone\.' would find its names"):
        load(net, whole)
    assert load(net, whole, prefix="backbone.") == ["1 keys that do not begin with 'backbone.': left out"]
    for wrapper in ("module.", "_orig_mod.", "module._orig_mod."):
        wrapped = {f"{wrapper}{key}": tensor for key, tensor in whole.items()}
        for prefix in ("backbone.", f"{wrapper}backbone."):
            assert len(load(net, wrapped, prefix=prefix)) == 1
    assert torch.equal(net.get_parameter("head.bias"), model.fc.bias)
    with pytest.raises(ValueError, match=r"prefix must begin names of the source, got 'body\.', which has \['backbone"):
        load(net, whole, prefix="body.")


@pytest.mark.parametrize("name", ["resnet18", "resnet50d", "resnetblur18", "resnetv2_18", "resnetv2_50d"])
def test_output_stride_gives_the_features_of_timm(name: str) -> None:
    model = randomise(timm.create_model(name, output_stride=16)).eval()
    net = TIMM[name](output_stride=16).eval()
    load(net, model)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():  # where the net of stride 32 has positions: timm's pools read zeros beyond the border
        ours, theirs = (module.forward_features(x)[..., ::2, ::2] for module in (net, model))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict"])
def test_averaged_weights_of_a_checkpoint_are_named_and_not_taken(wrapper: str, tmp_path: Path) -> None:
    net, raw, averaged = create_model("resnet18", num_classes=10), torchvision_net(10), torchvision_net(10)
    checkpoint = {wrapper: raw.state_dict(), "epoch": 3}
    torch.save(checkpoint, tmp_path / "last.ckpt")
    assert load(net, tmp_path / "last.ckpt") == []
    assert load(net, checkpoint | {f"{wrapper}_ema": averaged.state_dict()}) == [  # type: ignore[arg-type]
        f"{wrapper}_ema: averaged weights, not taken; load the value under '{wrapper}_ema' to have them"
    ]
    assert torch.equal(net.get_parameter("head.bias"), raw.fc.bias)


def test_head_of_ones_own_is_left_alone_by_drop_head() -> None:
    net, model = create_model("resnet18"), torchvision_net(10)
    net.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(512, 5))
    before = net.head[1].weight.clone()
    with pytest.raises(ValueError, match=r"in torchvision head\.1 would have no name"):
        load(net, model)
    assert len(load(net, model, drop_head=True)) == 2  # what was dropped of the source
    assert torch.equal(net.head[1].weight, before)
    assert torch.equal(net.get_parameter("stem.conv.weight"), model.conv1.weight)


def test_differences_of_a_net_whose_skips_are_off_are_measured() -> None:
    net, model = create_model("resnet18", num_classes=10), torchvision_net(10)
    load(net, model)
    with skips_off(net):
        assert differences(net, model, torch.randn(2, 3, 32, 32))["logits"] > 0.1


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, lambda model: nn.DataParallel(torch.compile(model))])
def test_prefix_of_wrappers_is_taken_off(wrap: Any) -> None:
    net, model = create_model("resnet18", num_classes=10), torchvision_net(10)
    for source in (wrap(model), wrap(model).state_dict()):
        assert load(net, source) == []
        assert torch.equal(net.get_parameter("head.bias"), model.fc.bias)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, lambda net: nn.DataParallel(torch.compile(net))])
def test_net_inside_a_wrapper_is_loaded(wrap: Any) -> None:
    net, model = create_model("resnet18", num_classes=10), torchvision_net(10)
    assert load(wrap(net), model) == []
    assert torch.equal(net.get_parameter("head.bias"), model.fc.bias)
    assert to_torchvision(wrap(net)).keys() == model.state_dict().keys()


def test_fused_net_is_not_loaded_and_the_order_is_said() -> None:
    net = create_model("resnet18", num_classes=10)
    for source in (torchvision_net(10), net):
        with pytest.raises(ValueError, match=r"net must not be fused, .* load into the net, then fuse it"):
            load(fuse(net), source)
    assert load(fuse(net), fuse(net)) == []


def test_two_tensors_of_one_name_are_refused() -> None:
    state = create_model("resnet20").state_dict()
    twice = {**state, "_orig_mod.head.bias": state["head.bias"]}
    with pytest.raises(ValueError, match=r"source must have one tensor for each name, got several for 'head\.bias'"):
        load(create_model("resnet20"), twice)


def test_average_of_a_model_is_read() -> None:
    net, model = create_model("resnet18", num_classes=10), torchvision_net(10)
    assert load(net, torch.optim.swa_utils.AveragedModel(model)) == []
    assert torch.equal(net.get_parameter("head.bias"), model.fc.bias)


def test_digits_that_are_lost_are_said_or_refused() -> None:
    net = create_model("resnet18", num_classes=10, dtype=torch.bfloat16)
    notes = load(net, torchvision_net(10))
    assert "stem.conv.weight (torchvision: conv1.weight): rounded from torch.float32 to torch.bfloat16" in notes
    whole = {key: value.to(torch.int8) for key, value in torchvision_net(10).state_dict().items()}
    with pytest.raises(ValueError, match=r"dtype: stem.conv.weight .* is torch.bfloat16 in the net and torch.int8 in"):
        load(net, whole)


def test_net_without_memory_is_refused() -> None:
    with torch.device("meta"):
        net = create_model("resnet18", num_classes=10)
    with pytest.raises(ValueError, match=r"net must have memory for weights, got one on the meta device"):
        load(net, torchvision_net(10))


def test_first_conv_of_standardised_weights_is_not_adapted() -> None:
    coloured, grey = (create_model("resnet20", conv=WSConv2d, in_channels=channels) for channels in (3, 1))
    with pytest.raises(
        ValueError, match="first_conv must be 'same' for standardised weights, which undo it, got 'sum'"
    ):
        load(grey, coloured.state_dict(), first_conv="sum")


def test_kernel_of_another_size_gets_no_hint_on_channels() -> None:
    with pytest.raises(ValueError, match=r"stem\.conv\.weight") as refused:
        load(create_model("resnet18", stem="cifar", num_classes=10), torchvision_net(10))
    assert "adapts the channels" not in str(refused.value)


def test_net_without_head_asks_for_drop_head() -> None:
    net, model = create_model("resnet18", num_classes=0), torchvision_net(10)
    with pytest.raises(
        ValueError, match=r"not in the net: head\.bias \(torchvision: fc\.bias\); drop_head=True leaves it"
    ):
        load(net, model)
    assert len(load(net, model, drop_head=True)) == 2
    assert torch.equal(net.get_parameter("stem.conv.weight"), model.conv1.weight)


def test_old_names_of_densenet_files_are_read() -> None:
    model, net = torchvision.models.densenet121(num_classes=10), create_model("densenet121", num_classes=10)
    old = {
        key.replace("norm1", "norm.1").replace("conv2", "conv.2") if "denselayer" in key else key: value
        for key, value in model.state_dict().items()
    }
    assert load(net, old) == []


def test_counters_that_old_files_lack_start_at_zero() -> None:
    model, net = torchvision_net(10), create_model("resnet18", num_classes=10)
    net.get_buffer("stem.norm.num_batches_tracked").fill_(7)
    old = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    notes = load(net, old)
    assert notes[0] == ("20 num_batches_tracked: not in the source, start at 0")
    assert net.get_buffer("stem.norm.num_batches_tracked") == 0


# --- what does not fit


def refused(net: nn.Module, source: Any, **options: Any) -> str:
    """The message of a refusal that left the net as it was."""
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ValueError, match="source must fit the net, nothing was loaded") as error:
        load(net, source, **options)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    return str(error.value)


def test_missing_key_is_named_in_both_vocabularies() -> None:
    state = torchvision_net(10).state_dict()
    del state["layer2.0.downsample.1.bias"]
    said = refused(create_model("resnet18", num_classes=10), state)
    assert "missing in the source: stages.1.0.shortcut.norm.bias (torchvision: layer2.0.downsample.1.bias)" in said


def test_extra_key_is_named_in_both_vocabularies() -> None:
    state = torchvision_net(10).state_dict() | {"layer1.2.conv1.weight": torch.ones(1), "extra": torch.ones(1)}
    said = refused(create_model("resnet18", num_classes=10), state)
    assert "not in the net: stages.0.2.branch.conv1.weight (torchvision: layer1.2.conv1.weight)" in said
    assert "not in the net: no name of ours (torchvision: extra)" in said


def test_wrong_shape_is_named_in_both_vocabularies() -> None:
    said = refused(create_model("resnet18", num_classes=10), torchvision_net(1000))
    assert "shape: head.weight (torchvision: fc.weight) is (10, 512) in the net and (1000, 512) in the source" in said
    assert "drop_head=True" in said


def test_plain_net_refuses_the_weights_of_shortcuts() -> None:
    said = refused(create_model("resnet18", skip=False), torchvision_net())
    assert "not in the net: stages.1.0.shortcut.conv.weight (torchvision: layer2.0.downsample.0.weight)" in said


def test_other_depth_is_refused() -> None:
    said = refused(create_model("resnet34"), torchvision_net())
    assert "missing in the source: stages.0.2.branch.conv1.weight" in said


def test_source_of_another_world_is_refused() -> None:
    with pytest.raises(ValueError, match=r"names of resblocks, torchvision, .*pytorch-cifar for this net.* got 1 keys"):
        load(create_model("resnet18"), {"encoder.weight": torch.ones(1)})
    with pytest.raises(
        ValueError, match=r"vocabulary must be one of resblocks, torchvision, .*a table or None, got 'k"
    ):
        load(create_model("resnet18"), {}, vocabulary="keras")  # type: ignore[arg-type]


@pytest.mark.parametrize(("net", "source"), [("resnet18", "densenet121"), ("densenet121", "resnet18")])
def test_weights_of_another_kind_of_net_get_no_false_hint(net: str, source: str) -> None:
    with torch.device("meta"):
        state = torchvision.models.get_model(source).state_dict()
    with pytest.raises(ValueError, match=r"got \d+ keys such as \[[^]]*\]$"):
        load(create_model(net), {key: torch.empty(tensor.shape) for key, tensor in state.items()})


# --- other channels, other classes


def test_head_is_dropped_on_request_and_said() -> None:
    model, net = torchvision_net(1000), create_model("resnet18", num_classes=10)
    head = net.get_parameter("head.weight").clone()
    notes = load(net, model, drop_head=True)
    assert notes == [
        "head.weight (torchvision: fc.weight): dropped, (1000, 512) in the source",
        "head.bias (torchvision: fc.bias): dropped, (1000,) in the source",
    ]
    assert torch.equal(net.get_parameter("head.weight"), head)
    assert torch.equal(net.get_parameter("stem.conv.weight"), model.conv1.weight)


def test_head_is_dropped_for_a_net_without_one() -> None:
    model, net = torchvision_net(1000), create_model("resnet18", num_classes=0)
    assert len(load(net, model, drop_head=True)) == 2
    model.fc = nn.Identity()
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(net.eval()(x), model.eval()(x))


def test_summed_first_kernel_sees_grey_as_its_copy_in_colour() -> None:
    model, net = torchvision_net(10).eval(), create_model("resnet18", num_classes=10, in_channels=1).eval()
    assert "first_conv='sum' or 'repeat'" in refused(net, model)
    notes = load(net, model, first_conv="sum")
    assert notes == ["stem.conv.weight (torchvision: conv1.weight): its 3 input channels summed to 1"]
    grey = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(net(grey), model(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [2, 6])
def test_repeated_first_kernel_keeps_the_response(channels: int) -> None:
    model, net = torchvision_net(10).eval(), create_model("resnet18", num_classes=10, in_channels=channels).eval()
    assert "repeated" in load(net, model, first_conv="repeat")[0]
    assert torch.equal(net.get_parameter("stem.conv.weight")[:, 0], model.conv1.weight[:, 0] * (3 / channels))
    if channels == 6:
        x = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(net(torch.cat([x, x], 1)), model(x), rtol=1e-4, atol=1e-4)


# --- more dimensions


def repeated(x: torch.Tensor, size: int = 8) -> torch.Tensor:
    """The same slice again and again along a new first dimension."""
    return x[:, :, None].expand(-1, -1, size, *x.shape[2:])


@pytest.mark.parametrize("name", ["resnet18", "resnet50d", "seresnet18", "resnetv2_18", "densenet121"])
def test_centred_kernels_give_a_volume_of_one_image_what_they_gave_the_image(name: str) -> None:
    torch.manual_seed(0)
    small = {"depths": SHALLOW, "num_classes": 5, "dtype": torch.float64}
    flat, volume = (TIMM[name](**small, dims=dims).eval() for dims in (2, 3))
    (note,) = load(volume, randomise(flat), inflate="centre")
    assert re.fullmatch(r"\d+ kernels: inflated by new dimensions \(centre\)", note)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(volume(repeated(x, 32)), flat(x))


def test_mean_kernels_give_the_middle_of_a_volume_what_they_gave_the_image() -> None:
    torch.manual_seed(0)
    flat, volume = (
        create_model("resnet20", depths=(1, 1, 1), dims=dims, dtype=torch.float64).eval() for dims in (2, 3)
    )
    load(volume, randomise(flat), inflate="mean")
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    theirs, ours = flat.features(x)[-1], volume.features(repeated(x, 64))[-1]
    torch.testing.assert_close(ours[:, :, 8], theirs)
    assert not torch.allclose(ours[:, :, 0], theirs)  # at the border zeros are read


def test_kernels_of_sound_become_those_of_images_and_of_volumes() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    flat = randomise(create_model("resnet20", dims=1, dtype=torch.float64)).eval()
    for dims, many in ((2, repeated(x)), (3, repeated(repeated(x)))):
        net = create_model("resnet20", dims=dims, dtype=torch.float64).eval()
        load(net, flat, inflate="centre")
        torch.testing.assert_close(net(many), flat(x))


def test_inflation_is_asked_for_and_goes_with_other_channels() -> None:
    model, net = torchvision_net(5), create_model("resnet18", dims=3, in_channels=1, num_classes=5)
    assert "; inflate='centre' or 'mean' adapts the dimensions" in refused(net, model)
    notes = load(net, model, inflate="mean", first_conv="sum")
    assert [note.partition(": ")[2] for note in notes] == [
        "conv1.weight): its 3 input channels summed to 1",
        "inflated by new dimensions (mean)",
    ]
    torch.testing.assert_close(net.stem.conv.weight.sum((1, 2)), model.conv1.weight.sum(1))
    assert load(create_model("resnet18", num_classes=5), model, inflate="mean") == []  # nothing to inflate


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_few_digits_of_a_source_are_not_made_fewer(dtype: torch.dtype) -> None:
    model, net = torchvision_net(5).to(dtype), create_model("resnet18", dims=3, in_channels=1, num_classes=5)
    assert not any("rounded" in note for note in load(net, model, inflate="mean", first_conv="sum"))
    kernel = model.conv1.weight.float().sum(1)
    torch.testing.assert_close(net.stem.conv.weight.sum((1, 2)), kernel, rtol=1e-6, atol=1e-6)


def test_kernels_grow_by_what_the_net_has_more_alone() -> None:
    class Spatial(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1, 1, 3, 3))

    eca, spatial = create_model("resnet20", attention=rb.ECA), create_model("resnet20", attention=Spatial)
    notes = load(spatial, eca, inflate="mean", partial=True)
    assert not any("inflated" in note for note in notes)
    assert sum("attention.weight" in note for note in notes) == 9


def test_shapes_in_an_error_are_those_of_the_source() -> None:
    net = create_model("resnet18", dims=3, stem="cifar", num_classes=5)
    said = refused(net, torchvision_net(5), inflate="mean")
    assert "is (64, 3, 3, 3, 3) in the net and (64, 3, 7, 7) in the source\n" in f"{said}\n"
    notes = load(net, torchvision_net(5), inflate="mean", partial=True)
    assert notes[0] == "19 kernels: inflated by new dimensions (mean)"  # all but the stem's
    said = refused(create_model("resnet18", stem_width=32, num_classes=5), torchvision_net(5))
    assert "is (32, 3, 7, 7) in the net and (64, 3, 7, 7) in the source\n" in said


def test_source_of_integers_is_refused_by_its_dtype() -> None:
    state = {key: tensor.to(torch.int8) for key, tensor in torchvision_net(5).state_dict().items()}
    net = create_model("resnet18", dims=3, in_channels=1, num_classes=5)
    assert "dtype: stem.conv.weight" in refused(net, state, inflate="mean", first_conv="sum")


def test_hints_are_of_the_net_and_of_what_fits_best() -> None:
    state = {f"net.{key}": tensor for key, tensor in torchvision_net().state_dict().items() if key != "conv1.weight"}
    with pytest.raises(ValueError, match=r"got 121 keys such as \[[^]]*\]$"):
        load(create_model("resnet18"), state)
    both = {f"{name}{key}": tensor for name in ("q.", "k.") for key, tensor in torchvision_net().state_dict().items()}
    with pytest.raises(ValueError, match=r"; prefix='q\.' would find its names$"):
        load(create_model("resnet18"), both)
    deep = TIMM["resnet18d"]()
    with pytest.raises(ValueError, match=r"; in timm stages\.0\.0\.branch\.attention.* would have no name$"):
        load(TIMM["resnet18d"](attention=CBAM), to_timm(deep))


def test_two_layers_of_one_name_are_an_error_in_known_vocabularies_too() -> None:
    class Odd(PreActBasicBlock):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.branch.add_module("norm1", nn.BatchNorm2d(self.out_channels))

    net = create_model("preact_resnet18", block=Odd)
    with pytest.raises(
        ValueError, match=r"got 'stages\.1\.blocks\.0\.norm1\.weight' for stages\.1\.0\.preact\.norm1\.w"
    ):
        to_timm(net)


def test_inflation_that_cannot_be_is_refused() -> None:
    net = create_model("resnet18", dims=3, conv=weight_standardised)
    with pytest.raises(
        ValueError, match="inflate must be None for standardised weights, which change with it, got 'mean'"
    ):
        load(net, torchvision_net(), inflate="mean")
    with pytest.raises(ValueError, match="inflate must be centre, mean or None, got 'repeat'"):
        load(create_model("resnet18", dims=3), torchvision_net(), inflate="repeat")  # type: ignore[arg-type]


def test_sum_is_for_one_channel() -> None:
    with pytest.raises(ValueError, match="first_conv='sum' needs a net with in_channels=1, got in_channels=2"):
        load(create_model("resnet18", num_classes=10, in_channels=2), torchvision_net(10), first_conv="sum")
    with pytest.raises(ValueError, match="first_conv must be same, sum or repeat, got 'mean'"):
        load(create_model("resnet18", num_classes=10), torchvision_net(10), first_conv="mean")  # type: ignore[arg-type]


def test_import_brings_in_none_of_the_libraries() -> None:
    foreign = ("timm", "torchvision", "transformers", "monai", "pytorchcv", "safetensors", "huggingface_hub")
    code = f"import sys, resblocks.interop; print([name for name in {foreign} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["resnetblur50", "resnetaa50", "resnetrs50"])
def test_every_part_of_timms_nets_takes_norm_conv_and_activation(name: str) -> None:
    options: dict[str, Any] = {"norm": group_norm, "conv": weight_standardised, "activation": nn.SiLU}
    net = TIMM[name](**options, device="meta")
    kinds = {type(layer) for layer in net.modules()}
    assert {nn.GroupNorm, WSConv2d, nn.SiLU} <= kinds
    assert not {nn.BatchNorm2d, nn.Conv2d} & kinds
    assert all(isinstance(at.get_submodule("act"), nn.SiLU) for at in (net.stem, net.stages[0][0]))


def test_stem_convolution_of_timm_without_norm_has_a_bias() -> None:
    net = TIMM["resnetrs50"](norm=None, device="meta")
    assert net.get_parameter("stem.pool.conv.bias") is not None


def test_differences_of_equal_nets_with_dropout_are_rounding_and_draw_nothing() -> None:
    model = torchvision.models.densenet121(drop_rate=0.2, num_classes=10).double()
    net = TORCHVISION["densenet121"](dropout=0.2, num_classes=10, dtype=torch.float64)
    load(net, model)
    before = torch.get_rng_state()
    with torch.no_grad():
        found = differences(net, model, torch.rand(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator()))
    assert max(found.values()) < 1e-7
    assert torch.equal(torch.get_rng_state(), before)


def test_differences_of_small_values_are_told() -> None:
    assert _apart(torch.full((4,), 1e-30), torch.full((4,), 2e-30)) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("options", "kept", "left"),
    [
        ({"skip": False}, 0, 18),  # the three projections, five tensors and a counter each
        ({"attention": rb.SE}, 32, 0),
        ({"scale": rb.LayerScale}, 8, 0),
        ({"merge": rb.WeightedAdd}, 16, 0),
        ({"shortcut": "A"}, 0, 18),
        ({"depths": (2, 2, 2, 1)}, 0, 12),
        ({"stem": "cifar"}, 0, 1),
    ],
)
def test_net_with_something_changed_takes_what_fits(options: dict[str, Any], kept: int, left: int) -> None:
    net, model = create_model("resnet18", num_classes=10, **options), torchvision_net(10)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ValueError, match="source must"):
        load(net, model)
    notes = load(net, model, partial=True)
    assert sum(note.endswith(": kept as it was") for note in notes) == kept
    assert sum(note.startswith(("not in the net: ", "shape: ")) for note in notes) == left
    assert torch.equal(net.get_parameter("head.weight"), model.fc.weight)
    assert torch.equal(net.get_parameter("stages.2.1.branch.conv2.weight"), model.layer3[1].conv2.weight) or kept
    for key in (note.partition(":")[0] for note in notes if note.endswith("kept as it was")):
        assert torch.equal(net.state_dict()[key], before[key])


def test_trained_net_without_its_skips_computes_what_the_plain_one_does() -> None:
    net, plain = (create_model("resnet18", num_classes=10, skip=skip).eval() for skip in (True, False))
    load(plain, net, partial=True)
    x = torch.randn(2, 3, 32, 32)
    with skips_off(net):
        torch.testing.assert_close(plain(x), net(x), rtol=0, atol=0)


def test_source_of_which_nothing_fits_is_an_error_with_partial_too() -> None:
    with pytest.raises(ValueError, match="source must"):
        load(create_model("resnet18"), {"stem.conv.weight": torch.zeros(1)}, partial=True)
