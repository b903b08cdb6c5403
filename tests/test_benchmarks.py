"""The benchmarks' memory figures are exact, so they are tests: of small nets here, and those of the result files.

And what the benchmarks have in common: turns, ratios, files of results.
"""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import dense_memory
import landscape
import names
import paths
import peers
import pytest
import scaling
import shattering
import torch
import train_step
from turns import against, take_turns

PLAIN = ("torchvision", "resblocks", "resblocks out of place")


@pytest.mark.parametrize("memory", ["shared", "lean", "torchvision"])
@pytest.mark.parametrize(("name", "batch", "size"), [("densenet121", 16, 224), ("densenet_bc_100_12", 64, 32)])
def test_dense_net_takes_the_memory_of_the_result_file(name: str, batch: int, size: int, memory: str) -> None:
    build = {"densenet121": dense_memory.densenet121, "densenet_bc_100_12": dense_memory.small}[name]
    kept = json.loads(dense_memory.RESULTS.read_text(encoding="utf-8"))["memory"][name][memory]
    assert dense_memory.count(build, memory, batch, size) == kept


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


def test_contestants_take_turns_after_a_round_that_does_not_count() -> None:
    called: list[str] = []
    now = [0]

    def step(name: str) -> None:
        called.append(name)
        now[0] += len(called)

    seconds = take_turns({name: partial(step, name) for name in "abc"}, 2, lambda: now[0])
    assert "".join(called) == "bca" + "cab" + "abc"
    assert seconds == {"a": [5, 7], "b": [6, 8], "c": [4, 9]}


def test_ratios_are_to_the_baseline_in_the_same_round() -> None:
    found = against({"base": [1.0, 2.0, 4.0], "ours": [2.0, 2.0, 2.00004]}, "base")
    assert found["base"] == {"cpu_seconds": [1.0, 2.0, 4.0], "ratio_min": 1, "ratio_median": 1, "ratio_max": 1}
    ours = {"cpu_seconds": [2.0, 2.0, 2.0], "ratio_min": 0.50001, "ratio_median": 1.0, "ratio_max": 2.0}
    assert found["ours"] == ours


def test_new_cases_replace_those_of_the_same_settings_and_device() -> None:
    def case(batch: int, device: str, found: float) -> dict[str, Any]:
        return {"batch": batch, "rows": {"x": found}, "environment": {"device": device, "commit": str(found)}}

    kept = [case(1, "AVX2", 0.1), case(2, "AVX2", 0.2), case(1, "AVX512", 0.3)]
    new = [case(1, "AVX2", 0.4), case(4, "AVX2", 0.5)]
    assert peers.merged(kept, new) == [*kept[1:], *new]


def test_memory_that_differs_is_an_error_but_for_a_peer_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, ours, theirs = tmp_path / "file.json", {"resblocks": {"peak": 2}}, {"timm checkpointed": {"peak": 1}}
    file.write_text(json.dumps({"memory": {"resnet18": ours | theirs}}))
    monkeypatch.setattr(peers, "is_installed", lambda package: True)
    peers.check_memory(file, {"resnet18": ours | theirs})
    for now in ({"resnet18": theirs | {"resblocks": {"peak": 3}}}, {"resnet18": ours}, {}):
        with pytest.raises(SystemExit, match=r"memory differs from file.json:\nresnet18 "):
            peers.check_memory(file, now)
    monkeypatch.setattr(peers, "is_installed", lambda package: False)
    peers.check_memory(file, {"resnet18": ours})


def test_emulated_bfloat16_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "has_fast_bfloat16", lambda device: True)
    assert peers.timed_dtype("bfloat16") == torch.bfloat16
    monkeypatch.setattr(peers, "has_fast_bfloat16", lambda device: False)
    assert peers.timed_dtype("float32") == torch.float32
    with pytest.raises(SystemExit, match="dtype must be float32: this processor emulates bfloat16"):
        peers.timed_dtype("bfloat16")


def test_pair_with_nan_is_not_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"logits": math.nan, "train_logits": 0.0, "gradients": 0.0, "input_gradient": 0.0}
    monkeypatch.setattr(names.interop, "differences", lambda *_, **__: found)
    row = names.compare("transformers:resnet-18", seed=0)
    assert row["equal"] is False
    assert 0 <= row["logits_moved"] < 1e-12


class Steep(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1 + 1e12 * (x - 1)


def test_logits_move_with_the_last_digit_of_a_pixel() -> None:
    assert 1e-4 < names.moved(Steep(), torch.ones(2, 3, dtype=torch.float64)) < 3e-4  # 1e12 times 2.2e-16


def test_pair_whose_weights_do_not_come_back_is_not_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    back = names.interop.to_vocabulary

    def twice(*args: Any) -> dict[str, torch.Tensor]:
        return {key: 2 * value for key, value in back(*args).items()}

    monkeypatch.setattr(names.interop, "to_vocabulary", twice)
    found = names.compare("torchvision:resnet18", seed=0)
    assert (found["notes"], found["dtype"]) == ([], "float32")  # otherwise they are
    assert (found["weights_back_exact"], found["equal"]) == (False, False)


def test_plane_is_read_by_its_steps_and_its_local_minima_are_counted():
    losses = [[3.0, 3.0, 3.0, 3.0], [3.0, 0.0, 2.0, 3.0], [3.0, 2.0, 2.0, 3.0], [3.0, 4.0, 5.0, 3.0]]
    found = {"steps": [-1, 0, 0.5, 1], "nets": {"resnet20": {"losses": losses}}}
    assert landscape.surface_of(found, "resnet20")[1, 0.5] == 5.0
    assert landscape.ring(found, "resnet20", 0) == [0.0]
    assert landscape.ring(found, "resnet20", 0.5) == [2.0, 2.0, 2.0]
    assert landscape.minima(found, "resnet20") == 1
    losses[2][2] = -1.0
    assert landscape.minima(found, "resnet20") == 1  # now that one, which lies beside the other
    losses[1][1], losses[2][2], losses[3][3] = 2.0, 2.0, None  # which was infinite
    assert landscape.minima(found, "resnet20") == 0


def test_half_is_where_the_line_through_the_cosines_crosses_it(monkeypatch):
    monkeypatch.setattr(shattering, "STEPS", [0.001, 0.01, 0.1, 1.0])
    assert shattering.half([1.0, 0.9, 0.1, 0.0]) == pytest.approx(10**-1.5)
    assert shattering.half([0.5, 0.0, 0.6, 0.0]) == 0.001
    assert shattering.half([0.4, 0.3, 0.2, 0.1]) == 0
    assert shattering.half([1.0, 0.9, 0.8, 0.5]) == 1


def test_shares_of_paths_count_how_many_there_are():
    found = {"0": [8.0], "1": [1.0, 3.0], "2": [0.5]}  # one path, two and one
    assert paths.means(found) == [8.0, 2.0, 0.5]
    assert paths.shares(found) == pytest.approx([8 / 12.5, 4 / 12.5, 0.5 / 12.5])
    assert [paths.length_with(found, share) for share in (0.5, 0.9, 0.99)] == [0, 1, 2]
