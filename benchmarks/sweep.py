"""Train nets over seeds by named programmes, one JSON a run; the same command goes on where it was stopped.

    python benchmarks/sweep.py --list
    python benchmarks/sweep.py degradation-cpu --data-dir data/cifar10-jpeg
    torchrun --nproc-per-node 2 benchmarks/sweep.py paper recipes
    python benchmarks/sweep.py paper --only 'resnet18_noskip*'       # one machine's part

A finished run is a file in benchmarks/results/runs/PROGRAMME/, and is not run again, on any machine. An unfinished one
goes on from its checkpoint in --work. A run that diverges is written down with its error, and the next one starts.
`python benchmarks/report.py` makes tables and figures of the files.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from recompress import recompressed

from resblocks.training import Diverged, Ranks, Recipe, fit, get_recipe, load_dataset
from resblocks.training.data import Dataset
from resblocks.training.device import COMPILE_MODES, pick_device
from resblocks.training.environment import environment
from resblocks.training.experiment import build_net
from resblocks.training.files import write_json
from resblocks.training.program import run_as_program
from resblocks.training.recipe import whole_recipe

RUNS = Path(__file__).resolve().parent / "results" / "runs"
PAPERS_NETS = ("resnet18", "resnet18_noskip", "baseline_cnn", "baseline_cnn_bn")


@dataclass(frozen=True)
class Cell:
    """One run: a net, a recipe with some of its values replaced, a seed, a data set."""

    model: str
    recipe: str
    seed: int = 0
    overrides: dict[str, Any] = field(default_factory=dict)
    dataset: str = "cifar10"

    @property
    def name(self) -> str:
        """Of the run's file and folder: unlike that of every other cell of a programme."""
        changed = [f"{option}-{value}" for option, value in self.overrides.items()]
        return "_".join([self.model, self.recipe, *changed, f"seed-{self.seed}"])

    def full_recipe(self) -> Recipe:
        return get_recipe(self.recipe, **self.overrides)


def cells(
    models: Sequence[str], recipe: str, *, seeds: int = 1, dataset: str = "cifar10", **overrides: Any
) -> tuple[Cell, ...]:
    """Every model with every seed, seed by seed, so that a sweep that is cut short has all models."""
    return tuple(Cell(model, recipe, seed, overrides, dataset) for seed in range(seeds) for model in models)


def plain_and_residual(*depths: int) -> list[str]:
    """The CIFAR ResNets of He et al. 2015 of these depths, each with and without skips."""
    return [name for depth in depths for name in (f"resnet{depth}", f"resnet{depth}_noskip")]


# Each programme makes tables and figures of the site. Those that end in -cpu are what two CPU cores can do.
PROGRAMMES: dict[str, tuple[Cell, ...]] = {
    "paper": cells(PAPERS_NETS, "paper", seeds=3, epochs=30, cutout=12),
    "paper-without-clipping": cells(PAPERS_NETS[:2], "paper", epochs=30, cutout=12, clip_norm=0.0),
    "recipes": (
        *cells(["resnet18_torchinit", "resnet18"], "r26", seeds=3, tta="flip"),  # the first as in the recipe's source
        *cells(["resnet18"], "r80", tta="flip"),
        *cells(["resnet18"], "cutout200"),
    ),
    "recompressed": cells(["resnet18"], "r26", dataset="cifar10-recompressed", tta="flip"),
    "degradation-short": cells(plain_and_residual(20, 32, 44, 56, 110), "he2015", epochs=30),
    "degradation": cells(plain_and_residual(20, 32, 44, 56, 110), "he2015", seeds=3),
    "families-short": (
        *cells(["wrn_16_8"], "wrn", epochs=30),
        *cells(["densenet_bc_100_12"], "densenet", epochs=30),
        *cells(["preact_resnet110"], "he2015", epochs=30),
        *cells(["resnext29_8x64d"], "resnext", epochs=10),
    ),
    "families": (
        *cells(["wrn_16_8"], "wrn"),
        *cells(["resnext29_8x64d"], "resnext"),
        *cells(["densenet_bc_100_12"], "densenet"),
        *cells(["preact_resnet110", "preact_resnet164"], "he2015"),
    ),
    "digits": cells(["baseline_cnn_bn", "resnet18_noskip", "resnet18"], "digits", seeds=3, dataset="digits"),
    "paper-cpu": cells(["resnet18", "resnet18_noskip", "baseline_cnn_bn"], "r10"),
    "paper-15-cpu": cells(["resnet18"], "r10", epochs=15, full_scale_at=0.4),
    "paper-15-whole-cpu": cells(
        ["resnet18", "resnet18_noskip", "baseline_cnn_bn"], "r10", epochs=15, start_scale=1.0, alternate_flip=True
    ),
    "paper-short-cpu": cells(["resnet18", "resnet18_noskip"], "paper", epochs=5, clip_norm=0.0),
    "init-cpu": cells(["resnet20", "resnet20_torchinit"], "r26", seeds=2, epochs=10),  # by --precision float32
    "recompressed-cpu": cells(["resnet20"], "r10", seeds=3, dataset="cifar10-recompressed"),
    "degradation-cpu": (*cells(plain_and_residual(20, 56), "r10"), *cells(plain_and_residual(20), "r10", seeds=3)[2:]),
    "degradation-float32-cpu": cells(plain_and_residual(20, 32, 44, 56, 110), "r10"),  # by --precision float32
    "families-cpu": (
        *cells(["preact_resnet110", "densenet_40_12", "wrn_16_4", "densenet_bc_100_12", "resnext29_32x4d"], "r10"),
        *cells(["wrn_16_8"], "r10", epochs=5),
    ),
}


def load(name: str, data_dir: Path) -> Dataset:
    """The data set of a cell."""
    if name == "cifar10-recompressed":
        return recompressed(load_dataset("cifar10", data_dir))
    return load_dataset(name, data_dir)


def run_cell(cell: Cell, dataset: Dataset, file: Path, work: Path, ranks: Ranks, options: dict[str, Any]) -> bool:
    """Train, evaluate and write one cell; False where the loss diverged, which is written down as well."""
    net = build_net(cell.model, dataset, cell.seed)
    recipe, failure = cell.full_recipe(), None
    try:
        result = fit(
            net, dataset, recipe, out=work / cell.name, name=cell.model, seed=cell.seed, ranks=ranks, **options
        ).as_dict()
    except Diverged as error:
        failure = str(error).replace(f"{work}{os.sep}", "")  # where the checkpoints lie on this machine
        made_with = environment(
            pick_device(options["device"], ranks.local_rank),
            ranks.size,
            compile=options["compile_mode"] if options["compile"] else None,
            graph=options["graph"],
        )
        result = {"name": cell.model, "settings": wanted(cell, dataset), "environment": made_with, "failed": failure}
        print(f"failed: {cell.name}: {failure}", file=sys.stderr)
    if ranks.is_first:
        write_json(file, result)
    return failure is None


def wanted(cell: Cell, dataset: Dataset) -> dict[str, Any]:
    """What of a run's settings the cell fixes: a file with others is of another experiment."""
    return {
        "dataset": {"name": dataset.name, "split": dataset.split},
        "recipe": cell.full_recipe().as_dict(),
        "seed": cell.seed,
    }


def is_finished(file: Path, cell: Cell, dataset: Dataset) -> bool:
    """Whether the file holds that run, diverged or not: the same run again would end in the same way.

    Raises:
        ValueError: it holds a run of other settings.
    """
    if not file.exists():
        return False
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))["settings"]
        found = {name: settings[name] for name in wanted(cell, dataset)}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}): remove it, and the run is made again") from error
    for name, value in wanted(cell, dataset).items():
        there = found[name]
        if name == "recipe":
            there = whole_recipe(there)
        there = {key: there.get(key) for key in value} if isinstance(value, dict) else there
        if there != value:
            raise ValueError(f"{file.name} holds a run with {name} {there}, not {value}: remove it, or give --results")
    return True


def unfinished(
    programmes: list[str], only: str, datasets: dict[str, Dataset], results: Path
) -> Iterator[tuple[Cell, Path]]:
    """The cells that are to be run, each with the file that it will write."""
    for programme in programmes:
        for cell in PROGRAMMES[programme]:
            file = results / programme / f"{cell.name}.json"
            if fnmatch(cell.name, only) and not is_finished(file, cell, datasets[cell.dataset]):
                yield cell, file


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programmes", nargs="*", metavar="PROGRAMME", help=f"of {', '.join(PROGRAMMES)}")
    parser.add_argument("--list", action="store_true", help="print the runs of each programme and end")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="of the names of runs, as --list prints them")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="of the CIFAR images (default: data)")
    parser.add_argument("--results", type=Path, default=RUNS, help="folder of the JSON files")
    parser.add_argument("--work", type=Path, default=Path("runs/sweep"), help="folder of the checkpoints")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--compile", action="store_true", help="torch.compile the nets")
    parser.add_argument("--compile-mode", choices=COMPILE_MODES, default="default")
    parser.add_argument("--graph", action="store_true", help="replay each step as one CUDA graph, on one GPU")
    options = parser.parse_args()
    if unknown := sorted(set(options.programmes) - set(PROGRAMMES)):
        parser.error(f"PROGRAMME must be of {', '.join(PROGRAMMES)}, got {', '.join(unknown)}")
    if not options.programmes and not options.list:
        parser.error("PROGRAMME is missing; --list shows them")
    names = [cell.name for programme in options.programmes or PROGRAMMES for cell in PROGRAMMES[programme]]
    if not any(fnmatch(name, options.only) for name in names):
        parser.error(f"--only must match the name of a run of the programmes, got {options.only!r}; --list shows them")
    return options


def main() -> int:
    options = parse_options()
    if options.list:
        for programme in options.programmes or PROGRAMMES:
            names = [cell.name for cell in PROGRAMMES[programme] if fnmatch(cell.name, options.only)]
            print(programme, *(f"  {name}" for name in names), sep="\n")
        return 0
    ranks = Ranks.from_env()
    needed = sorted({cell.dataset for name in options.programmes for cell in PROGRAMMES[name]})
    datasets = {name: ranks.first_then_all(partial(load, name, options.data_dir)) for name in needed}
    left = ranks.first(lambda: list(unfinished(options.programmes, options.only, datasets, options.results)))
    with torch.device("meta"):
        for cell, _ in left:  # a name that is wrong is found before hours of training
            build_net(cell.model, datasets[cell.dataset])
    how = {name: getattr(options, name) for name in ("device", "precision", "compile", "compile_mode", "graph")}
    fine = []
    for cell, file in left:
        fine.append(run_cell(cell, datasets[cell.dataset], file, options.work / file.parent.name, ranks, how))
    ranks.close()
    print(f"{sum(fine)} runs done, {len(fine) - sum(fine)} failed, the others were finished before")
    return 0 if all(fine) else 1


if __name__ == "__main__":
    run_as_program(main)
