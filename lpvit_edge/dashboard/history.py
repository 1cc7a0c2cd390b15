"""Hours of history in memory that does not grow: rings of three resolutions.

Ten minutes by the second, three hours by ten seconds, a day by the minute. A cell is the mean of
what fell into its time, NaN where nothing did: a gap stays a gap.
"""

import threading
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

RESOLUTIONS = {"10m": (1, 600), "3h": (10, 1080), "24h": (60, 1440)}
MOST_SERIES = 64  # 64 x 3120 cells of 12 bytes: 2.4 MB


class _Ring:
    """One resolution of all series: cell i holds the mean of second [i * step, (i + 1) * step)."""

    def __init__(self, step_s: int, cells: int) -> None:
        self.step_s, self.cells = step_s, cells
        self._cell_of = np.full(cells, -1, np.int64)
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._counts: dict[str, NDArray[np.int32]] = {}

    def add(self, at_s: float, values: "Mapping[str, float]") -> None:
        cell = int(at_s // self.step_s)
        slot = cell % self.cells
        if self._cell_of[slot] != cell:
            self._cell_of[slot] = cell
            for name in self._sums:
                self._sums[name][slot], self._counts[name][slot] = 0.0, 0
        for name, value in values.items():
            if name not in self._sums:
                if len(self._sums) >= MOST_SERIES:
                    continue
                self._sums[name] = np.zeros(self.cells)
                self._counts[name] = np.zeros(self.cells, np.int32)
            self._sums[name][slot] += value
            self._counts[name][slot] += 1

    def read(self, now_s: float) -> "tuple[list[int], dict[str, list[float | None]]]":
        last = int(now_s // self.step_s)
        cells = np.arange(last - self.cells + 1, last + 1)
        slots = cells % self.cells
        live = self._cell_of[slots] == cells
        if not live.any():
            return [], {}
        first = int(np.argmax(live))
        cells, slots, live = cells[first:], slots[first:], live[first:]
        values = {
            name: _means(sums[slots], self._counts[name][slots] * live)
            for name, sums in self._sums.items()
        }
        return (cells * self.step_s).tolist(), values


def _means(sums: "NDArray[np.float64]", counts: "NDArray[np.int32]") -> list[float | None]:
    pairs = zip(sums.tolist(), counts.tolist(), strict=True)
    return [float(f"{total / count:.5g}") if count else None for total, count in pairs]


class History:
    """Thread-safe; times are seconds since 1970, and a clock that jumps back starts anew."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rings = self._new()
        self._last_s = 0.0

    def add(self, at_s: float, values: "Mapping[str, float]") -> None:
        with self._lock:
            if at_s < self._last_s - 5:
                self._rings = self._new()
            self._last_s = at_s
            for ring in self._rings.values():
                ring.add(at_s, values)

    def read(self, resolution: str) -> "tuple[list[int], dict[str, list[float | None]]]":
        """Times (n,) in s since 1970 and the series (n,), None where nothing is known.

        Raises KeyError for a resolution that is none of RESOLUTIONS.
        """
        with self._lock:
            return self._rings[resolution].read(self._last_s)

    @staticmethod
    def _new() -> dict[str, _Ring]:
        return {name: _Ring(step, cells) for name, (step, cells) in RESOLUTIONS.items()}
