"""Why a device profile may not be trusted, each reason with its numbers."""

from collections.abc import Iterator, Mapping

from lpvit_edge import profile as profiling
from lpvit_edge.job import Job
from lpvit_edge.records import GemmCost, LayerShape
from lpvit_edge.whole_networks import Networks

# Beyond these the profile says that it may not be trusted.
_DRIFT_LIMIT, _UNSTABLE_LIMIT, _ERROR_LIMIT = 0.05, 0.2, 0.1
# Sum over whole, and k of a pattern: with more between them layers do not add up.
_SUM_LIMITS = _FACTOR_LIMITS = (0.8, 1.25)


def drift_of(job: Job, gemms: tuple[GemmCost, ...]) -> float | None:
    """Relative change of the largest dense layer since it was timed first.

    None when its first time drowned in the scatter.
    """
    from lpvit_edge.layer_networks import layer_forms

    largest = layer_forms(job.walk.layers, (), ())[0]
    before = next(g.latency_ms for g in gemms if g.pattern == "dense" and _same(g, largest.shape))
    seconds = profiling.DEFAULT_SECONDS
    after = profiling.measure_form(largest, job.engine, job.threads, seconds).latency_ms
    return after / before - 1.0 if before > 0.0 else None


def _same(gemm: GemmCost, shape: LayerShape) -> bool:
    fields = ("tokens", "in_features", "out_features", "activation")
    return all(getattr(gemm, field) == getattr(shape, field) for field in fields)


def reasons(
    gemms: tuple[GemmCost, ...], networks: Networks, *, drift: float | None, total: float
) -> Iterator[str]:
    """Each completes "the profile may not be trusted because ..."."""
    yield from _of_forms(gemms)
    if networks.rest_ms == 0.0:
        yield "the emptied network took no longer than its empty layers; measure again in quiet"
    if drift is None:
        yield "the largest layer's time drowned in its scatter; stop other programs"
    elif abs(drift) > _DRIFT_LIMIT:
        yield f"the same layer took {drift:+.0%} at the end; let the machine come to rest"
    if not _SUM_LIMITS[0] <= total <= _SUM_LIMITS[1]:
        yield f"the parts add up to {total:.2f} of the whole network; take layer times as relative"
    joules = networks.energy_sum
    if joules is not None and not _SUM_LIMITS[0] <= joules <= _SUM_LIMITS[1]:
        yield (
            f"the energies of the parts add up to {joules:.2f} of the whole network's; take layer "
            "energies as relative"
        )
    yield from _of_factors(gemms, networks.factors)
    error = networks.mixed_error
    if error is not None and abs(error) > _ERROR_LIMIT:
        yield f"a network of mixed forms was predicted {error:+.0%} off; profile in quiet"


def _of_forms(gemms: tuple[GemmCost, ...]) -> Iterator[str]:
    unstable = sum(not gemm.stable for gemm in gemms)
    if unstable > _UNSTABLE_LIMIT * len(gemms):
        yield f"{unstable} of {len(gemms)} forms were unstable; stop other programs, fix the clocks"
    lost = sum(gemm.latency_ms == 0.0 and gemm.sparsity < 1.0 for gemm in gemms)
    if lost:
        yield f"{lost} forms took no longer than no layer at all; give the profile more time"


def _of_factors(gemms: tuple[GemmCost, ...], factors: Mapping[str, float]) -> Iterator[str]:
    """A k far from 1 stays in use: it is the only measurement of these layers in a network.

    What it says of a layer is then no longer a time but a rank, and the reader has to know.
    """
    used = sorted({gemm.pattern for gemm in gemms if gemm.sparsity < 1.0})
    if unknown := [pattern for pattern in used if pattern not in factors]:
        yield f"no factor k for {', '.join(unknown)}, and 1 is taken for it; profile in quiet"
    low, high = _FACTOR_LIMITS
    if far := [p for p in used if p in factors and not low <= factors[p] <= high]:
        times = ", ".join(f"{pattern} {factors[pattern]:.2f} times" for pattern in far)
        yield (
            f"layers took longer or shorter in a network than alone: {times} ({low:g} to {high:g} "
            "can be believed); take their times as relative, and profile again in quiet"
        )
