"""Which rail, or which sum of rails, is a Jetson's total power. Never a sum of everything.

The labels decide, not the name of the board, because custom carriers keep the module's rails:

    VIN                                        board input, with the carrier (AGX Thor)
    VDD_IN, POM_5V_IN                          module input (Orin Nano and NX, Xavier NX, TX, Nano)
    VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0     sum (AGX Orin has no input sensor); its
                                               VDDQ_VDD2_1V8AO is fed from VIN_SYS_5V0
    GPU + CPU + SOC + CV + VDDRQ + SYS5V       sum (AGX Xavier)

Sources: NVIDIA staff in the developer forum, threads 73608, 75574, 81016 and 200883; the
summation-disable note of the INA3221 device tree patch.
"""

from collections.abc import Iterable, Mapping

import msgspec

from lpvit_profilers.base import Quality, Scope

# A rail above its own total by more than this means wrong labels, not rounding.
_IMPLAUSIBLE = 1.05
# No Jetson runs on less; a lower total is a sensor that has not measured yet.
_LEAST_MW = 300.0


class TotalRule(msgspec.Struct, frozen=True, kw_only=True):
    """The rails whose sum is the total, and what that sum covers."""

    rails: tuple[str, ...]
    scope: Scope

    @property
    def quality(self) -> Quality:
        return "measured" if len(self.rails) == 1 else "summed"

    @property
    def text(self) -> str:
        return self.rails[0] if len(self.rails) == 1 else f"sum {'+'.join(self.rails)}"

    def total_mw(self, rails_mw: Mapping[str, float]) -> float | None:
        """The total, None when one of its rails has no reading."""
        found = [rails_mw[name] for name in self.rails if name in rails_mw]
        return float(sum(found)) if len(found) == len(self.rails) else None


_RULES = (
    TotalRule(rails=("VIN",), scope="board_input"),
    TotalRule(rails=("VDD_IN",), scope="module_input"),
    TotalRule(rails=("POM_5V_IN",), scope="module_input"),
    TotalRule(rails=("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"), scope="module"),
    TotalRule(rails=("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"), scope="module"),
)
# AGX Thor: what its module draws, beside the board input.
THOR_MODULE = TotalRule(rails=("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"), scope="module")


def total_rule(labels: Iterable[str]) -> TotalRule | None:
    """The first rule whose rails are all present, None when no total can be formed."""
    present = set(labels)
    return next((rule for rule in _RULES if present.issuperset(rule.rails)), None)


def why_suspect(rule: TotalRule) -> str:
    """What to say of readings that contradict each other."""
    return (
        f"the rails contradict {rule.text}; the labels may be swapped on this carrier, or the "
        "sensor has not measured yet"
    )


def why_no_total(rule: TotalRule, *, is_suspect: bool, has_total: bool) -> str | None:
    """The reason that goes with the sample of one line of tegrastats, None for a good one."""
    if not has_total:
        return f"the line lacks {rule.text}"
    return why_suspect(rule) if is_suspect else None


def is_suspect(
    total_mw: float | None, rails_mw: Mapping[str, float], *, step_mw: float | None = None
) -> bool:
    """Whether the readings contradict each other: a rail above the total it is part of.

    With a known sensor step, two steps are allowed for rounding, otherwise 5 % of the total.
    """
    if total_mw is None:
        return False
    limit_mw = total_mw * _IMPLAUSIBLE if step_mw is None else total_mw + 2 * step_mw
    return total_mw < _LEAST_MW or any(value > limit_mw for value in rails_mw.values())
