"""Every named net has the parameters and MACs that its paper or reference implementation says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from resblocks import create_model, list_models
from resblocks.diagnostics import count_macs, count_params

NETS = json.loads(Path(__file__).with_name("expected").joinpath("complexity.json").read_text())["nets"]


def label(row: dict[str, Any]) -> str:
    return "-".join([row["name"], *(f"{key}={value}" for key, value in row["options"].items())])


@pytest.mark.parametrize("row", NETS, ids=label)
def test_net_costs_what_its_source_says(row: dict[str, Any]) -> None:
    net = create_model(row["name"], device="meta", **row["options"])
    macs = row["macs"] - row.get("macs_saved", 0)
    assert (count_params(net), count_macs(net, row["input_size"])) == (row["params"], macs), row["source"]


@pytest.mark.parametrize("row", [row for row in NETS if "params_paper_millions" in row], ids=label)
def test_count_is_the_one_that_the_paper_prints(row: dict[str, Any]) -> None:
    printed = row["params_paper_millions"]
    last_digit = 10 ** -len(printed.partition(".")[2])
    off = abs(row["params"] / 1e6 - float(printed))
    # Papers round or cut; where a paper counts something else, the entry says what.
    assert off < last_digit or "note" in row


def test_every_named_net_is_in_the_list_with_its_defaults() -> None:
    assert {row["name"] for row in NETS if not row["options"]} == set(list_models())
