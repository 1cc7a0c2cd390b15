"""The dense engines that the CPU engine is held against, as calls on an image."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Infer = Callable[[NDArray[np.float32]], Any]


def onnxruntime_call(path: Path, *, threads: int) -> Infer:
    """ONNX Runtime at its best settings for one model; its workers stop spinning between calls."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda image: session.run(None, {name: image})


def quantise(dense: Path, *, python: Path) -> list[Path]:
    """The model quantised by NNCF, once with its handling of transformers and once without.

    `python` is an interpreter that has nncf, which this project does not need.
    """
    script = Path(__file__).with_name("quantise_nncf.py")
    found = []
    for kind in ("transformer", "plain"):
        path = dense.with_name(f"{dense.stem}-nncf-{kind}.xml")
        subprocess.run([str(python), str(script), str(dense), str(path), kind], check=True)
        found.append(path)
    return found


def quantised_calls(paths: list[Path], *, threads: int) -> dict[str, Infer]:
    """OpenVINO on quantised models, what stayed in floating point in float32 and in bfloat16."""
    import openvino

    from lpvit_engines.openvino_engine import settings

    core = openvino.Core()
    has_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    calls: dict[str, Infer] = {}
    for path in paths:
        for precision in ("float32", "bf16") if has_bf16 else ("float32",):
            options = settings(threads, precision=precision)
            request = core.compile_model(path, "CPU", options).create_infer_request()
            calls[f"openvino-{path.stem.rpartition('-')[2]}-{precision}"] = _call(request)
    return calls


def _call(request: Any) -> Infer:
    def infer(image: NDArray[np.float32]) -> NDArray[np.float32]:
        request.infer({0: image}, share_inputs=True)
        return np.array(request.get_output_tensor(0).data, dtype=np.float32)

    return infer
