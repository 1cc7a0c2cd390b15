"""One frame's energy in parts: what the device draws anyway, the engine, and the rest."""

from lpvit_edge.dashboard.identity import CheckedEnergy
from lpvit_edge.dashboard.snapshot import FrameEnergy


def frame_energy(
    *,
    power_w: float | None,
    scope: str | None,
    per_s: float,
    idle_w: float | None,
    checked: CheckedEnergy,
) -> FrameEnergy:
    """Parts that add up to the whole, or the whole alone with what keeps it from being divided.

    `power_w` is the mean while `per_s` frames a second came, measured with `scope`; `idle_w` what
    was drawn while none came. What `checked` measured of an inference holds the idle power of that
    time, which is taken off: it must not count twice.
    """
    if per_s <= 0.0:
        return FrameEnergy(reason="no frames at the moment")
    if power_w is None:
        return FrameEnergy(reason="power is not measured here")
    gross_j = power_w / per_s
    if idle_w is None:
        reason = "the idle power is unknown: no ten seconds without a frame so far"
        return FrameEnergy(gross_j=gross_j, reason=reason)
    idle_j = idle_w / per_s
    if checked.gross_j is None or checked.latency_s is None:
        return FrameEnergy(gross_j=gross_j, idle_j=idle_j, reason=checked.reason)
    if checked.scope != scope:
        reason = f"the check measured {checked.scope}, here it is {scope}"
        return FrameEnergy(gross_j=gross_j, idle_j=idle_j, reason=reason)
    model_j = checked.gross_j - idle_w * checked.latency_s
    rest_j = gross_j - idle_j - model_j
    if model_j < 0 or rest_j < 0:
        reason = "idle and the checked model do not fit into what is measured now"
        return FrameEnergy(gross_j=gross_j, idle_j=idle_j, reason=reason)
    return FrameEnergy(gross_j=gross_j, idle_j=idle_j, model_j=model_j, capture_j=rest_j)
