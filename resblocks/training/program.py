"""A function as a program: its errors are one line, and Ctrl-C is no traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable


def run_as_program(main: Callable[[], int | None]) -> None:
    """Call it, and end the process with the status that it returns, 1 after an error, 130 after Ctrl-C."""
    try:
        status = main()
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
    if status:
        sys.exit(status)
