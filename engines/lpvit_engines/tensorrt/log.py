"""What TensorRT says while it works: kept, so that an error can carry it."""

import logging
import re
import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

from lpvit_edge.errors import EngineError

_LOG = logging.getLogger(__name__)
_OVERFLOW = re.compile(r"layer ?norm.*overflow|overflow.*layer ?norm", re.IGNORECASE)
# TensorRT misspells one of them.
_NO_MEMORY = re.compile(
    r"out ?of ?memory|insuff?icient memory|memory is insufficient|cuda failure: 2\b"
    r"|requested amount of gpu memory",
    re.IGNORECASE,
)
_SKIPPED = re.compile(r"skipping tactic", re.IGNORECASE)
_NO_PLUGIN = re.compile(
    r"plugin.*not (?:be )?found|(?:cannot|could not) find plugin|no importer", re.IGNORECASE
)
_FAULTS = ("INTERNAL_ERROR", "ERROR")
_SHOWN = 8
_KEPT = 20_000  # of an engine that serves for months beside others that are built


@dataclass(frozen=True)
class Line:
    """One message; severity is INTERNAL_ERROR, ERROR, WARNING, INFO or VERBOSE."""

    severity: str
    text: str


@dataclass(eq=False)
class Log:
    """The messages of one build or load. Verbose ones are kept only where something reads them."""

    lines: deque[Line] = field(default_factory=lambda: deque(maxlen=_KEPT))

    def add(self, severity: str, text: str) -> None:
        """Keep a message; TensorRT's threads call this, so it must never raise."""
        if severity != "VERBOSE" or "(Sparsity)" in text or _NO_MEMORY.search(text):
            self.lines.append(Line(severity, text))
        _LOG.debug("TensorRT %s: %s", severity, text)

    @property
    def faults(self) -> list[str]:
        """Errors in order, each once."""
        return list(dict.fromkeys(x.text for x in self.lines if x.severity in _FAULTS))

    def failure(self, what: str, remedy: str) -> EngineError:
        """The error for a call that answered None or False, in TensorRT's own words."""
        said = self.faults or [x.text for x in self.lines if x.severity == "WARNING"]
        said = said[-_SHOWN:]  # older ones may be of another build in this process
        words = "; ".join(said) or "nothing"
        if any(_NO_PLUGIN.search(text) for text in said):
            remedy = (
                "the engine wants a version of the plugin lpvit::BlockSparseLinear that this "
                "lpvit-edge does not have: build it again with this version"
            )
        elif any(_NO_MEMORY.search(text) for text in said):
            remedy = "free memory on the device (close the desktop, other programs) and try again"
        return EngineError(f"{what}. TensorRT said: {words}. To do: {remedy}")


def refuse_overflow(lines: Iterable[Line]) -> None:
    """Raise EngineError for TensorRT's warning that a LayerNorm may overflow in float16.

    It was the only sign before a ViT-B fell from 85 % to 19 %, so it is no mere warning here.
    """
    found = next((line.text for line in lines if _OVERFLOW.search(line.text)), None)
    if found is not None:
        raise EngineError(
            f"TensorRT warns: {found}. The engine would answer wrongly. To do: export the model so "
            "that LayerNormalization stays one operator (lpvit build does), and report the model"
        )


def memory_skips(lines: Iterable[Line]) -> int:
    """Kernels that were passed over for want of memory: the engine may be slower than it could be.

    TensorRT says up to three things of one; the line "Skipping tactic" comes once.
    """
    said = [line.text for line in lines if _NO_MEMORY.search(line.text)]
    return sum(bool(_SKIPPED.search(text)) for text in said) or len(said)


_speakers: list[tuple[Any, Any, "WeakSet[Log]"]] = []  # module, its logger, who listens
# The same thread may come again: TensorRT speaks when the garbage collector frees an engine.
_speakers_lock = threading.RLock()


def make_logger(trt: Any, log: Log) -> Any:
    """The ILogger of this process, which from now on fills `log` too, as long as that lives.

    TensorRT keeps the first logger that it is given for much of what it says, and may speak after
    the engine it was given for has gone: so there is one, and it is never freed. Messages of two
    builds at a time reach both logs.
    """
    with _speakers_lock:
        for module, logger, listening in _speakers:
            if module is trt:
                listening.add(log)
                return logger
        listening = WeakSet([log])
        logger = _logger(trt, listening)
        _speakers.append((trt, logger, listening))
        return logger


def _logger(trt: Any, listening: "WeakSet[Log]") -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            with _speakers_lock:  # another thread's new log would end the iteration, and TensorRT
                logs = tuple(listening)
            for log in logs:
                log.add(severity.name, msg)

    return Logger()
