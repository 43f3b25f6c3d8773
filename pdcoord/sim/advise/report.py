"""Advice as text for people and as JSON for programs."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table

from pdcoord.core.fleet import Role
from pdcoord.sim.advise.advice import Advice, Costs, costs_at
from pdcoord.sim.advise.assignment import Assignment, Group
from pdcoord.sim.advise.capacity import Capacity
from pdcoord.sim.advise.check import Check
from pdcoord.sim.advise.demand import Demand
from pdcoord.sim.advise.kinds import Kind

WORTH_SHOWN_MIN = 0.01
_AS_GOOD = 0.98
"""Share of the best goodput from which on roles are as good as the best."""
_TEXTS = {"prefill", "decode", "bound", "roles"}
FLOW_SHOWN_MIN = 0.005
"""Of what the fleet carries; less is not shown."""


@dataclass(frozen=True, slots=True)
class Report:
    """What there is to say.

    Attributes:
        checks: runs in the simulator; empty if none was asked for.
        notes: of the workload, such as skipped rows.
    """

    advice: Advice
    checks: tuple[Check, ...] = ()
    notes: tuple[str, ...] = ()


def role_counts(advice: Advice, counts: Mapping[Group, int]) -> dict[str, dict[str, int]]:
    """By kind: how many engines prefill, decode, do both, and are spare."""
    found: dict[str, dict[str, int]] = {}
    for index, kind in enumerate(advice.kinds):
        mine = dict.fromkeys(Role, 0)
        for group, count in counts.items():
            if group.kind == index:
                mine[group.role] += count
        found[kind.name] = {role.value: count for role, count in mine.items()}
        found[kind.name]["spare"] = max(0, kind.count - sum(mine.values()))
    return found


def bottlenecks(advice: Advice, assignment: Assignment) -> list[tuple[str, str, float]]:
    """(what, whose, share of the goodput that hangs on it), the worst first."""
    named = [
        (name.limit.value, _group_name(advice, name.group), share)
        for name, share in assignment.worth.items()
        if share >= WORTH_SHOWN_MIN
    ]
    return sorted(named, key=lambda entry: -entry[2])


def _group_name(advice: Advice, group: Group) -> str:
    return f"{advice.kinds[group.kind].name} {group.role.value}"


def as_json(report: Report) -> str:
    """Everything of the report; rates are calls per second, times seconds."""
    return json.dumps(_plain(report), indent=2)


def _plain(report: Report) -> dict[str, Any]:
    advice = report.advice
    return {
        "offered_per_s": advice.traffic.rate_per_s,
        "sampled_calls": advice.traffic.sampled_count,
        "parts": [_plain_demand(each) for each in advice.traffic.demands],
        "kinds": [
            _plain_kind(kind, mine) for kind, mine in zip(advice.kinds, advice.capacities, strict=True)
        ],
        "advised": _plain_assignment(advice, advice.best),
        "as_written": _plain_assignment(advice, advice.written),
        "expected_goodput_per_s": advice.good_at_offered_per_s,
        "costs": _plain_costs(advice.costs),
        "simulated_costs": _plain_costs(_simulated_costs(report)),
        "one_more": [
            {
                "kind": each.kind.name,
                "adds_per_s": each.adds_per_s,
                "adds_per_cost_per_hour": each.adds_per_cost,
                "roles": role_counts(advice, each.counts),
            }
            for each in advice.one_more
        ],
        "checks": [_plain_check(each) for each in report.checks],
        "notes": list(report.notes),
    }


def _plain_demand(demand: Demand) -> dict[str, Any]:
    return {
        "name": demand.name,
        "is_worth_splitting": demand.can_split,
        "share": demand.share,
        "prompt_tokens": demand.prompt_tokens,
        "uncached_tokens": demand.uncached_tokens,
        "output_tokens": demand.output_tokens,
        "ttft_s_max": demand.ttft_s_max,
        "tpot_s_max": demand.tpot_s_max,
    }


def _plain_kind(kind: Kind, capacity: Capacity) -> dict[str, Any]:
    return {
        "name": kind.name,
        "vendor": kind.vendor,
        "count": kind.count,
        "cost_per_hour": kind.cost_per_hour,
        "prefill_tokens_per_s": capacity.prefill_tokens_per_s,
        "decode_tokens_per_s": capacity.decode_tokens_per_s,
        "batch": capacity.batch,
        "batch_bound": capacity.batch_bound,
    }


def _plain_check(check: Check) -> dict[str, Any]:
    summary = check.summary
    return {
        "roles": check.label,
        "load": check.load,
        "predicted_goodput_per_s": check.predicted_per_s,
        "simulated_goodput_per_s": summary.goodput_per_s,
        "offered_per_s": summary.offered_per_s,
        "ttft_p99_s": summary.ttft.p99,
        "tpot_p99_s": summary.tpot.p99,
        "split_share": summary.split_share,
        "cached_share": summary.cached_share,
    }


def _plain_costs(costs: Costs | None) -> dict[str, float] | None:
    return None if costs is None else asdict(costs)


def _plain_assignment(advice: Advice, assignment: Assignment) -> dict[str, Any]:
    return {
        "roles": role_counts(advice, assignment.counts),
        "capacity_per_s": assignment.rate_per_s,
        "goodput_per_s": assignment.good_per_s,
        "flows": [
            {
                "prefill": _group_name(advice, flow.prefill),
                "decode": _group_name(advice, flow.decode),
                "part": advice.traffic.demands[flow.demand].name,
                "rate_per_s": flow.rate_per_s,
            }
            for flow in assignment.flows
        ],
        "bottlenecks": [
            {"what": what, "whose": whose, "share": share}
            for what, whose, share in bottlenecks(advice, assignment)
        ],
    }


def show(report: Report, console: Console) -> None:
    """Print it."""
    for note in report.notes:
        console.print(note, markup=False)
    for piece in _pieces(report):
        console.print(piece, markup=False, soft_wrap=isinstance(piece, str))


def _pieces(report: Report) -> Iterator[RenderableType]:
    advice = report.advice
    traffic = advice.traffic
    yield (
        f"Traffic: {traffic.rate_per_s:.3g} calls/s, {traffic.tokens_per_call:.0f} tokens a call, "
        f"{traffic.output_tokens_per_call:.0f} of them answered; from {traffic.sampled_count} calls"
        + ("." if traffic.is_whole else ", the first of the workload.")
    )
    yield _kinds_table(advice)
    yield _roles_table(advice)
    yield from _verdict(advice)
    yield _flows_table(advice)
    yield _one_more_table(advice)
    if report.checks:
        yield _checks_table(report.checks)
        yield _simulated(report.checks)
        simulated = _simulated_costs(report)
        if simulated is not None:
            yield f"Cost of good calls at the simulator's best: {_cost_words(simulated)}."


def _kinds_table(advice: Advice) -> Table:
    table = _table(
        "What one engine can do",
        ("kind", "engines", "prefill tok/s", "decode tok/s", "batch", "bound", "cost/h"),
    )
    for kind, mine in zip(advice.kinds, advice.capacities, strict=True):
        cost = "?" if kind.cost_per_hour is None else f"{kind.cost_per_hour:g}"
        table.add_row(
            kind.name,
            str(kind.count),
            f"{mine.prefill_tokens_per_s:,.0f}",
            f"{mine.decode_tokens_per_s:,.0f}",
            f"{mine.batch:.0f}",
            mine.batch_bound,
            cost,
        )
    return table


def _roles_table(advice: Advice) -> Table:
    best, written = (role_counts(advice, each.counts) for each in (advice.best, advice.written))
    roles = (*(role.value for role in Role), "spare")
    table = _table("Advised roles (as written)", ("kind", *roles))
    for kind in advice.kinds:
        mine, before = best[kind.name], written[kind.name]
        table.add_row(kind.name, *(f"{mine[role]} ({before[role]})" for role in roles))
    return table


def _verdict(advice: Advice) -> Iterator[str]:
    best, written, offered = advice.best, advice.written, advice.traffic.rate_per_s
    rate, good = best.rate_per_s, best.good_per_s
    yield f"Capacity, at most: {rate:.3g} calls/s, {good:.3g} of them within their objectives."
    if written.good_per_s > 0.0:
        gain = best.good_per_s / written.good_per_s - 1.0
        yield f"As written the fleet carries {written.good_per_s:.3g}; the advised roles {gain:+.0%}."
    else:
        yield "As written the fleet carries nothing: no engine that decodes can be given a computed prompt."
    enough = "enough for" if best.rate_per_s >= offered else "too little for"
    yield (
        f"That is {enough} the {offered:.3g} calls/s of the workload: "
        f"expect {advice.good_at_offered_per_s:.3g} good ones per second."
    )
    for index, (what, whose, share) in enumerate(bottlenecks(advice, best)):
        word = "Bottleneck" if index == 0 else "then"
        yield f"{word}: {what} of {whose}; {share:.0%} of the goodput hangs on it."
    if advice.costs is None:
        yield "Costs are unknown; set cost_per_hour on every engine."
    else:
        yield f"Cost at capacity: {_cost_words(advice.costs)}."


def _cost_words(costs: Costs) -> str:
    return (
        f"{costs.per_million_tokens:.3g} per million tokens, "
        f"{costs.per_million_output_tokens:.3g} per million answered, {costs.per_hour:g} per hour"
    )


def _flows_table(advice: Advice) -> Table:
    table = _table("Where calls go at capacity", ("part", "prefill", "decode", "calls/s"))
    for flow in advice.best.flows:
        if flow.rate_per_s < FLOW_SHOWN_MIN * advice.best.rate_per_s:
            continue
        prefill, decode = (_group_name(advice, each) for each in (flow.prefill, flow.decode))
        demand = advice.traffic.demands[flow.demand]
        part = demand.name if demand.can_split else f"{demand.name}, short"
        where = "the same engine" if flow.prefill == flow.decode else decode
        table.add_row(part, prefill, where, f"{flow.rate_per_s:.3g}")
    return table


def _one_more_table(advice: Advice) -> Table:
    columns = ("kind", "goodput", "calls/s per cost/h", "roles")
    table = _table("What one more engine buys", columns)
    for each in advice.one_more:
        roles = ", ".join(_changes(advice, each.counts))
        per_cost = "?" if each.adds_per_cost is None else f"{each.adds_per_cost:.3g}"
        table.add_row(each.kind.name, f"+{each.adds_per_s:.3g}/s", per_cost, roles)
    return table


def _changes(advice: Advice, counts: Mapping[Group, int]) -> Iterator[str]:
    """Engines that come to a role and leave one, against the advised roles."""
    before, then = (role_counts(advice, each) for each in (advice.best.counts, counts))
    for name, mine in then.items():
        for role in Role:
            change = mine[role.value] - before[name][role.value]
            if change:
                yield f"{name} {role.value} {change:+d}"


def best_check(checks: Sequence[Check]) -> Check:
    """The run with the most good calls per second: what the simulator would choose."""
    return max(checks, key=lambda each: each.summary.goodput_per_s)


def _simulated_costs(report: Report) -> Costs | None:
    if not report.checks:
        return None
    good_per_s = best_check(report.checks).summary.goodput_per_s
    return costs_at(report.advice.kinds, report.advice.traffic, good_per_s)


def _simulated(checks: Sequence[Check]) -> str:
    best = best_check(checks)
    good_per_s = best.summary.goodput_per_s
    advised = best_check([each for each in checks if each.label == checks[0].label])
    if advised.summary.goodput_per_s >= _AS_GOOD * good_per_s:
        found = (
            f"The simulator serves {advised.summary.goodput_per_s:.3g} good calls/s with the advised roles"
        )
        others = {each.label for each in checks if each.summary.goodput_per_s >= _AS_GOOD * good_per_s}
        equal = sorted(others - {advised.label})
        if equal:
            return f"{found}, and as many with the roles {' and '.join(equal)}: a change is not worth it."
        return f"{found}, more than with others: it bears the advice out."
    return (
        f"The simulator does not bear the advice out: with the roles {best.label} it serves "
        f"{good_per_s:.3g} good calls/s, with the advised ones {advised.summary.goodput_per_s:.3g}. "
        "Prefer the former."
    )


def _checks_table(checks: Sequence[Check]) -> Table:
    columns = ("roles", "load", "sent", "predicted", "simulated", "TTFT p50, p99", "TPOT p50, p99", "split")
    table = _table("Checked in the simulator: goodput in calls/s", columns)
    for each in checks:
        summary = each.summary
        table.add_row(
            each.label,
            f"{each.load:.0%}",
            f"{summary.offered_per_s:.3g}",
            f"{each.predicted_per_s:.3g}",
            f"{summary.goodput_per_s:.3g}",
            f"{summary.ttft.p50:.2f}, {summary.ttft.p99:.2f} s",
            f"{summary.tpot.p50 * 1e3:.0f}, {summary.tpot.p99 * 1e3:.0f} ms",
            f"{summary.split_share:.0%}",
        )
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for index, column in enumerate(columns):
        is_text = index == 0 or column in _TEXTS
        table.add_column(column, justify="left" if is_text else "right", no_wrap=index == 0, overflow="fold")
    return table
