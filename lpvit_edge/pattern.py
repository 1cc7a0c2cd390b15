"""The shapes in which a weight may be pruned.

A weight is (out_features, in_features). `RxC` blocks span R output rows and C input columns;
"2:4" keeps two of four neighbours along the inputs; "dense" prunes nothing.
"""

import re
from typing import Literal

import msgspec

from lpvit_edge.errors import PruningError, UnknownOptionError

_BLOCK = re.compile(r"([1-9][0-9]{0,3})x([1-9][0-9]{0,3})")


class Pattern(msgspec.Struct, frozen=True, kw_only=True):
    """One pattern; `rows` and `cols` are 1 unless `kind` is "block"."""

    kind: Literal["dense", "2:4", "block"]
    rows: int = 1
    cols: int = 1

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols}" if self.kind == "block" else self.kind

    def fits(self, out_features: int, in_features: int) -> bool:
        """Whether the pattern divides a weight (out_features, in_features)."""
        if self.kind == "2:4":
            return in_features % 4 == 0
        return out_features % self.rows == 0 and in_features % self.cols == 0


DENSE = Pattern(kind="dense")
TWO_FOUR_SPARSITY = 0.5
# Offered where another pattern does not fit; the last one fits every layer.
COMMON = ("64x16", "64x1", "32x32", "32x4", "16x16", "16x1", "2:4", "8x1", "1x1")
# Engines with a kernel for 2:4; all others run blocks only.
_TWO_FOUR_ENGINES = frozenset({"tensorrt"})


def refuse_unrunnable(patterns: tuple[str, ...], *, engine: str) -> None:
    """Raise UnknownOptionError for a pattern that the engine has no kernel for."""
    for text in patterns:
        kind = parse_pattern(text).kind
        if kind == "dense":
            raise UnknownOptionError(
                "--patterns 'dense': a layer that gains from no pattern is left dense by itself; "
                "name blocks such as 64x1"
            )
        if kind == "2:4" and engine not in _TWO_FOUR_ENGINES:
            raise UnknownOptionError(
                f"--patterns '2:4': engine {engine} has no kernel for it, its zeros would cost as "
                f"much as weights; name blocks such as 64x1, or --engine "
                f"{' or '.join(sorted(_TWO_FOUR_ENGINES))}"
            )


def parse_pattern(text: str) -> Pattern:
    """A pattern from its name: "dense", "2:4" or "64x16" (output rows x input columns)."""
    if text in ("dense", "2:4"):
        return Pattern(kind="dense" if text == "dense" else "2:4")
    match = _BLOCK.fullmatch(text)
    if match is None:
        raise PruningError(
            f"no pattern {text!r}; write 'dense', '2:4' or ROWSxCOLS such as 64x1 "
            "(output rows x input columns)"
        )
    return Pattern(kind="block", rows=int(match[1]), cols=int(match[2]))
