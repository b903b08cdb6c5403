"""The weights that you have: a ResNet-50 of torchvision in our net, checked, made fast, and handed back.

    python examples/torchvision_weights.py                 # random weights, half a minute on a CPU
    python examples/torchvision_weights.py --pretrained    # those of torchvision, downloaded by torchvision

Needs torchvision, which comes with the extra `train`.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
import torchvision

from resblocks import create_model, freeze_norm
from resblocks.fuse import fuse
from resblocks.interop import differences, load, to_torchvision


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", action="store_true", help="download torchvision's weights")
    weights = "DEFAULT" if parser.parse_args().pretrained else None
    theirs = torchvision.models.resnet50(weights=weights).eval()
    images = torch.randn(8, 3, 224, 224)

    net = create_model("resnet50").eval()
    notes = load(net, theirs)
    print("all weights copied as they stand" if not notes else "\n".join(notes))
    for what, apart in differences(net, theirs, images[:2]).items():
        print(f"  {what}: relative difference {apart:.1e}")

    # For your own classes: everything but the head, and norms that keep what they have learned.
    mine = create_model("resnet50", num_classes=5)
    print("\n".join(load(mine, theirs, drop_head=True)))
    freeze_norm(mine)

    fast = fuse(net, input_size=(3, 224, 224), batch_size=len(images))
    last = images.contiguous(memory_format=torch.channels_last)
    contestants = {
        "torchvision": (theirs, images),
        "resblocks": (net, images),
        "torchvision, channels_last": (copy.deepcopy(theirs).to(memory_format=torch.channels_last), last),
        "fused, channels_last": (fast, last),
    }
    for name, (model, x) in contestants.items():
        print(f"{name:<27} {1000 * seconds(model, x):.0f} ms for {len(x)} images")

    torchvision.models.resnet50().load_state_dict(to_torchvision(net))
    print("and back into torchvision's own class, every name and shape equal")


def seconds(model: torch.nn.Module, x: torch.Tensor, repeats: int = 5) -> float:
    """The shortest time of a batch."""
    times = []
    with torch.inference_mode():
        for _ in range(repeats):
            started = time.perf_counter()
            model(x)
            times.append(time.perf_counter() - started)
    return min(times)


if __name__ == "__main__":
    main()
