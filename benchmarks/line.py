"""A triggered line under load: memory, lost frames, trigger to verdict.

python benchmarks/line.py runs/demo --seconds 600 --out benchmarks/results/line.json
"""

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

from lpvit_edge.bundle import open_bundle
from lpvit_edge.line.config import line_config
from lpvit_edge.line.line import Line
from lpvit_edge.line.sequence import SequenceFile

ROOT = Path(__file__).resolve().parent.parent
_EVERY_S = 5.0


def resident_mb() -> float:
    """Memory of this process, of which the capture process has its own."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def measure(bundle: Path, *, seconds: float, rate: float) -> dict[str, object]:
    """Run the line for so long; every number that was taken must have a verdict."""
    camera = ROOT / "examples" / "factory_line" / "camera.py"
    with tempfile.TemporaryDirectory() as folder:
        tables = {
            "state": folder,
            "source": {"kind": "synthetic", "target": f"{camera}:frame", "rate": rate},
            "policy": {"kind": "triggered", "queue": 32, "deadline_ms": 500.0},
            "sink": [{"kind": "jsonl", "target": f"{folder}/verdicts.jsonl"}],
        }
        line = Line(open_bundle(bundle), line_config(tables, name="benchmark"))
        line.start()
        memory: list[tuple[float, float]] = []
        start_ns = line.clock.monotonic_ns()

        def each() -> None:
            passed_s = (line.clock.monotonic_ns() - start_ns) / 1e9
            if not memory or passed_s - memory[-1][0] >= _EVERY_S:
                memory.append((round(passed_s, 1), round(resident_mb(), 2)))
            if passed_s >= seconds:
                line.request_stop()

        line.run(each=each)
        undelivered = line.close()
        summary = line.summary()
        with SequenceFile(Path(folder) / "sequence") as sequence:
            taken = sequence.taken
        lines = (Path(folder) / "verdicts.jsonl").read_text().splitlines()
        records = [e["record"] for e in map(json.loads, lines) if e["kind"] == "frame"]
        numbers = [record["number"] for record in records]
        reasons = Counter(r["reason"] for r in records if r["verdict"] == "safe")
    return {
        "seconds": seconds,
        "rate": rate,
        "frames_taken": taken,
        "frames_without_verdict": len(set(range(1, taken + 1)) - set(numbers)),
        "verdicts_told_twice": len(numbers) - len(set(numbers)),
        "safe": summary.safe,
        "safe_because": dict(reasons),
        "late": summary.late,
        "overflowed": summary.overflowed,
        "undelivered": undelivered,
        "p50_ms": summary.p50_ms,
        "p99_ms": summary.p99_ms,
        "p999_ms": summary.p999_ms,
        "largest_ms": summary.largest_ms,
        "resident_mb": memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--rate", type=float, default=60.0, help="triggers per second")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    before = os.getloadavg()
    found = measure(arguments.bundle, seconds=arguments.seconds, rate=arguments.rate)
    found = {
        "command": "python benchmarks/line.py " + " ".join(sys.argv[1:]),
        **found,
        "load_average": {"before": before, "after": os.getloadavg()},
    }
    text = json.dumps(found, indent=1) + "\n"
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
