"""The benchmarks' memory figures are exact, so they are tests: of small nets here, and those of the result files."""

from __future__ import annotations

import json

import dense_memory
import pytest
import scaling
import train_step

PLAIN = ("torchvision", "resblocks", "resblocks out of place")


@pytest.mark.parametrize("memory", ["shared", "lean"])
def test_dense_net_takes_the_memory_of_the_result_file(memory: str) -> None:
    kept = json.loads(dense_memory.RESULTS.read_text(encoding="utf-8"))["memory"]["densenet121"][memory]
    assert dense_memory.count(dense_memory.densenet121, memory, 16, 224) == kept


@pytest.mark.parametrize("name", ["resnet18_cifar", "resnet50", "resnext50_32x4d"])
def test_plain_net_takes_the_memory_of_its_peers(name: str) -> None:
    rows = train_step.memory(name, PLAIN, batch=2)
    for what in ("saved_ratio", "peak_ratio", "made_ratio"):
        assert rows["resblocks"][what] <= 1.02
    assert rows["resblocks out of place"]["made_ratio"] > 1.05


@pytest.mark.parametrize("name", ["resnet18_cifar", "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
def test_plain_net_calls_the_operators_of_its_peers(name: str) -> None:
    """The exact part of its time: the same operators on the same shapes, and none beside them."""
    rows = train_step.memory(name, (*PLAIN, "resblocks checkpoint"), batch=2)
    assert rows["resblocks"]["extra_calls"] == 0
    assert rows["resblocks out of place"]["extra_calls"] > 0
    assert rows["resblocks checkpoint"]["extra_calls"] > 0


def test_norms_save_what_the_result_file_says() -> None:
    kept = json.loads(train_step.RESULTS.read_text(encoding="utf-8"))["memory"]["resnet18_cifar"]
    now = train_step.memory("resnet18_cifar", ("torchvision", "resblocks norms"))
    assert now["resblocks norms"] == kept["resblocks norms"]


def test_gates_let_right_steps_pass_and_find_wrong_ones() -> None:
    rows = train_step.gates("resnet18_cifar", ("torchvision", "timm checkpointed", "resblocks norms"), size=8)
    assert {name: row["passes"] for name, row in rows.items()} == {
        "torchvision": True,
        "timm checkpointed": False,
        "resblocks norms": True,
    }


def test_point_of_the_curves_is_that_of_the_result_file() -> None:
    kept = json.loads(scaling.RESULTS.read_text(encoding="utf-8"))["curves"]["batch"]["1"]
    assert scaling.point(**{**scaling.USUAL, "batch": 1}) == kept


def test_small_maps_contestant_uses_products() -> None:
    net = train_step.small_maps("resnet18_cifar")
    assert {type(module).__name__ for module in net.stages[3][1].branch} >= {"SmallMapConv2d"}
