"""The strip of other devices: what their /metrics say, read every few seconds."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

from prometheus_client.parser import text_string_to_metric_families

from lpvit_edge.dashboard.metrics import LEVELS
from lpvit_edge.dashboard.remote import checked_url, fetch
from lpvit_edge.errors import DataError, UnknownOptionError
from lpvit_edge.records import Part

PERIOD_S = 5.0
TIMEOUT_S = 2.0
MOST_DEVICES = 32
_MOST_SAMPLES = 2000


class FleetDevice(Part, frozen=True, kw_only=True):
    """One device as its /metrics show it; what it does not say is None."""

    url: str
    name: str | None = None
    power_w: float | None = None
    scope: str | None = None
    frames: float | None = None
    frames_per_s: float | None = None
    drift_level: str | None = None
    error: str | None = None


class Fleet:
    """Polls the devices while it is open; a device that does not answer says why."""

    def __init__(self, urls: Sequence[str], *, token: str | None = None) -> None:
        if len(urls) > MOST_DEVICES:
            raise UnknownOptionError(
                f"{len(urls)} devices are too many for a strip; give at most {MOST_DEVICES}, and "
                "use Prometheus and Grafana beyond that"
            )
        self._urls = [checked_url(url) for url in urls]
        self._token = token
        self._found = {url: FleetDevice(url=url, error="not asked yet") for url in self._urls}
        self._counted: dict[str, tuple[float, float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="fleet", daemon=True)

    def __enter__(self) -> "Fleet":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join(TIMEOUT_S + 1)

    def devices(self) -> list[FleetDevice]:
        """As they were last seen, in the order given."""
        return [self._found[url] for url in self._urls]

    def _loop(self) -> None:
        with ThreadPoolExecutor(max_workers=8, thread_name_prefix="fleet") as pool:
            while not self._stop.is_set():
                for device in pool.map(self._ask, self._urls):
                    self._found[device.url] = device
                self._stop.wait(PERIOD_S)

    def _ask(self, url: str) -> FleetDevice:
        try:
            content = fetch(f"{url}/metrics", token=self._token, timeout_s=TIMEOUT_S)
            device = parse_device(url, content)
        except DataError as error:
            return FleetDevice(url=url, error=str(error)[:200])
        return self._with_rate(device)

    def _with_rate(self, device: FleetDevice) -> FleetDevice:
        import msgspec

        now_s, before = time.monotonic(), self._counted.get(device.url)
        if device.frames is None:
            return device
        self._counted[device.url] = (now_s, device.frames)
        if before is None or device.frames < before[1]:  # it has restarted
            return device
        rate = (device.frames - before[1]) / (now_s - before[0])
        return msgspec.structs.replace(device, frames_per_s=rate)


def parse_device(url: str, content: bytes) -> FleetDevice:
    """What one /metrics page says. Raises DataError for one that is not lpvit's."""
    power_w = scope = frames = level = name = None
    try:
        families = text_string_to_metric_families(content.decode("utf-8"))
        samples = [sample for family in families for sample in family.samples]
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{url}/metrics is not in Prometheus' form ({error})") from error
    for sample in samples[:_MOST_SAMPLES]:
        if sample.name == "lpvit_build_info":
            name = (sample.labels.get("board") or sample.labels.get("cpu") or "")[:80] or None
        elif sample.name == "lpvit_power_watts" and sample.labels.get("rail") == "total":
            power_w, scope = float(sample.value), sample.labels.get("scope", "")[:40]
        elif sample.name == "lpvit_frames_total":
            frames = (frames or 0.0) + float(sample.value)
        elif sample.name == "lpvit_drift_level" and sample.value in range(len(LEVELS)):
            level = LEVELS[int(sample.value)]
    if not any(sample.name.startswith("lpvit_") for sample in samples):
        raise DataError(f"{url}/metrics has no metrics of lpvit")
    return FleetDevice(
        url=url, name=name, power_w=power_w, scope=scope, frames=frames, drift_level=level
    )
