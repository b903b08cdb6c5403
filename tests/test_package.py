"""What an import costs and brings along."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import resblocks
from resblocks import interop, training

PAGES = Path(__file__).parent.parent / "docs" / "api"
IMPORT = """
import json, sys
import torch
before = set(sys.modules)
import resblocks
new = set(sys.modules) - before
packages = sorted({name.partition(".")[0] for name in new} - sys.stdlib_module_names)
rooms = [name for name in ("resblocks.training", "resblocks.interop") if name in sys.modules]
print(json.dumps({"modules": len(new), "packages": packages, "rooms": rooms}))
"""


def fresh_import() -> dict[str, object]:
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_import_brings_nothing_but_the_core_dependencies() -> None:
    found = fresh_import()
    assert set(found["packages"]) <= {"resblocks", "einops", "typing_extensions", "torch"}
    assert found["rooms"] == []


def test_import_adds_few_modules_to_those_of_torch() -> None:
    assert fresh_import()["modules"] < 50  # torchvision's adds a thousand; benchmarks/import_time.py takes the time


def test_types_are_shipped() -> None:
    assert Path(resblocks.__file__).with_name("py.typed").is_file()


def test_every_public_module_has_a_page_in_the_reference() -> None:
    package = Path(resblocks.__file__).parent
    modules = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    pages = {path.stem for path in PAGES.glob("*.md")} - {"types", "internals"}
    assert {name for name in modules if not name.startswith("_")} == pages


@pytest.mark.parametrize("room", [resblocks, interop, training], ids=lambda room: room.__name__)
def test_every_public_name_has_an_entry_in_the_reference(room: ModuleType) -> None:
    pages = "\n".join(path.read_text(encoding="utf-8") for path in PAGES.glob("*.md"))
    assert set(room.__all__) <= set(re.findall(r"^\.\. (?:auto\w+|py:\w+):: (\w+)$", pages, re.MULTILINE))
