"""`pdcoord explain`: why a request went where it went, as a table for people."""

import asyncio
import sys
from pathlib import Path
from urllib.parse import quote

import msgspec
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pdcoord.core.plan import Why
from pdcoord.gateway.decisionviews import (
    AttemptView,
    CandidateView,
    DecisionsView,
    DecisionView,
    RungView,
    ServedView,
)
from pdcoord.runtime.adminclient import AdminListener
from pdcoord.wire.errors import WireError

WIDTH_MAX = 100
NOT_FOUND = 1
UNREACHABLE = 2

REASONS: dict[Why, str] = {
    Why.SPLIT_FASTER: "the prefill elsewhere saves more than the transfer costs",
    Why.SPLIT_ALWAYS: "the policy's mode is always",
    Why.SPLIT_PREFERRED: "the policy keeps these pools for its priority",
    Why.COLOCATED_PREFERRED: "the policy keeps this pool for its priority",
    Why.SPLIT_ONLY_WAY: "no endpoint could serve it alone",
    Why.COLOCATED_FASTER: "one endpoint is predicted to be faster than any pair",
    Why.SAVING_BELOW_NOISE: "splitting would save less than disaggregation.saving_ms_min",
    Why.MODE_NEVER: "the policy's mode is never",
    Why.NOT_GENERATIVE: "the call has no decode phase",
    Why.ONE_ENGINE_CALL: "its kind of call cannot be handed over between engines",
    Why.MANY_CHOICES: "it asks for more than one choice, which is never split",
    Why.PROMPT_BELOW_BLOCK: "the prompt is shorter than one KV block, so there is nothing to move",
    Why.PROMPT_BELOW_THRESHOLD: "the prompt is below disaggregation.uncached_tokens_min",
    Why.PREFIX_CACHED: "an endpoint that decodes already has most of the prompt cached",
    Why.NO_PREFILL_ENDPOINT: "no prefill endpoint is ready",
    Why.NO_OPEN_PATH: "no path is open: see GET /paths for verdicts and breakers",
}


def explain(
    request_id: str | None,
    admin_url: str,
    admin_key_file: Path | None = None,
    admin_ca_file: Path | None = None,
) -> int:
    """Print a decision; the exit status: 0 printed, 1 not known, 2 the admin listener does not answer.

    Args:
        request_id: None takes the last request.
        admin_url: of the gateway's admin listener, such as http://127.0.0.1:8081.
        admin_key_file: with the key that it asks for.
        admin_ca_file: of who signed its certificate, with https.
    """
    screen = Console()
    width = min(screen.width, WIDTH_MAX) if screen.is_terminal else WIDTH_MAX
    console = Console(width=width, highlight=False)
    try:
        found = asyncio.run(_fetch(AdminListener(admin_url, admin_key_file, admin_ca_file), request_id))
    except (ValueError, WireError, TimeoutError, msgspec.MsgspecError) as error:
        sys.stderr.write(f"pdcoord explain: {admin_url} does not answer as an admin listener: {error}\n")
        return UNREACHABLE
    if found is None:
        wanted = "no request has been served yet" if request_id is None else f"no decision for {request_id}"
        sys.stderr.write(f"pdcoord explain: {wanted}; GET {admin_url}/decisions lists the latest\n")
        return NOT_FOUND
    console.print(render(found))
    return 0


def render(decision: DecisionView) -> RenderableType:
    """A decision as rich draws it; readable in WIDTH_MAX columns."""
    parts: list[RenderableType] = [_facts(decision)]
    for number, attempt in enumerate(decision.attempts, start=1):
        if len(decision.attempts) > 1:
            parts.append(Text(f"\nAttempt {number}", style="bold"))
        parts += _attempt(attempt)
    if decision.refusal is not None:
        parts.append(Text(f"Refused: {decision.refusal}", style="red"))
    return Panel(Group(*parts), title=Text(decision.id, style="bold"), title_align="left")


def _facts(decision: DecisionView) -> Text:
    output = "no limit" if decision.output_tokens_max is None else f"at most {decision.output_tokens_max:,}"
    choices = f", {decision.choice_count} choices" if decision.choice_count > 1 else ""
    adapter = "" if decision.adapter is None else f", adapter {decision.adapter}"
    text = Text(
        f"model {decision.model}{adapter}, prompt {decision.prompt_tokens:,} tokens, "
        f"output {output}{choices}\n"
    )
    text.append(
        f"outcome {decision.outcome or 'still being served'}, first byte {_ms(decision.first_byte_ms)}, "
        f"whole {_ms(decision.duration_ms)}, decided in {_ms(decision.decision_ms)}"
    )
    if decision.tenant or decision.priority or decision.is_waiting or decision.waited_ms is not None:
        text.append(f"\n{_turn(decision)}")
    last = decision.attempts[-1] if decision.attempts else None
    if last is not None:
        text.append(f"\n{last.mode}", style="bold green")
        text.append(f" because {_reason(last.why)} ({last.why})")
    return text


def _turn(decision: DecisionView) -> str:
    """Whose request it was, and what it waited."""
    whose = f"tenant {decision.tenant}" if decision.tenant else "no tenant"
    if decision.is_waiting:
        waited = "waits for its turn"
    elif decision.waited_ms is None:
        waited = "did not wait"
    else:
        waited = f"waited {_ms(decision.waited_ms)} for its turn"
    return f"{whose}, priority {decision.priority}, {waited}"


def _attempt(attempt: AttemptView) -> list[RenderableType]:
    parts: list[RenderableType] = [_figures(attempt)]
    if attempt.runner_up is None:
        parts.append(Text("There was no other candidate to compare with."))
    parts.append(Text(f"Ladder: {_ladder(attempt.rungs)}"))
    drops = ", ".join(f"{reason} {count}" for reason, count in attempt.drops.items())
    parts.append(Text(f"Not candidates: {drops or 'none'}"))
    if attempt.served is not None:
        parts += _served(attempt.served, attempt)
    if attempt.is_second:
        parts.append(Text("Made beside another attempt, which showed no output for too long."))
    if attempt.is_outrun:
        parts.append(Text("Given up: another attempt had its output first.", style="yellow"))
    if attempt.broke_after_tokens is not None:
        what = f"Broke off at {attempt.chosen.decode} after {attempt.broke_after_tokens:,} tokens"
        parts.append(Text(f"{what}: {attempt.failure}", style="red"))
    elif attempt.failure is not None:
        parts.append(Text(f"Failed at {attempt.chosen.decode}: {attempt.failure}", style="red"))
    return parts


def _figures(attempt: AttemptView) -> Table:
    chosen, other = attempt.chosen, attempt.runner_up
    table = Table(title="Prediction", title_justify="left", expand=False)
    table.add_column("")
    table.add_column("chosen", justify="right", style="green", overflow="fold")
    if other is not None:
        table.add_column("runner-up", justify="right", overflow="fold")
        table.add_column("margin", justify="right")
    for index, name in enumerate(("mode", "prefill on", "decode on", "KV path")):
        table.add_row(name, *(_where(candidate)[index] for candidate in (chosen, other) if candidate))
    table.add_section()
    for name, field, unit in _ROWS:
        value = getattr(chosen.figures, field)
        cells = [_number(value, unit)]
        if other is not None:
            others = getattr(other.figures, field)
            cells += [_number(others, unit), _number(others - value, unit, sign="+")]
        table.add_row(name, *cells)
    return table


def _where(candidate: CandidateView) -> tuple[str, str, str, str]:
    prefill = candidate.prefill or candidate.decode
    return (candidate.mode, prefill, candidate.decode, candidate.verdict or "-")


_ROWS = (
    ("wait in queue", "queue_ms", "ms"),
    ("prefill", "prefill_ms", "ms"),
    ("transfer", "transfer_ms", "ms"),
    ("first step", "step_ms", "ms"),
    ("= first token", "ttft_ms", "ms"),
    ("stall of others", "stall_ms", "ms"),
    ("= compared", "time_ms", "ms"),
    ("may be off by", "spread_ms", "ms"),
    ("past the SLO", "slo_excess", "x"),
    ("cost", "cost", ""),
    ("tokens to compute", "uncached_tokens", "count"),
    ("tokens cached", "cached_tokens", "count"),
    ("KV to move", "transfer_bytes", "bytes"),
    ("legs on pools of other priorities", "unfit", "count"),
)


def _served(served: ServedView, attempt: AttemptView) -> list[RenderableType]:
    where = f"{served.mode}" + (f" with the KV of {served.prefill}" if served.prefill is not None else "")
    predicted = attempt.chosen.figures
    text = Text(f"Served {where}")
    if served.prefill_ms is not None:
        text.append(
            f", prefill {_ms(served.prefill_ms)} (predicted {_ms(predicted.prefill_ms)} after queueing)"
        )
    if served.transfer_ms is not None:
        told = _ms(predicted.transfer_ms + predicted.step_ms)
        text.append(f", transfer and first step {_ms(served.transfer_ms)} (predicted {told})")
    if served.cached_tokens is not None:
        text.append(f", {served.cached_tokens:,} tokens were cached")
    parts: list[RenderableType] = [text]
    if not served.rungs:
        return [*parts, Text("Rungs taken: none")]
    table = Table(title="Rungs taken", title_justify="left")
    for column in ("gave up", "because of", "then"):
        table.add_column(column, overflow="fold")
    for rung in served.rungs:
        table.add_row(rung.target or "-", rung.reason or "-", rung.rung)
    return [*parts, table]


def _ladder(rungs: list[RungView]) -> str:
    steps = [rung.rung if rung.target is None else f"{rung.rung} {rung.target}" for rung in rungs]
    return ", then ".join([*steps, "refuse"])


def _reason(why: str) -> str:
    try:
        return REASONS[Why(why)]
    except ValueError:
        return "of a reason that this version does not know"


def _ms(value: float | None) -> str:
    return "-" if value is None else _number(value, "ms")


def _number(value: float, unit: str, *, sign: str = "") -> str:
    match unit:
        case "ms":
            return f"{value:{sign},.2f} ms" if abs(value) < 10 else f"{value:{sign},.1f} ms"
        case "count":
            return f"{value:{sign},}"
        case "bytes":
            return f"{value / 1e6:{sign},.1f} MB"
        case "x":
            return f"{value:{sign}.2f}"
        case _:
            return f"{value:{sign}.3g}"


async def _fetch(listener: AdminListener, request_id: str | None) -> DecisionView | None:
    async with listener.client() as client:
        if request_id is None:
            raw = await listener.get(client, "/decisions?limit=1")
            latest = msgspec.json.decode(raw or b"{}", type=DecisionsView).decisions
            if not latest:
                return None
            request_id = latest[0].id
        raw = await listener.get(client, f"/decisions/{quote(request_id, safe='')}")
        return None if raw is None else msgspec.json.decode(raw, type=DecisionView)
