"""Video files, RTSP and V4L2, as FFmpeg really reads them."""

import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lpvit_edge.bundle import Bundle
from lpvit_edge.errors import FileFormatError, SourceError
from lpvit_edge.line.config import RtspSource, V4l2Source, VideoSource, line_config
from lpvit_edge.line.frames import Captured
from lpvit_edge.line.journal import Journal
from lpvit_edge.line.line import Line
from lpvit_edge.line.sources.base import EndOfSource
from lpvit_edge.line.sources.stream import Stream, open_rtsp, open_v4l2, open_video
from tests.capturing import ROOT, capturing, levels
from tests.line_bundle import make_bundle
from tests.test_line import config, events_of, run_until

av = pytest.importorskip("av")
PYTHON = "/usr/bin/python3"  # the system's: GStreamer's bindings are in no wheel


def write_video(path: Path, grey: list[int], *, codec: str = "libx264", rate: int = 10) -> Path:
    """A video of flat grey frames, one for each level, with a key frame every five."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate, options={"g": "5", "bf": "0"})
        stream.width, stream.height = 64, 48
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for level in grey:
            pixels = np.full((48, 64, 3), level, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode(None))
    return path


def all_of(stream: Stream) -> list[Captured]:
    found: list[Captured] = []
    try:
        while True:
            captured = stream.read(0.2)
            found += [] if captured is None else [captured]
    except EndOfSource:
        stream.close()
        return found


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "libx264"), ("a.mkv", "mjpeg"), ("a.avi", "mpeg4")]
)
def test_every_frame_of_a_file_comes_once_in_its_order_and_colours(
    tmp_path: Path, name: str, codec: str
) -> None:
    grey = list(range(20, 240, 10))
    found = all_of(
        open_video(VideoSource(target=str(write_video(tmp_path / name, grey, codec=codec))))
    )
    pixels = [frame.pixels for frame in found if frame.pixels is not None]
    assert len(pixels) == len(grey)
    assert all(one.shape == (48, 64, 3) and one.dtype == np.uint8 for one in pixels)
    assert np.abs([one.mean() - level for one, level in zip(pixels, grey, strict=True)]).max() <= 4


def test_a_file_is_read_at_its_rate_and_a_caller_who_asks_early_is_told_to_wait(
    tmp_path: Path,
) -> None:
    path = write_video(tmp_path / "a.mp4", [50, 60, 70])
    stream = open_video(VideoSource(target=str(path), rate=10.0))
    stamps: list[int] = []
    rests = 0
    while len(stamps) < 3:
        captured = stream.read(0.02)
        rests += captured is None
        stamps += [] if captured is None else [captured.captured_ns]
    stream.close()
    assert rests >= 4
    assert np.diff(stamps).min() >= 0.08e9


@pytest.mark.parametrize("codec", ["libx264", "mjpeg"])
def test_a_damaged_file_gives_no_frame_twice_and_what_cannot_be_decoded_is_a_corrupt_frame(
    tmp_path: Path, codec: str
) -> None:
    path = write_video(tmp_path / "a.mkv", list(range(20, 220, 5)), codec=codec)
    content = bytearray(path.read_bytes())
    packets: list[tuple[int, int]] = []
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    for position, size in packets[10:13]:
        start = content.index(b"", position) + 8
        content[start : start + size - 8] = bytes((7 * k) % 251 for k in range(size - 8))
    path.write_bytes(content)
    found = all_of(open_video(VideoSource(target=str(path))))
    damaged = [frame for frame in found if frame.pixels is None]
    assert damaged
    assert all("corrupt frame" in str(frame.fault) for frame in damaged)
    whole = [round(float(f.pixels.mean())) for f in found if f.pixels is not None]
    assert len(whole) >= 25
    assert abs(whole[-1] - 215) <= 3  # it goes on to the end


def test_a_stream_of_nothing_but_rubbish_is_given_up(tmp_path: Path) -> None:
    class Broken:
        streams: Any = type("Streams", (), {"video": (1,)})

        def decode(self, video: int) -> Iterator[Any]:
            raise av.error.InvalidDataError(1, "Invalid data")
            yield

    stream = Stream(Broken(), name="camera", ends=False)
    faults = [stream.read(0.1) for _ in range(100)]
    assert all(one is not None and one.pixels is None for one in faults)
    with pytest.raises(SourceError, match="100 frames one after another cannot be decoded"):
        stream.read(0.1)


def no_video(path: Path) -> Path:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 800), np.int16), format="s16", layout="mono"
        )
        frame.rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def text_file(path: Path) -> Path:
    path.write_text("no video")
    return path


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "none.mp4", "no such file or device"),
        (lambda folder: text_file(folder / "a.mp4"), "not a video that can be decoded"),
        (lambda folder: no_video(folder / "a.wav"), "holds no video"),
        (lambda folder: folder, "is a folder; to judge the images in it"),
    ],
    ids=["absent", "text", "sound", "folder"],
)
def test_a_file_that_is_no_video_is_refused_in_words(
    tmp_path: Path, make: Callable[[Path], Path], words: str
) -> None:
    with pytest.raises(SourceError, match=words):
        open_video(VideoSource(target=str(make(tmp_path))))


@pytest.mark.parametrize(
    ("target", "words"),
    [("/dev/video97", "no such file or device"), ("/dev/null", "may be unplugged or in use")],
)
def test_a_camera_of_the_kernel_that_is_not_there_is_refused_in_words(
    target: str, words: str
) -> None:
    with pytest.raises(SourceError, match=words):
        open_v4l2(V4l2Source(target=target, size="640x480", rate=30.0))


def test_the_loop_of_a_device_reads_a_device_of_ffmpeg() -> None:
    """No V4L2 device can be had without a kernel module: FFmpeg's own device takes its place."""
    container = av.open("testsrc=size=70x46:rate=50", format="lavfi")
    stream = Stream(container, name="device", ends=False)
    found = [stream.read(1.0) for _ in range(3)]
    stream.close()
    assert [f.pixels.shape for f in found if f and f.pixels is not None] == [(46, 70, 3)] * 3


def test_a_file_runs_through_the_capture_process_to_its_end(tmp_path: Path) -> None:
    grey = list(range(20, 240, 10))
    path = write_video(tmp_path / "a.mp4", grey)
    with capturing(VideoSource(target=str(path)), tmp_path) as captured:
        frames = captured.rest()
    assert [frame.number for frame in frames] == list(range(1, len(grey) + 1))
    assert np.abs(np.array(levels(frames)) - grey).max() <= 3
    assert captured.told.texts("source") == ["live: open", "ended"]
    assert captured.feed.health.restarts == 0


# --- RTSP, from a server ----------------------------------------------------------------------


class Server:
    """A camera with H.264 over RTSP; it can be switched off and on again on the same port."""

    def __init__(self, video: Path) -> None:
        self._pipeline = (
            f"filesrc location={video} ! qtdemux ! rtph264pay name=pay0 config-interval=-1"
        )
        self._process: subprocess.Popen[str] | None = None
        self.port = 0

    def on(self) -> None:
        self._process = subprocess.Popen(
            [
                PYTHON, str(ROOT / "tests" / "rtsp_server.py"), str(self.port), "/live",
                self._pipeline, "bob", "s3cret!",
            ],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def stall(self) -> None:
        """The connection stays, and nothing comes any more."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def off(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def url(self, path: str = "live", password: str = "s3cret!") -> str:
        return f"rtsp://bob:{password}@127.0.0.1:{self.port}/{path}"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    check = "import gi; gi.require_version('GstRtspServer', '1.0')"
    try:
        found = subprocess.run([PYTHON, "-c", check], capture_output=True, check=False).returncode
    except FileNotFoundError:
        found = 127
    if found:
        pytest.skip(
            "no RTSP server here; apt-get install gir1.2-gst-rtsp-server-1.0 python3-gi "
            "gstreamer1.0-plugins-base gstreamer1.0-plugins-good"
        )
    opened = Server(write_video(tmp_path / "camera.mp4", [20 + k % 200 for k in range(600)]))
    opened.on()
    yield opened
    opened.off()


def test_a_network_camera_is_read_and_refuses_in_words(server: Server) -> None:
    stream = open_rtsp(RtspSource(target=server.url()))
    found = [stream.read(5.0) for _ in range(10)]
    stream.close()
    means = [f.pixels.mean() for f in found if f is not None and f.pixels is not None]
    assert len(means) == 10
    assert np.all(np.diff(means) >= 0)
    assert 3 <= means[-1] - means[0] <= 15
    with pytest.raises(SourceError, match=r"^rtsp://\*\*\*@.*: refused: user or password is wrong"):
        open_rtsp(RtspSource(target=server.url(password="wrong")))
    with pytest.raises(SourceError, match="the camera has no stream of that path"):
        open_rtsp(RtspSource(target=server.url("other")))
    stream = open_rtsp(RtspSource(target=server.url(), timeout_s=0.5))
    assert stream.read(0.2) is not None
    server.stall()
    with pytest.raises(SourceError, match="timed out: check the cable"):
        all_of(stream)  # what was under way, and then nothing
    stream.close()
    server.off()
    with pytest.raises(SourceError, match="nothing listens there"):
        open_rtsp(RtspSource(target=server.url()))


def test_a_camera_that_answers_nothing_times_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        target = f"rtsp://127.0.0.1:{silent.getsockname()[1]}/live"
        with pytest.raises(SourceError, match="timed out: check the cable"):
            open_rtsp(RtspSource(target=target, timeout_s=0.5))


def test_a_network_camera_that_is_switched_off_holds_the_line_and_is_read_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle: Bundle = make_bundle(tmp_path / "bundle")
    monkeypatch.setenv("CAMERA_PASSWORD", "s3cret!")
    target = server.url(password="${CAMERA_PASSWORD}")
    source = {"kind": "rtsp", "target": target, "timeout_s": 2.0}
    line = Line(bundle, config(tmp_path, source=source, policy={"kind": "newest"}))
    line.start()
    run_until(line, lambda: line.summary().frames >= 5, seconds=30.0)
    assert line.outputs.held is None
    server.off()
    run_until(line, lambda: line.outputs.held is not None, seconds=30.0)
    before = line.summary().frames
    server.on()
    run_until(line, lambda: line.summary().frames >= before + 5, seconds=40.0)
    run_until(line, lambda: line.outputs.held is None)
    texts = [e["text"] for e in events_of(line) if e["kind"] == "source"]
    line.close()
    assert texts[0] == "live: open"
    assert any(text.startswith("lost: rtsp://***@") for text in texts)
    assert line.feed.health.restarts == 0  # opened again by the same process
    journal = Journal(tmp_path / "state" / "journal.sqlite")
    assert not any(b"s3cret" in entry.body for entry in journal.after(0, limit=100_000))
    journal.close()


def test_a_stream_must_be_given_up_before_its_process_is_killed() -> None:
    source = {"kind": "rtsp", "target": "rtsp://camera/live", "timeout_s": 8.0}
    with pytest.raises(FileFormatError, match=r"timeout_s is 8 and stall_s 5"):
        line_config({"source": source}, name="line.toml")
    line_config({"source": source, "stall_s": 10.0}, name="line.toml")
