"""A recording played back as a power source, and the recorder that makes one.

A recording is JSON lines: first {"kind": "power-recording", "format": 2, "info": {...}}, then one
PowerSample a line. A log that tegrastats wrote (`tegrastats --logfile`) is accepted as well; its
dates have a resolution of one second, so its times are spread evenly between the first and the
last date, and without dates the interval has to be given.
"""

import re
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

import msgspec

from lpvit_edge.errors import FileFormatError, UnknownOptionError
from lpvit_profilers.base import Conditions, PowerSample, SourceInfo
from lpvit_profilers.tegrastats import TegrastatsLine, parse_line
from lpvit_profilers.totals import THOR_MODULE, TotalRule, total_rule, why_no_total

KIND, FORMAT = "power-recording", 2
_READABLE = (1, 2)  # 2 brought the gaps of a counter
_DATE = re.compile(r"^(\d{2}-\d{2}-\d{4} \d{2}:\d{2}:\d{2})\s", re.ASCII)
_MAX_BYTES = 1 << 30
_LONGEST_INTERVAL_S = 86_400.0


class _Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    kind: str
    format: int
    info: SourceInfo


class Recording(msgspec.Struct, frozen=True, kw_only=True):
    """Samples in order, and what their source was."""

    info: SourceInfo
    samples: tuple[PowerSample, ...]


def write_recording(path: Path, info: SourceInfo, samples: Iterable[PowerSample]) -> int:
    """Write samples as JSON lines and return how many. Raises FileFormatError."""
    return sum(1 for _ in recorded(path, info, samples))


def recorded(path: Path, info: SourceInfo, samples: Iterable[PowerSample]) -> Iterator[PowerSample]:
    """Pass samples on and write each as it comes, so that a long recording needs no memory."""
    with _created(path) as stream:
        stream.write(msgspec.json.encode(_Header(kind=KIND, format=FORMAT, info=info)) + b"\n")
        for sample in samples:
            stream.write(msgspec.json.encode(sample) + b"\n")
            yield sample


def _created(path: Path) -> BinaryIO:
    try:
        return path.open("wb")
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be written ({error.strerror})") from error


def read_recording(path: Path, *, interval_s: float | None = None) -> Recording:
    """Read a recording or a tegrastats log.

    `interval_s` is the time between lines of a log without dates. Raises FileFormatError.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise FileFormatError(f"{path}: larger than {_MAX_BYTES} bytes; cut it into pieces")
        text = path.read_text("utf-8")
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{path}: not text; it should be JSON lines or a log") from error
    if text.lstrip().startswith("{"):
        return _from_json_lines(path, text.splitlines())
    return _from_log(path, text.splitlines(), interval_s)


def named_replay(recording: Recording) -> Recording:
    """The same recording, its source called "replay of ...", so that nobody takes it for live."""
    info = msgspec.structs.replace(recording.info, name=f"replay of {recording.info.name}")
    return msgspec.structs.replace(recording, info=info)


def _from_json_lines(path: Path, lines: list[str]) -> Recording:
    try:
        header = msgspec.json.decode(lines[0], type=_Header)
    except msgspec.MsgspecError as error:
        raise FileFormatError(f"{path}: line 1: {error}; record it again") from error
    if header.kind != KIND or header.format not in _READABLE:
        raise FileFormatError(
            f"{path}: this is {header.kind!r} format {header.format}, expected {KIND!r} {FORMAT}"
        )
    samples: list[PowerSample] = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            sample = msgspec.json.decode(line, type=PowerSample)
        except msgspec.MsgspecError as error:
            raise FileFormatError(
                f"{path}: line {number}: {error}; remove that line, or record it again"
            ) from error
        if samples and sample.t_ns < samples[-1].t_ns:
            raise FileFormatError(
                f"{path}: line {number} is earlier than the line before it; record it again"
            )
        samples.append(sample)
    if not samples:
        raise FileFormatError(f"{path}: holds no sample; record it again")
    return Recording(info=header.info, samples=tuple(samples))


def _from_log(path: Path, lines: list[str], interval_s: float | None) -> Recording:
    # Lines without rails keep their place, so that they leave a gap in time.
    filled = [line for line in lines if line.strip()]
    parsed = [(number, parse_line(line)) for number, line in enumerate(filled)]
    kept = [(number, line) for number, line in parsed if line.rails_mw]
    # All lines together: the last one is often cut where the recording was stopped.
    rails = tuple(dict.fromkeys(name for _, line in kept for name in line.rails_mw))
    rule = total_rule(rails)
    if rule is None:
        raise FileFormatError(
            f"{path}: no power rails with a known total in {len(filled)} lines; record it with "
            "`tegrastats --interval 100 --logfile FILE`, as root where a user sees no rails"
        )
    step_s, note = _interval_s(path, filled, interval_s)
    info = SourceInfo(
        name="tegrastats",
        sensor=path.name,
        scope=rule.scope,
        quality=rule.quality,
        total_rule=rule.text,
        rails=rails,
        resolution_mw=None,
        period_s=step_s,
        averaging_s=0.0011,
        has_counter=False,
        gain_class=None,
        notes=(note,),
    )
    samples = tuple(_sample(number, line, step_s, rule) for number, line in kept)
    return Recording(info=info, samples=samples)


def _sample(number: int, line: TegrastatsLine, step_s: float, rule: TotalRule) -> PowerSample:
    total_mw = rule.total_mw(line.rails_mw)
    return PowerSample(
        t_ns=round(number * step_s * 1e9),
        rails_mw=line.rails_mw,
        total_mw=total_mw,
        quality="unavailable" if total_mw is None else "suspect" if line.suspect else rule.quality,
        module_mw=THOR_MODULE.total_mw(line.rails_mw) if "VIN" in line.rails_mw else None,
        reason=why_no_total(rule, is_suspect=line.suspect, has_total=total_mw is not None),
    )


def _interval_s(path: Path, lines: list[str], stated_s: float | None) -> tuple[float, str]:
    if stated_s is not None and not 0 < stated_s < _LONGEST_INTERVAL_S:
        raise UnknownOptionError(
            f"the interval is {stated_s:g} s; state the seconds between two lines, such as 0.1"
        )
    if stated_s is not None:
        return stated_s, f"one line every {stated_s:g} s, as stated"
    first, last = (_date(line) for line in (lines[0], lines[-1]))
    if first is None or last is None or last <= first:
        raise FileFormatError(
            f"{path}: the lines carry no dates that advance; state the interval they were "
            "recorded at (lpvit power --interval SECONDS)"
        )
    step_s = (last - first).total_seconds() / (len(lines) - 1)
    return step_s, f"one line every {step_s:.3f} s, from the first and the last date"


def _date(line: str) -> datetime | None:
    found = _DATE.match(line)
    try:
        return datetime.strptime(found[1], "%m-%d-%Y %H:%M:%S") if found else None
    except ValueError:
        return None


class ReplaySource:
    """Plays a recording: sample after sample as fast as asked, or in its own time with `paced`.

    A paced one keeps the distances between the recorded times and starts again at the end, one
    mean distance later, so that it can stand in for a sensor of any length.
    """

    def __init__(self, recording: Recording, *, paced: bool = False) -> None:
        self._recording = recording
        self._paced = paced
        self._next = 0
        self._begin_ns = 0
        self._is_open = False

    @property
    def info(self) -> SourceInfo:
        assert self._is_open, "the source is not open"
        return self._recording.info

    @property
    def remaining(self) -> int:
        """Samples that have not been played, of a source that is not paced."""
        return len(self._recording.samples) - self._next

    def open(self) -> None:
        self._next, self._begin_ns, self._is_open = 0, time.monotonic_ns(), True

    def sample(self) -> PowerSample:
        """The next sample with its recorded time, or the present one with the present time."""
        assert self._is_open, "the source is not open"
        if self._paced:
            return self._present()
        samples = self._recording.samples
        if self._next == len(samples):
            return PowerSample(
                t_ns=samples[-1].t_ns,
                rails_mw={},
                total_mw=None,
                quality="unavailable",
                reason="the recording is at its end",
            )
        self._next += 1
        return samples[self._next - 1]

    def _present(self) -> PowerSample:
        samples = self._recording.samples
        first_ns, last_ns = samples[0].t_ns, samples[-1].t_ns
        mean_ns = (last_ns - first_ns) // max(1, len(samples) - 1)
        length_ns = max(1, last_ns - first_ns + mean_ns)
        rounds, at_ns = divmod(time.monotonic_ns() - self._begin_ns, length_ns)
        index = _last_at_or_before(samples, first_ns + at_ns)
        played = samples[index]
        t_ns = self._begin_ns + rounds * length_ns + played.t_ns - first_ns
        energy_mj = _counted_on(samples, played.energy_mj, rounds)
        gaps = played.counter_gaps + rounds * (samples[-1].counter_gaps - samples[0].counter_gaps)
        return msgspec.structs.replace(played, t_ns=t_ns, energy_mj=energy_mj, counter_gaps=gaps)

    def conditions(self) -> Conditions:
        return Conditions()

    def close(self) -> None:
        self._is_open = False


def _counted_on(
    samples: tuple[PowerSample, ...], energy_mj: float | None, rounds: int
) -> float | None:
    """A counter must not fall back when the recording starts again."""
    first, last = samples[0].energy_mj, samples[-1].energy_mj
    if energy_mj is None or first is None or last is None:
        return energy_mj
    return energy_mj + rounds * (last - first) * len(samples) / max(1, len(samples) - 1)


def _last_at_or_before(samples: tuple[PowerSample, ...], t_ns: int) -> int:
    low, high = 0, len(samples)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if samples[middle].t_ns <= t_ns else (low, middle)
    return low
