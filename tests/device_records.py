"""A small device profile and its curves, made by hand: two shapes, energies where asked."""

from lpvit_edge.records import (
    DeviceProfile,
    GemmCost,
    Latency,
    LayerShape,
    ModelIdentity,
    PowerNote,
    Sensitivity,
    SensitivityCurve,
)

MODEL = ModelIdentity(name="tiny", weights_sha256="00", image_size=32)
LAYERS = tuple(
    LayerShape(name=f"blocks.{block}.{name}", tokens=10, in_features=64, out_features=out)
    for block in range(2)
    for name, out in (("fc1", 128), ("fc2", 64))
)
GRID = (0.2, 0.4, 0.6, 0.8)
REST_MS, REST_MJ = 1.0, 4.0


def gemm(out: int, pattern: str, sparsity: float, *, watts: float | None) -> GemmCost:
    """Milliseconds are out / 64 less the zeros; 32x32 gains half of that; energy is ms * watts."""
    saved = sparsity * (1.0 if pattern == "64x1" else 0.5)
    latency_ms = out / 64 * (1.0 - saved)
    return GemmCost(
        tokens=10,
        in_features=64,
        out_features=out,
        activation="none",
        pattern=pattern,
        sparsity=sparsity,
        latency_ms=latency_ms,
        spread_ms=0.0,
        stable=True,
        energy_mj=None if watts is None else latency_ms * watts,
    )


def profile(*, quality: str = "measured", reason: str | None = None) -> DeviceProfile:
    """Dense 7 ms (1 ms rest) and 40 mJ: dense layers at 6 W, sparse ones at 8 W, the rest at 4."""
    known = quality != "unavailable"
    gemms = [
        gemm(out, pattern, sparsity, watts=watts if known else None)
        for out in (128, 64)
        for pattern, sparsity, watts in (
            ("dense", 0.0, 6.0),
            *(("64x1", s, 8.0) for s in GRID),
            *(("32x32", s, 5.0) for s in GRID),
        )
    ]
    dense = Latency(median_ms=7.0, p99_ms=7.5, spread_ms=0.1, samples_ms=(7.0,), stable=True)
    return DeviceProfile(
        device={"machine": "x86_64"},
        fingerprint="f",
        engine="openvino",
        engine_version="1",
        precision="float32",
        threads=1,
        batch=1,
        model=MODEL,
        layers=LAYERS,
        gemms=tuple(gemms),
        dense=dense,
        rest_ms=REST_MS,
        sum_over_measured=1.0,
        in_place_ms={},
        rank_correlation=None,
        drift=0.0,
        power=PowerNote(source="rapl", scope="cpu_package", quality=quality, reason=reason),
        reasons=(),
        rest_energy_mj=REST_MJ if known else None,
        rest_weight_bytes=1000,
    )


def curves() -> Sensitivity:
    """Distortion grows with the square of the sparsity, faster in 32x32 and in later layers."""
    return Sensitivity(
        model=MODEL,
        images=8,
        images_sha256="00",
        curves=tuple(
            SensitivityCurve(
                layer=layer.name,
                pattern=pattern,
                criterion=criterion,
                sparsity=(0.0, *GRID),
                distortion=tuple(scale * (index + 1) * s * s for s in (0.0, *GRID)),
            )
            for index, layer in enumerate(LAYERS)
            for pattern, scale in (("64x1", 1.0), ("32x32", 3.0))
            for criterion in ("hessian", "taylor")
        ),
    )
