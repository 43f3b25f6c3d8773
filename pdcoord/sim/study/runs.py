"""One router under one rate of traffic: its results, what they add up to, and the folder they are kept in."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pdcoord.sim.study.lines import summary_data, write_results
from pdcoord.sim.study.plots import Bar, Curve, Panel, Point, draw_bars, draw_panels, draw_time_line
from pdcoord.sim.study.results import CallResult
from pdcoord.sim.study.statistics import Distribution, Summary, Way, by_kind, summarize, ways
from pdcoord.sim.study.timelines import time_line

SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        router: its label.
        wall_s: how long it took; printed, never written, so that equal runs have equal files.
    """

    router: str
    rate_scale: float
    results: Sequence[CallResult]
    wall_s: float = 0.0

    @cached_property
    def summary(self) -> Summary:
        return summarize(self.results)

    @cached_property
    def kinds(self) -> dict[str, Summary]:
        return by_kind(self.results)

    @cached_property
    def ways(self) -> dict[Way, int]:
        return ways(self.results)

    @property
    def label(self) -> str:
        return f"{self.router} x{self.rate_scale:g}"

    @property
    def stem(self) -> str:
        """Name of its files, without the ending."""
        return f"{self.router}-x{self.rate_scale:g}"


def write_runs(folder: Path, head: dict[str, Any], runs: Sequence[Run], *, is_svg: bool) -> None:
    """Results as JSON lines, a summary, and plots; the same bytes for the same runs."""
    folder.mkdir(parents=True, exist_ok=True)
    for run in runs:
        write_results(folder / f"{run.stem}.jsonl", run.results)
    data = {**head, "runs": [_run_data(run) for run in runs]}
    (folder / SUMMARY_FILE).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    for suffix in (".png", ".svg") if is_svg else (".png",):
        _draw(folder, suffix, runs)


def _run_data(run: Run) -> dict[str, Any]:
    return {
        "router": run.router,
        "rate_scale": run.rate_scale,
        "results": f"{run.stem}.jsonl",
        "summary": summary_data(run.summary),
        "kinds": {kind: summary_data(summary) for kind, summary in run.kinds.items()},
        "ways": [
            {"prefill": way.prefill, "decode": way.decode, "why": way.why, "calls": count}
            for way, count in run.ways.items()
        ],
    }


def _draw(folder: Path, suffix: str, runs: Sequence[Run]) -> None:
    draw_panels(folder / f"rates{suffix}", "Against the offered rate", rate_panels(runs))
    draw_bars(folder / f"ways{suffix}", "Where calls went, and why", "share of calls", way_bars(runs))
    for run in runs:
        line = time_line(run.results)
        if line.pools:
            draw_time_line(folder / f"timeline-{run.stem}{suffix}", f"{run.label}: load by pool", line)


def rate_panels(runs: Sequence[Run]) -> list[Panel]:
    """Throughput, TTFT, TPOT and goodput against the rate, a curve for each router."""
    x_label = "calls offered per second"
    return [
        Panel("Throughput", x_label, "output tokens per second", _curves(runs, "output_tokens_per_s")),
        Panel("Goodput", x_label, "calls within objectives per second", _curves(runs, "goodput_per_s")),
        Panel("TTFT, p50 and p99 (dashed)", x_label, "seconds", _moment_curves(runs, "ttft"), is_log=True),
        Panel("TPOT, p50 and p99 (dashed)", x_label, "seconds", _moment_curves(runs, "tpot"), is_log=True),
    ]


def way_bars(runs: Sequence[Run], *, ways_max: int = 12) -> list[Bar]:
    """A bar for each run, stacked by way; ways beyond the most frequent `ways_max` are one part."""
    totals: dict[Way, int] = {}
    for run in runs:
        for way, count in run.ways.items():
            totals[way] = totals.get(way, 0) + count
    ranked = sorted(totals, key=lambda way: (-totals[way], way))
    shown = ranked[:ways_max]
    bars = []
    for run in runs:
        all_calls = max(1, len(run.results))
        parts = {_way_label(way): run.ways.get(way, 0) / all_calls for way in shown}
        if len(ranked) > ways_max:
            parts["other ways"] = 1.0 - sum(parts.values())
        bars.append(Bar(run.label, parts))
    return bars


def _way_label(way: Way) -> str:
    if not way.decode:
        return f"nowhere: {way.why}"
    where = way.decode if way.prefill == way.decode else f"{way.prefill} → {way.decode}"
    return f"{where}: {way.why}"


def _curves(runs: Sequence[Run], figure: str) -> list[Curve]:
    return [
        Curve(router, [Point(run.summary.offered_per_s, getattr(run.summary, figure)) for run in own])
        for router, own in _by_router(runs)
    ]


def _moment_curves(runs: Sequence[Run], part: str) -> list[Curve]:
    curves = []
    for router, own in _by_router(runs):
        measured: list[tuple[float, Distribution]] = [
            (run.summary.offered_per_s, getattr(run.summary, part)) for run in own
        ]
        measured = [(rate, found) for rate, found in measured if found.count]
        curves.append(Curve(router, [Point(rate, found.p50) for rate, found in measured]))
        curves.append(Curve(router, [Point(rate, found.p99) for rate, found in measured], is_dashed=True))
    return curves


def _by_router(runs: Sequence[Run]) -> Iterator[tuple[str, list[Run]]]:
    for router in dict.fromkeys(run.router for run in runs):
        own = [run for run in runs if run.router == router]
        yield router, sorted(own, key=lambda run: run.rate_scale)
