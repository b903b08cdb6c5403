"""Official weights come through the code of the library that has them, and what goes wrong there is said."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import theirs
import torch
from test_interop import randomise, torchvision_net

from resblocks.interop import pretrained, to_timm

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")


def test_official_weights_of_torchvision_go_through_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torchvision_net()
    monkeypatch.setattr("torchvision.models.WeightsEnum.get_state_dict", lambda *_, **__: model.state_dict())
    net = pretrained("resnet18")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(net.eval()(x), model.eval()(x))
    assert pretrained("resnet18.IMAGENET1K_V1", num_classes=7)(x).shape == (2, 7)
    volume = pretrained("resnet18", dims=3, inflate="centre").eval()
    torch.testing.assert_close(volume(x[:, :, None].expand(-1, -1, 8, -1, -1)), net(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="tag must be one of IMAGENET1K_V1, DEFAULT for resnet18, got 'V9'"):
        pretrained("resnet18.V9")


def test_official_weights_of_timm_go_through_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomise(timm.create_model("resnet10t", num_classes=21))
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: model)
    net = pretrained("resnet10t.c3_in1k", "timm")
    assert net.num_classes == 21
    assert torch.equal(to_timm(net)["fc.weight"], model.fc.weight)


def test_official_weights_without_a_head_give_a_net_without_or_with_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model("resnet10t", num_classes=0)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: model)
    assert pretrained("resnet10t", "timm").num_classes == 0
    assert pretrained("resnet10t", "timm", num_classes=3).num_classes == 3


def test_official_weights_of_a_video_net_come_from_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    model = theirs.BUILD["torchvision.video"]("r3d_18")
    monkeypatch.setattr("torchvision.models.WeightsEnum.get_state_dict", lambda *_, **__: model.state_dict())
    net = pretrained("r3d_18.KINETICS400_V1", "torchvision.video")
    assert torch.equal(net.head.weight, model.fc.weight)


@pytest.mark.parametrize(("source", "name"), [("pytorchcv", "resnet20_cifar100"), ("transformers", "resnet-18")])
def test_official_weights_of_other_libraries_go_through_their_own_code(
    source: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = theirs.BUILD[source](name)
    for place in ("pytorchcv.model_provider.get_model", "transformers.ResNetForImageClassification.from_pretrained"):
        monkeypatch.setattr(place, lambda *_, **__: model)
    net = pretrained(name, source)
    assert net.num_classes == {"resnet20_cifar100": 100, "resnet-18": 1000}[name]
    assert torch.equal(net.head.weight, list(model.state_dict().values())[-2])
    with pytest.raises(ValueError, match=f"name must have no tag for weights of {source}"):
        pretrained(f"{name}.v2", source)


def test_official_weights_of_medicalnet_go_through_monai(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = theirs.BUILD["monai"]("resnet10"), []
    state = {f"module.{key}": tensor for key, tensor in model.state_dict().items()}
    fetch = "monai.networks.nets.resnet.get_pretrained_resnet_medicalnet"
    monkeypatch.setattr(fetch, lambda depth: asked.append(depth) or state)
    net = pretrained("resnet10", "monai", num_classes=2)
    assert asked == [10]
    assert torch.equal(net.stem.conv.weight, model.conv1.weight)
    assert net(torch.randn(2, 1, 16, 16, 16)).shape == (2, 2)
    with pytest.raises(ValueError, match="name must be a resnet for weights of monai"):
        pretrained("densenet121", "monai")


@pytest.mark.parametrize("library", ["torchvision", "timm", "transformers", "monai", "pytorchcv"])
def test_missing_library_is_said(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ModuleNotFoundError, match=f"weights of {library} need it installed: pip install {library}"):
        pretrained({"transformers": "resnet-18"}.get(library, "resnet18"), library)


def test_missing_network_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr("torchvision.models.WeightsEnum.get_state_dict", offline)
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        ConnectionError, match=r"resnet18 of torchvision could not be fetched: https://\S+: network is unr"
    ):
        pretrained("resnet18")
    with pytest.raises(ConnectionError, match="weights resnet18 of timm could not be fetched: network is unreachable"):
        pretrained("resnet18", "timm")


def test_unknown_name_and_source_are_said() -> None:
    with pytest.raises(ValueError, match="name must be one of the 14 names of torchvision in interop, got 'vgg16'"):
        pretrained("vgg16")
    with pytest.raises(ValueError, match=r"source must be one of torchvision, .*pytorchcv, got 'keras'"):
        pretrained("resnet18", "keras")  # type: ignore[arg-type]
