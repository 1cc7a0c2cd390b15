"""DeepSparse on one ONNX file, run by the Python that has it: one call for each line on stdin.

    NM_DISABLE_ANALYTICS=1 PYTHON benchmarks/deepsparse_worker.py model.onnx 1

Prints the wall time of each call in ms. cpu_deepsparse.py starts it.
"""

import sys
import time
from importlib import import_module

import numpy as np


def main() -> None:
    path, cores = sys.argv[1:]
    engine = import_module("deepsparse").Engine(path, batch_size=1, num_cores=int(cores))
    image = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)
    for _ in sys.stdin:
        start = time.perf_counter()
        engine.run([image])
        print((time.perf_counter() - start) * 1e3, flush=True)


if __name__ == "__main__":
    main()
