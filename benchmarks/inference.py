"""How fast a finished net answers on the CPU: ours, fused and prepacked, against the others with the same weights.

    python benchmarks/inference.py                           # all nets, batch 1 and 8, about 5 minutes on a core
    python benchmarks/inference.py --net resnet50 --batch 8  # one case; the others stay in the file
    python benchmarks/inference.py --compile                 # also torchvision by torch.compile, weights frozen or not
    python benchmarks/inference.py --dtype bfloat16          # weights and images in bfloat16, where it is hardware
    python benchmarks/inference.py --quick                   # a smoke test of seconds, writes only to --out

One process, evaluation without gradients, contestants taking turns; every contestant reads the same images, laid out
as it likes them before the clock runs. Time is processor time of one thread; with `--threads 2` and more it is wall
time. A speed-up is torchvision's time over the contestant's in the same round, torchvision as it stands, in float32 and
NCHW. It counts only for a contestant whose output is that of torchvision to 1e-5 of its largest value, in bfloat16 to
5e-2. What it takes until the first answer, compiling or packing, is kept, too. With one thread the rate of the fastest
convolution is measured beside: what it says of the speed-up that the processor has in store stands in the table.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from peers import data, is_installed, macs_per_second, made_with, merged, same_weights, timed_dtype
from torch import Tensor, nn
from turns import spread, take_turns

from resblocks import create_model, interop
from resblocks.diagnostics import count_macs
from resblocks.fuse import fuse
from resblocks.training.files import write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "inference_cpu_2026-11.json"
BASELINE = "torchvision"
NETS = ("resnet18", "resnet50", "resnext50_32x4d", "densenet121")
PYTORCHCV = {"resnet50": "resnet50b"}  # whose stride sits where torchvision's does
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}

Net = Callable[[Tensor], Tensor]
Contestant = tuple[Callable[[], Net], Tensor]


# --- the contestants


def contestants(name: str, x: Tensor, dtype: torch.dtype, compiled: bool) -> dict[str, Contestant]:
    """How to make each net ready, and its input, all with the weights of the first; without packages that are missing.

    All but the first, the baseline, compute in the dtype.
    """
    theirs = with_statistics(torchvision.models.get_model(name)).eval()
    ours = create_model(name).eval()
    interop.load(ours, theirs)
    cast = x.to(dtype)
    last = cast.contiguous(memory_format=torch.channels_last)
    turned = copy.deepcopy(theirs).to(dtype, memory_format=torch.channels_last)
    found: dict[str, Contestant] = {
        BASELINE: (as_it_is(theirs), x),
        "torchvision channels_last": (as_it_is(turned), last),
    }
    for package, build in {"timm": from_timm, "pytorchcv": from_pytorchcv}.items():
        if is_installed(package):
            found[package] = (as_it_is(same_weights(build(name), theirs).eval().to(dtype)), cast)
    if compiled:
        plain, twin = (copy.deepcopy(theirs).to(dtype) for _ in range(2))
        found["torchvision compiled"] = (partial(torch.compile, plain), cast)
        found["torchvision compiled, frozen"] = (partial(compiled_with_constants, twin, cast), cast)
    size = {"dtype": dtype, "input_size": x.shape[1:], "batch_size": x.shape[0]}
    return found | {
        "resblocks": (as_it_is(copy.deepcopy(ours).to(dtype)), cast),
        "resblocks fused": (partial(fuse, ours, dtype=dtype), last),
        "resblocks fused, prepacked": (partial(fuse, ours, **size), last),
    }


def as_it_is(net: nn.Module) -> Callable[[], Net]:
    return lambda: net


def compiled_with_constants(net: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The net compiled with its weights as constants, which torch reads from its configuration while it compiles.

    The option alone has no effect (torch 2.14); it keeps the code apart from that of a net of the same class.
    """
    run = torch.compile(net, options={"freezing": True})
    with torch._inductor.config.patch(freezing=True), torch.inference_mode():
        run(x)
    return run


def with_statistics(net: nn.Module) -> nn.Module:
    """The net with running statistics other than those that norms start with, so that folding has something to do."""
    generator = torch.Generator().manual_seed(0)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1, generator=generator)
            layer.running_var.uniform_(0.5, 1.5, generator=generator)
    return net


def from_timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name)


def from_pytorchcv(name: str) -> nn.Module:
    from pytorchcv.model_provider import get_model

    return get_model(PYTORCHCV.get(name, name))


# --- the measurement


def measure(
    name: str, batch: int, size: int, dtype: torch.dtype, rounds: int, threads: int, compiled: bool
) -> dict[str, Any]:
    """One net at one batch size: seconds, speed-up and error of each contestant."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    x, _ = data(batch, size)
    steps, answers, ready = {}, {}, {}
    for contestant, (make, given) in contestants(name, x, dtype, compiled).items():
        start = time.perf_counter()
        net = make()
        with torch.inference_mode():
            answers[contestant] = net(given)
        ready[contestant] = time.perf_counter() - start
        steps[contestant] = partial(net, given)
    clock = time.process_time if threads == 1 else time.perf_counter
    with torch.inference_mode():
        seconds = take_turns(steps, rounds, clock)
    errors = {contestant: apart(answer, answers[BASELINE]) for contestant, answer in answers.items()}
    rows = {
        contestant: {
            "seconds": [round(second, 5) for second in spent],
            "ready_seconds": round(ready[contestant], 2),
            **spread([base / own for base, own in zip(seconds[BASELINE], spent, strict=True)], "speedup"),
            "error": errors[contestant],
            "right": errors[contestant] <= TOLERANCE[dtype],
        }
        for contestant, spent in seconds.items()
    }
    case = {
        "net": name,
        "batch": batch,
        "size": size,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": threads,
        "clock": clock.__name__,
        "rows": rows,
    }
    return case | ({"limit": limit(name, x, dtype)} if threads == 1 else {})


def limit(name: str, x: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """What the net multiplies for the batch, and how fast a convolution does here at best."""
    macs = len(x) * count_macs(create_model(name, device="meta"), x.shape[1:])
    return {"macs": macs, "macs_per_second": round(macs_per_second(dtype))}


def apart(output: Tensor, truth: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((output - truth).abs().max() / truth.abs().max())


# --- the command


def keep(case: dict[str, Any], path: Path) -> None:
    """Put the case into the file in place of the one of the same setting, if there is one."""
    cases = json.loads(path.read_text(encoding="utf-8"))["cases"] if path.exists() else []
    write_json(path, {"cases": sorted(merged(cases, [case]), key=place)})


def place(case: dict[str, Any]) -> tuple[Any, ...]:
    """Where in the table a case stands."""
    made_on = case["environment"]["device"]
    return made_on, case["dtype"], NETS.index(case["net"]), case["batch"], case["size"], case["threads"]


def show(case: dict[str, Any]) -> None:
    print(f"{case['net']}, batch {case['batch']}, {case['size']} pixels, {case['dtype']}, threads {case['threads']}")
    for name, row in case["rows"].items():
        ratios = " ".join(f"{row[f'speedup_{what}']:.2f}" for what in ("min", "median", "max"))
        wrong = "" if row["right"] else "  WRONG"
        print(
            f"  {name:36s} {min(row['seconds']) * 1e3:8.1f} ms   {ratios}   error {row['error']:.0e}{wrong}"
            f"   ready after {row['ready_seconds']} s"
        )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", choices=NETS, action="append")
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true", help="also torchvision by torch.compile")
    parser.add_argument("--quick", action="store_true", help="one small case, two rounds")
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS.name} in benchmarks/results, nothing with --quick")
    options = parser.parse_args()
    if options.quick:
        options.net, options.batch, options.size, options.rounds = ["resnet18"], [1], 224, 2
    elif options.out is None:
        options.out = RESULTS
    return options


def main() -> None:
    options = parse_options()
    dtype = timed_dtype(options.dtype)
    if options.compile:
        torch._inductor.config.force_disable_caches = True  # else a second run is ready too soon
    for name in options.net or NETS:
        for batch in options.batch or (1, 8):
            case = measure(name, batch, options.size, dtype, options.rounds, options.threads, options.compile)
            case["environment"] = made_with()
            show(case)
            if options.out is not None:
                keep(case, options.out)


if __name__ == "__main__":
    main()
