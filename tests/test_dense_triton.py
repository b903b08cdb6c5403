"""The Triton kernels of dense blocks: right in Triton's interpreter, and compiled for GPUs that need not be here."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_dense import LAST, images, make, step

from resblocks import DenseBlock, Transition, _dense_maps

pytest.importorskip("triton", exc_type=ImportError)
pytestmark = pytest.mark.filterwarnings("ignore")  # Triton warns of its own future defaults


def test_kernels_are_right_in_the_interpreter() -> None:
    pytest.importorskip("triton", minversion="3.8", reason="the interpreter of Triton 3.6 fails with numpy 2.4")
    file = Path(__file__).with_name("interpreted_dense_triton.py")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(file)]
    interpreted = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=interpreted, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "15 passed" in done.stdout, done.stdout[-300:]


@pytest.mark.parametrize(("wide", "low"), [("fp32", "bf16"), ("fp32", "fp32"), ("fp64", "fp64")])
@pytest.mark.parametrize("architecture", [80, 90])
def test_kernels_compile_for_gpus(architecture: int, wide: str, low: str) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = importlib.import_module("resblocks._dense_triton")
    maps = {"x", "dz", "out", "grad"}
    pointers = maps | {"scale", "shift", "mean", "rstd", "sums"}
    for kernel in (module._activate, module._accumulate):
        blocks = {"rows": 32, "columns": 128}
        kinds = {name: f"*{low if name in maps else wide}" for name in pointers} | dict.fromkeys(blocks, "constexpr")
        signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
        constants = {(kernel.arg_names.index(name),): value for name, value in blocks.items()}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        assert triton.compile(source, target=GPUTarget("cuda", architecture, 32)).asm["cubin"]


@pytest.mark.gpu
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", [DenseBlock, Transition])
def test_step_on_a_gpu_equals_the_plain_one(kind: Any, last: bool) -> None:
    x = images(device="cuda").contiguous(memory_format=LAST[2] if last else torch.contiguous_format)
    assert _dense_maps.kernels_for(x) is not None
    found = step(make(kind, memory="shared").cuda(), x)
    wanted = step(make(kind, memory="plain").cuda(), x)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=name)
