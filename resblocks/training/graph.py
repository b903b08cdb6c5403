"""A whole training step as one CUDA graph: the host starts it by one call, however many kernels it has.

At small batches the host is slower at launching kernels than the device at running them; a replay has one launch.
What changes from step to step lies in tensors that are filled in place, so that the replayed kernels read it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3  # steps before the capture: libraries choose algorithms, compilers compile, the optimizer makes its buffers


def check_graph(device: torch.device, processes: int, replays: bool, start_scale: float) -> None:
    """Raise where a step cannot be captured."""
    if device.type != "cuda":
        raise ValueError(f"graph must be False away from a CUDA device, got device {device}")
    if processes > 1:
        raise ValueError(f"graph must be False with more than one process, got {processes}")
    if start_scale != 1:
        raise ValueError(
            f"graph must be False with a start_scale other than 1: a graph has one size, got {start_scale}"
        )
    if replays:
        raise ValueError("graph must be False with a compile_mode other than default: it has CUDA graphs of its own")


class GraphedStep:
    """`step(*inputs)`, captured at the first call and replayed from then on.

    Args:
        step: works on the device alone; reads its inputs and changes `state()`, and never makes the host wait.
        state: the tensors that a step changes, as they are at the time of the call.
    """

    def __init__(self, step: Callable[..., None], state: Callable[[], list[Tensor]]) -> None:
        self._step, self._state = step, state
        self._replay: Callable[[], None] | None = None
        self._inputs: list[Tensor] = []

    def __call__(self, *inputs: Tensor) -> None:
        """Shape, dtype, device and memory format of each input must be those of the first call."""
        if self._replay is None:
            self._inputs = [tensor.clone() for tensor in inputs]
            with torch.random.fork_rng([tensor.device for tensor in inputs[:1] if tensor.is_cuda]):
                self._warm_up()
            self._replay = capture(self._once)
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._replay()

    def _once(self) -> None:
        self._step(*self._inputs)

    def _warm_up(self) -> None:
        """Steps that leave no trace."""
        before = [(tensor, tensor.detach().clone()) for tensor in self._state()]
        run_aside(self._once, WARM_UP)
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)


def run_aside(work: Callable[[], None], times: int) -> None:
    """Run on a stream of its own, as a capture wants what comes before it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(times):
            work()
    torch.cuda.current_stream().wait_stream(stream)


def capture(work: Callable[[], None]) -> Callable[[], None]:
    """Record the kernels of the work without running them; what is returned runs them."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
