"""What can be written to the nodes of an OPC UA server, in the type that each node has.

Texts go to a String, numbers to a number of any size (an integer that does not fit is taken modulo
what fits, so that counters and heartbeats run on), yes and no to a Boolean.
"""

from typing import Any

from lpvit_edge.errors import SinkError
from lpvit_edge.line.sinks.tally import Tally, Timely

_VERDICTS = {"ok": 1, "reject": 2, "safe": 3}
_ACTIONS = {"pass": 1, "reject": 2}
OFFLINE, ONLINE, HELD = 0, 1, 2
_STATES = ("offline", "online", "held")
_BITS = {
    "SByte": 7, "Byte": 8, "Int16": 15, "UInt16": 16,
    "Int32": 31, "UInt32": 32, "Int64": 63, "UInt64": 64,
}  # fmt: skip
# As a text, and as a number.
Content = tuple[str, float]
NO_REJECT: dict[str, Content] = {"reject": ("false", 0.0)}


def verdict_values(timely: Timely) -> dict[str, Content]:
    """What a verdict says, but for `number`, which is written after all else."""
    record = timely.record
    likeliest = max(record.probabilities, default=0.0)
    place = record.probabilities.index(likeliest) + 1 if record.probabilities else 0
    confidence = record.confidence or 0.0
    rejects = record.action == "reject"
    return {
        "part": (record.part_id or str(record.number), record.number),
        "verdict": (record.verdict, _VERDICTS[record.verdict]),
        "action": (record.action, _ACTIONS[record.action]),
        "reject": (str(rejects).lower(), float(rejects)),
        "label": (record.label or "", place),
        "confidence": (f"{confidence:.4f}", confidence),
        "reason": (record.reason or "", 0.0),
        "age_ms": (f"{timely.age_ms:.0f}", timely.age_ms),
    }


def count_values(tally: Tally) -> dict[str, Content]:
    """Parts of this run, told or not, and verdicts that were too old to be told."""
    counts = {
        "ok_count": tally.ok,
        "reject_count": tally.reject,
        "safe_count": tally.safe,
        "missed_count": tally.missed,
    }
    return {name: (str(value), value) for name, value in counts.items()}


def state_values(state: int, heart: int) -> dict[str, Content]:
    """Whether the line judges, and that it lives."""
    is_online = state == ONLINE
    values: dict[str, Content] = {
        "heartbeat": (str(heart), heart),
        "state": (_STATES[state], state),
        "judging": (str(is_online).lower(), float(is_online)),
    }
    return values if is_online else values | NO_REJECT


def typed(content: Content, type_name: str, *, field: str, node: str) -> Any:
    """The content as Python's value for that type. Raises SinkError where the type is no match."""
    text, number = content
    if type_name == "String":
        return text
    if type_name in ("Float", "Double"):
        return float(number)
    if type_name == "Boolean" and field in ("reject", "judging"):
        return bool(number)
    if type_name in _BITS:
        return round(number) % 2 ** _BITS[type_name]
    raise SinkError(f"nodes.{field} = {node}: a node of type {type_name} cannot hold that")
