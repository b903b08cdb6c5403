"""The residual sentence, its merges and the skip switch."""

import random
import re

import pytest
import torch
from torch import nn

import resblocks as rb
from resblocks import (
    Add,
    BasicBlock,
    Concat,
    DenseNet,
    DropPath,
    Residual,
    ResNet,
    SkipInit,
    create_model,
    set_skip,
    skips_off,
)
from tests.blocks import image


def plain_net(**options):
    return ResNet(BasicBlock, (1, 2), (8, 16), stem="cifar", stem_width=8, num_classes=3, **options)


def test_residual_is_act_of_merge_of_shortcut_and_branch():
    preact, branch, shortcut, act = nn.Tanh(), nn.Linear(4, 6), nn.Linear(4, 6), nn.ReLU()
    block = Residual(branch, shortcut, preact=preact, act=act)
    x = torch.randn(3, 4)
    h = preact(x)
    torch.testing.assert_close(block(x), act(shortcut(h) + branch(h)), rtol=0, atol=0)
    block.skip = False
    torch.testing.assert_close(block(x), act(branch(h)), rtol=0, atol=0)


def test_residual_scales_and_drops_the_branch_before_the_merge():
    block = Residual(nn.Linear(4, 4), scale=SkipInit(4), drop_path=DropPath(0.5))
    x = torch.randn(64, 4)
    assert torch.equal(block(x), x)  # the scale starts at zero
    nn.init.constant_(block.scale.weight, 3.0)
    change = block(x) - x
    dropped = (change == 0).all(1)
    assert 0 < dropped.sum() < 64
    torch.testing.assert_close(change[~dropped], (2 * 3 * block.branch(x))[~dropped])


@pytest.mark.parametrize(
    ("branch", "x"),
    [
        (nn.Linear(8, 8), torch.randn(2, 8)),
        (nn.Conv1d(8, 8, 3, padding=1), torch.randn(2, 8, 7)),
        (nn.Conv3d(8, 8, 3, padding=1), torch.randn(2, 8, 3, 3, 3)),
        (Residual(Residual(nn.Linear(8, 8))), torch.randn(2, 8)),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(2, 5, 8)),
    ],
    ids=["linear", "conv1d", "conv3d", "nested", "attention"],
)
def test_residual_takes_any_branch(branch, x):
    block = Residual(branch)
    torch.manual_seed(0)
    y = block(x)
    torch.manual_seed(0)
    torch.testing.assert_close(y, x + branch(x))


def test_children_are_named_parts():
    block = BasicBlock(8, 16, 2)
    assert [name for name, _ in block.named_children()] == [
        "preact", "branch", "shortcut", "scale", "drop_path", "merge", "act",
    ]  # fmt: skip
    assert list(dict(block.branch.named_children())) == ["conv1", "norm1", "act1", "conv2", "norm2"]
    assert isinstance(block.merge, Add)


def test_add_refuses_shapes_that_would_broadcast():
    with pytest.raises(
        ValueError, match=r"same shape to be added, got shortcut \(2, 4, 8, 8\) and branch \(2, 4, 1, 1\)"
    ):
        Add()(torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 1, 1))


def test_concat_joins_channels():
    assert Concat()(torch.zeros(2, 3, 5), torch.zeros(2, 4, 5)).shape == (2, 7, 5)


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ({"shortcut": nn.Identity()}, "shortcut must be None with skip=False"),
        ({"scale": SkipInit(4)}, "scale must be None with skip=False"),
        ({"drop_path": DropPath(0.1)}, "drop_path must be None with skip=False"),
        ({"merge": rb.WeightedAdd(4)}, "merge must be None with skip=False, which leaves nothing to merge"),
    ],
)
def test_plain_block_refuses_the_parts_of_a_merge(part, text):
    with pytest.raises(ValueError, match=text):
        Residual(nn.Linear(4, 4), skip=False, **part)


@pytest.mark.parametrize("scale", [rb.ZeroInit, rb.SkipInit, rb.ReZero, rb.LayerScale, rb.Fixup])
def test_plain_block_is_never_started_at_zero(scale):
    with pytest.raises(ValueError, match="scale must be None with skip=False"):
        BasicBlock(8, 8, skip=False, scale=scale)


def test_empty_sequential_is_kept_as_a_part():
    empty = nn.Sequential()
    assert Residual(nn.Linear(4, 4), preact=empty).preact is empty


def test_set_skip_equals_the_net_built_plain():
    net, plain = plain_net(), plain_net(skip=False)
    plain.load_state_dict(net.state_dict(), strict=False)
    x = image(3)
    assert set_skip(net, False) == ["stages.0.0", "stages.1.0", "stages.1.1"]
    torch.testing.assert_close(net.eval()(x), plain.eval()(x), rtol=0, atol=0)


def test_set_skip_takes_a_predicate():
    net = plain_net()
    switched = set_skip(net, False, where=lambda name, block: name.startswith("stages.1"))
    assert switched == ["stages.1.0", "stages.1.1"]
    assert [block.skip for block in rb.residuals(net).values()] == [True, False, False]


@pytest.mark.parametrize(
    ("where", "chosen"),
    [("stages.1.*", ["stages.1.0", "stages.1.1"]), ("*.0", ["stages.0.0", "stages.1.0"]), ("*", None)],
)
def test_where_takes_a_shell_pattern_on_names(where, chosen):
    net = plain_net()
    chosen = list(rb.residuals(net)) if chosen is None else chosen
    assert list(rb.residuals(net, where)) == chosen
    with skips_off(net, where=where) as off:
        assert off == chosen
    assert set_skip(net, False, where=where) == chosen
    assert [name for name, block in rb.residuals(net).items() if not block.skip] == chosen


@pytest.mark.parametrize("where", [1, ["stages.0.0"], True])
def test_where_of_another_type_raises(where):
    with pytest.raises(ValueError, match="where must be a predicate of name and block, a shell pattern or None, got"):
        set_skip(plain_net(), False, where=where)


def test_compiling_changes_no_name():
    net = plain_net()
    names = list(rb.residuals(net))
    net.stages[0] = torch.compile(net.stages[0])
    assert list(rb.residuals(torch.compile(net))) == names


def test_skips_off_restores_blocks_that_are_drawn_by_lot():
    net, draw = ResNet(BasicBlock, (4, 4), (4, 8), num_classes=2), random.Random(0)
    with skips_off(net, where=lambda name, block: draw.random() < 0.5):
        assert not all(block.skip for block in rb.residuals(net).values())
    assert all(block.skip for block in rb.residuals(net).values())


def test_skips_off_restores_on_exit_and_on_error():
    net = plain_net()
    net.stages[1][0].skip = False
    before = [block.skip for block in rb.residuals(net).values()]
    with skips_off(net) as names:
        assert len(names) == 3
        assert not any(block.skip for block in rb.residuals(net).values())
    assert [block.skip for block in rb.residuals(net).values()] == before
    with pytest.raises(RuntimeError, match="boom"), skips_off(net):
        raise RuntimeError("boom")
    assert [block.skip for block in rb.residuals(net).values()] == before


def test_switching_on_what_was_built_off_raises():
    block = BasicBlock(8, 8, skip=False)
    with pytest.raises(ValueError, match=r"skip of BasicBlock cannot be switched on: it was built with skip=False"):
        block.skip = True


def test_switching_a_concatenation_raises():
    net = DenseNet(4, (2,), stem="cifar", num_classes=2)
    with pytest.raises(ValueError, match=r"skip of DenseLayer 'stages.0.block.layer1' cannot be switched at run time"):
        set_skip(net, False)


def test_set_skip_changes_nothing_if_one_block_cannot_be_switched():
    net = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8, skip=False), BasicBlock(8, 8))
    net[0].skip = False
    with pytest.raises(ValueError, match="'1' cannot be switched on"):
        set_skip(net, True)
    assert [block.skip for block in net] == [False, False, True]


def test_set_skip_with_a_predicate_that_matches_nothing_raises():
    net = plain_net()
    with pytest.raises(ValueError, match=r"where must choose at least one block .*stages.0.0.*, got none"):
        set_skip(net, False, where=lambda name, block: name == "stage.1")
    with pytest.raises(ValueError, match="got none"), skips_off(net, where=lambda name, block: False):
        pass


def test_set_skip_without_any_residual_raises():
    with pytest.raises(ValueError, match="net must hold a Residual, got Linear"):
        set_skip(nn.Linear(2, 2), False)


def test_compiled_net_follows_the_switch_without_graph_break():
    net = plain_net().eval()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    x = image(3)
    with torch.no_grad():
        on = compiled(x)
        torch.testing.assert_close(on, net(x))
        with skips_off(net):
            off = compiled(x)
            torch.testing.assert_close(off, net(x))
        assert not torch.allclose(on, off)
        torch.testing.assert_close(compiled(x), on)


def test_plain_net_trains_every_parameter():
    net = plain_net(skip=False)
    net(image(3)).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert not any("shortcut" in name for name in net.state_dict())


def test_block_prints_on_one_line():
    assert repr(BasicBlock(8, 16, 2)) == (
        "BasicBlock(branch: 3x3 8-16 / 2, BatchNorm2d, ReLU, 3x3 16-16, BatchNorm2d; "
        "shortcut: 1x1 8-16 / 2, BatchNorm2d; act: ReLU)"
    )
    assert repr(BasicBlock(8, 8, skip=False)).endswith("act: ReLU; skip=False)")
    assert len(repr(rb.create_model("resnet50", device="meta")).splitlines()) < 16 + 25


def test_recomputed_block_works_under_function_transforms() -> None:
    plain = BasicBlock(4, 4).eval()
    again = BasicBlock(4, 4, checkpoint=True).eval()
    again.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4, 5, 5)
    grads = [torch.func.grad(lambda x, block=block: block(x).square().sum())(x) for block in (plain, again)]
    torch.testing.assert_close(*grads)


def test_skip_is_true_or_false():
    block = BasicBlock(4, 4)
    with pytest.raises(ValueError, match="skip must be True or False, got 'off'"):
        block.skip = "off"
    assert block.skip is True


@pytest.mark.parametrize("skip", [[True, False], "False", "stages.2", None, 0, {}])
@pytest.mark.parametrize(
    "build",
    [
        lambda skip: Residual(nn.Linear(4, 4), skip=skip),
        lambda skip: BasicBlock(8, 16, 2, skip=skip),
        lambda skip: rb.Bottleneck(8, 16, 2, skip=skip),
        lambda skip: rb.ResNeXtBlock(8, 64, cardinality=2, skip=skip),
        lambda skip: rb.PreActBasicBlock(8, 16, 2, skip=skip),
        lambda skip: rb.PreActBottleneck(8, 16, 2, skip=skip),
        lambda skip: rb.WideBlock(8, 16, 2, skip=skip),
        lambda skip: rb.DenseLayer(8, 16, skip=skip),
        lambda skip: rb.DenseBlock(8, 16, growth_rate=8, skip=skip),
        lambda skip: plain_net(skip=skip),
        lambda skip: DenseNet(4, (2,), stem="cifar", num_classes=2, skip=skip),
    ],
)
def test_skip_of_a_constructor_is_true_or_false(build, skip):
    with pytest.raises(ValueError, match=f"^skip must be True or False, got {re.escape(repr(skip))}"):
        build(skip)


@pytest.mark.parametrize("before", [nn.Sequential, nn.Identity, nn.Dropout, nn.Flatten])
@pytest.mark.parametrize("name", ["preact", "branch", "shortcut", "scale", "act"])
def test_part_that_begins_in_place_raises(name, before):
    part = nn.Sequential(before(), nn.Sequential(nn.ReLU(inplace=True)), nn.Linear(4, 4))
    parts = {"branch": nn.Linear(4, 4)} | {name: part}
    with pytest.raises(ValueError, match=rf"{name} must not begin in place.*ReLU\(inplace=True\)"):
        Residual(**parts)


@pytest.mark.filterwarnings("ignore")  # torch's own
@pytest.mark.parametrize("part", ["stem", "stages.0.0.branch", "stages.0.0.act", "stages.0.0.branch.conv1"])
def test_part_that_is_compiled_runs_compiled(part):
    net, graphs = create_model("resnet20"), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    net.get_submodule(part).compile(backend=backend)
    net(image(3, 8, batch=2))
    assert graphs


def test_layout_of_the_sum_does_not_depend_on_who_looks_on():
    block = BasicBlock(4, 4, dims=3, dtype=torch.float64)
    x = image(4, 6, dims=3).double().contiguous(memory_format=torch.channels_last_3d)
    unseen = block(x)
    block.merge.register_forward_hook(lambda *_: None)
    assert block(x).stride() == unseen.stride()


def test_dtype_of_the_sum_does_not_depend_on_who_looks_on():
    block, x = BasicBlock(4, 4), image(4)
    with torch.autocast("cpu", torch.bfloat16):
        unseen = block(x)
        block.merge.register_forward_hook(lambda *_: None)
        assert block(x).dtype == unseen.dtype == torch.float32


class KeepShortcut(nn.Module):
    """A merge of a user that puts out what it was given."""

    def forward(self, shortcut, branch):
        return shortcut


def test_input_that_a_merge_puts_out_is_not_written_over():
    block, x = Residual(nn.Linear(4, 4), merge=KeepShortcut(), act=nn.ReLU()), torch.randn(3, 4)
    before = x.clone()
    block(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ({"branch": None}, "branch must be a torch.nn.Module, got None"),
        ({"branch": nn.ReLU}, "branch must be a torch.nn.Module, got <class"),
        ({"act": torch.relu}, "act must be a torch.nn.Module or None, got <built-in method relu"),
        ({"shortcut": "A"}, "shortcut must be a torch.nn.Module or None, got 'A'"),
        ({"drop_path": 0.1}, "drop_path must be a torch.nn.Module or None, got 0.1"),
    ],
)
def test_parts_that_are_no_modules_are_named(parts, text):
    with pytest.raises(ValueError, match=text):
        Residual(**{"branch": nn.Linear(2, 2), **parts})


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.optim.swa_utils.AveragedModel])
def test_names_of_blocks_are_those_inside_wrappers(wrap):
    net = wrap(nn.Sequential(Residual(nn.Linear(2, 2)), Residual(nn.Linear(2, 2))))
    assert set_skip(net, False, where="1*") == ["1"]


def test_names_of_blocks_are_those_inside_ddp(tmp_path):
    dist = pytest.importorskip("torch.distributed")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        net = nn.parallel.DistributedDataParallel(nn.Sequential(Residual(nn.Linear(2, 2)), Residual(nn.Linear(2, 2))))
        assert set_skip(net, False, where="1*") == ["1"]
    finally:
        dist.destroy_process_group()


def test_branch_that_puts_out_more_than_a_tensor_is_named():
    with pytest.raises(ValueError, match="branch must put out one tensor, got tuple from LSTM"):
        Residual(nn.LSTM(4, 4))(torch.randn(3, 2, 4))
