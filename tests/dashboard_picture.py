"""Take the picture of the page: a real line, in a real browser, as this machine measures it.

python -m tests.dashboard_picture runs/demo --out docs/dashboard.png --seconds 150

The line runs the bundle on the synthetic camera with the dense engine beside it. Nothing is made
up: where this machine has no power sensor, the page says so.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.capturing import ROOT
from tests.chromium import Chromium
from tests.test_service import free_port

CAMERA = ROOT / "examples" / "factory_line" / "camera.py"


def lpvit(*words: object) -> list[str]:
    return [sys.executable, "-m", "lpvit_edge", *map(str, words)]


def stored(bundle: Path, folder: Path) -> Path:
    """A store with the bundle and its dense model."""
    store = folder / "store"
    for options in ((), ("--dense",)):
        subprocess.run(lpvit("install", bundle, "--store", store, *options), check=True)
    return store


def take(store: Path, folder: Path, *, rate: int, seconds: float) -> bytes:
    """A PNG of the page after the line has run for so long."""
    port = free_port()
    command = lpvit(
        "run", "--store", store, "--source", f"synthetic:{CAMERA}:frame@{rate}",
        "--policy", "triggered", "--deadline-ms", 200, "--state", folder / "state",
        "--shadow", "dense", "--shadow-share", 0.02, "--dashboard", f"127.0.0.1:{port}",
    )  # fmt: skip
    line = subprocess.Popen(command, cwd=ROOT, env=os.environ)
    try:
        time.sleep(seconds)
        with Chromium(folder / "chromium") as browser:
            browser.show(width=1440, height=1180, dark=False)
            browser.open(f"http://127.0.0.1:{port}/")
            browser.wait_for("document.querySelector('#chart-latency canvas') !== null")
            time.sleep(3.0)
            assert browser.problems() == []
            return browser.picture()
    finally:
        line.send_signal(signal.SIGTERM)
        line.wait(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rate", type=int, default=30, help="triggers per second")
    parser.add_argument("--seconds", type=float, default=150.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = stored(arguments.bundle, folder)
        picture = take(store, folder, rate=arguments.rate, seconds=arguments.seconds)
        (folder / "picture.png").write_bytes(picture)
        shutil.copyfile(folder / "picture.png", arguments.out)


if __name__ == "__main__":
    main()
