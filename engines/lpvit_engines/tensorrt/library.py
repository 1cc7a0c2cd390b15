"""The tensorrt module, refused where it is too old or would corrupt what it is handed."""

import re
from typing import Any

import numpy as np

from lpvit_edge.deps import require
from lpvit_edge.errors import EnvironmentUnfitError

OLDEST = (10, 3)  # JetPack 6.1; before it there is no strongly typed network with IPluginV3


def load_tensorrt() -> Any:
    """The module. Raises MissingDependencyError where it is absent, EnvironmentUnfitError where it
    cannot be used."""
    trt = require("tensorrt")
    if version_of(trt) < OLDEST:
        raise EnvironmentUnfitError(
            f"TensorRT {trt.__version__} is too old: version 10.3 or newer is needed. On a Jetson "
            "install JetPack 6.1 or newer"
        )
    refuse_corrupting_numpy(trt)
    return trt


def version_of(trt: Any) -> tuple[int, int]:
    """(major, minor) of the bindings."""
    found = re.match(r"(\d+)\.(\d+)", str(trt.__version__))
    if found is None:
        raise EnvironmentUnfitError(
            f"TensorRT calls its version {trt.__version__!r}; reinstall its Python bindings"
        )
    return int(found[1]), int(found[2])


def refuse_corrupting_numpy(trt: Any) -> None:
    """Raise where arrays come back from the bindings with their first element repeated.

    Bindings up to 10.15 do that under numpy 2. The pair at hand is tried, not looked up.
    """
    sent = np.array([7, 8, 9], np.int32)
    field = trt.PluginField("probe", sent, trt.PluginFieldType.INT32)
    read = np.array(field.data)
    if not np.array_equal(read, sent):
        raise EnvironmentUnfitError(
            f"TensorRT {trt.__version__} reads [7, 8, 9] as {read.tolist()} under numpy "
            f"{np.__version__}: weights would be corrupted silently. To do: pip install 'numpy<2'"
        )
