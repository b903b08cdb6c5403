"""What an import costs: torch alone, then resblocks, torchvision, timm and pytorchcv on top of it.

    python benchmarks/import_time.py    # a minute on a core

Each import runs in a fresh process, contestants taking turns; torch is imported before the clock starts. Time is
processor time, so that a cold disk does not count. All run from bytecode, as pip leaves an installed package.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from peers import is_installed, made_with
from turns import spread

from resblocks.training.files import write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "import_time_cpu_2026-11.json"
CONTESTANTS = {
    "torch": "torch",
    "resblocks": "resblocks",
    "torchvision": "torchvision.models",
    "timm": "timm",
    "pytorchcv": "pytorchcv.model_provider",
}
CODE = """
import sys, time
if {module!r} != "torch":
    import torch
before, start = set(sys.modules), time.process_time()
import {module}
print(time.process_time() - start, len(set(sys.modules) - before))
"""


def measure(module: str) -> tuple[float, int]:
    """Seconds and number of modules of one import in a fresh process."""
    # Where bytecode is not written, a checkout is compiled at each import, and the packages that pip installed are not.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", CODE.format(module=module)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    seconds, modules = done.stdout.split()
    return float(seconds), int(modules)


def run(rounds: int) -> dict[str, Any]:
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in CONTESTANTS if is_installed(name)}
    for number in range(-1, rounds):
        for name in found:
            measured = measure(CONTESTANTS[name])
            if number >= 0:  # the first round fills the disk's cache
                found[name].append(measured)
    return {
        name: {
            "cpu_seconds": [round(seconds, 4) for seconds, _ in row],
            **spread([seconds for seconds, _ in row], "seconds"),
            "modules": row[0][1],
        }
        for name, row in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = run(options.rounds)
    write_json(options.out, {"environment": made_with(), "rows": rows})
    for name, row in rows.items():
        print(f"{name:12s} {row['seconds_median']:.3f} s, {row['modules']} modules")


if __name__ == "__main__":
    main()
