"""Makes every call of a run time, and a launch of a kernel; prints the answers as JSON.

python every_call.py LIBRARY [CALL RESULT]    with RESULT, that call fails
"""

import ctypes
import json
import sys
from typing import Any

from lpvit_edge.errors import LpvitEdgeError
from lpvit_engines.cuda import driver
from lpvit_engines.cuda.calls import load_calls
from lpvit_engines.cuda.kernel import open_kernel


def every_answer(library: str) -> list[Any]:
    calls = load_calls(library)
    device = calls.device()
    context = calls.retain_context(device)
    with calls.current(context):
        stream, event = calls.create_stream(), calls.create_event(spin=False)
        address, host = calls.allocate(64), calls.allocate_host(64)
        (ctypes.c_char * 64).from_address(host).value = b"sent"
        calls.to_device(address, host, 64, stream)
        ctypes.memset(host, 0, 64)
        calls.to_host(host, address, 64, stream)
        calls.record(event, stream)
        calls.wait_for_event(stream, event)
        calls.wait_event(event)
        calls.begin_capture(stream)
        graph = calls.end_capture(stream)
        executable = calls.instantiate(graph)
        calls.launch_graph(executable, stream)
        calls.wait(stream)
        with open_kernel(
            block_rows=64, block_cols=16, dtype="float16", epilogue="gelu", library=library
        ) as kernel:
            kernel.launch(
                x=0x100, values=0x200, rows=0x300, columns=0x400, bias=0x500, residual=0,
                tokens=197, ldx=768, ldy=3072, y=0x900, block_row_count=48, stream=0x77,
            )  # fmt: skip
        found = [
            device, context, calls.device_name(device), calls.total_bytes(device),
            calls.multiprocessors(device), calls.is_integrated(device),
            calls.compute_capability(device), calls.driver_version(), calls.current_context(),
            calls.context_of(address), calls.ordinal_of(address), calls.free_bytes(),
            calls.device_address(host) == host,
            ctypes.string_at(host).decode(), calls.elapsed_ms(event, event), kernel.target,
        ]  # fmt: skip
        calls.destroy_executable(executable)
        calls.destroy_graph(graph)
        calls.free(address)
        calls.free_host(host)
        calls.destroy_event(event)
        calls.destroy_stream(stream)
    calls.release_context(device)
    return found


def main() -> None:
    from tests.cuda.fake_driver import state_of

    library, *fails = sys.argv[1:]
    fake = ctypes.CDLL(library)
    state = state_of(library)
    if fails:
        (ctypes.c_char * 64).in_dll(fake, "fake_fails").value = fails[0].encode()
        ctypes.c_int.in_dll(fake, "fake_fails_with").value = int(fails[1])
    try:
        answers: Any = every_answer(library)
    except LpvitEdgeError as error:
        answers = f"{type(error).__name__}: {error}"
    sys.stdout.write(
        json.dumps(
            {
                "through": getattr(driver.load_driver(library), "through", "ctypes"),
                "answers": answers,
                "calls": (ctypes.c_char * (1 << 16)).in_dll(fake, "fake_log").value.decode(),
                "live": ctypes.c_int.in_dll(fake, "fake_live").value,
                "launch": [state.launches, state.stream, list(state.grid), list(state.block)],
                "parameters": bytes(state.parameters).hex(),
            }
        )
    )


if __name__ == "__main__":
    main()
