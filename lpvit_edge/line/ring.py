"""Frames from the capture process to the judge: pixels in shared memory, the rest in messages.

The memory is a memfd of a few slots, so that no pixel is ever written to a disk. Messages go over a
SOCK_SEQPACKET pair, one for each frame; the judge's side sends each slot's number back when it has
copied the pixels.
"""

import contextlib
import mmap
import os
import socket
from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SLOTS = 4
_LARGEST_MESSAGE = 1 << 16


class FrameMessage(msgspec.Struct, frozen=True, kw_only=True, tag="frame"):
    """A frame; without `shape` its pixels were lost, as `lost` says."""

    number: int
    captured_at: float
    captured_ns: int
    name: str | None = None
    lost: str | None = None
    untimed: bool = False
    slot: int = 0
    slot_bytes: int = 0
    shape: tuple[int, int] | None = None  # height, width


class StatusMessage(msgspec.Struct, frozen=True, kw_only=True, tag="status"):
    """That the capture process lives, and whether its source does."""

    state: Literal["opening", "live", "lost", "ended", "gap", "fatal"]
    text: str = ""
    dropped: int = 0  # frames that no slot was free for, since the process started


Message = FrameMessage | StatusMessage
_DECODER = msgspec.msgpack.Decoder(Message)


class RingWriter:
    """The capture process's end."""

    def __init__(self, memory: int, channel: socket.socket) -> None:
        self._memory = memory
        self._channel = channel
        self._free = set(range(SLOTS))
        self._slot_bytes = 0
        self._view: mmap.mmap | None = None

    def send(self, message: Message) -> None:
        """Send one message. Raises OSError when the other side is gone."""
        self._channel.send(msgspec.msgpack.encode(message))

    def is_free(self, timeout_s: float) -> bool:
        """Whether a slot is free, after waiting for one if need be."""
        self._collect(0.0)
        if not self._free and timeout_s > 0:
            self._collect(timeout_s)
        return bool(self._free)

    def write(self, pixels: "NDArray[np.uint8]", message: FrameMessage) -> None:
        """Copy pixels (height, width, 3) into a free slot and send the message that names it."""
        if self._view is None or pixels.nbytes > self._slot_bytes:
            self._grow(pixels.nbytes)
        assert self._view is not None
        slot = self._free.pop()
        start = slot * self._slot_bytes
        self._view[start : start + pixels.nbytes] = pixels.tobytes()
        height, width = pixels.shape[:2]
        self.send(
            msgspec.structs.replace(
                message, slot=slot, slot_bytes=self._slot_bytes, shape=(height, width)
            )
        )

    def _grow(self, size: int) -> None:
        while len(self._free) < SLOTS:  # the layout changes only when nobody reads
            self._collect(1.0)
        if self._view is not None:
            self._view.close()
        self._slot_bytes = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        os.ftruncate(self._memory, SLOTS * self._slot_bytes)
        self._view = mmap.mmap(self._memory, SLOTS * self._slot_bytes)

    def _collect(self, timeout_s: float) -> None:
        """Take back the slots that were read."""
        self._channel.settimeout(timeout_s)
        try:
            while True:
                slot = self._channel.recv(1)
                if not slot:
                    raise ConnectionResetError("the judge is gone")
                self._free.add(slot[0])
                self._channel.settimeout(0.0)
        except (BlockingIOError, TimeoutError):
            return
        finally:
            self._channel.settimeout(None)


class RingReader:
    """The judge's end."""

    def __init__(self, memory: int, channel: socket.socket) -> None:
        self._memory = memory
        self._channel = channel
        self._size = 0
        self._view: mmap.mmap | None = None

    def receive(self, timeout_s: float) -> Message | None:
        """The next message; None after the timeout. Raises EOFError when the process is gone."""
        self._channel.settimeout(timeout_s)
        try:
            content = self._content()
        except TimeoutError:
            return None
        if not content:
            raise EOFError
        message: Message = _DECODER.decode(content)
        return message

    def _content(self) -> bytes:
        try:
            return self._channel.recv(_LARGEST_MESSAGE)
        except ConnectionResetError:
            # Told once, ahead of the messages that wait: it ended with slots that it had not
            # taken back.
            return self._channel.recv(_LARGEST_MESSAGE)

    def pixels(self, message: FrameMessage) -> "NDArray[np.uint8]":
        """A copy of the frame's pixels; its slot is free again afterwards."""
        import numpy as np

        assert message.shape is not None
        height, width = message.shape
        total = SLOTS * message.slot_bytes
        if self._view is None or total != self._size:
            if self._view is not None:
                self._view.close()
            self._view, self._size = mmap.mmap(self._memory, total), total
        start = message.slot * message.slot_bytes
        content = self._view[start : start + height * width * 3]
        # The process ended; its memory is still here.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._channel.send(bytes([message.slot]))
        return np.frombuffer(content, np.uint8).reshape(height, width, 3)

    def close(self) -> None:
        """Unmap the memory."""
        if self._view is not None:
            self._view.close()
