"""What the benchmark prints: the published table and ours, goodput beside rivals, what trouble costs."""

from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.policies.adversity import NONE
from pdcoord.sim.study.results import OURS


def show(results: dict[str, Any], console: Console) -> None:
    if rows := results.get("seed_table"):
        console.print(_seed_table(rows))
    for workload, own in results.get("suite", {}).items():
        console.print(_suite_table(workload, own))
    if adversity := results.get("adversity"):
        console.print(_adversity_table(adversity))
    table = Table(title="Bars")
    for name in ("bar", "met", "found"):
        table.add_column(name)
    for bar in results["bars"]:
        table.add_row(bar["name"], "yes" if bar["is_met"] else "NO", bar["why"])
    console.print(table)


def _seed_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Factors over round robin: published, llm-d simulated, pdcoord simulated")
    table.add_column("row")
    names = (
        "rate /s",
        "tok/s published",
        "llm-d",
        "pdcoord",
        "TTFT published",
        "llm-d p50",
        "pdcoord p50",
        "p99",
        "p99",
    )
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        theirs, ours = row["factors"]["llm-d"], row["factors"][OURS]
        table.add_row(
            f"{row['name']} ({row['pods']} pods)",
            f"{row['rate_per_s']:.2f}",
            *factor_cells(row),
            f"{theirs['ttft_p99']:.1f}",
            f"{ours['ttft_p99']:.1f}",
        )
    return table


def factor_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Throughput and TTFT p50 as factors over round robin: published, llm-d's, ours."""
    theirs, ours = row["factors"]["llm-d"], row["factors"][OURS]
    return (
        _range(row["throughput"]),
        f"{theirs['throughput']:.2f}",
        f"{ours['throughput']:.2f}",
        _range(row["ttft"]),
        f"{theirs['ttft_p50']:.1f}",
        f"{ours['ttft_p50']:.1f}",
    )


def _range(pair: list[float]) -> str:
    low, high = pair
    return f"{low:g}" if low == high else f"{low:g}-{high:g}"


def _suite_table(workload: str, own: dict[str, Any]) -> Table:
    table = Table(title=f"{workload}: best goodput, calls within objectives per second")
    table.add_column("router")
    for name in ("seeds", "offered /s", "mean", "stdev", "ours / theirs"):
        table.add_column(name, justify="right")
    ours = own["finals"][OURS]["peak"]["mean"]
    for label, final in sorted(own["finals"].items(), key=lambda item: -item[1]["peak"]["mean"]):
        peak = final["peak"]
        cells = (peak["offered_per_s"], peak["mean"], peak["stdev"], ours / max(peak["mean"], 1e-9))
        table.add_row(label, str(len(peak["seeds"])), *(f"{cell:.2f}" for cell in cells))
    return table


def _adversity_table(adversity: dict[str, Any]) -> Table:
    kinds = adversity["kinds"]
    labels = list(kinds[NONE])
    table = Table(
        title=f"Goodput of mixed traffic at rate x{adversity['rate']:.2f}, and what trouble leaves of it"
    )
    table.add_column("")
    for label in labels:
        table.add_column(label, justify="right")
    for kind, own in kinds.items():
        cells = []
        for label in labels:
            value, whole = own[label]["goodput_per_s"], kinds[NONE][label]["goodput_per_s"]
            share = "" if kind == NONE else f" ({100 * value / max(whole, 1e-9):.0f} %)"
            cells.append(f"{value:.1f}{share}")
        table.add_row(kind, *cells)
    return table
