"""The tables of docs/performance.md as header, rows and alignment; `report.py` writes them."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from peers import conditions, processor, verdict
from scaling import CHANGED, CURVES, USUAL

RESULTS = Path(__file__).resolve().parent / "results"
MIB = 2**20
Table = tuple[list[str], list[list[str]], str]


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}_cpu_2026-11.json").read_text(encoding="utf-8"))


def markdown(header: list[str], rows: list[list[str]], align: str) -> str:
    """A Markdown table; `align` has one letter a column, l or r."""
    rule = {"l": "---", "r": "---:"}
    lines = [header, [rule[letter] for letter in align], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


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
    ratios = [f"{what}, ratio" for what in ("kept", "peak", "allocated in all")]
    return [*header, *ratios, "operators not in the baseline", "gradients and buffers"], rows, "llrrrrrrl"


def train_time() -> Table:
    """Time of a step over the baseline's."""
    found = [{**case, "size": f"{case['size']} pixels"} for case in cases("train_step", "time")]
    return turns(found, "ratio", "size")


def throughput() -> Table:
    """Images a second of training steps on a GPU, and how many times torchvision's of the same round."""
    found = json.loads((RESULTS / "throughput_h200_2026-11.json").read_text(encoding="utf-8"))["throughput"]
    rows = [
        [
            f"`{case.get('net', 'resnet18_cifar')}`",
            name,
            str(case["batch"]),
            f"{statistics.median(row['images_per_second']):,.0f}",
            f"{row['speed_median']:.2f} ({row['speed_min']:.2f} to {row['speed_max']:.2f})",
            case["environment"]["device"],
        ]
        for case in found
        for name, row in case["rows"].items()
    ]
    return ["net", "training step of", "batch", "images a second", "over torchvision", "device"], rows, "llrrrl"


def dense_time() -> Table:
    """Time of a DenseNet's step over torchvision's."""
    return turns(cases("dense_memory", "time"), "ratio", "layout")


def dense_time_short() -> Table:
    """Medians of the default of a DenseNet over torchvision, a row a net and batch, over the processors."""
    found: dict[tuple[str, int], dict[str, list[float]]] = {}
    settings: dict[str, None] = {}
    layouts: dict[tuple[str, int], dict[tuple[str, str], list[dict[str, Any]]]] = {}
    for case in cases("dense_memory", "time"):
        net, setting = (case["net"], case["batch"]), f"{case['dtype']}, {case['layout']}"
        settings[setting] = None
        found.setdefault(net, {}).setdefault(setting, []).append(case["rows"]["shared"]["ratio_median"])
        alike = layouts.setdefault(net, {}).setdefault((case["dtype"], case["environment"]["device"]), [])
        alike.append(case["rows"])
    for net, by_device in layouts.items():
        for (dtype, _), both in by_device.items():
            if len(both) > 1:
                settings[best := f"{dtype}, best of both"] = None
                found[net].setdefault(best, []).append(fastest(both, "shared") / fastest(both, "torchvision"))
    rows = [
        [f"`{net}`, batch {batch}", *(span(medians[one]) if one in medians else "not measured" for one in settings)]
        for (net, batch), medians in found.items()
    ]
    return ["net and batch", *settings], rows, "l" + "r" * len(settings)


def fastest(layouts: list[dict[str, Any]], name: str) -> float:
    """Median seconds of a contestant in the layout where it has the least."""
    return min(statistics.median(rows[name]["cpu_seconds"]) for rows in layouts)


def in_numbers() -> Table:
    """What the library costs and gains, over the baseline: smallest to largest of the cases that were measured."""
    steps, dense = read("train_step"), read("dense_memory")
    answers = read("inference")["cases"]
    kinds = sorted({processor(case) for case in (*steps["time"], *dense["time"], *answers)}, reverse=True)
    rows = []
    for name, said in (
        ("resblocks", "training step"),
        ("resblocks norms", 'the same, `checkpoint="norms"`'),
        ("resblocks checkpoint", "the same, `checkpoint=True`"),
    ):
        peaks = [net[name]["peak_ratio"] for net in steps["memory"].values()]
        rows.append([said, span(peaks), *by_processor(kinds, steps["time"], name)])
    peaks = [net["shared"]["peak_bytes"] / net["torchvision"]["peak_bytes"] for net in dense["memory"].values()]
    rows.append(
        [
            "training step of a DenseNet, over torchvision in the same layout",
            span(peaks),
            *by_processor(kinds, dense["time"], "shared"),
        ]
    )
    for dtype, baseline, said in (
        ("float32", "torchvision", "fused, prepacked net, float32"),
        ("float32", "torchvision channels_last", "the same, over torchvision in channels_last"),
        ("bfloat16", "torchvision channels_last", "the same, both in bfloat16 and channels_last"),
    ):
        mine = [case for case in answers if case["dtype"] == dtype]
        rows.append([said, "", *by_processor(kinds, mine, "resblocks fused, prepacked", baseline)])
    return ["what", "peak of memory", *(f"time, {kind}" for kind in kinds)], rows, "lr" + "r" * len(kinds)


def by_processor(kinds: list[str], found: list[dict[str, Any]], name: str, baseline: str | None = None) -> list[str]:
    """The span of a contestant's median ratios of time on each processor, to a contestant or to the case's baseline."""
    cells = []
    for kind in kinds:
        medians = []
        for case in found:
            if processor(case) != kind or name not in case["rows"]:
                continue
            if baseline is None:
                medians.append(case["rows"][name]["ratio_median"])
            else:
                medians.append(median_ratio(case["rows"], name, baseline))
        cells.append(span(medians))
    return cells


def span(values: list[float]) -> str:
    """Smallest to largest; empty where nothing was measured."""
    if not values:
        return ""
    low, high = (f"{find(values):.2f}" for find in (min, max))
    return low if low == high else f"{low} to {high}"


def inference() -> Table:
    """How much faster than torchvision each contestant answers, how fast one could, and how far the answers are off."""
    found = cases("inference", "cases")
    header, rows, align = turns(found, "speedup")
    for row, case in zip(rows, found, strict=True):
        wrong = "".join(f", wrong: {name}" for name, of in case["rows"].items() if not of["right"])
        row += [in_store(case), f"{max(of['error'] for of in case['rows'].values()):.0e}{wrong}"]
    return [*header, "all at the fastest rate", "largest error"], rows, align + "rr"


def inference_short() -> Table:
    """How many times as fast as others a prepacked net is, a row a net, dtype and batch, over the processors."""
    mine, frozen = "resblocks fused, prepacked", "torchvision compiled, frozen"
    alike: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for case in cases("inference", "cases"):
        alike.setdefault((case["net"], case["dtype"], case["batch"]), []).append(case["rows"])
    nets = list(dict.fromkeys(net for net, *_ in alike))
    rows = []
    for key in sorted(alike, key=lambda key: (nets.index(key[0]), key[1] != "float32", key[2])):
        (net, dtype, batch), found = key, alike[key]
        peers = "torchvision", "torchvision channels_last", frozen
        faster = [[median_ratio(of, peer, mine) for of in found if peer in of] for peer in peers]
        ready = [
            [of[name]["ready_seconds"] for of in found if "ready_seconds" in of.get(name, {})]
            for name in (mine, frozen)
        ]
        rows.append([f"`{net}`", f"batch {batch}, {dtype}", *(span(values) for values in (*faster, *ready))])
    header = ["net", "setting", "over torchvision", "over torchvision channels_last", "over inductor, frozen"]
    return [*header, "ready after, s", "inductor ready after, s"], rows, "llrrrrr"


def median_ratio(rows: dict[str, Any], name: str, other: str) -> float:
    """Median over the rounds of a contestant's time over another's."""
    pairs = zip(rows[name]["seconds"], rows[other]["seconds"], strict=True)
    return statistics.median(mine / theirs for mine, theirs in pairs)


def in_store(case: dict[str, Any]) -> str:
    """How much faster than the baseline a net would answer that does nothing but its convolutions, as fast as any."""
    if "limit" not in case:
        return ""
    seconds = statistics.median(next(iter(case["rows"].values()))["seconds"])
    return f"{seconds * case['limit']['macs_per_second'] / case['limit']['macs']:.2f}"


def cases(name: str, key: str) -> list[dict[str, Any]]:
    """The timed cases of a result, those of one dtype and processor together."""
    found: list[dict[str, Any]] = read(name)[key]
    return sorted(found, key=lambda case: (case["dtype"] != "float32", case["environment"]["device"]))


def turns(found: list[dict[str, Any]], measure: str, *names: str) -> Table:
    """A row a case, a column a contestant, ours last: median (min to max) of its ratios, 1 for the baseline."""
    contestants = dict.fromkeys(name for case in found for name in case["rows"])
    columns = sorted(contestants, key=lambda name: name.startswith("resblocks"))
    rows = []
    for case in found:
        baseline, *others = case["rows"]
        cells = {baseline: "1"}
        for name in others:
            low, median, high = spread(case["rows"][name], measure)
            cells[name] = f"{median} ({low} to {high})"
        rounds = len(case["rows"][baseline]["seconds" if measure == "speedup" else "cpu_seconds"])
        said = [f"`{case['net']}`", conditions(case, *names)]
        rows.append([*said, *(cells.get(name, "") for name in columns), str(rounds)])
    return ["net", "setting", *columns, "rounds"], rows, "ll" + "r" * (len(columns) + 1)


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
            (key,) = CURVES[curve]
            shown = f"**{value}**" if int(value) == USUAL[key] else value
            rows.append([CHANGED[curve], shown, f"{contestants['torchvision']['peak_bytes'] / MIB:,.0f}", *ratios])
    header = ["changed", "to", "torchvision, MiB", "resblocks", '`checkpoint="norms"`', "`checkpoint=True`"]
    return header, rows, "lrrrrr"


def spread(row: dict[str, Any], measure: str = "ratio") -> list[str]:
    return [f"{row[f'{measure}_{what}']:.2f}" for what in ("min", "median", "max")]


TABLES = {
    "train-memory": train_memory,
    "train-time": train_time,
    "dense-time": dense_time,
    "dense-time-short": dense_time_short,
    "in-numbers": in_numbers,
    "small-maps": small_maps,
    "inference-short": inference_short,
    "throughput": throughput,
    "import-time": import_time,
    "scaling": scaling,
}
