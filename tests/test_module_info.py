"""The checks that PyTorch runs on its own modules (test/test_modules.py), on every block.

The bodies are ours; they follow the names and the rules of torch's.
"""

import copy
import io

import pytest
import torch
from torch import nn

from tests.blocks import BLOCKS, image

pytestmark = pytest.mark.parametrize("name", BLOCKS)


def built(name, **options):
    return BLOCKS[name](16, 32, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_factory_kwargs(name, dtype):
    block = built(name, device="meta", dtype=dtype)
    tensors = [*block.parameters(), *block.buffers()]
    assert all(tensor.is_meta for tensor in tensors)
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {dtype}


def test_repr_names_every_child(name):
    block = built(name)
    assert all(f"({child})" in repr(block) for child, _ in block.named_children())


def test_non_contiguous_tensors(name):
    block = built(name, dtype=torch.float64)
    x = image(dtype=torch.float64)
    spread = torch.randn(3, 16, 10, 5, dtype=torch.float64)[:, :, ::2]
    spread.copy_(x)
    assert not spread.is_contiguous()
    grads = []
    for value in (x, spread):
        leaf = value.detach().requires_grad_()
        block.zero_grad()
        block(leaf).square().sum().backward()
        grads.append([leaf.grad, *[parameter.grad.clone() for parameter in block.parameters()]])
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last])
def test_memory_format(name, fmt):
    block = built(name).eval()
    x = image()
    expected = block(x)
    y = block.to(memory_format=fmt)(x.contiguous(memory_format=fmt))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert y.is_contiguous(memory_format=fmt)


def test_pickle_by_torch(name):
    block = built(name).eval()
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    x = image()
    torch.testing.assert_close(torch.load(file, weights_only=False)(x), block(x), rtol=0, atol=0)


def test_train_and_eval_modes_differ_and_reach_every_child(name):
    block, x = built(name), image()
    assert all(child.training for child in block.modules())
    trained = block(x)
    assert not any(child.training for child in block.eval().modules())
    assert not torch.allclose(trained, block(x))


def test_inputs_are_not_changed(name):
    x = image()
    before = x.clone()
    built(name)(x)
    assert torch.equal(x, before)


def test_moves_by_dtype_and_swaps(name):
    block = built(name).eval()
    x = image()
    expected = block(x)
    double = copy.deepcopy(block).double()
    torch.testing.assert_close(double(x.double()).float(), expected, rtol=1e-4, atol=1e-5)
    assert all(isinstance(parameter, nn.Parameter) for parameter in double.parameters())


def test_state_dict_is_strict_both_ways(name):
    block, other = built(name), built(name)
    other.load_state_dict(block.state_dict(), strict=True)
    block.load_state_dict(other.state_dict(), strict=True)
    short = dict(block.state_dict())
    key = next(iter(short))
    del short[key]
    with pytest.raises(RuntimeError, match=key):
        other.load_state_dict(short)
