"""The official weights of other libraries, fetched by their own code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from resblocks.interop.kernels import FirstConv, Inflate
from resblocks.interop.other_names import NAMES
from resblocks.interop.vocabularies import VOCABULARIES
from resblocks.interop.weights import Publisher, load, plain_names
from resblocks.nets import Network


def pretrained(
    name: str,
    source: Publisher = "torchvision",
    *,
    first_conv: FirstConv = "same",
    inflate: Inflate | None = None,
    **options: object,
) -> Network:
    """Our net of that name with the official weights, fetched by the code of the library that has them.

    Args:
        name: as the source spells it, one of `NAMES[source]`. With the weights' tag behind a dot, where there are
            several: "resnet50.IMAGENET1K_V1" (torchvision), "resnet50d.ra2_in1k" (timm); without one the source's
            default.
        source: who has the weights. "torchvision.video": Kinetics-400. "transformers": microsoft/resnet-* of the
            Hugging Face Hub. "monai": MedicalNet, ResNets alone, with strides where it had dilations, as MONAI builds
            them. "pytorchcv": ImageNet; CIFAR and SVHN for the small nets.
        first_conv, inflate: as in `load`, for another `in_channels`, or `dims=3` with weights of images.
        options: of the net; with another `num_classes` the head is new.

    Raises:
        ValueError: a name or tag that is not there.
        ModuleNotFoundError: the source is not installed.
        ConnectionError: the weights could not be fetched.
    """
    if source not in NAMES:
        raise ValueError(f"source must be one of {', '.join(NAMES)}, got {source!r}")
    base, _, tag = name.partition(".")
    if base not in NAMES[source]:
        raise ValueError(f"name must be one of the {len(NAMES[source])} names of {source} in interop, got {base!r}")
    if tag and source not in ("torchvision", "torchvision.video", "timm"):
        raise ValueError(f"name must have no tag for weights of {source}, got {name!r}")
    with fetching(source, name):
        given = plain_names(FETCH[source](base, tag))
    heads = {f"{table['head']}.bias" for table in VOCABULARIES[source] if "head" in table}
    classes = next((len(given[head]) for head in heads if head in given), 0)
    net = NAMES[source][base](**{"num_classes": classes, **options})
    other_head = net.num_classes != classes
    load(net, given, vocabulary=source, first_conv=first_conv, inflate=inflate, drop_head=other_head)
    return net


@contextmanager
def fetching(source: str, name: str) -> Iterator[None]:
    """Say of whose weights an error is: each library and each client of a hub raises its own."""
    try:
        yield
    except ModuleNotFoundError as error:
        library = source.partition(".")[0]
        raise ModuleNotFoundError(f"weights of {library} need it installed: pip install {library} ({error})") from error
    except ValueError:
        raise
    except Exception as error:
        raise ConnectionError(f"weights {name} of {source} could not be fetched: {error}") from error


def from_torchvision(name: str, tag: str) -> Mapping[str, Tensor]:
    """Weights whose hash torchvision checks."""
    from torchvision.models import get_model_weights

    published = get_model_weights(name)
    if tag and tag not in published.__members__:
        raise ValueError(f"tag must be one of {', '.join(published.__members__)} for {name}, got {tag!r}")
    weights = published[tag or "DEFAULT"]
    try:
        given: Mapping[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        raise OSError(f"{weights.url}: {error}") from error
    return given


def from_timm(name: str, tag: str) -> Mapping[str, Tensor]:
    """Weights of the Hugging Face Hub, as timm finds them."""
    import timm

    asked = f"{name}.{tag}" if tag else name
    if not timm.list_models(f"{asked}*" if tag else f"{name}.*", pretrained=True):
        raise ValueError(f"name must be one with weights in timm (timm.list_models(pretrained=True)), got {asked!r}")
    given: Mapping[str, Tensor] = timm.create_model(asked, pretrained=True).state_dict()
    return given


def from_transformers(name: str, tag: str) -> Mapping[str, Tensor]:
    """Weights of Microsoft's repositories, the source of the nets in transformers."""
    from transformers import ResNetForImageClassification

    given: Mapping[str, Tensor] = ResNetForImageClassification.from_pretrained(f"microsoft/{name}").state_dict()
    return given


def from_monai(name: str, tag: str) -> Mapping[str, Tensor]:
    """Weights of MedicalNet (Chen et al. 2019), those of 23 data sets where there are some."""
    from monai.networks.nets.resnet import get_pretrained_resnet_medicalnet

    if not name.startswith("resnet"):
        raise ValueError(f"name must be a resnet for weights of monai, which publishes no others, got {name!r}")
    given: Mapping[str, Tensor] = get_pretrained_resnet_medicalnet(int(name.removeprefix("resnet")))
    return given


def from_pytorchcv(name: str, tag: str) -> Mapping[str, Tensor]:
    """Weights whose hash pytorchcv checks."""
    from pytorchcv.model_provider import get_model

    given: Mapping[str, Tensor] = get_model(name, pretrained=True).state_dict()
    return given


FETCH: dict[str, Callable[[str, str], Mapping[str, Tensor]]] = {
    "torchvision": from_torchvision,
    "torchvision.video": from_torchvision,
    "timm": from_timm,
    "transformers": from_transformers,
    "monai": from_monai,
    "pytorchcv": from_pytorchcv,
}
