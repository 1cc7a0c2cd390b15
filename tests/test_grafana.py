"""The Grafana dashboard: what an import needs, and queries that find something in /metrics."""

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prometheus_client")

from prometheus_client.parser import text_string_to_metric_families

from lpvit_edge.dashboard.metrics import exposition
from lpvit_edge.dashboard.snapshot import (
    DriftNow,
    FrameEnergy,
    FramesNow,
    LatencyNow,
    Power,
    ShadowNow,
    Snapshot,
)
from tests.capturing import ROOT

PATH = ROOT / "examples" / "grafana" / "lpvit.json"
OF_PROMETHEUS = {"instance", "job", "__name__"}  # labels that the server adds
# Of Grafana's list of units (packages/grafana-data, valueFormats/categories.ts).
UNITS = {"none", "watt", "joule", "s", "reqps", "celsius", "hertz", "percentunit"}


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(PATH.read_text())
    return found


@pytest.fixture(scope="module")
def served() -> dict[str, list[dict[str, str]]]:
    """Every metric of a device that has everything, with the labels of its samples."""
    power = Power(
        quality="measured", reason=None, source="told", sensor="s", scope="module_input",
        total_w=8.0, rails_w={"VDD_SOC": 1.5}, age_s=0.1, energy_j=10.0,
    )  # fmt: skip
    latency = LatencyNow(
        frames=10, p50_ms=5.0, p99_ms=6.0, p999_ms=7.0, stages_p50_ms={}, buckets=(0,) * 14,
        count=10, sum_s=0.05,
    )  # fmt: skip
    now = Snapshot(
        at=0.0, uptime_s=1.0, device={"board": "b"}, engine={"name": "e"}, power=power,
        energy=FrameEnergy(gross_j=0.4, idle_j=0.1, model_j=0.2, capture_j=0.1), latency=latency,
        frames=FramesNow(
            total=10, per_s=30.0, dropped=1, verdicts={"ok": 9}, labels={"ok": 9}, age_s=0.1
        ),
        drift=DriftNow(
            level="green", text=None, distance=1.0, strange_share=0.0,
            evidence={"embedding": 1.0}, yellow_at=1e5, red_at=1e7, frames=10, not_watched=0,
        ),
        drift_reason=None,
        shadow=ShadowNow(
            compared=1, agreed=1, escapes=0, overkills=0, other=0, dropped=0, failed=0
        ),
        shadow_reason=None, temperatures_c={"cpu": 40.0}, throttling=(), throttle_events=0,
        clock_mhz=1000.0, events=(), event_counts={"info": 1},
    )  # fmt: skip
    found: dict[str, list[dict[str, str]]] = {}
    for family in text_string_to_metric_families(exposition(now).decode()):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found


@pytest.fixture(scope="module")
def exposed(served: dict[str, list[dict[str, str]]]) -> dict[str, set[str]]:
    """The names of the labels alone."""
    return {name: set().union(*labels) for name, labels in served.items()}


def queries(dashboard: dict[str, Any]) -> list[str]:
    """All expressions, with the variables replaced as Grafana replaces them."""
    found = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    return [expression.replace("$instance", ".*") for expression in found]


def test_every_query_is_promql_and_finds_samples_that_a_device_serves(
    dashboard: dict[str, Any], served: dict[str, list[dict[str, str]]]
) -> None:
    promql: Any = pytest.importorskip("promql_parser")
    asked: set[str] = set()

    def look(node: Any) -> bool:
        if isinstance(node, promql.VectorSelector):
            assert node.name in served, f"/metrics has no {node.name}"
            asked_for = [m for m in node.matchers.matchers if m.name not in OF_PROMETHEUS]
            assert all(str(m.op) == "MatchOp.Equal" for m in asked_for)
            assert any(
                all(labels.get(m.name) == m.value for m in asked_for)
                for labels in served[node.name]
            ), expression
            asked.add(node.name)
        return True

    for expression in queries(dashboard):
        promql.walk(promql.parse(expression), look)
    assert len(asked) >= 12


def test_what_queries_group_by_and_legends_name_are_labels_of_their_metrics(
    dashboard: dict[str, Any], exposed: dict[str, set[str]]
) -> None:
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            names = re.findall(r"lpvit_\w+", target["expr"])
            known = set().union(*(exposed[name] for name in names)) | OF_PROMETHEUS
            grouped = re.findall(r"\b(?:by|on) ?\(([^)]*)\)", target["expr"])
            asked = {label.strip() for group in grouped for label in group.split(",")}
            shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert asked | shown <= known, target


def test_a_histogram_and_every_counter_are_read_as_such(dashboard: dict[str, Any]) -> None:
    for expression in queries(dashboard):
        for name in re.findall(r"lpvit_\w+(?:_total|_bucket)\b", expression):
            assert re.search(rf"(rate|increase)\({name}", expression), expression
        for name in re.findall(r"(?:rate|increase)\((lpvit_\w+)", expression):
            assert name.endswith(("_total", "_bucket")), expression


def test_the_file_is_what_an_import_of_grafana_takes(dashboard: dict[str, Any]) -> None:
    """The schema of dashboards (grafana/grafana, kinds/dashboard/dashboard_kind.cue)."""
    assert dashboard["title"]
    assert dashboard["id"] is None  # the importing Grafana gives it one
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,40}", dashboard["uid"])
    assert isinstance(dashboard["schemaVersion"], int)
    assert {"from", "to"} == set(dashboard["time"])
    variables = {v["name"]: v for v in dashboard["templating"]["list"]}
    assert variables["source"]["type"] == "datasource"
    assert variables["source"]["query"] == "prometheus"
    for panel in dashboard["panels"]:
        assert {"id", "title", "type", "gridPos", "targets", "fieldConfig"} <= set(panel)
        assert panel["type"] == "timeseries"
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${source}"}
    used = set(re.findall(r"\$\{?(\w+)", PATH.read_text())) - {"__all"}
    assert used == set(variables)


def test_panels_have_their_own_numbers_and_places(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    assert all(p["x"] >= 0 and p["x"] + p["w"] <= 24 and p["w"] > 0 < p["h"] for p in places)
    for a, b in combinations(places, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        below = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or below, (a, b)


def test_what_the_docs_name_is_there() -> None:
    assert str(PATH.relative_to(ROOT)) in Path(ROOT / "docs" / "watching.md").read_text()
