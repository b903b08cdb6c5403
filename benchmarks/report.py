"""Write the tables of README.md and docs/ from the result files, so that no number is typed by hand.

    python benchmarks/report.py            # rewrite every marked region
    python benchmarks/report.py --check    # change nothing, fail where a region is out of date

A region stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`; `TABLES` says what makes which. The figures of
the training runs are drawn as well.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import fields
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import compat
import gradients
import landscape
import options
import paths
import performance_tables
import runs
import shattering
import theirs
from peers import verdict
from performance_tables import markdown, read

from resblocks import DenseNet, ResNet, interop
from resblocks.training import RECIPES, Recipe
from resblocks.training.__main__ import CHOICES
from resblocks.training.result import title

ROOT = Path(__file__).resolve().parent.parent
COMPLEXITY = ROOT / "tests" / "expected" / "complexity.json"
REGION = re.compile(r"(?P<begin><!-- (?P<name>[\w-]+):begin -->\n)(?P<body>.*?)(?P<end><!-- (?P=name):end -->)", re.S)


def kind_of(net: dict[str, Any]) -> str:
    """Which table of named nets it is in."""
    if net["name"].startswith("baseline"):
        return "baselines"
    return "imagenet" if net["input_size"][1:] == [224, 224] else "cifar"


def complexity_table(kind: str) -> str:
    """Parameters and MACs of the named nets of a kind with their sources."""
    rows = []
    for net in json.loads(COMPLEXITY.read_text(encoding="utf-8"))["nets"]:
        if kind_of(net) != kind:
            continue
        options = ", ".join(f"{key}={value!r}" for key, value in net["options"].items())
        size = "x".join(map(str, net["input_size"][1:]))
        printed = net.get("params_paper_millions")
        saved = net.get("macs_saved", 0)
        source = net["source"] + (f"; {net['note']}" if "note" in net else "")
        source += f"; {net['macs'] / 1e6:,.1f}M MACs there, since it pools after the 1x1 convolution" if saved else ""
        rows.append(
            [
                f"`{net['name']}`" + (f" with `{options}`" if options else ""),
                f"{net['params']:,}",
                f"{printed}M" if printed else "",
                f"{(net['macs'] - saved) / 1e6:,.1f}M",
                size,
                source,
            ]
        )
    return markdown(["net", "parameters", "in the paper", "MACs", "input", "source"], rows, "lrrrll")


def dense_memory_table() -> str:
    """Peak and saved memory of a DenseNet's training step, for each contestant, and whether its step is right."""
    result = read("dense_memory")
    rows = []
    for net, contestants in result["memory"].items():
        plain = contestants["torchvision"]["peak_bytes"]
        for name, found in contestants.items():
            mib = {key: found[key] / found["batch"] / 2**20 for key in ("peak_bytes", "saved_bytes")}
            right = verdict(result["gates"][name])
            less = f"{plain / found['peak_bytes']:.1f}"
            rows.append([f"`{net}`", name, f"{mib['peak_bytes']:.2f}", f"{mib['saved_bytes']:.2f}", less, right])
    header = [
        "net",
        "training step of",
        "peak, MiB an image",
        "kept for backward, MiB an image",
        "torchvision's peak over it",
        "buffers",
    ]
    return markdown(header, rows, "llrrrl")


def inference_table() -> str:
    """How much faster than torchvision each contestant answers, and what it was measured with."""
    commits: dict[str, dict[str, None]] = {}  # of each machine, in order
    for case in read("inference")["cases"]:
        environment = case["environment"]
        versions = ", ".join(f"{key} {environment['versions'][key]}" for key in ("torch", "torchvision"))
        commits.setdefault(f"{environment['device']}, {versions}", {})[environment["commit"][:9]] = None
    made_with = "; ".join(f"{where}, commit {', '.join(names)}" for where, names in commits.items())
    said = f"\n{made_with}; every round: `benchmarks/results/inference_cpu_2026-11.json`.\n"
    return made(performance_tables.inference) + said


def made(parts: Callable[[], performance_tables.Table]) -> str:
    """The table of header, rows and alignment."""
    return markdown(*parts())


def options_table() -> str:
    """Each value of each option with its source and the blocks that take it, found by building them."""
    return markdown(["option", "value", "source", "blocks"], options.rows(), "llll")


def names_table(library: str) -> str:
    """For each name of a library the call that builds our net, and how far it is from theirs."""
    measured = read(theirs.theme(library))["rows"]
    rows = []
    for name, build in interop.NAMES[library].items():
        if theirs.is_another_head(f"{library}:{name}"):
            continue
        row = measured.get(f"{library}:{name}")
        apart = [f"{row[what]:.0e}" if row[what] else "0" for what in MEASURED] if row else ["not run"] * len(MEASURED)
        equal = {True: "yes", False: "no"}[row["equal"]] if row else "not run"
        if row and "logits_moved" in row:
            equal += f": theirs move by {row['logits_moved']:.0e} with the last digit of a pixel"
        rows.append([f"`{name}`", f"`{call(build)}`", *apart, row["dtype"] if row else "", equal])
    return markdown(["name", "call", *MEASURED.values(), "in", "equal"], rows, "llrrrrll")


def names_out_table() -> str:
    """The residual names of timm that are out."""
    return markdown(
        ["name in timm", "why it is out"], [[f"`{name}`", why] for name, why in interop.TIMM_OUT.items()], "ll"
    )


def compat_table() -> str:
    """Which tool gives the numbers of which net."""
    measured = read("compat")["rows"]
    checks, rows, failures = list(compat.CHECKS), [], []
    for net in [net for net in compat.NETS if net in measured]:
        cells = []
        for check in checks:
            missing = "" if check in compat.ON_SMALL_NETS and net not in compat.SMALL else "not run"
            outcome = measured[net].get(check, {"outcome": missing})["outcome"]
            if outcome not in ("pass", missing):
                why = compat.IMPOSSIBLE.get((net, check), outcome)
                failures.append(f"- {net}, {HEADS.get(check, check)}: {why}")
                outcome = "no"
            cells.append(outcome)
        rows.append([net if net in compat.SMALL else f"`{net}`", *cells])
    versions = sorted({cell["torch"] for row in measured.values() for cell in row.values()})
    said = "\n".join(
        ["", *failures, "", f"With torch {' and '.join(versions)}; the results file says which where.", ""]
    )
    return markdown(["net", *(HEADS.get(check, check) for check in checks)], rows, "l" * (1 + len(checks))) + said


def recipes_table() -> str:
    """What each recipe changes of the defaults."""
    rows, usual = [], Recipe().as_dict()
    for name, recipe in RECIPES.items():
        changed = {key: value for key, value in recipe.as_dict().items() if value != usual[key] and key != "name"}
        rows.append([f"`{name}`", ", ".join(f"`{key}={value!r}`" for key, value in changed.items())])
    return markdown(["recipe", "what it changes"], rows, "ll")


def recipe_values_table() -> str:
    """What each value of a recipe says, as the command line has it."""
    rows = []
    for entry in fields(Recipe):
        if entry.name != "name":
            of = f"; one of {', '.join(CHOICES[entry.name])}" if entry.name in CHOICES else ""
            rows.append([f"`{entry.name}`", f"`{entry.default!r}`", f"{entry.metadata['help']}{of}"])
    return markdown(["value", "default", "what it says"], rows, "lll")


def gradients_table() -> str:
    """Gradients first over last in each stage at initialisation, and how the maps grow from first to last.

    A line a stage: the mean, and the smallest and the largest of the seeds.
    """
    measured = read("gradients")

    def cell(row: dict[str, Any], what: str) -> str:
        lines = []
        for stage, mean in enumerate(row[what]):
            seeds = gradients.by_seed(row, what, stage)
            lines.append(f"{two_digits(mean)} ({two_digits(min(seeds))} to {two_digits(max(seeds))})")
        return "<br>".join(lines)

    rows = [
        [
            str(row["depth"]),
            row["norm"],
            "with" if row["skip"] else "without",
            *(cell(row, what) for what in ("weights", "maps", "growth")),
        ]
        for row in measured["rows"]
    ]
    header = [
        "layers",
        "norm",
        "skips",
        "gradient of weights",
        "gradient at outputs",
        "variance of outputs, last over first",
    ]
    return markdown(header, rows, "rllrrr")


def landscape_table() -> str:
    """How the loss rises around each trained net, and whether the plane is a bowl."""
    measured, rows = read("landscape"), []
    for name in landscape.in_order(measured):
        around = [landscape.ring(measured, name, distance) for distance in (0, 0.2, 0.5, 1)]
        cells = [f"{two_digits(min(losses))} to {two_digits(max(losses))}" for losses in around[1:]]
        rows.append([title(name), two_digits(around[0][0]), *cells, str(landscape.minima(measured, name))])
    header = ["net", "loss of the net", "0.2 from it", "0.5 from it", "1 from it", "local minima"]
    return markdown(header, rows, "lrrrrr")


def paths_table() -> str:
    """How fast the gradient of a path falls with its length, and how long the paths are that bring most of it."""
    measured, rows = read("paths"), []
    for name, net in measured["nets"].items():
        for when, said in (("before", "at initialisation"), ("after", "after the last epoch")):
            found = net[when]
            first, *_, last = paths.means(found)
            factor = (last / first) ** (1 / (len(found) - 1))
            lengths = [str(paths.length_with(found, share)) for share in (0.5, 0.95)]
            rows.append([title(name), str(len(found) - 1), said, two_digits(factor), *lengths])
    header = ["net", "blocks", "when", "factor for each branch", "half in paths of at most", "95 % in paths of at most"]
    return markdown(header, rows, "lrlrrr")


def lesions_table() -> str:
    """Accuracy of trained nets without some of their blocks."""
    rows = []
    for name, net in read("lesions")["nets"].items():
        worst = min(net["single"], key=net["single"].get)
        means = [list(net["single"].values()), net["several"]["3"], net["several"]["5"]]
        said = [f"{statistics.fmean(metrics):.1f}" for metrics in means]
        rows.append([title(name), f"{net['intact']:.1f}", f"{net['single'][worst]:.1f}, `{worst}`", *said])
    header = ["net", "whole, %", "without the block it needs most", "without 1, mean", "without 3", "without 5"]
    return markdown(header, rows, "lrrrrr")


def shattering_table() -> str:
    """How far images may move until half of the gradient's direction is lost, before and after training."""
    measured, rows = read("shattering"), []
    trained = {title(name): shattering.half(net["correlation"]) for name, net in measured["trained"].items()}
    for name, seeds in measured["start"].items():
        start = [shattering.half(cosines) for cosines in seeds]
        said = f"below {two_digits(shattering.STEPS[0])}"
        if min(start) > 0:
            spread = f"({two_digits(min(start))} to {two_digits(max(start))})"
            said = f"{two_digits(statistics.geometric_mean(start))} {spread}"
        rows.append([name, said, two_digits(trained[name]) if name in trained else ""])
    return markdown(["net", "at initialisation", "after ten epochs"], rows, "lrr")


def asked_table() -> str:
    """What each library does with each request; the messages of errors are in the file."""
    measured = read("asked")
    shown = {"monai": "MONAI"}
    rows = [
        [request, *(re.sub(r"^(\w+Error): .*", r"`\1`", answer) for answer in answers.values())]
        for request, answers in measured["rows"].items()
    ]
    libraries = next(iter(measured["rows"].values()))
    versions = measured["environment"]["versions"]
    header = ["asked for", *(f"{shown.get(name, name)} {versions[name]}" for name in libraries)]
    return markdown(header, rows, "l" * len(header))


def two_digits(number: float) -> str:
    """As people write it: no exponent."""
    return f"{Decimal(f'{number:.2g}'):,f}"


def call(build: Any) -> str:
    """A partial as the call that it makes."""
    if isinstance(build, partial):
        said = [call(argument) for argument in build.args]
        said += [f"{name}={call(value)}" for name, value in build.keywords.items()]
        inner = (
            f"partial({build.func.__name__}, " if build.func not in (ResNet, DenseNet) else f"{build.func.__name__}("
        )
        return f"{inner}{', '.join(said)})"
    if isinstance(build, tuple):
        return f"({', '.join(map(call, build))})"
    return build.__name__ if callable(build) else repr(build)


# The checks of torch.compile whose backends generate no code.
HEADS = {"compile": "compile, captured", "compile in training": "compile in training, captured"}
MEASURED = {
    "logits": "logits",
    "train_logits": "logits in training",
    "gradients": "gradients of weights",
    "input_gradient": "gradient of input",
}
TABLES = {
    **{f"complexity-{kind}": partial(complexity_table, kind) for kind in ("imagenet", "cifar", "baselines")},
    "compat": compat_table,
    "names-out": names_out_table,
    **{f"names-{library.replace('.', '-')}": partial(names_table, library) for library in theirs.BUILD},
    "options": options_table,
    "asked": asked_table,
    "dense-memory": dense_memory_table,
    "gradients": gradients_table,
    "landscape": landscape_table,
    "lesions": lesions_table,
    "paths": paths_table,
    "shattering": shattering_table,
    "recipes": recipes_table,
    "recipe-values": recipe_values_table,
    "inference": inference_table,
    **runs.REGIONS,
    **{name: partial(made, table_of) for name, table_of in performance_tables.TABLES.items()},
}


def rewrite(text: str) -> str:
    """The text with every marked region made anew."""

    def region(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ValueError(f"region must be one of {', '.join(TABLES)}, got {name!r}")
        return f"{match['begin']}{TABLES[name]()}{match['end']}"

    return REGION.sub(region, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail where a region is out of date")
    check = parser.parse_args().check
    stale = runs.update_figures(check)
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        new = rewrite(text)
        if new != text:
            stale.append(path.relative_to(ROOT).as_posix())
            if not check:
                path.write_text(new, encoding="utf-8")
    if check and stale:
        print(f"out of date, run python benchmarks/report.py: {', '.join(stale)}", file=sys.stderr)
        return 1
    print(f"{'rewritten' if stale else 'up to date'}: {', '.join(stale) or 'all tables'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
