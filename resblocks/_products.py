"""Products of many rows with a matrix on the CPU, as 1x1 convolutions where those are faster.

MKL, which torch takes for products in float32, keeps its AVX512 instructions to processors of Intel. On those of AMD a
1x1 convolution by oneDNN, which is the same sum, takes 0.54 to 0.66 of the time (`benchmarks/dense_memory.py --only
products`).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

GEOMETRY = [1, 1], [0, 0], [1, 1], False, [0, 0], 1  # of a 1x1 convolution, as aten takes it
WIDEST, NARROWEST = 64, 8  # lines of the map that rows are laid out as; oneDNN is slow where they are short
LINES = 16  # at least: with fewer samples and one thread torch hands a 1x1 convolution to MKL, too


def multiply(rows: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = rows @ weight.mT. Shape: (N, R, C), (D, C) -> (N, R, D)."""
    if (product := convolved(rows, weight)) is not None:
        out.copy_(product)
    else:
        torch.bmm(rows, weight.mT.expand(len(rows), -1, -1), out=out)


def convolved(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """rows @ weight.mT + bias by a convolution, or None where that is not faster."""
    if width := line_width(rows):
        return _as_rows(aten.convolution(_as_maps(rows, width), _as_kernel(weight), bias, *GEOMETRY))
    return None


def multiply_backward(grad: Tensor, rows: Tensor, weight: Tensor, dweight: Tensor | None) -> Tensor:
    """From the gradient of `multiply`, that of its rows; the one of the weight is added to dweight."""
    if width := line_width(rows):
        maps, wanted = (_as_maps(grad, width), _as_maps(rows, width)), [True, dweight is not None, False]
        drows, more, _ = aten.convolution_backward(*maps, _as_kernel(weight), None, *GEOMETRY, wanted)
        if dweight is not None:
            dweight.add_(more.view_as(dweight))
        return _as_rows(drows)
    drows = torch.empty_like(rows)
    torch.bmm(grad, weight.expand(len(rows), -1, -1), out=drows)
    if dweight is not None:
        dweight.addbmm_(grad.mT, rows)
    return drows


def line_width(rows: Tensor) -> int:
    """Positions of a line of the map that the rows are to be laid out as; 0 where a product by MKL is to be taken."""
    fits = rows.device.type == "cpu" and rows.dtype == torch.float32 and len(rows) == 1 and rows.stride(-1) == 1
    if not (fits and is_mkl_slow()):
        return 0
    widest_first = range(min(WIDEST, rows.shape[1] // LINES), NARROWEST - 1, -1)
    return next((width for width in widest_first if rows.shape[1] % width == 0), 0)


def is_mkl_slow() -> bool:
    """Whether this is a processor to which MKL denies its fastest instructions."""
    libraries: tuple[Any, ...] = torch.backends.mkl, torch.backends.mkldnn
    return all(library.is_available() for library in libraries) and is_amd()


def is_amd() -> bool:
    """Whether this is a processor of AMD, as far as torch tells."""
    return "AMD" in processor_name()


@cache
def processor_name() -> str:
    """As torch tells it, such as "AMD EPYC"; empty where it does not, as torch 2.11."""
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return str(known.get("cpu_name", ""))


def _as_maps(rows: Tensor, width: int) -> Tensor:
    return rows.view(-1, 1, width, rows.shape[-1]).movedim(-1, 1)


def _as_rows(maps: Tensor) -> Tensor:
    return maps.movedim(1, -1).reshape(1, -1, maps.shape[1])


def _as_kernel(weight: Tensor) -> Tensor:
    return weight[:, :, None, None]
