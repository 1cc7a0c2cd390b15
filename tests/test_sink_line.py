"""A whole line in front of a controller and a reject line: from the image to the pulse."""

import threading
from pathlib import Path
from typing import Any

import pytest

from lpvit_edge.line.config import line_config
from lpvit_edge.line.line import Line
from tests.broker import wait_for
from tests.line_bundle import make_bundle, write_image

pytest.importorskip("gpiod", reason="extra gpio is not installed")
pytest.importorskip("pymodbus", reason="extra modbus is not installed")
import gpiod

from tests.controller import FIRST, Controller


class Ejector:
    """Stands in for the kernel's request; notes each level."""

    def __init__(self) -> None:
        self.levels: list[str] = []
        self.is_free = True

    def request_lines(self, path: str, *, config: dict[int, Any], **_: Any) -> "Ejector":
        self.levels.append(config[17].output_value.name)
        self.is_free = False
        return self

    def set_value(self, line: int, value: Any) -> None:
        self.levels.append(value.name)

    def release(self) -> None:
        self.is_free = True


def test_rejected_parts_reach_the_controller_and_the_ejector_and_the_stop_leaves_both_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ejector, controller = Ejector(), Controller()
    monkeypatch.setattr(gpiod, "request_lines", ejector.request_lines)
    (tmp_path / "in").mkdir()
    tables: dict[str, Any] = {
        "state": str(tmp_path / "state"),
        "source": {"kind": "folder", "target": str(tmp_path / "in"), "poll_s": 0.005},
        "policy": {"kind": "wait"},
        "verdict": {"accept": ["bad"]},  # the engine of these tests says "ok"
        "sink": [
            {
                "kind": "modbus", "target": f"modbus://127.0.0.1:{controller.port}",
                "register": FIRST, "max_age_ms": 10_000.0,
            },
            {
                "kind": "gpio", "target": "/dev/gpiochip0", "line": 17, "safe": "active",
                "delay_ms": 1000.0, "pulse_ms": 20.0, "tolerance_ms": 10_000.0,
            },
        ],
    }  # fmt: skip
    line = Line(make_bundle(tmp_path / "bundle"), line_config(tables, name="test"))
    assert ejector.levels == ["ACTIVE"]  # safe before anything was judged
    line.start()
    running = threading.Thread(target=line.run)
    running.start()
    try:
        wait_for(lambda: ejector.levels == ["ACTIVE", "INACTIVE"], what=line.status())
        controller.wait_for_state(1)
        write_image(tmp_path / "in" / "a.png", 10)
        wait_for(lambda: controller.scan() == [1], what=line.status())
        assert (controller.verdicts[0]["verdict"], controller.verdicts[0]["action"]) == (2, 2)
        wait_for(lambda: len(ejector.levels) == 4, what=ejector.levels)
        assert ejector.levels[2:] == ["ACTIVE", "INACTIVE"]  # the pulse
    finally:
        line.request_stop()
        running.join()
        left = line.close()
    assert left == {}
    assert ejector.levels[4:] == ["ACTIVE"]
    assert ejector.is_free
    assert controller.registers(3) == [0]
    assert (line.status().missed, line.status().sinks) == ({}, {})
    controller.stop()
