"""Blocks that compute activations again in backward: that they do it as they did it in forward."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import Thread

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from resblocks import BasicBlock, PreActBasicBlock, Residual, create_model, skips_off
from resblocks.layers import group_norm, instance_norm
from resblocks.rebuild import Rebuild, start_rebuild
from resblocks.recompute import AsThen
from resblocks.residual import Checkpoint

both = pytest.mark.parametrize("checkpoint", [True, "norms"])


def twins(make: Callable[..., nn.Module], checkpoint: Checkpoint) -> tuple[nn.Module, nn.Module]:
    """A plain module and one that recomputes, with the same weights, in float64."""
    plain, saving = make(checkpoint=False).double(), make(checkpoint=checkpoint).double()
    saving.load_state_dict(plain.state_dict())
    return plain, saving


def assert_same_step(one: nn.Module, other: nn.Module) -> None:
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    for ours, theirs in zip(one.buffers(), other.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def step_and_compare(one: nn.Module, other: nn.Module, x: Tensor) -> None:
    for module in (one, other):
        torch.manual_seed(0)
        module(x).pow(2).sum().backward()
    assert_same_step(one, other)


@contextmanager
def in_training_for_a_while(net: nn.Module) -> Iterator[None]:
    yield
    net.eval()


@both
@pytest.mark.parametrize("forward", [skips_off, in_training_for_a_while])
def test_switches_and_modes_are_those_of_forward(forward, checkpoint):
    nets = twins(lambda **options: create_model("resnet20", **options), checkpoint)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for net in nets:
        with forward(net):
            loss = net(x).pow(2).sum()
        loss.backward()
    assert_same_step(*nets)


@pytest.mark.parametrize("fault", [torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("calls", [0, 3])
def test_block_is_whole_after_an_error_on_the_way_into_a_second_pass(fault, calls, monkeypatch):
    net = create_model("resnet20", checkpoint=True)
    y, before = net(torch.randn(2, 3, 8, 8)).sum(), {key: value.clone() for key, value in net.state_dict().items()}
    scratch, left = AsThen.scratch, iter(range(calls))

    def failing(self: AsThen, statistic: Tensor | None) -> Tensor | None:
        if next(left, None) is None:
            raise fault
        return scratch(self, statistic)

    monkeypatch.setattr(AsThen, "scratch", failing)
    with pytest.raises(fault):
        y.backward()
    monkeypatch.undo()
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    net(torch.randn(2, 3, 8, 8)).sum().backward()  # no lock is held


@pytest.mark.filterwarnings("ignore")
def test_jit_traces_a_block_that_recomputes():
    block, x = BasicBlock(4, 4, checkpoint=True).eval(), torch.randn(1, 4, 4, 4)
    torch.testing.assert_close(torch.jit.trace(block, x)(x), block(x))


class Breaking(nn.Module):
    def forward(self, x):
        torch._dynamo.graph_break()
        return x


@pytest.mark.filterwarnings("ignore")  # torch's own
@pytest.mark.parametrize("layer", [nn.Identity, Breaking])
def test_compiled_block_counts_each_batch_once_also_with_a_graph_break(layer):
    block = Residual(nn.Sequential(nn.Conv2d(4, 4, 1), layer(), nn.BatchNorm2d(4)), checkpoint=True)
    torch.compile(block, backend="aot_eager")(torch.randn(2, 4, 4, 4)).sum().backward()
    assert block.branch[2].num_batches_tracked == 1


@pytest.mark.filterwarnings("ignore")  # torch's own
def test_block_with_a_compiled_part_recomputes_it():
    block = BasicBlock(4, 4, checkpoint=True)
    block.branch.norm2 = torch.compile(block.branch.norm2, backend="aot_eager")
    block(torch.randn(2, 4, 4, 4)).sum().backward()
    assert all(weight.grad is not None for weight in block.parameters())


def test_state_dict_taken_during_a_second_pass_is_the_true_one():
    block, seen = BasicBlock(4, 4, checkpoint=True), []
    block.branch.conv2.register_forward_hook(lambda *_: seen.append(copy.deepcopy(block.state_dict())))
    y = block(torch.randn(2, 4, 4, 4)).sum()
    true = copy.deepcopy(block.state_dict())
    y.backward()
    assert seen[1].keys() == true.keys()
    assert all(torch.equal(value, true[key]) for key, value in seen[1].items())


def test_threads_whose_blocks_share_a_norm_leave_it_whole():
    norm = nn.BatchNorm2d(4)
    blocks = [Residual(nn.Sequential(nn.Conv2d(4, 4, 1), norm), checkpoint=True) for _ in range(2)]
    for _ in range(20):
        losses = [block(torch.randn(2, 4, 4, 4)).sum() for block in blocks]
        before = {key: value.clone() for key, value in norm.state_dict().items()}
        threads = [Thread(target=loss.backward) for loss in losses]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())
        assert len(before) == len(norm.state_dict()) == 5


@pytest.mark.parametrize("kept", ["native_batch_norm", "relu", "add"])
def test_torchs_selective_checkpoint_gives_the_same(kept):
    policy = [getattr(torch.ops.aten, kept).default if kept != "add" else torch.ops.aten.add.Tensor]
    block = BasicBlock(4, 4)
    twin = copy.deepcopy(block)
    x = torch.randn(2, 4, 4, 4)
    contexts = partial(create_selective_checkpoint_contexts, policy)
    checkpoint(block, x, use_reentrant=False, context_fn=contexts).square().sum().backward()
    twin(x).square().sum().backward()
    for ours, theirs in zip(block.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@both
def test_weights_of_a_functional_call_are_those_of_forward(checkpoint):
    blocks = twins(lambda **options: PreActBasicBlock(4, 4, **options), checkpoint)
    weights = {name: torch.randn_like(p).requires_grad_() for name, p in blocks[0].named_parameters()}
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    losses = [torch.func.functional_call(block, weights, (x,)).pow(2).sum() for block in blocks]
    plain, saving = (torch.autograd.grad(loss, list(weights.values())) for loss in losses)
    assert all(map(torch.equal, plain, saving))


def conv_of_spectral_norm(checkpoint: Checkpoint) -> Residual:
    torch.manual_seed(0)
    layers = nn.Sequential(spectral_norm(nn.Conv2d(4, 4, 3, padding=1)), nn.BatchNorm2d(4), nn.ReLU())
    return Residual(layers, checkpoint=checkpoint)


@both
@pytest.mark.parametrize("make", [lambda **options: BasicBlock(4, 4, **options), conv_of_spectral_norm])
def test_backward_twice_moves_statistics_and_other_buffers_once(make, checkpoint):
    blocks = twins(make, checkpoint)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    for block in blocks:
        loss = block(x).pow(2).sum()
        loss.backward(retain_graph=True)
        loss.backward()
    assert_same_step(*blocks)


@both
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_are_those_of_forward(when, checkpoint):
    blocks = twins(lambda **options: BasicBlock(4, 4, **options), checkpoint)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    for block in blocks:
        if when == "before":
            hook = block.branch.norm1.register_forward_hook(lambda norm, args, y: 2 * y)
        loss = block(x).pow(2).sum()
        if when == "before":
            hook.remove()
        else:
            block.branch.norm1.register_forward_hook(lambda norm, args, y: 2 * y)
        loss.backward()
    assert_same_step(*blocks)


@both
def test_pruned_norm_gives_the_same(checkpoint):
    def make(checkpoint: Checkpoint) -> nn.Module:
        block = BasicBlock(4, 4, checkpoint=checkpoint)
        prune.l1_unstructured(block.branch.norm1, "weight", amount=0.5)
        return block

    blocks = twins(make, checkpoint)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    step_and_compare(*blocks, x)


def test_second_passes_of_threads_wait_for_each_other():
    norm = nn.BatchNorm2d(4)
    state, (first, second) = norm.__dict__, [AsThen([norm], recorded=True) for _ in range(2)]

    def recompute_too() -> None:
        with second:
            pass

    other = Thread(target=recompute_too)
    with first:
        other.start()
        other.join(0.2)
        assert other.is_alive()
    other.join()
    assert norm.__dict__ is state


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # from inside forward mode
@both
def test_forward_mode_gives_the_same(checkpoint):
    found = []
    for block in twins(lambda **options: BasicBlock(4, 4, **options), checkpoint):
        x, direction = torch.linspace(-1, 1, 400, dtype=torch.float64).view(2, 2, 4, 5, 5)
        with forward_ad.dual_level():
            y, tangent = forward_ad.unpack_dual(block(forward_ad.make_dual(x.requires_grad_(), direction)))
        found.append((tangent.detach(), torch.autograd.grad(y.pow(2).sum(), x)[0]))
    assert all(map(torch.equal, *found))


def test_double_backward_through_a_recomputed_block_is_the_plain_one():
    found = []
    for block in twins(lambda **options: BasicBlock(4, 4, activation=nn.Softplus, **options), True):
        x = torch.linspace(-1, 1, 200, dtype=torch.float64).view(2, 4, 5, 5).requires_grad_()
        (first,) = torch.autograd.grad(block(x).pow(2).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.pow(2).sum(), x)[0])
    assert torch.equal(*found)


@both
def test_instance_norm_of_one_map_without_batch_gives_the_same(checkpoint):
    blocks = twins(lambda **options: BasicBlock(4, 4, norm=instance_norm, **options), checkpoint)
    x = torch.randn(4, 6, 6, dtype=torch.float64)
    step_and_compare(*blocks, x)


def test_rrelu_gives_the_same():
    blocks = twins(lambda **options: BasicBlock(4, 4, activation=nn.RReLU, norm=group_norm, **options), True)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    step_and_compare(*blocks, x)


@both
def test_recorded_step_is_the_plain_one(checkpoint):
    blocks = twins(lambda **options: BasicBlock(4, 4, **options), checkpoint)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)

    def gradients(block: nn.Module) -> Callable[[Tensor], list[Tensor]]:
        return lambda x: list(torch.autograd.grad(block(x).pow(2).sum(), list(block.parameters())))

    plain, recorded = gradients(blocks[0])(x), make_fx(gradients(blocks[1]))(x)(x)
    assert all(map(torch.equal, plain, recorded))


def test_norms_are_rebuilt_only_where_nobody_else_takes_what_is_kept():
    with save_on_cpu():
        assert start_rebuild() is None
    with saved_tensors_hooks(Rebuild()._pack, lambda packed: packed[0]):
        assert start_rebuild() is not None
    assert start_rebuild() is not None


def test_norms_within_another_checkpoint_give_the_same():
    def make(checkpoint: Checkpoint) -> nn.Module:
        inner = BasicBlock(4, 4, checkpoint=checkpoint and "norms")
        return Residual(nn.Sequential(inner, nn.BatchNorm2d(4)), checkpoint=checkpoint)

    blocks = twins(make, True)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    step_and_compare(*blocks, x)
