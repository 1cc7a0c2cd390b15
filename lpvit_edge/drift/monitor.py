"""The drift watch behind a line: feeds it frames, tells of alarms, collects what to label.

Called from the hub's thread, never from the line's. At a yellow alarm the frames that follow and
are strange to the model are written to a folder, at a red one a request to retrain stands beside
them and the line is told, so that it can go back to the denser bundle.
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from lpvit_edge import files
from lpvit_edge.dashboard.snapshot import DriftNow, ShadowNow
from lpvit_edge.deps import require
from lpvit_edge.drift.image_statistics import image_statistics
from lpvit_edge.drift.past import is_due, load_past, save_past
from lpvit_edge.drift.reference import Reference
from lpvit_edge.drift.rules import Rules
from lpvit_edge.drift.watch import DriftState, DriftWatch
from lpvit_edge.errors import FileFormatError, MismatchError
from lpvit_edge.records import Part, Record

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lpvit_edge.line.records import FrameRecord, Severity

Tell = Callable[[str, str, "Severity", float], None]  # TelemetryHub.publish_event
_NOT_YET = "no frame has been looked at yet"
_NO_SHADOW = "no dense engine runs beside this line"


class SampledFrame(Part, frozen=True, kw_only=True):
    """One picture of a sample, and what the engine said of it."""

    file: str
    frame: int
    label: str | None
    confidence: float | None
    distance: float


class DriftSample(Record, frozen=True, kw_only=True):
    """Pictures to look at and label, and what the watch saw in them."""

    KIND: ClassVar[str] = "drift-sample"

    at: float  # seconds since 1970, UTC
    bundle: str
    cause: str
    text: str
    frames: int  # seen by the watch so far
    evidence: dict[str, float]
    sample: tuple[SampledFrame, ...]


class RetrainRequest(DriftSample, frozen=True, kw_only=True):
    """Why a model should be trained again, with the pictures to label first."""

    KIND: ClassVar[str] = "retrain-request"


class DriftMonitor:
    """Implements lpvit_edge.dashboard.hub.Watcher."""

    def __init__(
        self,
        reference: Reference,
        rules: Rules,
        *,
        folder: Path,
        tell: Tell,
        fall_back: Callable[[str], None] | None = None,
        bundle: str | None = None,
        past: Path | None = None,
    ) -> None:
        """`bundle` is the version that the reference is of; frames of others are passed over.

        `past` is the file that keeps what the line has shown over restarts.
        """
        self._watch = DriftWatch(reference, rules)
        self._rules = rules
        self._folder = folder
        self._tell = tell
        self._fall_back = fall_back
        self._bundle = bundle
        self._state: DriftState | None = None
        self._problem: str | None = None
        self._sample: list[SampledFrame] = []
        self._sample_folder: Path | None = None
        self._past = past
        self._written = self._remembered()

    def _remembered(self) -> int:
        """Frames of the line's past that were read; a damaged file is no past."""
        if self._past is None:
            return 0
        try:
            found = load_past(self._past, like=self._watch.past())
        except FileFormatError as error:
            self._tell("drift", str(error), "warning", time.time())
            return 0
        if found is None:
            return 0
        self._watch.remember(found)
        return int(found["of"].sum())

    def _keep_past(self, *, anyhow: bool = False) -> None:
        frames = int(self._watch.past()["of"].sum())
        if self._past is None or not (anyhow or is_due(frames, self._written)):
            return
        self._written = frames
        try:
            save_past(self._watch.past(), self._past)
        except OSError as error:  # a full disk must not end the watch
            self._tell("disk", f"the line's past is not kept: {error}", "warning", time.time())

    def see(
        self,
        record: "FrameRecord",
        embedding: "NDArray[np.float32] | None",
        image: "NDArray[np.uint8] | None",
    ) -> None:
        """One frame; one that was never judged or seen is passed over."""
        if embedding is None or image is None or not record.probabilities:
            return
        if self._bundle is not None and record.bundle != self._bundle:
            return  # decided before another bundle took over
        probabilities = np.asarray(record.probabilities, np.float32)
        try:
            state = self._watch.add(embedding.ravel(), probabilities, image_statistics(image))
        except MismatchError as error:
            self._complain(str(error), record.captured_at)
            return
        self._state = state
        self._keep_past()
        if state.raised is not None:
            self._raise(state, record)
        if state.level != "green" and state.strange:
            self._keep(record, image, state)

    def drift_now(self, *, not_watched: int) -> tuple[DriftNow | None, str | None]:
        """The state for the page, or why there is none."""
        state = self._state
        if self._problem is not None or state is None:
            return None, self._problem or _NOT_YET
        return DriftNow(
            level=state.level,
            text=state.text,
            distance=state.distance,
            strange_share=state.strange_share,
            evidence=state.evidence,
            yellow_at=state.yellow_at,
            red_at=state.red_at,
            frames=state.frames,
            not_watched=not_watched,
        ), None

    def shadow_now(self) -> tuple[ShadowNow | None, str | None]:
        """Nothing: no other engine runs here."""
        return None, _NO_SHADOW

    def close(self) -> None:
        """Keep what the line has shown, for the next start."""
        self._keep_past(anyhow=True)

    def _raise(self, state: DriftState, record: "FrameRecord") -> None:
        severity: Severity = "alarm" if state.raised == "red" else "warning"
        text = f"{state.raised}: {state.text}"
        if state.cause == "class mix":
            text += f" (here {record.label})"
        self._tell("drift", text, severity, record.captured_at)
        if state.raised == "yellow" or self._sample_folder is None:
            self._begin_sample(record)
        if state.raised == "red":
            self._note(state, record)
            if self._rules.fall_back and self._fall_back is not None:
                self._fall_back(f"red drift alarm, {state.text}")

    def _begin_sample(self, record: "FrameRecord") -> None:
        """In a folder of its own; the oldest ones make room, or they would fill the disk."""
        self._sample = []
        self._sample_folder = self._folder / f"drift-{record.number:09d}"
        try:
            by_age = sorted(self._folder.glob("drift-*"), key=lambda path: path.stat().st_mtime)
        except OSError as error:
            text = f"old samples are not removed: {error}"
            self._tell("disk", text, "warning", record.captured_at)
            return
        others = [path for path in by_age if path != self._sample_folder]
        for path in others[: max(0, len(others) - self._rules.samples + 1)]:
            shutil.rmtree(path, ignore_errors=True)

    def _keep(self, record: "FrameRecord", image: "NDArray[np.uint8]", state: DriftState) -> None:
        """Write a strange picture, as long as the sample is not full."""
        if self._sample_folder is None or len(self._sample) >= self._rules.sample:
            return
        name = f"{record.number:09d}.png"
        picture = require("PIL.Image").fromarray(image)
        try:
            files.replace_atomic(
                self._sample_folder / name, lambda temporary: picture.save(temporary, format="PNG")
            )
        except OSError as error:  # a full disk must not end the watch
            self._tell("disk", f"no sample kept: {error}", "warning", record.captured_at)
            self._sample_folder = None
            return
        self._sample.append(
            SampledFrame(
                file=name,
                frame=record.number,
                label=record.label,
                confidence=record.confidence,
                distance=state.distance,
            )
        )
        self._note(state, record)

    def _note(self, state: DriftState, record: "FrameRecord") -> None:
        """Write the list of the pictures, again with each that is added; at red a request too."""
        if self._sample_folder is None:
            return
        kinds: list[tuple[type[DriftSample | RetrainRequest], str]] = [(DriftSample, "sample.json")]
        if state.level == "red" and self._rules.retrain_request:
            kinds.append((RetrainRequest, "retrain.json"))
        try:
            for kind, name in kinds:
                noted = kind(
                    at=record.captured_at,
                    bundle=record.bundle,
                    cause=state.cause or "unknown content",
                    text=state.text or "",
                    frames=state.frames,
                    evidence=state.evidence,
                    sample=tuple(self._sample),
                )
                files.save(noted, self._sample_folder / name)
        except OSError as error:
            self._tell("disk", f"the sample has no list: {error}", "warning", record.captured_at)
            self._sample_folder = None

    def _complain(self, problem: str, at: float) -> None:
        if self._problem is None:
            self._tell("drift", problem, "alarm", at)
        self._problem = problem[:500]
