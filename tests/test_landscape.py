"""Lines and planes through the weights of a net, against points set by hand and against what the paper says of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from resblocks.diagnostics import loss_line, loss_surface, random_direction
from resblocks.fuse import fuse
from resblocks.models import create_model
from resblocks.residual import skips_off

STEPS = [-1, -0.25, 0.0, 0.5]


def small_net(**options: Any) -> nn.Module:
    net = create_model("resnet18", stem="cifar", widths=(4, 8), depths=(1, 1), num_classes=3, **options).double()
    with torch.no_grad():
        net(torch.randn(16, 3, 8, 8, dtype=torch.float64))  # running statistics of its own
    return net


def loss_on(seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    generator = torch.Generator().manual_seed(seed)
    x, labels = torch.randn(8, 3, 8, 8, generator=generator).to(dtype), torch.arange(8) % 3
    return lambda net: nn.functional.cross_entropy(net(x), labels)


def moved(net: nn.Module, *ways: tuple[float, dict[str, Tensor]]) -> nn.Module:
    """A copy of the net, moved by hand."""
    net = copy.deepcopy(net).eval()
    for step, direction in ways:
        net.load_state_dict({name: value + step * direction.get(name, 0) for name, value in net.state_dict().items()})
    return net


def test_random_direction_is_as_long_as_each_filter_and_leaves_single_values_alone():
    net = small_net()
    direction, weights = random_direction(net), dict(net.named_parameters())
    assert list(direction) == [name for name, weight in weights.items() if weight.dim() > 1]
    for name, way in direction.items():
        norms = [tensor.detach().flatten(1).norm(dim=1) for tensor in (way, weights[name])]
        torch.testing.assert_close(*norms)
        assert way.std() > 0
    torch.testing.assert_close(direction, random_direction(net), rtol=0, atol=0)
    assert not torch.equal(direction["head.weight"], random_direction(net, 1)["head.weight"])


def test_random_direction_counts_what_one_output_reads_as_a_filter():
    net = nn.Sequential(nn.Conv2d(3, 3, 1, groups=3), nn.Conv2d(3, 4, 3, groups=1), nn.Flatten(), nn.Linear(4, 1))
    assert list(random_direction(net)) == ["1.weight", "3.weight"]  # the first has one weight a channel, as a scale


def test_surface_is_the_loss_of_the_moved_net():
    net, loss = small_net(), loss_on()
    directions = random_direction(net, 0), random_direction(net, 1)
    surface = loss_surface(net, loss, STEPS)
    assert list(surface) == [(a, b) for a in STEPS for b in STEPS]
    for (a, b), value in surface.items():
        expected = loss(moved(net, (a, directions[0]), (b, directions[1]))).item()
        assert value == pytest.approx(expected, rel=1e-12)
    assert surface[0.0, 0.0] == loss(net.eval()).item()
    line = loss_line(net, loss, STEPS)
    assert line == pytest.approx({a: surface[a, 0.0] for a in STEPS}, rel=1e-12)
    assert surface == loss_surface(net, loss, STEPS, directions)
    assert loss_line(net, loss, STEPS, directions[0]) == line


def test_line_along_a_known_slope_is_that_slope():
    net = nn.Linear(2, 1, bias=False).double()
    nn.init.constant_(net.weight, 2.0)
    line = loss_line(net, lambda net: net.weight.pow(2).sum(), range(4), {"weight": torch.tensor([[1.0, -1.0]])})
    assert line == {step: (2.0 + step) ** 2 + (2.0 - step) ** 2 for step in range(4)}


def test_line_to_another_net_ends_there():
    net, other, loss = small_net(), small_net(), loss_on()
    states = net.state_dict(), other.state_dict()
    way = {name: end - states[0][name] for name, end in states[1].items() if end.is_floating_point()}
    line = loss_line(net, loss, [0, 1], way)
    assert line == pytest.approx({0: loss(net.eval()).item(), 1: loss(other.eval()).item()}, rel=1e-12)
    assert abs(line[0] - line[1]) > 1e-3


def test_line_is_the_same_for_a_net_that_differs_in_the_scale_of_its_filters_alone():
    """Li et al. 2018, section 4: what a norm undoes must not change the picture."""
    net, loss = small_net(), loss_on()
    other = copy.deepcopy(net)
    for conv, norm in [(block.branch.conv1, block.branch.norm1) for stage in other.stages for block in stage]:
        norm.eps *= 100
        with torch.no_grad():
            conv.weight.mul_(10), norm.running_mean.mul_(10), norm.running_var.mul_(100)
    lines = [loss_line(each, loss, STEPS) for each in (net, other)]
    assert lines[1] == pytest.approx(lines[0], rel=1e-9)
    assert len({round(value, 3) for value in lines[0].values()}) == len(STEPS)


def test_net_is_left_as_it_was_also_after_an_error():
    net, loss = small_net().train(), loss_on()
    before, seen = copy.deepcopy(net.state_dict()), []

    def evaluate(net: nn.Module) -> float:
        seen.append((net.training, torch.is_grad_enabled()))
        with torch.no_grad():
            net.train()(torch.randn(4, 3, 8, 8, dtype=torch.float64))  # statistics of the moved weights
        if len(seen) == 3:
            raise RuntimeError("stopped")
        return loss(net.eval()).item()

    with pytest.raises(RuntimeError, match="stopped"):
        loss_line(net, evaluate, STEPS)
    assert seen == [(False, False)] * 3
    assert net.training
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


def test_surface_of_a_compiled_net_and_within_skips_off():
    net, loss = small_net(), loss_on()
    compiled = torch.compile(net, backend="eager")
    assert loss_line(compiled, loss, STEPS) == pytest.approx(loss_line(net, loss, STEPS), rel=1e-9)
    with skips_off(net):
        plain = loss_line(net, loss, STEPS)
    assert all(abs(plain[step] - value) > 1e-6 for step, value in loss_line(net, loss, STEPS).items())


def test_line_of_a_prepacked_net_is_that_of_the_fused_one():
    net, loss = small_net().float(), loss_on(dtype=torch.float32)
    packed, fused = fuse(net, input_size=(3, 8, 8), batch_size=8), fuse(net)
    lines = [loss_line(each, loss, STEPS) for each in (packed, fused)]
    assert lines[0] == pytest.approx(lines[1], rel=1e-4)
    assert max(lines[0].values()) - min(lines[0].values()) > 1e-2


def test_weights_that_share_or_compute_move_once():
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)).double()
    net[1].weight = net[0].weight
    way = {name: torch.ones(2, 2) for name in net.state_dict()}
    line = loss_line(net, lambda net: net[0].weight.sum(), [0, 1], way)
    assert line[1] - line[0] == pytest.approx(4.0)
    normed = parametrizations.weight_norm(nn.Linear(2, 3))
    assert list(random_direction(normed)) == ["parametrizations.weight.original1"]  # not the lengths, one value a row


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": torch.linspace(0, 1, 3)}, "steps must be a list or another sequence"),
        ({"steps": [0, float("nan")]}, "steps must be finite, got nan"),
        ({"steps": ["0"]}, "steps must be an integer or a float, got '0'"),
        ({"direction": {}}, "direction must map names to tensors, at least one, got {}"),
        ({"direction": [torch.ones(3)]}, r"direction must map names to tensors, at least one, got \[tensor"),
        ({"direction": {"head.bias": 1.0}}, r"head.bias is torch.float64 \(3,\), got 1.0"),
        ({"direction": {"weights": torch.ones(3)}}, "direction must name parameters or buffers of the net, got 'we"),
        ({"direction": {"head.bias": torch.ones(4)}}, r"head.bias is torch.float64 \(3,\), got \(4,\)"),
        (
            {"direction": {"stem.norm.num_batches_tracked": torch.ones(())}},
            "must move floating point numbers by a tensor of their shape: stem.norm.num_batches_tracked is torch.int64",
        ),
    ],
)
def test_line_refuses_what_does_not_fit(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        loss_line(small_net(), loss_on(), **{"steps": [0], **arguments})


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.BatchNorm2d(3), "net must have weights with filters, got BatchNorm2d without any"),
        (nn.LazyLinear(3), "net must know the shapes of its weights, got weight without one"),
    ],
)
def test_random_direction_refuses_a_net_without_filters(net: nn.Module, message: str):
    with pytest.raises(ValueError, match=message):
        random_direction(net)


def test_random_direction_refuses_a_seed_that_is_none():
    with pytest.raises(ValueError, match="seed must be an integer of at least 0, got -1"):
        random_direction(small_net(), -1)


def test_line_along_the_weights_themselves_scales_them():
    net, loss = small_net(), loss_on()
    own = dict(net.named_parameters())
    line = loss_line(net, loss, [0.5, -1], own)
    assert line == pytest.approx({step: loss(moved(net, (step, own))).item() for step in (0.5, -1)}, rel=1e-9)
    surface = loss_surface(net, loss, [0.5], (own, own))  # twice, whatever the first way has made of the weights
    start = {name: weight.detach().clone() for name, weight in own.items()}
    assert surface[0.5, 0.5] == pytest.approx(loss(moved(net, (0.5, start), (0.5, start))).item(), rel=1e-9)


def test_line_of_a_net_made_in_inference_mode_and_of_a_complex_one():
    with torch.inference_mode():
        net = nn.Linear(4, 3)
    line = loss_line(net, lambda net: net.weight.norm(), [0, 1])
    assert line[0] != line[1]
    assert line[0] == net.weight.norm().item()
    net = nn.Linear(4, 3, dtype=torch.complex64)
    way = random_direction(net)["weight"]
    assert way.imag.abs().min() > 0
    torch.testing.assert_close(way.norm(dim=1), net.weight.norm(dim=1))
    assert len(loss_line(net, lambda net: net.weight.abs().sum(), [0, 1])) == 2


def test_norms_of_whole_maps_stay():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm([4, 6, 6]))
    assert list(random_direction(net)) == ["0.weight"]


def test_surface_refuses_a_single_direction():
    net = small_net()
    single: Any = (random_direction(net),)
    with pytest.raises(ValueError, match="directions must be two, got 1"):
        loss_surface(net, loss_on(), [0], single)
