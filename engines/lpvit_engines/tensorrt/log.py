"""What TensorRT says while it works: kept, so that an error can carry it."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lpvit_edge.errors import EngineError

_LOG = logging.getLogger(__name__)
_KEPT_VERBOSE = re.compile(r"\(Sparsity\)|out ?of ?memory|insufficient memory", re.IGNORECASE)
_OVERFLOW = re.compile(r"layer ?norm.*overflow|overflow.*layer ?norm", re.IGNORECASE)
_NO_MEMORY = re.compile(
    r"out ?of ?memory|insufficient memory|cuda failure: 2\b|requested amount of gpu memory",
    re.IGNORECASE,
)
_NO_PLUGIN = re.compile(r"plugin.*not (?:be )?found|cannot find plugin|no importer", re.IGNORECASE)
_FAULTS = ("INTERNAL_ERROR", "ERROR")
_SHOWN = 8


@dataclass(frozen=True)
class Line:
    """One message; severity is INTERNAL_ERROR, ERROR, WARNING, INFO or VERBOSE."""

    severity: str
    text: str


@dataclass
class Log:
    """The messages of one build or load. Verbose ones are kept only where something reads them."""

    lines: list[Line] = field(default_factory=list)

    def add(self, severity: str, text: str) -> None:
        """Keep a message; TensorRT's threads call this, so it must never raise."""
        if severity != "VERBOSE" or _KEPT_VERBOSE.search(text):
            self.lines.append(Line(severity, text))
        _LOG.debug("TensorRT %s: %s", severity, text)

    @property
    def faults(self) -> list[str]:
        """Errors in order, each once."""
        return list(dict.fromkeys(x.text for x in self.lines if x.severity in _FAULTS))

    def failure(self, what: str, remedy: str) -> EngineError:
        """The error for a call that answered None or False, in TensorRT's own words."""
        said = self.faults or [x.text for x in self.lines if x.severity == "WARNING"]
        words = "; ".join(said[-_SHOWN:]) or "nothing"
        if any(_NO_PLUGIN.search(text) for text in said):
            remedy = (
                "the engine wants a version of the plugin lpvit::BlockSparseLinear that this "
                "lpvit-edge does not have: build it again with this version"
            )
        elif any(_NO_MEMORY.search(text) for text in said):
            remedy = "free memory on the device (close the desktop, other programs) and try again"
        return EngineError(f"{what}. TensorRT said: {words}. To do: {remedy}")


def refuse_overflow(lines: Sequence[Line]) -> None:
    """Raise EngineError for TensorRT's warning that a LayerNorm may overflow in float16.

    It was the only sign before a ViT-B fell from 85 % to 19 %, so it is no mere warning here.
    """
    found = next((line.text for line in lines if _OVERFLOW.search(line.text)), None)
    if found is not None:
        raise EngineError(
            f"TensorRT warns: {found}. The engine would answer wrongly. To do: export the model so "
            "that LayerNormalization stays one operator (lpvit build does), and report the model"
        )


def memory_skips(lines: Sequence[Line]) -> int:
    """Messages about kernels that were passed over for want of memory: the engine may be slower
    than it could be."""
    return sum(bool(_NO_MEMORY.search(line.text)) for line in lines)


def make_logger(trt: Any, log: Log) -> Any:
    """An ILogger that fills `log`; the caller keeps it alive as long as TensorRT may speak."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            log.add(severity.name, msg)

    return Logger()
