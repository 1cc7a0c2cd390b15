"""What every sink can do, and what stands behind those that are reached over a wire."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from lpvit_edge.line.guarded import GuardedThread
from lpvit_edge.line.journal import Entry
from lpvit_edge.line.records import FrameRecord

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Sink(Protocol):
    """Takes verdicts; deliver() and hold() return at once and raise nothing but SinkError."""

    name: str
    thread: GuardedThread

    @property
    def error(self) -> str | None:
        """What is wrong with it now."""
        ...

    @property
    def missed(self) -> int:
        """Verdicts that it had no room for, that were too old, or waited for it for too long."""
        ...

    def deliver(self, record: FrameRecord, pixels: "NDArray[np.uint8] | None") -> None:
        """One verdict, with the image where there is one."""
        ...

    def hold(self, is_held: bool) -> None:
        """No part can be judged now (True): take the safe position until further notice."""
        ...

    def close(self, timeout_s: float) -> int:
        """Deliver what waits, as far as the time allows; entries that still wait."""
        ...


class Remote(Protocol):
    """The other end of a wire. Every call may block and raise SinkError; it is repeated then."""

    name: str
    batch: int  # entries in one send()
    longest_wait_s: float  # between two attempts

    @property
    def missed(self) -> int:
        """Verdicts that were too old to be told."""
        ...

    def resume(self, delivered: int, newest: int) -> int:
        """Id of the last entry that need not be sent. May raise SinkError; it is repeated then.

        The journal says that those up to `delivered` have arrived, and ends at `newest`.
        """
        ...

    def too_old(self, entries: Sequence[Entry]) -> int:
        """How many of the first entries need not be sent any more; asked while it is away."""
        ...

    def send(self, entries: Sequence[Entry]) -> None:
        """Deliver some entries, in order; returns when they have arrived."""
        ...

    def beat(self, *, is_held: bool) -> None:
        """Called a few times a second between send()s: a heartbeat, the safe position."""
        ...

    def disconnect(self) -> None:
        """Let go; the next send() connects anew."""
        ...
