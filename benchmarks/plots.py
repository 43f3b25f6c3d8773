"""Redraws the plots in benchmarks/results from the results that lie there."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.policies.adversity import NONE
from benchmarks.policies.verdict import columns
from pdcoord.sim.study.plots import Bar, Curve, Panel, Point, draw_bars, draw_panels
from pdcoord.sim.study.results import OURS

FOLDER = Path(__file__).resolve().parent / "results"
CURVES_MAX = 8
"""Rivals of one diagram, those with the best goodput."""


def draw_policies(results: dict[str, Any], folder: Path) -> Iterator[Path]:
    """Plots of `benchmarks.policies`; yields each file that was written."""
    if rows := results.get("seed_table"):
        yield _draw_seed_table(rows, folder / "policies-seed.png")
    for workload, own in results.get("suite", {}).items():
        yield _draw_workload(workload, own, folder / f"policies-{workload}.png")
    if adversity := results.get("adversity"):
        yield _draw_adversity(adversity, folder / "policies-adversity.png")


def _draw_seed_table(rows: list[dict[str, Any]], path: Path) -> Path:
    routers = list(rows[0]["figures"])
    panels = [
        Panel(
            row["name"],
            "calls offered per second",
            "output tokens per second",
            [Curve(router, [Point(*pair) for pair in sorted(row["curves"][router])]) for router in routers],
        )
        for row in rows
    ]
    draw_panels(path, "Shared prefixes of 7.2 K in, 1 K out, colocated: throughput", panels)
    return path


def _draw_workload(workload: str, own: dict[str, Any], path: Path) -> Path:
    panels = []
    for column, labels in columns(own["scouted"]).items():
        ranked = sorted(labels, key=lambda label: -max(p["goodput_per_s"] for p in own["scouted"][label]))
        panels += [
            Panel(
                f"{title}, rivals {column}",
                "calls offered per second",
                unit,
                [
                    Curve(label, _points(own["scouted"][label], keys))
                    for label in (OURS, *ranked[:CURVES_MAX])
                ],
                is_log=is_log,
            )
            for title, unit, keys, is_log in (
                ("Goodput", "calls within objectives per second", ("goodput_per_s",), False),
                ("TTFT p99", "seconds", ("ttft", "p99"), True),
            )
        ]
    draw_panels(path, f"{workload}: three vendors, 20 pods, seed 0", panels)
    return path


def _points(runs: list[dict[str, Any]], keys: tuple[str, ...]) -> list[Point]:
    points = []
    for run in runs:
        value: Any = run
        for key in keys:
            value = value[key]
        if value > 0:
            points.append(Point(run["offered_per_s"], value))
    return sorted(points, key=lambda point: point.x)


def _draw_adversity(adversity: dict[str, Any], path: Path) -> Path:
    kinds = adversity["kinds"]
    bars = [
        Bar(f"{kind}: {label}", {"goodput": figures["goodput_per_s"]})
        for kind, own in kinds.items()
        for label, figures in own.items()
        if kind != NONE or figures
    ]
    draw_bars(path, "Mixed traffic under trouble", "calls within objectives per second", bars)
    return path


def main() -> int:
    source = FOLDER / "policies.json"
    if not source.is_file():
        print(f"{source} is missing; run make bench-policies first", file=sys.stderr)
        return 2
    for path in draw_policies(json.loads(source.read_text(encoding="utf-8")), FOLDER):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
