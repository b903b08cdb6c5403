"""What is asked of other libraries: ours does it, and a net that does not is found out."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("monai")
pytest.importorskip("pytorchcv")

import asked

from resblocks import create_model


class Idle(nn.Identity):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))


class Twice(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.norm(x))


class Cut(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x.detach().mean()


def net_of(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize("request_", asked.REQUESTS)
def test_resblocks_does_what_is_asked(request_: str) -> None:
    check, builds = asked.REQUESTS[request_]
    assert asked.answer(check, builds["resblocks"]) == "yes"


@pytest.mark.parametrize(
    ("check", "net", "said"),
    [
        (asked.trains_all, lambda: net_of(nn.Conv2d(3, 4, 1), Idle()), "1 weights without a gradient"),
        (lambda net: asked.has_none(net, nn.ReLU), lambda: create_model("resnet18"), "17 of the old ones left"),
        (lambda net: asked.has_some(net, "Drop"), lambda: create_model("resnet18"), "no such layer"),
        (lambda net: asked.has_stages(net, 3), lambda: create_model("resnet18"), "4 stages"),
        (lambda net: asked.puts_out_at(net, 8), lambda: create_model("resnet18"), "maps of 2, not 8"),
        (lambda net: asked.puts_out_at(net, 16), lambda: net_of(nn.Conv2d(3, 4, 1, 4)), "dilations 1"),
        (asked.keeps_values, lambda: net_of(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True)), "1 of 5 values overwritten"),
        (asked.counts_once, lambda: Twice(nn.BatchNorm2d(3)), "batches counted: 2"),
        (asked.differentiates, lambda: net_of(Cut(3, 4, 1)), "gradient off by .* %"),
        (asked.trains_all, lambda: net_of(nn.Conv2d(4, 4, 1)), "RuntimeError: Given groups=1"),
    ],
)
def test_net_that_does_not_is_found_out(check: Callable[[nn.Module], str], net: Any, said: str) -> None:
    answer = asked.answer(check, net)
    assert answer != "yes"
    assert re.match(said, answer), answer
