"""What a training step of a residual net costs: ours against torchvision's, timm's and pytorchcv's, same weights.

    python benchmarks/train_step.py                  # gates, memory, time and small maps: 10 minutes on a core
    python benchmarks/train_step.py --check          # half a minute: counts the memory, fails where the file is not so
    python benchmarks/train_step.py --dtype bfloat16 # time under autocast, where the processor has bfloat16

Memory is counted operator by operator (`live_bytes.py`) over one forward and backward, without parameters and input:
exact, the same on every machine. Time is processor time of one thread, contestants taking turns, all channels_last but
for the one that says otherwise. Both count only beside the gates: in float64, gradients and batch-norm buffers must be
those of the baseline. "resblocks out of place" has a hook on every layer, so that no buffer is shared.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from live_bytes import LiveBytes, check_the_counter, peak_of_step
from peers import check_memory, data, gate, is_installed, made_with, merged, same_weights, timed_dtype
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves
from turns import against, take_turns

from resblocks import create_model, interop
from resblocks.models import wide_resnet
from resblocks.training.files import write_json
from resblocks.training.small_maps import _Product, small_map_products

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "train_step_cpu_2026-11.json"
MIB = 2**20


class Case(NamedTuple):
    """A net, the images on which its memory is counted and its time is taken, and the library to compare with."""

    size: int
    timed_batch: int
    timed_size: int
    baseline: str = "torchvision"


CASES = {
    "resnet18_cifar": Case(32, 8, 32),
    "resnet18": Case(224, 4, 96),
    "resnet50": Case(224, 4, 64),
    "resnext50_32x4d": Case(224, 4, 64),
    "wrn_16_4": Case(32, 4, 32, "pytorchcv"),
    "wide_resnet50_2": Case(224, 4, 64),
}
TIMED = ("resnet18_cifar", "resnet18", "resnet50", "resnext50_32x4d", "wrn_16_4")
MEMORY_BATCH = 32


# --- the contestants


def ours(name: str, **options: Any) -> nn.Module:
    if name.startswith("wrn"):
        return wide_resnet(16, 4, **options)
    if name == "resnet18_cifar":
        return create_model("resnet18", stem="cifar", num_classes=10, **options)
    return create_model(name, **options)


def out_of_place(name: str) -> nn.Module:
    net = ours(name)
    for module in net.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda module, given, out: None)
    return net


def small_maps(name: str) -> nn.Module:
    net = ours(name)
    net.products = small_map_products(net)  # kept, since it ends with its context
    net.products.__enter__()
    return net


def torchvisions(name: str) -> nn.Module:
    return with_stem(torchvision.models.get_model(name.removesuffix("_cifar"), num_classes=classes(name)), name)


def timms(name: str, checkpointed: bool = False) -> nn.Module:
    import timm

    net = with_stem(timm.create_model(name.removesuffix("_cifar"), num_classes=classes(name)), name)
    net.set_grad_checkpointing(checkpointed)
    return net


def pytorchcvs(name: str) -> nn.Module:
    from pytorchcv.model_provider import get_model
    from pytorchcv.models.wrn_cifar import get_wrn_cifar

    if name.startswith("wrn"):
        return get_wrn_cifar(num_classes=10, blocks=16, width_factor=4)
    net = get_model({"resnet50": "resnet50b"}.get(name, name))  # whose stride sits where torchvision's does
    net.features.final_pool = nn.AdaptiveAvgPool2d(1)  # its own is for 224 pixels alone
    return net


def classes(name: str) -> int:
    return 10 if CASES[name].size == 32 else 1000


def with_stem(net: Any, name: str) -> nn.Module:
    """The net, with the stem for small images where the case has one."""
    if name.endswith("_cifar"):
        net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return net


BUILD: dict[str, Callable[[str], nn.Module]] = {
    "torchvision": torchvisions,
    "torchvision contiguous": torchvisions,
    "timm": timms,
    "timm checkpointed": partial(timms, checkpointed=True),
    "pytorchcv": pytorchcvs,
    "resblocks": ours,
    "resblocks out of place": out_of_place,
    "resblocks norms": partial(ours, checkpoint="norms"),
    "resblocks checkpoint": partial(ours, checkpoint=True),
    "resblocks small maps": small_maps,
}


def contestants(name: str) -> tuple[str, ...]:
    """Who takes part in a case, the baseline first."""
    theirs = ["torchvision", "torchvision contiguous", "timm", "timm checkpointed", "pytorchcv"]
    if name.startswith("wrn"):
        theirs = ["pytorchcv"]
    elif name.endswith(("_cifar", "_2")) or not is_installed("pytorchcv"):
        theirs.remove("pytorchcv")  # it has no such net
    own = [key for key in BUILD if key.startswith("resblocks")]
    if name not in ("resnet18_cifar", "resnet18", "resnet50"):
        own.remove("resblocks small maps")  # its wide 3x3 convolutions are in groups, or missing
    return (*theirs, *own)


def build(name: str, chosen: tuple[str, ...]) -> dict[str, nn.Module]:
    """The nets of a case, all with the weights of the first."""
    torch.manual_seed(0)
    nets = {contestant: BUILD[contestant](name) for contestant in chosen}
    first = nets[chosen[0]]
    for contestant, net in nets.items():
        if contestant.startswith("resblocks") and not name.startswith("wrn"):
            interop.load(net, first)
        else:
            same_weights(net, first)
    return nets


# --- the gates


def gates(name: str, chosen: tuple[str, ...] | None = None, size: int = 32) -> dict[str, Any]:
    """How far gradients and buffers are from those of the baseline after one step in float64."""
    found = {}
    x, labels = data(4, size, dtype=torch.float64)
    for contestant, net in build(name, chosen or contestants(name)).items():
        functional.cross_entropy(net.double()(x), labels).backward()
        found[contestant] = [weight.grad for weight in net.parameters()], list(net.buffers())
    truth = found[CASES[name].baseline]
    return {contestant: gate(*tensors, *truth) for contestant, tensors in found.items()}


# --- memory


def memory(name: str, chosen: tuple[str, ...] | None = None, batch: int = MEMORY_BATCH) -> dict[str, Any]:
    """Bytes that a forward keeps, the peak of forward and backward and all that both allocate, over the baseline's.

    And the calls of operators that the baseline does not make: with none, a step can take no more of the processor but
    for what Python does between the calls.
    """
    rows: dict[str, dict[str, Any]] = {}
    calls = {}
    for contestant in chosen or contestants(name):
        if contestant in ("torchvision contiguous", "resblocks small maps"):
            continue  # no other in memory
        with torch.device("meta"):
            net = BUILD[contestant](name)
        x, labels = data(batch, CASES[name].size, "meta")
        forward = partial(loss_of, net, x, labels)
        saved, peak = peak_of_step(forward)
        with Made() as made:
            forward().backward()
        rows[contestant] = {"batch": batch, "saved_bytes": saved, "peak_bytes": peak, "made_bytes": made.total}
        calls[contestant] = made.calls
    base = rows[CASES[name].baseline]
    for contestant, row in rows.items():
        row |= {f"{what}_ratio": row[f"{what}_bytes"] / base[f"{what}_bytes"] for what in ("saved", "peak", "made")}
        row["extra_calls"] = (calls[contestant] - calls[CASES[name].baseline]).total()
    return rows


class Made(LiveBytes):
    """Counts what a step allocates in all: memory that is written for the first time is what out of place costs.

    And its calls by operator and shapes, without those that only look at a tensor in another way.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.calls: Counter[tuple[str, tuple[torch.Size, ...]]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            given = tree_leaves((args, kwargs))
            self.calls[str(func), tuple(leaf.shape for leaf in given if isinstance(leaf, Tensor))] += 1
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _add(self, storage: Any) -> None:
        self.total += storage.nbytes() if storage not in self._known else 0
        super()._add(storage)


def loss_of(net: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    net.zero_grad()
    return functional.cross_entropy(net(x), labels)


def all_memory() -> dict[str, Any]:
    for device in ("meta", "cpu"):
        check_the_counter(device)
    return {name: memory(name) for name in CASES}


# --- time


def times(name: str, batch: int | None, rounds: int, dtype: torch.dtype, compiled: bool) -> dict[str, Any]:
    """Seconds of one forward and backward, contestants taking turns, and the ratio to the baseline's of that round."""
    case = CASES[name]._replace(timed_batch=batch or CASES[name].timed_batch)
    nets = build(name, contestants(name))
    if compiled:
        nets["torchvision compiled"] = copy.deepcopy(nets[case.baseline])
        nets["resblocks compiled"] = copy.deepcopy(nets["resblocks"])
    seconds = take_turns({key: step(key, net, case, dtype) for key, net in nets.items()}, rounds)
    said = {"batch": case.timed_batch, "size": case.timed_size, "dtype": str(dtype).removeprefix("torch.")}
    return {"net": name, **said, "rows": against(seconds, case.baseline)}


def step(contestant: str, net: nn.Module, case: Case, dtype: torch.dtype) -> Callable[[], None]:
    last = torch.contiguous_format if "contiguous" in contestant else torch.channels_last
    own = torch.float32 if "contiguous" in contestant else dtype  # the default of torchvision
    net = net.to(memory_format=last)
    x, labels = data(case.timed_batch, case.timed_size)
    x = x.contiguous(memory_format=last)
    run = torch.compile(net) if "compiled" in contestant else net

    def once() -> None:
        net.zero_grad()
        with torch.autocast("cpu", own, enabled=own != torch.float32):
            loss = functional.cross_entropy(run(x).float(), labels)
        loss.backward()

    return once


# --- convolutions with small output maps: what the rule of resblocks.training.small_maps comes from

SHAPES = [  # channels in and out, size of the map, stride
    (128, 128, 4, 1),
    (256, 256, 4, 1),
    (256, 512, 8, 2),
    (512, 512, 4, 1),
    (512, 512, 2, 1),
    (512, 512, 1, 1),
    (256, 256, 8, 1),
]


def convolutions(rounds: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Forward and backward of single convolutions: torch's, the weight's gradient as a product, all as products."""
    rows = []
    for batch in (32, 128):
        for inside, outside, size, stride in SHAPES:
            x = torch.randn(batch, inside, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)
            weight = torch.randn(outside, inside, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
            given = (x.requires_grad_(), weight.requires_grad_())
            ways = {
                "convolution": lambda given=given, stride=stride: functional.conv2d(*given, None, stride, 1),
                "weight": lambda given=given, stride=stride: _Product.apply(*given, stride, False),
                "all": lambda given=given, stride=stride: _Product.apply(*given, stride, True),
            }
            seconds = take_turns({key: partial(differentiate, way, given) for key, way in ways.items()}, rounds)
            rows.append(
                {
                    "batch": batch,
                    "channels": [inside, outside],
                    "size": size,
                    "stride": stride,
                    "dtype": str(dtype).removeprefix("torch."),
                    "rows": against(seconds, "convolution", digits=5),
                }
            )
    return rows


def differentiate(way: Callable[[], Tensor], given: tuple[Tensor, ...]) -> None:
    y = way()
    torch.autograd.grad(y, given, torch.ones_like(y))


# --- the command


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare the memory figures with the file's")
    parser.add_argument(
        "--only", choices=["gates", "memory", "time", "small_maps"], action="append", help="may be given several times"
    )
    parser.add_argument("--net", choices=TIMED, action="append", help="time these alone; the others stay in the file")
    parser.add_argument("--batch", type=int, help="of the times (default: that of the case)")
    parser.add_argument("--rounds", type=int, default=15, help="of the times (default: 15)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the times")
    parser.add_argument("--compile", action="store_true", help="time torch.compile, too")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of the results")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    dtype = timed_dtype(options.dtype)
    if options.check:
        check_memory(options.out, all_memory())
        return
    parts: dict[str, Callable[[], Any]] = {
        "gates": lambda: {name: gates(name) for name in CASES},
        "memory": all_memory,
        **{
            f"time {name}": lambda name=name: [times(name, options.batch, options.rounds, dtype, options.compile)]
            for name in options.net or TIMED
        },
        "small_maps": lambda: convolutions(options.rounds, dtype),
    }
    for name, measure in parts.items():
        part = name.partition(" ")[0]
        if not options.only or part in options.only:
            keep(part, measure(), options.out)


def keep(part: str, found: Any, path: Path) -> None:
    """Put a part into the file, with what it was made with; times of other nets and precisions stay."""
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"environment": {}}
    made = made_with()
    if isinstance(found, list):
        found = merged(result.get(part, []), [{**case, "environment": made} for case in found])
    else:
        result["environment"][part] = made
    write_json(path, {**result, part: found})
    print(json.dumps({part: found}, indent=1), flush=True)


if __name__ == "__main__":
    main()
