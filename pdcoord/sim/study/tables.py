"""What a study prints: one table of runs side by side, one of the ways that calls went."""

from collections.abc import Callable, Mapping, Sequence

from rich.table import Table

from pdcoord.sim.study.statistics import Distribution, Summary, Way

_ROWS: tuple[tuple[str, Callable[[Summary], float], str], ...] = (
    ("calls", lambda s: s.calls, "{:.0f}"),
    ("served", lambda s: s.ok, "{:.0f}"),
    ("shed", lambda s: s.shed, "{:.0f}"),
    ("failed", lambda s: s.failed, "{:.0f}"),
    ("unfinished", lambda s: s.unfinished, "{:.0f}"),
    ("offered /s", lambda s: s.offered_per_s, "{:.2f}"),
    ("served /s", lambda s: s.requests_per_s, "{:.2f}"),
    ("output tokens /s", lambda s: s.output_tokens_per_s, "{:.0f}"),
    ("within objectives %", lambda s: 100 * s.good_share, "{:.1f}"),
    ("goodput /s", lambda s: s.goodput_per_s, "{:.2f}"),
    ("split %", lambda s: 100 * s.split_share, "{:.1f}"),
    ("prompt cached %", lambda s: 100 * s.cached_share, "{:.1f}"),
    ("fell back", lambda s: s.fell_back, "{:.0f}"),
)
_MOMENTS: tuple[tuple[str, Callable[[Distribution], float]], ...] = (
    ("mean", lambda d: d.mean),
    ("p50", lambda d: d.p50),
    ("p90", lambda d: d.p90),
    ("p99", lambda d: d.p99),
)


def summary_table(title: str, summaries: Mapping[str, Summary]) -> Table:
    """Runs side by side, a column each."""
    table = Table(title=title)
    table.add_column("")
    for name in summaries:
        table.add_column(name, justify="right")
    for label, figure, form in _ROWS:
        table.add_row(label, *(form.format(figure(summary)) for summary in summaries.values()))
    for label, part in (("TTFT", "ttft"), ("TPOT", "tpot")):
        for moment, value in _MOMENTS:
            cells = (milliseconds(getattr(s, part), value) for s in summaries.values())
            table.add_row(f"{label} {moment} ms", *cells)
    return table


def milliseconds(distribution: Distribution, value: Callable[[Distribution], float]) -> str:
    """A moment in milliseconds; a dash where nothing was measured."""
    return f"{1e3 * value(distribution):.1f}" if distribution.count else "-"


def kinds_table(title: str, kinds: Mapping[str, Mapping[str, Summary]]) -> Table:
    """A line for each kind of call of each run."""
    table = Table(title=title)
    table.add_column("kind")
    table.add_column("router")
    for name in ("calls", "within objectives %", "TTFT p50 ms", "TTFT p99 ms", "TPOT p50 ms", "TPOT p99 ms"):
        table.add_column(name, justify="right")
    for kind, runs in kinds.items():
        for router, summary in runs.items():
            table.add_row(
                kind,
                router,
                str(summary.calls),
                f"{100 * summary.good_share:.1f}",
                milliseconds(summary.ttft, lambda d: d.p50),
                milliseconds(summary.ttft, lambda d: d.p99),
                milliseconds(summary.tpot, lambda d: d.p50),
                milliseconds(summary.tpot, lambda d: d.p99),
            )
    return table


def ways_table(title: str, runs: Mapping[str, Mapping[Way, int]], *, rows_max: int = 12) -> Table:
    """Where calls went and why, most first; the rest is one line."""
    table = Table(title=title)
    for name in ("router", "prefill", "decode", "why"):
        table.add_column(name)
    for name in ("calls", "%"):
        table.add_column(name, justify="right")
    for router, counts in runs.items():
        total = sum(counts.values())
        shown: Sequence[tuple[Way, int]] = list(counts.items())[:rows_max]
        for way, count in shown:
            cells = (router, way.prefill or "-", way.decode or "-", way.why)
            table.add_row(*cells, str(count), f"{100 * count / total:.1f}")
        rest = total - sum(count for _, count in shown)
        if rest:
            table.add_row(router, "other ways", "", "", str(rest), f"{100 * rest / total:.1f}")
    return table
