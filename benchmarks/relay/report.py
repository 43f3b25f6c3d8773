"""Windows to figures: medians, spreads, ratios to the splice beside, and a table of them."""

import statistics
from dataclasses import asdict, dataclass
from typing import Any

BAR = 1.6
"""The most that gateway and sidecar may spend per event, in splices."""

Round = dict[str, dict[str, float]]
"""What `load` measured in one window, by contender."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One contender and the splice beside it, over the same window."""

    name: str
    figures: dict[str, float]
    splice: dict[str, float]


@dataclass(frozen=True, slots=True)
class Spread:
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))

    def shown(self, digits: int) -> str:
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}-{self.high:.{digits}f})"


@dataclass(frozen=True, slots=True)
class Row:
    """One contender over all rounds.

    Attributes:
        ratio: CPU per event over that of the splice beside it.
        added_us: median age of an event at the client, less that by way of the splice.
        is_within_bar: None for what no bar is set for.
    """

    name: str
    cpu_us_per_event: Spread
    ratio: Spread
    added_us: Spread
    events_per_s: Spread
    is_within_bar: bool | None


def rows(pairs: list[Pair], held_to_bar: set[str]) -> list[Row]:
    """The splice, then one row per contender in the order of the first round."""
    splices = [Pair("splice", pair.splice, pair.splice) for pair in pairs]
    names = list(dict.fromkeys(pair.name for pair in pairs))
    found = [_row("splice", splices, is_held=False)]
    return found + [
        _row(name, [p for p in pairs if p.name == name], is_held=name in held_to_bar) for name in names
    ]


def _row(name: str, pairs: list[Pair], *, is_held: bool) -> Row:
    key = "cpu_us_per_event"
    ratio = Spread.of([pair.figures[key] / pair.splice[key] for pair in pairs])
    return Row(
        name=name,
        cpu_us_per_event=Spread.of([pair.figures[key] for pair in pairs]),
        ratio=ratio,
        added_us=Spread.of([pair.figures["age_us_p50"] - pair.splice["age_us_p50"] for pair in pairs]),
        events_per_s=Spread.of([pair.figures["events_per_s"] for pair in pairs]),
        is_within_bar=ratio.median <= BAR if is_held else None,
    )


def table(found: list[Row]) -> str:
    """The rows as text, with the verdict on those that a bar is set for."""
    header = ("relay", "CPU us/event", "x splice", "added us, p50", "events/s", f"bar {BAR:g}x")
    lines = [header]
    for row in found:
        verdict = "" if row.is_within_bar is None else ("pass" if row.is_within_bar else "FAIL")
        lines.append(
            (
                row.name,
                row.cpu_us_per_event.shown(1),
                row.ratio.shown(2),
                row.added_us.shown(0),
                row.events_per_s.shown(0),
                verdict,
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
    )


def record(found: list[Row], pairs: list[Pair], facts: dict[str, Any]) -> dict[str, Any]:
    """Everything, for a file."""
    return {
        "machine": facts,
        "bar": BAR,
        "rows": [asdict(row) for row in found],
        "pairs": [asdict(pair) for pair in pairs],
    }
