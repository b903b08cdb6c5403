"""Timing of contestants that take turns in one process, so that what slows the machine slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def take_turns(
    steps: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Seconds of each step in each round, after one round that does not count; each round begins with another."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for number in range(-1, rounds):
        order.append(order.pop(0))
        for name in order:
            start = clock()
            steps[name]()
            if number >= 0:
                seconds[name].append(clock() - start)
    return seconds


def against(seconds: Mapping[str, list[float]], baseline: str, digits: int = 4) -> dict[str, dict[str, object]]:
    """Processor time of each step, and the spread of its ratios to that of the baseline in the same round."""
    return {
        name: {
            "cpu_seconds": [round(second, digits) for second in spent],
            **spread([own / base for own, base in zip(spent, seconds[baseline], strict=True)], "ratio"),
        }
        for name, spent in seconds.items()
    }


def spread(values: list[float], prefix: str) -> dict[str, float]:
    """Smallest, median and largest."""
    return {
        f"{prefix}_min": min(values),
        f"{prefix}_median": statistics.median(values),
        f"{prefix}_max": max(values),
    }
