"""The records that pass between stages as files. Every quantity names its unit.

    device_profile.json -> sensitivity.json -> allocation.json -> prune.json -> manifest.json
    -> check.json -> optimize.json

Fields that were not measured are None and stand beside a reason. `sparsity` is the fraction of
zeros. A layer has the name that the model's `named_modules()` gives it.
"""

from typing import Any, ClassVar

import msgspec


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A record that is also a file: see lpvit_edge.files."""

    KIND: ClassVar[str] = ""
    FORMAT: ClassVar[int] = 1

    @classmethod
    def upgrade(cls, fields: dict[str, Any], number: int) -> dict[str, Any]:
        """The fields of an older format as the current one has them; overridden where they differ.

        A field that is new and has a default needs nothing.
        """
        return fields


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A piece of a record."""


class LayerShape(Part, frozen=True, kw_only=True):
    """A prunable linear layer: weight (out_features, in_features), applied to `tokens` rows."""

    name: str
    tokens: int  # per image
    in_features: int
    out_features: int
    activation: str = "none"  # "gelu" where an exact GELU follows and is fused into the layer


class ModelIdentity(Part, frozen=True, kw_only=True):
    """What must agree before two files about one model are combined."""

    name: str
    weights_sha256: str
    image_size: int


class Latency(Part, frozen=True, kw_only=True):
    """Summary of raw samples, which stay in `samples_ms`."""

    median_ms: float
    p99_ms: float
    spread_ms: float  # median absolute deviation
    samples_ms: tuple[float, ...]
    stable: bool
    reasons: tuple[str, ...] = ()


class Energy(Part, frozen=True, kw_only=True):
    """Energy per image, or why there is none."""

    per_image_mj: float | None
    ci95_mj: float | None
    mean_power_mw: float | None
    source: str | None
    scope: str | None
    quality: str  # measured | summed | estimated | suspect | unavailable
    reason: str | None


class GemmCost(Part, frozen=True, kw_only=True):
    """One distinct linear layer in one form, timed alone through the engine.

    `latency_ms` is a share of what a network of several copies, each with weights of its own,
    takes longer than one without any, so that what the engine needs per call is not counted.
    """

    tokens: int
    in_features: int
    out_features: int
    activation: str
    pattern: str
    sparsity: float
    latency_ms: float
    spread_ms: float
    stable: bool
    energy_mj: float | None = None  # gross, of one layer; None without a power sensor


class PowerNote(Part, frozen=True, kw_only=True):
    """Where the energies of a profile come from, or why there are none."""

    source: str | None
    scope: str | None
    quality: str  # measured | summed | estimated | suspect | unavailable
    reason: str | None


class DeviceProfile(Record, frozen=True, kw_only=True):
    """What this device needs for every form of every layer of one model."""

    KIND: ClassVar[str] = "device-profile"
    FORMAT: ClassVar[int] = 5

    device: dict[str, Any]
    fingerprint: str
    engine: str
    engine_version: str
    precision: str
    threads: int
    batch: int
    model: ModelIdentity
    layers: tuple[LayerShape, ...]
    gemms: tuple[GemmCost, ...]
    dense: Latency  # the whole dense network, end to end
    rest_ms: float  # the network without its prunable layers, see lpvit_edge.profile
    sum_over_measured: float  # (rest + dense layers) / dense: 1.0 when the parts add up
    in_place_ms: dict[str, float]  # of each layer inside the running dense network
    rank_correlation: float | None  # between layers timed alone and in place (Spearman)
    drift: float | None  # of the largest dense layer, from the first minute to the last
    power: PowerNote
    reasons: tuple[str, ...]  # why the profile may not be trusted; empty when nothing speaks so
    rest_energy_mj: float | None = None  # gross, of the network without its prunable layers
    rest_weight_bytes: int | None = None  # of all other initializers; None before format 2
    factors: dict[str, float] = {}  # k by pattern: layers in a network over alone; absent: 1
    energy_sum_over_measured: float | None = None  # as sum_over_measured; None before format 4
    mixed_error: float | None = None  # of a mixed network's prediction, which fitted no factor

    @classmethod
    def upgrade(cls, fields: dict[str, Any], number: int) -> dict[str, Any]:
        """Before format 5 every profile said float32; TensorRT's were measured in float16."""
        is_half = (fields.get("engine"), fields.get("precision")) == ("tensorrt", "float32")
        return {**fields, "precision": "float16"} if is_half else fields


class SensitivityCurve(Part, frozen=True, kw_only=True):
    """Distortion of the model's output when one layer is pruned to each sparsity."""

    layer: str
    pattern: str
    criterion: str  # "taylor" (LPViT, mask only) or "hessian" (after closed-form repair)
    sparsity: tuple[float, ...]
    distortion: tuple[float, ...]


class Sensitivity(Record, frozen=True, kw_only=True):
    """All curves of one model over one set of calibration images."""

    KIND: ClassVar[str] = "sensitivity"

    model: ModelIdentity
    images: int
    images_sha256: str
    curves: tuple[SensitivityCurve, ...]
    basis_sha256: str | None = None  # of rotated.safetensors; None: of the model as it is


class Choice(Part, frozen=True, kw_only=True):
    """What one layer becomes, with what the profile and the curves say about it."""

    layer: str
    pattern: str
    sparsity: float
    latency_ms: float
    dense_latency_ms: float
    distortion: float


class Allocation(Record, frozen=True, kw_only=True):
    """One pattern and sparsity per layer."""

    KIND: ClassVar[str] = "allocation"
    FORMAT: ClassVar[int] = 2

    model: ModelIdentity
    fingerprint: str
    allocator: str
    criterion: str
    budget: dict[str, float]  # by the keys of lpvit_edge.budget.QUANTITIES
    choices: tuple[Choice, ...]
    predicted_latency_ms: float
    predicted_dense_ms: float
    distortion: float
    bound: tuple[str, ...]  # the keys of the budget that force this distortion
    predicted_energy_mj: float | None = None  # None as in the profile, or before format 2
    predicted_power_mw: float | None = None
    energy_quality: str | None = None
    macs: float | None = None  # of the prunable layers, per image
    dense_macs: float | None = None
    predicted_weight_bytes: float | None = None
    basis_sha256: str | None = None  # of the rotated model that the curves are of, if they are

    @classmethod
    def upgrade(cls, fields: dict[str, Any], number: int) -> dict[str, Any]:
        """Format 1 knew one constraint: its `bound` was "latency" or "none"."""
        bound = {"latency": ["latency_ms"], "none": []}.get(str(fields.get("bound")))
        return fields if bound is None else {**fields, "bound": bound}


class PrunedLayer(Part, frozen=True, kw_only=True):
    """What pruning did to one layer."""

    layer: str
    pattern: str
    sparsity: float  # as it came out
    relative_error: float  # |W X - W' X'|^2 / |W X|^2 over the calibration tokens
    damping: float  # that was added to the Hessian's diagonal
    damping_share: float | None = None  # of that diagonal's mean; None in files of format 1
    seconds: float


class PruneLog(Record, frozen=True, kw_only=True):
    """How model.safetensors came about."""

    KIND: ClassVar[str] = "prune"
    FORMAT: ClassVar[int] = 2

    model: ModelIdentity
    allocation_sha256: str
    images: int
    images_sha256: str
    skipped: tuple[str, ...]  # images that could not be read, with the reason
    method: str
    layers: tuple[PrunedLayer, ...]
    model_sha256: str


class ExportLog(Record, frozen=True, kw_only=True):
    """That the ONNX file computes what the torch model does.

    Each error is max |y - reference| / max |reference| over the logits of `images` images.
    """

    KIND: ClassVar[str] = "export"
    FORMAT: ClassVar[int] = 2

    model_sha256: str  # of the pruned weights
    onnx_sha256: str
    images: int
    tolerance: float  # that ONNX Runtime was held to
    onnxruntime_error: float
    engine_error: float
    dense_engine_error: float  # of dense.onnx against the model as it was
    engine_tolerance: float | None = None  # that the engine was held to; None before format 2
    dense_engine_tolerance: float | None = None


class Manifest(Record, frozen=True, kw_only=True):
    """What an engine was built from, and what runs in it."""

    KIND: ClassVar[str] = "manifest"

    engine: str
    engine_version: str
    onnx_sha256: str
    fingerprint: str
    threads: int
    precision: str
    labels: tuple[str, ...]
    kernels: dict[str, str]


class EngineCheck(Part, frozen=True, kw_only=True):
    """One engine on this device, on held-out images."""

    latency: Latency
    throughput_per_s: float
    accuracy: float | None  # None when the held-out images carry no labels
    correct: int | None
    images: int
    weight_bytes: int
    energy: Energy


class Check(Record, frozen=True, kw_only=True):
    """Dense and sparse, side by side, in one run."""

    KIND: ClassVar[str] = "check"
    FORMAT: ClassVar[int] = 3

    fingerprint: str
    dense_onnx_sha256: str
    onnx_sha256: str
    heldout_sha256: str
    dense: EngineCheck
    sparse: EngineCheck
    speedup: float
    predicted_latency_ms: float
    accuracy_drop: float | None
    agreement: float  # share of images on which both engines answer the same
    skipped: tuple[str, ...]  # images that could not be read, with the reason
    # None without labels, and before format 2:
    lost: int | None = None  # images that only the dense engine gets right
    won: int | None = None  # images that only the sparse engine gets right
    precision: str | None = None  # in which both engines ran; None before format 3
