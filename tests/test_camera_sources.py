"""GenICam by a simulated camera's GenTL producer, GStreamer by its own test picture."""

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lpvit_edge.errors import SourceError
from lpvit_edge.line.capture_process import Capture
from lpvit_edge.line.config import GenicamSource, GstreamerSource
from lpvit_edge.line.frames import Captured
from lpvit_edge.line.ring import FrameMessage, StatusMessage
from lpvit_edge.line.sequence import SequenceFile
from lpvit_edge.line.sources.genicam import (
    BufferAges,
    GenicamCamera,
    _timestamp_ns,
    open_camera,
    to_rgb,
)
from tests.capturing import capturing, levels, path_with

SYSTEM = Path("/usr/lib/python3/dist-packages/gi")


@pytest.fixture(scope="module")
def cti() -> str:
    """The producer in genicam's own wheel: three cameras that film a bouncing ball at 20 fps."""
    pytest.importorskip("harvesters.core")
    genicam = pytest.importorskip("genicam")
    path = Path(genicam.__file__).parent / "viky.cti"
    if not path.is_file():
        pytest.skip(f"this genicam wheel has no simulated producer ({path})")
    return str(path)


@pytest.fixture
def camera(cti: str) -> Iterator[Callable[..., GenicamCamera]]:
    opened: list[GenicamCamera] = []

    def make(serial: str = "1", **features: Any) -> GenicamCamera:
        opened.append(open_camera(GenicamSource(target=serial, cti=cti, features=features)))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


@pytest.mark.parametrize(
    ("pixel_format", "grey"), [("Mono8", True), ("RGBa8", False)], ids=["grey", "colour"]
)
def test_a_genicam_camera_gives_pictures_with_its_own_numbers(
    camera: Callable[..., GenicamCamera], pixel_format: str, grey: bool
) -> None:
    opened = camera(PixelFormat=pixel_format)
    found = [opened.read(2.0) for _ in range(5)]
    frames = [one for one in found if one is not None]
    assert [one.fault for one in frames] == [None] * 5
    assert [one.counter for one in frames] == [1, 2, 3, 4, 5]
    for one in frames:
        assert one.pixels is not None
        assert one.pixels.shape == (400, 400, 3)
        assert one.pixels.dtype == np.uint8
        is_grey = (one.pixels[..., 0] == one.pixels[..., 1]).all()
        assert bool(is_grey) is grey  # the green camera's ball is green
    assert any(np.any(a.pixels != b.pixels) for a, b in pairwise(frames))
    assert opened.read(0.001) is None  # no trigger came


def test_a_genicam_camera_can_be_opened_again_after_it_was_closed(
    camera: Callable[..., GenicamCamera],
) -> None:
    for _ in range(2):
        opened = camera()
        first = opened.read(2.0)
        assert first is not None
        assert first.counter == 1
        opened.close()


@pytest.mark.parametrize(
    ("serial", "features", "words"),
    [
        ("77", {}, r"no camera with serial number '77'; the producer sees \['0', '1', '2'\]"),
        ("1", {"PixelFormat": "Mono12"}, "the camera refused PixelFormat = 'Mono12'"),
        ("1", {"TriggerLamp": 1}, "the camera has no feature TriggerLamp that can be 1"),
    ],
    ids=["serial", "value", "feature"],
)
def test_what_a_genicam_camera_does_not_have_is_refused_in_words(
    camera: Callable[..., GenicamCamera], serial: str, features: dict[str, Any], words: str
) -> None:
    with pytest.raises(SourceError, match=words):
        camera(serial, **features)
    assert camera("1").read(2.0) is not None  # nothing stays in use


def test_a_genicam_camera_that_another_program_uses_is_refused_in_words(
    cti: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = pytest.importorskip("genicam.gentl").ResourceInUseException

    def create(self: Any, key: Any) -> Any:
        raise error("Requested resource is already in use.")

    monkeypatch.setattr(pytest.importorskip("harvesters.core").Harvester, "create", create)
    with pytest.raises(SourceError, match=r"camera 2 cannot be opened: .*in use"):
        open_camera(GenicamSource(target="2", cti=cti))


def test_a_genicam_camera_that_is_unplugged_is_lost_in_words_and_can_be_closed(
    camera: Callable[..., GenicamCamera],
) -> None:
    opened = camera()
    assert opened.read(2.0) is not None
    gone = pytest.importorskip("genicam.gentl").IoException
    acquirer = opened._acquirer

    class Unplugged:
        def try_fetch(self, timeout: float) -> Any:
            raise gone("GenTL exception: the device does not answer")

        def destroy(self) -> None:
            acquirer.destroy()
            raise gone("GenTL exception: the device does not answer")

    opened._acquirer = Unplugged()
    with pytest.raises(SourceError, match=r"the camera was lost: .*does not answer"):
        opened.read(0.1)
    opened.close()


@pytest.mark.parametrize("content", [None, b"no library"])
def test_a_producer_that_is_none_is_refused_in_words(
    tmp_path: Path, content: bytes | None, cti: str
) -> None:
    path = tmp_path / "producer.cti"
    if content is not None:
        path.write_bytes(content)
    words = "no such GenTL producer" if content is None else "sees none"
    with pytest.raises(SourceError, match=words):
        open_camera(GenicamSource(target="1", cti=str(path)))


def test_a_buffer_that_lacks_packets_is_a_damaged_part_at_once_and_counted_once(
    camera: Callable[..., GenicamCamera], tmp_path: Path
) -> None:
    """A part whose trigger is known can still be rejected; one that is noticed later cannot."""
    ring: Any = Ring()
    opened = camera(PixelFormat="Mono8")
    acquirer = opened._acquirer
    with SequenceFile(tmp_path / "sequence") as sequence:
        capture = Capture(ring, sequence, "triggered")
        for number in range(4):
            if number != 2:
                found = opened.read(2.0)
            else:
                with pytest.MonkeyPatch.context() as patched:
                    patched.setattr(acquirer, "try_fetch", taken_away(acquirer))
                    begin_ns = time.monotonic_ns()
                    found = opened.read(2.0)
                assert found is not None
                assert found.captured_ns >= begin_ns
            assert found is not None
            capture.hand_over(found)
    frames = [m for m in ring.messages if isinstance(m, FrameMessage)]
    assert [m.number for m in frames] == [1, 2, 3, 4]
    assert [m.untimed for m in frames] == [False] * 4
    assert frames[2].lost == "corrupt frame: the buffer is incomplete; were packets lost?"
    assert [m for m in ring.messages if isinstance(m, StatusMessage)] == []


def taken_away(acquirer: Any) -> Callable[..., None]:
    """What harvesters does with a buffer that lacks packets: it keeps it, and calls back."""
    fetch = acquirer.try_fetch

    def fetched(timeout: float) -> None:
        fetch(timeout=timeout).queue()
        acquirer._emit_callbacks(acquirer.Events.INCOMPLETE_BUFFER)

    return fetched


def test_a_buffer_that_waited_for_its_fetch_is_as_old_as_the_cameras_clock_says() -> None:
    ages, ms = BufferAges(), 1_000_000
    at = 7_000 * ms  # the camera's clock began later than this machine's

    def age_ms(trigger_ms: int, fetched_ms: int, *, waited: bool, step_ms: int = 0) -> float:
        stamp_ns = trigger_ms * ms + step_ms * ms
        return ages.age_ns(stamp_ns, at + fetched_ms * ms, waited=waited) / ms

    assert age_ms(100, 101, waited=True) == 0
    assert age_ms(150, 401, waited=False) == 250
    assert age_ms(200, 402, waited=False) == 201
    assert age_ms(500, 501, waited=True) == 0
    assert age_ms(600, 601, waited=True, step_ms=-450) == 0  # its clock was set back
    assert age_ms(650, 701, waited=False, step_ms=-450) == 50
    assert age_ms(650, 801, waited=False, step_ms=-450) == 0  # it stands still: no time stamp
    assert ages.age_ns(None, 9_000 * ms, waited=False) == 0


@pytest.mark.parametrize(
    ("stamps", "expected_ns"),
    [
        ({"timestamp_ns": 5_000}, 5_000),
        ({"timestamp": 250, "frequency": 125_000_000}, 2_000),
        ({"timestamp": 250}, None),
        ({"timestamp": 250, "frequency": 0}, None),
        ({}, None),
    ],
    ids=["ns", "ticks", "ticks of no unit", "ticks of no frequency", "none"],
)
def test_a_time_stamp_counts_where_its_unit_is_known(
    cti: str, stamps: dict[str, int], expected_ns: int | None
) -> None:
    gone = pytest.importorskip("genicam.gentl").NotAvailableException

    class Module:
        def __getattr__(self, name: str) -> Any:
            if name == "parent":
                return self
            key = "frequency" if name == "timestamp_frequency" else name
            if key not in stamps:
                raise gone("Resource or information is not available.")
            return stamps[key]

    assert _timestamp_ns(Module()) == expected_ns


class Ring:
    """Takes what a capture hands over."""

    def __init__(self) -> None:
        self.messages: list[Any] = []

    def is_free(self, timeout_s: float) -> bool:
        return True

    def send(self, message: Any) -> None:
        self.messages.append(message)

    def write(self, pixels: Any, message: Any) -> None:
        self.messages.append(message)


def test_frames_that_a_genicam_camera_took_and_nobody_fetched_get_a_number_each(
    camera: Callable[..., GenicamCamera], tmp_path: Path
) -> None:
    """Its buffers fill up while nobody reads, and it goes on counting."""
    ring: Any = Ring()
    opened = camera(PixelFormat="Mono8")
    with SequenceFile(tmp_path / "sequence") as sequence:
        capture = Capture(ring, sequence, "triggered")
        counters: list[int] = []
        while len(counters) < 14:
            if len(counters) == 2:
                time.sleep(1.0)  # twenty frames, of which the producer holds eight
            if (captured := opened.read(2.0)) is not None and captured.counter is not None:
                counters.append(captured.counter)
                capture.hand_over(captured)
        taken = sequence.taken
    missed = counters[-1] - counters[0] + 1 - len(counters)
    frames = [m for m in ring.messages if isinstance(m, FrameMessage)]
    assert missed >= 8
    assert [m.number for m in frames] == list(range(1, taken + 1))
    assert taken == 14 + missed
    assert sum(m.lost == "trigger was never seen" for m in frames) == missed
    (gap,) = [m for m in ring.messages if isinstance(m, StatusMessage)]
    assert (gap.state, gap.text.split(" triggers")[0]) == ("gap", str(missed))


@pytest.mark.parametrize(
    ("counters", "gaps"),
    [
        ((65534, 65535, 1, 2), []),  # GigE Vision has 16 bits and no 0
        ((1, 3), ["1 trigger was never seen (2)"]),
        ((1, 5), ["3 triggers were never seen (2 to 4)"]),
        ((9, 1), ["the camera counts anew from 1; what it missed is not known"]),
    ],
    ids=["wrap", "one", "three", "anew"],
)
def test_jumps_in_the_camera_s_own_numbers_are_gaps(
    tmp_path: Path, counters: tuple[int, ...], gaps: list[str]
) -> None:
    ring: Any = Ring()
    with SequenceFile(tmp_path / "sequence") as sequence:
        capture = Capture(ring, sequence, "triggered")
        for counter in counters:
            capture.hand_over(
                Captured(pixels=None, captured_at=0.0, captured_ns=0, counter=counter, fault="-")
            )
    assert [m.text for m in ring.messages if isinstance(m, StatusMessage)] == gaps


@pytest.mark.parametrize(
    ("pixel_format", "size", "words"),
    [("BayerRG8", 12, "set the camera to Mono8"), ("RGB8", 11, "corrupt frame: 11 bytes")],
)
def test_a_picture_of_another_format_or_size_is_a_fault(
    pixel_format: str, size: int, words: str
) -> None:
    pixels, fault = to_rgb(np.zeros(size, np.uint8), 2, 2, pixel_format)
    assert pixels is None
    assert fault is not None
    assert words in fault


def test_blue_first_becomes_red_first_and_opacity_is_dropped() -> None:
    data = np.array([1, 2, 3, 255], np.uint8)
    pixels, fault = to_rgb(data, 1, 1, "BGRa8")
    assert fault is None
    assert pixels is not None
    assert pixels.tolist() == [[[3, 2, 1]]]


# --- GStreamer, in a capture process that sees the system's bindings ---------------------------


@pytest.fixture
def bindings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's python3-gi and nothing else of the system's packages."""
    version = f"cpython-{sys.version_info.major}{sys.version_info.minor}"
    if not list(SYSTEM.glob(f"_gi.{version}-*")):
        pytest.skip(f"no python3-gi for this Python ({SYSTEM}/_gi.{version}-*)")
    if shutil.which("gst-inspect-1.0") is None and not list(
        Path("/usr/lib").glob("*/gstreamer-1.0/libgstvideotestsrc.so")
    ):
        pytest.skip("no GStreamer here; apt-get install gstreamer1.0-plugins-base")
    if not list(Path("/usr/lib").glob("*/girepository-1.0/Gst-1.0.typelib")):
        pytest.skip("no bindings of GStreamer; apt-get install gir1.2-gstreamer-1.0")
    (tmp_path / "system").mkdir()
    (tmp_path / "system" / "gi").symlink_to(SYSTEM)
    monkeypatch.setenv("PYTHONPATH", path_with(tmp_path / "system"))


@pytest.mark.usefixtures("bindings")
def test_a_gstreamer_pipeline_gives_pictures_of_a_width_that_needs_padding(tmp_path: Path) -> None:
    pipeline = (
        "videotestsrc num-buffers=4 pattern=solid-color foreground-color=0xff804020 "
        "! video/x-raw,format=RGB,width=51,height=30,framerate=20/1"
    )
    with capturing(GstreamerSource(target=pipeline), tmp_path) as captured:
        frames = captured.frames(4)
        captured.until(lambda: captured.feed.health.state == "lost")
    for frame in frames:
        assert frame.pixels is not None
        assert frame.pixels.shape == (30, 51, 3)
        assert (frame.pixels == np.array([0x80, 0x40, 0x20])).all()
    assert captured.told.texts("source") == [
        "live: open",
        "lost: the GStreamer pipeline ended; is the camera still plugged in?",
    ]


@pytest.mark.usefixtures("bindings")
def test_the_age_of_a_gstreamer_frame_counts_what_the_pipeline_took(tmp_path: Path) -> None:
    """A stage that holds every frame back for 60 ms: it is that much older when it arrives."""
    pipeline = (
        "videotestsrc is-live=true ! video/x-raw,width=16,height=16,framerate=5/1 "
        "! identity sleep-time=60000"
    )
    with capturing(GstreamerSource(target=pipeline), tmp_path) as captured:
        frames = captured.frames(4)
    ages_ms = [(frame.received_ns - frame.captured_ns) / 1e6 for frame in frames]
    assert min(ages_ms) >= 59.0
    assert len(levels(frames)) == 4


@pytest.mark.usefixtures("bindings")
@pytest.mark.parametrize(
    ("pipeline", "words"),
    [
        ("nosuchelement", 'GStreamer refused the pipeline: no element "nosuchelement"'),
        ("filesrc location=/none", "the GStreamer pipeline stopped: Resource not found"),
    ],
)
def test_a_gstreamer_pipeline_that_does_not_run_says_why(
    tmp_path: Path, pipeline: str, words: str
) -> None:
    with capturing(GstreamerSource(target=pipeline), tmp_path) as captured:
        captured.until(lambda: captured.feed.health.state == "lost")
    assert words in captured.told.texts("source")[0]
