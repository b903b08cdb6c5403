"""The Triton kernels of dense blocks in the place of torch's operators, run by Triton's interpreter on the CPU.

Triton decides at its first import whether it compiles or interprets, so tests/test_dense_triton.py runs this file in a
process of its own, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_dense import LAST, images, make, step

import resblocks._dense_triton
from resblocks import DenseBlock, DenseNet, Transition, _dense_maps

pytestmark = pytest.mark.filterwarnings("ignore")  # Triton warns of its own future defaults


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(_dense_maps, "kernels_for", lambda x: resblocks._dense_triton)
    return resblocks._dense_triton


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_kernels_are_right(kernels: Any, dtype: torch.dtype) -> None:
    assert kernels.runs_right(torch.device("cpu"), dtype)


def test_wrong_kernels_are_not_used(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "activate", lambda x, scale, shift, dtype: x.clone())
    assert not kernels.runs_right.__wrapped__(torch.device("cpu"), torch.float32)
    monkeypatch.setattr(kernels, "activate", lambda x, scale, shift, dtype: 1 / 0)
    assert not kernels.runs_right.__wrapped__(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("memory", ["shared", "lean"])
@pytest.mark.parametrize("kind", [DenseBlock, Transition])
def test_step_equals_the_plain_one(kernels: Any, kind: Any, memory: str, last: bool) -> None:
    x = images().to(memory_format=LAST[2]) if last else images()
    found = step(make(kind, memory=memory), x)
    wanted = step(make(kind, memory="plain"), x)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=name)


def test_kernels_were_used(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the comparisons above would compare torch with itself."""
    calls = dict.fromkeys(("activate", "accumulate"), 0)

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            calls[name] += 1
            return function(*args)

        return call

    for name in calls:
        monkeypatch.setattr(kernels, name, counted(name, getattr(kernels, name)))
    step(make(DenseNet, 3, (2, 2), stem="cifar", num_classes=3, memory="shared"), images(3))
    assert all(calls.values()), calls


def test_blocks_are_walked_to_the_end(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """More positions than programs times rows, more channels than columns; the last part of each is short."""
    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    torch.manual_seed(0)
    x, dz = (torch.randn(3, 20, 17, 19, dtype=torch.float64) for _ in range(2))
    scale, shift, mean, rstd = torch.rand(4, 20, dtype=torch.float64).unbind()
    grad = torch.zeros_like(x)
    dgamma, dbeta = kernels.accumulate(dz, x, scale, shift, mean, rstd, grad)
    wide = (slice(None), None, None)
    passed = torch.where(x * scale[wide] + shift[wide] > 0, dz, 0)
    torch.testing.assert_close(grad, passed * scale[wide])
    torch.testing.assert_close(dbeta, passed.sum((0, 2, 3)))
    torch.testing.assert_close(dgamma, (passed * (x - mean[wide]) * rstd[wide]).sum((0, 2, 3)))


def test_not_a_number_stays_one(kernels: Any) -> None:
    one = torch.ones(1, dtype=torch.float64)
    assert kernels.activate(torch.full((1, 1, 2, 2), float("nan")).double(), one, one, torch.float64).isnan().all()
