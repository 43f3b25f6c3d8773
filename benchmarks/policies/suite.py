"""Goodput under objectives against rate on every workload, beside every rival in both columns."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.policies.climb import Climb, climb
from benchmarks.policies.jobs import Done, Job, Pool
from benchmarks.policies.verdict import columns, undecided
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
BESIDE_SHARE = 0.75
"""Of the best goodput with seed 0: the rates beside that came so near are run with the first seeds too."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is run.

    Attributes:
        seeds: of those that decide the verdict.
        seeds_first: of every finalist.
        finalists: rivals of each column that are run with more seeds than one, by their best with seed 0.
        step: factor from one rate of a climb to the next.
    """

    rivals: Sequence[str]
    seeds: int
    seeds_first: int
    seconds: float
    finalists: int
    step: float
    traces: Path | None


def all_rivals() -> list[str]:
    return list(RIVALS)


def goodput(done: Done) -> float:
    return float(done.summary["goodput_per_s"])


def study(pool: Pool, plan: Plan, workloads: Sequence[str], told: Callable[[Done], None]) -> dict[str, Any]:
    """Results by workload.

    Everybody climbs with seed 0, finalists run about their best rates with the first seeds, and those that
    decide the verdict run at their best of these with every seed.
    """
    crossing = [f"{rival}{CROSSING}" for rival in plan.rivals if rival in SPLITTING]
    labels = list(dict.fromkeys([OURS, *plan.rivals, *crossing]))
    bases = [_base(plan, workload, label) for workload in workloads for label in labels]
    climbs = climb(pool, bases, goodput, plan.step, told)
    found: dict[str, Any] = {}
    finals: list[Job] = []
    for workload in workloads:
        own = {each.base.router: each for each in climbs if each.base.workload == workload}
        finals += [job for label in _finalists(plan, own) for job in _final_jobs(plan, own[label])]
        found[workload] = {"scouted": {label: _curve(own[label].done) for label in own}}
    runs = pool.run(finals, told)
    for workload in workloads:
        found[workload]["finals"] = _finals([done for done in runs if done.job.workload == workload])
    _decide(pool, plan, {workload: own["finals"] for workload, own in found.items()}, told)
    return found


def _decide(pool: Pool, plan: Plan, finals: dict[str, Any], told: Callable[[Done], None]) -> None:
    """Give every seed to whoever may be the best, until nobody without may be.

    Each round adds a finalist at least of every open workload to those that have every seed.
    """
    for _ in range(max(map(len, finals.values()), default=0)):
        open_ = [
            (workload, label) for workload, own in finals.items() for label in undecided(own, plan.seeds)
        ]
        if not open_:
            return
        jobs = {
            (workload, label): [
                replace(_base(plan, workload, label), rate=finals[workload][label]["peak"]["rate"], seed=seed)
                for seed in range(plan.seeds)
            ]
            for workload, label in open_
        }
        pool.run([job for own in jobs.values() for job in own], told)
        for (workload, label), own in jobs.items():
            finals[workload][label]["peak"] = _point(own[0].rate, [pool.known[job] for job in own])


def _base(plan: Plan, workload: str, label: str) -> Job:
    rate = START_RATES[workload]
    return Job(VENDORS, MODEL, label, workload, rate, 0, plan.seconds, traces=plan.traces)


def _finalists(plan: Plan, own: dict[str, Climb]) -> list[str]:
    chosen = [OURS, "round-robin"]
    for labels in columns(own).values():
        ranked = sorted(labels, key=lambda label: -goodput(own[label].best(goodput)))
        chosen += ranked[: plan.finalists]
    return list(dict.fromkeys(label for label in chosen if label in own))


def _final_jobs(plan: Plan, own: Climb) -> list[Job]:
    """At its best rate, and at those beside it that may be its best with other seeds."""
    peak = own.best(goodput)
    best = own.done.index(peak)
    beside = own.done[max(0, best - 1) : best + 2]
    near = [done for done in beside if goodput(done) >= BESIDE_SHARE * goodput(peak)]
    return [replace(done.job, seed=seed) for done in near for seed in range(plan.seeds_first)]


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
