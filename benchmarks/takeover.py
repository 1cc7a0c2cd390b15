"""A line whose bundle changes under it: taken over, back again, and to the dense one at red drift.

One `lpvit run --store` behind the synthetic camera, from the outside: another bundle is installed
while it runs, the first one again, then the camera's lamp loses 40 % of its light until the drift
watch raises red and the dense bundle takes over, and at last the lamp is mended and the first
bundle installed once more. Every part that the camera took must have one verdict.

python benchmarks/takeover.py runs/demo --out benchmarks/results/takeover.json
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lpvit_edge.line.journal import Journal
from lpvit_edge.line.sequence import SequenceFile

ROOT = Path(__file__).resolve().parent.parent
CAMERA = """
import sys
sys.path.insert(0, {examples!r})
from functools import lru_cache
from pathlib import Path
import numpy as np
from generate import draw_on
from surfaces import SURFACES

@lru_cache(maxsize=480)
def drawn(number, lamp):
    label = "ok" if number % 10 else "scratch"
    return draw_on(
        list(SURFACES)[number % len(SURFACES)], label, rng=np.random.default_rng(number), lamp=lamp
    )

for lamp in (1.0, 0.6):  # drawing one takes milliseconds
    for number in range(240):
        drawn(number, lamp)

def frame(number):
    return drawn(number % 240, 0.6 if Path({dim!r}).exists() else 1.0)
"""
LONGEST_S = 120.0


class Running:
    """The line, seen through its files."""

    def __init__(self, folder: Path, *, rate: int, seconds: float) -> None:
        self.store, self.state, self.dim = folder / "store", folder / "state", folder / "dim"
        self.seconds = seconds
        camera = folder / "camera.py"
        examples = str(ROOT / "examples" / "factory_line")
        camera.write_text(CAMERA.format(examples=examples, dim=str(self.dim)))
        self._command = [
            sys.executable, "-m", "lpvit_edge", "run", "--store", str(self.store),
            "--source", f"synthetic:{camera}:frame@{rate}", "--policy", "triggered",
            "--deadline-ms", "500", "--state", str(self.state), "--json",
        ]  # fmt: skip
        self.steps: list[dict[str, Any]] = []

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)

    def stop(self) -> Any:
        """What the line said at its end."""
        self._process.send_signal(signal.SIGTERM)
        said, _ = self._process.communicate(timeout=60)
        return json.loads(said)

    def entries(self) -> list[dict[str, Any]]:
        if not (self.state / "journal.sqlite").exists():
            return []
        journal = Journal(self.state / "journal.sqlite")
        found = [json.loads(entry.body) for entry in journal.after(0, limit=10_000_000)]
        journal.close()
        return found

    def frames(self) -> list[dict[str, Any]]:
        return [entry for entry in self.entries() if "number" in entry]

    def step(self, what: str, act: Callable[[], object], bundle: str) -> None:
        """Do something, wait until that bundle has judged a part, and let it run for a while."""
        at = time.time()
        act()
        done = time.time()
        while True:
            judged = [f for f in self.frames() if f["captured_at"] > at and f["bundle"] == bundle]
            if judged:
                break
            if time.time() - done > LONGEST_S:
                raise SystemExit(f"{what}: {bundle} judged nothing within {LONGEST_S:g} s")
            time.sleep(0.25)
        self.steps.append(
            {
                "what": what,
                "bundle": bundle,
                "seconds_to_its_first_part": round(judged[0]["captured_at"] - at, 2),
            }
        )
        print(self.steps[-1], flush=True)
        time.sleep(self.seconds)


def lpvit(*words: object) -> None:
    command = [sys.executable, "-m", "lpvit_edge", *map(str, words)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def version(folder: Path) -> str:
    return str(json.loads((folder / "manifest.json").read_bytes())["onnx_sha256"][:12])


def measure(bundle: Path, *, rate: int, seconds: float, folder: Path) -> dict[str, Any]:
    from lpvit_edge.dense_bundle import dense_bundle

    line = Running(folder, rate=rate, seconds=seconds)
    other = folder / "other"
    with dense_bundle(bundle) as dense:
        shutil.copytree(dense, other)
    first, second = version(bundle), version(other)
    lpvit("install", bundle, "--store", line.store)
    lpvit("install", bundle, "--store", line.store, "--dense")

    def install(which: Path) -> Callable[[], None]:
        return lambda: lpvit("install", which, "--store", line.store)

    line.step("start", line.start, first)
    try:
        line.step("another bundle is installed", install(other), second)
        line.step("the first one is installed again", install(bundle), first)
        line.step("the lamp loses 40 % of its light", line.dim.touch, second)
        line.dim.unlink()
        line.step("the lamp is mended, the first one installed", install(bundle), first)
    finally:
        ended = line.stop()
    return {
        "command": "python benchmarks/takeover.py " + " ".join(sys.argv[1:]),
        "rate": rate,
        "steps": line.steps,
        **counted(line),
        "line": ended,
    }


def counted(line: Running) -> dict[str, Any]:
    """Verdicts of the parts that were taken, the latency by bundle, and what was told."""
    frames = line.frames()
    with SequenceFile(line.state / "sequence") as sequence:
        taken = sequence.taken
    numbers = [frame["number"] for frame in frames]
    verdicts = [frame["verdict"] for frame in frames]
    latency = {
        name: np.percentile(
            [f["latency"]["total_ms"] for f in frames if f["bundle"] == name], [50, 99, 99.9]
        )
        .round(2)
        .tolist()
        for name in sorted({frame["bundle"] for frame in frames})
    }
    events = [entry for entry in line.entries() if "kind" in entry]
    return {
        "parts_taken": taken,
        "parts_without_verdict": len(set(range(1, taken + 1)) - set(numbers)),
        "verdicts_twice": len(numbers) - len(set(numbers)),
        "verdicts": {name: verdicts.count(name) for name in sorted(set(verdicts))},
        "safe_because": sorted({f["reason"] for f in frames if f["verdict"] == "safe"}),
        "p50_p99_p999_ms": latency,
        "events": [f"{e['severity']}: {e['kind']}: {e['text']}" for e in events],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rate", type=int, default=30, help="triggers per second")
    parser.add_argument("--seconds", type=float, default=12.0, help="between two changes")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = measure(
            arguments.bundle, rate=arguments.rate, seconds=arguments.seconds, folder=Path(name)
        )
    text = json.dumps(found, indent=1) + "\n"
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
