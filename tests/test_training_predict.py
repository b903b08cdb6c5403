"""A run's folder is enough to use its net: what it answers is what the run evaluated."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from training_workers import RECIPE, tiny_dataset, tiny_fit, tiny_net

from resblocks import BasicBlock, ResNet, set_skip
from resblocks.training import Recipe, Trained, build_net, fit, load_digits, load_trained, sources
from resblocks.training.predict import describe

DIGITS = load_digits()


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The folder of a short run, and its accuracy in percent."""
    out = tmp_path_factory.mktemp("digits")
    recipe = Recipe(epochs=1, batch_size=50, lr=0.1, crop=0, flip=False, tta="flip")
    net = build_net("resnet20", DIGITS)
    return out, fit(net, DIGITS, recipe, out=out, device="cpu", precision="float32", progress=False).accuracy_percent


def test_trained_net_is_as_accurate_as_its_run(digits: tuple[Path, float]) -> None:
    trained = load_trained(digits[0])
    probabilities = trained(DIGITS.test_images)
    right = (probabilities.argmax(1) == DIGITS.test_labels).double().mean().item()
    assert 100 * right == pytest.approx(digits[1])
    torch.testing.assert_close(probabilities.sum(1), torch.ones(364))


@pytest.mark.parametrize("form", ["tensor", "pillow", "coloured", "large", "file", "path as text"])
def test_predict_takes_an_image_in_any_form(form: str, digits: tuple[Path, float], tmp_path: Path) -> None:
    image, trained = DIGITS.test_images[0], load_trained(digits[0])
    pillow = Image.frombytes("L", (8, 8), bytes(image.flatten().tolist()))
    pillow.save(tmp_path / "digit.png")
    said = trained.predict(
        {
            "tensor": image,
            "pillow": pillow,
            "coloured": pillow.convert("RGB"),
            "large": pillow.resize((80, 80), Image.Resampling.NEAREST),
            "file": tmp_path / "digit.png",
            "path as text": str(tmp_path / "digit.png"),
        }[form]
    )
    expected = trained(image[None])[0]
    assert list(said.values()) == sorted(said.values(), reverse=True)
    near = 0.2 if form == "large" else 1e-6
    assert said == pytest.approx(dict(zip(DIGITS.classes, expected.tolist(), strict=True)), abs=near)


def test_image_that_is_no_square_gets_the_size_of_the_training_images(digits: tuple[Path, float]) -> None:
    image, trained = Image.effect_noise((8, 6), 50), load_trained(digits[0])
    trained.shape = (1, 6, 8)
    assert trained.predict(image) == trained.predict(sources.to_tensor(image))


@pytest.mark.parametrize("images", [torch.zeros(1, 1, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)])
def test_images_of_another_kind_are_refused(images: torch.Tensor, digits: tuple[Path, float]) -> None:
    with pytest.raises(ValueError, match=r"images must be uint8 of shape \(N, 1, 8, 8\), got torch"):
        load_trained(digits[0])(images)


def test_net_of_the_callers_own_takes_the_weights(tmp_path: Path) -> None:
    net = tiny_net()
    tiny_fit(tmp_path, net)
    with pytest.raises(ValueError, match=r"net must be given: .*result.json holds no config of tiny"):
        load_trained(tmp_path)
    trained = load_trained(tmp_path, tiny_net())
    assert isinstance(trained, Trained)
    assert trained.classes == ("a", "b", "c")
    data = tiny_dataset()
    pixels = (data.test_images.float() / 255 - data.mean.view(3, 1, 1)) / data.std.view(3, 1, 1)
    torch.testing.assert_close(trained(data.test_images), net(pixels).softmax(1))


class _Tied(nn.Module):
    """One batch norm under two names, and one weight in two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.b.weight = self.a.weight
        self.norm1 = self.norm2 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm2(self.b(self.norm1(self.a(self.stem(x))).relu())).mean((2, 3)))


@pytest.mark.parametrize("channels_last", [True, False])
def test_net_that_shares_weights_is_saved_and_used(channels_last: bool, tmp_path: Path) -> None:
    tiny_fit(tmp_path, net := _Tied(), channels_last=channels_last)
    images = tiny_dataset().test_images
    again = load_trained(tmp_path, _Tied())
    torch.testing.assert_close(again(images), load_trained(tmp_path, net)(images))
    assert all(torch.equal(a, b) for a, b in zip(again.net.parameters(), net.parameters(), strict=True))


def test_option_that_json_cannot_say_costs_the_config_alone(tmp_path: Path) -> None:
    net = ResNet(
        BasicBlock, [1], [8], stem="cifar", stem_width=8, num_classes=3, activation=partial(nn.Hardtanh, 0.0, math.inf)
    )
    tiny_fit(tmp_path, net)
    with pytest.raises(ValueError, match=r"net must be given: .*result.json holds no config"):
        load_trained(tmp_path)


def test_skips_that_were_switched_by_hand_are_not_forgotten(tmp_path: Path) -> None:
    net = ResNet(BasicBlock, [1], [8], stem="cifar", stem_width=8, num_classes=3)
    set_skip(net, False)
    tiny_fit(tmp_path, net)
    with pytest.raises(ValueError, match=r"net must be given: .*result.json holds no config"):
        load_trained(tmp_path)
    assert load_trained(tmp_path, net).net is net


class OwnBlock(BasicBlock):
    pass


def test_net_of_a_block_of_ones_own_is_rebuilt_where_it_is_trusted(tmp_path: Path) -> None:
    tiny_fit(tmp_path, ResNet(OwnBlock, [1], [8], stem="cifar", stem_width=8, num_classes=3), gradients=False)
    assert type(load_trained(tmp_path, trust=[__name__]).net.stages[0][0]) is OwnBlock


def test_net_that_ran_with_matrix_products_is_rebuilt(tmp_path: Path) -> None:
    net = ResNet(BasicBlock, [1], [256], stem="cifar", stem_width=256, num_classes=3)
    recipe = Recipe(epochs=1, batch_size=40, crop=0)
    tiny_fit(tmp_path, net, recipe, small_maps=True, gradients=False, checkpoint_steps=0)
    assert isinstance(load_trained(tmp_path).net, ResNet)


def test_run_from_before_is_read_but_not_used_without_its_normalisation(tmp_path: Path) -> None:
    first = tiny_fit(tmp_path)
    written: dict[str, Any] = json.loads((tmp_path / "result.json").read_text())
    del written["model"]
    (tmp_path / "result.json").write_text(json.dumps(written))
    assert tiny_fit(tmp_path, recipe=RECIPE).epochs == first.epochs
    with pytest.raises(ValueError, match="folder must hold a run that says mean, std and classes"):
        load_trained(tmp_path)
    with pytest.raises(ValueError, match="folder must hold a finished run"):
        load_trained(tmp_path / "nowhere")


def test_trained_net_stays_in_evaluation_and_takes_other_dtypes(tmp_path: Path) -> None:
    tiny_fit(tmp_path, net := tiny_net())
    images = tiny_dataset().test_images[:2]
    trained = load_trained(tmp_path, net)
    wanted = trained(images)
    assert not any(module.training for module in trained.train().modules())
    torch.testing.assert_close(trained.to(torch.bfloat16)(images), wanted, atol=0.1, rtol=0)


def test_wrapped_net_has_no_config_that_its_weights_would_not_fit(tmp_path: Path) -> None:
    net = build_net("resnet20", dataset := tiny_dataset())
    assert describe(net, dataset)["config"] is not None
    assert describe(nn.DataParallel(net), dataset)["config"] is None


def test_photograph_is_turned_once_by_path_and_as_an_image(tmp_path: Path) -> None:
    tiny_fit(tmp_path / "net", net := tiny_net())
    image, exif = Image.effect_noise((6, 6), 50).convert("RGB"), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "held.png", exif=exif)
    image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "turned.png")
    trained = load_trained(tmp_path / "net", net)
    wanted = trained.predict(tmp_path / "turned.png")
    assert trained.predict(tmp_path / "held.png") == wanted
    with Image.open(tmp_path / "held.png") as opened:
        assert trained.predict(opened) == wanted


def test_what_is_no_image_or_no_run_is_named(tmp_path: Path) -> None:
    tiny_fit(tmp_path / "net", net := tiny_net())
    with pytest.raises(ValueError, match="image must be a tensor, an image of Pillow or the path of a file, got bytes"):
        load_trained(tmp_path / "net", net).predict(b"")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"folder must hold a finished run, got .*; it has those of net"):
        load_trained(tmp_path, net)
