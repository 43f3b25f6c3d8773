"""The published table of colocated prefix-aware routing against round robin, run in the simulator."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.policies.climb import Climb, climb
from benchmarks.policies.jobs import Done, Job, Pool
from pdcoord.sim.study.results import OURS

STEP = 1.3
"""From one rate to the next."""
ROUND_ROBIN = "round-robin"
LLMD = ("llm-d", "llm-d-precise", "llm-d-sticky")
START_RATE_PER_POD = {"granite": 0.3, "sarvam": 1.5}
"""Where climbs begin: not far below what round robin can do."""
PEAK_SHARE = 0.97
"""From this share of its best throughput on, llm-d is near its best."""
COMPARED: dict[str, Callable[[dict[str, Any]], float]] = {
    "tokens_per_s": lambda summary: float(summary["steady_tokens_per_s"]),
    "ttft_p50_s": lambda summary: float(summary["ttft"]["p50"]),
    "ttft_p99_s": lambda summary: float(summary["ttft"]["p99"]),
}
"""Figures at the rate of comparison, and where a run's summary has them."""


@dataclass(frozen=True, slots=True)
class Row:
    """One published row.

    Attributes:
        llmd: the setting that the run had: granite precise, sarvam approximate.
        throughput, ttft: published factors of llm-d over round robin, low and high.
    """

    vendors: str
    pods: int
    model: str
    llmd: str
    throughput: tuple[float, float]
    ttft: tuple[float, float]

    @property
    def name(self) -> str:
        return f"{'+'.join(self.vendors)} {self.model}"


ROWS = (
    Row("A", 4, "granite", "llm-d-precise", (1.25, 1.36), (16.0, 16.0)),
    Row("A", 4, "sarvam", "llm-d", (2.0, 2.0), (22.0, 22.0)),
    Row("B", 8, "granite", "llm-d-precise", (1.79, 1.79), (21.0, 21.0)),
    Row("B", 8, "sarvam", "llm-d", (1.83, 1.83), (5.0, 5.0)),
    Row("C", 8, "granite", "llm-d-precise", (1.34, 1.34), (18.0, 18.0)),
    Row("AB", 12, "granite", "llm-d-precise", (1.85, 1.85), (3.4, 5.6)),
    Row("AB", 12, "sarvam", "llm-d", (3.0, 3.0), (2.85, 4.54)),
    Row("ABC", 20, "granite", "llm-d-precise", (1.91, 1.91), (5.4, 5.4)),
)


def tokens_per_s(done: Done) -> float:
    return float(done.summary["steady_tokens_per_s"])


def study(
    pool: Pool, seeds: int, seconds: float, told: Callable[[Done], None], rows: Sequence[Row] = ROWS
) -> list[dict[str, Any]]:
    """Every row: the others climb with seed 0, ours runs where llm-d was near its best and about its peak.

    Then the rate of comparison is run with every seed.
    """
    others = (ROUND_ROBIN, *LLMD)
    bases = [_base(row, router, seconds) for row in rows for router in others]
    climbs = climb(pool, bases, tokens_per_s, STEP, told)
    by_row = [dict(zip(others, climbs[i * len(others) :], strict=False)) for i in range(len(rows))]
    for row, own in zip(rows, by_row, strict=True):
        own[OURS] = Climb(_base(row, OURS, seconds), STEP)
    jobs = [
        replace(own[OURS].base, rate=rate)
        for row, own in zip(rows, by_row, strict=True)
        for rate in _rates_of_ours(row, own)
    ]
    for done in pool.run(jobs, told):
        own = next(own for row, own in zip(rows, by_row, strict=True) if _is_of(done, row))
        own[OURS].done.append(done)
    jobs = [
        replace(own[router].base, rate=_rate(row, own), seed=seed)
        for row, own in zip(rows, by_row, strict=True)
        for router in own
        for seed in range(seeds)
    ]
    runs = pool.run(jobs, told)
    return [
        _row(row, own, [d for d in runs if _is_of(d, row)]) for row, own in zip(rows, by_row, strict=True)
    ]


def _base(row: Row, router: str, seconds: float) -> Job:
    rate = START_RATE_PER_POD[row.model] * row.pods
    return Job(row.vendors, row.model, router, "seed", rate, 0, seconds, is_whole=True)


def _rates_of_ours(row: Row, own: dict[str, Climb]) -> list[float]:
    peaks = [own[router].best(tokens_per_s).job.rate for router in LLMD]
    # Nor need both be at their best at one rate.
    return sorted({_rate(row, own), max(peaks) / STEP, max(peaks)})


def _is_of(done: Done, row: Row) -> bool:
    return (done.job.vendors, done.job.model) == (row.vendors, row.model)


def _rate(row: Row, own: dict[str, Climb]) -> float:
    """The least rate at which llm-d generates more than round robin by the published factor.

    That is the published runs' operating point as near as the simulation has it: times depend on the
    rate, and few rows name theirs. Where no rate shows the factor, the least at which llm-d is near its best.
    """
    base = {done.job.rate: tokens_per_s(done) for done in own[ROUND_ROBIN].done}
    done = own[row.llmd].done
    best = max(map(tokens_per_s, done))
    for each in done:
        low = base.get(each.job.rate, 0.0) * row.throughput[0]
        if low > 0.0 and tokens_per_s(each) >= low:
            return each.job.rate
    return next(each.job.rate for each in done if tokens_per_s(each) >= PEAK_SHARE * best)


def _row(row: Row, own: dict[str, Climb], runs: Sequence[Done]) -> dict[str, Any]:
    figures: dict[str, dict[str, float]] = {}
    for router, climbed in own.items():
        at_rate = [done.summary for done in runs if done.job.router == router]
        figures[router] = {
            "peak_tokens_per_s": tokens_per_s(climbed.best(tokens_per_s)),
            **{figure: statistics.fmean(map(read, at_rate)) for figure, read in COMPARED.items()},
            "cached_share": statistics.fmean(s["cached_share"] for s in at_rate),
            "served": sum(s["ok"] for s in at_rate),
            "calls": sum(s["calls"] for s in at_rate),
        }
    base, theirs, ours = figures[ROUND_ROBIN], figures[row.llmd], figures[OURS]
    return {
        **asdict(row),
        "name": row.name,
        "rate_per_s": _rate(row, own),
        "figures": figures,
        "by_seed": {figure: _by_seed(row, runs, figure) for figure in COMPARED},
        "curves": {
            router: [[each.job.rate, tokens_per_s(each)] for each in climbed.done]
            for router, climbed in own.items()
        },
        "factors": {
            "llm-d": _factors(theirs, base),
            OURS: _factors(ours, base),
        },
    }


def _by_seed(row: Row, runs: Sequence[Done], figure: str) -> list[float]:
    """Ours over llm-d's in the row's own setting, seed by seed; more is better."""
    read = COMPARED[figure]
    found = {(done.job.router, done.job.seed): read(done.summary) for done in runs}
    seeds = sorted({seed for _, seed in found})
    pairs = [(found[OURS, seed], found[row.llmd, seed]) for seed in seeds]
    is_less_better = figure.startswith("ttft")
    return [_ratio(theirs, ours) if is_less_better else _ratio(ours, theirs) for ours, theirs in pairs]


def _factors(own: dict[str, float], base: dict[str, float]) -> dict[str, float]:
    return {
        "throughput": _ratio(own["peak_tokens_per_s"], base["peak_tokens_per_s"]),
        "throughput_at_rate": _ratio(own["tokens_per_s"], base["tokens_per_s"]),
        "ttft_p50": _ratio(base["ttft_p50_s"], own["ttft_p50_s"]),
        "ttft_p99": _ratio(base["ttft_p99_s"], own["ttft_p99_s"]),
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
