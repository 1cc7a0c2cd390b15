"""What to do about drift, as a TOML table.

[drift]
yellow_at = 1e5        # frames between false yellow alarms, in the mean, at least
red_at = 1e7
sample = 50            # frames kept for labelling at each alarm
fall_back = true       # red: run the denser bundle, where there is one
retrain_request = true # red: write retrain.json beside the sample
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
    fall_back: bool = True
    retrain_request: bool = True


def rules_from(table: dict[str, Any]) -> Rules:
    """The rules of a [drift] table. Raises UnknownOptionError naming the key."""
    try:
        rules = msgspec.convert(table, Rules)
    except msgspec.ValidationError as error:
        raise UnknownOptionError(f"[drift]: {error}") from error
    if rules.red_at < rules.yellow_at:
        raise UnknownOptionError(
            f"[drift]: red_at is {rules.red_at:g} and yellow_at {rules.yellow_at:g}; red needs at "
            "least as much evidence as yellow"
        )
    return rules


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
