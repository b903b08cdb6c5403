"""Write the tables of README.md and docs/ from the result files, so that no number is typed by hand.

    python benchmarks/report.py            # rewrite every marked region
    python benchmarks/report.py --check    # change nothing, fail where a region is out of date

A region stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`; `TABLES` says what makes which.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import options

from resblocks.training.experiment import PAPER, TITLES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
COMPLEXITY = ROOT / "tests" / "expected" / "complexity.json"
REGION = re.compile(r"(?P<begin><!-- (?P<name>[\w-]+):begin -->\n)(?P<body>.*?)(?P<end><!-- (?P=name):end -->)", re.S)


def table(header: list[str], rows: list[list[str]], align: str) -> str:
    """A markdown table; `align` has one letter a column, l or r."""
    rule = {"l": "---", "r": "---:"}
    lines = [header, [rule[letter] for letter in align], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def complexity_table() -> str:
    """Parameters and MACs of the named nets with their sources."""
    rows = []
    for net in json.loads(COMPLEXITY.read_text(encoding="utf-8"))["nets"]:
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
    return table(["net", "parameters", "in the paper", "MACs", "input", "source"], rows, "lrrrll")


def result_tables() -> str:
    """For each file of training runs: accuracy, loss, parameters and seconds of each net, beside the paper's."""
    parts = []
    for path in sorted(RESULTS.glob("*.json")):
        runs = json.loads(path.read_text(encoding="utf-8")).get("results", [])
        if not runs:
            continue
        is_papers = re.match(r"CIFAR-10\b", runs[0]["settings"]["dataset"]["name"])
        header = ["net", "parameters", "accuracy, %", *(["the paper's, %"] if is_papers else []), "loss", "training, s"]
        rows = []
        for name in dict.fromkeys(run["name"] for run in runs):
            same = [run for run in runs if run["name"] == name]
            papers = [f"{PAPER[name]:.1f}" if name in PAPER else ""] if is_papers else []
            rows.append(
                [
                    TITLES.get(name, f"`{name}`"),
                    f"{same[0]['params']:,}",
                    mean_and_std([run["epochs"][-1]["eval_accuracy_percent"] for run in same], 2),
                    *papers,
                    mean_and_std([run["epochs"][-1]["eval_loss"] for run in same], 3),
                    mean_and_std([sum(epoch["seconds"] for epoch in run["epochs"]) for run in same], 0),
                ]
            )
        parts.append(f"{caption(runs, path)}\n\n" + table(header, rows, "l" + "r" * (len(header) - 1)))
    return "\n".join(parts)


def caption(runs: list[dict[str, Any]], path: Path) -> str:
    """What all runs of a file have in common, and where the raw values are."""
    settings, environment = runs[0]["settings"], runs[0]["environment"]
    for run in runs:
        for name in ("dataset", "recipe", "precision"):
            if run["settings"][name] != settings[name]:
                raise ValueError(
                    f"{path.name}: runs of one file must have the same {name}, got {run['settings'][name]}"
                )
        if run["environment"]["device"] != environment["device"]:
            raise ValueError(
                f"{path.name}: runs of one file must have the same device, got {run['environment']['device']}"
            )
    seeds = sorted({run["settings"]["seed"] for run in runs})
    said = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    return (
        f"{settings['dataset']['name']}, {settings['dataset']['split']} set, {settings['recipe']['epochs']} epochs, "
        f"batch {settings['recipe']['batch_size']}, {settings['precision']}, {said}, last epoch; "
        f"{environment['device']}, torch {environment['versions']['torch']}, commit {str(environment['commit'])[:9]}; "
        f"every epoch of every run: `{path.relative_to(ROOT).as_posix()}`."
    )


def mean_and_std(values: list[float], digits: int) -> str:
    """The value of a single run, or mean, sample standard deviation and number of several."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f} (n={len(values)})"


def options_table() -> str:
    """Each value of each option with its source and the blocks and dims that take it, found by building them."""
    return table(["option", "value", "source", "blocks", "dims"], options.rows(), "lllll")


TABLES = {"complexity": complexity_table, "options": options_table, "results": result_tables}


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
    stale = []
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
