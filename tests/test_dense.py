"""Dense blocks in one buffer: results, gradients and statistics of the plain path, and that path where it must be."""

from __future__ import annotations

import copy
import math
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import resblocks.dense
from resblocks import DenseBlock, DenseNet, Transition, _dense_maps, _products
from resblocks.diagnostics import count_macs
from resblocks.layers import group_norm
from resblocks.residual import Residual

DIMS = {1: (9,), 2: (6, 5), 3: (4, 3, 5)}
LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
LEANS = ["shared", "lean"]


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small enough that every layer of these tests goes through in several chunks, the last one shorter."""
    monkeypatch.setattr(_dense_maps, "CPU_CHUNK", 2800)


def make(kind: type[nn.Module] = DenseBlock, *args: int, seed: int = 0, **options: Any) -> nn.Module:
    """A block or net in float64 whose norms are no identities."""
    torch.manual_seed(seed)
    if kind is DenseBlock:
        options = {"growth_rate": 3, **options}
    net = kind(*(args or (5, 14)), **{"dtype": torch.float64, **options})
    for name, weight in net.named_parameters():
        if "norm" in name:
            nn.init.normal_(weight)
    return net


def images(channels: int = 5, dims: int = 2, batch: int = 5, **options: Any) -> Tensor:
    torch.manual_seed(7)
    return torch.randn(batch, channels, *DIMS[dims], **{"dtype": torch.float64, **options}) * 2 + 3


def step(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers after one forward and backward of a copy of the net."""
    net = copy.deepcopy(net)
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    y = net(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y))
    assert x.grad is not None
    grads = {f"grad {name}": weight.grad for name, weight in net.named_parameters() if weight.grad is not None}
    return {"y": y.detach(), "dx": x.grad, **grads, **dict(net.named_buffers())}


def twin(net: nn.Module, memory: str) -> nn.Module:
    """The same net in another mode."""
    other = copy.deepcopy(net)
    for module in other.modules():
        if isinstance(module, (DenseBlock, Transition)):
            module.memory = memory  # type: ignore[assignment]
    return other


def uses_buffer(net: nn.Module, x: Tensor) -> bool:
    """Whether the block or transition did not call its modules."""
    node = copy.deepcopy(net)(x.clone().requires_grad_()).grad_fn
    while node is not None:
        if type(node).__name__ in ("_BlockBackward", "_PoolBackward"):  # torch 2.11 does not look behind such a node
            return True
        node = next((parent for parent, _ in node.next_functions if parent is not None), None)
    return False


def assert_like_plain(net: nn.Module, x: Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(step(net, x), step(twin(net, "plain"), x), **(tolerance or {"rtol": 1e-9, "atol": 1e-9}))


@pytest.mark.parametrize("memory", LEANS)
@pytest.mark.parametrize("bn_size", [4, None])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dims", DIMS)
def test_block_is_the_plain_block(dims: int, dropout: float, bn_size: int | None, memory: str) -> None:
    block = make(dims=dims, dropout=dropout, bn_size=bn_size, memory=memory)
    x = images(dims=dims)
    assert uses_buffer(block, x)
    assert_like_plain(block, x)


@pytest.mark.parametrize("memory", LEANS)
@pytest.mark.parametrize("dims", LAST)
def test_channels_last_stays_and_changes_nothing(dims: int, memory: str) -> None:
    # In 3D the plain convolution leaves channels_last, and so the mask of a dropout would be drawn in another order.
    block = make(dims=dims, dropout=0.3 if dims == 2 else 0.0, memory=memory).to(memory_format=LAST[dims])  # type: ignore[call-overload]
    x = images(dims=dims).to(memory_format=LAST[dims])
    assert block(x).is_contiguous(memory_format=LAST[dims])
    assert_like_plain(block, x)


@pytest.mark.parametrize("memory", LEANS)
@pytest.mark.parametrize("dims", LAST)
def test_block_is_the_plain_block_where_convolutions_make_the_products(
    dims: int, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = []

    def line_width(rows: Tensor) -> int:
        lines.append(rows.shape)
        return 2 if rows.shape[1] % 2 == 0 else 1

    monkeypatch.setattr(_products, "line_width", line_width)
    block = make(dims=dims, memory=memory).to(memory_format=LAST[dims])  # type: ignore[call-overload]
    x = images(dims=dims).to(memory_format=LAST[dims])
    assert_like_plain(block, x)
    assert lines, "no layer asked"
    lines.clear()
    with torch.no_grad():
        torch.testing.assert_close(block.eval()(x), twin(block, "plain")(x))
    assert lines, "evaluation did not ask"


@pytest.mark.parametrize("memory", LEANS)
@pytest.mark.parametrize("size", [(6, 8), (7, 9)])
def test_net_is_the_plain_net_with_its_transitions(size: tuple[int, int], memory: str) -> None:
    net = make(DenseNet, 3, (2, 3), stem="cifar", num_classes=4, memory=memory)
    x = images(3)[..., :1, :1].expand(-1, -1, *size) + torch.randn(5, 3, *size, dtype=torch.float64)
    assert_like_plain(net, x)
    assert_like_plain(net.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last))


@pytest.mark.gpu
@pytest.mark.parametrize("memory", LEANS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_net_is_the_plain_net_on_a_gpu(dtype: torch.dtype, layout: torch.memory_format, memory: str) -> None:
    net = make(DenseNet, 4, (2, 3), stem="cifar", num_classes=4, memory=memory).cuda()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64, device="cuda").to(memory_format=layout)
    net = net.to(memory_format=layout)  # type: ignore[call-overload]
    if dtype == torch.float64:
        assert_like_plain(net, x)
        return
    truth, found = step(net, x), {}
    for mode in (memory, "plain"):
        with torch.autocast("cuda", dtype):
            found[mode] = step(twin(net, mode).float(), x.float())
    grads = [name for name in truth if name.startswith("grad")]
    worst = [max(float((rows[n] - truth[n]).norm() / truth[n].norm()) for n in grads) for rows in found.values()]
    assert worst[0] <= 1.5 * worst[1]


@pytest.mark.parametrize("memory", LEANS)
def test_nothing_is_read_before_it_is_written(memory: str) -> None:
    net = make(DenseNet, 3, (2, 3), stem="cifar", num_classes=4, dropout=0.2, memory=memory)
    torch.use_deterministic_algorithms(True)  # which fills new memory with NaN
    try:
        assert torch.empty(3).isnan().all()
        assert_like_plain(net, images(3))
        with torch.no_grad():
            assert not net.eval()(images(3)).isnan().any()
    finally:
        torch.use_deterministic_algorithms(False)


def test_one_chunk_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    several = step(make(), images())
    monkeypatch.setattr(_dense_maps, "CPU_CHUNK", 2**22)
    torch.testing.assert_close(step(make(), images()), several, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [{"bn_size": 1, "growth_rate": 1}, {"growth_rate": 9}], ids=str)
@pytest.mark.parametrize("shape", [(6, 1, 1, 1), (2, 1, 1, 4), (1, 1, 3, 1)], ids=str)
def test_maps_and_channels_of_one(shape: tuple[int, ...], options: dict[str, int]) -> None:
    torch.manual_seed(1)
    x = torch.randn(shape, dtype=torch.float64)
    for layout in (torch.contiguous_format, torch.channels_last):
        assert_like_plain(make(DenseBlock, 1, 10, **options), x.contiguous(memory_format=layout))


@pytest.mark.parametrize("kind", [DenseBlock, Transition])
def test_gradients_are_those_of_finite_differences(kind: type[nn.Module]) -> None:
    net = make(kind, 2, 4, growth_rate=1, bn_size=2) if kind is DenseBlock else make(kind, 4, 2)
    names, weights = zip(*net.named_parameters(), strict=True)
    x = images(2 if kind is DenseBlock else 4, batch=2)[..., :4, :3].clone().requires_grad_()

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(net, dict(zip(names, weights, strict=True)), x)
        return out

    assert uses_buffer(net, x.detach())
    assert torch.autograd.gradcheck(run, (x, *weights))


def test_gradients_of_views_and_repeated_readers_are_right() -> None:
    def loss(y: Tensor) -> Tensor:
        return y.sum() + (y[:, ::2] * y[:, 1::2]).sum() + y.expand(2, *y.shape).mean()

    grads = []
    for memory in ("shared", "plain"):
        block, x = make(memory=memory), images().requires_grad_()
        y = block(x)
        loss(y).backward(retain_graph=True)
        loss(y).backward()
        grads.append([x.grad, *(weight.grad for weight in block.parameters())])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-9)


def test_incoming_gradient_is_not_written_to() -> None:
    for net in (make(), make(Transition, 5, 2)):
        y = net(images().requires_grad_())
        grad = torch.randn_like(y)
        before = grad.clone()
        y.backward(grad)
        assert torch.equal(grad, before)


@pytest.mark.parametrize("memory", ["shared", "lean", "plain"])
def test_state_dict_is_the_same_in_every_mode(memory: str) -> None:
    options: dict[str, Any] = {"stem": "cifar", "dropout": 0.1}
    net, plain = (
        make(DenseNet, 3, (2, 2), memory=memory, **options),
        make(DenseNet, 3, (2, 2), memory="plain", **options),
    )
    assert list(net.state_dict()) == list(plain.state_dict())
    net.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(net.state_dict(), strict=True)


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("tracked", [True, False])
def test_statistics_are_counted_once(tracked: bool, momentum: float | None) -> None:
    norm = (None, lambda c: nn.BatchNorm2d(c, momentum=momentum, track_running_stats=tracked), None)
    nets = [make(norm=norm, memory=memory) for memory in ("shared", "plain")]  # type: ignore[arg-type]
    assert uses_buffer(nets[0], images())
    for batch in (3, 4):
        for net in nets:
            net(images(batch=batch)).sum().backward()
    torch.testing.assert_close(nets[0].state_dict(), nets[1].state_dict(), rtol=1e-9, atol=1e-9)
    counts = [int(count) for name, count in nets[0].named_buffers() if name.endswith("num_batches_tracked")]
    assert counts == ([2] * 6 if tracked else [])


def test_recomputing_around_a_block_counts_once() -> None:
    nets = []
    for memory in ("shared", "plain"):
        branch = nn.Sequential(make(memory=memory), nn.Conv2d(14, 5, 1).double())
        torch.manual_seed(2)
        nn.init.normal_(branch[1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(branch[1].bias)  # type: ignore[arg-type]
        nets.append(Residual(branch, checkpoint=True))
    found = [step(net, images()) for net in nets]
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)
    assert found[0]["branch.0.layer1.branch.norm1.num_batches_tracked"] == 1


def test_without_gradients_training_still_counts_and_keeps_nothing() -> None:
    nets = [make(memory=memory) for memory in ("shared", "plain")]
    with torch.no_grad():
        ys = [net(images()) for net in nets]
    torch.testing.assert_close(ys[0], ys[1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(nets[0].state_dict(), nets[1].state_dict(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("frozen", ["conv1", "conv2", "norm1", "norm2", "layer1", "layer3", "bias", ""])
@pytest.mark.parametrize("wants_x", [True, False])
def test_frozen_parameters_get_no_gradient_and_change_no_other(frozen: str, wants_x: bool) -> None:
    found = []
    for memory in ("shared", "plain"):
        block = make(memory=memory)
        for name, weight in block.named_parameters():
            weight.requires_grad_(frozen not in name or not frozen)
        y = block(images().requires_grad_(wants_x))
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
        found.append({name: weight.grad for name, weight in block.named_parameters()})
    assert [name for name, grad in found[0].items() if grad is None] == [n for n, g in found[1].items() if g is None]
    kept = [{name: grad for name, grad in grads.items() if grad is not None} for grads in found]
    torch.testing.assert_close(kept[0], kept[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("memory", LEANS)
@pytest.mark.parametrize("size", [(6, 5), (7, 4)])
def test_evaluation_is_the_plain_one_whether_gradients_are_recorded_or_not(size: tuple[int, int], memory: str) -> None:
    net = make(DenseNet, 3, (2, 3), stem="cifar", num_classes=4, dropout=0.5, memory=memory)
    x = torch.randn(3, 3, *size, dtype=torch.float64)
    net(x)  # so that the running statistics say something
    net.eval()
    plain = twin(net, "plain")
    assert_like_plain(net, x)
    with torch.no_grad():
        for layout in (torch.contiguous_format, torch.channels_last):
            torch.testing.assert_close(net(x.to(memory_format=layout)), plain(x), rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(
                net.stages[0](net.stem(x)),
                plain.stages[0](plain.stem(x)),
                rtol=1e-9,
                atol=1e-9,  # type: ignore
            )


@pytest.mark.parametrize("wants", [False, True])
def test_evaluation_without_gradients_writes_into_the_buffer(wants: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate, used = resblocks.dense._evaluate, []
    monkeypatch.setattr(resblocks.dense, "_evaluate", lambda x, plan: used.append(plan) or evaluate(x, plan))
    with torch.set_grad_enabled(wants):
        make(DenseNet, 3, (2, 3), stem="cifar", num_classes=4).eval()(images(3))
    assert len(used) == (0 if wants else 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_and_large_means_are_no_worse_than_plain(dtype: torch.dtype) -> None:
    exact, x = make(memory="plain"), images() + 50
    truth = step(exact, x)
    worst = {}
    for memory in ("shared", "lean", "plain"):
        found = step(make(memory=memory).to(dtype), x.to(dtype))
        apart = [
            float((found[k].double() - truth[k]).norm() / truth[k].norm()) for k in truth if k[:4] in ("grad", "y")
        ]
        worst[memory] = max(apart)
    assert worst["shared"] <= 2 * worst["plain"]
    assert worst["lean"] <= 2 * worst["plain"]


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("memory", LEANS)
@pytest.mark.parametrize("start", [torch.float32, torch.bfloat16])
def test_autocast_has_the_dtypes_of_plain_whether_backward_is_inside_or_not(
    start: torch.dtype, memory: str, inside: bool
) -> None:
    truth = step(make(memory="plain"), images())
    found = {}
    for mode in (memory, "plain"):
        net = make(memory=mode).float()
        x = images(dtype=torch.float32).to(start).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = net(x)
            grad = torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype)
            if inside:
                y.backward(grad)
        if not inside:
            y.backward(grad)
        grads = {f"grad {name}": weight.grad for name, weight in net.named_parameters()}
        found[mode] = {"y": y.detach(), "dx": x.grad, **grads, **dict(net.named_buffers())}
    for name, plain in found["plain"].items():
        ours = found[memory][name]
        assert ours is not None
        assert plain is not None
        assert ours.dtype == plain.dtype, name
        true = truth[name].double()
        apart = [float((value.double() - true).norm() / true.norm()) for value in (ours, plain)]
        assert apart[0] <= 1.5 * apart[1] + 0.01, name


@pytest.mark.parametrize("memory", LEANS)
def test_dropout_that_is_on_in_evaluation_drops(memory: str) -> None:
    block, x = make(dropout=0.5, memory=memory).eval(), images()
    for layer in block.modules():
        layer.train(isinstance(layer, nn.Dropout))
    with torch.no_grad():
        assert not torch.equal(block(x), block(x))


@pytest.mark.parametrize("memory", LEANS)
@pytest.mark.parametrize("kind", [DenseBlock, Transition])
def test_statistics_that_are_no_longer_tracked_stay(kind: type[nn.Module], memory: str) -> None:
    net, x = make(kind, memory=memory), images()
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.track_running_stats = False
    before = {name: value.clone() for name, value in net.named_buffers()}
    net(x)
    assert all(torch.equal(value, before[name]) for name, value in net.named_buffers())


@pytest.mark.parametrize("memory", LEANS)
@pytest.mark.parametrize("kind", [DenseBlock, Transition])
def test_norm_without_bias_is_the_plain_one(kind: type[nn.Module], memory: str) -> None:
    nets = [make(kind, memory=mode) for mode in (memory, "plain")]
    for net in nets:
        for norm in net.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.register_parameter("bias", None)
    torch.testing.assert_close(*[step(net, images()) for net in nets])


def test_block_without_samples_in_evaluation_is_the_plain_one() -> None:
    with torch.no_grad():
        assert make().eval()(images(batch=0)).shape == (0, 14, *DIMS[2])


def test_dropout_of_everything_has_the_gradients_of_plain() -> None:
    nets = [make(dropout=0.5, memory=memory) for memory in ("shared", "plain")]
    for net in nets:
        for dropout in net.modules():
            if isinstance(dropout, nn.Dropout):
                dropout.p = 1.0
    torch.testing.assert_close(*[step(net, images()) for net in nets])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("kind", [DenseBlock, Transition])
def test_nan_is_not_lost_in_bfloat16(kind: type[nn.Module], sign: float, training: bool) -> None:
    for name in [*dict(make(kind).named_parameters()), "x"]:
        net, x = make(kind).bfloat16().train(training), images(dtype=torch.bfloat16)
        with torch.no_grad():
            broken = x if name == "x" else net.get_parameter(name)
            broken.flatten()[0] = math.copysign(math.nan, sign)
            assert net(x).isnan().any(), name


# --- the plain path where the buffer does not apply


def hooked(add: Callable[[nn.Module], object]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        block = make()
        add(block.get_submodule("layer2.branch.conv1"))
        return block

    return build


def nothing(*args: Any) -> None:
    return None


def eps_of_one() -> nn.Module:
    block = make()
    block.get_submodule("layer2.branch.norm1").eps = 1e-3  # type: ignore[assignment]
    return block


def one_in_eval() -> nn.Module:
    block = make()
    block.get_submodule("layer2.branch.norm2").eval()
    return block


def replaced(name: str, layer: nn.Module) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        block = make()
        block.set_submodule(name, layer.double())
        return block

    return build


def patched() -> nn.Module:
    block = make()
    act = block.get_submodule("layer1.branch.act1")
    act.forward = torch.sigmoid  # type: ignore[method-assign, assignment]
    return block


class OtherConv(nn.Conv2d):
    """A subclass may do anything."""


PLAIN: dict[str, Callable[[], nn.Module]] = {
    "memory": lambda: make(memory="plain"),
    "eval": lambda: make().eval(),
    "one norm in eval": one_in_eval,
    "group norm": lambda: make(norm=group_norm),
    "no norm": lambda: make(norm=None),
    "affine": lambda: make(norm=(None, lambda c: nn.BatchNorm2d(c, affine=False), None)),
    "sync": lambda: nn.SyncBatchNorm.convert_sync_batchnorm(make()),
    "eps": eps_of_one,
    "activation": lambda: make(activation=nn.SiLU),
    "activation of one": replaced("layer2.branch.act2", nn.GELU()),
    "conv class": lambda: make(conv=(None, OtherConv, None)),
    "bias": replaced("layer2.branch.conv1", nn.Conv2d(8, 12, 1)),
    "reflected border": replaced("layer1.branch.conv2", nn.Conv2d(12, 3, 3, padding=1, padding_mode="reflect")),
    "padding by name": replaced("layer1.branch.conv2", nn.Conv2d(12, 3, 3, padding="same", bias=False)),
    "longer branch": lambda: append(make()),
    "skip": lambda: make(skip=False),
    "checkpoint": lambda: make(checkpoint=True),
    "forward hook": hooked(lambda layer: layer.register_forward_hook(nothing)),
    "forward pre-hook": hooked(lambda layer: layer.register_forward_pre_hook(nothing)),
    "backward hook": hooked(lambda layer: layer.register_full_backward_hook(nothing)),
    "backward pre-hook": hooked(lambda layer: layer.register_full_backward_pre_hook(nothing)),
    "parametrization": hooked(lambda layer: parametrizations.weight_norm(layer)),
    "own forward": patched,
}


def append(block: nn.Module) -> nn.Module:
    branch = block.get_submodule("layer2.branch")
    branch.add_module("last", nn.Sigmoid())
    return block


@pytest.mark.parametrize("build", PLAIN.values(), ids=PLAIN)
def test_falls_back_to_calling_the_layers(build: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    block = build()
    if any(isinstance(module, nn.SyncBatchNorm) for module in block.modules()):
        assert resblocks.dense.run_block(block.children(), images(), "shared") is None  # it runs on GPUs only
        return
    assert not uses_buffer(block, images())
    assert_like_plain(block, images())


def test_inner_hooks_see_every_layer_and_gone_hooks_do_not_count() -> None:
    block, seen = make(), []
    branches = [layer.branch for layer in block]  # type: ignore[attr-defined]
    handles = [branch.register_forward_hook(lambda module, args, y: seen.append(y.shape[1])) for branch in branches]
    block(images())
    assert seen == [3, 3, 3]
    for handle in handles:
        handle.remove()
    assert uses_buffer(block, images())


def test_global_hooks_fall_back() -> None:
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(type(module)))
    try:
        make()(images())
    finally:
        handle.remove()
    assert nn.BatchNorm2d in seen


def test_hooks_of_the_block_itself_see_input_and_output() -> None:
    block, seen = make(), {}
    block.register_forward_hook(lambda module, args, y: seen.update(x=args[0], y=y))
    block.register_full_backward_hook(lambda module, dx, dy: seen.update(dx=dx[0], dy=dy[0]))
    x = images().requires_grad_()
    y = block(x)
    y.sum().backward()
    assert torch.equal(seen["y"], y)
    assert torch.equal(seen["y"][:, :5], seen["x"])
    assert torch.equal(seen["dx"], x.grad)
    assert torch.equal(seen["dy"], torch.ones_like(y))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # from inside torch.func.jvp
def test_function_transforms_take_the_plain_path() -> None:
    block = make().eval()
    x = images(batch=4)
    weights = dict(block.named_parameters())

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(block, weights, x[None])
        return out.square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    assert grads["layer1.branch.conv1.weight"].shape == (4, 12, 5, 1, 1)
    training = make(norm=(None, lambda c: nn.BatchNorm2d(c, track_running_stats=False), None))
    torch.func.jvp(training, (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level():
        y = training(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        assert torch.autograd.forward_ad.unpack_dual(y).tangent is not None


def test_tracing_and_export_see_the_layers() -> None:
    net = make(DenseNet, 3, (2, 2), stem="cifar", num_classes=3)
    x = images(3)
    graph = torch.fx.symbolic_trace(net)
    assert any(node.target == "stages.0.block.layer2.branch.conv2" for node in graph.graph.nodes)
    torch.testing.assert_close(step(graph, x)["y"], step(net, x)["y"])
    exported = torch.export.export(net.eval(), (x,))
    torch.testing.assert_close(exported.module()(x), net(x))


def test_compile_without_graph_break_is_the_same() -> None:
    net = make(DenseNet, 3, (2, 2), stem="cifar", num_classes=3)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    ours, theirs = step(net, images(3)), step(compiled, images(3))
    assert [name.replace("_orig_mod.", "") for name in theirs] == [*ours]
    for mine, other in zip(ours.values(), theirs.values(), strict=True):  # gradients and running statistics, too
        torch.testing.assert_close(other, mine)


BOTH = [(DenseBlock, (5, 14)), (Transition, (5, 2))]


@pytest.mark.parametrize("memory", ["shared", "lean"])
@pytest.mark.parametrize(("kind", "args"), BOTH)
def test_gradient_of_the_gradient_is_that_of_plain(kind: type[nn.Module], args: tuple[int, ...], memory: str) -> None:
    found = []
    for mode in ("plain", memory):
        net, x = make(kind, *args, memory=mode), images().requires_grad_()
        wanted = [x, *net.parameters()]
        first = torch.autograd.grad(net(x).sin().sum(), wanted, create_graph=True)
        second = torch.autograd.grad(sum(grad.pow(2).sum() for grad in first), wanted)
        counts = [norm.num_batches_tracked for norm in net.modules() if isinstance(norm, nn.BatchNorm2d)]
        found.append([*first, *second, *counts])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("kind", "args"), BOTH)
def test_second_derivative_is_that_of_finite_differences(kind: type[nn.Module], args: tuple[int, ...]) -> None:
    net, x = make(kind, *args, dims=1), images(dims=1, batch=2).requires_grad_()
    assert torch.autograd.gradgradcheck(net, x, atol=1e-4)


def test_gradient_of_the_gradient_has_the_dropout_of_forward() -> None:
    found = []
    for memory in ("plain", "shared"):
        net, x = make(DenseBlock, 5, 14, memory=memory, dropout=0.5), images().requires_grad_()
        torch.manual_seed(0)
        (dx,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        found.append([dx, *torch.autograd.grad(dx.square().sum(), x)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("kind", "args"), BOTH)
def test_several_gradients_at_once_are_those_of_plain(kind: type[nn.Module], args: tuple[int, ...]) -> None:
    found = []
    for memory in ("plain", "shared"):
        x = images().requires_grad_()
        y = make(kind, *args, memory=memory)(x)
        grads = torch.stack([torch.ones_like(y), y.detach()])
        found += torch.autograd.grad(y, x, grads, is_grads_batched=True)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("frozen", ["x", "parameters"])
def test_gradient_of_the_gradient_of_what_is_not_frozen(frozen: str) -> None:
    found = []
    for memory in ("plain", "shared"):
        net, x = make(DenseBlock, 5, 14, memory=memory), images().requires_grad_(frozen != "x")
        net.requires_grad_(frozen != "parameters")
        wanted = [tensor for tensor in (x, *net.parameters()) if tensor.requires_grad]
        first = torch.autograd.grad(net(x).pow(3).sum(), wanted, create_graph=True)
        found.append(torch.autograd.grad(sum(grad.pow(2).sum() for grad in first), wanted))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_memory_that_does_not_exist_raises() -> None:
    for build in (lambda: make(memory="keep"), lambda: make(Transition, 4, 2, memory="keep")):
        with pytest.raises(ValueError, match="memory must be one of shared, lean, plain, got 'keep'"):
            build()


def test_net_hands_its_memory_to_blocks_and_transitions() -> None:
    net = make(DenseNet, 3, (1, 1), stem="cifar", memory="lean")
    modes = [module.memory for module in net.modules() if isinstance(module, (DenseBlock, Transition))]
    assert modes == ["lean"] * 3


def test_wrong_input_raises_as_the_layers_do() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        make()(images(batch=1)[..., :1, :1])
    for x in (images(4), images().float()):
        with pytest.raises(RuntimeError):
            make()(x)


# --- transitions


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("norm", ["batch", None, "group"])
@pytest.mark.parametrize("training", [True, False])
def test_transition_pools_first_and_is_the_papers(training: bool, norm: str | None, dims: int) -> None:
    options = {} if norm == "batch" else {"norm": group_norm if norm else None}
    net = make(Transition, 5, 3, dims=dims, **options).train(training)
    if net.conv.bias is not None:  # type: ignore[union-attr]
        nn.init.normal_(net.conv.bias)  # type: ignore[arg-type, union-attr]
    paper = nn.Sequential(*copy.deepcopy(net))  # type: ignore[misc]
    x = images(dims=dims)
    ours, theirs = step(net, x), step(paper, x)
    torch.testing.assert_close(list(ours.values()), list(theirs.values()), rtol=1e-9, atol=1e-9)
    assert_like_plain(net, x)


def test_transition_hooks_see_the_order_that_runs() -> None:
    net, shapes = make(Transition, 5, 3), {}
    for name, layer in net.named_children():
        layer.register_forward_hook(lambda module, args, y, name=name: shapes.update({name: tuple(y.shape[1:])}))
    assert not uses_buffer(net, images())
    assert shapes == {"norm": (5, 6, 5), "act": (5, 6, 5), "pool": (5, 3, 2), "conv": (3, 3, 2)}


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("pool", nn.MaxPool2d(2)),
        ("pool", nn.AvgPool2d(3, 1, padding=1)),
        ("pool", nn.AvgPool2d(2, ceil_mode=True)),
        ("pool", nn.AvgPool2d(2, divisor_override=3)),
        ("conv", nn.Conv2d(5, 3, 3, padding=1)),
        ("conv", nn.Conv2d(5, 3, 1, stride=2)),
        ("conv", nn.Conv2d(5, 3, 1, padding=1)),
        ("conv", nn.Sequential(nn.Conv2d(5, 3, 1), nn.ReLU())),
    ],
    ids=str,
)
def test_transition_keeps_the_order_where_the_two_do_not_commute(name: str, layer: nn.Module) -> None:
    net = make(Transition, 5, 3)
    net.set_submodule(name, layer.double())
    paper = nn.Sequential(*copy.deepcopy(net))  # type: ignore[misc]
    assert torch.equal(step(net, images())["y"], step(paper, images())["y"])


def test_transition_costs_the_convolution_of_the_pooled_map() -> None:
    assert count_macs(Transition(8, 4), (8, 6, 6)) == 8 * 4 * 3 * 3


# --- two processes


def test_norm_that_serves_twice_counts_as_plain() -> None:
    def statistics(memory: str) -> Tensor:
        torch.manual_seed(0)
        block = DenseBlock(4, 8, growth_rate=2, memory=memory, norm=lambda c: nn.BatchNorm2d(c, momentum=None))
        block[1].branch.norm2 = block[0].branch.norm2
        block(torch.randn(2, 4, 4, 4))
        return block[0].branch.norm2.running_mean

    torch.testing.assert_close(statistics("shared"), statistics("plain"))


@pytest.mark.parametrize("stride", [2, 41, 61])  # whose inverse in float32, times a multiple, is below the integer
def test_transition_of_any_stride_equals_plain(stride: int) -> None:
    grads = []
    for memory in ("shared", "plain"):
        torch.manual_seed(0)
        pool, x = Transition(2, 2, stride, dims=1, memory=memory), torch.randn(2, 2, 2 * stride, requires_grad=True)
        pool(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("index", [slice(2), slice(1, None), slice(None, None, 1)])
def test_slices_are_sequences_of_the_same_layers(index: slice) -> None:
    for block in (DenseBlock(4, 16, growth_rate=4), Transition(4, 4)):
        part = block[index]
        assert type(part) is nn.Sequential
        assert list(part.named_children()) == list(block.named_children())[index]
    block, x = DenseBlock(4, 16, growth_rate=4).eval(), torch.randn(2, 4, 4, 4)
    torch.testing.assert_close(block[1:](block[:1](x)), block(x))


def two_ranks(rank: int, port: int, results: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    found = {}
    for memory in ("shared", "plain"):
        net = make(DenseNet, 3, (2, 2), stem="cifar", num_classes=3, memory=memory)
        x = images(3, batch=4)[rank * 2 : rank * 2 + 2]
        both = nn.parallel.DistributedDataParallel(net)
        both(x).square().sum().backward()
        found[memory] = [weight.grad.tolist() for weight in net.parameters() if weight.grad is not None]
    results.put((rank, found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_agree_with_each_other_and_with_plain() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=two_ranks, args=(rank, port, results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    found = dict(results.get(timeout=200) for _ in workers)
    for worker in workers:
        worker.join(60)
    assert found[0] == found[1]
    shared, plain = ([torch.tensor(grad) for grad in found[0][memory]] for memory in ("shared", "plain"))
    torch.testing.assert_close(shared, plain)
