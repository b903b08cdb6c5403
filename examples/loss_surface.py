"""The loss around a ResNet-20 trained with and without skips (Li et al. 2018), as a picture and along a line.

python examples/loss_surface.py        # digits of scikit-learn, half a minute on a CPU; needs the extra `train`
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from torch import nn

from resblocks.diagnostics import loss_line, loss_surface
from resblocks.training import build_net, draw_surfaces, fit, get_recipe, load_digits, normalise

STEPS = [step / 5 for step in range(-5, 6)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/loss_surface"), help="where the picture goes")
    out = parser.parse_args().out
    digits = load_digits()
    images, labels = normalise(digits.train_images[:300], digits.mean, digits.std), digits.train_labels[:300]

    def loss(net: nn.Module) -> float:
        return float(nn.functional.cross_entropy(net(images), labels))

    surfaces, lines = {}, {}
    for name, title in (("resnet20", "ResNet-20"), ("resnet20_noskip", "ResNet-20 without skips")):
        net = build_net(name, digits)
        with tempfile.TemporaryDirectory() as folder:
            fit(net, digits, get_recipe("digits"), out=folder, name=name)
        net.cpu()
        surfaces[title] = loss_surface(net, loss, STEPS)
        lines[title] = loss_line(net, loss, STEPS)
    print("\nstep along a random direction   loss, " + "   ".join(lines))
    for step in STEPS:
        print(f"{step:>29.1f}   " + "   ".join(f"{line[step]:>12.3f}" for line in lines.values()))
    (picture,) = draw_surfaces(surfaces, out)
    print(f"\nloss over a plane of two random directions: {picture}")


if __name__ == "__main__":
    main()
