"""What an import costs and brings along."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import resblocks

IMPORT = """
import json, sys, time
start = time.process_time()
import torch
of_torch = time.process_time() - start
before, start = set(sys.modules), time.process_time()
import resblocks
seconds = time.process_time() - start
new = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
packages = [name for name in new if name not in sys.stdlib_module_names]
print(json.dumps({"seconds": seconds, "of_torch": of_torch, "packages": packages}))
"""


def fresh_import() -> dict[str, object]:
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_import_brings_nothing_but_the_core_dependencies() -> None:
    assert set(fresh_import()["packages"]) <= {"resblocks", "einops", "typing_extensions", "torch"}


def test_import_adds_little_to_that_of_torch() -> None:
    # The promise is 0.05 s; a slow machine is known by the time that torch takes, seconds in itself.
    imports = [fresh_import() for _ in range(5)]
    assert min(found["seconds"] / max(1.0, found["of_torch"]) for found in imports) < 0.05


def test_types_are_shipped() -> None:
    assert Path(resblocks.__file__).with_name("py.typed").is_file()


def test_every_public_module_has_a_page_in_the_reference() -> None:
    package = Path(resblocks.__file__).parent
    modules = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    pages = {path.stem for path in (Path(__file__).parent.parent / "docs" / "api").glob("*.md")}
    assert {name for name in modules if not name.startswith("_")} == pages
