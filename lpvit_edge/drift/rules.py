"""What to do about drift, as a TOML table.

[drift]
yellow_at = 1e5        # frames between false yellow alarms, in the mean, at least
red_at = 1e7
sample = 50            # frames kept for labelling at each alarm
samples = 20           # alarms whose frames are kept, the latest ones
fall_back = true       # red: run the denser bundle, where there is one
fallback = "/path"     # its folder; with `lpvit run --store` it is the store's dense bundle
retrain_request = true # red: write retrain.json beside the sample
watch_labels = true    # yellow, never red, where one class comes more often than before
"""

from pathlib import Path
from typing import Annotated, Any

import msgspec

from lpvit_edge.deps import require
from lpvit_edge.errors import UnknownOptionError

_Frames = Annotated[float, msgspec.Meta(gt=1, le=1e15)]


class Rules(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The [drift] table, with its defaults.

    `delta` is the risk, over the choice of the reference images, that the stated rate of false
    alarms does not hold for comparisons with the reference. `hold` frames without renewed evidence
    end an alarm.
    """

    yellow_at: _Frames = 1e5
    red_at: _Frames = 1e7
    delta: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.05
    window: Annotated[int, msgspec.Meta(ge=16, le=65536)] = 1024
    hold: Annotated[int, msgspec.Meta(ge=1)] = 2000
    sample: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 50
    samples: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 20
    fall_back: bool = True
    fallback: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    retrain_request: bool = True
    watch_labels: bool = True

    def __post_init__(self) -> None:
        """Refuse rules that contradict each other, wherever they are read."""
        if self.red_at < self.yellow_at:
            raise ValueError(
                f"red_at is {self.red_at:g} and yellow_at {self.yellow_at:g}; red needs at least "
                "as much evidence as yellow"
            )
        if self.fallback is not None and not self.fall_back:
            raise ValueError(
                f"fallback = {self.fallback!r} names a denser bundle and fall_back = false never "
                "runs it; leave one of them out"
            )


def rules_from(table: dict[str, Any]) -> Rules:
    """The rules of a [drift] table. Raises UnknownOptionError naming the key."""
    try:
        return msgspec.convert(table, Rules)
    except msgspec.ValidationError as error:
        raise UnknownOptionError(f"[drift]: {error}") from error


def read_rules(path: Path) -> Rules:
    """The rules in the [drift] table of a TOML file; the defaults where it has none."""
    import sys

    toml = require("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        document = toml.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnknownOptionError(f"{path}: cannot be read ({error.strerror})") from error
    except (toml.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UnknownOptionError(f"{path}: {error}") from error
    return rules_from(document.get("drift", {}))
