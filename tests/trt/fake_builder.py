"""A fake TensorRT that also builds: its plan is the ONNX file, which ONNX Runtime then computes.

Block-sparse layers are computed from what is packed for the kernel. Only calls that the contract
test holds against the real bindings are there.
"""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from tests.cuda.runtime_driver import Driver
from tests.trt.fake_plugin import without_plugins
from tests.trt.fake_trt import Context, fake_tensorrt

_MAGIC = b"plan:"
_PAIR = ("QuantizeLinear", "DequantizeLinear")


class Cache:
    def serialize(self) -> bytes:
        return b"timings"

    def combine(self, other: object, *, ignore_mismatch: bool) -> bool:
        return True


class Config:
    def __init__(self) -> None:
        self.flags: list[str] = []
        self.workspace = 0
        self.cache = Cache()
        self.profiling_verbosity: Any = None
        self.progress_monitor: Any = None

    def set_memory_pool_limit(self, pool: object, size: int) -> None:
        self.workspace = size

    def set_flag(self, flag: str) -> None:
        self.flags.append(flag)

    def create_timing_cache(self, content: bytes) -> Cache:
        return Cache()

    def set_timing_cache(self, cache: Cache, *, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return True

    def get_timing_cache(self) -> Cache:
        return self.cache


def building_tensorrt(
    *, refuses: str | None = None, sparse: bool = True, driver: Driver | None = None
) -> SimpleNamespace:
    """A module. `refuses` is a word of TensorRT's for every network; with `sparse` off, 2:4 layers
    run dense kernels. `configs` on it lists the settings of each build; `driver`: see
    fake_tensorrt."""
    module = fake_tensorrt({}, lambda arrays: {}, driver=driver)
    configs: list[Config] = []

    class Parser:
        def __init__(self, network: Any, logger: Any) -> None:
            self.network, self.logger, self.num_errors = network, logger, 0

        def parse(self, content: bytes) -> bool:
            onnx.load_from_string(content)
            self.network.content = content
            return True

    class Builder:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def create_network(self, flags: int) -> SimpleNamespace:
            assert flags == 2, "strongly typed"
            return SimpleNamespace(content=b"")

        def create_builder_config(self) -> Config:
            configs.append(Config())
            return configs[-1]

        def build_serialized_network(self, network: Any, config: Config) -> bytes | None:
            if refuses is not None:
                self.logger.log(SimpleNamespace(name="ERROR"), refuses)
                return None
            if config.progress_monitor is not None:
                config.progress_monitor.phase_start("building", None, 1)
                config.progress_monitor.phase_finish("building")
            flag = b"s" if "SPARSE_WEIGHTS" in config.flags and sparse else b"d"
            return _MAGIC + flag + bytes(network.content)

    monitor = type("IProgressMonitor", (), {})
    vars(module).update(
        Builder=Builder,
        OnnxParser=Parser,
        IProgressMonitor=monitor,
        NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1),
        MemoryPoolType=SimpleNamespace(WORKSPACE="workspace"),
        ProfilingVerbosity=SimpleNamespace(DETAILED="detailed"),
        BuilderFlag=SimpleNamespace(SPARSE_WEIGHTS="SPARSE_WEIGHTS"),
        LayerInformationFormat=SimpleNamespace(JSON="json"),
        Runtime=lambda logger: SimpleNamespace(
            deserialize_cuda_engine=lambda plan: _engine(module, plan)
        ),
        configs=configs,
    )
    return module


def _engine(module: SimpleNamespace, plan: bytes) -> Any:
    if not plan.startswith(_MAGIC):
        return None
    sparse, model = plan[5:6] == b"s", onnx.load_from_string(plan[6:])
    shapes = {
        x.name: tuple(d.dim_value for d in x.type.tensor_type.shape.dim)
        for x in (*model.graph.input, *model.graph.output)
    }
    inputs = {x.name for x in model.graph.input}
    names = list(shapes)

    def create_execution_context() -> Context:
        made = Context(shapes, _computing(model, inputs), module.driver)
        module.contexts.append(made)
        return made

    return SimpleNamespace(
        num_io_tensors=len(names),
        get_tensor_name=lambda i: names[i],
        get_tensor_shape=lambda name: shapes[name],
        get_tensor_mode=lambda name: (
            module.TensorIOMode.INPUT if name in inputs else module.TensorIOMode.OUTPUT
        ),
        get_tensor_dtype=lambda name: module.DataType.FLOAT,
        create_execution_context=create_execution_context,
        create_engine_inspector=lambda: SimpleNamespace(
            get_engine_information=lambda form: _inspected(model, sparse)
        ),
    )


def _computing(model: Any, inputs: set[str]) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # else it tells of each initializer that nothing reads any more
    session = onnxruntime.InferenceSession(
        without_plugins(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    outputs = [x.name for x in session.get_outputs()]

    def compute(arrays: dict[str, NDArray[np.float32]]) -> dict[str, Any]:
        answers = session.run(None, {name: arrays[name] for name in inputs})
        return dict(zip(outputs, answers, strict=True))

    return compute


def _unquantized(model: Any) -> Any:
    """The model as TensorRT looks for zeros in it: through the pairs of int8."""
    plain = type(model)()
    plain.CopyFrom(model)
    made_by = {name: node for node in plain.graph.node for name in node.output}
    for node in plain.graph.node:
        for index, name in enumerate(node.input):
            source = name
            while source in made_by and made_by[source].op_type in _PAIR:
                source = made_by[source].input[0]
            node.input[index] = source
    return plain


def _inspected(model: Any, sparse: bool) -> str:
    from lpvit_engines.tensorrt.sparse_layers import sparse_layers

    two_four = sparse_layers(_unquantized(model))
    layers = []
    for node in model.graph.node:
        kind, kernel = node.op_type, f"sm80_{node.op_type.lower()}"
        if node.domain:
            kind, kernel = "PluginV3", "BlockSparseLinear"
        elif sparse and node.name.removesuffix(f"/{node.op_type}") in two_four:
            kernel = "sm80_xmma_sparse_gemm"
        layers.append({"Name": node.name, "LayerType": kind, "TacticName": kernel})
    return json.dumps({"Layers": layers})
