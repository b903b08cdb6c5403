"""Products of rows with a matrix: the same by either library, and by the one that the processor is fast with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from resblocks._products import convolved, is_mkl_slow, line_width, multiply, multiply_backward, processor_name


@pytest.fixture(autouse=True)
def fresh_knowledge() -> Iterator[None]:
    """What is known of the processor is not kept from one test to the next."""
    processor_name.cache_clear()
    yield
    processor_name.cache_clear()


def on(name: str, monkeypatch: pytest.MonkeyPatch, mkl: bool = True) -> None:
    """Make the processor one of that name."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name}, raising=False)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)


def made(*shape: int, **options: Any) -> Tensor:
    torch.manual_seed(sum(shape))
    return torch.randn(shape, **options)


@pytest.mark.parametrize("name", ["AMD EPYC 9005", "Intel Xeon"])
@pytest.mark.parametrize("rows", [(1, 1024, 24), (1, 784, 24), (1, 127, 24), (3, 128, 24)])
def test_product_and_its_gradients_are_those_of_matmul(
    rows: tuple[int, ...], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(name, monkeypatch)
    x, weight, grad = made(*rows), made(12, 24), made(*rows[:2], 12)
    out, dweight = torch.empty(*rows[:2], 12), made(12, 24)
    before = dweight.clone()
    multiply(x, weight, out)
    dx = multiply_backward(grad, x, weight, dweight)
    torch.testing.assert_close(out, x @ weight.mT)
    torch.testing.assert_close(dx, grad @ weight)
    torch.testing.assert_close(dweight - before, torch.einsum("nrd,nrc->dc", grad, x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(multiply_backward(grad, x, weight, None), dx)


def test_convolved_adds_the_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    on("AMD EPYC", monkeypatch)
    x, weight, bias = made(1, 1024, 24), made(12, 24), made(12)
    found = convolved(x, weight, bias)
    assert found is not None
    torch.testing.assert_close(found, x @ weight.mT + bias)


@pytest.mark.parametrize(("count", "width"), [(4096, 64), (784, 49), (196, 0), (1024 + 7, 0), (64, 0), (256, 16)])
def test_lines_are_wide_and_many(count: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    on("AMD EPYC", monkeypatch)
    assert line_width(made(1, count, 4)) == width


@pytest.mark.parametrize(
    "rows",
    [
        made(1, 1024, 4, dtype=torch.float64),
        made(1, 1024, 4, dtype=torch.bfloat16),
        made(1, 1024, 4, device="meta"),
        made(2, 1024, 4),
        made(1, 4, 1024).mT,
    ],
    ids=["float64", "bfloat16", "meta", "samples", "channels first"],
)
def test_other_rows_are_left_to_mkl(rows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    on("AMD EPYC", monkeypatch)
    assert line_width(rows) == 0


@pytest.mark.parametrize(
    ("name", "mkl", "slow"), [("AMD Ryzen 9", True, True), ("AMD EPYC", False, False), ("Intel Xeon", True, False)]
)
def test_mkl_is_slow_on_processors_of_amd(name: str, mkl: bool, slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    on(name, monkeypatch, mkl)
    assert is_mkl_slow() == slow


def test_processor_that_torch_does_not_tell_is_taken_as_fast_with_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    on("", monkeypatch)
    assert not is_mkl_slow()
    processor_name.cache_clear()
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not is_mkl_slow()
