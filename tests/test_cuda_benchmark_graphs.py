"""What the GPU benchmarks ask torch.cuda for, with a torch.cuda that only takes notes."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from weakref import ref

import pytest

torch = pytest.importorskip("torch", reason="the benchmark captures torch's graphs")

from benchmarks.gpu_timing import Captured, capture  # noqa: E402

ELAPSED_MS = 2.0


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torch.cuda by names; a replay takes ELAPSED_MS."""
    noted: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            noted.append("record")

        def synchronize(self) -> None:
            noted.append("wait for the event")

        def elapsed_time(self, end: Any) -> float:
            return ELAPSED_MS

    class Graph:
        def replay(self) -> None:
            noted.append("replay")

    @contextmanager
    def capturing(graph: Any) -> Iterator[None]:
        noted.append("capture")
        yield
        noted.append("captured")

    stream = SimpleNamespace(wait_stream=lambda other: None)

    def set_stream(chosen: Any) -> None:
        assert chosen is stream
        noted.append("the stream from before")

    for name, fake in {
        "Event": Event, "CUDAGraph": Graph, "graph": capturing, "Stream": lambda: stream,
        "current_stream": lambda: stream, "stream": lambda chosen: nullcontext(),
        "set_stream": set_stream,
        "synchronize": lambda: noted.append("synchronize"),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    return noted


def test_a_run_is_warmed_up_before_it_is_captured_over_every_copy(notes: list[str]) -> None:
    def run(i: int) -> int:
        notes.append(f"run {i}")
        return i

    made = capture(run, copies=4)
    assert notes == [
        "run 0", "run 1", "run 2", "capture", "run 0", "run 1", "run 2", "run 3", "captured",
        "the stream from before", "replay", "synchronize",
    ]  # fmt: skip
    assert made.result == 3  # what the last launch of the graph writes


def test_a_sample_is_one_replay_between_two_events_in_microseconds_per_launch(
    notes: list[str],
) -> None:
    made = capture(lambda i: i, copies=4)
    notes.clear()
    assert made.sample_us() == 1e3 * ELAPSED_MS / 4
    assert notes == ["record", "replay", "record", "wait for the event"]
    notes.clear()
    made.replay()
    assert notes == ["replay", "synchronize"]


def test_a_run_that_cannot_be_captured_raises_what_it_raised(notes: list[str]) -> None:
    def run(i: int) -> int:
        if "capture" in notes:
            raise RuntimeError("operation not permitted when stream is capturing")
        return i

    with pytest.raises(RuntimeError, match="not permitted"):
        capture(run, copies=2)
    assert notes[-1] == "the stream from before"


def test_what_a_run_reads_lives_as_long_as_its_graph(notes: list[str]) -> None:
    """A graph holds addresses: weights that are freed would be read all the same."""

    class Weights:
        pass

    def captured() -> tuple[Captured, "ref[Weights]"]:
        weights = Weights()
        return capture(lambda i: id(weights), copies=2), ref(weights)

    made, weights = captured()
    gc.collect()
    assert weights() is not None
    made.sample_us()
    del made
    gc.collect()
    assert weights() is None
