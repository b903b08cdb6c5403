"""The Python of the README and of the site runs as it stands, and prints what it says beside each print."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))]
SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
EXPECTED = re.compile(r"^print\(.*\)  # (.+)$", re.M)


def snippets(page: str) -> str:
    """All snippets of a page in order: later ones use the names of earlier ones."""
    return "\n".join(SNIPPET.findall((ROOT / page).read_text(encoding="utf-8")))


@pytest.mark.filterwarnings("ignore:::torchao")  # which says of each layer why it stays in float
@pytest.mark.filterwarnings("ignore:::torch.utils._pytree")
@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)])
def test_snippets_run_and_print_what_they_say(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = snippets(page)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, page, "exec"), {"__name__": "__main__"})
    assert printed.getvalue().splitlines() == EXPECTED.findall(code)


def test_first_screen_of_the_readme_is_ten_lines_of_code() -> None:
    first = SNIPPET.search((ROOT / "README.md").read_text(encoding="utf-8"))
    lines = [line for line in first[1].splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(lines) <= 10


@pytest.mark.parametrize(
    "command", re.findall(r"^```bash\n(pip .*?)\n```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
)
def test_commands_of_the_readme_are_those_that_ci_runs(command: str) -> None:
    assert f"README: {command}" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
