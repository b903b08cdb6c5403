"""Several nets and seeds, one recipe: train them one by one, then a table, a JSON and figures. Resumable as a whole."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from resblocks import Network, create_model, draw_like_torch

from .data import Dataset
from .figures import draw_figures
from .files import write_json
from .fit import Diverged, fit
from .ranks import Ranks
from .recipe import Recipe, recipe_in_words
from .result import Result, by_name, interval, mean_and_std, seeds_in_words, title
from .small_maps import small_map_products

# CIFAR-10 test accuracy in percent: arXiv 2510.24036, abstract; the net without skips after a report that quotes it.
PAPER = {"baseline_cnn": 84.1, "resnet18_noskip": 86.0, "resnet18": 89.9}


class SomeDiverged(Diverged):
    """Some nets of an experiment diverged; `results` are those of the others."""

    def __init__(self, failures: list[Diverged], results: list[Result]) -> None:
        super().__init__("\n".join(map(str, failures)))
        self.results = results


def build_net(variant: str, dataset: Dataset, seed: int = 0) -> Network:
    """A named net for a data set's classes and channels, with weights from the seed.

    Images of at most 64 pixels a side get the CIFAR stem, larger ones the net's own.

    Args:
        variant: a name of `resblocks.list_models()`; "_torchinit" behind it draws the convolutions as torch does
            (`resblocks.draw_like_torch`); last, "_noskip" takes the skips out, "_bn" gives the baseline batch norm.

    Raises:
        ValueError: no skips to take out, a net that is no baseline with "_bn", a seed of more than 64 bits; what
            `resblocks.create_model` raises.
    """
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must be at least -2**63 and below 2**64, got {seed}")
    options: dict[str, Any] = {"num_classes": len(dataset.classes), "in_channels": dataset.shape[0]}
    if max(dataset.shape[1:]) <= 64:
        options["stem"] = "cifar"
    name = variant
    if variant.endswith("_noskip"):
        name, options["skip"] = variant.removesuffix("_noskip"), False
        if name.startswith("baseline_cnn"):
            raise ValueError(f"{name} has no skips to take out")
    elif variant.endswith("_bn"):
        name, options["norm"] = variant.removesuffix("_bn"), torch.nn.BatchNorm2d
        if not name.startswith("baseline_cnn"):
            raise ValueError(f"_bn gives baseline_cnn its batch norm, and is for no other net, got {variant}")
    torch.manual_seed(seed)
    net = create_model(name.removesuffix("_torchinit"), **options)
    if name.endswith("_torchinit"):
        net.init_weights(draw_like_torch)
    return net


def run_variants(
    variants: Iterable[str],
    dataset: Dataset,
    recipe: Recipe,
    *,
    out: str | Path,
    seed: int | Sequence[int] = 0,
    ranks: Ranks | None = None,
    **options: Any,
) -> list[Result]:
    """`fit` each variant in its own folder `out/<variant>`; those that are finished are not run again.

    All names are tried before the first training starts. `options` are those of `fit`.

    Args:
        seed: one, or several; then each has a folder `out/<variant>/seed-<seed>`.

    Raises:
        ValueError: no variants or seeds, or one twice; what `fit` raises.
        SomeDiverged: after all were trained.
    """
    seeds = [seed] if isinstance(seed, int) else list(seed)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seed must be one or several that differ, got {', '.join(map(str, seeds)) or 'none'}")
    variants = list(variants)
    if not variants or len(set(variants)) < len(variants):
        raise ValueError(
            f"models must be at least one, and differ from each other, got {', '.join(variants) or 'none'}"
        )
    with torch.device("meta"):
        for variant in variants:
            net = build_net(variant, dataset)
            with small_map_products(net) if options.get("small_maps") else nullcontext():
                pass
    results, failures = [], []
    for one, variant in itertools.product(seeds, variants):  # seed by seed: who stops early has all variants
        net, folder = build_net(variant, dataset, one), Path(out) / variant
        folder = folder / f"seed-{one}" if len(seeds) > 1 else folder
        try:
            results.append(fit(net, dataset, recipe, out=folder, name=variant, seed=one, ranks=ranks, **options))
        except Diverged as error:
            failures.append(error)
    if failures:
        raise SomeDiverged(failures, results)
    return results


def run_experiment(
    variants: Iterable[str],
    dataset: Dataset,
    recipe: Recipe,
    *,
    out: str | Path,
    formats: Sequence[str] = ("png",),
    ranks: Ranks | None = None,
    **options: Any,
) -> list[Result]:
    """`run_variants`; then results.json and figures in `out` and a printed table, also where some diverged.

    Args:
        formats: of the figures.
        options: of `run_variants`.

    Raises: as `run_variants`.
    """
    ranks, failed = ranks or Ranks(), None
    try:
        results = run_variants(variants, dataset, recipe, out=out, ranks=ranks, **options)
    except SomeDiverged as error:
        results, failed = error.results, error
    if ranks.is_first and results:
        write_results(Path(out) / "results.json", results)
        words = recipe_in_words(recipe.as_dict())
        about = f"last of {recipe.epochs} epochs, recipe {words}, TTA {recipe.tta}"
        seeds = seeds_in_words((result.name, result.settings["seed"]) for result in results)
        print(f"\n{dataset.name}, {dataset.split} set, {about}, {seeds}\n")
        is_papers = dataset.split == "test" and dataset.name.partition(" ")[0] == "CIFAR-10"
        print(_printable(results_table(results, on_cifar10=is_papers)))
        figures = draw_figures(results, out, formats)
        print(f"\n{Path(out) / 'results.json'} and {len(figures)} figures in {out}")
    if failed:
        raise failed
    return results


def _printable(text: str) -> str:
    """With "?" for what a terminal has no sign for."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def results_table(results: Sequence[Result], on_cifar10: bool = False) -> str:
    """A Markdown table of last-epoch numbers, a row for each net.

    Of a net's several seeds: mean, sample standard deviation and number, and Student's 95 % interval of the mean.

    Args:
        on_cifar10: show the numbers of arXiv 2510.24036 beside those of the nets that it has, too.
    """
    several = len({result.name for result in results}) < len(results)
    columns = [["95 % interval"] if several else [], ["paper (%)"] if on_cifar10 else []]
    rows = [["net", "accuracy (%)", *columns[0], *columns[1], "loss", "parameters", "training (s)"]]
    for runs in by_name(results):
        name, accuracies = runs[0].name, [run.accuracy_percent for run in runs]
        between = [interval(accuracies)] if several else []
        paper = [f"{PAPER[name]:.1f}" if name in PAPER else ""] if on_cifar10 else []
        loss = mean_and_std([run.loss for run in runs], 4)
        seconds = mean_and_std([run.seconds for run in runs], 1)
        rows.append([title(name), mean_and_std(accuracies, 2), *between, *paper, loss, f"{runs[0].params:,}", seconds])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |" for row in rows]
    lines.insert(1, "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|")
    return "\n".join(lines)


def write_results(path: str | Path, results: list[Result]) -> None:
    """All runs with settings, environment and whole history in one JSON."""
    write_json(path, {"results": [result.as_dict() for result in results]})
