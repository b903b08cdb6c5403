"""One process or many (torchrun), seen the same way: rank, size and the few exchanges that training needs."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
_NO_ANSWER = ("gloo/transport/", "Application timeout caused pair closure")  # gloo has no error type of its own


class Ranks:
    """This process among `size` processes; alone, every exchange is the identity and costs nothing.

    Flags and objects travel over gloo, on the host, so that agreeing never waits for a GPU; gradients and sums travel
    over NCCL where the tensors are on a GPU.
    """

    def __init__(self) -> None:
        self.on = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.on else 0
        self.size = dist.get_world_size() if self.on else 1
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0")) if self.on else 0

    @classmethod
    def from_env(cls, timeout_seconds: float = 600.0) -> Ranks:
        """Join the process group that torchrun describes; without torchrun, this process alone.

        A rank that is silent for `timeout_seconds` ends the run on all others instead of hanging them for ever.

        Raises:
            ValueError: `timeout_seconds` is not positive and finite.
        """
        if not 0 < timeout_seconds < math.inf:
            raise ValueError(f"timeout_seconds must be positive and finite, got {timeout_seconds}")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
            has_nccl = torch.cuda.is_available() and dist.is_nccl_available()  # torch for Windows comes without
            backend = "cpu:gloo,cuda:nccl" if has_nccl else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
        return cls()

    def close(self) -> None:
        """Leave the process group, after a run that ended well."""
        if self.on:
            dist.destroy_process_group()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def max(self, *values: int) -> tuple[int, ...]:
        """The largest of each value over all ranks."""
        if not self.on:
            return values
        agreed = torch.tensor(values)
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
        return tuple(agreed.tolist())

    def sum_(self, values: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.on:
            dist.all_reduce(values)
        return values

    def min_(self, values: Tensor) -> Tensor:
        """Minimum over all ranks, in place."""
        if self.on:
            dist.all_reduce(values, dist.ReduceOp.MIN)
        return values

    def broadcast_(self, tensors: list[Tensor]) -> None:
        """Give all ranks the values of the first, in place."""
        for tensor in tensors if self.on else []:
            if tensor.numel():
                dist.broadcast(tensor, src=0)

    def gather(self, value: T) -> list[T]:
        """The plain value of each rank, given to all."""
        values = [value] * self.size
        if self.on:
            dist.all_gather_object(values, value)
        return values

    def is_no_answer(self, error: RuntimeError) -> bool:
        """True where torch says that another rank is gone or silent. Our own errors name folders, of any name."""
        return self.on and (isinstance(error, dist.DistError) or any(sign in str(error) for sign in _NO_ANSWER))

    def first(self, work: Callable[[], T], group: Any = None) -> T:
        """Do `work` on the first rank only and hand its result to all; an error there is raised on every rank."""
        if not self.on:
            return work()
        outcome: list[Any] = [None, None]
        error = None
        if self.is_first:
            try:
                outcome = [work(), None]
            except Exception as caught:  # told to the others, then raised here as it is
                error, outcome = caught, [None, str(caught)]
        dist.broadcast_object_list(outcome, src=0, group=group, device=torch.device("cpu"))
        if error is not None:
            raise error
        if outcome[1] is not None:
            raise RuntimeError(f"on the first process: {outcome[1]}")
        result: T = outcome[0]
        return result

    def first_then_all(self, work: Callable[[], T]) -> T:
        """Do `work` on the first rank, then on all: what it downloads or caches is made once and read by the others."""
        if self.on:
            patient = dist.new_group(backend="gloo", timeout=timedelta(days=1))  # a download is not a hung rank
            self.first(lambda: (work(), None)[1], patient)
        return work()
