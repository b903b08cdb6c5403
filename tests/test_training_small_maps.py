"""Convolutions with small output maps as matrix products: the sums of torch, where they are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from training_workers import tiny_fit

from resblocks import create_model
from resblocks.training import small_maps
from resblocks.training.small_maps import SmallMapConv2d, _Product, positions, small_map_products


@pytest.fixture(autouse=True)
def any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule is that of processors that are not AMD's, wherever the tests run."""
    monkeypatch.setattr(small_maps, "is_mkl_slow", lambda: False)
    monkeypatch.setattr(small_maps, "is_amd", lambda: False)


CASES = [(4, 1), (8, 2), (7, 2), (2, 1), (1, 1), (5, 2)]  # size of the map, stride


def tensors(size: int, memory_format: torch.memory_format, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x = torch.randn(2, 3, size, size, dtype=dtype).contiguous(memory_format=memory_format)
    weight = torch.randn(5, 3, 3, 3, dtype=dtype).contiguous(memory_format=memory_format)
    return x.requires_grad_(), weight.requires_grad_()


def grads(y: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y.square().sum(), inputs)]


@pytest.mark.parametrize(("size", "stride"), CASES)
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_product_equals_the_convolution(
    size: int, stride: int, everything: bool, memory_format: torch.memory_format
) -> None:
    x, weight = tensors(size, memory_format)
    theirs = functional.conv2d(x, weight, None, stride, 1)
    ours = _Product.apply(x, weight, stride, everything)
    assert ours.shape[2] * ours.shape[3] == positions(x, stride)
    for one, other in zip(grads(ours, x, weight), grads(theirs, x, weight), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        assert one.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_product_passes_gradcheck(stride: int, everything: bool) -> None:
    x, weight = tensors(4, torch.contiguous_format)
    assert torch.autograd.gradcheck(lambda *inputs: _Product.apply(*inputs, stride, everything), (x, weight))
    assert torch.autograd.gradgradcheck(lambda *inputs: _Product.apply(*inputs, stride, everything), (x, weight))


def uses_product(conv: nn.Module, x: Tensor) -> bool:
    return "_Product" in type(conv(x).grad_fn).__name__


@pytest.mark.parametrize(
    ("why", "options", "size", "dtype"),
    [
        ("large map", {}, 5, torch.float32),
        ("narrow", {"in_channels": 255}, 4, torch.float32),
        ("kernel", {"kernel_size": 1, "padding": 0}, 4, torch.float32),
        ("padding", {"padding": 0}, 4, torch.float32),
        ("groups", {"groups": 2}, 4, torch.float32),
        ("bias", {"bias": True}, 4, torch.float32),
        ("dilation", {"dilation": 2, "padding": 2}, 4, torch.float32),
        ("padding mode", {"padding_mode": "reflect"}, 4, torch.float32),
        ("strides", {"stride": (1, 2)}, 4, torch.float32),
        ("emulated bfloat16", {}, 4, torch.bfloat16),
    ],
)
def test_everywhere_else_it_is_the_convolution(
    why: str, options: dict[str, Any], size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_maps, "has_fast_bfloat16", lambda device: False)
    options = {"in_channels": 256, "out_channels": 256, "kernel_size": 3, "padding": 1, "bias": False, **options}
    conv = SmallMapConv2d(**options, dtype=dtype)
    x = torch.randn(1, options["in_channels"], size, size, dtype=dtype)
    assert not uses_product(conv, x), why
    torch.testing.assert_close(conv(x), nn.Conv2d.forward(conv, x), rtol=0, atol=0)


@pytest.mark.parametrize(("size", "stride", "uses"), [(4, 1, False), (2, 1, False), (1, 1, True), (2, 2, True)])
def test_float32_is_convolved_where_products_are_slow(
    size: int, stride: int, uses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_maps, "is_mkl_slow", lambda: True)
    conv = SmallMapConv2d(256, 256, 3, stride, padding=1, bias=False)
    x = torch.randn(2, 256, size, size)
    assert uses_product(conv, x) is uses
    assert uses_product(conv.double(), x.double())


BF16 = torch.bfloat16


def test_one_image_without_a_batch_is_convolved() -> None:
    conv, x = SmallMapConv2d(256, 256, 3, padding=1, bias=False), torch.randn(256, 4, 4)
    torch.testing.assert_close(conv(x), nn.Conv2d.forward(conv, x), rtol=0, atol=0)


class OwnConv(nn.Conv2d):
    pass


def test_subclass_of_the_convolution_stays_what_it_is() -> None:
    net = nn.Sequential(*(kind(256, 256, 3, padding=1, bias=False) for kind in (nn.Conv2d, OwnConv)))
    with small_map_products(net) as names:
        assert names == ["0"]
    assert type(net[1]) is OwnConv


@pytest.mark.parametrize(("tiles", "calls_of_convolve"), [(False, []), (True, [torch.bfloat16] * 2)])
def test_rule_takes_the_weight_gradient_and_all_in_bfloat16_where_the_processor_has_tiles(
    tiles: bool, calls_of_convolve: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[torch.dtype] = []
    monkeypatch.setattr(small_maps, "has_fast_bfloat16", lambda device: True)
    monkeypatch.setattr(small_maps, "has_matrix_tiles", lambda: tiles)
    monkeypatch.setattr(small_maps, "_convolve", lambda x, *args: calls.append(x.dtype) or x)
    conv = SmallMapConv2d(256, 256, 3, padding=1, bias=False)
    x = torch.randn(1, 256, 4, 4)
    assert uses_product(conv, x)
    torch.testing.assert_close(conv(x), nn.Conv2d.forward(conv, x), rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert uses_product(conv, x) is tiles
        assert uses_product(conv, x[..., :2, :2])
    assert calls == calls_of_convolve


@pytest.mark.parametrize(
    ("channels", "size", "stride", "products"),
    [(512, 4, 1, 2), (256, 4, 1, 0), (256, 2, 1, 2), (256, 8, 2, 1)],
)
def test_rule_takes_all_of_wide_convolutions_in_bfloat16_on_a_processor_of_amd(
    channels: int, size: int, stride: int, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    convolve = small_maps._convolve
    monkeypatch.setattr(small_maps, "has_fast_bfloat16", lambda device: True)
    monkeypatch.setattr(small_maps, "has_matrix_tiles", lambda: False)
    monkeypatch.setattr(small_maps, "is_amd", lambda: True)
    monkeypatch.setattr(small_maps, "_convolve", lambda *given: calls.append(1) or convolve(*given))
    conv = SmallMapConv2d(channels, channels, 3, stride, padding=1, bias=False).to(BF16)
    x = torch.randn(1, channels, size, size, dtype=BF16, requires_grad=True)
    assert uses_product(conv, x)
    calls.clear()
    conv(x).float().sum().backward()
    assert len(calls) == products  # besides that of the weight's gradient


@pytest.mark.parametrize("tiles", [False, True])
def test_autocast_gives_gradients_in_the_dtype_of_the_weights(tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_maps, "has_fast_bfloat16", lambda device: True)
    monkeypatch.setattr(small_maps, "has_matrix_tiles", lambda: tiles)
    conv = SmallMapConv2d(256, 256, 3, padding=1, bias=False)
    x = torch.randn(2, 256, 2, 2, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x)
        plain = nn.Conv2d.forward(conv, x)
    assert y.dtype == plain.dtype == torch.bfloat16
    for one, other in zip(grads(y, x, conv.weight), grads(plain, x, conv.weight), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one.float(), other.float(), rtol=0.05, atol=0.05 * float(other.abs().max()))


@pytest.mark.parametrize(("dtype", "tiles", "count"), [(torch.float32, False, 4), (BF16, True, 4), (BF16, False, 1)])
def test_products_run_in_a_whole_net_also_under_autocast(
    dtype: torch.dtype, tiles: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_maps, "has_fast_bfloat16", lambda device: True)
    monkeypatch.setattr(small_maps, "has_matrix_tiles", lambda: tiles)
    net, used = create_model("resnet18", stem="cifar", num_classes=3), []
    with small_map_products(net), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        for layer in net.modules():
            if type(layer) is SmallMapConv2d:
                layer.register_forward_hook(lambda conv, given, y: used.append(type(y.grad_fn).__name__))
        net(torch.randn(2, 3, 32, 32))
    # Of the last stage, whose first convolution has a stride; the maps of the three before are 8x8.
    assert used.count("_ProductBackward") == count


def test_autocast_leaves_float64_alone() -> None:
    conv = SmallMapConv2d(256, 256, 3, padding=1, bias=False).double()
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(torch.randn(1, 256, 4, 4).double()).dtype == torch.float64


def test_net_is_as_before_afterwards_and_trains_alike() -> None:
    net, outs = create_model("resnet18", stem="cifar", num_classes=3), []
    with small_map_products(net) as names:
        assert [name for name, module in net.named_modules() if type(module) is SmallMapConv2d] == names
    assert len(names) == 7  # those of the last two stages but for the first, which reads 128 channels
    assert not any(type(module) is SmallMapConv2d for module in net.modules())
    x = torch.randn(2, 3, 32, 32)
    for on in (False, True):
        net.zero_grad()
        if on:
            with small_map_products(net):
                net(x).square().sum().backward()
        else:
            net(x).square().sum().backward()
        outs.append([weight.grad.clone() for weight in net.parameters()])
    for one, other in zip(*outs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


def test_fit_uses_products_and_says_so(tmp_path: Path) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 256, 3, 2, padding=1, bias=False),
        nn.Conv2d(256, 256, 3, padding=1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(256, 3),
    )
    result = tiny_fit(tmp_path, net=net, small_maps=True)
    assert result.settings["small_maps"] is True
    assert type(net[1]) is nn.Conv2d


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"compile": True}, "small_maps must be False with compile=True"),
        ({}, "small_maps needs a 3x3 nn.Conv2d without bias and groups, of at least 256 channels"),
    ],
)
def test_small_maps_without_effect_raises(tmp_path: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        tiny_fit(tmp_path, small_maps=True, **options)


def test_small_maps_on_another_device_raises() -> None:
    with pytest.raises(ValueError, match="small_maps must be False away from the CPU, got device cuda"):
        small_maps.check_small_maps(torch.device("cuda"), compile=False)
