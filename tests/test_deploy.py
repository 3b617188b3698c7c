"""What is in `deploy/`: well-formed, and about metrics that there are. `bench/conformance/dashboards.py` runs it for real."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from perft_serve.engine.config import EngineConfig
from perft_serve.engine.events import EngineStats
from perft_serve.server.metrics import EngineReading, Metrics

DEPLOY = Path(__file__).parents[1] / "deploy"
NAME = re.compile(r"\b(?:perft|process|python)_[a-z0-9_]+")


@pytest.fixture(scope="module")
def families() -> dict[str, set[str]]:
    """Each family of a scrape, by the name that documents give it, and the names of its samples."""
    metrics = Metrics(CollectorRegistry(), version="1")
    config = EngineConfig(model="none")
    metrics.watch_engine(
        lambda: EngineReading(stats=EngineStats(), config=config, is_up=True, num_restarts=0, num_adapters=0)
    )
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        endings = ("_bucket", "_count", "_sum") if family.type == "histogram" else ("",)
        found[name] = {name + ending for ending in endings}
    return found


def processes() -> set[str]:
    """Names of what is known of the processes, which Linux tells only."""
    metrics = Metrics(CollectorRegistry())
    metrics.watch_processes(lambda: None)
    text = metrics.render().decode()
    names = {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    facts = {"process_cpu_seconds_total", "process_resident_memory_bytes"}
    return names | facts | {f"perft_engine_{name}" for name in facts}


def dashboard() -> Any:
    return json.loads((DEPLOY / "grafana" / "perft.json").read_text(encoding="utf-8"))


def expressions() -> Iterator[str]:
    """Of the dashboard and of the alerts."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"]
    alerts = (DEPLOY / "alerts.yml").read_text(encoding="utf-8")
    found = re.findall(r"^ +expr:(.*(?:\n {10,}.*)*)", alerts, re.MULTILINE)
    assert len(found) == len(re.findall(r"- alert:", alerts)) > 5
    yield from found


def test_every_metric_that_is_asked_for_exists(families: dict[str, set[str]]) -> None:
    there = set().union(*families.values()) | processes()
    for expression in expressions():
        names = set(NAME.findall(expression))
        assert names or "up{" in expression, expression
        assert names <= there, expression


def test_the_dashboard_is_well_formed() -> None:
    board = dashboard()
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        if panel["type"] != "row":
            assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
            assert {panel["datasource"]["uid"]} == {"${datasource}"}
    assert {variable["name"] for variable in board["templating"]["list"]} == {"datasource", "instance"}
    for panel in panels:
        for target in panel.get("targets", ()):
            assert target["expr"].count("(") == target["expr"].count(")")
            assert '{instance=~"$instance"' in target["expr"], target["expr"]


def test_the_table_has_every_metric_and_no_other(families: dict[str, set[str]]) -> None:
    text = (DEPLOY / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(perft_\w+)` \| (?:counter|gauge|histogram) \|", text, re.MULTILINE)
    assert sorted(rows) == sorted(families)


def test_each_alert_has_a_test() -> None:
    alerts = set(re.findall(r"- alert: (\w+)", (DEPLOY / "alerts.yml").read_text(encoding="utf-8")))
    tested = set(re.findall(r'alertname="(\w+)"', (DEPLOY / "alerts_test.yml").read_text(encoding="utf-8")))
    assert alerts == tested
