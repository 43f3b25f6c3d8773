"""Goodput under objectives against rate on every workload, beside every rival in both columns."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.policies.climb import Climb, climb
from benchmarks.policies.jobs import Done, Job, Pool
from pdcoord.sim.routers.registry import RIVALS, SPLITTING
from pdcoord.sim.study.contenders import CROSSING
from pdcoord.sim.study.results import OURS

VENDORS = "ABC"
MODEL = "llama"
START_RATES = {
    "mooncake": 0.7,
    "azure": 6.0,
    "rag": 10.0,
    "shared-prefix": 30.0,
    "mix": 20.0,
    "chat": 60.0,
    "agents": 40.0,
}
"""Where climbs begin: about where round robin saturates, of each workload's own rates."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is run.

    Attributes:
        finalists: rivals of each column that are run with every seed, by their best with seed 0.
        step: factor from one rate of a climb to the next.
        rates_beside: rates on either side of a finalist's best that are run with every seed too.
    """

    rivals: Sequence[str]
    seeds: int
    seconds: float
    finalists: int
    step: float
    rates_beside: int
    traces: Path | None


def columns(rivals: Sequence[str]) -> dict[str, list[str]]:
    """Labels by column. A rival that never splits is the same in both."""
    return {
        "one vendor": list(rivals),
        "as if they could cross": [f"{r}{CROSSING}" if r in SPLITTING else r for r in rivals],
    }


def all_rivals() -> list[str]:
    return list(RIVALS)


def goodput(done: Done) -> float:
    return float(done.summary["goodput_per_s"])


def study(pool: Pool, plan: Plan, workloads: Sequence[str], told: Callable[[Done], None]) -> dict[str, Any]:
    """Results by workload."""
    labels = list(dict.fromkeys([OURS, *(label for own in columns(plan.rivals).values() for label in own)]))
    bases = [_base(plan, workload, label) for workload in workloads for label in labels]
    climbs = climb(pool, bases, goodput, plan.step, told)
    found: dict[str, Any] = {}
    finals: list[Job] = []
    for workload in workloads:
        own = {each.base.router: each for each in climbs if each.base.workload == workload}
        chosen = _finalists(plan, own)
        finals += [job for label in chosen for job in _final_jobs(plan, own[label])]
        found[workload] = {"scouted": {label: _curve(own[label].done) for label in own}}
    runs = pool.run(list(dict.fromkeys(finals)), told)
    for workload in workloads:
        mine = [done for done in runs if done.job.workload == workload]
        found[workload]["finals"] = _finals(mine)
        found[workload]["verdict"] = _verdict(plan, found[workload]["finals"])
    return found


def _base(plan: Plan, workload: str, label: str) -> Job:
    rate = START_RATES[workload]
    return Job(VENDORS, MODEL, label, workload, rate, 0, plan.seconds, traces=plan.traces)


def _finalists(plan: Plan, own: dict[str, Climb]) -> list[str]:
    chosen = [OURS, "round-robin"]
    for labels in columns(plan.rivals).values():
        ranked = sorted(labels, key=lambda label: -goodput(own[label].best(goodput)))
        chosen += ranked[: plan.finalists]
    return list(dict.fromkeys(label for label in chosen if label in own))


def _final_jobs(plan: Plan, own: Climb) -> list[Job]:
    best = own.done.index(own.best(goodput))
    beside = own.done[max(0, best - plan.rates_beside) : best + plan.rates_beside + 1]
    return [replace(done.job, seed=seed) for done in beside for seed in range(plan.seeds)]


def _curve(done: Sequence[Done]) -> list[dict[str, Any]]:
    return [{"rate": each.job.rate, "seed": each.job.seed, **each.summary} for each in done]


def _finals(runs: Sequence[Done]) -> dict[str, Any]:
    """For each finalist the rate with the best mean goodput, and every seed's there."""
    found: dict[str, Any] = {}
    for label in dict.fromkeys(done.job.router for done in runs):
        own = [done for done in runs if done.job.router == label]
        rates = sorted({done.job.rate for done in own})
        points = [_point(rate, [done for done in own if done.job.rate == rate]) for rate in rates]
        found[label] = {"points": points, "peak": max(points, key=lambda point: point["mean"])}
    return found


def _point(rate: float, runs: Sequence[Done]) -> dict[str, Any]:
    values = [goodput(done) for done in sorted(runs, key=lambda done: done.job.seed)]
    offered = statistics.fmean(done.summary["offered_per_s"] for done in runs)
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {
        "rate": rate,
        "offered_per_s": offered,
        "mean": statistics.fmean(values),
        "stdev": spread,
        "seeds": values,
    }


def _verdict(plan: Plan, finals: dict[str, Any]) -> dict[str, Any]:
    """Ours over the best rival of each column, seed by seed."""
    ours = finals[OURS]["peak"]
    verdict: dict[str, Any] = {}
    for column, labels in columns(plan.rivals).items():
        there = [label for label in labels if label in finals]
        best = max(there, key=lambda label: finals[label]["peak"]["mean"])
        theirs = finals[best]["peak"]
        ratios = [mine / max(other, 1e-9) for mine, other in zip(ours["seeds"], theirs["seeds"], strict=True)]
        verdict[column] = {
            "best": best,
            "ratio": ours["mean"] / max(theirs["mean"], 1e-9),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
        }
    return verdict
