"""The first step: dense.onnx and device_profile.json, everything that this device was asked."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from lpvit_edge import files
from lpvit_edge import profile as profiling
from lpvit_edge.errors import FileFormatError
from lpvit_edge.job import Job
from lpvit_edge.progress import working
from lpvit_edge.records import DeviceProfile, GemmCost, LayerShape, PartialProfile, PowerNote
from lpvit_edge.steps import export_model
from lpvit_edge.whole_networks import measure_networks

if TYPE_CHECKING:
    from lpvit_profilers.base import SourceInfo
    from lpvit_profilers.sampler import Sampler

# Beyond these the profile says that it may not be trusted.
_DRIFT_LIMIT, _UNSTABLE_LIMIT, _SUM_LIMITS, _ERROR_LIMIT = 0.05, 0.2, (0.8, 1.25), 0.1


def profile_device(
    job: Job,
    *,
    seconds: float | None = None,
    network_seconds: float = 4.0,
    path: Path | None = None,
    tdp_w: float | None = None,
) -> DeviceProfile:
    """Measure this device on every form of every layer, and on the whole dense network.

    `seconds` bounds the layer forms, see lpvit_edge.profile; `path` is where the profile goes, by
    default device_profile.json in the job's folder; `tdp_w` allows estimated energies where there
    is no sensor. An interrupted profile leaves
    device_profile.partial.json there, from which the next call goes on.
    """
    from lpvit_edge.check import latency_record
    from lpvit_profilers.device import fingerprint, identify

    identity = identify()
    partial = _Partial(job, fingerprint(identity))
    dense_onnx = job.path("dense.onnx")
    with working("profile: export the dense network"):
        export_model(job, job.model.module, {}, dense_onnx)
    with _sensor(tdp_w) as (sensor, power):
        gemms = profiling.profile_gemms(
            job.walk.layers,
            engine=job.engine,
            threads=job.threads,
            patterns=job.patterns,
            seconds=seconds,
            kept=partial.kept(),
            keep=partial.keep,
            sensor=sensor,
        )
        networks = measure_networks(job, dense_onnx, gemms, seconds=network_seconds, sensor=sensor)
    layers, dense, rest = job.walk.layers, networks.dense, networks.rest_ms
    in_place = profiling.in_place_ms(dense_onnx, layers, engine=job.engine, threads=job.threads)
    drift = _drift(job, gemms)
    total = (rest + profiling.dense_layers_ms(layers, gemms)) / dense.median_ms
    record = DeviceProfile(
        device=msgspec.to_builtins(identity),
        fingerprint=fingerprint(identity),
        engine=job.engine,
        engine_version=profiling.engine_version(job.engine),
        precision="float32",
        threads=job.threads,
        batch=1,
        model=job.model.identity,
        layers=layers,
        gemms=gemms,
        dense=latency_record(dense),
        rest_ms=rest,
        sum_over_measured=total,
        in_place_ms=in_place,
        rank_correlation=profiling.rank_correlation(in_place, layers, gemms),
        drift=drift,
        power=_checked(power, gemms, sensor),
        reasons=tuple(
            _reasons(gemms, drift=drift, total=total, rest=rest, mixed_error=networks.mixed_error)
        ),
        rest_energy_mj=networks.rest_energy_mj,
        rest_weight_bytes=_rest_weight_bytes(dense_onnx, layers),
        factors=networks.factors,
        mixed_error=networks.mixed_error,
    )
    files.save(record, path or job.path("device_profile.json"))
    partial.done()
    return record


def _rest_weight_bytes(dense_onnx: Path, layers: tuple[LayerShape, ...]) -> int:
    from lpvit_edge.check import weight_bytes
    from lpvit_edge.layer_options import weight_bytes as layer_bytes

    return weight_bytes(dense_onnx) - round(sum(layer_bytes(x, "dense", 0.0) for x in layers))


class _Partial:
    """The costs measured so far, on disk while the profile runs."""

    def __init__(self, job: Job, fingerprint: str) -> None:
        self.path = job.path("device_profile.partial.json")
        self.empty = PartialProfile(
            fingerprint=fingerprint,
            model=job.model.identity,
            engine=job.engine,
            threads=job.threads,
            patterns=job.patterns,
            gemms=(),
            method=profiling.METHOD,
        )

    def kept(self) -> tuple[GemmCost, ...]:
        """What an interrupted run under the very same conditions left."""
        if not self.path.exists():
            return ()
        try:
            found = files.load(PartialProfile, self.path)
        except FileFormatError:  # of another version: nothing is lost but the time
            return ()
        same = msgspec.structs.replace(found, gemms=()) == self.empty
        return found.gemms if same else ()

    def keep(self, gemms: tuple[GemmCost, ...]) -> None:
        files.save(msgspec.structs.replace(self.empty, gemms=gemms), self.path)

    def done(self) -> None:
        self.path.unlink(missing_ok=True)


@contextmanager
def _sensor(
    tdp_w: float | None,
) -> "Iterator[tuple[tuple[Sampler, SourceInfo] | None, PowerNote]]":
    """The best power sensor of this machine, sampling, or None; and what to say about it.

    Only without a sensor, and only with a stated TDP, a model takes its place; its energies are
    marked "estimated".
    """
    from lpvit_profilers.base import opened
    from lpvit_profilers.detect import default_source, detect, why_none
    from lpvit_profilers.estimate import EstimatedSource
    from lpvit_profilers.sampler import Sampler

    source = default_source()
    if source is None and tdp_w is not None:
        source = EstimatedSource(tdp_w=tdp_w)
    if source is None:
        reason = (
            f"no power sensor can be read here ({why_none(detect())}); the profile carries latency "
            "only"
        )
        yield None, PowerNote(source=None, scope=None, quality="unavailable", reason=reason)
        return
    with opened(source) as sensor, Sampler(sensor) as sampler:
        info = sensor.info
        note = PowerNote(source=info.name, scope=info.scope, quality=info.quality, reason=None)
        yield (sampler, info), note


def _checked(
    note: PowerNote, gemms: tuple[GemmCost, ...], sensor: "tuple[Sampler, SourceInfo] | None"
) -> PowerNote:
    """The note after the measurement: what the sensor did not tell, and whether to believe it."""
    if sensor is None:
        return note
    silent = sum(gemm.energy_mj is None for gemm in gemms)
    suspect = sensor[0].was_suspect
    said = [
        *(["some readings contradict each other (a rail above its own total)"] if suspect else []),
        *([f"no energy for {silent} of {len(gemms)} forms"] if silent else []),
    ]
    quality = "unavailable" if silent == len(gemms) else "suspect" if suspect else note.quality
    return msgspec.structs.replace(note, quality=quality, reason="; ".join(said) or None)


def _drift(job: Job, gemms: tuple[GemmCost, ...]) -> float | None:
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


def _reasons(
    gemms: tuple[GemmCost, ...],
    *,
    drift: float | None,
    total: float,
    rest: float,
    mixed_error: float | None,
) -> Iterator[str]:
    """Each completes "the profile may not be trusted because ..."."""
    unstable = sum(not gemm.stable for gemm in gemms)
    if unstable > _UNSTABLE_LIMIT * len(gemms):
        yield f"{unstable} of {len(gemms)} forms were unstable; stop other programs, fix the clocks"
    lost = sum(gemm.latency_ms == 0.0 and gemm.sparsity < 1.0 for gemm in gemms)
    if lost:
        yield f"{lost} forms took no longer than no layer at all; give the profile more time"
    if rest == 0.0:
        yield "the emptied network took no longer than its empty layers; measure again in quiet"
    if drift is None:
        yield "the largest layer's time drowned in its scatter; stop other programs"
    elif abs(drift) > _DRIFT_LIMIT:
        yield f"the same layer took {drift:+.0%} at the end; let the machine come to rest"
    if not _SUM_LIMITS[0] <= total <= _SUM_LIMITS[1]:
        yield f"the parts add up to {total:.2f} of the whole network; take layer times as relative"
    if mixed_error is not None and abs(mixed_error) > _ERROR_LIMIT:
        yield f"a network of mixed forms was predicted {mixed_error:+.0%} off; profile in quiet"
