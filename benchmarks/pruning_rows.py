"""Rows of the pruning benchmark, kept on disk as they come, and the uncertainty of a drop."""

import json
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from lpvit_edge.errors import MismatchError
from lpvit_edge.files import write_atomic

SCHEMA = "lpvit.bench.pruning/1"
_Z = 1.959964  # of 95 %


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One model pruned by one method; what could not be measured is None, with a reason."""

    model: str
    method: str
    pattern: str
    sparsity: float  # share of the prunable layers' MACs that was asked for
    reached: float | None = None  # the share that went
    accuracy: float | None = None
    drop: float | None = None  # percentage points below the dense model
    drop_low: float | None = None  # 95 % interval of the drop, paired
    drop_high: float | None = None
    lost: int | None = None  # images that the dense model has right and this one has not
    won: int | None = None
    seconds: float | None = None  # CPU seconds of pruning, all threads
    distortion: float | None = None  # predicted rise of the loss, where an allocation was made
    reason: str | None = None

    @property
    def key(self) -> tuple[str, str, str, float]:
        """What a row is about."""
        return self.model, self.method, self.pattern, self.sparsity


def paired_drop(dense: Tensor, pruned: Tensor) -> dict[str, Any]:
    """Accuracy, drop in percentage points and its 95 % interval, from two (n,) bool tensors.

    The interval of a difference of paired proportions by Agresti & Min 2005 (Wald's, after
    adding a half to each of the four counts), which holds its level for few discordant pairs.
    """
    n = len(dense)
    lost = int((dense & ~pruned).sum())
    won = int((~dense & pruned).sum())
    b, c, total = lost + 0.5, won + 0.5, n + 2.0
    centre = (b - c) / total
    half = _Z * math.sqrt(b + c - (b - c) ** 2 / total) / total
    return {
        "accuracy": float(pruned.double().mean()),
        "drop": 100.0 * (lost - won) / n,
        "drop_low": 100.0 * (centre - half),
        "drop_high": 100.0 * (centre + half),
        "lost": lost,
        "won": won,
    }


class Store:
    """pruning.json: every finished row is on disk at once, and is not computed again."""

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self.path = path
        self.document: dict[str, Any] = {"schema": SCHEMA, "facts": {}, "rows": []}
        if path.exists():
            self.document = json.loads(path.read_text(encoding="utf-8"))
            self._refuse_others(facts)
        for model, found in facts.items():
            self.document["facts"].setdefault(model, {}).update(found)
        self._rows = {
            row.key: row for row in msgspec.convert(self.document["rows"], list[Row], strict=True)
        }

    def _refuse_others(self, facts: Mapping[str, Any]) -> None:
        """Rows over other weights or images do not belong beside new ones."""
        for model, found in facts.items():
            before = self.document["facts"].get(model, found)
            different = [key for key in found if before.get(key) != found[key]]
            if different:
                raise MismatchError(
                    f"{self.path} holds rows of {model} with another {', '.join(different)}; "
                    "give another --out, or delete it"
                )

    def __contains__(self, row: Row) -> bool:
        return row.key in self._rows

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def forget(self, method: str, *, models: Collection[str]) -> None:
        """Drop a method's rows of some models, so that they are made again."""
        self._rows = {
            key: row
            for key, row in self._rows.items()
            if row.method != method or row.model not in models
        }

    def note(self, model: str, **more: float) -> None:
        """Add to what is known about a model; written with the next row."""
        self.document["facts"][model] |= more

    def add(self, row: Row) -> None:
        """Keep a row, replacing one about the same thing."""
        self._rows[row.key] = row
        self.save()

    def save(self, **sections: Any) -> None:
        """Write the file, with more sections beside the rows."""
        self.document |= sections
        self.document["rows"] = msgspec.to_builtins(list(self._rows.values()))
        write_atomic(self.path, json.dumps(self.document, indent=1).encode() + b"\n")
