"""Sums over an epoch that stay on the device, and are looked at without making the device wait."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Sums(NamedTuple):
    """Over the images of an epoch so far."""

    loss: float = 0.0
    correct: float = 0.0
    images: float = 0.0
    first_bad: float = math.inf  # the first step whose loss or gradient was not finite; of all epochs


class Meter:
    """Loss, correct answers and images so far, and the first step whose loss or gradient was not finite.

    On a GPU `peek` returns the newest numbers that have already arrived, usually a few steps old; `read` waits.
    """

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(4, dtype=torch.float64, device=device)
        self.values[3] = math.inf
        self.step = torch.zeros((), dtype=torch.float64, device=device)  # the one under way
        self._lagging = device.type == "cuda"
        if self._lagging:
            self._host = torch.empty(4, dtype=torch.float64, pin_memory=True)
            self._arrived = torch.cuda.Event()
            self._seen, self._underway = Sums(), False

    def note(self, *numbers: Tensor) -> Tensor:
        """Remember the step if it is the first with a number that is not finite; returns that memory, a view of (1,).

        Shape: each number ().
        """
        bad = torch.where(torch.stack(numbers).isfinite().all(), math.inf, self.step)
        first = self.values[3:]
        torch.minimum(first, bad, out=first)
        return first

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add one batch. Shape: loss (), logits (B, classes), labels (B,)."""
        correct = (logits.argmax(1) == labels).sum()
        images = len(labels)
        self.values[:3] += torch.stack(
            [loss.double() * images, correct.double(), correct.new_full((), images).double()]
        )

    def peek(self) -> Sums:
        """As new as is free to have."""
        if not self._lagging:
            return self.read()
        if self._underway and self._arrived.query():
            self._seen, self._underway = Sums(*self._host.tolist()), False
        if not self._underway:
            self._host.copy_(self.values, non_blocking=True)
            self._arrived.record()
            self._underway = True
        return self._seen

    def read(self) -> Sums:
        """The same, exactly now."""
        return Sums(*self.values.tolist())

    def reset(self) -> None:
        self.values[:3] = 0
        if self._lagging:
            self._seen, self._underway = Sums(first_bad=self._seen.first_bad), False
