"""PyTorch's own way of testing a module: `ModuleInfo` for every block, run by torch's `@modules`.

torch ships the machinery but not the bodies of its test/test_modules.py; ours have their names and follow their rules.
"""

import copy
import io
from functools import partial

import torch
from torch import nn
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_modules import (
    ErrorModuleInput,
    FunctionInput,
    ModuleErrorEnum,
    ModuleInfo,
    ModuleInput,
    modules,
)
from torch.testing._internal.common_utils import TestCase

import resblocks as rb

BLOCKS = {
    rb.BasicBlock: {},
    rb.Bottleneck: {},
    rb.ResNeXtBlock: {"cardinality": 2, "base_width": 32},
    rb.PreActBasicBlock: {},
    rb.PreActBottleneck: {},
    rb.WideBlock: {},
    rb.DenseLayer: {},
    rb.DenseBlock: {"growth_rate": 8},
    rb.Transition: {},
}
SUMS = {"projection": {}, "plain": {"skip": False}}


def inputs(block, module_info, device, dtype, requires_grad, training, **kwargs):
    """A constructor call and an input for each variant of a block."""
    make = partial(torch.randn, device=device, dtype=dtype, requires_grad=requires_grad)
    variants = SUMS if issubclass(block, rb.Residual) and block is not rb.DenseLayer else {"plain": {}}
    return [
        ModuleInput(FunctionInput(8, 16, **BLOCKS[block], **options), FunctionInput(make(3, 8, 5, 5)), desc=name)
        for name, options in variants.items()
    ]


def error_inputs(block, module_info, device, dtype, requires_grad, training, **kwargs):
    """A constructor call that must be refused."""
    bad = ModuleInput(FunctionInput(8, 0, **BLOCKS[block]))
    text = "out_channels must be an integer of at least 1, got 0"
    return [ErrorModuleInput(bad, error_on=ModuleErrorEnum.CONSTRUCTION_ERROR, error_type=ValueError, error_regex=text)]


INFOS = [
    ModuleInfo(
        block,
        module_inputs_func=partial(inputs, block),
        module_error_inputs_func=partial(error_inputs, block),
        train_and_eval_differ=True,
        module_memformat_affects_out=True,
        gradcheck_fast_mode=True,
    )
    for block in BLOCKS
]


class TestBlocks(TestCase):
    """One test a rule; torch makes one of it for each block, dtype and mode."""

    def build(self, module_info, device, dtype, training, requires_grad=False):
        samples = module_info.module_inputs_func(module_info, device, dtype, requires_grad, training)
        for sample in samples:
            given = sample.constructor_input
            module = module_info.module_cls(*given.args, **given.kwargs, device=device, dtype=dtype).train(training)
            yield module, sample.forward_input.args[0], given

    @modules(INFOS)
    def test_factory_kwargs(self, device, dtype, module_info, training):
        for module, _, given in self.build(module_info, device, dtype, training):
            meta = module_info.module_cls(*given.args, **given.kwargs, device="meta", dtype=dtype)
            for made, place in ((module, device), (meta, "meta")):
                tensors = [*made.parameters(), *made.buffers()]
                self.assertTrue(all(str(tensor.device) == place for tensor in tensors))
                self.assertEqual({t.dtype for t in tensors if t.is_floating_point()}, {dtype})

    @modules(INFOS)
    def test_forward(self, device, dtype, module_info, training):
        for module, x, _ in self.build(module_info, device, dtype, training):
            before = x.clone()
            y = module(x)
            self.assertEqual(y.shape[1], module.out_channels)
            self.assertEqual(y.dtype, dtype)
            self.assertEqual(x, before)

    @modules(INFOS)
    def test_repr(self, device, dtype, module_info, training):
        for module, _, _ in self.build(module_info, device, dtype, training):
            self.assertIn(module_info.module_cls.__name__, repr(module))

    @modules(INFOS)
    def test_pickle(self, device, dtype, module_info, training):
        for module, x, _ in self.build(module_info, device, dtype, training):
            other = copy.deepcopy(module)
            with io.BytesIO() as file:
                torch.save(module, file)
                file.seek(0)
                loaded = torch.load(file, weights_only=False)
            expected = module(x)
            self.assertEqual(loaded(x), expected)
            self.assertEqual(other(x), expected)

    @modules(INFOS)
    def test_non_contiguous_tensors(self, device, dtype, module_info, training):
        for module, x, _ in self.build(module_info, device, dtype, training):
            spread = torch.empty(3, 8, 10, 5, device=device, dtype=dtype)[:, :, ::2].copy_(x)
            self.assertFalse(spread.is_contiguous())
            results = []
            for value in (x, spread):
                leaf = value.detach().requires_grad_()
                module.zero_grad()
                y = module(leaf)
                y.square().sum().backward()
                results.append([y.detach(), leaf.grad, *[parameter.grad.clone() for parameter in module.parameters()]])
            self.assertEqual(results[0], results[1], atol=1e-3, rtol=1e-3)

    @modules(INFOS)
    def test_memory_format(self, device, dtype, module_info, training):
        for module, x, _ in self.build(module_info, device, dtype, training):
            expected = copy.deepcopy(module)(x)
            y = module.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
            self.assertEqual(y, expected, atol=1e-4, rtol=1e-4)
            self.assertTrue(y.is_contiguous(memory_format=torch.channels_last))

    @modules(INFOS, allowed_dtypes=[torch.float64])
    def test_grad(self, device, dtype, module_info, training):
        for _, x, given in self.build(module_info, device, dtype, training, requires_grad=True):
            # smooth, since finite differences straddle the bends of a ReLU
            module = module_info.module_cls(*given.args, **given.kwargs, activation=nn.Tanh, dtype=dtype).train(
                training
            )
            names, values = zip(*module.named_parameters(), strict=True)

            def run(x, *values, module=module, names=names):
                return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

            self.assertTrue(torch.autograd.gradcheck(run, (x, *values), fast_mode=module_info.gradcheck_fast_mode))

    @modules(INFOS)
    def test_check_train_and_eval(self, device, dtype, module_info, training):
        for module, x, _ in self.build(module_info, device, dtype, training):
            self.assertTrue(all(child.training is training for child in module.modules()))
            this = module(x)
            self.assertNotEqual(this, module.train(not training)(x))

    @modules(INFOS)
    def test_to(self, device, dtype, module_info, training):
        for module, x, _ in self.build(module_info, device, dtype, training):
            expected = copy.deepcopy(module)(x).to(torch.float64)
            self.assertEqual(module.double()(x.double()), expected, atol=1e-4, rtol=1e-4)

    @modules(INFOS)
    def test_save_load(self, device, dtype, module_info, training):
        pairs = zip(
            self.build(module_info, device, dtype, False), self.build(module_info, device, dtype, False), strict=True
        )
        for (module, x, _), (other, _, _) in pairs:
            other.load_state_dict(module.state_dict(), strict=True)
            self.assertEqual(other(x), module(x))

    @modules(INFOS)
    def test_errors(self, device, dtype, module_info, training):
        for bad in module_info.module_error_inputs_func(module_info, device, dtype, False, training):
            given = bad.module_error_input.constructor_input
            with self.assertRaisesRegex(bad.error_type, bad.error_regex):
                module_info.module_cls(*given.args, **given.kwargs, device=device, dtype=dtype)


instantiate_device_type_tests(TestBlocks, globals(), only_for="cpu")
