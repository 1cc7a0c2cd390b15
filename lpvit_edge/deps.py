"""The one place that imports optional libraries by name."""

from importlib import import_module
from typing import Any

from lpvit_edge.errors import MissingDependencyError

_EXTRA_OF = {
    "accelerate": "finetune",
    "asyncua": "opcua",
    "av": "camera",
    "gpiod": "gpio",
    "jinja2": "prune",
    "onnx": "cpu",
    "onnxruntime": "prune",
    "onnxscript": "prune",
    "openvino": "cpu",
    "PIL": "run",
    "harvesters": "gige",
    "httpx": "webhook",
    "prometheus_client": "serve",
    "paho": "mqtt",
    "pymodbus": "modbus",
    "pynvml": "nvml",
    "safetensors": "run",
    "scipy": "prune",
    "starlette": "serve",
    "timm": "prune",
    "torch": "prune",
    "torchvision": "prune",
    "uvicorn": "serve",
}
_OTHER_SOURCE = {
    "gi": "apt install python3-gi gir1.2-gstreamer-1.0; make the venv with --system-site-packages",
    "psutil": "pip install psutil",
    "tensorrt": "it comes with JetPack; make the venv with --system-site-packages",
}


def require(module: str) -> Any:
    """Import an optional library, or say how to get it.

    Raises MissingDependencyError when the library is absent, and also when it is present but
    does not load (a missing libnvinfer.so raises ImportError or OSError here, not at find_spec;
    a torchvision of another build raises RuntimeError).
    """
    try:
        return import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        if isinstance(error, MissingDependencyError):
            raise
        raise MissingDependencyError(
            f"cannot import {module}: {error}. {_remedy(module, error)}"
        ) from error


def is_mismatched_torchvision(error: BaseException) -> bool:
    """Whether torchvision's operators did not register: it is of another build than torch."""
    return "operator torchvision::" in str(error)


def _remedy(module: str, error: BaseException) -> str:
    if is_mismatched_torchvision(error):
        return mismatched_torchvision()
    name = module.partition(".")[0]
    if name in _EXTRA_OF:
        return f"To get it: pip install 'lpvit-edge[{_EXTRA_OF[name]}]'"
    return f"To get it: {_OTHER_SOURCE.get(name, f'pip install {name}')}"


def mismatched_torchvision() -> str:
    """What is wrong with the pair, and what to install."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "absent"

    return (
        f"torch {installed('torch')} and torchvision {installed('torchvision')} are not from the "
        "same build, so torchvision's operators are not registered. Install both from one source "
        "in one command: pip install -c constraints.txt torch torchvision; on Jetson take both "
        "wheels from NVIDIA's index for your JetPack"
    )
