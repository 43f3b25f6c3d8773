"""Every metric and label that a dashboard or an alert names is one that the code has."""

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from pdcoord.runtime.catalog import METRICS as GATEWAY
from pdcoord.runtime.metricspec import bound_of
from pdcoord.sim.engine_metrics import OURS, SGLANG, VLLM, labels_of
from sidecar.observe import LABEL_VALUES
from sidecar.observe import METRICS as SIDECAR
from sidecar.observe import bound_of as sidecar_bound

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "monitoring"


@dataclass(frozen=True)
class Known:
    """One metric of the code.

    Attributes:
        values: of those labels whose values are a closed list.
    """

    kind: str
    labels: frozenset[str]
    values: dict[str, frozenset[str]]


def known_metrics() -> dict[str, Known]:
    """All metrics of the code by name."""
    known: dict[str, Known] = {}
    for spec in GATEWAY:
        bounds = {label: bound_of(spec.name, label) for label in spec.labels}
        closed = {
            label: bound.values for label, bound in bounds.items() if bound is not None and bound.values
        }
        known[spec.name] = Known(str(spec.type), frozenset(spec.labels), closed)
    for metric in SIDECAR:
        values = {label: LABEL_VALUES[label] for label in metric.labels if label in LABEL_VALUES}
        known[metric.full_name] = Known(metric.kind, frozenset(metric.labels), values)
    for engine in (*OURS, *VLLM, *SGLANG):
        known[engine.name] = Known(engine.kind, frozenset(labels_of(engine)), {})
    return known


@dataclass(frozen=True)
class Query:
    """One PromQL expression with where it stands."""

    where: str
    text: str


def dashboard_queries() -> Iterator[Query]:
    for path in sorted((FOLDER / "dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                yield Query(f"{path.stem}: {panel['title']}", target["expr"])


def rules() -> list[dict[str, str]]:
    document = yaml.safe_load((FOLDER / "rules.yaml").read_text())
    return [rule for group in document["groups"] for rule in group["rules"]]


def all_queries() -> list[Query]:
    return [*dashboard_queries(), *(Query(f"alert {rule['alert']}", rule["expr"]) for rule in rules())]


@dataclass(frozen=True)
class Named:
    """A metric as a query names it, with its matchers: label, operator, value."""

    metric: str
    matchers: tuple[tuple[str, str, str], ...]


_NAME = re.compile(r"\b((?:pdcoord_|vllm:|sglang:)\w+)(?:\{([^}]*)\})?")
_MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')


def named(query: Query) -> list[Named]:
    """The metrics that a query names, histograms by their own name."""
    known = known_metrics()
    found = []
    for name, matchers in _NAME.findall(query.text):
        base = re.sub("_(bucket|sum|count)$", "", name)
        is_histogram = base in known and known[base].kind == "histogram"
        found.append(Named(base if is_histogram else name, tuple(_MATCHER.findall(matchers))))
    return found


QUERIES = all_queries()


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.where)
def test_a_query_names_metrics_and_labels_of_the_code(query: Query) -> None:
    known = known_metrics()
    names = named(query)
    assert names, "names no metric of ours"
    for name in names:
        assert name.metric in known, f"{name.metric} is no metric of the code"
        metric = known[name.metric]
        for label, operator, value in name.matchers:
            assert label in metric.labels, f"{name.metric} has no label {label}"
            if operator == "=" and label in metric.values:
                assert value in metric.values[label], f"{label} of {name.metric} is never {value}"
            if operator == "=~" and label in metric.values and "$" not in value:
                assert any(re.fullmatch(value, each) for each in metric.values[label]), f"{label}=~{value}"


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.where)
def test_a_query_groups_by_labels_that_are_there(query: Query) -> None:
    known = known_metrics()
    there = frozenset({"le", "namespace", "pod", "job", "instance"}).union(
        *(known[name.metric].labels for name in named(query))
    )
    for group in re.findall(r"\b(?:by|on|without|ignoring)\s*\(([^)]*)\)", query.text):
        labels = {label.strip() for label in group.split(",")}
        assert labels <= there, f"{labels - there} of {query.text}"


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.where)
def test_counters_are_shown_as_rates_and_gauges_are_not(query: Query) -> None:
    known = known_metrics()
    for name, called in re.findall(r"((?:rate|increase)\()?\b((?:pdcoord_|vllm:|sglang:)\w+)", query.text):
        is_gauge = called in known and known[called].kind == "gauge"
        assert bool(name) != is_gauge, f"{called} in {query.text}"


def test_every_alert_is_whole_and_has_a_section_in_the_runbooks() -> None:
    text = (ROOT / "docs" / "runbooks.md").read_text()
    sections = {line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")}
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names)
    for rule in rules():
        told: dict[str, str] = rule["annotations"]  # type: ignore[assignment]
        labels: dict[str, str] = rule["labels"]  # type: ignore[assignment]
        assert labels["severity"] in {"page", "ticket"}
        assert rule["for"]
        assert told["runbook_url"] == f"docs/runbooks.md#{rule['alert'].lower()}"
        assert told["summary"].endswith(".")
        assert told["description"].endswith(".")
        assert rule["alert"] in sections
    assert sections == set(names), "a runbook of no alert"


def test_every_alert_has_a_test() -> None:
    text = (FOLDER / "rules.test.yaml").read_text()
    for rule in rules():
        assert text.count(f"alertname: {rule['alert']},") == 1, "quiet where nothing is wrong"
        assert f'alertname="{rule["alert"]}"' in text, "fires where it should"


def test_the_dashboards_are_what_their_description_says() -> None:
    spec = importlib.util.spec_from_file_location("dashboards", FOLDER / "dashboards.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["dashboards"] = module
    spec.loader.exec_module(module)
    expected = {f"{each.name}.json": module.render(each) for each in module.load()}
    written = {path.name: path.read_text() for path in (FOLDER / "dashboards").glob("*.json")}
    assert written == expected, "make docs"


def test_every_metric_of_the_sidecar_has_a_bound_for_its_labels() -> None:
    for metric in SIDECAR:
        for label in metric.labels:
            assert sidecar_bound(label), f"nothing bounds {label} of {metric.full_name}"
