"""SIGTERM and Ctrl-C as a wish to stop that the loop can hear, instead of an end in the middle of a step."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupted(SystemExit):
    """The run was asked to stop and has saved its state; the exit status is 128 + the signal's number (143, 130)."""


class Signals:
    """`with Signals() as signals:` notes SIGTERM and SIGINT in `signals.number`; the old handlers come back afterwards.

    A second signal acts as without us, so that a run that is stuck can still be stopped. Only the main thread can set
    handlers; elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.number = 0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) is signal.SIG_IGN:  # a shell's wish for what runs behind it
                    continue
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            self._restore()
            signal.raise_signal(number)
        self.number = number

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
