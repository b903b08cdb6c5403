"""A function as a program: status and what is said."""

from __future__ import annotations

import pytest

from resblocks.training.program import run_as_program


def stop() -> int:
    raise KeyboardInterrupt


def fail() -> int:
    raise ValueError("lr must be positive")


@pytest.mark.parametrize(
    ("main", "code"), [(stop, 130), (fail, "error: lr must be positive"), (lambda: 2, 2)], ids=["stop", "fail", "2"]
)
def test_program_ends_with_a_status_and_no_traceback(main: object, code: object) -> None:
    with pytest.raises(SystemExit) as ended:
        run_as_program(main)  # type: ignore[arg-type]
    assert ended.value.code == code


@pytest.mark.parametrize("status", [0, None])
def test_program_that_is_done_goes_on(status: int | None) -> None:
    run_as_program(lambda: status)
