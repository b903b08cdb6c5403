"""Blocks that compute activations again in backward: that they do it as they did it in forward."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.parametrizations import spectral_norm

from resblocks import BasicBlock, PreActBasicBlock, Residual, create_model, skips_off
from resblocks.layers import group_norm, instance_norm
from resblocks.rebuild import Rebuild, start_rebuild
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


@both
def test_weights_of_a_functional_call_are_those_of_forward(checkpoint):
    blocks = twins(lambda **options: PreActBasicBlock(4, 4, **options), checkpoint)
    weights = {name: torch.randn_like(p).requires_grad_() for name, p in blocks[0].named_parameters()}
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    losses = [torch.func.functional_call(block, weights, (x,)).pow(2).sum() for block in blocks]
    plain, saving = (torch.autograd.grad(loss, list(weights.values())) for loss in losses)
    assert all(map(torch.equal, plain, saving))


@both
def test_backward_twice_counts_once(checkpoint):
    blocks = twins(lambda **options: BasicBlock(4, 4, **options), checkpoint)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    for block in blocks:
        loss = block(x).pow(2).sum()
        loss.backward(retain_graph=True)
        loss.backward()
    assert_same_step(*blocks)


def test_double_backward_through_a_recomputed_block_is_the_plain_one():
    found = []
    for block in twins(lambda **options: BasicBlock(4, 4, activation=nn.Softplus, **options), True):
        x = torch.linspace(-1, 1, 200, dtype=torch.float64).view(2, 4, 5, 5).requires_grad_()
        (first,) = torch.autograd.grad(block(x).pow(2).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.pow(2).sum(), x)[0])
    assert torch.equal(*found)


@both
def test_other_state_than_statistics_moves_once(checkpoint):
    layers = nn.Sequential(spectral_norm(nn.Conv2d(4, 4, 3, padding=1)), nn.BatchNorm2d(4), nn.ReLU())
    blocks = twins(lambda **options: Residual(copy.deepcopy(layers), **options), checkpoint)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    for block in blocks:
        loss = block(x).pow(2).sum()
        loss.backward(retain_graph=True)
        loss.backward()
    assert_same_step(*blocks)


@both
def test_instance_norm_of_one_map_without_batch_gives_the_same(checkpoint):
    blocks = twins(lambda **options: BasicBlock(4, 4, norm=instance_norm, **options), checkpoint)
    x = torch.randn(4, 6, 6, dtype=torch.float64)
    for block in blocks:
        block(x).pow(2).sum().backward()
    assert_same_step(*blocks)


def test_rrelu_gives_the_same():
    blocks = twins(lambda **options: BasicBlock(4, 4, activation=nn.RReLU, norm=group_norm, **options), True)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    for block in blocks:
        torch.manual_seed(0)
        block(x).pow(2).sum().backward()
    assert_same_step(*blocks)


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
    for block in blocks:
        block(x).pow(2).sum().backward()
    assert_same_step(*blocks)
