"""The whole service under load, from the outside: memory, lost frames, trigger to verdict.

python benchmarks/line.py runs/demo --seconds 600 --out benchmarks/results/line.json

One `lpvit run` with the drift watch, the evidence store, the journal and the page, behind the
synthetic camera; a reader holds the page's stream open and asks for /metrics as Prometheus does.
Memory is that of every process of the line; every number that the camera took must have a verdict.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import msgspec
import numpy as np
import psutil

from lpvit_edge.line.sequence import SequenceFile

ROOT = Path(__file__).resolve().parent.parent
DEADLINE_MS = 500.0
_EVERY_S = 5.0
_SCRAPE_S = 5.0
_STARTED_S = 120.0


class Reader:
    """The page that somebody has open, and Prometheus beside it."""

    def __init__(self, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"
        self.messages, self.scrapes = 0, 0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=work) for work in (self._listen, self._scrape)]

    def start(self) -> None:
        """Begin to read, once the page answers."""
        for thread in self._threads:
            thread.start()

    def _listen(self) -> None:
        with urlopen(f"{self.address}/api/stream", timeout=10.0) as stream:
            while not self._stop.is_set():
                line = stream.readline()
                if not line:  # the line has ended
                    return
                self.messages += line.startswith(b"data:")

    def _scrape(self) -> None:
        while not self._stop.wait(_SCRAPE_S):
            with urlopen(f"{self.address}/metrics", timeout=10.0) as answer:
                answer.read()
            self.scrapes += 1

    def stop(self) -> None:
        """Before the line ends, so that no request is cut off."""
        self._stop.set()
        for thread in self._threads:
            thread.join()


def free_port() -> int:
    """A port of the loopback that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def resident_mb(pid: int) -> dict[str, float]:
    """Memory of the line's own process and of those that it started (the capture)."""
    process = psutil.Process(pid)
    own = process.memory_info().rss / 1e6
    started = sum(child.memory_info().rss for child in process.children(recursive=True)) / 1e6
    return {"line": round(own, 2), "capture": round(started, 2)}


def wait_until(ready: str, process: subprocess.Popen[str]) -> None:
    """Until the line judges parts. Raises SystemExit where it ends or takes too long."""
    end_s = time.monotonic() + _STARTED_S
    while time.monotonic() < end_s:
        if process.poll() is not None:
            raise SystemExit(f"lpvit run ended with exit status {process.returncode}")
        try:
            with urlopen(ready, timeout=2.0):
                return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"{ready} did not answer 200 within {_STARTED_S:.0f} s")


def watch(process: subprocess.Popen[str], *, seconds: float) -> list[dict[str, float]]:
    """Memory every few seconds, for so long."""
    start_s = time.monotonic()
    memory = []
    while (passed_s := time.monotonic() - start_s) < seconds:
        memory.append({"at_s": round(passed_s, 1), **resident_mb(process.pid)})
        time.sleep(max(0.0, min(_EVERY_S, seconds - passed_s)))
    return memory


def measure(bundle: Path, *, seconds: float, rate: float) -> dict[str, Any]:
    """Run the line for so long after it has begun to judge."""
    camera = ROOT / "examples" / "factory_line" / "camera.py"
    page, health = free_port(), free_port()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [
            *(sys.executable, "-m", "lpvit_edge", "run", str(bundle), "--json"),
            *("--source", f"synthetic:{camera}:frame@{rate:g}"),
            *("--policy", "triggered", "--deadline-ms", f"{DEADLINE_MS:g}"),
            *("--sink", f"jsonl:{folder}/verdicts.jsonl"),
            *("--sink", f"evidence:{folder}/evidence"),
            *("--state", str(folder / "state"), "--dashboard", f"127.0.0.1:{page}"),
            *("--health", f"127.0.0.1:{health}"),
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            wait_until(f"http://127.0.0.1:{health}/readyz", process)
            reader = Reader(page)
            reader.start()
            memory = watch(process, seconds=seconds)
            with urlopen(f"http://127.0.0.1:{page}/api/now", timeout=10.0) as answer:
                now = json.loads(answer.read())
            reader.stop()
            process.terminate()
            printed, _ = process.communicate(timeout=60.0)
        finally:
            process.kill()
        records, events = told(folder / "verdicts.jsonl")
        with SequenceFile(folder / "state" / "sequence") as sequence:
            taken = sequence.taken
        images = sum(1 for _ in (folder / "evidence").rglob("*.png"))
    return {
        "seconds": seconds,
        "rate": rate,
        "deadline_ms": DEADLINE_MS,
        **account(records, taken=taken),
        "line_said": json.loads(printed[printed.index("{") :]),
        "events": events,
        "evidence_images": images,
        "page": {"messages": reader.messages, "scrapes": reader.scrapes, "drift": now.get("drift")},
        "resident_mb": memory,
    }


def told(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Records of the frames and texts of the events, in the order in which they were told."""
    records: list[dict[str, Any]] = []
    events: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry["kind"] == "frame":
            records.append(entry["record"])
        else:
            record = entry["record"]
            events.append(f"{record['kind']}: {record['text']}")
    return records, events


def account(records: list[dict[str, Any]], *, taken: int) -> dict[str, Any]:
    """What became of every frame, and how long after its trigger."""
    numbers = [record["number"] for record in records]
    total_ms = np.array([record["latency"]["total_ms"] for record in records])
    p50, p99, p999 = (float(x) for x in np.percentile(total_ms, (50, 99, 99.9), method="higher"))
    safe = [record for record in records if record["verdict"] == "safe"]
    after_ms = sorted(record["latency"]["total_ms"] for record in safe)
    return {
        "frames_taken": taken,
        "frames_without_verdict": len(set(range(1, taken + 1)) - set(numbers)),
        "verdicts_told_twice": len(numbers) - len(set(numbers)),
        "verdicts": dict(Counter(record["verdict"] for record in records)),
        "safe_because": dict(Counter(record["reason"] for record in safe)),
        "safe_verdicts_after_ms": {"first": after_ms[:1], "last": after_ms[-1:]},
        "p50_ms": round(p50, 2),
        "p99_ms": round(p99, 2),
        "p999_ms": round(p999, 2),
        "largest_ms": round(float(total_ms.max()), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--rate", type=float, default=60.0, help="triggers per second")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    before = os.getloadavg()
    found = {
        "command": "python benchmarks/line.py " + " ".join(sys.argv[1:]),
        **measure(arguments.bundle, seconds=arguments.seconds, rate=arguments.rate),
        "load_average": {"before": before, "after": os.getloadavg()},
    }
    content = msgspec.json.format(msgspec.json.encode(found), indent=1).decode() + "\n"
    if arguments.out is not None:
        arguments.out.write_text(content, encoding="utf-8")
    print(content, end="")


if __name__ == "__main__":
    main()
