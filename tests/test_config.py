"""A net says the call that builds it as plain JSON, and that call builds it again."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import runpy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import resblocks as rb
from resblocks.attention import SE
from resblocks.config import from_config, plain, to_config
from resblocks.fuse import fuse
from resblocks.interop import TIMM, from_pretrained, push_to_hub, save_pretrained
from resblocks.layers import WSConv2d, blur_downsample, group_norm

ODD = {
    "partial block": partial(rb.ResNet, partial(rb.ResNeXtBlock, cardinality=2), (1, 2), (64, 128), stem="cifar"),
    "options": partial(
        rb.ResNet,
        rb.Bottleneck,
        (1, 1),
        (64, 128),
        attention=partial(SE, reduction=4),
        downsample=blur_downsample,
        norm=group_norm,
        conv=partial(WSConv2d, eps=1e-8),
        activation=nn.SiLU,
        num_classes=3,
        dtype=torch.float64,
    ),
    "no norm": partial(rb.ResNet, rb.BasicBlock, [1], [16], norm=None, skip=False, in_channels=1, stem_width=16),
    "timm's": TIMM["resnetblur50d"],
}
NETS: dict[str, Any] = {**{name: partial(rb.create_model, name) for name in rb.list_models()}, **ODD}


def twins(first: nn.Module, second: nn.Module) -> bool:
    """The same module tree with the same settings and shapes."""
    shapes = [{key: (value.shape, value.dtype) for key, value in net.state_dict().items()} for net in (first, second)]
    return repr(first) == repr(second) and shapes[0] == shapes[1]


SLOW = ("resnet1202", "preact_resnet1001", "densenet_bc_190_40", "densenet_bc_250_24", "densenet169", "densenet201")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in NETS]
)
def test_config_builds_the_net_again(name: str) -> None:
    with torch.device("meta"):
        net = NETS[name]()
        config = to_config(net)
        again = from_config(json.loads(json.dumps(config)))
    assert twins(net, again)
    assert to_config(again) == config


def test_config_follows_the_head_and_leaves_out_the_device() -> None:
    net = rb.create_model("resnet20", device="cpu")
    net.reset_head(3)
    assert to_config(net)["options"]["num_classes"] == 3
    assert "device" not in to_config(net)["options"]
    net.reset_head(0)
    assert to_config(net)["options"]["num_classes"] == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_config_survives_copies(copied: Any) -> None:
    net = rb.create_model("resnet20", attention=SE)
    assert to_config(copied(net)) == to_config(net)


def test_lambda_is_refused_when_asked_not_before() -> None:
    net = rb.create_model("resnet20", norm=lambda channels: nn.GroupNorm(1, channels))
    pickle.dumps(net)
    with pytest.raises(ValueError, match=r"arguments that can be imported by name, got <function .*lambda"):
        to_config(net)


class OwnNet(rb.ResNet):
    """A net of a user."""

    def __init__(self, width: int, num_classes: int = 2) -> None:
        super().__init__(rb.BasicBlock, (1,), (width,), num_classes=num_classes, stem_width=width)


def test_net_of_ones_own_says_its_own_call_and_needs_trust() -> None:
    net = OwnNet(8, num_classes=3)
    assert to_config(net) == {"name": f"{__name__}:OwnNet", "args": [8], "options": {"num_classes": 3}}
    assert twins(from_config(to_config(net), trust=[__name__]), net)
    with pytest.raises(ValueError, match=r"or of modules given in trust, got '.*:OwnNet'"):
        from_config(to_config(net))


class FixedNet(rb.ResNet):
    """A net of a user that always has two classes."""

    def __init__(self) -> None:
        super().__init__(rb.BasicBlock, (1,), (8,), num_classes=2, stem_width=8)


@pytest.mark.parametrize("build", [partial(OwnNet, 8, 3), FixedNet])
def test_config_adds_no_classes_to_the_call(build: Any) -> None:
    assert twins(from_config(to_config(build()), trust=[__name__]), build())


def test_new_head_is_said_where_the_call_gave_the_old_one_or_refused() -> None:
    net, fixed = OwnNet(8, 3), FixedNet()
    net.reset_head(5)
    assert twins(from_config(to_config(net), trust=[__name__]), net)
    fixed.reset_head(5)
    with pytest.raises(ValueError, match="constructor with num_classes to say num_classes=5, FixedNet has none"):
        to_config(fixed)


def test_head_of_ones_own_is_refused() -> None:
    net = rb.create_model("resnet20")
    net.head = nn.Linear(64, 3)
    with pytest.raises(ValueError, match="a head that reset_head made, with 10 outputs, got Linear"):
        to_config(net)


def with_gelu(net: rb.Network) -> rb.Network:
    net.get_submodule("stages.1.0").act = nn.GELU()
    return net


def with_a_layer_more(net: rb.Network) -> rb.Network:
    net.get_submodule("stages.1.0.branch").append(nn.ReLU())
    return net


def with_a_skip_off(net: rb.Network) -> rb.Network:
    rb.set_skip(net, False, where="stages.1.*")
    return net


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (with_gelu, r"but at stages\.1\.0\.act it has GELU\(.*\), and its call builds ReLU\(\)"),
        (with_a_layer_more, r"but at stages\.1\.0\.branch\.5 it has ReLU\(\), and its call builds nothing"),
        (
            with_a_skip_off,
            r"but at stages\.1\.0 it has BasicBlock\(\) with skip=False, and its call builds .*skip=True",
        ),
        (rb.freeze_norm, r"but at stem\.norm it has FrozenBatchNorm\(.*\), and its call builds BatchNorm2d\(.*\)"),
        (fuse, r"but at stem\.conv it has FusedConv\(.*\), and its call builds Conv2d.*torch\.save"),
    ],
)
def test_config_of_a_net_that_was_changed_is_refused(change: Any, text: str) -> None:
    net = change(rb.create_model("resnet20"))
    with pytest.raises(ValueError, match=text):
        to_config(net)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", [lambda net: net, fuse, rb.freeze_norm])
def test_nets_can_be_traced_by_jit(change: Any) -> None:  # which reads every property
    net, x = change(rb.create_model("resnet20").eval()), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.jit.trace(net, x)(x), net(x))


def test_config_is_that_of_the_net_inside_a_wrapper() -> None:
    net = rb.create_model("resnet20")
    assert to_config(torch.optim.swa_utils.AveragedModel(net)) == to_config(net)


def test_config_of_no_net_of_ours_raises() -> None:
    with pytest.raises(ValueError, match=r"net must be made by a class of resblocks\.nets or of its kind, got Linear"):
        to_config(nn.Linear(2, 2))


def test_config_draws_no_random_numbers_and_knows_synchronised_norms() -> None:
    net = nn.SyncBatchNorm.convert_sync_batchnorm(rb.create_model("resnet20"))
    before = torch.get_rng_state()
    assert to_config(net) == to_config(rb.create_model("resnet20", device="meta"))
    assert torch.equal(torch.get_rng_state(), before)


class LinearRates(rb.ResNet):
    """A net of a user whose constructor reads the value of a tensor, which the meta device does not have."""

    def __init__(self) -> None:
        rate = float(torch.linspace(0, 0.1, 3)[1])
        super().__init__(rb.BasicBlock, (1,), (8,), drop_path=rate, stem_width=8)


def test_config_of_a_net_that_needs_memory_to_be_built() -> None:
    net = LinearRates()
    assert to_config(net)["name"].endswith("LinearRates")
    net.get_submodule("stages.0.0.drop_path").p = 0.2
    with pytest.raises(ValueError, match=r"has DropPath\(p=0\.2\), and its call builds DropPath\(p=0\.05"):
        to_config(net)


@pytest.mark.parametrize(
    "name",
    ["os:system", "builtins:eval", "torch:load", "torch.nn.modules.module:torch", "resblocks.layers:torch", "x:y"],
)
def test_name_that_could_run_anything_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"config must hold names of resblocks or torch\.nn"):
        from_config({"name": name, "args": [], "options": {}})


def test_name_that_is_gone_is_said() -> None:
    with pytest.raises(ValueError, match=r"names that can be imported, got 'resblocks\.nets:Nonet'"):
        from_config({"name": "resblocks.nets:Nonet", "args": [], "options": {}})


def test_constructors_keep_their_signature() -> None:
    assert {"block", "depths", "widths", "stem"} <= set(inspect.signature(rb.ResNet).parameters)
    assert rb.ResNet.__init__.__name__ == "__init__"


def test_plain_values_stay() -> None:
    assert plain([1, 2.5, "A", None, True, (torch.float16,)]) == [
        1,
        2.5,
        "A",
        None,
        True,
        [{"name": "torch:float16"}],
    ]


# --- the Hub


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "config must be a dict of name, args and options, as to_config makes it, got {}"),
        ("resnet18", "config must be a dict .*, got 'resnet18'"),
        ({"name": "torch:float32"}, "config must be a dict"),
        ({"name": 3, "args": [], "options": {}}, "config must give a name in each dict"),
        ({"name": "resblocks.blocks:BasicBlock", "args": [{}], "options": {}}, "config must give a name in each dict"),
        ({"name": "resblocks.layers:named", "args": ["", {}], "options": {}}, "config must"),
    ],
)
def test_what_is_no_config_is_refused(config: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        from_config(config)


def test_trust_is_no_single_name() -> None:
    with pytest.raises(ValueError, match="trust must be a list of modules, got 'mine'"):
        from_config(to_config(rb.create_model("resnet20")), trust="mine")


@pytest.mark.filterwarnings("ignore")
def test_saved_net_comes_back(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    net = rb.create_model("resnet20", attention=SE, num_classes=4).eval()
    x = torch.randn(2, 3, 32, 32)
    net.train()(x)
    save_pretrained(net, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == to_config(net)
    again = from_pretrained(tmp_path)
    assert not again.training
    assert torch.equal(again(x), net.eval()(x))


@pytest.mark.filterwarnings("ignore")
def test_repository_without_safetensors_is_as_strict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    net = rb.create_model("resnet20").eval()
    save_pretrained(net, tmp_path)
    (tmp_path / "model.safetensors").unlink()

    def download(repo_id: str, filename: str, **options: Any) -> str:
        if not (tmp_path / filename).exists():
            raise hub.errors.LocalEntryNotFoundError(filename)
        return str(tmp_path / filename)

    monkeypatch.setattr(hub.hub_mixin, "hf_hub_download", download)
    torch.save(net.state_dict(), tmp_path / "pytorch_model.bin")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(from_pretrained("me/resnet20")(x), net(x))
    torch.save({"other": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="source"):
        from_pretrained("me/resnet20")


@pytest.mark.filterwarnings("ignore")
def test_saved_net_with_a_missing_weight_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    torch_files = pytest.importorskip("safetensors.torch")
    net = rb.create_model("resnet20")
    save_pretrained(net, tmp_path)
    state = net.state_dict()
    del state["head.bias"]
    torch_files.save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing in the source: head\.bias"):
        from_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "config",
    [
        None,
        {"model_type": "bert"},
        {"name": "resnet20", "args": [], "options": [1]},
        {"name": "resnet20", "args": [], "options": {}, "module": "resnet20"},
    ],
)
def test_weights_without_a_config_of_ours_are_refused(tmp_path: Path, config: dict[str, Any] | None) -> None:
    pytest.importorskip("huggingface_hub")
    save_pretrained(rb.create_model("resnet20"), tmp_path)
    (tmp_path / "config.json").unlink()
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=r"source must have a config\.json of resblocks beside its weights"):
        from_pretrained(tmp_path)


def test_push_goes_through_the_mixin(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    pushed: dict[str, Any] = {}

    def push(self: Any, repo_id: str, **options: Any) -> str:
        pushed.update(repo_id=repo_id, **options)
        return "address"

    monkeypatch.setattr(hub.PyTorchModelHubMixin, "push_to_hub", push)
    net = rb.create_model("resnet20")
    assert push_to_hub(net, "me/resnet20", private=True) == "address"
    assert pushed == {"repo_id": "me/resnet20", "config": to_config(net), "private": True}


def test_missing_client_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    from resblocks.interop import hub

    hub._hub_net.cache_clear()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'resblocks\[hub\]'"):
        save_pretrained(rb.create_model("resnet20"), tmp_path)


# --- torch.hub


def test_hubconf_offers_every_name() -> None:
    entries = runpy.run_path(str(Path(__file__).parent.parent / "hubconf.py"))
    assert {name for name in rb.list_models() if callable(entries.get(name))} == set(rb.list_models())
    assert entries["resnet20"](num_classes=3).num_classes == 3
    assert "torchvision" in entries["resnet20"].__doc__


def test_torch_hub_loads_from_the_folder() -> None:
    root = Path(__file__).parent.parent
    net = torch.hub.load(str(root), "resnet20", source="local", num_classes=3)
    assert net.num_classes == 3
