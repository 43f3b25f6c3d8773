"""What the results must show, and whether they do."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.policies.verdict import Verdict, verdicts
from pdcoord.sim.study.results import OURS

MIXED_RATIO_MIN = 1.3
SUITE_RATIO_MIN = 0.98
FIGURES = {"throughput": "tokens_per_s", "TTFT p50": "ttft_p50_s", "TTFT p99": "ttft_p99_s"}
"""What a row's checks at the rate of comparison are called, and its figures."""
ROW_TOLERANCE = 0.01
"""Below llm-d by less than this share is no loss: one call more or less in the run's last batch."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One requirement with what was found."""

    name: str
    is_met: bool
    why: str


def bars(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Every bar of the parts that were run."""
    found = [*_seed_bars(results.get("seed_table", []))]
    suite = results.get("suite", {})
    for workload, own in suite.items():
        found += _suite_bars(workload, verdicts(own["finals"]))
    return [asdict(bar) for bar in found]


def _seed_bars(rows: list[dict[str, Any]]) -> Iterator[Bar]:
    for row in rows:
        llmd = row["factors"]["llm-d"]
        yield Bar(
            f"{row['name']}: llm-d beats round robin",
            llmd["throughput"] > 1.0 and llmd["ttft_p50"] > 1.0,
            f"throughput {llmd['throughput']:.2f}, TTFT p50 {llmd['ttft_p50']:.1f}",
        )
        ours, figures = row["figures"][OURS], row["figures"]
        best = {
            name: max((figures[r][name] for r in figures if r.startswith("llm-d")), default=0.0)
            for name in ("peak_tokens_per_s", "tokens_per_s")
        }
        theirs = figures[row["llmd"]]
        checks = {
            "peak throughput": _ratio(ours["peak_tokens_per_s"], best["peak_tokens_per_s"]),
            "throughput": _ratio(ours["tokens_per_s"], theirs["tokens_per_s"]),
            "TTFT p50": _ratio(theirs["ttft_p50_s"], ours["ttft_p50_s"]),
            "TTFT p99": _ratio(theirs["ttft_p99_s"], ours["ttft_p99_s"]),
        }
        short = [
            f"{name} {ratio:.3f}{_spread(row.get('by_seed', {}).get(FIGURES.get(name), []))}"
            for name, ratio in checks.items()
            if ratio < 1 - ROW_TOLERANCE
        ]
        yield Bar(
            f"{row['name']}: pdcoord at or above llm-d",
            not short,
            f"below: {', '.join(short)}" if short else "throughput, TTFT p50 and p99",
        )


def _spread(by_seed: list[float]) -> str:
    return f" ({min(by_seed):.2f} to {max(by_seed):.2f} by seed)" if len(by_seed) > 1 else ""


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _suite_bars(workload: str, verdict: dict[str, Verdict]) -> Iterator[Bar]:
    for column, own in verdict.items():
        said = f"{own.ratio:.3f} of {own.best}'s goodput ({own.spread})"
        if workload == "mix":
            yield Bar(f"mix, rivals {column}: at least {MIXED_RATIO_MIN}", own.ratio >= MIXED_RATIO_MIN, said)
        yield Bar(
            f"{workload}, rivals {column}: not below by more than 2 %", own.ratio >= SUITE_RATIO_MIN, said
        )
