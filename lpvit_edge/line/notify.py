"""What systemd is told, over $NOTIFY_SOCKET (see sd_notify(3)); nothing elsewhere."""

import os
import socket
from collections.abc import Mapping


class Notifier:
    """Sends READY, WATCHDOG, STATUS and STOPPING to the service manager that started us."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        microseconds = environment.get("WATCHDOG_USEC", "")
        ours = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.watchdog_s = int(microseconds) / 1e6 if microseconds.isdecimal() and ours else None

    def send(self, **fields: str) -> None:
        """Send lines NAME=value. A manager that does not listen is not waited for."""
        if not self._address:
            return
        content = "\n".join(f"{name.upper()}={value}" for name, value in fields.items())
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.setblocking(False)
            try:
                channel.sendto(content.encode(), self._address)
            except OSError:
                return
