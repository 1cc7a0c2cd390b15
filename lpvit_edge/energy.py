"""Energy per image, when this machine has a sensor that can be believed."""

from collections.abc import Callable

from lpvit_edge.records import Energy


def unavailable(reason: str) -> Energy:
    """No energy, and why."""
    return Energy(
        per_image_mj=None,
        ci95_mj=None,
        mean_power_mw=None,
        source=None,
        scope=None,
        quality="unavailable",
        reason=reason,
    )


def energy_of(run: Callable[[], object]) -> Energy:
    """Measure the energy of one call, or say why it cannot be measured here."""
    return unavailable("no power sensor on this machine")
