"""`pdcoord replay`: decide recorded traffic again under a policy, and show the difference by request."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from pdcoord.policy.compile import compile_policy
from pdcoord.policy.endpoints import load_endpoints, match_endpoints, static_endpoints
from pdcoord.policy.errors import PolicyError, Problem
from pdcoord.policy.load import load_policies
from pdcoord.sim.study.contenders import UnknownContenderError, contender, run_on
from pdcoord.sim.study.differences import Decision, Difference, changes, differences, totals
from pdcoord.sim.study.lines import rounded
from pdcoord.sim.study.simulate import RATE_SCALE_MAX, OrderError, complain, progress_bar
from pdcoord.sim.study.stage import Stage, believed_stage, load_stage
from pdcoord.sim.study.tables import milliseconds
from pdcoord.sim.study.trafficlog import LogWorkload, TrafficLog, read_traffic

LOG_BYTES_MAX = 1 << 28
BAD_LINES_SHOWN_MAX = 10
CHANGES_SHOWN_MAX = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayOrder:
    """What a person asked for.

    Attributes:
        fleet: what the engines are; None to take them for what the policy believes of them.
        endpoints: for pools with a selector, where there is no fleet.
        out: file for a JSON line of each request.
    """

    log: Path
    policy: Path
    fleet: Path | None = None
    endpoints: Path | None = None
    router: str = "pdcoord"
    rate_scale: float = 1.0
    seed: int = 0
    out: Path | None = None


def replay(order: ReplayOrder, console: Console | None = None) -> int:
    """Replay and print; the exit status is 2 where a file or an option cannot be used."""
    shown = console if console is not None else Console()
    try:
        stage = _stage(order)
        log = _read(order)
        found = _run(order, stage, log, shown)
        if order.out is not None:
            order.out.write_bytes(b"".join(_line(each) for each in found))
    except (PolicyError, UnknownContenderError, OrderError, OSError) as error:
        complain("replay", error)
        return 2
    _print(order, log, found, shown)
    return 0


def _stage(order: ReplayOrder) -> Stage:
    if order.fleet is not None:
        return load_stage(order.policy, order.fleet)
    compiled = compile_policy(load_policies(order.policy))
    matched = list(static_endpoints(compiled.bindings))
    if order.endpoints is not None:
        matched += match_endpoints(compiled.bindings, load_endpoints(order.endpoints))
    elif missing := [b.pool.name for b in compiled.bindings if b.match_labels is not None]:
        message = f"{', '.join(missing)} have a selector; give --fleet or --endpoints for what it picks"
        raise PolicyError([Problem(str(order.policy), None, ("pools",), message)])
    return believed_stage(compiled.models[0], [each.endpoint for each in matched])


def _read(order: ReplayOrder) -> TrafficLog:
    if not 0.0 < order.rate_scale <= RATE_SCALE_MAX:
        raise OrderError(
            f"--rate-scale is {order.rate_scale:g}, expected more than 0, at most {RATE_SCALE_MAX:g}"
        )
    size_bytes = order.log.stat().st_size
    if size_bytes > LOG_BYTES_MAX:
        raise OrderError(f"{order.log} has {size_bytes} bytes, expected at most {LOG_BYTES_MAX}; split it")
    log = read_traffic(order.log.read_bytes())
    if not log.recorded:
        raise OrderError(
            f"{order.log} holds no call: {len(log.bad)} bad lines, {log.other_count} of other events, "
            f"{log.refused_count} refused before a plan; give results of simulate or lines request.done"
        )
    return log


def _run(order: ReplayOrder, stage: Stage, log: TrafficLog, console: Console) -> list[Difference]:
    workload = LogWorkload(log.recorded, rate_scale=order.rate_scale)
    with progress_bar(console) as progress:
        task = progress.add_task(f"replay under {order.policy.name}", total=workload.call_count)
        results = run_on(
            stage,
            contender(order.router),
            workload,
            seed=order.seed,
            progress=lambda done: progress.update(task, completed=done),
        )
        progress.update(task, completed=len(results))
    return differences(log.recorded, results)


def _line(difference: Difference) -> bytes:
    data = {
        "name": difference.name,
        "at_s": difference.at_s,
        "prompt_tokens": difference.prompt_tokens,
        "is_changed": difference.is_changed,
        "gained_s": difference.gained_s,
        "before": asdict(difference.before),
        "after": asdict(difference.after),
    }
    return msgspec.json.encode(rounded(data)) + b"\n"


def _print(order: ReplayOrder, log: TrafficLog, found: Sequence[Difference], console: Console) -> None:
    for bad in log.bad[:BAD_LINES_SHOWN_MAX]:
        console.print(f"{order.log}:{bad.number}: left out: {bad.why}", markup=False, soft_wrap=True)
    for text in _approximated(order, log):
        console.print(text, markup=False, soft_wrap=True)
    console.print(_changes_table(found))
    console.print(_totals_table([each.before for each in found], [each.after for each in found]))
    if order.out is not None:
        console.print(f"every request written to {order.out}", markup=False)


def _approximated(order: ReplayOrder, log: TrafficLog) -> list[str]:
    """What the log did not say, and what was taken for it."""
    said = [
        (
            "Which prompts begin alike is not in a log: calls of one tenant and kind that one endpoint "
            "computed share as much of one beginning as they had cached."
        )
    ]
    if log.bad:
        said.append(f"{len(log.bad)} lines could not be used.")
    if log.refused_count:
        said.append(f"{log.refused_count} calls were refused before a plan; their size is not known.")
    if log.output_guessed_count:
        said.append(f"{log.output_guessed_count} answers have the length that their duration suggests.")
    if order.fleet is None:
        said.append("Engines are taken for what the policy believes of them; --fleet says otherwise.")
    return said


def _changes_table(found: Sequence[Difference]) -> Table:
    listed = changes(found)
    changed = sum(change.count for change in listed)
    table = Table(title=f"{changed} of {len(found)} decisions changed")
    for name in ("before", "after", "why"):
        table.add_column(name)
    for name in ("calls", "TTFT sooner by, ms"):
        table.add_column(name, justify="right")
    for change in listed[:CHANGES_SHOWN_MAX]:
        gained = "-" if change.gained_s is None else f"{1e3 * change.gained_s:+.1f}"
        table.add_row(change.before, change.after, change.why, str(change.count), gained)
    rest = sum(change.count for change in listed[CHANGES_SHOWN_MAX:])
    if rest:
        table.add_row("other changes", "", "", str(rest), "")
    return table


def _totals_table(before: Sequence[Decision], after: Sequence[Decision]) -> Table:
    sides = (totals(before), totals(after))
    table = Table(title="In all")
    table.add_column("")
    for name in ("recorded", "replayed"):
        table.add_column(name, justify="right")
    table.add_row("served", *(str(side.served) for side in sides))
    table.add_row("split", *(str(side.split) for side in sides))
    table.add_row("prompt tokens cached", *(str(side.cached_tokens) for side in sides))
    for fate in sorted({fate for side in sides for fate in side.fates}):
        table.add_row(f"ended {fate}", *(str(side.fates.get(fate, 0)) for side in sides))
    table.add_row("TTFT mean ms", *(milliseconds(side.ttft, lambda d: d.mean) for side in sides))
    table.add_row("TTFT p50 ms", *(milliseconds(side.ttft, lambda d: d.p50) for side in sides))
    table.add_row("TTFT p99 ms", *(milliseconds(side.ttft, lambda d: d.p99) for side in sides))
    return table
