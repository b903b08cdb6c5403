"""`checkpoint="norms"` and shared buffers: same bits and statistics, less memory, and nothing where somebody looks."""

from __future__ import annotations

import copy
import gc
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import resblocks as rb
from resblocks.rebuild import _Pair
from tests.blocks import BLOCKS, SUM_BLOCKS, image

NORMS = {
    "batch": {},
    "group": {"norm": rb.group_norm},
    "layer": {"norm": rb.LayerNorm},
    "instance": {"norm": rb.instance_norm},
    "frozen": {"norm": rb.FrozenBatchNorm},
}
ACTS = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.PReLU, partial(nn.LeakyReLU, 0.1), nn.Softplus)


def twins(name, **options):
    """A block that keeps all, and its twin that rebuilds."""
    kept = BLOCKS[name](8, 16, **options)
    if name == "dense_block":
        kept.memory = "plain"  # the others differ by rounding
    rebuilt = BLOCKS[name](8, 16, checkpoint="norms", **options)
    rebuilt.load_state_dict(kept.state_dict())
    return kept, rebuilt


def step(block, x, amp=False):
    """Output, gradients and buffers of a step."""
    x = x.clone().requires_grad_()
    torch.manual_seed(5)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
        y = block(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in block.parameters()), *block.buffers()]


def assert_equal(ones, others):
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.fixture
def saved(monkeypatch):
    """Counts the bytes that the forward of a net keeps for backward."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    from live_bytes import LiveBytes

    def count(net, x):
        with LiveBytes() as live:
            y = net(x).sum()
            kept = live.now
        del y
        assert live.now == 0
        return kept

    return count


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_rebuilt_step_has_the_same_bits(name, dims):
    x = image(8, 4, dims)
    assert_equal(*(step(block, x) for block in twins(name, dims=dims, dropout=0.3)))


@pytest.mark.gpu
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("amp", [False, True])
def test_rebuilt_step_has_the_same_bits_on_a_gpu(name, amp, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    x = image(8, 4).cuda()
    assert_equal(*(step(block.cuda(), x, amp) for block in twins(name, dropout=0.3)))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ACTS)
@pytest.mark.parametrize("amp", [False, True])
def test_rebuilt_norm_and_activation_have_the_same_bits(norm, activation, amp):
    x = image(8, 4)
    for name in ("basic", "preact_basic"):
        assert_equal(*(step(block, x, amp) for block in twins(name, activation=activation, **NORMS[norm])))


@pytest.mark.parametrize("name", SUM_BLOCKS)
def test_channels_last_stays_and_has_the_same_bits(name):
    x = image(8, 6).contiguous(memory_format=torch.channels_last)
    kept, rebuilt = (step(block.to(memory_format=torch.channels_last), x) for block in twins(name))
    assert_equal(kept, rebuilt)
    assert kept[0].stride() == rebuilt[0].stride()


@pytest.mark.parametrize("training", [True, False])
def test_mode_of_the_norm_is_that_of_forward(training):
    kept, rebuilt = twins("basic")
    outs = []
    for block in (kept, rebuilt):
        block.train(training)
        y = block(image(8, 4, generator=torch.Generator().manual_seed(1)))
        block.train(not training)
        y.square().sum().backward()
        outs.append([p.grad for p in block.parameters()])
    assert_equal(*outs)


def test_statistics_are_counted_once():
    block = rb.WideBlock(8, 16, checkpoint="norms")
    step(block, image(8, 4))
    assert {int(m.num_batches_tracked) for m in block.modules() if isinstance(m, nn.BatchNorm2d)} == {1}


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.Tanh])
@pytest.mark.parametrize(("name", "pairs"), [("basic", 1), ("bottleneck", 2), ("preact_basic", 2), ("wide", 2)])
def test_every_pair_is_let_go(saved, name, pairs, activation):
    kept, rebuilt = (
        SUM_BLOCKS[name](16, 16, activation=activation, checkpoint=checkpoint) for checkpoint in (False, "norms")
    )
    width = 4 if name == "bottleneck" else 16
    maps = 2 if activation is nn.SiLU else 1  # it keeps what it reads, the convolution what it puts out
    x = image(16, 6)
    assert saved(kept, x) - saved(rebuilt, x) == pairs * maps * 3 * width * 36 * 4


@pytest.mark.parametrize("norm", [name for name in NORMS if name != "batch"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.Tanh])
def test_every_norm_lets_the_activation_go(saved, norm, activation):
    kept, rebuilt = (
        rb.BasicBlock(16, 16, activation=activation, checkpoint=checkpoint, **NORMS[norm])
        for checkpoint in (False, "norms")
    )
    x = image(16, 6)
    assert saved(kept, x) - saved(rebuilt, x) > 0.9 * 3 * 16 * 36 * 4


def test_layer_that_keeps_a_sparse_tensor_gives_the_same():
    class Graph(nn.Linear):
        def forward(self, x):
            return super().forward(torch.sparse.mm(torch.eye(4).to_sparse(), x))

    torch.manual_seed(0)
    block = rb.Residual(nn.Sequential(nn.LayerNorm(8), nn.ReLU(), Graph(8, 8)), checkpoint="norms")
    twin = rb.Residual(copy.deepcopy(block.branch))
    x = torch.randn(4, 8)
    assert_equal(step(block, x), step(twin, x))


def test_net_rebuilds_stem_and_final_too(saved):
    def kept(checkpoint):
        net = rb.ResNet(rb.WideBlock, [1], [16], stem="deep", stem_width=16, num_classes=3, checkpoint=checkpoint)
        return saved(net, image(3, 32, batch=2))

    stem, block, final = 2 * 8 * 16 * 16 * 2, 2 * 16 * 8 * 8 * 2, 2 * 16 * 8 * 8  # of each pair one map
    assert kept(False) - kept("norms") == 4 * (stem + block + final)


def test_densenet_rebuilds_stem_and_final_too(saved):
    net = rb.DenseNet(4, (1,), stem="deep", stem_width=16, memory="plain", checkpoint="norms")
    half, x = copy.deepcopy(net), image(3, 32, batch=2)
    half.checkpoint = False
    assert saved(half, x) - saved(net, x) >= 4 * 2 * 2 * 8 * 16 * 16  # of each pair in the stem one map


def test_backward_twice_and_second_order_work():
    x = image(8, 4, dtype=torch.float64)
    outs = []
    for block in twins("basic", activation=nn.SiLU):
        block.double()
        y, inputs = block(x).square().sum(), list(block.parameters())
        first = torch.autograd.grad(y, inputs, retain_graph=True)
        grads = torch.autograd.grad(y, inputs, create_graph=True)
        torch.testing.assert_close(first, grads)
        outs.append(torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs))
    for one, other in zip(*outs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("what", ["norm1.weight", "conv2.weight"])
def test_change_in_place_before_backward_raises(what):
    block = rb.BasicBlock(8, 8, checkpoint="norms")
    y = block(image(8, 4)).sum()
    with torch.no_grad():
        block.branch.get_parameter(what).mul_(2)
    with pytest.raises(RuntimeError, match="was changed in place after forward"):
        y.backward()


def test_statistics_changed_in_place_before_backward_raise():
    block = rb.PreActBasicBlock(8, 8, checkpoint="norms").eval()
    block.branch.norm1.requires_grad_(False)  # torch's own check is that of its backward
    y = block(image(8, 4)).sum()
    block.branch.norm1.running_mean.add_(1)
    with pytest.raises(RuntimeError, match="was changed in place after forward"):
        y.backward()


def test_rebuilt_values_are_let_go_when_all_have_asked():
    block = rb.BasicBlock(8, 8, checkpoint="norms")
    y = block(image(8, 4)).sum()
    y.backward(retain_graph=True)
    pairs = [found for found in gc.get_objects() if type(found) is _Pair and found.norm is block.branch.norm1]
    assert [pair.values for pair in pairs] == [{}]


class Doubled(nn.Module):
    """A layer of a user that works in place."""

    def forward(self, x):
        return x.mul_(2)


@pytest.mark.parametrize("layer", [Doubled, lambda: nn.Dropout(0.5, inplace=True)])
@pytest.mark.parametrize("activation", [nn.SiLU, nn.Mish])
def test_layers_that_work_in_place_behind_the_activation_give_the_same(activation, layer):
    grads = []
    for checkpoint in (False, "norms"):
        torch.manual_seed(0)
        conv = partial(nn.Conv2d, 8, 8, 1)
        block = rb.Residual(
            nn.Sequential(conv(), nn.BatchNorm2d(8), activation(), layer(), conv()), checkpoint=checkpoint
        )
        block(image(8, 4)).square().sum().backward()
        grads.append([weight.grad for weight in block.parameters()])
    torch.testing.assert_close(*grads)


def hooks(seen):
    yield "forward", lambda m: m.register_forward_hook(lambda *a: seen.append(a[-1].clone()))
    yield "backward", lambda m: m.register_full_backward_hook(lambda *a: seen.append(a[-1][0].clone()))


@pytest.mark.parametrize("checkpoint", [False, "norms"])
@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("name", ["basic", "bottleneck", "preact_bottleneck"])
def test_hooks_see_what_left_each_layer_once(name, kind, checkpoint):
    plain = SUM_BLOCKS[name](8, 8, checkpoint=checkpoint)
    x, values = image(8, 4), {}
    for path, _ in plain.named_modules():
        if path:
            block, seen = copy.deepcopy(plain), []
            dict(hooks(seen))[kind](block.get_submodule(path))
            step(block, x)
            values[path] = seen
    everywhere, seen = copy.deepcopy(plain), {path: [] for path in values}
    for path, module in everywhere.named_modules():
        if path:
            dict(hooks(seen[path]))[kind](module)
    step(everywhere, x)
    assert {len(found) for found in seen.values()} == {1}
    for path, found in seen.items():
        assert_equal(values[path], found)


def test_hooked_forward_values_stay_whole():
    block, seen = rb.BasicBlock(8, 8), {}
    for path, module in block.named_modules():
        module.register_forward_hook(lambda m, args, out, path=path: seen.update({path: (out, out.clone())}))
    block(image(8, 4)).sum().backward()
    assert "branch.norm1" in seen
    for value, copied in seen.values():
        torch.testing.assert_close(value, copied, rtol=0, atol=0)


def test_plain_block_takes_no_second_buffer():
    block = rb.BasicBlock(8, 8)
    pointers = []
    block.branch.act1.register_forward_hook(lambda m, args, out: pointers.append((args[0].data_ptr(), out.data_ptr())))
    block(image(8, 4))
    assert pointers[0][0] != pointers[0][1]  # looked at, it is out of place
    operators = [event.key for event in profiled(rb.BasicBlock(8, 8), image(8, 4))]
    assert "aten::relu" not in operators
    assert "aten::add" not in operators


def profiled(net, x):
    with torch.profiler.profile() as watched:
        net(x)
    return watched.key_averages()


@pytest.mark.parametrize(
    "options", [{"norm": None}, {"activation": nn.RReLU}, {"norm": lambda channels: nn.Identity()}]
)
def test_checkpoint_norms_without_a_pair_raises(options):
    with pytest.raises(ValueError, match="checkpoint='norms' needs a norm and an activation behind it"):
        rb.BasicBlock(8, 8, checkpoint="norms", **options)


@pytest.mark.parametrize("checkpoint", ["norm", 2, None])
def test_unknown_checkpoint_raises(checkpoint):
    with pytest.raises(ValueError, match=r"checkpoint must be False, True or 'norms', got "):
        rb.BasicBlock(8, 8, checkpoint=checkpoint)


def test_compiled_block_gives_the_same():
    kept, rebuilt = twins("basic")
    x = image(8, 4)
    compiled = torch.compile(rebuilt, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), kept(x))


def test_graph_is_freed_without_the_collector():
    import weakref

    gc.disable()
    try:
        block = rb.BasicBlock(8, 8, checkpoint="norms")
        alive = []
        block.branch.conv2.register_forward_hook(lambda m, args, out: alive.append(weakref.ref(out)))
        y = block(image(8, 4))
        del y
        assert alive[0]() is None
    finally:
        gc.enable()


def test_rebuilt_step_is_the_same_under_ddp(tmp_path):
    dist = pytest.importorskip("torch.distributed")
    kept, rebuilt = twins("preact_basic")
    x = image(8, 4)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(rebuilt)
        assert_equal(step(kept, x), step(parallel, x))
    finally:
        dist.destroy_process_group()


class TanhNorm(nn.Module):
    """A norm whose backward reads what it put out."""

    repeatable = True

    def __init__(self, channels):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x):
        return torch.tanh(x * self.scale)


class NoNorm(TanhNorm):
    """One that puts out its input."""

    def forward(self, x):
        return x


@pytest.mark.parametrize("norm", [TanhNorm, NoNorm])
@pytest.mark.parametrize("name", ["basic", "preact_basic"])
def test_repeatable_norms_that_keep_or_pass_on_what_they_put_out_give_the_same(name, norm):
    x = image(8)
    before = x.clone()
    assert_equal(*(step(block, x)[:2] for block in twins(name, norm=norm)))
    assert torch.equal(x, before)
