"""The tables of docs/policies-benchmark.md, drawn from benchmarks/results/policies.json.

`python -m benchmarks.policies.page` draws its marked sections anew.
"""

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.policies import adversity, bars
from benchmarks.policies.report import factor_cells
from benchmarks.policies.verdict import Verdict, verdicts
from pdcoord.sim.study.results import OURS
from sidecar.describe import redraw

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "policies-benchmark.md"
RESULTS = ROOT / "benchmarks" / "results" / "policies.json"


def drawn(text: str, results: dict[str, Any]) -> str:
    """The page with its tables drawn anew."""
    return redraw(text, lambda name: "".join(f"{line}\n" for line in SECTIONS[name](results)))


def _table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _published(results: dict[str, Any]) -> Iterator[str]:
    """Factors over round robin, as published and as simulated."""

    def rows() -> Iterator[Sequence[str]]:
        for row in results["seed_table"]:
            yield row["name"], str(row["pods"]), *factor_cells(row)

    head = ("row", "pods", "throughput, published", "llm-d", "pdcoord", "TTFT, published", "llm-d", "pdcoord")
    yield from _table(head, rows())


def _beside(results: dict[str, Any]) -> Iterator[str]:
    """Ours over llm-d in the row's own setting, at the rate of comparison."""

    def rows() -> Iterator[Sequence[str]]:
        for row in results["seed_table"]:
            ours, figures = row["figures"][OURS], row["figures"]
            theirs = figures[row["llmd"]]
            peak = max(own["peak_tokens_per_s"] for name, own in figures.items() if name.startswith("llm-d"))
            yield (
                row["name"],
                f"{row['rate_per_s']:.1f}",
                f"{ours['tokens_per_s']:,.0f}",
                _seeds(ours["tokens_per_s"] / theirs["tokens_per_s"], row["by_seed"]["tokens_per_s"]),
                _seeds(theirs["ttft_p50_s"] / ours["ttft_p50_s"], row["by_seed"]["ttft_p50_s"]),
                _seeds(theirs["ttft_p99_s"] / ours["ttft_p99_s"], row["by_seed"]["ttft_p99_s"]),
                f"{ours['peak_tokens_per_s'] / peak:.2f}",
            )

    head = ("row", "calls/s", "tokens/s", "tokens/s", "TTFT p50", "TTFT p99", "peak")
    yield from _table(head, rows())


def _seeds(of_means: float, by_seed: Sequence[float]) -> str:
    """A ratio of means, with the middle seed's and the range."""
    middle = statistics.median(by_seed)
    return f"{of_means:.2f} (middle {middle:.2f}, {min(by_seed):.2f}-{max(by_seed):.2f})"


def _suite(results: dict[str, Any]) -> Iterator[str]:
    """Best goodput beside the best rival's, by workload."""

    def rows() -> Iterator[Sequence[str]]:
        for workload, own in results["suite"].items():
            found = verdicts(own["finals"])
            seeds = len(own["finals"][OURS]["peak"]["seeds"])
            cells = [cell for column in found.values() for cell in (column.best, _ratio(column))]
            yield workload, str(seeds), *cells

    columns = [
        cell for name in ("in one vendor", "as if it could cross") for cell in (f"best rival {name}", "ratio")
    ]
    yield from _table(("workload", "seeds", *columns), rows())


def _ratio(of: Verdict) -> str:
    """A ratio of means, half the width of its interval, and the range of seeds."""
    half = "" if of.high is None else f" ±{of.high - of.ratio:.2f}"
    return f"{of.ratio:.2f}{half} ({min(of.by_seed):.2f}-{max(of.by_seed):.2f})"


def _trouble(results: dict[str, Any]) -> Iterator[str]:
    """Goodput under each trouble, and its share of the router's own without any."""
    kinds = results["adversity"]["kinds"]
    routers = list(kinds[adversity.NONE])

    def rows() -> Iterator[Sequence[str]]:
        for kind, found in kinds.items():
            cells = [kind]
            for router in routers:
                own, usual = found[router]["goodput_per_s"], kinds[adversity.NONE][router]["goodput_per_s"]
                share = f" ({own / usual:.0%})" if kind != adversity.NONE and usual else ""
                cells.append(f"{own:.1f}{share}")
            yield cells

    yield from _table(("", *routers), rows())


def _bars(results: dict[str, Any]) -> Iterator[str]:
    """The bars that were missed."""
    found = bars.bars(results)
    missed = [bar for bar in found if not bar["is_met"]]
    yield f"{len(found) - len(missed)} of {len(found)} bars are met. Missed:"
    yield ""
    for bar in missed:
        yield f"- {bar['name']}: {bar['why']}"


SECTIONS: dict[str, Callable[[dict[str, Any]], Iterator[str]]] = {
    "published": _published,
    "beside": _beside,
    "suite": _suite,
    "trouble": _trouble,
    "bars": _bars,
}


def main() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(drawn(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
