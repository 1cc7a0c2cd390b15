"""The pruning benchmark's rows as Markdown tables, as goals met or missed, and as a picture.

    python -m benchmarks.pruning_table benchmarks/results/pruning.json

writes pruning.md (what stands outside its two markers stays) and pruning.png beside the file.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.pruning_methods import METHODS
from benchmarks.pruning_rows import Row
from lpvit_edge.deps import require
from lpvit_edge.files import write_atomic

BEGIN, END = "<!-- rows -->", "<!-- end of rows -->"
OURS = ("uniform", "allocated")
Found = Callable[[str, str, float], Row | None]  # method, pattern, sparsity


class Goal(msgspec.Struct, frozen=True, kw_only=True):
    """At most `drop` points lost, in one pattern at one sparsity."""

    pattern: str
    sparsity: float
    drop: float


GOALS = (
    Goal(pattern="64x1", sparsity=0.6, drop=0.3),
    Goal(pattern="64x1", sparsity=0.7, drop=0.5),
    Goal(pattern="64x1", sparsity=0.8, drop=1.0),
    Goal(pattern="64x16", sparsity=0.5, drop=1.0),
    Goal(pattern="2:4", sparsity=0.5, drop=0.3),
)
TIMES_LPVIT = 10.0


def markdown(document: dict[str, Any]) -> str:
    """Goals, then one table a model; methods side by side."""
    rows = msgspec.convert(document["rows"], list[Row])
    models = list(dict.fromkeys(row.model for row in rows))
    parts = [_conditions(document)]
    for model in models:
        of = {(r.method, r.pattern, r.sparsity): r for r in rows if r.model == model}
        dense = of["dense", "dense", 0.0]
        parts.append(f"## {model}: dense {dense.accuracy:.2%} of {_images(document, model)} images")
        parts.append(_table(of))
        parts.append("\n".join(_goals(lambda *key, of=of: of.get(key))))
        refused = [r for r in of.values() if r.reason]
        parts += [f"- {METHODS[r.method].label}, {r.pattern}: {r.reason}" for r in refused]
    return "\n\n".join(parts)


def _conditions(document: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {found}" for name, found in document["versions"].items())
    commands = "\n".join(f"    {line}" for line in document["commands"])
    return f"{commands}\n\n{versions}; {document['threads']} threads"


def _images(document: dict[str, Any], model: str) -> int:
    found: int = document["facts"][model]["heldout_images"]
    return found


def _table(of: dict[tuple[str, str, float], Row]) -> str:
    """Drops in percentage points with their 95 % intervals."""
    methods = [name for name in METHODS if any(key[0] == name for key in of)]
    forms = sorted({(key[1], key[2]) for key in of if key[0] != "dense"}, key=_place)
    lines = [
        "| pattern | MACs removed | " + " | ".join(METHODS[m].label for m in methods) + " |",
        "|---" * (2 + len(methods)) + "|",
    ]
    for pattern, sparsity in forms:
        found = (of.get((method, pattern, sparsity)) for method in methods)
        lines.append(f"| {pattern} | {sparsity:.0%} | " + " | ".join(map(_cell, found)) + " |")
    return "\n".join(lines)


def _place(form: tuple[str, float]) -> tuple[int, float]:
    order = ("64x1", "64x16", "32x32", "64x64", "2:4", "structured")
    return order.index(form[0]), form[1]


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row.drop is None:
        return "no result"
    return f"{row.drop:.2f} ({row.drop_low:.2f} to {row.drop_high:.2f})"


def _goals(found: Found) -> Iterator[str]:
    """A line for each goal that the rows can judge, and for each of ours."""
    for goal in GOALS:
        for row in _ours(found, goal.pattern, goal.sparsity):
            assert row.drop is not None
            assert row.drop_high is not None
            over = row.drop - goal.drop
            said = "met" if over <= 0 else f"missed by {over:.2f} points"
            sure = ", by the whole interval" if row.drop_high <= goal.drop else ""
            what = (
                f"{goal.pattern} at {goal.sparsity:.0%}, {row.method}, at most {goal.drop} points"
            )
            found_drop = f"{row.drop:.2f} ({row.drop_low:.2f} to {row.drop_high:.2f})"
            yield f"- {what}: {said}{sure}: {found_drop}"
    yield from _against_lpvit(found)


def _ours(found: Found, pattern: str, sparsity: float) -> list[Row]:
    rows = (found(method, pattern, sparsity) for method in OURS)
    return [row for row in rows if row is not None and row.drop is not None]


def _against_lpvit(found: Found) -> Iterator[str]:
    """LPViT's drop over each of ours, wherever both were tried; its own plan is allocated."""
    for pattern in METHODS["lpvit"].patterns:
        for sparsity in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8):
            theirs = found("lpvit", pattern, sparsity)
            if theirs is None or theirs.drop is None:
                continue
            said = [_times(theirs.drop, row) for row in _ours(found, pattern, sparsity)]
            if said:
                yield (
                    f"- {pattern} at {sparsity:.0%}, LPViT's drop ({theirs.drop:.2f}) at least "
                    f"{TIMES_LPVIT:.0f} times ours: {'; '.join(said)}"
                )


def _times(theirs: float, row: Row) -> str:
    assert row.drop is not None
    share = theirs / row.drop if row.drop > 0 else math.inf
    met = "met" if share >= TIMES_LPVIT else "missed"
    times = f"{share:.0f} times" if share < math.inf else "nothing lost"
    return f"{row.method} {met}, {times} ({row.drop:.2f})"


def replaced(text: str, block: str) -> str:
    """The text with a new block between its markers; the markers are added where they lack."""
    if BEGIN not in text:
        return f"{text.rstrip()}\n\n{BEGIN}\n{block}\n{END}\n".lstrip()
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{block}\n{END}{rest.partition(END)[2]}"


def plot(document: dict[str, Any], path: Path) -> None:
    """Drop over sparsity, a panel for each model and pattern that has more than one sparsity."""
    require("matplotlib").use("Agg")
    pyplot = require("matplotlib.pyplot")
    rows = [r for r in msgspec.convert(document["rows"], list[Row]) if r.drop is not None]
    models = list(dict.fromkeys(row.model for row in rows))
    panels = ("64x1", "64x16", "32x32", "64x64", "structured")
    patterns = [p for p in panels if any(r.pattern == p for r in rows)]
    figure, axes = pyplot.subplots(
        len(models), len(patterns), figsize=(3.4 * len(patterns), 3.2 * len(models)), squeeze=False
    )
    for line, model in zip(axes, models, strict=True):
        for panel, pattern in zip(line, patterns, strict=True):
            _panel(panel, [r for r in rows if (r.model, r.pattern) == (model, pattern)])
            panel.set_title(f"{model}, {pattern}", fontsize=9)
    handles = {
        label: handle
        for panel in axes.flat
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=6, fontsize=8)
    figure.savefig(path, dpi=90)


def _panel(panel: Any, rows: Sequence[Row]) -> None:
    """Each method's drop with its interval; linear below one point, logarithmic above."""
    for place, method in enumerate(METHODS):
        of = sorted((r for r in rows if r.method == method), key=lambda r: r.sparsity)
        if not of:
            continue
        low = [(r.drop or 0.0) - (r.drop_low or 0.0) for r in of]
        high = [(r.drop_high or 0.0) - (r.drop or 0.0) for r in of]
        panel.errorbar(
            [100 * r.sparsity for r in of],
            [r.drop for r in of],
            yerr=[[max(0.0, v) for v in low], [max(0.0, v) for v in high]],
            label=METHODS[method].label,
            color=f"C{place}",
            marker="o",
            markersize=3,
            capsize=2,
        )
    panel.set_yscale("symlog", linthresh=1.0)
    panel.set_xlabel("MACs removed, %", fontsize=8)
    panel.set_ylabel("accuracy lost, points", fontsize=8)
    panel.grid(alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("results", type=Path)
    path: Path = parser.parse_args().results
    document = json.loads(path.read_text(encoding="utf-8"))
    plot(document, path.with_suffix(".png"))
    page = path.with_suffix(".md")
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    write_atomic(page, replaced(text, markdown(document)).encode())
    print(f"{page} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
