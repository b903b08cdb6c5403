"""How alike gradients at two inputs are, against gradients by hand and against what the paper says of skips."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resblocks.diagnostics import gradient_correlation
from resblocks.models import create_model


class Bowl(nn.Module):
    """Half the squares of the input, weighted: the gradient of the sum is weight * x."""

    def __init__(self, *weight: float) -> None:
        super().__init__()
        self.register_buffer("weight", torch.tensor(weight, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x.square() / 2


def small_net(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return create_model("resnet18", stem="cifar", widths=(4, 8), depths=(1, 1), num_classes=3, **options)


def test_correlation_is_the_cosine_of_the_gradients_by_hand():
    x = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    towards = torch.tensor([[1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64)
    found = gradient_correlation(Bowl(1, 3), x, towards, [0, 0.5, 1], torch.sum)
    # At x (1, 0) and (1, 3); half way (1, 1.5) and (0, 3); at the end (1, 3) and (-1, 3).
    assert found == {
        0: pytest.approx([1, 1]),
        0.5: pytest.approx([1 / math.hypot(1, 1.5), 9 / (math.hypot(1, 3) * 3)]),
        1: pytest.approx([1 / math.hypot(1, 3), 8 / 10]),
    }


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [(1e-30, torch.float32), (1e25, torch.float32), (1e-200, torch.float64), (1e200, torch.float64)],
)
def test_correlation_does_not_depend_on_the_size_of_gradients(scale, dtype):
    net = small_net().eval().to(dtype)
    x, towards = torch.randn(2, 2, 3, 8, 8, dtype=dtype)
    expected = gradient_correlation(net, x, towards, [0.1], lambda y: y.logsumexp(1).sum())[0.1]
    found = gradient_correlation(net, x, towards, [0.1], lambda y: scale * y.logsumexp(1).sum())[0.1]
    assert found == pytest.approx(expected, rel=1e-4)


def test_correlation_is_nan_without_a_gradient():
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    found = gradient_correlation(Bowl(1), x, x + 1, [1], torch.sum)[1]
    assert math.isnan(found[0])
    assert found[1] == 1


def test_gradients_shatter_without_skips():
    x, noise = torch.randn(8, 3, 8, 8), torch.randn(8, 3, 8, 8)
    found = {}
    for skip in (True, False):
        torch.manual_seed(0)
        net = create_model("resnet56", skip=skip)
        cosines = gradient_correlation(net, x, x + noise, [1e-4], lambda y: y.logsumexp(1).mean())
        found[skip] = [fmean(values) for values in cosines.values()]
    assert found[True][0] > 0.9
    assert found[False][0] < 0.3


@pytest.mark.parametrize("training", [True, False])
def test_correlation_runs_in_the_mode_of_the_net_and_leaves_it_as_it_was(training):
    net = small_net(dropout=0.5).train(training)
    x, towards, modes = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), []
    net.register_forward_hook(lambda module, args, y: modes.append(module.training))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    random_state = torch.get_rng_state()
    found = gradient_correlation(net, x, towards, [0, 0.5], lambda y: y.logsumexp(1).sum())
    assert set(modes) == {training} == {net.training}
    assert found[0] == pytest.approx([1] * 4)  # the same masks, too
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(weight.grad is None for weight in net.parameters())
    assert x.grad is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.ones(2, 3, dtype=torch.int64)}, "x must be of floating point numbers, got torch.int64"),
        ({"x": torch.tensor(1.0), "towards": torch.tensor(2.0)}, r"x and towards must have one shape, \(N, ...\)"),
        (
            {"x": torch.ones(0, 3), "towards": torch.ones(0, 3)},
            r"must have one shape, .* that is not empty, got \(0, 3\)",
        ),
        ({"towards": torch.ones(2, 4)}, r"x and towards must have one shape, .*got \(2, 3\) and \(2, 4\)"),
        ({"steps": 0.5}, "steps must be a list or another sequence, got 0.5"),
        ({"towards": torch.ones(2, 3) * 1j}, "towards must be real where x is, got torch.complex64"),
        ({"steps": [math.inf]}, "steps must be finite, got inf"),
        ({"steps": [math.nan]}, "steps must be finite, got nan"),
        ({"steps": [-(10**400)]}, "steps must be finite, got -1000"),
        ({"steps": ["1"]}, "steps must be an integer or a float, got '1'"),
        ({"loss": lambda y: y}, r"loss must return a tensor with one value, got a tensor of shape \(2, 3\)"),
        ({"loss": lambda y: y.detach().sum()}, "loss must depend on the net's output"),
    ],
)
def test_correlation_refuses_what_it_cannot_measure(changed, message):
    arguments = {"x": torch.ones(2, 3), "towards": torch.zeros(2, 3), "steps": [0.5], "loss": torch.sum}
    with pytest.raises(ValueError, match=message):
        gradient_correlation(nn.Linear(3, 3), **{**arguments, **changed})
