"""Do to every net what PyTorch and its tools do to a model, and compare the numbers with those of the net itself.

    python benchmarks/compat.py                          # all nets, all checks; resumes where the file ends
    python benchmarks/compat.py --nets "resnet18*" --checks compile onnx

Each check builds the net, treats it, and raises where the result differs from the untreated net by more than the
precision explains. The table in docs/tools.md is made of the file that this writes; tests/test_compat.py runs the
same checks on small nets.
"""

from __future__ import annotations

import argparse
import copy
import gc
import io
import json
import pickle
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

import resblocks as rb
from resblocks.attention import CBAM, ECA, SE
from resblocks.config import from_config, to_config
from resblocks.fuse import fuse
from resblocks.interop import centred_padding
from resblocks.joins import LayerScale
from resblocks.layers import WSConv2d, batch_norm, blur_downsample, group_norm
from resblocks.models import MODELS
from resblocks.training.environment import commit, environment
from resblocks.training.files import write_json

RESULTS = Path(__file__).resolve().parent / "results" / "compat_cpu_2026-11.json"
Build = Callable[..., nn.Module]


def small(block: Any = rb.BasicBlock, **options: Any) -> Build:
    """A net of two stages for 32x32 images."""
    kind: dict[str, Any] = {"stem": "cifar", "stem_width": 16, "num_classes": 5, **options}
    return partial(rb.ResNet, block, (2, 1), (16, 32), **kind)


# One small net for each word of the library: what tests/test_compat.py runs, and the option rows of the table.
SMALL: dict[str, Build] = {
    "basic": small(),
    "basic, plain": small(skip=False),
    "basic, shortcut A": small(shortcut="A"),
    "bottleneck, deep stem, shortcut D": small(rb.Bottleneck, stem="deep", shortcut="D"),
    "bottleneck, stride first, padded on both sides": small(
        partial(rb.Bottleneck, stride_first=True), shortcut=centred_padding
    ),
    "ResNeXt, SE": small(partial(rb.ResNeXtBlock, cardinality=2, base_width=32), attention=SE),
    "preact basic, shortcut C, ECA": small(rb.PreActBasicBlock, shortcut="C", attention=ECA),
    "preact bottleneck, CBAM": small(rb.PreActBottleneck, attention=CBAM),
    "wide, dropout": small(rb.WideBlock, dropout=0.3),
    "basic, drop path, layer scale": small(drop_path=0.2, scale=LayerScale),
    "basic, blur pool, dilated": small(downsample=blur_downsample, stem="imagenet", output_stride=4),
    "basic, shortcut D, dilated": small(shortcut="D", stem="imagenet", output_stride=4),
    "bottleneck, group norm, weight standardised": small(rb.Bottleneck, norm=group_norm, conv=WSConv2d),
    "basic, recomputed": small(checkpoint=True),
    "basic, 1D": small(dims=1),
    "basic, 3D": small(dims=3),
    "dense": partial(rb.DenseNet, 8, (2, 2), stem="cifar", num_classes=5),
    "dense, plain": partial(rb.DenseNet, 8, (2, 2), stem="cifar", num_classes=5, skip=False),
    "baseline": partial(rb.BaselineCNN, (2, 2), (8, 16), stem_width=8, num_classes=5),
}


def settled(build: Build) -> Build:
    """The same, with running statistics of a batch: with those that norms start with, deep nets overflow."""

    def built(**options: Any) -> nn.Module:
        net = build(**options)
        return net if options.get("device") == "meta" else settle(net)

    return built


NETS: dict[str, Build] = {name: settled(build) for name, build in {**SMALL, **MODELS}.items()}


@torch.no_grad()
def settle(net: nn.Module) -> nn.Module:
    """Give the net the statistics of one batch, always the same."""
    norms = {layer: layer.momentum for layer in net.modules() if isinstance(layer, batch_norm)}
    if not norms:
        return net
    for norm in norms:
        norm.momentum = None  # the plain mean, here that of one batch
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net(example(net, 4))
    for norm, momentum in norms.items():
        norm.momentum = momentum
    return net


def example(net: nn.Module, batch: int = 2) -> Tensor:
    """An input of the net: 32 positions along each dimension, 64 behind an ImageNet stem."""
    first = next(weight for weight in net.parameters() if weight.dim() > 2)
    size = 32 if first.shape[2] == 3 else 64
    return torch.randn(batch, first.shape[1], *[size] * (first.dim() - 2), dtype=first.dtype)


def same(found: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> None:
    """Raise unless the tensors are the same but for rounding, measured by their norms."""
    if found.shape != wanted.shape:
        raise AssertionError(f"shape {tuple(found.shape)} in place of {tuple(wanted.shape)}")
    found, wanted = found.detach().double(), wanted.detach().double()
    apart = float((found - wanted).norm() / wanted.norm())
    if not apart <= tolerance:
        raise AssertionError(f"{apart:.1e} apart, allowed {tolerance:.0e}")


@torch.no_grad()
def rounding(net: nn.Module, x: Tensor, least: float = 1e-4, dtype: torch.dtype = torch.float32) -> float:
    """How far two ways to compute the net in the dtype may be apart.

    An input that is moved by the dtype's epsilon moves the exact output by so much. Every layer rounds, not the input
    alone: ten times that. Deep nets of random weights multiply it; where it stays small, `least` counts. Never more
    than a half: outputs that have nothing in common are 1 and more apart.
    """
    net, x = copy.deepcopy(net).double(), x.double()
    exact, moved = net(x), net(x * (1 + torch.finfo(dtype).eps * (2 * torch.rand_like(x) - 1)))
    return min(0.5, max(least, 10 * float((moved - exact).norm() / exact.norm())))


def gradients(net: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Gradients of all weights from a call of the net, dropout under one seed."""
    torch.manual_seed(1)
    return list(torch.autograd.grad(call(x).square().mean(), list(net.parameters())))


def same_gradients(found: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-3) -> None:
    """Raise unless the gradients of each weight are the same; those a thousandth of all count as rounding."""
    whole = float(torch.stack([value.detach().norm() for value in wanted]).norm())
    for number, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        ours, theirs = ours.detach(), theirs.detach()
        apart = float((ours - theirs).norm()) / max(float(theirs.norm()), 1e-3 * whole)
        if not apart <= tolerance:
            raise AssertionError(f"gradient {number} {apart:.1e} apart, allowed {tolerance:.0e}")


def draws(net: nn.Module) -> bool:
    """Whether the net draws random numbers in training, which other tracers draw in another order."""
    return any(isinstance(child, (nn.Dropout, rb.DropPath)) for child in net.modules())


def check_compile(build: Build, backend: str = "aot_eager", dtype: torch.dtype = torch.float32) -> None:
    """torch.compile without a graph break, once for two batch sizes, forward and backward."""
    net = build(dtype=dtype).train(False)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (2, 3):
            x = example(net, batch)
            torch._dynamo.mark_dynamic(x, 0)
            same_gradients(gradients(net, compiled, x), gradients(net, net, x))


def check_compile_train(build: Build) -> None:
    """torch.compile of the net in training mode: one graph, running statistics as in eager mode."""
    net = build()
    eager, x = copy.deepcopy(net), example(net)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.manual_seed(0)
    found = compiled(x)
    torch.manual_seed(0)
    same(found, eager(x), float("inf") if draws(net) else 1e-4)
    if not draws(net):
        for ours, theirs in zip(net.buffers(), eager.buffers(), strict=True):
            same(ours, theirs)


def check_export(build: Build) -> None:
    """torch.export with a free batch size."""
    net = build().eval()
    program = torch.export.export(net, (example(net),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    x = example(net, 3)
    same(program.module()(x), net(x))


def check_fx(build: Build) -> None:
    """torch.fx.symbolic_trace, gradients too."""
    net = build().eval()
    traced, x = torch.fx.symbolic_trace(net), example(net, 3)
    same(traced(x), net(x))
    same_gradients(gradients(traced, traced, x), gradients(net, net, x))


def check_onnx(build: Build) -> None:
    """ONNX export, run by onnxruntime on another batch size."""
    import onnxruntime

    net, file = build().eval(), io.BytesIO()
    free = ({0: torch.export.Dim.DYNAMIC},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(net, (example(net),), dynamic_shapes=free, dynamo=True, verbose=False)
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    x = example(net, 3)
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    same(torch.from_numpy(found), net(x), rounding(net, x))


def check_ensemble(build: Build) -> None:
    """torch.func: functional_call, and vmap over the stacked weights of two nets."""
    nets = [build().eval() for _ in range(2)]
    x = example(nets[0])
    same(functional_call(nets[0], dict(nets[1].state_dict()), (x,)), nets[1](x))
    weights, buffers = stack_module_state(nets)
    base = copy.deepcopy(nets[0]).to("meta")

    def call(parameters: dict[str, Tensor], states: dict[str, Tensor]) -> Tensor:
        out: Tensor = functional_call(base, (parameters, states), (x,))
        return out

    with torch.no_grad():
        same(vmap(call)(weights, buffers), torch.stack([net(x) for net in nets]))


def check_per_sample_gradients(build: Build) -> None:
    """torch.func: the gradient of each sample by vmap over grad, with group norm in place of batch norm.

    In float64: random weights under group norm multiply the rounding of float32 from layer to layer.
    """
    net = build(norm=group_norm, dtype=torch.float64).eval()
    weights, x = dict(net.named_parameters()), example(net)

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        out: Tensor = functional_call(net, parameters, (sample[None],)).square().mean()
        return out

    found = vmap(grad(loss), (None, 0))(weights, x)
    for number in range(len(x)):
        wanted = torch.autograd.grad(loss(weights, x[number]), list(weights.values()))
        same_gradients([found[name][number] for name in weights], list(wanted))


def check_autocast(build: Build) -> None:
    """bfloat16 autocast, forward and backward."""
    net = build().eval()
    x = example(net)
    with torch.autocast("cpu", torch.bfloat16):
        found = net(x)
    assert found.dtype == torch.bfloat16, found.dtype
    same(found, net(x), rounding(net, x, 0.1, torch.bfloat16))
    found.float().square().mean().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in net.parameters())


def check_float64(build: Build) -> None:
    """The net made in float64 and the one turned to it."""
    net = build().eval()
    double = copy.deepcopy(net).double()
    x = example(double)
    assert double(x).dtype == torch.float64
    same(net(x.float()), double(x), rounding(net, x))
    made = build(dtype=torch.float64)
    assert {weight.dtype for weight in made.parameters()} == {torch.float64}


def check_channels_last(build: Build) -> None:
    """channels_last in, channels_last out of every stage, the same numbers."""
    net = build().eval()
    x = example(net)
    if x.dim() == 3:
        raise ValueError("torch has no channels_last for 1D data")
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    turned = copy.deepcopy(net).to(memory_format=last)
    for number, found in enumerate(turned.features(x.to(memory_format=last))):
        if not found.is_contiguous(memory_format=last):
            raise AssertionError(f"stage {number} puts out strides {found.stride()}")
    same(turned(x.to(memory_format=last)), net(x), rounding(net, x))


def check_meta(build: Build) -> None:
    """Made without memory on the meta device, then given memory and weights: those of the same seed."""
    torch.manual_seed(0)
    wanted = build().state_dict()
    net = build(device="meta")
    assert all(tensor.is_meta for tensor in net.state_dict().values())
    net.to_empty(device="cpu")
    torch.manual_seed(0)
    net.init_weights()
    found = settle(net).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], value) for key, value in wanted.items())


def check_feature_extractor(build: Build) -> None:
    """torchvision's create_feature_extractor gives the maps of the stages."""
    from torchvision.models.feature_extraction import create_feature_extractor

    net = build().eval()
    stages = [f"stages.{number}" for number in range(len(net.stages))]
    x = example(net)
    found, wanted = create_feature_extractor(net, stages)(x), net.features(x)
    for name, stage in zip(stages[:-1], wanted[:-1], strict=True):
        same(found[name], stage)
    same(net.final(found[stages[-1]]), wanted[-1])


def check_copies(build: Build) -> None:
    """deepcopy, pickle and a whole net in a file give the same net."""
    net = build().eval()
    x = example(net)
    wanted, file = net(x), io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for again in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(file, weights_only=False)):
        same(again(x), wanted, 0.0)


def check_quantised(build: Build) -> None:
    """PT2E of torchao on the fused net: prepare, calibrate, convert to 8 bits.

    On the net itself it folds a norm into the convolution before it also where a shortcut or a concatenation reads that
    convolution, too, as in pre-activation nets and DenseNets: wrong results without a word (torchao 0.18).
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    net = build().eval()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(fuse(net), (example(net),)).module()
        prepared = prepare_pt2e(program, quantizer)
        x = example(net)
        prepared(x)
        converted = convert_pt2e(prepared)
    assert any("quantize_per" in str(node.target) for node in converted.graph.nodes)
    same(converted(x), net(x), 0.3)


def check_ddp(build: Build) -> None:
    """DistributedDataParallel on two gloo ranks: no unused parameters, the gradients of one process."""
    distributed("ddp", build)


def check_fsdp(build: Build) -> None:
    """FSDP2's fully_shard of each block and the net on two gloo ranks: the gradients of one process."""
    distributed("fsdp2", build)


RIGHT = "all gradients are right"


def distributed(way: str, build: Build) -> None:
    """Start two ranks that build the net from its config, and raise what they say.

    What counts is that they got to the end: torch's threads may abort a process that is done.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--rank-of", way, "--config", json.dumps(to_config(build()))]
        address = f"file://{folder}/ranks"
        ranks = [
            subprocess.Popen(
                [*command, "--rank", str(rank), "--init", address],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        said = [rank.communicate(timeout=1800) for rank in ranks]
    errors = [error.strip() for out, error in said if RIGHT not in out]
    for error in errors:
        if error and "Connection closed by peer" not in error:
            raise AssertionError(error.splitlines()[-1])
    if errors:
        raise AssertionError(f"a rank ended with {[rank.returncode for rank in ranks]}")


def be_rank(way: str, config: dict[str, Any], rank: int, init: str) -> None:
    """One of two ranks: the gradients of the whole batch compared with those of one net, then two training steps."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    torch.manual_seed(0)
    net = settle(from_config(config))
    alone, x = copy.deepcopy(net).eval(), example(net, 4)
    if way == "ddp":
        spread: nn.Module = DistributedDataParallel(net)
    else:
        mesh = init_device_mesh("cpu", (2,))
        for block in (*rb.residuals(net).values(), net):
            fully_shard(block, mesh=mesh)
        spread = net
    spread.eval()
    spread(x.chunk(2)[rank]).square().mean().backward()
    found = [whole(weight.grad) for weight in net.parameters() if weight.grad is not None]
    same_gradients(found, gradients(alone, alone, x))
    spread.train()
    for _ in range(2):  # the second step raises where the first left a parameter without a gradient
        spread.zero_grad()
        spread(x.chunk(2)[rank]).square().mean().backward()
    print(RIGHT, flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the parts of all ranks."""
    full = getattr(tensor, "full_tensor", None)
    return full() if full else tensor


CHECKS: dict[str, Callable[[Build], None]] = {
    "compile": check_compile,
    "compile by inductor": partial(check_compile, backend="inductor", dtype=torch.float64),
    "compile in training": check_compile_train,
    "export": check_export,
    "fx": check_fx,
    "onnx": check_onnx,
    "ensemble by vmap": check_ensemble,
    "per-sample gradients": check_per_sample_gradients,
    "bfloat16": check_autocast,
    "float64": check_float64,
    "channels_last": check_channels_last,
    "meta": check_meta,
    "feature extractor": check_feature_extractor,
    "copies": check_copies,
    "quantised": check_quantised,
    "DDP": check_ddp,
    "FSDP2": check_fsdp,
}

# Minutes for a deep net, and the back end of all nets is the same: on the small nets only.
ON_SMALL_NETS = {"compile by inductor"}

# What a tool cannot do with a net, and why.
IMPOSSIBLE: dict[tuple[str, str], str] = {
    ("basic, 1D", "channels_last"): "torch has no channels_last for 1D data",
}


def run(name: str, check: str) -> dict[str, Any]:
    """One cell of the table: "pass", or what went wrong."""
    torch.manual_seed(0)
    start = time.perf_counter()
    try:
        CHECKS[check](NETS[name])
        said = "pass"
    except Exception as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    seconds = round(time.perf_counter() - start, 1)
    return {"outcome": said, "seconds": seconds, "commit": commit(), "torch": torch.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="*", default=["*"], help="shell patterns of names")
    parser.add_argument("--checks", nargs="*", default=list(CHECKS), choices=list(CHECKS))
    parser.add_argument("--again", action="store_true", help="run what the file already has, too")
    parser.add_argument("--out", type=Path, default=RESULTS)
    for option in ("--rank-of", "--config", "--rank", "--init"):  # how `distributed` starts its ranks
        parser.add_argument(option, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        be_rank(args.rank_of, json.loads(args.config), int(args.rank), args.init)
        return
    torch.set_num_threads(1)
    rows = json.loads(args.out.read_text(encoding="utf-8"))["rows"] if args.out.exists() else {}
    for name in [name for name in NETS if any(fnmatch(name, pattern) for pattern in args.nets)]:
        for check in args.checks:
            if (check in rows.get(name, {}) and not args.again) or (check in ON_SMALL_NETS and name not in SMALL):
                continue
            rows.setdefault(name, {})[check] = run(name, check)
            print(name, "|", check, "|", rows[name][check], flush=True)
            gc.collect()
            write_json(args.out, {"environment": environment(torch.device("cpu")), "rows": rows})


if __name__ == "__main__":
    main()
