"""A step as one CUDA graph. Without a GPU a "graph" is the recorded function itself, called again at each replay."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training_workers import tiny_dataset, tiny_fit, tiny_net

from resblocks.training import Ranks, Recipe
from resblocks.training import graph as graphs
from resblocks.training.graph import GraphedStep, check_graph
from resblocks.training.loop import Loop

RECIPE = Recipe(epochs=2, batch_size=20, lr=0.1, crop=1, clip_norm=0.5)
CPU = torch.device("cpu")


@pytest.fixture
def functions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Functions in place of graphs; gives what was asked of CUDA, in order."""
    asked: list[str] = []

    def capture(work: object) -> object:
        asked.append("capture")
        return work

    def run_aside(work: object, times: int) -> None:
        asked.append("warm up")
        for _ in range(times):
            work()

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "run_aside", run_aside)
    monkeypatch.setattr("resblocks.training.loop.check_graph", lambda *args: None)
    return asked


def loop(graph: bool, device: torch.device = CPU, mode: str | None = None, dropout: float = 0.3) -> Loop:
    net = tiny_net(dropout=dropout)
    return Loop(net, tiny_dataset(), RECIPE, 0, device, torch.float32, Ranks(), compile_mode=mode, graph=graph)


def tensors(loop: Loop) -> list[Tensor]:
    momenta = [state["momentum_buffer"] for state in loop.optimizer.state.values()]
    return [*loop.net.state_dict().values(), *momenta, loop.meter.values]


def same(ours: Loop, theirs: Loop, tolerance: float = 1e-6) -> None:
    for one, other in zip(tensors(ours), tensors(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_replayed_steps_equal_eager_ones(functions: list[str]) -> None:
    ours, theirs = loop(graph=True), loop(graph=False)
    for step in range(5):
        ours.train_step(step)
        theirs.train_step(step)
        same(ours, theirs)
    assert functions == ["warm up", "capture"]  # once
    assert [group["lr"] for group in ours.state()["optimizer"]["param_groups"]] == [RECIPE.lr_at(4, ours.total_steps)]


@pytest.mark.slow
def test_compiled_steps_equal_eager_ones_where_nothing_is_drawn(functions: list[str]) -> None:
    ours, theirs = loop(graph=True, mode="default", dropout=0.0), loop(graph=False, dropout=0.0)
    for step in range(5):
        ours.train_step(step)
        theirs.train_step(step)
    same(ours, theirs)


@pytest.mark.slow
def test_compiled_dropout_is_a_function_of_the_step(functions: list[str]) -> None:
    """Not that of the eager step: the compiler draws by a generator of its own, which it seeds from torch's."""
    once, again = loop(graph=False, mode="default"), loop(graph=False, mode="default")
    for step in range(5):
        once.train_step(step)
        torch.rand(3)  # by somebody else
        again.train_step(step)
    same(once, again, 0)


def test_loaded_state_is_what_the_next_replay_goes_on_from(functions: list[str]) -> None:
    ours, theirs = loop(graph=True), loop(graph=False)
    for step in range(4):
        theirs.train_step(step)
    for step in (0, 1):
        ours.train_step(step)
    state = copy.deepcopy(ours.state())
    ours.train_step(7)  # is to leave no trace
    ours.load(state)
    for step in (2, 3):
        ours.train_step(step)
    same(ours, theirs)


def test_warm_up_leaves_no_trace(functions: list[str]) -> None:
    total = torch.ones(3)
    step = GraphedStep(lambda x: total.add_(x + 0 * torch.rand(3)), lambda: [total])
    torch.manual_seed(0)
    step(torch.full((3,), 2.0))
    torch.testing.assert_close(total, torch.full((3,), 3.0))
    after = torch.random.get_rng_state()
    torch.manual_seed(0)
    torch.rand(3)  # of the one step that counts
    assert torch.equal(torch.random.get_rng_state(), after)


@pytest.mark.parametrize(
    ("device", "processes", "replays", "start_scale", "said"),
    [
        ("cpu", 1, False, 1.0, "graph must be False away from a CUDA device, got device cpu"),
        ("cuda", 2, False, 1.0, "graph must be False with more than one process, got 2"),
        ("cuda", 1, True, 1.0, "graph must be False with a compile_mode other than default"),
        ("cuda", 1, False, 0.5, "graph must be False with a start_scale other than 1: .*, got 0.5"),
    ],
)
def test_graph_is_refused_where_it_cannot_be(
    device: str, processes: int, replays: bool, start_scale: float, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        check_graph(torch.device(device), processes, replays, start_scale)


def test_fit_refuses_a_graph_on_the_cpu(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="graph must be False away from a CUDA device"):
        tiny_fit(tmp_path / "run", graph=True, device="cpu")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize(("mode", "dropout"), [(None, 0.3), ("default", 0.0)])  # the compiler's masks are others
def test_graph_on_a_gpu_equals_eager_and_never_waits(mode: str | None, dropout: float) -> None:
    device = torch.device("cuda", 0)
    ours, theirs = (loop(graph, device, mode if graph else None, dropout) for graph in (True, False))
    for step in range(6):
        if step % ours.steps_per_epoch:  # the order of an epoch comes from the host
            torch.cuda.set_sync_debug_mode("error")
        ours.train_step(step)
        torch.cuda.set_sync_debug_mode("default")
        theirs.train_step(step)
    same(ours, theirs, 1e-3 if mode else 1e-5)
