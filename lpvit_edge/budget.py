"""Budgets as users write them: "0.5x", "12ms", "0.012s"."""

import re

from lpvit_edge.errors import UnknownOptionError

_BUDGET = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*(x|ms|s)\s*")


def latency_budget_ms(text: str, *, dense_ms: float) -> float:
    """Milliseconds from "0.5x" (of the dense engine), "12ms" or "0.012s".

    Raises UnknownOptionError when it is none of these.
    """
    match = _BUDGET.fullmatch(text)
    if match is None or float(match[1]) == 0.0:
        raise UnknownOptionError(
            f"no latency budget {text!r}; write a share of the dense latency (0.5x) or a time "
            "(12ms, 0.012s)"
        )
    return float(match[1]) * {"x": dense_ms, "ms": 1.0, "s": 1000.0}[match[2]]


_DURATION = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(s|m|h)\s*")


def seconds_of(text: str) -> float:
    """Seconds from "90s", "5m" or "1h". Raises UnknownOptionError when it is none of these."""
    match = _DURATION.fullmatch(text)
    if match is None or float(match[1]) == 0.0:
        raise UnknownOptionError(f"no duration {text!r}; write 90s, 5m or 1h")
    return float(match[1]) * {"s": 1.0, "m": 60.0, "h": 3600.0}[match[2]]
