"""A function as a program: status and what is said."""

from __future__ import annotations

import pytest

from resblocks.training.program import run_as_program


def stop() -> int:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("main", "code"), [(stop, 130), (lambda: 2, 2)], ids=["stop", "2"])
def test_program_ends_with_a_status_and_no_traceback(main: object, code: object) -> None:
    with pytest.raises(SystemExit) as ended:
        run_as_program(main)  # type: ignore[arg-type]
    assert ended.value.code == code


@pytest.mark.parametrize("error", [ValueError, RuntimeError, ImportError, OSError])
def test_error_that_a_user_can_mend_is_one_line(error: type[Exception]) -> None:
    def fail() -> int:
        raise error("lr must be positive")

    with pytest.raises(SystemExit, match=r"^error: lr must be positive$"):
        run_as_program(fail)


@pytest.mark.parametrize("status", [0, None])
def test_program_that_is_done_goes_on(status: int | None) -> None:
    run_as_program(lambda: status)
