"""What a run says: JSON lines on disk; a progress bar on a terminal, plain lines elsewhere; TensorBoard if asked."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

from .extras import require
from .files import no_link, writing


class RunLog:
    """Progress of one net for people, events for programs; on other ranks than the first, nothing at all."""

    def __init__(
        self, folder: Path, name: str, *, active: bool, progress: bool = True, tensorboard: bool = False
    ) -> None:
        self.active, self.name, self._path = active, name, folder / "log.jsonl"
        self._board: Any = None
        if active and tensorboard:  # first, since it may be missing
            board = require("torch.utils.tensorboard", "tensorboard", "tensorboard").SummaryWriter
            self._board = board(folder, purge_step=0)  # hides what was there: `catch_up` writes all of it
        with writing(self._path):
            self._file = open(self._path, "a", encoding="utf-8", opener=no_link) if active else None  # noqa: SIM115
        if self._file is not None and not _ends_in_newline(self._path):
            self._file.write("\n")  # a line that a kill tore does not take the next one with it
        self._talks = active and progress
        self._bar: Any = None
        self._shown = 0.0

    def close(self) -> None:
        self._stop_bar()
        if self._file is not None:
            with contextlib.suppress(OSError):  # what a full disk did not take is tried again
                self._file.close()
        if self._board is not None:
            self._board.close()

    def event(self, kind: str, **values: Any) -> None:
        """Append one JSON line; flushed at once, so that it outlives a kill of this process."""
        if self._file is not None:
            with writing(self._path):
                self._file.write(json.dumps({"time": time.time(), "event": kind, **values}) + "\n")
                self._file.flush()

    def say(self, text: str) -> None:
        if self._talks and self._bar is not None:
            self._bar.console.print(text, highlight=False)
        elif self._talks:
            print(text, flush=True)

    def start(self, steps: int, step: int) -> None:
        """Open the bar, on a terminal that has rich."""
        if not (self._talks and sys.stdout and sys.stdout.isatty() and importlib.util.find_spec("rich")):
            return
        from rich import progress

        columns = (
            "{task.description}",
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TimeRemainingColumn(),
            "{task.fields[numbers]}",
        )
        self._bar = progress.Progress(*columns)
        self._task = self._bar.add_task(self.name, total=steps, completed=step, numbers="")
        self._bar.start()

    def due(self) -> bool:
        """True when the bar wants numbers: twice a second, to keep the training from waiting for the terminal."""
        return self._bar is not None and time.monotonic() - self._shown > 0.5

    def step(self, step: int, epoch: str, loss: float, accuracy_percent: float, images_per_second: float) -> None:
        self._shown = time.monotonic()
        numbers = f"{images_per_second:,.0f} img/s  loss {loss:.4f}  acc {accuracy_percent:.2f} %"
        self._bar.update(self._task, completed=step, description=f"{self.name} {epoch}", numbers=numbers)

    def epoch(self, record: dict[str, Any], epochs: int, split: str, seconds_left: float) -> None:
        """One line and one event for a finished epoch."""
        self.event("epoch", **record)
        self._draw(record)
        left = f"{int(seconds_left) // 60}:{int(seconds_left) % 60:02d}"
        self.say(
            f"{self.name}  epoch {record['epoch']:>{len(str(epochs))}}/{epochs}"
            f"  train loss {record['train_loss']:.4f} acc {record['train_accuracy_percent']:5.2f} %"
            f"  {split} loss {record['eval_loss']:.4f} acc {record['eval_accuracy_percent']:5.2f} %"
            f"  {record['images_per_second']:,.0f} img/s  {left} left"
        )

    def catch_up(self, records: list[dict[str, Any]]) -> None:
        """Write the finished epochs that the log lacks: a kill may come between a checkpoint and its line."""
        logged = _epochs_in(self._path) if self.active else set()
        for record in records if self.active else []:
            if record["epoch"] not in logged:
                self.event("epoch", **record)
            self._draw(record)

    def _draw(self, record: dict[str, Any]) -> None:
        """In TensorBoard."""
        if self._board is not None:
            for key in (
                "lr",
                "train_loss",
                "train_accuracy_percent",
                "eval_loss",
                "eval_accuracy_percent",
                "images_per_second",
            ):
                self._board.add_scalar(key, record[key], record["step"])
            self._board.flush()

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _epochs_in(path: Path) -> set[int]:
    """The epochs that a log holds; a line that a kill tore counts for nothing."""
    found = set()
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            event = json.loads(line)
            if event["event"] == "epoch":
                found.add(event["epoch"])
    return found


def _ends_in_newline(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, 2) == 0:
            return True
        file.seek(-1, 2)
        return file.read() == b"\n"
