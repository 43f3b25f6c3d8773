"""Rounds to figures: medians, spreads, ratios to the splice of the same round, and a table of them."""

import statistics
from dataclasses import asdict, dataclass
from typing import Any

BAR = 1.6
"""The most that gateway and sidecar may spend per event, in splices."""

Round = dict[str, dict[str, float]]
"""What `load` measured, by contender."""


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
        ratio: CPU per event over that of the splice in the same round.
        added_us: median age of an event at the client, less that of the splice in the same round.
        is_within_bar: None for what no bar is set for.
    """

    name: str
    cpu_us_per_event: Spread
    ratio: Spread
    added_us: Spread
    events_per_s: Spread
    is_within_bar: bool | None


def rows(rounds: list[Round], reference: str, held_to_bar: set[str]) -> list[Row]:
    """One row per contender, in the order of the first round."""
    found = []
    for name in rounds[0]:
        mine = [each[name] for each in rounds]
        floor = [each[reference] for each in rounds]
        pairs = list(zip(mine, floor, strict=True))
        ratio = Spread.of([a["cpu_us_per_event"] / b["cpu_us_per_event"] for a, b in pairs])
        found.append(
            Row(
                name=name,
                cpu_us_per_event=Spread.of([each["cpu_us_per_event"] for each in mine]),
                ratio=ratio,
                added_us=Spread.of([a["age_us_p50"] - b["age_us_p50"] for a, b in pairs]),
                events_per_s=Spread.of([each["events_per_s"] for each in mine]),
                is_within_bar=ratio.median <= BAR if name in held_to_bar else None,
            )
        )
    return found


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


def record(found: list[Row], rounds: list[Round], facts: dict[str, Any]) -> dict[str, Any]:
    """Everything, for a file."""
    return {"machine": facts, "bar": BAR, "rows": [asdict(row) for row in found], "rounds": rounds}
