"""What PyTorch and its tools do to a model, done to small nets of every kind: the checks of benchmarks/compat.py."""

from __future__ import annotations

import copy
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import resblocks as rb
from resblocks import create_model, set_skip

COMPAT: dict[str, Any] = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "compat.py"))
NEEDS = {"onnx": ("onnxscript", "onnxruntime"), "quantised": ("torchao",), "feature extractor": ("torchvision",)}
# The checks that take seconds run on these nets by default, on all of them with -m slow.
SECONDS = {
    "compile": ("bottleneck, deep stem, shortcut D", "dense"),
    "compile by inductor": ("basic",),
    "compile in training": ("basic, drop path, layer scale", "ResNeXt, SE"),
    "onnx": ("ResNeXt, SE", "dense"),
    "quantised": ("basic",),
    "DDP": ("basic", "basic, plain"),
    "FSDP2": ("basic",),
}


def cases() -> list[Any]:
    """Every small net with every check."""
    return [
        pytest.param(
            net,
            check,
            id=f"{check}-{net}",
            marks=[pytest.mark.slow] if check in SECONDS and net not in SECONDS[check] else [],
        )
        for check in COMPAT["CHECKS"]
        for net in COMPAT["SMALL"]
        if (net, check) not in COMPAT["IMPOSSIBLE"]
    ]


@pytest.mark.filterwarnings("ignore")  # the tools warn of each other's deprecations
@pytest.mark.parametrize(("net", "check"), cases())
def test_tool_gives_the_numbers_of_the_net(net: str, check: str) -> None:
    for package in NEEDS.get(check, ()):
        pytest.importorskip(package, exc_type=ImportError)
    if check == "compile by inductor" and not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("inductor needs a C++ compiler")
    COMPAT["CHECKS"][check](COMPAT["NETS"][net])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("net", "check"), COMPAT["IMPOSSIBLE"])
def test_what_is_said_to_be_impossible_is(net: str, check: str) -> None:
    for package in NEEDS.get(check, ()):
        pytest.importorskip(package, exc_type=ImportError)
    with pytest.raises(Exception, match=r".+"):
        COMPAT["CHECKS"][check](COMPAT["NETS"][net])


def test_checks_see_a_difference() -> None:
    same, same_gradients = COMPAT["same"], COMPAT["same_gradients"]
    with pytest.raises(AssertionError, match="apart, allowed"):
        same(torch.ones(3), torch.ones(3) * 1.01)
    with pytest.raises(AssertionError, match=r"shape \(3,\) in place of \(4,\)"):
        same(torch.ones(3), torch.ones(4))
    with pytest.raises(AssertionError, match="apart, allowed"):
        same(torch.full((3,), float("nan")), torch.ones(3))
    with pytest.raises(AssertionError, match="gradient 1"):
        same_gradients([torch.ones(3), torch.ones(3)], [torch.ones(3), torch.zeros(3)])


@pytest.mark.filterwarnings("ignore")
def test_switched_net_is_traced_as_it_stands() -> None:
    net = create_model("resnet20").eval()
    x = torch.randn(2, 3, 32, 32)
    residual = net(x)
    set_skip(net, False)
    traced, exported = torch.fx.symbolic_trace(net), torch.export.export(net, (x,)).module()
    plain = net(x)
    assert not torch.allclose(plain, residual)
    torch.testing.assert_close(traced(x), plain)
    torch.testing.assert_close(exported(x), plain)


@pytest.mark.parametrize("merge", [rb.gated, rb.WeightedAdd])
def test_learned_merges_are_traced(merge: Any) -> None:
    net = create_model("resnet20", merge=merge).eval()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(torch.fx.symbolic_trace(net)(x), net(x))


@pytest.mark.filterwarnings("ignore")
def test_compiled_recomputation_counts_statistics_once() -> None:
    net = COMPAT["SMALL"]["basic, recomputed"]()
    eager, x = copy.deepcopy(net), COMPAT["example"](net)
    torch.compile(net, backend="aot_eager", fullgraph=True)(x).sum().backward()
    eager(x).sum().backward()
    for ours, theirs in zip(net.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore")
def test_switched_net_under_ddp_needs_to_be_told(tmp_path: Path) -> None:
    net, x = create_model("resnet20", shortcut="B"), torch.randn(2, 3, 32, 32)
    set_skip(net, False)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rank", rank=0, world_size=1)
    try:
        told = DistributedDataParallel(net, find_unused_parameters=True)
        for _ in range(2):
            told(x).sum().backward()
        untold = DistributedDataParallel(copy.deepcopy(net))
        untold(x).sum().backward()
        with pytest.raises(RuntimeError, match="find_unused_parameters=True"):
            untold(x)
    finally:
        torch.distributed.destroy_process_group()


def test_rank_that_dies_without_a_word_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    class Died:
        returncode = -9

        def communicate(self, timeout: float) -> tuple[str, str]:
            return "", "Connection closed by peer"

    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: Died())
    with pytest.raises(AssertionError, match=r"a rank ended with \[-9, -9\]"):
        COMPAT["distributed"]("ddp", COMPAT["SMALL"]["basic"])


class Wild(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(1e9 * x)


def test_rounding_is_what_the_net_makes_of_it() -> None:
    x = torch.ones(4, 4)
    assert COMPAT["rounding"](torch.nn.Identity(), x) == 1e-4
    assert COMPAT["rounding"](Wild(), x) == 0.5
    assert 1e-3 < COMPAT["rounding"](torch.nn.Identity(), x, dtype=torch.bfloat16) < 0.1
