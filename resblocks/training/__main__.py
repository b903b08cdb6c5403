"""`python -m resblocks.training`: one experiment from typed options, every value of the recipe among them."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from resblocks.training.data import DATASETS, load_dataset
from resblocks.training.device import COMPILE_MODES, PRECISIONS
from resblocks.training.experiment import run_experiment
from resblocks.training.program import run_as_program
from resblocks.training.ranks import Ranks
from resblocks.training.recipe import RECIPES, SCHEDULES, Recipe, get_recipe, option


@dataclass
class Config:
    """What to run; how to train it is the recipe's."""

    models: list[str] = option(
        ["resnet18"],
        "names of resblocks.list_models(); append _torchinit for convolutions as torch draws them, then _noskip "
        "for the net without skips, _bn for the baseline with batch norm; images of at most 64 pixels get the CIFAR "
        "stem",
    )
    dataset: str = option("cifar10", "data set; folder is any tree train/<class>/, test/<class>/")
    data_dir: Path = option(Path("data"), "archive or folder of the images")
    validation: int = option(0, "number of training images to hold out and evaluate on, for selection; 0: the test set")
    recipe: str = option("auto", "see the list below; auto: digits for the digits, else paper")
    out: Path = option(Path("runs/training"), "folder of checkpoints, results and figures")
    seed: list[int] = option(
        [0], "of weights, order, augmentation and dropout; each of several trains every net, and the table has means"
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    precision: str = option("auto", "auto: bfloat16 where the hardware has it")
    compile: bool = option(False, "torch.compile the nets")
    compile_mode: str = option("default", "with --compile: reduce-overhead replays forward and backward as CUDA graphs")
    graph: bool = option(False, "replay each step as one CUDA graph, on one GPU")
    channels_last: bool = option(True, "memory format of weights and images")
    small_maps: bool = option(False, "run 3x3 convolutions with small output maps as matrix products, on the CPU")
    deterministic: bool = option(False, "deterministic convolutions on CUDA, slower")
    gradients: bool = option(True, "record the gradient by layer after each epoch")
    checkpoint_steps: int = option(0, "steps between further checkpoints; 0: only by time and epoch")
    checkpoint_seconds: float = option(300.0, "longest time between two checkpoints")
    timeout_seconds: float = option(600.0, "longest silence of another process before the run gives up")
    tensorboard: bool = option(False, "also write TensorBoard logs")
    progress: bool = option(True, "a progress bar on a terminal, plain lines elsewhere")
    svg: bool = option(False, "also save the figures as SVG")


CHOICES = {
    "dataset": list(DATASETS),
    "recipe": ["auto", *RECIPES],
    "precision": ["auto", *PRECISIONS],
    "compile_mode": list(COMPILE_MODES),
    "schedule": list(SCHEDULES),
    "padding": ["reflect", "zeros"],
    "tta": ["none", "flip"],
}
# What `main` itself uses; the other fields are arguments of `fit`, which raises at one that it does not know.
OWN = ("models", "dataset", "data_dir", "validation", "recipe", "out", "timeout_seconds", "svg")


def make_parser() -> argparse.ArgumentParser:
    """One argument for each field of `Config` and of `Recipe`."""
    parser = argparse.ArgumentParser(
        prog="python -m resblocks.training",
        description="Train named nets by a named recipe. Run the same command again to resume.",
        usage="%(prog)s [options]",
        epilog="recipes (and what they change of the usual values):\n"
        + "\n".join(f"  {name:10} {_summary(recipe)}" for name, recipe in RECIPES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    types, defaults = typing.get_type_hints(Config), Config()
    for entry in fields(Config):
        default = getattr(defaults, entry.name)
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        help = f"{entry.metadata['help']} (default: {shown})"
        _add(parser, entry.name, types[entry.name], default, help, CHOICES.get(entry.name))
    group = parser.add_argument_group("options of the recipe (default: the recipe's own value)")
    types = typing.get_type_hints(Recipe)
    for entry in fields(Recipe):
        if entry.name != "name":
            _add(group, entry.name, types[entry.name], None, entry.metadata["help"], CHOICES.get(entry.name))
    return parser


def _add(parser: Any, name: str, kind: Any, default: Any, help: str, choices: Sequence[str] | None) -> None:
    flag = "--" + name.replace("_", "-")
    if kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=help)
    elif arguments := typing.get_args(kind):  # list[str], tuple[float, ...]
        parser.add_argument(
            flag, nargs="*", type=arguments[0], default=default, help=help, metavar=arguments[0].__name__.upper()
        )
    else:
        metavar = None if choices else kind.__name__.upper()
        parser.add_argument(flag, type=kind, default=default, help=help, choices=choices, metavar=metavar)


def _summary(recipe: Recipe) -> str:
    """What everyone asks first, and what else differs from the defaults of `Recipe`."""
    usual, first = Recipe(name=recipe.name).as_dict(), ("epochs", "batch_size", "lr", "schedule")
    values = recipe.as_dict().items()
    return ", ".join(f"{name} {value}" for name, value in values if name in first or value != usual[name])


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, train, write results.json and the figures, print the table."""
    values = vars(make_parser().parse_args(arguments))
    config = Config(**{entry.name: values.pop(entry.name) for entry in fields(Config)})
    usual = "digits" if config.dataset == "digits" else "paper"
    recipe = get_recipe(usual if config.recipe == "auto" else config.recipe, **values)
    ranks = Ranks.from_env(config.timeout_seconds)
    dataset = ranks.first_then_all(lambda: load_dataset(config.dataset, config.data_dir))
    if config.validation:
        dataset = dataset.with_validation(config.validation)  # the same images for every seed
    options = {name: value for name, value in vars(config).items() if name not in OWN}  # those of `fit`
    formats = ("png", "svg") if config.svg else ("png",)
    run_experiment(config.models, dataset, recipe, out=config.out, formats=formats, ranks=ranks, **options)
    ranks.close()


if __name__ == "__main__":
    run_as_program(main)
