"""What one launch costs in Python: CPU time of Kernel.launch against the fake driver of the tests.

    python -m benchmarks.gpu_launch

Needs a C compiler and no GPU. The fake copies 80 bytes of parameters and returns, so what is
measured is the launcher and ctypes; what a real driver adds is not.
"""

import statistics
import tempfile
import time
from pathlib import Path

from lpvit_engines.cuda.kernel import Kernel, open_kernel
from tests.cuda.fake_driver import compile_fake_driver, state_of

ROUNDS, LAUNCHES = 40, 2000


def launch_us(kernel: Kernel, *, launches: int = LAUNCHES) -> float:
    """CPU microseconds of this thread per launch, as a mean over one round."""
    begin_ns = time.thread_time_ns()
    for _ in range(launches):
        kernel.launch(
            x=0x1000,
            values=0x2000,
            rows=0x3000,
            columns=0x4000,
            bias=0x5000,
            residual=0,
            tokens=197,
            ldx=768,
            ldy=3072,
            y=0x6000,
            block_row_count=48,
            stream=0,
        )
    return (time.thread_time_ns() - begin_ns) / 1e3 / launches


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        library = compile_fake_driver(Path(folder))
        state_of(library)
        with open_kernel(
            block_rows=64, block_cols=64, dtype="float16", library=str(library)
        ) as kernel:
            rounds = sorted(launch_us(kernel) for _ in range(ROUNDS))
    print(
        f"{statistics.median(rounds):.2f} us a launch (median of {ROUNDS} rounds of {LAUNCHES}; "
        f"{rounds[0]:.2f} to {rounds[-1]:.2f})"
    )


if __name__ == "__main__":
    main()
