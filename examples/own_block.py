"""A block of your own in a net of the library: the inverted residual of MobileNetV2 (Sandler et al. 2018, fig. 4d).

    python examples/own_block.py      # digits of scikit-learn, half a minute on a CPU; needs the extra `train`

A block is a module called as `block(in_channels, out_channels, stride)` that has `out_channels`. Built on `Residual`
it has the skip switch, and lesions, diagnostics and `fuse` know its parts. Blocks that change the shape have no
shortcut here: `set_skip(net, True, where=lambda name, block: block.shortcut is not None)` switches the others on again.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from torch import nn

from resblocks import Residual, ResNet
from resblocks.diagnostics import summary
from resblocks.training import fit, get_recipe, load_digits


class InvertedResidual(Residual):
    """Wide between narrow ends: 1x1 expand, 3x3 in each channel alone, 1x1 reduce; no activation on the sum."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, *, expansion: int = 4, skip: bool = True
    ) -> None:
        width = expansion * in_channels
        branch = nn.Sequential(
            nn.Conv2d(in_channels, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU6(),
            nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU6(),
            nn.Conv2d(width, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        # As in the paper, a block that changes the shape has no shortcut.
        super().__init__(branch, skip=skip and stride == 1 and in_channels == out_channels)
        self.out_channels = out_channels


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    digits = load_digits()
    options = {"stem": "cifar", "stem_width": 24, "in_channels": 1, "num_classes": 10}
    for skip in (True, False):
        torch.manual_seed(0)
        net = ResNet(InvertedResidual, depths=[2, 3], widths=[24, 48], skip=skip, **options)
        print(summary(net, digits.shape), "\n")
        with tempfile.TemporaryDirectory() as folder:
            result = fit(net, digits, get_recipe("digits"), out=folder, name="with skips" if skip else "without skips")
        print(f"{result.name}: {result.accuracy_percent:.1f} % on the test set\n")


if __name__ == "__main__":
    main()
