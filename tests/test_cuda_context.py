"""A thread that asked nothing of CUDA yet gets the primary context before its first launch."""

import ctypes
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lpvit_edge.errors import EngineError
from lpvit_engines.cuda.calls import load_calls
from lpvit_engines.cuda.context import ensure_context
from tests.cuda.fake_driver import compile_fake_driver, state_of


@pytest.fixture
def library(tmp_path: Path) -> Iterator[str]:
    path = str(compile_fake_driver(tmp_path, source="fake_runtime.c"))
    state_of(path)
    yield path
    load_calls.cache_clear()


def in_a_thread(work: Callable[[], None]) -> list[Exception]:
    """Work in a thread of its own, and what it raised."""
    raised: list[Exception] = []

    def run() -> None:
        try:
            work()
        except EngineError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised


def log_of(library: str) -> str:
    text = (ctypes.c_char * (1 << 16)).in_dll(ctypes.CDLL(library), "fake_log").value
    return text.decode()


def test_a_thread_without_a_context_gets_the_primary_one_once(library: str) -> None:
    def work() -> None:
        for _ in range(3):
            ensure_context(0, library=library)

    assert in_a_thread(work) == []
    log = log_of(library)
    assert log.count("cuDevicePrimaryCtxRetain(3)") == 1
    assert log.count("cuCtxPushCurrent") == 1
    assert load_calls(library).current_context() == 0xC0


def test_a_thread_that_has_a_context_keeps_it(library: str) -> None:
    calls = load_calls(library)
    with calls.current(0xAB):
        assert in_a_thread(lambda: ensure_context(0, library=library)) == []
        assert calls.current_context() == 0xAB
    assert "Retain" not in log_of(library)


def test_a_device_that_gives_no_context_is_an_error_and_is_asked_again(library: str) -> None:
    fake = ctypes.CDLL(library)
    (ctypes.c_char * 64).in_dll(fake, "fake_fails").value = b"cuDevicePrimaryCtxRetain"
    ctypes.c_int.in_dll(fake, "fake_fails_with").value = 101

    def work() -> None:
        with pytest.raises(EngineError, match="cuDevicePrimaryCtxRetain"):
            ensure_context(0, library=library)
        (ctypes.c_char * 64).in_dll(fake, "fake_fails").value = b""
        ensure_context(0, library=library)

    assert in_a_thread(work) == []
    assert load_calls(library).current_context() == 0xC0
