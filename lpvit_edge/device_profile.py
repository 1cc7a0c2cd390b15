"""The first step: dense.onnx and device_profile.json, everything that this device was asked."""

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from lpvit_edge import files
from lpvit_edge import profile as profiling
from lpvit_edge.in_place import in_place_ms
from lpvit_edge.job import Job
from lpvit_edge.profile_doubts import drift_of, reasons
from lpvit_edge.profile_partial import Partial
from lpvit_edge.profile_power import checked, is_suspect, origin, sensor_of
from lpvit_edge.progress import working
from lpvit_edge.records import DeviceProfile, GemmCost, LayerShape, PowerNote
from lpvit_edge.steps import export_model
from lpvit_edge.whole_networks import Networks, measure_networks

if TYPE_CHECKING:
    from lpvit_profilers.device import DeviceIdentity


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
    from lpvit_profilers.device import fingerprint, identify

    identity = identify()
    dense_onnx = job.path("dense.onnx")
    with working("profile: export the dense network"):
        export_model(job, job.model.module, {}, dense_onnx)
    with sensor_of(job.engine, tdp_w) as (sensor, power):
        partial = Partial(
            job,
            fingerprint(identity),
            power=origin(sensor),
            is_suspect=lambda: is_suspect(sensor),
        )
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
    power = checked(power, gemms, sensor, was_suspect=partial.was_suspect)
    record = _record(job, identity, dense_onnx, gemms=gemms, networks=networks, power=power)
    files.save(record, path or job.path("device_profile.json"))
    partial.done()
    return record


def _record(
    job: Job,
    identity: "DeviceIdentity",
    dense_onnx: Path,
    *,
    gemms: tuple[GemmCost, ...],
    networks: Networks,
    power: PowerNote,
) -> DeviceProfile:
    """All of it in one file, with what the parts say about each other."""
    from lpvit_edge.check import latency_record
    from lpvit_engines import resolve_precision
    from lpvit_profilers.device import fingerprint

    layers = job.walk.layers
    in_place = in_place_ms(dense_onnx, layers, engine=job.engine, threads=job.threads)
    drift = drift_of(job, gemms)
    parts_ms = networks.rest_ms + profiling.dense_layers_ms(layers, gemms)
    total = parts_ms / networks.dense.median_ms
    return DeviceProfile(
        device=msgspec.to_builtins(identity),
        fingerprint=fingerprint(identity),
        engine=job.engine,
        engine_version=profiling.engine_version(job.engine),
        precision=resolve_precision(job.engine, "default"),
        threads=job.threads,
        batch=1,
        model=job.model.identity,
        layers=layers,
        gemms=gemms,
        dense=latency_record(networks.dense),
        rest_ms=networks.rest_ms,
        sum_over_measured=total,
        in_place_ms=in_place,
        rank_correlation=profiling.rank_correlation(in_place, layers, gemms),
        drift=drift,
        power=power,
        reasons=tuple(reasons(gemms, networks, drift=drift, total=total)),
        rest_energy_mj=networks.rest_energy_mj,
        rest_weight_bytes=_rest_weight_bytes(dense_onnx, layers),
        factors=networks.factors,
        mixed_error=networks.mixed_error,
        energy_sum_over_measured=networks.energy_sum,
    )


def _rest_weight_bytes(dense_onnx: Path, layers: tuple[LayerShape, ...]) -> int:
    from lpvit_edge.check import weight_bytes
    from lpvit_edge.layer_options import weight_bytes as layer_bytes

    return weight_bytes(dense_onnx) - round(sum(layer_bytes(x, "dense", 0.0) for x in layers))
