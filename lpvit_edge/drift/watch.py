"""The drift watch: one call a frame, a state at any time. It decides nothing about a part."""

from collections import deque
from typing import TYPE_CHECKING, Literal

import numpy as np

from lpvit_edge.drift.diagnosis import TEXT, Cause, diagnose
from lpvit_edge.drift.evidence import CHANNELS, Evidence, bins_of, rank_bounds, smoothed_p
from lpvit_edge.drift.own_past import NAMES, OwnPast
from lpvit_edge.drift.past import Past
from lpvit_edge.drift.reference import Reference
from lpvit_edge.drift.rules import Rules
from lpvit_edge.errors import MismatchError
from lpvit_edge.records import Part

if TYPE_CHECKING:
    from numpy.typing import NDArray

Level = Literal["green", "yellow", "red"]
_STRANGE_P = 0.01
_ALL = (*(channel.name for channel in CHANNELS), *NAMES)


class DriftState(Part, frozen=True, kw_only=True):
    """Where the watch stands after a frame.

    `evidence` is the mean number of frames in which a healthy line would show as much once, by
    channel; an alarm is raised when one reaches its threshold. `distance` is this frame's squared
    Mahalanobis distance over the number of features (about 1 is usual).
    """

    frames: int
    level: Level
    cause: Cause | None  # of the alarm that holds
    text: str | None
    distance: float
    strange: bool  # embedding in the last hundredth, or of the class that comes more often
    strange_share: float  # of the recent window
    evidence: dict[str, float]
    yellow_at: float
    red_at: float
    raised: Level | None = None  # an alarm that this very frame raised


class DriftWatch:
    """Follows one line. Not thread-safe: it belongs to the thread that feeds it."""

    def __init__(self, reference: Reference, rules: Rules, *, seed: int = 0) -> None:
        self._reference = reference
        self._rules = rules
        self._seen = np.zeros_like(reference.counts)  # of the line alone: exchangeable with it
        heldout = reference.counts[:, 0].sum(axis=1)
        self._usual_share = heldout / heldout.sum()
        self._frames_of = np.zeros(len(heldout), np.int64)
        self._bounds = _bounds(reference, delta=rules.delta)
        self._generator = np.random.default_rng(seed)
        self._evidence = Evidence()
        self._own = OwnPast(len(heldout))
        self._recent: deque[tuple[NDArray[np.float32], bool]] = deque(maxlen=rules.window)
        self._strange = 0  # of the recent ones
        self._level: Level = "green"
        self._cause: Cause | None = None
        self._held = 0
        self._rising = 0
        self.frames = 0

    def add(
        self,
        features: "NDArray[np.float32]",
        probabilities: "NDArray[np.float32]",
        statistics: "NDArray[np.float32]",
    ) -> DriftState:
        """One frame: features (d,), probabilities (C,), image statistics (5,).

        Raises MismatchError when they are not of the reference's model.
        """
        self._refuse_other_model(features, probabilities)
        category, scores = self._reference.scores(features, probabilities, statistics)
        strange = self._bet(category, bins_of(scores))
        of_all = self._own.add(category, float(scores[0]), self._generator)
        strange = strange or bool(of_all[0] <= _STRANGE_P)
        sd = np.maximum(self._reference.statistics_sd[category], 1e-6)
        shift = (statistics - self._reference.statistics_mean[category]) / sd
        self._remember(shift, strange)
        self.frames += 1
        raised = self._judge()
        if self._cause == "class mix":
            strange = category == self._rising
        return self._state(float(scores[0]), strange, raised)

    def _remember(self, shift: "NDArray[np.float32]", strange: bool) -> None:
        if len(self._recent) == self._recent.maxlen:
            self._strange -= self._recent[0][1]
        self._recent.append((shift, strange))
        self._strange += strange

    def past(self) -> Past:
        """What the line has shown: seen (categories, channels, bins), of (categories,), distances.

        Of the line alone, and never of the reference.
        """
        return {"seen": self._seen, **self._own.past()}

    def remember(self, past: Past) -> None:
        """Go on from what the line had shown before it was started anew, without evidence."""
        self._seen[:] = past["seen"]
        self._own.remember(past)
        self._frames_of[:] = past["of"]

    def clear(self) -> None:
        """Forget alarms and evidence, after a repair or when another product comes."""
        self._evidence.clear()
        self._own.clear()
        self._recent.clear()
        self._strange = 0
        self._level, self._cause, self._held = "green", None, 0

    def _bet(self, category: int, bins: "NDArray[np.int64]") -> bool:
        """Rank the frame, stake on it, learn it; whether its embedding is strange."""
        rows = np.arange(len(bins))
        seen, fixed = self._seen[category], self._reference.counts[category]
        p_seen = smoothed_p(seen, bins, self._generator.random(len(bins)))
        cumulated = np.cumsum(fixed, axis=1)
        up_to, n = cumulated[rows, bins], cumulated[:, -1]
        at_least = n - up_to + fixed[rows, bins]
        self._frames_of[category] += 1
        if self._is_rare(category):
            at_least_p = below_p = np.ones(len(bins))  # no bet
        else:
            bound = self._bounds[category]
            at_least_p, below_p = bound[at_least], bound[up_to]
        self._evidence.add(p_seen, at_least_p, below_p)
        seen[rows, bins] += 1
        return bool((at_least[0] + 1) / (n[0] + 1) <= _STRANGE_P)

    def _is_rare(self, category: int) -> bool:
        """Whether the line predicts a class far less often than the reference did.

        Where a defect is rare, most of what is taken for it are good parts misjudged, and they
        differ from the reference's true ones although nothing has changed.
        """
        share = self._frames_of[category] / self._frames_of.sum()
        return bool(share < 0.5 * self._usual_share[category])

    def _judge(self) -> Level | None:
        """Raise an alarm where a threshold is reached; lower it when nothing renewed it."""
        self._held += 1
        levels = self._levels()
        # Another mix of classes is a matter for people, not for another engine: never red.
        mix = levels.pop("labels")
        if max(levels.values()) >= self._rules.red_at:
            return self._alarm("red")
        if max(mix, *levels.values()) >= self._rules.yellow_at and self._level == "green":
            return self._alarm("yellow")
        if self._level != "green" and self._held > self._rules.hold:
            self._end()
        return None

    def _end(self) -> None:
        """The alarm ends; another mix of classes says nothing against the other evidence."""
        if self._cause != "class mix":
            self.clear()
            return
        self._own.clear_labels()
        self._level, self._cause, self._held = "green", None, 0

    def _alarm(self, level: Level) -> Level | None:
        renewed = self._level == level
        self._cause = self._diagnosis(level)
        self._level, self._held = level, 0
        if level == "red":
            self._evidence.clear()  # it has to be earned again, or the alarm ends
            self._own.clear()
        return None if renewed else level

    def _levels(self) -> dict[str, float]:
        """Evidence by channel, shared among all of them: the mean frames to a false alarm."""
        levels = np.concatenate([self._evidence.level(), self._own.level()]) / len(_ALL)
        if not self._rules.watch_labels:
            levels[-1] = 0.0
        return dict(zip(_ALL, levels.tolist(), strict=True))

    def _diagnosis(self, level: Level) -> Cause:
        levels = self._levels()
        if level == "red":
            del levels["labels"]
        name = max(levels, key=lambda name: levels[name])
        if name == "labels":
            self._rising = self._own.rising()
            return "class mix"
        own = name in NAMES
        started = self._own.started(name) if own else self._evidence.started(_ALL.index(name))
        length = max(8, started)
        recent = list(self._recent)[-length:]
        shifts = np.array([shift for shift, _ in recent], np.float64)
        strange = np.array([is_strange for _, is_strange in recent])
        return diagnose(shifts, strange)

    def _state(self, distance: float, strange: bool, raised: Level | None) -> DriftState:
        return DriftState(
            frames=self.frames,
            level=self._level,
            cause=self._cause,
            text=None if self._cause is None else TEXT[self._cause],
            distance=distance,
            strange=strange,
            strange_share=self._strange / max(1, len(self._recent)),
            evidence=self._levels(),
            yellow_at=self._rules.yellow_at,
            red_at=self._rules.red_at,
            raised=raised,
        )

    def _refuse_other_model(
        self, features: "NDArray[np.float32]", probabilities: "NDArray[np.float32]"
    ) -> None:
        C, d = self._reference.means.shape
        if features.shape != (d,) or probabilities.shape != (C,):
            raise MismatchError(
                f"a frame has {features.shape} features and {probabilities.shape} classes, the "
                f"reference ({d},) and ({C},); run `lpvit check` for this engine"
            )


def _bounds(reference: Reference, *, delta: float) -> "list[NDArray[np.float64]]":
    """Bounds by rank of each category; delta is shared by categories, channels and sides."""
    totals = reference.counts[:, 0].sum(axis=1)
    share = delta / (2 * len(CHANNELS) * len(totals))
    return [rank_bounds(int(n), delta=share) for n in totals]
