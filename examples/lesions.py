"""What each block of a trained ResNet-20 contributes (Veit et al. 2016): take its branch, or its shortcut, away.

python examples/lesions.py        # digits of scikit-learn, half a minute on a CPU; needs the extra `train`
"""

from __future__ import annotations

import argparse
import tempfile

import torch

from resblocks import skips_off
from resblocks.diagnostics import lesion_curve, lesion_study
from resblocks.training import build_net, fit, get_recipe, load_digits, normalise


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    digits = load_digits()
    net = build_net("resnet20", digits)
    with tempfile.TemporaryDirectory() as folder:
        fit(net, digits, get_recipe("digits"), out=folder, name="resnet20")
    net.cpu()
    images = normalise(digits.test_images, digits.mean, digits.std)

    def accuracy(net: torch.nn.Module) -> float:
        return 100 * float((net(images).argmax(1) == digits.test_labels).float().mean())

    branches = lesion_study(net, accuracy)
    shortcuts = lesion_study(net, accuracy, part="skip")
    print(f"\ntest accuracy of the whole net: {branches.intact:.1f} %\n")
    print("block         without its branch   without its shortcut")
    for branch, shortcut in zip(branches.lesions, shortcuts.lesions, strict=True):
        print(f"{branch.name:<12}  {branch.metric:17.1f} %  {shortcut.metric:19.1f} %")
    print("\nblocks without their branch, drawn at random   accuracy, worst to best of 5")
    for count, metrics in lesion_curve(net, accuracy, trials=5).items():
        print(f"{count:>43}  {min(metrics):7.1f} % to {max(metrics):5.1f} %")
    with skips_off(net), torch.no_grad():
        print(f"\nwithout any shortcut: {accuracy(net.eval()):.1f} %")


if __name__ == "__main__":
    main()
