"""Budgets as users write them ("0.5x", "12ms", "40mJ", "12W"), and the quantities they are of."""

import re
from collections.abc import Mapping

import msgspec

from lpvit_edge.errors import UnknownOptionError


class Quantity(msgspec.Struct, frozen=True, kw_only=True):
    """Something a budget can limit: how it is asked for, written and shown."""

    word: str
    option: str
    units: dict[str, float]  # what is written -> factor to the unit of the key
    shown: tuple[str, float]  # unit in messages, and what one of it is in the unit of the key
    is_share_allowed: bool = True

    def text(self, value: float) -> str:
        """The value in the unit of messages: "12.000 ms".

        >>> QUANTITIES["weight_bytes"].text(4.84e6)
        '4.840 MB'
        """
        return f"{value / self.shown[1]:.3f} {self.shown[0]}"


# The key names the unit in which the rest of the package counts.
QUANTITIES: dict[str, Quantity] = {
    "latency_ms": Quantity(
        word="latency",
        option="--target-latency",
        units={"ms": 1.0, "s": 1000.0},
        shown=("ms", 1.0),
    ),
    "energy_mj": Quantity(
        word="energy per image",
        option="--target-energy",
        units={"mJ": 1.0, "J": 1000.0},
        shown=("mJ", 1.0),
    ),
    "power_mw": Quantity(
        word="mean power",
        option="--max-power",
        units={"W": 1000.0, "mW": 1.0},
        shown=("W", 1000.0),
        is_share_allowed=False,
    ),
    "macs": Quantity(
        word="MACs of the prunable layers",
        option="--target-macs",
        units={"M": 1e6, "G": 1e9},
        shown=("M", 1e6),
    ),
    "weight_bytes": Quantity(
        word="weights",
        option="--target-weights",
        units={"kB": 1e3, "MB": 1e6, "GB": 1e9},
        shown=("MB", 1e6),
    ),
}

_NUMBER = r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
_AMOUNT = re.compile(rf"\s*{_NUMBER}\s*([A-Za-z]+)\s*")


def amount(text: str, key: str, *, dense: float | None) -> float:
    """A limit in the unit of `key` from "0.5x" (of the dense value), "12ms", "20MB", ...

    Raises UnknownOptionError when it is none of these, or a share of what is not known.

    >>> amount("0.5x", "latency_ms", dense=20.0), amount("12W", "power_mw", dense=None)
    (10.0, 12000.0)
    """
    quantity = QUANTITIES[key]
    match = _AMOUNT.fullmatch(text)
    is_share = match is not None and match[2] == "x" and quantity.is_share_allowed
    if match is None or float(match[1]) == 0.0 or not (is_share or match[2] in quantity.units):
        raise UnknownOptionError(
            f"{quantity.option} {text!r} is no {quantity.word} budget; write {_examples(quantity)}"
        )
    if not is_share:
        return float(match[1]) * quantity.units[match[2]]
    if dense is None:
        raise UnknownOptionError(
            f"{quantity.option} {text!r}: the dense {quantity.word} is not known to this profile; "
            f"write {_examples(quantity, shares=False)}"
        )
    return float(match[1]) * dense


def _examples(quantity: Quantity, *, shares: bool = True) -> str:
    amounts = " or ".join(f"12{unit}" for unit in quantity.units)
    return (
        f"a share of the dense one (0.5x) or {amounts}"
        if shares and (quantity.is_share_allowed)
        else amounts
    )


def limits(targets: Mapping[str, str], dense: Mapping[str, float | None]) -> dict[str, float]:
    """Every target in its unit, by the keys of QUANTITIES."""
    return {key: amount(text, key, dense=dense.get(key)) for key, text in targets.items()}


def named(**targets: str | None) -> dict[str, str]:
    """The targets that were given, by the keys of QUANTITIES."""
    return {key: text for key, text in targets.items() if text is not None}


_DURATION = re.compile(rf"\s*{_NUMBER}\s*(s|m|h)\s*")


def seconds_of(text: str) -> float:
    """Seconds from "90s", "5m" or "1h". Raises UnknownOptionError when it is none of these."""
    match = _DURATION.fullmatch(text)
    if match is None or float(match[1]) == 0.0:
        raise UnknownOptionError(f"no duration {text!r}; write 90s, 5m or 1h")
    return float(match[1]) * {"s": 1.0, "m": 60.0, "h": 3600.0}[match[2]]
