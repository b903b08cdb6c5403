"""A baseline CNN, ResNet-18 without skips and ResNet-18 on CIFAR-10: arXiv 2510.24036 from end to end.

    python examples/cifar10_resnet18.py --dataset digits        # real digits, nothing to download, 15 min on a CPU
    python examples/cifar10_resnet18.py                         # CIFAR-10, downloaded into data/
    torchrun --nproc-per-node 2 examples/cifar10_resnet18.py    # the same experiment on two GPUs

All nets get the same recipe, the same seeds and the same order of images. Stop it when you like: the same command goes
on from the last checkpoint, and a finished net is not trained again. The numbers are those of the last epoch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from resblocks.training import (
    DATASETS,
    PAPER,
    RECIPES,
    Ranks,
    get_recipe,
    load_dataset,
    run_experiment,
)
from resblocks.training.device import PRECISIONS
from resblocks.training.program import run_as_program


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=DATASETS, default="cifar10", help="data set (default: cifar10)")
    parser.add_argument(
        "--data-dir", type=Path, default=Path("data"), help="archive or folder of the images (default: data)"
    )
    parser.add_argument(
        "--models",
        nargs="+",
        help="names of resblocks.list_models(); append _noskip for the net without skips; images of at most 64 pixels "
        f"get the CIFAR stem (default: {' '.join(PAPER)})",
    )
    parser.add_argument("--recipe", choices=RECIPES, help="default: paper, and digits for the digits")
    parser.add_argument("--epochs", type=int, help="default: the recipe's")
    parser.add_argument("--batch-size", type=int, help="of each step, over all processes (default: the recipe's)")
    parser.add_argument("--lr", type=float, help="peak learning rate (default: the recipe's)")
    parser.add_argument("--cutout", type=int, help="side of the masked square, 0 is off (default: the recipe's)")
    parser.add_argument(
        "--seed",
        type=int,
        nargs="+",
        default=[0],
        help="of weights, order, augmentation; one or several (default: 0)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    parser.add_argument(
        "--precision", choices=("auto", *PRECISIONS), default="auto", help="auto: as the hardware has it"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the nets")
    parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard logs")
    parser.add_argument("--out", type=Path, help="folder of checkpoints, results and figures (default: runs/<dataset>)")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    out = options.out or Path("runs") / options.dataset
    ranks = Ranks.from_env()

    name = options.recipe or ("digits" if options.dataset == "digits" else "paper")
    # Digits of 8x8 end as maps of 1x1, where zero padding shrinks the signal until a net without norm learns nothing.
    usual = ["baseline_cnn_bn", "resnet18_noskip", "resnet18"] if options.dataset == "digits" else list(PAPER)
    recipe = get_recipe(
        name, epochs=options.epochs, batch_size=options.batch_size, lr=options.lr, cutout=options.cutout
    )
    dataset = ranks.first_then_all(lambda: load_dataset(options.dataset, options.data_dir))
    run_experiment(
        options.models or usual,
        dataset,
        recipe,
        out=out,
        seed=options.seed,
        device=options.device,
        precision=options.precision,
        compile=options.compile,
        tensorboard=options.tensorboard,
        ranks=ranks,
    )
    ranks.close()


if __name__ == "__main__":
    run_as_program(main)
