"""Counts against torchvision's published figures and sums by hand; reports against autograd; nets left as they were."""

from __future__ import annotations

import copy
import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils import prune

from resblocks.blocks import BasicBlock, DenseLayer, PreActBasicBlock
from resblocks.diagnostics import (
    count_macs,
    count_params,
    gradient_flow,
    lesion_curve,
    lesion_study,
    path_gradients,
    signal_report,
    summary,
)
from resblocks.lesions import Part
from resblocks.models import create_model
from resblocks.nets import ResNet
from resblocks.residual import Residual, set_skip

TORCHVISION = ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "densenet121", "densenet169"]


def small_net() -> nn.Sequential:
    """Stem, two blocks of which the second projects, head; batch norm and dropout inside."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.Sequential(BasicBlock(4, 4, dropout=0.5), BasicBlock(4, 8, 2)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )


def hooks_of(net: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in net.modules())


def state_of(net: nn.Module) -> tuple[dict[str, Tensor], list[bool], list[Tensor | None], int]:
    grads = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    return copy.deepcopy(net.state_dict()), [m.training for m in net.modules()], grads, hooks_of(net)


def assert_same_state(net: nn.Module, before: tuple[dict[str, Tensor], list[bool], list[Tensor | None], int]) -> None:
    now = state_of(net)
    torch.testing.assert_close(now[0], before[0], rtol=0, atol=0)
    assert now[1] == before[1]
    assert all(
        (a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in zip(now[2], before[2], strict=True)
    )
    assert now[3] == before[3]


class Boom(nn.Module):
    """Fails when it runs."""

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("boom")


@pytest.mark.parametrize("name", TORCHVISION)
def test_counts_are_those_that_torchvision_publishes(name: str) -> None:
    meta = torchvision.models.get_model_weights(name).DEFAULT.meta
    with torch.device("meta"):
        net = torchvision.models.get_model(name, weights=None)
    assert count_params(net) == meta["num_params"]
    assert count_macs(net, (3, 224, 224)) / 1e9 == pytest.approx(meta["_ops"], abs=0.0006)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_macs_of_a_small_net_are_those_counted_by_hand(dims: int) -> None:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    net = nn.Sequential(
        conv(4, 8, 3, stride=2, padding=1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4**dims, 5)
    )
    weights = 8 * (4 // 2) * 3**dims
    assert count_params(net) == weights + 8 + 5 * 8 * 4**dims + 5
    assert count_macs(net, (4, *[8] * dims)) == weights * 4**dims + 5 * 8 * 4**dims


def test_shared_parameters_count_once_and_frozen_ones_on_request() -> None:
    layer = nn.Linear(3, 2)
    net = nn.Sequential(layer, nn.Linear(2, 3), layer)
    assert count_params(net) == 8 + 9
    layer.requires_grad_(False)
    assert count_params(net, trainable_only=True) == 9
    assert count_macs(net, (3,)) == 6 + 6 + 6


def test_counting_leaves_a_module_with_two_names_as_it_was() -> None:
    layer = nn.Linear(3, 3)
    net, weight = nn.Sequential(layer, nn.BatchNorm1d(3), layer), layer.weight
    assert count_macs(net, (3,)) == 9 + 9
    assert layer.weight is weight
    assert {tensor.device.type for tensor in net.state_dict().values()} == {"cpu"}


def test_counting_leaves_a_training_net_as_it_was() -> None:
    net = small_net()
    net[1][0].eval()
    before = state_of(net)
    count_macs(net, (3, 8, 8))
    summary(net, (3, 8, 8))
    assert_same_state(net, before)


def test_counting_leaves_a_net_as_it_was_after_an_error() -> None:
    net = nn.Sequential(small_net(), Boom())
    before = state_of(net)
    with pytest.raises(ValueError, match="boom"):
        summary(net, (3, 8, 8))
    assert_same_state(net, before)


@pytest.mark.parametrize("input_size", [(), (3, 0, 8), (3, -1, 8), 32])
def test_input_size_that_is_not_positive_raises(input_size: Any) -> None:
    with pytest.raises(ValueError, match="input_size must be positive integers"):
        count_macs(small_net(), input_size)


@pytest.mark.parametrize("input_size", [(8, 8), (1, 3, 8, 8), (4, 8, 8)])
@pytest.mark.parametrize("count", [count_macs, summary])
def test_input_size_that_the_net_does_not_take_is_named(count: Any, input_size: tuple[int, ...]) -> None:
    said = (
        r"one sample that the net takes, without the batch dimension, got \({}\); its first convolution is Conv2d\(3, 4"
    )
    with pytest.raises(ValueError, match="input_size must be " + said.format(", ".join(map(str, input_size)))):
        count(small_net(), input_size)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, torch.optim.swa_utils.AveragedModel])
def test_net_inside_a_wrapper_is_counted(wrap: Any) -> None:
    net = small_net()
    assert count_macs(wrap(net), (3, 8, 8)) == count_macs(net, (3, 8, 8))
    assert summary(wrap(net), (3, 8, 8)) == summary(net, (3, 8, 8))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_traced_net_is_not_counted() -> None:
    net = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))
    with pytest.raises(ValueError, match="net must be a module in Python, got a traced or scripted one"):
        count_macs(net, (2,))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_net_with_a_traced_part_is_not_counted() -> None:
    net = nn.Sequential(nn.Linear(2, 2), torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)))
    with pytest.raises(ValueError, match="net must be a module in Python, got a traced or scripted one, 1"):
        summary(net, (2,))


def test_counting_leaves_pruned_weights_for_the_next_round() -> None:
    net, other = nn.Linear(8, 8), nn.Linear(8, 8)
    other.load_state_dict(net.state_dict())
    for layer in (net, other):
        for _ in range(2):
            prune.l1_unstructured(layer, "weight", 0.4)
            if layer is net:
                assert count_macs(layer, (8,)) == 64
    assert net.weight.device.type == "cpu"
    assert torch.equal(net.weight_mask, other.weight_mask)


def test_summary_has_a_row_for_each_block_and_the_rows_add_up() -> None:
    net = small_net()
    net[1][0].skip = False
    table = summary(net, (3, 8, 8))
    assert [(r.name, r.type, r.output_shape, r.skip) for r in table.rows] == [
        ("0", "Conv2d", (4, 8, 8), None),
        ("1.0", "BasicBlock", (4, 8, 8), False),
        ("1.1", "BasicBlock", (8, 4, 4), True),
        ("2", "AdaptiveAvgPool2d", (8, 1, 1), None),
        ("3", "Flatten", (8,), None),
        ("4", "Linear", (2,), None),
    ]
    assert sum(r.params for r in table.rows) == table.params == count_params(net)
    assert sum(r.macs for r in table.rows) == table.macs == count_macs(net, (3, 8, 8))
    block = 4 * 8 * 9 * 16 + 8 * 8 * 9 * 16 + 4 * 8 * 16
    assert table.rows[2].macs == block


def test_summary_prints_as_a_table() -> None:
    net = nn.Sequential(nn.Linear(8, 16), Residual(nn.Linear(16, 16)), nn.Linear(16, 2))
    net[0].requires_grad_(False)
    assert str(summary(net, (8,))).splitlines() == [
        "name   type        output  params  MACs  skip",
        "---------------------------------------------",
        "0      Linear      16         144   128",
        "1      Residual    16         272   256  on",
        "2      Linear      2           34    32",
        "---------------------------------------------",
        "total  Sequential             450   416",
        "input 8, one sample, 1 MAC = 2 FLOP, 306 parameters trainable",
    ]


def test_summary_shows_a_part_that_does_not_run_without_a_shape() -> None:
    block = Residual(nn.Linear(4, 4))
    block.skip = False
    rows = {row.name: row for row in summary(block, (4,)).rows}
    assert rows["merge"].output_shape is None
    assert rows["branch"].output_shape == (4,)


class Twice(nn.Module):
    """Runs its block twice."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(self.block(x))
        return out


def test_summary_counts_every_run_of_a_part() -> None:
    table = summary(Twice(Residual(nn.Linear(4, 4))), (4,))
    assert table.rows[0].macs == table.macs == 2 * 4 * 4


def test_units_of_a_summary_are_decimal() -> None:
    said = str(summary(nn.Sequential(nn.Linear(1000, 1000), nn.Linear(1000, 2)), (1000,)))
    assert "1.000 M" in said
    assert "2.000 k" in said


def test_gradient_flow_reads_every_convolution_and_linear_weight_in_order() -> None:
    net = small_net()
    net(torch.randn(4, 3, 8, 8)).square().mean().backward()
    rows = gradient_flow(net)
    assert [row.name for row in rows] == [
        "0.weight",
        "1.0.branch.conv1.weight",
        "1.0.branch.conv2.weight",
        "1.1.branch.conv1.weight",
        "1.1.branch.conv2.weight",
        "1.1.shortcut.conv.weight",
        "4.weight",
    ]
    for row in rows:
        grad = net.get_parameter(row.name).grad
        assert row.params == grad.numel()
        assert row.mean_abs == pytest.approx(grad.abs().mean().item())
        assert row.norm == pytest.approx(torch.linalg.vector_norm(grad).item())
        assert row.std == pytest.approx(grad.flatten().std(correction=0).item())
        assert row.norm > 0


def test_gradient_flow_leaves_out_what_got_no_gradient() -> None:
    net = small_net()
    set_skip(net, False)
    net[4].weight.requires_grad_(False)
    net(torch.randn(4, 3, 8, 8)).mean().backward()
    names = [row.name for row in gradient_flow(net)]
    assert "1.1.shortcut.conv.weight" not in names
    assert "4.weight" not in names
    assert len(names) == 5


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("parametrise", "parts"),
    [
        (torch.nn.utils.parametrizations.spectral_norm, ["original"]),
        (torch.nn.utils.parametrizations.weight_norm, ["original0", "original1"]),
    ],
)
def test_gradient_flow_reads_what_a_parametrised_weight_is_made_of(parametrise: Any, parts: list[str]) -> None:
    net = nn.Sequential(parametrise(nn.Linear(3, 3)), nn.Linear(3, 1))
    net(torch.randn(4, 3)).sum().backward()
    names = [f"0.parametrizations.weight.{part}" for part in parts] + ["1.weight"]
    rows = gradient_flow(net)
    assert [row.name for row in rows] == names
    assert [row.norm for row in rows] == pytest.approx([float(net.get_parameter(name).grad.norm()) for name in names])


def test_gradient_flow_reads_pruned_layers_and_inside_wrappers() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    prune.identity(net[0], "weight")
    nn.DataParallel(net)(torch.ones(1, 2)).sum().backward()
    assert [row.name for row in gradient_flow(net)] == ["0.weight_orig", "1.weight"]
    assert gradient_flow(nn.DataParallel(net)) == gradient_flow(net)


def test_gradient_flow_of_a_single_layer_has_a_plain_name() -> None:
    layer = nn.Linear(2, 1)
    layer(torch.ones(1, 2)).sum().backward()
    assert gradient_flow(layer)[0].name == "weight"


def test_gradient_flow_names_layers_as_residuals_does() -> None:
    net = small_net()
    wrapped = nn.Sequential(net[0], torch.compile(net[1], backend="eager"), net[2])
    sum(weight.sum() for weight in wrapped.parameters()).backward()  # type: ignore[union-attr]
    assert not any("_orig_mod" in row.name for row in gradient_flow(wrapped))


def test_net_made_in_inference_mode_is_counted_and_reported() -> None:
    with torch.inference_mode():
        net = create_model("resnet20")
        signals = signal_report(net, torch.randn(2, 3, 8, 8))
    assert count_macs(net, (3, 32, 32)) == count_macs(create_model("resnet20"), (3, 32, 32))
    assert len(signals) == 9


def test_gradient_flow_before_backward_raises() -> None:
    with pytest.raises(ValueError, match=r"call loss.backward\(\) first"):
        gradient_flow(small_net())


def test_signal_report_measures_where_the_paths_meet() -> None:
    block = Residual(nn.Linear(4, 4), nn.Linear(4, 4), scale=Halve(), act=nn.ReLU())
    x = torch.randn(16, 4)
    (row,) = signal_report(block, x, loss=lambda y: y.square().sum())
    shortcut, branch = block.shortcut(x), block.branch(x).detach().requires_grad_()
    merged = shortcut.detach() + branch / 2
    merged.retain_grad()
    merged.relu().square().sum().backward()
    assert row.shortcut_var == pytest.approx(shortcut.var(correction=0).item())
    assert row.branch_var == pytest.approx((branch / 2).var(correction=0).item())
    assert row.merged_var == pytest.approx(merged.var(correction=0).item())
    assert row.ratio == pytest.approx(row.branch_var / row.shortcut_var)
    assert row.merged_grad_norm == pytest.approx(merged.grad.norm().item())
    assert row.branch_grad_norm == pytest.approx(branch.grad.norm().item())


class Halve(nn.Module):
    """Half of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 2


@pytest.mark.parametrize("with_loss", [False, True])
def test_signal_report_leaves_the_net_as_it_was(with_loss: bool) -> None:
    net = small_net()
    net(torch.randn(4, 3, 8, 8)).mean().backward()
    before = state_of(net)
    rows = signal_report(net, torch.randn(4, 3, 8, 8), loss=Tensor.mean if with_loss else None)
    assert_same_state(net, before)
    assert [row.name for row in rows] == ["1.0", "1.1"]
    assert all((row.merged_grad_norm is not None) == with_loss for row in rows)


def test_signal_report_keeps_the_random_state() -> None:
    net, x = small_net(), torch.randn(4, 3, 8, 8)
    before = torch.get_rng_state()
    signal_report(net, x)
    assert torch.equal(torch.get_rng_state(), before)


def test_signal_report_of_a_plain_block_has_no_shortcut() -> None:
    net = small_net()
    net[1][0].skip = False
    plain, residual = signal_report(net, torch.randn(4, 3, 8, 8))
    assert (plain.skip, plain.shortcut_var, plain.ratio) == (False, None, None)
    assert plain.merged_var == plain.branch_var > 0
    assert residual.skip
    assert residual.ratio > 0


def test_ratio_to_a_shortcut_without_variance_is_infinite() -> None:
    (row,) = signal_report(Residual(nn.Linear(4, 4)), torch.ones(2, 4))
    assert (row.shortcut_var, row.ratio) == (0, math.inf)


class Counting(nn.Module):
    """A layer of a user that puts a new tensor in the place of its buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("runs", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        self.runs = self.runs + 1
        return x


def test_signal_report_puts_back_a_buffer_that_was_replaced() -> None:
    net = nn.Sequential(Residual(nn.Linear(3, 3)), Counting())
    signal_report(net, torch.randn(2, 3))
    assert net[1].runs == 0


def test_signal_report_reads_the_gradients_of_a_frozen_net() -> None:
    net = small_net().requires_grad_(False)
    rows = signal_report(net, torch.randn(4, 3, 8, 8), loss=Tensor.sum)
    assert all(row.merged_grad_norm > 0 for row in rows)


class Cut(nn.Module):
    """Lets no gradient through."""

    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


def test_signal_report_has_no_gradient_for_values_outside_the_graph() -> None:
    net = nn.Sequential(Residual(nn.Linear(3, 3)), Cut(), Residual(Cut(), Cut()), Residual(nn.Linear(3, 3)))
    before, cut, behind = signal_report(net, torch.randn(4, 3), loss=Tensor.sum)
    assert before.merged_grad_norm == before.branch_grad_norm == 0
    assert cut.merged_grad_norm is None
    assert cut.branch_grad_norm is None
    assert behind.branch_grad_norm > 0
    (alone,) = signal_report(nn.Sequential(Residual(nn.Linear(3, 3)), Cut()), torch.randn(4, 3), loss=Tensor.sum)
    assert alone.merged_grad_norm == 0


def test_signal_report_removes_its_hooks_on_an_error() -> None:
    net = nn.Sequential(small_net(), Boom())
    before = state_of(net)
    with pytest.raises(RuntimeError, match="boom"):
        signal_report(net, torch.randn(4, 3, 8, 8))
    assert_same_state(net, before)


def test_reports_of_a_net_without_residual_blocks_raise() -> None:
    net = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="a Residual, got Linear"):
        signal_report(net, torch.ones(1, 2))
    with pytest.raises(ValueError, match="a Residual, got Linear"):
        lesion_study(net, lambda net: 0.0)


def test_lesion_replaces_one_block_at_a_time_by_its_shortcut() -> None:
    first, second = Residual(nn.Linear(3, 3)), Residual(nn.Linear(3, 3), nn.Linear(3, 3), act=nn.ReLU())
    net, x = nn.Sequential(first, second), torch.randn(2, 3)
    study = lesion_study(net, lambda net: net(x).sum())
    assert study.intact == pytest.approx(net(x).sum().item())
    without_first, without_second = second(x), second.shortcut(first(x)).relu()
    expected = [without_first.sum().item(), without_second.sum().item()]
    assert [lesion.name for lesion in study.lesions] == ["0", "1"]
    assert [lesion.metric for lesion in study.lesions] == pytest.approx(expected, abs=1e-5)
    assert [lesion.change for lesion in study.lesions] == pytest.approx([e - study.intact for e in expected], abs=1e-5)


def test_diagnostics_see_into_a_net_that_was_compiled_and_run() -> None:
    net, x = small_net().eval(), torch.randn(2, 3, 8, 8)
    compiled = torch.compile(net, backend="eager")
    with torch.no_grad():
        compiled(x)
    found, expected = (lesion_study(each, lambda net: net(x).sum()).lesions for each in (compiled, net))
    assert [lesion.metric for lesion in found] == pytest.approx([lesion.metric for lesion in expected], abs=1e-5)
    assert any(abs(lesion.change) > 1e-4 for lesion in found)
    assert len(signal_report(compiled, x)) == len(signal_report(net, x)) > 0


def test_lesion_of_the_skip_leaves_the_branch() -> None:
    net, x = nn.Sequential(Residual(nn.Linear(3, 3)), Residual(nn.Linear(3, 3))), torch.randn(2, 3)
    study = lesion_study(net, lambda net: net(x).sum(), part="skip", where="1")
    (lesion,) = study.lesions
    assert lesion.metric == pytest.approx(net[1].branch(net[0](x)).sum().item(), abs=1e-5)
    assert net[1].skip


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("block", [BasicBlock, PreActBasicBlock, partial(PreActBasicBlock, norm=None)])
def test_lesion_of_a_block_hands_its_input_on(block: Any, skip: bool) -> None:
    net, x = ResNet(block, [2, 2], [4, 8], stem="cifar", num_classes=3, skip=skip).eval(), torch.randn(2, 3, 8, 8)
    study = lesion_study(net, lambda net: net(x).square().sum(), part="block")
    assert [lesion.name for lesion in study.lesions] == ["stages.0.1", "stages.1.1"]  # stages.0.0 widens the stem's map
    for stage, lesion in enumerate(study.lesions):
        without = copy.deepcopy(net)
        without.stages[stage][1] = nn.Identity()
        assert lesion.metric == pytest.approx(without(x).square().sum().item(), rel=1e-5)
        assert abs(lesion.change) > 1e-3


def test_lesion_of_blocks_that_all_change_the_shape_raises() -> None:
    with pytest.raises(ValueError, match="at least one block that keeps the shape of its input, got none"):
        lesion_study(DenseLayer(4, 6), lambda net: float(net(torch.randn(2, 4, 3, 3)).sum()), part="block")


def test_lesion_of_a_dense_layer_gives_zeros_for_its_features() -> None:
    layer, x = DenseLayer(4, 6).eval(), torch.randn(2, 4, 3, 3)
    (lesion,) = lesion_study(layer, lambda net: net(x)[:, 4:].abs().sum()).lesions
    assert lesion.metric == 0


def test_lesions_are_evaluated_in_eval_mode_without_gradients_and_undone_on_an_error() -> None:
    net = small_net()
    before, seen = state_of(net), []

    def evaluate(net: nn.Module) -> float:
        seen.append((net.training, torch.is_grad_enabled()))
        if len(seen) == 2:
            raise RuntimeError("boom")
        return 0.0

    with pytest.raises(RuntimeError, match="boom"):
        lesion_study(net, evaluate)
    assert seen == [(False, False)] * 2
    assert_same_state(net, before)


def test_lesion_study_leaves_plain_blocks_out() -> None:
    net = small_net()
    net[1][0].skip = False
    assert [lesion.name for lesion in lesion_study(net, lambda net: 0.0).lesions] == ["1.1"]
    set_skip(net, False)
    with pytest.raises(ValueError, match="net must have at least one block whose skip is on, got none"):
        lesion_study(net, lambda net: 0.0)


@pytest.mark.parametrize("part", ["branch", "skip", "block"])
def test_lesion_curve_damages_so_many_blocks_at_once(part: Part) -> None:
    net = nn.Sequential(*(Residual(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(6)))
    before, seen = state_of(net), []

    def damaged(net: nn.Module) -> float:
        seen.append((net.training, torch.is_grad_enabled()))
        net(torch.ones(1, 3))
        hooked = {"branch": lambda block: block.branch._forward_hooks, "block": lambda block: block._forward_hooks}
        gone = [not child.skip if part == "skip" else len(hooked[part](child)) > 0 for child in net]
        return sum(2.0**index for index, is_gone in enumerate(gone) if is_gone)

    curve = lesion_curve(net, damaged, trials=5, part=part)
    assert {count: len(metrics) for count, metrics in curve.items()} == {0: 1, 1: 5, 2: 5, 3: 5, 4: 5, 5: 5, 6: 1}
    for count, metrics in curve.items():
        assert [int(metric).bit_count() for metric in metrics] == [count] * len(metrics)
        assert len(set(metrics)) == len(metrics)
    assert curve == lesion_curve(net, damaged, range(7), trials=5, part=part)
    assert curve[3] != lesion_curve(net, damaged, [3], trials=5, part=part, seed=1)[3]
    assert set(seen) == {(False, False)}
    assert_same_state(net, before)


def test_lesion_curve_agrees_with_the_study_of_single_blocks() -> None:
    net, x = small_net(), torch.randn(2, 3, 8, 8)
    study = lesion_study(net, lambda net: net(x).sum())
    curve = lesion_curve(net, lambda net: net(x).sum(), trials=100)
    assert curve[0] == [study.intact]
    assert curve[1] == [lesion.metric for lesion in study.lesions]


def test_lesion_curve_damages_chosen_blocks_only() -> None:
    net, x = nn.Sequential(*(Residual(nn.Linear(3, 3)) for _ in range(3))), torch.randn(2, 3)
    study = lesion_study(net, lambda net: net(x).sum(), where="1")
    curve = lesion_curve(net, lambda net: net(x).sum(), where="1")
    assert curve == {0: [study.intact], 1: [study.lesions[0].metric]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"counts": [3]}, "counts must be integers from 0 to 2, the number of blocks"),
        ({"trials": 0}, "trials must be an integer of at least 1"),
    ],
)
def test_lesion_curve_of_what_cannot_be_raises(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lesion_curve(small_net(), lambda net: 0.0, **options)


def test_lesion_counts_that_are_no_list_are_named() -> None:
    with pytest.raises(ValueError, match="counts must be a list or another sequence, got 3"):
        lesion_curve(small_net(), lambda net: 0.0, 3)  # type: ignore[arg-type]


def test_lesion_of_an_unknown_part_raises() -> None:
    with pytest.raises(ValueError, match="part must be one of branch, skip, block, got 'act'"):
        lesion_study(small_net(), lambda net: 0.0, part="act")


def test_small_gradients_and_large_signals_in_float64_are_told() -> None:
    layer, block = nn.Linear(4, 4).double(), Residual(nn.Linear(4, 4)).double()
    (layer(torch.full((1, 4), 1e-60, dtype=torch.float64)).sum()).backward()
    (row,) = gradient_flow(layer)
    assert row.norm == pytest.approx(4e-60)
    (signal,) = signal_report(block, torch.randn(2, 4, dtype=torch.float64) * 1e25)
    assert 1e49 < signal.shortcut_var < 1e51


def test_gradients_of_complex_weights_are_whole() -> None:
    layer = nn.Linear(4, 4, dtype=torch.complex64)
    layer(torch.randn(3, 4, dtype=torch.complex64)).abs().square().sum().backward()
    (row,) = gradient_flow(layer)
    assert layer.weight.grad is not None
    assert row.norm == pytest.approx(float(torch.view_as_real(layer.weight.grad).norm()), rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("measure", [signal_report, lambda net, x: lesion_study(net, lambda net: float(net(x).sum()))])
def test_a_measurement_between_forward_and_backward_changes_no_gradient(measure: Any, training: bool) -> None:
    torch.manual_seed(0)
    net = small_net().train(training)
    x = torch.randn(4, 3, 8, 8)
    grads = []
    for between in (lambda *_: None, measure):
        torch.manual_seed(0)
        loss = net(x).square().sum()
        between(net, x)
        grads.append(torch.autograd.grad(loss, list(net.parameters())))
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_signal_report_is_of_what_the_block_put_out_before_others_write_over_it() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(4, 4)
    x = torch.randn(8, 4)
    in_place, copies = (
        signal_report(nn.Sequential(Residual(linear), nn.ReLU(inplace)), x, lambda y: y.square().sum())
        for inplace in (True, False)
    )
    assert in_place == copies


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_gradients_and_signals_are_told_where_their_squares_leave_float32(size: float) -> None:
    net = nn.Sequential(Residual(nn.Identity()), nn.Linear(2, 1))
    net(torch.tensor([[3.0, 4.0], [3.0, 4.0]]) * size).sum().backward()
    assert gradient_flow(net)[0].norm == pytest.approx(20 * size, rel=1e-6)
    (block,) = signal_report(net, torch.tensor([[3.0, 4.0]]) * size)
    assert block.branch_var == pytest.approx(0.25 * size**2, rel=1e-6)
    assert block.ratio == pytest.approx(1, rel=1e-6)


class Coded(nn.Module):
    """A layer of a user that keeps what it made in its first forward, in each way that people do, and counts."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.calls, self.codes = how, 0, {}
        if how == "attribute":
            self.code = None
        if how == "buffer":
            self.register_buffer("code", None)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.how == "dictionary":
            return x + self.codes.setdefault(x.shape[1:], torch.linspace(0, 1, x.shape[1], device=x.device))
        if getattr(self, "code", None) is None:
            self.code = torch.linspace(0, 1, x.shape[1], device=x.device)
        return x + self.code


@pytest.mark.parametrize("how", ["attribute", "missing", "buffer", "dictionary"])
@pytest.mark.parametrize("measure", [count_macs, summary, lambda net, size: signal_report(net, torch.ones(2, *size))])
def test_a_net_that_keeps_what_its_first_forward_makes_is_left_as_it_was(how: str, measure: Any) -> None:
    net = nn.Sequential(Coded(how), Residual(nn.Linear(8, 8)))
    before = dict(vars(net[0]))
    measure(net, (8,))
    assert vars(net[0]) == before
    assert net[0].codes == {}
    assert net(torch.ones(2, 8)).shape == (2, 8)
    measure(net, (8,))
    net(torch.ones(2, 8))


class Centred(nn.Module):
    """A layer of a user that moves a parameter by what it sees in training."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.lerp_(x.mean((0, 2, 3)), 0.1 * self.training)
        return x - self.mean[:, None, None]


def test_signal_report_puts_weights_back_that_follow_their_inputs() -> None:
    net = nn.Sequential(Centred(), small_net())
    signal_report(net, torch.randn(4, 3, 8, 8) + 1)
    assert not net[0].mean.any()


def test_every_lesion_begins_from_the_same_net_in_eval_mode() -> None:
    torch.manual_seed(0)
    net, x, modes = small_net(), torch.randn(8, 3, 8, 8), []

    def recalibrate(net: nn.Module) -> float:
        modes.append(net.training)
        out = float(net(x).sum())
        net.train()(x * 3)
        return out

    whole = lesion_study(net, recalibrate)
    assert modes == [False] * 3
    alone = lesion_study(net, recalibrate, where="1.1")
    assert alone.lesions[0] == whole.lesions[1]


def test_draws_of_a_count_do_not_depend_on_the_other_counts() -> None:
    net = nn.Sequential(*(Residual(nn.Linear(2, 2)) for _ in range(6)))
    drawn = [lesion_curve(net, lambda net: float(net(torch.ones(1, 2)).sum()), c, trials=3) for c in ([3], [2, 3])]
    assert drawn[0][3] == drawn[1][3]


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda out: out, r"loss must return a tensor with one value, got a tensor of shape \(4, 2\)"),
        (lambda out: 1.0, "loss must return a tensor with one value, got float"),
    ],
)
def test_loss_that_is_no_scalar_is_named(loss: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        signal_report(small_net(), torch.randn(4, 3, 8, 8), loss)


def test_signal_report_takes_nets_that_begin_in_place_and_inference_tensors() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.ReLU(inplace=True), Residual(nn.Linear(4, 4)))
    x = torch.randn(2, 4)
    before = x.clone()
    with torch.inference_mode():
        same = x.clone()
    reports = [signal_report(net, given, lambda y: y.sum()) for given in (x, same)]
    assert torch.equal(x, before)
    assert reports[0] == reports[1]
    assert reports[0][0].merged_grad_norm is not None


class Times(nn.Module):
    """A branch whose gradient is a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def test_path_gradients_are_those_of_each_path() -> None:
    factors = [2.0, -3.0, 5.0, 0.5]
    net = nn.Sequential(*(Residual(Times(factor)) for factor in factors))
    x = torch.ones(1, 4)  # one path's gradient is the product of its factors, in each of four entries
    found = path_gradients(net, x, torch.sum)
    for length, norms in found.items():
        expected = [2 * abs(math.prod(chosen)) for chosen in itertools.combinations(factors, length)]
        assert norms == pytest.approx(expected)
    assert list(found) == list(range(5))
    some = path_gradients(net, x, torch.sum, [2], trials=4)[2]
    assert len(some) == 4
    assert all(any(norm == pytest.approx(other) for other in found[2]) for norm in some)
    assert some == path_gradients(net, x, torch.sum, [1, 2], trials=4)[2]


def test_path_gradients_of_a_block_are_those_of_its_two_ways() -> None:
    block = BasicBlock(4, 8, 2).double().train()
    x = torch.randn(4, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    shortcut, branch = block.shortcut(x), block.branch(x)
    ways = (shortcut + branch.detach()).relu().pow(2).sum(), (shortcut.detach() + branch).relu().pow(2).sum()
    expected = [float(torch.autograd.grad(way, x, retain_graph=True)[0].norm()) for way in ways]
    assert path_gradients(block, x, lambda y: y.pow(2).sum()) == {
        length: [pytest.approx(norm, rel=1e-12)] for length, norm in enumerate(expected)
    }


@pytest.mark.parametrize(
    ("name", "options"), [("resnet20", {}), ("resnet20", {"block": PreActBasicBlock}), ("densenet_40_12", {})]
)
def test_path_gradients_leave_the_net_as_it_was(name: str, options: dict[str, Any]) -> None:
    net = create_model(name, dropout=0.1, **options).train()
    x = torch.randn(2, 3, 32, 32)
    before, random = state_of(net), torch.get_rng_state()
    paths = path_gradients(net, x, lambda y: y.logsumexp(1).sum(), [0, 2], trials=2)
    assert all(0 < norm < math.inf for norms in paths.values() for norm in norms)
    assert_same_state(net, before)
    assert torch.equal(torch.get_rng_state(), random)
    assert not x.requires_grad


def test_path_gradients_of_a_frozen_and_of_a_compiled_net_are_those_of_the_net() -> None:
    net = create_model("resnet20", block=PreActBasicBlock).eval()
    x, loss = torch.randn(2, 3, 32, 32), lambda y: y[:, 0].sum()
    frozen = copy.deepcopy(net).requires_grad_(False)
    assert path_gradients(net, x, loss, [0, 1]) == path_gradients(frozen, x, loss, [0, 1])
    compiled = torch.compile(net, backend="eager")
    assert path_gradients(compiled, x, loss, [0, 1], trials=2) == path_gradients(net, x, loss, [0, 1], trials=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": [10]}, "lengths must be integers from 0 to 9, the number of blocks, got"),
        ({"trials": 0}, "trials must be an integer of at least 1, got 0"),
        ({"seed": 1.5}, "seed must be an integer of at least 0, got 1.5"),
        ({"x": torch.ones(2, 3, 32, 32, dtype=torch.uint8)}, "x must be of floating point numbers, got torch.uint8"),
        ({"loss": lambda y: y}, r"loss must return a tensor with one value, got a tensor of shape \(2, 10\)"),
        ({"loss": lambda y: y.detach().sum()}, "loss must depend on the net's output by operations that autograd rec"),
        ({"where": "stem"}, "net must have at least one block whose skip is on, got none"),
    ],
)
def test_path_gradients_refuse_what_does_not_fit(arguments: dict[str, Any], message: str) -> None:
    usual = {"x": torch.ones(2, 3, 32, 32), "loss": torch.sum, "lengths": [1], "trials": 1}
    with pytest.raises(ValueError, match=message):
        path_gradients(create_model("resnet20"), **{**usual, **arguments})


class Alone(Residual):
    """Does without its merge."""

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.branch(x)


class OnlyFirst(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self[0](x)
        return y


@pytest.mark.parametrize("kind", ["never", "twice", "shared", "own forward"])
def test_path_gradients_refuse_blocks_that_do_not_run_once(kind: str) -> None:
    one, other = Residual(Times(2.0)), Residual(Times(3.0))
    net = nn.Sequential(one, other)
    if kind == "never":
        net = OnlyFirst(one, other)
    elif kind == "twice":
        net = nn.Sequential(one, other, one)
    elif kind == "shared":
        other.merge = one.merge
    else:
        net = nn.Sequential(one, Alone(Times(3.0)))
    with pytest.raises(ValueError, match=r"where must choose blocks that run once.* ran [02] times"):
        path_gradients(net, torch.ones(1, 4), torch.sum, [1])


@pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode])
def test_path_gradients_do_not_mind_who_calls_and_nets_that_begin_in_place(quiet: Any) -> None:
    net = nn.Sequential(nn.ReLU(inplace=True), Residual(Times(2.0)))
    x = torch.ones(1, 4)
    with quiet():
        assert path_gradients(net, x, torch.sum) == {0: [2.0], 1: [4.0]}


def test_path_gradients_of_complex_numbers() -> None:
    net = Residual(Times(2.0))
    x = torch.ones(1, 4, dtype=torch.complex64)
    assert path_gradients(net, x, lambda y: y.real.sum()) == {0: [2.0], 1: [4.0]}


def test_path_gradients_refuse_blocks_inside_blocks() -> None:
    net = nn.Sequential(Residual(Residual(Times(2.0))))
    with pytest.raises(ValueError, match=r"where must choose no block inside another, got '0.branch' inside '0'"):
        path_gradients(net, torch.ones(1, 4), torch.sum)
    assert path_gradients(net, torch.ones(1, 4), torch.sum, where="0.branch") == {0: [4.0], 1: [6.0]}
