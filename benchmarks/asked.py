"""What five libraries do when asked for the same: a net each, built by its own words, run and looked at.

    python benchmarks/asked.py    # a minute on a core

A cell is "yes", what came instead, the error, or "no argument" where neither a constructor nor a method offers it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import DenseNet as MonaiDense
from monai.networks.nets import ResNet as Monai
from pytorchcv.models.resnet import ResNet as Cv
from pytorchcv.models.resnetd import get_resnetd
from timm.models.densenet import DenseNet as TimmDense
from timm.models.resnet import BasicBlock as TimmBasic
from timm.models.resnet import ResNet as Timm
from torch import Tensor, nn
from torchvision.models.densenet import DenseNet as TorchvisionDense
from torchvision.models.resnet import BasicBlock as TorchvisionBasic
from torchvision.models.resnet import ResNet as Torchvision
from torchvision.ops import DropBlock2d

import resblocks as rb
from resblocks.training.environment import environment
from resblocks.training.files import write_json

RESULTS = Path(__file__).resolve().parent / "results" / "asked_cpu_2026-11.json"
LIBRARIES = ("torchvision", "timm", "monai", "pytorchcv", "resblocks")
NO_ARGUMENT = "no argument"

Build = Callable[[], nn.Module]


def image(dims: int = 2) -> Tensor:
    return torch.randn(2, 3, *[64] * dims)


def trains_all(net: nn.Module, dims: int = 2) -> str:
    """Whether every weight gets a gradient."""
    net(image(dims)).sum().backward()
    idle = [name for name, weight in net.named_parameters() if weight.grad is None]
    return f"{len(idle)} weights without a gradient" if idle else "yes"


def has_none(net: nn.Module, kind: type[nn.Module]) -> str:
    """Whether no layer of a kind is left."""
    left = sum(isinstance(layer, kind) for layer in net.modules())
    net(image())
    return f"{left} of the old ones left" if left else "yes"


def has_some(net: nn.Module, name: str) -> str:
    """Whether there are layers whose class has that in its name."""
    net(image())
    return "yes" if any(name in type(layer).__name__ for layer in net.modules()) else "no such layer"


def has_stages(net: nn.Module, stages: int) -> str:
    """Whether the net has so many stages, each of which trains and halves the resolution of the one before."""
    sizes = watched_sizes(net)
    answer = trains_all(net)
    found = len({size for size in sizes if size <= 16})
    return answer if found == stages else f"{found} stages"


def puts_out_at(net: nn.Module, positions: int) -> str:
    """Whether the smallest maps have so many positions along a side, by dilations in place of two strides."""
    sizes = watched_sizes(net)
    net(image())
    if min(sizes) != positions:
        return f"maps of {min(sizes)}, not {positions}"
    dilations = {conv.dilation[0] for conv in net.modules() if isinstance(conv, nn.Conv2d)}
    return "yes" if dilations == {1, 2, 4} else f"dilations {', '.join(map(str, sorted(dilations)))}"


def watched_sizes(net: nn.Module) -> list[int]:
    """A list to which the net, when it runs, adds the side of each map that a convolution puts out."""
    sizes: list[int] = []
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda layer, x, y: sizes.append(y.shape[-1]))
    return sizes


def keeps_values(net: nn.Module) -> str:
    """Whether what a forward hook was handed is still the same when the net is through."""
    seen: list[tuple[Tensor, Tensor]] = []
    for layer in net.modules():
        layer.register_forward_hook(lambda layer, x, y: seen.append((y, y.detach().clone())))
    net.eval()(image())
    changed = sum(not torch.equal(value, copy) for value, copy in seen)
    return f"{changed} of {len(seen)} values overwritten" if changed else "yes"


def takes_backward_hooks(net: nn.Module) -> str:
    """Whether a full backward hook may sit on every layer."""
    for layer in net.modules():
        layer.register_full_backward_hook(lambda layer, grad_in, grad_out: None)
    net(image().requires_grad_()).sum().backward()
    return "yes"


def counts_once(net: nn.Module) -> str:
    """Whether one step counts a batch once in the running statistics."""
    net(image()).sum().backward()
    counts = {int(n) for name, n in net.named_buffers() if name.endswith("num_batches_tracked")}
    return "yes" if counts == {1} else f"batches counted: {', '.join(map(str, sorted(counts)))}"


def differentiates(net: nn.Module) -> str:
    """Whether the gradient at the input is that of finite differences."""
    net, x = net.double().eval(), image().double().requires_grad_()
    (grad,) = torch.autograd.grad(net(x).sum(), x)
    way = torch.randn_like(x)
    with torch.no_grad():
        slope = float((net(x + 1e-6 * way) - net(x - 1e-6 * way)).sum()) / 2e-6
    apart = abs(float((grad * way).sum()) - slope) / abs(slope)
    return "yes" if apart < 1e-5 else f"gradient off by {100 * apart:.0f} %"


def monai(**options: Any) -> nn.Module:
    how: dict[str, Any] = {"spatial_dims": 2, "num_classes": 10, **options}
    return Monai("basic", how.pop("layers", [2, 2, 2, 2]), how.pop("widths", [64, 128, 256, 512]), **how)


def checkpointed(net: nn.Module) -> nn.Module:
    net.set_grad_checkpointing(True)
    return net


def cv(stages: int) -> nn.Module:
    net = Cv([[16 * 2**stage] for stage in range(stages)], 16, False, True, num_classes=10)
    net.features.final_pool = nn.AdaptiveAvgPool2d(1)  # its own is for images of one size
    return net


def dropping_relu() -> nn.Module:
    return nn.Sequential(DropBlock2d(0.1, 3), nn.ReLU())


R18 = [2, 2, 2, 2]
LAYERS: dict[str, Any] = {"block_config": (2, 2, 2, 2)}
GROUPS = ("group", {"num_groups": 8})


def of_stages(stages: int) -> dict[str, Build]:
    widths = [16 * 2**stage for stage in range(stages)]
    return {
        "torchvision": lambda: Torchvision(TorchvisionBasic, [1] * stages),
        "timm": lambda: Timm(TimmBasic, [1] * stages, channels=widths),
        "monai": lambda: monai(layers=[1] * stages, widths=widths, conv1_t_stride=2),
        "pytorchcv": lambda: cv(stages),
        "resblocks": lambda: rb.ResNet(rb.BasicBlock, [1] * stages, widths),
    }


PLAIN: dict[str, Build] = {
    "torchvision": lambda: Torchvision(TorchvisionBasic, R18),
    "timm": lambda: Timm(TimmBasic, R18),
    "monai": monai,
    "pytorchcv": lambda: cv(4),
    "resblocks": lambda: rb.create_model("resnet18"),
}
REQUESTS: dict[str, tuple[Callable[[nn.Module], str], dict[str, Build]]] = {
    "a ResNet of three stages": (partial(has_stages, stages=3), of_stages(3)),
    "a ResNet of five stages": (partial(has_stages, stages=5), of_stages(5)),
    "group norm in all of ResNet-18": (
        partial(has_none, kind=nn.modules.batchnorm._BatchNorm),
        {
            "torchvision": lambda: Torchvision(TorchvisionBasic, R18, norm_layer=partial(nn.GroupNorm, 8)),
            "timm": lambda: Timm(TimmBasic, R18, norm_layer="groupnorm"),
            "monai": lambda: monai(norm=GROUPS),
            "resblocks": lambda: rb.create_model("resnet18", norm=rb.group_norm),
        },
    ),
    "group norm in all of a DenseNet": (
        partial(has_none, kind=nn.modules.batchnorm._BatchNorm),
        {
            "timm": lambda: TimmDense(**LAYERS, norm_layer="groupnorm"),
            "monai": lambda: MonaiDense(2, 3, 10, **LAYERS, norm=GROUPS),
            "resblocks": lambda: rb.DenseNet(depths=(2, 2, 2, 2), norm=rb.group_norm),
        },
    ),
    "ELU for every ReLU": (
        partial(has_none, kind=nn.ReLU),
        {
            "timm": lambda: Timm(TimmBasic, R18, act_layer=nn.ELU),
            "monai": lambda: monai(act="elu"),
            "resblocks": lambda: rb.create_model("resnet18", activation=nn.ELU),
        },
    ),
    "one dimension": (
        partial(trains_all, dims=1),
        {
            "monai": lambda: monai(spatial_dims=1),
            "resblocks": lambda: rb.create_model("resnet18", dims=1),
        },
    ),
    "ResNet-18 that dilates from stride 8 on": (
        partial(puts_out_at, positions=8),
        {
            "torchvision": lambda: Torchvision(TorchvisionBasic, R18, replace_stride_with_dilation=[False, True, True]),
            "timm": lambda: Timm(TimmBasic, R18, output_stride=8),
            "pytorchcv": lambda: get_resnetd(18, ordinary_init=True),
            "resblocks": lambda: rb.create_model("resnet18", output_stride=8),
        },
    ),
    "recompute in backward, count a batch once": (
        counts_once,
        {
            "torchvision": lambda: TorchvisionDense(**LAYERS, memory_efficient=True),
            "timm": lambda: checkpointed(Timm(TimmBasic, R18)),
            "resblocks": lambda: rb.create_model("resnet18", checkpoint=True),
        },
    ),
    "hooks see what left a layer": (keeps_values, PLAIN),
    "backward hooks on every layer": (takes_backward_hooks, PLAIN),
    "DropBlock in ResNet-18": (
        partial(has_some, name="DropBlock"),
        {
            "timm": lambda: Timm(TimmBasic, R18, drop_block_rate=0.1),
            "resblocks": lambda: rb.create_model("resnet18", stem="cifar", activation=dropping_relu),
        },
    ),
    "shortcut A with its gradient": (
        differentiates,
        {
            "monai": lambda: monai(shortcut_type="A"),
            "resblocks": lambda: rb.create_model("resnet18", shortcut="A"),
        },
    ),
    "no skips, and no weights for them": (
        trains_all,
        {"resblocks": lambda: rb.create_model("resnet18", skip=False)},
    ),
}


def answer(check: Callable[[nn.Module], str], build: Build | None) -> str:
    """What a library does, errors too."""
    if build is None:
        return NO_ARGUMENT
    torch.manual_seed(0)
    try:
        return check(build())
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = {}
    for request, (check, builds) in REQUESTS.items():
        rows[request] = {library: answer(check, builds.get(library)) for library in LIBRARIES}
        print(request, rows[request], flush=True)
    made_with = environment(torch.device("cpu"))
    made_with["versions"] |= {package: version(package) for package in LIBRARIES}
    write_json(options.out, {"environment": made_with, "rows": rows})


if __name__ == "__main__":
    main()
