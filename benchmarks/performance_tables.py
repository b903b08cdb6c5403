"""The tables of docs/performance.md as header, rows and alignment; `report.py` writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peers import conditions, verdict

RESULTS = Path(__file__).resolve().parent / "results"
MIB = 2**20
Table = tuple[list[str], list[list[str]], str]


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}_cpu_2026-11.json").read_text(encoding="utf-8"))


def train_memory() -> Table:
    """What a step keeps, its peak, and what it allocates in all, of each contestant."""
    result, rows = read("train_step"), []
    for net, contestants in result["memory"].items():
        for name, row in contestants.items():
            mib = [f"{row[f'{what}_bytes'] / row['batch'] / MIB:.2f}" for what in ("saved", "peak")]
            ratios = [f"{row[f'{what}_ratio']:.3f}" for what in ("saved", "peak", "made")]
            calls = str(row["extra_calls"])
            rows.append([f"`{net}`", name, *mib, *ratios, calls, verdict(result["gates"][net][name])])
    header = ["net", "training step of", "kept, MiB an image", "peak, MiB an image"]
    ratios = [f"{what}, over the first's" for what in ("kept", "peak", "allocated in all")]
    return [*header, *ratios, "operators the first does not call", "gradients and buffers"], rows, "llrrrrrrl"


def train_time() -> Table:
    """Time of a step over the baseline's."""
    rows = []
    for case in read("train_step")["time"]:
        for name, row in case["rows"].items():
            pixels = {**case, "size": f"{case['size']} pixels"}
            rows.append(
                [f"`{case['net']}`", conditions(pixels, "size"), name, *spread(row), str(len(row["cpu_seconds"]))]
            )
    return ["net", "setting", "training step of", "min", "median", "max", "rounds"], rows, "lllrrrr"


def small_maps() -> Table:
    """Forward and backward of a 3x3 convolution with products over that of torch."""
    rows = []
    for case in read("train_step")["small_maps"]:
        inside, outside = case["channels"]
        size = 1 + (case["size"] - 1) // case["stride"]
        shape = [f"{inside}-{outside}", f"{size}x{size}", str(case["stride"])]
        rows.append([*shape, conditions(case), *spread(case["rows"]["weight"]), *spread(case["rows"]["all"])])
    header = ["channels", "output map", "stride", "setting"]
    ways = [f"{way}, {what}" for way in ("weight", "all") for what in ("min", "median", "max")]
    return header + ways, rows, "llllrrrrrr"


def import_time() -> Table:
    """Seconds and modules of an import."""
    found = read("import_time")["rows"]
    rows = [
        [f"`{name}`", *(f"{row[f'seconds_{what}']:.3f}" for what in ("min", "median", "max")), str(row["modules"])]
        for name, row in found.items()
    ]
    return ["import of", "min, s", "median, s", "max, s", "modules"], rows, "lrrrr"


def scaling() -> Table:
    """Peak of a step over torchvision's, along each curve."""
    rows = []
    for curve, points in read("scaling")["curves"].items():
        for value, contestants in points.items():
            ratios = [f"{row['peak_ratio']:.3f}" for name, row in contestants.items() if name != "torchvision"]
            rows.append([curve, value, f"{contestants['torchvision']['peak_bytes'] / MIB:,.0f}", *ratios])
    header = ["changed", "to", "torchvision, MiB", "resblocks", '`checkpoint="norms"`', "`checkpoint=True`"]
    return header, rows, "lrrrrr"


def spread(row: dict[str, Any]) -> list[str]:
    return [f"{row[f'ratio_{what}']:.2f}" for what in ("min", "median", "max")]


TABLES = {
    "train-memory": train_memory,
    "train-time": train_time,
    "small-maps": small_maps,
    "import-time": import_time,
    "scaling": scaling,
}
