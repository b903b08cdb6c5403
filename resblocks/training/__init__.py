"""The CIFAR training harness: data as whole tensors, recipes as data, and runs that lose nothing.

An optional part: `pip install "resblocks[train]"`. It is plain PyTorch; torchrun makes it parallel.
"""

from resblocks.training.augment import augment, cutout, derive_seed, draw, normalise
from resblocks.training.checkpoint import load_checkpoint, load_weights, save_checkpoint, save_weights
from resblocks.training.data import (
    DATASETS,
    Dataset,
    load_cifar10,
    load_cifar100,
    load_dataset,
    load_digits,
    load_folder,
)
from resblocks.training.experiment import (
    PAPER,
    SomeDiverged,
    build_net,
    results_table,
    run_experiment,
    run_variants,
    write_results,
)
from resblocks.training.figures import draw_figures, draw_surfaces
from resblocks.training.files import FolderLock
from resblocks.training.fit import Diverged, fit
from resblocks.training.predict import Trained, load_trained
from resblocks.training.ranks import Ranks
from resblocks.training.recipe import RECIPES, Recipe, get_recipe
from resblocks.training.result import Result
from resblocks.training.signals import Interrupted

__all__ = [
    "DATASETS",
    "PAPER",
    "RECIPES",
    "Dataset",
    "Diverged",
    "FolderLock",
    "Interrupted",
    "Ranks",
    "Recipe",
    "Result",
    "SomeDiverged",
    "Trained",
    "augment",
    "build_net",
    "cutout",
    "derive_seed",
    "draw",
    "draw_figures",
    "draw_surfaces",
    "fit",
    "get_recipe",
    "load_checkpoint",
    "load_cifar10",
    "load_cifar100",
    "load_dataset",
    "load_digits",
    "load_folder",
    "load_trained",
    "load_weights",
    "normalise",
    "results_table",
    "run_experiment",
    "run_variants",
    "save_checkpoint",
    "save_weights",
    "write_results",
]
