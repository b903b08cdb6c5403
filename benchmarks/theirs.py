"""The models of other libraries, with random weights, by the names that resblocks.interop has for them."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch

from torch import nn

from resblocks import interop

# Name -> kind of blocks, blocks in each stage, as in the configs of microsoft/resnet-* on the Hugging Face Hub.
HUGGING_FACE = {
    "resnet-18": ("basic", (2, 2, 2, 2)),
    "resnet-26": ("bottleneck", (2, 2, 2, 2)),
    "resnet-34": ("basic", (3, 4, 6, 3)),
    "resnet-50": ("bottleneck", (3, 4, 6, 3)),
    "resnet-101": ("bottleneck", (3, 4, 23, 3)),
    "resnet-152": ("bottleneck", (3, 8, 36, 3)),
}


def of_torchvision(name: str) -> nn.Module:
    from torchvision.models import get_model

    return get_model(name, weights=None)


def of_timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name)


def of_transformers(name: str) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    kind, depths = HUGGING_FACE[name]
    widths = (64, 128, 256, 512) if kind == "basic" else (256, 512, 1024, 2048)
    config = ResNetConfig(layer_type=kind, depths=depths, hidden_sizes=widths, num_labels=1000)
    return ResNetForImageClassification(config)


def of_monai(name: str) -> nn.Module:
    from monai.networks import nets

    if name.startswith("densenet"):
        return getattr(nets, name)(spatial_dims=3, in_channels=1, out_channels=1000)
    short = "A" if name in ("resnet18", "resnet34") else "B"
    how = {
        "n_input_channels": 1,
        "feed_forward": False,
        "shortcut_type": short,
        "bias_downsample": False,
        "conv1_t_stride": 2,
    }
    return getattr(nets, name)(spatial_dims=3, **how)


def of_pytorchcv(name: str) -> nn.Module:
    from pytorchcv.model_provider import get_model

    model = get_model(name)
    model.features.final_pool = nn.AdaptiveAvgPool2d(1)  # theirs is made for one size of images
    return model


BUILD: dict[str, Callable[[str], nn.Module]] = {
    "torchvision": of_torchvision,
    "torchvision.video": of_torchvision,
    "timm": of_timm,
    "transformers": of_transformers,
    "monai": of_monai,
    "pytorchcv": of_pytorchcv,
}
# Weights and gradients of both in float64 take 30 GB; the others would take long.
TOO_LARGE = ("timm:resnetv2_152x4_bit", "pytorchcv:*1001_*", "pytorchcv:*1202_*", "pytorchcv:densenet[12]?0_k[24]?_*")


def names() -> list[str]:
    """Every name that is to be compared, "timm:resnet50d"."""
    every = [f"{library}:{name}" for library in BUILD for name in interop.NAMES[library]]
    return [name for name in every if not (is_another_head(name) or any(fnmatch(name, out) for out in TOO_LARGE))]


def is_another_head(name: str) -> bool:
    """Whether it is the net of another name, for other images."""
    return name.startswith("pytorchcv:") and name.endswith(("_cifar100", "_svhn"))


def theme(library: str) -> str:
    """The theme of the results file that has the library's names."""
    return "names" if library in ("torchvision", "timm") else "other_names"
