"""The process of the dense engine: python -m lpvit_edge.line.shadow_process.

It reads its orders from stdin, loads the bundle's engine and answers one picture after another on
its socket, at the lowest priority that the system has, so that the line goes first. It ends with
the process that started it.
"""

import os
import socket
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from lpvit_edge.errors import LpvitEdgeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

LENGTHS = struct.Struct("<III")  # height, width and channels of the picture that follows
_LARGEST_BYTES = 256 << 20


class ShadowOrders(msgspec.Struct, frozen=True, kw_only=True):
    """What the shadow's process is told."""

    bundle: str  # folder
    engine: str | None
    threads: int
    channel: int  # file descriptor
    parent: int


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What the dense engine says of a picture, or why it says nothing."""

    probabilities: tuple[float, ...] = ()
    problem: str | None = None


def receive(channel: socket.socket, count: int) -> bytearray:
    """Exactly so many bytes. Raises EOFError where the other end is gone, TimeoutError."""
    content = bytearray()
    while len(content) < count:
        part = channel.recv(min(count - len(content), 1 << 20))
        if not part:
            raise EOFError
        content += part
    return content


def send_answer(channel: socket.socket, answer: Answer) -> None:
    body = msgspec.json.encode(answer)
    channel.sendall(struct.pack("<I", len(body)) + body)


def receive_answer(channel: socket.socket) -> Answer:
    """Raises EOFError, TimeoutError, and msgspec.DecodeError for anything else."""
    (length,) = struct.unpack("<I", receive(channel, 4))
    return msgspec.json.decode(receive(channel, min(length, 1 << 20)), type=Answer)


def main() -> int:
    """Answer until the parent ends."""
    orders = msgspec.json.decode(sys.stdin.buffer.readline(), type=ShadowOrders)
    from lpvit_edge.line.capture_process import die_with

    die_with(orders.parent)
    os.nice(19)
    channel = socket.socket(fileno=orders.channel)
    try:
        serve(orders, channel)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return 0  # the line is gone
    return 1


def serve(orders: ShadowOrders, channel: socket.socket) -> None:
    """Load and answer; a bundle that cannot be loaded is the answer to the first picture."""
    from lpvit_edge.bundle import open_bundle
    from lpvit_edge.golden import probabilities_of
    from lpvit_edge.proof import proven_engine

    try:
        bundle = open_bundle(Path(orders.bundle))
        engine = proven_engine(bundle, engine=orders.engine, threads=orders.threads)
    except LpvitEdgeError as error:
        send_answer(channel, Answer(problem=str(error)))
        return
    with engine:
        while True:
            pixels = _picture(channel)
            try:
                found = probabilities_of(engine, pixels, bundle.record.preprocess)
            except (LpvitEdgeError, ValueError) as error:
                send_answer(channel, Answer(problem=str(error)))
            else:
                send_answer(channel, Answer(probabilities=tuple(map(float, found))))


def _picture(channel: socket.socket) -> "NDArray[np.uint8]":
    height, width, colours = LENGTHS.unpack(receive(channel, LENGTHS.size))
    count = height * width * colours
    if count > _LARGEST_BYTES:
        raise EOFError  # out of step: better a new process
    return np.frombuffer(receive(channel, count), np.uint8).reshape(height, width, colours)


if __name__ == "__main__":
    raise SystemExit(main())
