# ruff: noqa: INP001  # a script beside what it writes, no package
"""Draws the Grafana dashboards that dashboards.yaml describes.

`python deploy/monitoring/dashboards.py` writes dashboards/*.json. Grafana 11 and newer read them; the data
source and the models are variables, so one import serves any Prometheus.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parent
SCHEMA_VERSION = 39
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_WIDTH, _HEIGHT = 8, 7
_COLUMNS = 24 // _WIDTH


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One panel: its queries with the legend of each.

    Attributes:
        unit: Grafana's name of it.
        says: what the panel tells, and what to look at next.
    """

    title: str
    unit: str
    says: str
    queries: list[dict[str, str]]
    is_stacked: bool = False


@dataclass(frozen=True)
class Dashboard:
    """One dashboard: rows of panels."""

    name: str
    title: str
    says: str
    rows: list[tuple[str, list[Panel]]]


def load() -> list[Dashboard]:
    """The dashboards as they are described."""
    described = yaml.safe_load((FOLDER / "dashboards.yaml").read_text(encoding="utf-8"))
    return [
        Dashboard(
            name,
            each["title"],
            each["says"],
            [(row["title"], [Panel(**panel) for panel in row["panels"]]) for row in each["rows"]],
        )
        for name, each in described.items()
    ]


def render(dashboard: Dashboard) -> str:
    """One dashboard as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in dashboard.rows:
        panels.append({"type": "row", "title": title, "gridPos": _place(0, y, 24, 1), "panels": []})
        y += 1
        for index, panel in enumerate(row):
            x = index % _COLUMNS * _WIDTH
            panels.append(_panel(panel, _place(x, y + index // _COLUMNS * _HEIGHT, _WIDTH, _HEIGHT)))
        y += -(-len(row) // _COLUMNS) * _HEIGHT
    for number, each in enumerate(panels, start=1):
        each["id"] = number
    document = {
        "uid": f"pdcoord-{dashboard.name}",
        "title": dashboard.title,
        "description": dashboard.says,
        "tags": ["pdcoord"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": _VARIABLES},
        "panels": panels,
    }
    return json.dumps(document, indent=1) + "\n"


def _place(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}


def _panel(panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    custom = {"fillOpacity": 10, "stacking": {"mode": "normal" if panel.is_stacked else "none"}}
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.says,
        "datasource": _SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "custom": custom}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {
                "refId": chr(ord("A") + number),
                "datasource": _SOURCE,
                "expr": query["expr"],
                "legendFormat": query["legend"],
            }
            for number, query in enumerate(panel.queries)
        ],
    }


_VARIABLES: list[dict[str, Any]] = [
    {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
    {
        "name": "model",
        "label": "Model",
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": "label_values(pdcoord_gateway_fallback_share, model)", "refId": "model"},
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
        "refresh": 2,
    },
]


def main() -> int:
    """Write every dashboard."""
    drawn = FOLDER / "dashboards"
    drawn.mkdir(exist_ok=True)
    for dashboard in load():
        (drawn / f"{dashboard.name}.json").write_text(render(dashboard), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
