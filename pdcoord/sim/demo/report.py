"""What the demo shows: a live line while traffic runs, and tables at the end."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from pdcoord.sim.demo.traffic import Answer


def quantile(values: Sequence[float], q: float) -> float:
    """The value below which a share `q` of the values lies (nearest rank); nan for none."""
    if not values:
        return float("nan")
    ranked = sorted(values)
    return ranked[max(0, math.ceil(q * len(ranked)) - 1)]


class Progressed:
    """A progress bar per run, with how requests were served so far."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._served: dict[TaskID, Counter[str]] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, name: str, request_count: int) -> TaskID:
        task = self._progress.add_task(name, total=request_count, note="")
        self._served[task] = Counter()
        return task

    def note(self, task: TaskID, answer: Answer) -> None:
        served = self._served[task]
        served["failed" if answer.error else answer.decision.split(";")[0] or "direct"] += 1
        note = "  ".join(f"{name} {count}" for name, count in sorted(served.items()))
        self._progress.update(task, advance=1, note=note)

    def say(self, line: str) -> None:
        self._progress.console.print(line)


def served_table(answers: Sequence[Answer]) -> Table:
    """How requests were served and why, by kind of prompt."""
    table = Table(title="How requests were served, and why")
    table.add_column("prompt")
    table.add_column("served; why")
    for name in ("requests", "failed", "TTFT p50 ms", "from cache"):
        table.add_column(name, justify="right")
    groups: dict[tuple[str, str], list[Answer]] = {}
    for answer in answers:
        groups.setdefault((answer.prompt.kind, answer.decision or "no answer"), []).append(answer)
    for (kind, decision), group in sorted(groups.items()):
        good = [answer for answer in group if not answer.error]
        table.add_row(
            kind,
            decision,
            str(len(group)),
            str(len(group) - len(good)),
            _ms(quantile([answer.ttft_s for answer in good], 0.5)),
            str(sum(answer.cached_tokens > 0 for answer in good)),
        )
    return table


def comparison_table(runs: dict[str, Sequence[Answer]]) -> Table:
    """The same traffic, served in each way; the ratio is that of the second run to the first."""
    table = Table(title="The same traffic in each run")
    table.add_column("")
    for name in runs:
        table.add_column(name, justify="right")
    first_name, second_name, *_ = runs
    table.add_column(f"{second_name} / {first_name}", justify="right")
    rows: dict[str, tuple[Callable[[Sequence[Answer]], float], str]] = {
        "requests": (lambda a: float(len(a)), "{:.0f}"),
        "failed": (lambda a: float(sum(bool(x.error) for x in a)), "{:.0f}"),
        "TTFT p50 ms": (lambda a: 1e3 * quantile([x.ttft_s for x in a if not x.error], 0.5), "{:.0f}"),
        "TTFT p99 ms": (lambda a: 1e3 * quantile([x.ttft_s for x in a if not x.error], 0.99), "{:.0f}"),
        "TPOT p50 ms": (lambda a: 1e3 * quantile(_tpots(a), 0.5), "{:.1f}"),
        "TPOT p99 ms": (lambda a: 1e3 * quantile(_tpots(a), 0.99), "{:.1f}"),
    }
    for name, (figure, form) in rows.items():
        values = [figure(answers) for answers in runs.values()]
        first, second = values[:2]
        ratio = f"{second / first:.2f}x" if "ms" in name and first > 0 else ""
        table.add_row(name, *(form.format(value) for value in values), ratio)
    return table


def _tpots(answers: Sequence[Answer]) -> list[float]:
    return [answer.tpot_s for answer in answers if not answer.error and answer.tpot_s is not None]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}" if seconds == seconds else "-"  # noqa: PLR0124 - nan is not itself
