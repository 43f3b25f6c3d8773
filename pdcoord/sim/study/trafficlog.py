"""Recorded traffic: results of a simulation, or the gateway's log lines, as calls that can be sent again."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

import msgspec

from pdcoord.sim.study.lines import BadLine
from pdcoord.sim.study.results import CallResult, Fate
from pdcoord.sim.workload.call import Call, CallId

KEY_TOKENS = 64
"""Prompt tokens that one made-up key stands for."""
STEP_S = 0.02
"""Time per output token where a gateway's line does not say how many there were: an 8B model on the
accelerators of llm-d-inference-sim's latency profiles takes 10 to 35 ms."""
SPAN_S_MAX = 7 * 86_400.0
"""How far from the middle of a log a call may have arrived: a wrong clock must not make a run endless."""
_TOKENS_MAX = 1 << 24
_Stem = tuple[str, str, str]
_BAD_SHOWN = 200  # characters of a decoder's message


@dataclass(frozen=True, slots=True)
class Recorded:
    """One call and what became of it.

    Attributes:
        name: as its log names it.
        ttft_s: None if no first token came.
        cached_tokens: prompt tokens that the place that prefilled had cached, or was thought to have.
    """

    name: str
    call: Call
    prefill: str
    decode: str
    why: str
    fate: str
    ttft_s: float | None
    cached_tokens: int


@dataclass(slots=True)
class TrafficLog:
    """A log read whole.

    Attributes:
        recorded: in the order in which calls arrived, ids counting up.
        bad: lines that could not be used.
        other_count: lines of other events, which say nothing of a call.
        refused_count: calls that were answered before a plan, of which no size is known.
        output_guessed_count: answers whose length was not recorded and follows from their duration.
    """

    recorded: list[Recorded] = field(default_factory=list)
    bad: list[BadLine] = field(default_factory=list)
    other_count: int = 0
    refused_count: int = 0
    output_guessed_count: int = 0


class BadRecordError(ValueError):
    """A line that is JSON but no record: leave it out and say so."""


def read_traffic(raw: bytes) -> TrafficLog:
    """Read a log of either kind, or of both mixed; a bad line is counted and left out."""
    log = TrafficLog()
    numbered: list[tuple[int, Recorded]] = []
    for number, line in enumerate(raw.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            recorded = _read(log, line)
        except (msgspec.MsgspecError, UnicodeDecodeError, BadRecordError) as error:
            log.bad.append(BadLine(number, str(error)[:_BAD_SHOWN]))
            continue
        if recorded is not None:
            numbered.append((number, recorded))
    log.recorded = _keyed(_in_order(log, numbered))
    return log


class LogWorkload:
    """Recorded calls, sent when they were sent. Those that followed on others keep their times too."""

    def __init__(self, recorded: Sequence[Recorded], *, rate_scale: float = 1.0) -> None:
        self._calls = [replace(each.call, at_s=each.call.at_s / rate_scale) for each in recorded]

    @property
    def key_tokens(self) -> int:
        return KEY_TOKENS

    @property
    def call_count(self) -> int:
        return len(self._calls)

    def calls(self) -> Iterator[Call]:
        return iter(self._calls)

    def after(self, call: Call, ended_s: float) -> Call | None:  # noqa: ARG002  # the protocol's
        return None


def _read(log: TrafficLog, line: bytes) -> Recorded | None:
    """One line; None if it is of no call that could be sent again, which is counted.

    A sidecar has a request.done of its own, which has no attempts.
    """
    data = msgspec.json.decode(line)
    if not isinstance(data, dict):
        raise BadRecordError(f"is a {type(data).__name__}, expected an object")
    if "fate" in data:
        return _of_result(msgspec.convert(data, CallResult))
    if data.get("event") != "request.done" or "attempts" not in data:
        log.other_count += 1
        return None
    if data.get("decode") is None:
        log.refused_count += 1
        return None
    done = msgspec.convert(data, _RequestDone)
    recorded = _of_line(done)
    log.output_guessed_count += done.output_tokens is None and done.ttft_ms is not None
    return recorded


def _of_result(result: CallResult) -> Recorded:
    _check_tokens("prompt_tokens", result.prompt_tokens)
    _check_tokens("output_tokens", result.output_tokens)
    call = Call(
        id=CallId(result.id),
        at_s=result.at_s,
        prompt_tokens=result.prompt_tokens,
        output_tokens=max(1, result.output_tokens),
        tenant=result.tenant,
        priority=result.priority,
        kind=result.kind,
        ttft_s_max=result.ttft_s_max,
        tpot_s_max=result.tpot_s_max,
    )
    return Recorded(
        str(result.id),
        call,
        result.prefill,
        result.decode,
        result.why,
        result.fate,
        result.ttft_s,
        result.cached_tokens,
    )


class _RequestDone(msgspec.Struct):
    """What replay needs of the gateway's line; the rest is ignored."""

    id: str
    timestamp: str
    decode: str
    duration_ms: float
    prompt_tokens: int
    model: str | None = None
    adapter: str | None = None
    prefill: str | None = None
    why: str | None = None
    ttft_ms: float | None = None
    outcome: str = ""
    cached_tokens: int | None = None
    output_tokens: int | None = None
    tenant: str | None = None
    priority: int = 0


def _of_line(line: _RequestDone) -> Recorded:
    _check_tokens("prompt_tokens", line.prompt_tokens)
    call = Call(
        id=CallId(0),
        at_s=_time_s(line.timestamp) - line.duration_ms / 1e3,
        prompt_tokens=line.prompt_tokens,
        output_tokens=_output_tokens(line),
        tenant=line.tenant or "",
        priority=line.priority,
        # An adapter's prompts share nothing with its model's; no other model has its name.
        kind=line.adapter or line.model or "",
    )
    return Recorded(
        line.id,
        call,
        line.prefill or line.decode,
        line.decode,
        line.why or "",
        Fate.OK if line.outcome == "ok" else line.outcome,
        None if line.ttft_ms is None else line.ttft_ms / 1e3,
        line.cached_tokens or 0,
    )


def _output_tokens(line: _RequestDone) -> int:
    if line.output_tokens is not None:
        _check_tokens("output_tokens", line.output_tokens)
        return max(1, line.output_tokens)
    if line.ttft_ms is None:
        return 1
    return max(1, min(_TOKENS_MAX, round((line.duration_ms - line.ttft_ms) / 1e3 / STEP_S) + 1))


def _check_tokens(name: str, value: int) -> None:
    lowest = 1 if name == "prompt_tokens" else 0
    if not lowest <= value <= _TOKENS_MAX:
        raise BadRecordError(f"{name} is {value}, expected {lowest} to {_TOKENS_MAX}")


def _time_s(timestamp: str) -> float:
    try:
        return datetime.fromisoformat(timestamp).timestamp()
    except ValueError as error:
        raise BadRecordError(f"timestamp is {timestamp[:40]!r}, expected ISO 8601") from error


def _in_order(log: TrafficLog, numbered: Sequence[tuple[int, Recorded]]) -> list[Recorded]:
    """By arrival, times from the first one, ids anew: two logs in one file may use an id twice."""
    ranked = sorted(numbered, key=lambda pair: pair[1].call.at_s)
    middle_s = ranked[len(ranked) // 2][1].call.at_s if ranked else 0.0
    kept: list[Recorded] = []
    start_s = 0.0
    for number, each in ranked:
        at_s = each.call.at_s
        if abs(at_s - middle_s) > SPAN_S_MAX:
            log.bad.append(
                BadLine(number, f"is {at_s - middle_s:.0f} s from most others; the clock was wrong")
            )
            continue
        start_s = start_s if kept else at_s
        kept.append(replace(each, call=replace(each.call, id=CallId(len(kept)), at_s=at_s - start_s)))
    return kept


def _keyed(recorded: Sequence[Recorded]) -> list[Recorded]:
    """Make up keys under which each call finds as much cached as it did.

    A log does not say which prompts begin alike. Calls of one tenant and kind that one place computed are
    taken to share one beginning, each as much of it as it had cached; the rest of a prompt is its own. The
    first of them brings the beginning in.
    """
    longest: dict[_Stem, int] = {}
    for each in recorded:
        stem = _stem(each)
        longest[stem] = max(longest.get(stem, 0), each.cached_tokens)
    numbers = {stem: index for index, stem in enumerate(longest, start=1)}
    first: set[_Stem] = set()
    keyed: list[Recorded] = []
    for each in recorded:
        stem = _stem(each)
        shared_tokens = each.cached_tokens if stem in first else longest[stem]
        first.add(stem)
        keys = _keys(each, numbers[stem], shared_tokens)
        keyed.append(replace(each, call=replace(each.call, keys=keys)))
    return keyed


def _stem(recorded: Recorded) -> _Stem:
    return recorded.call.tenant, recorded.call.kind, recorded.prefill


def _keys(recorded: Recorded, stem: int, shared_tokens: int) -> tuple[int, ...]:
    key_count = recorded.call.prompt_tokens // KEY_TOKENS
    # Half a key may go either way: what an engine cached is in blocks of its own size.
    shared = max(0, min(key_count, round(shared_tokens / KEY_TOKENS)))
    own = (1 << 62) + (recorded.call.id << 18)
    return (
        *((stem << 32) + index for index in range(shared)),
        *(own + index for index in range(shared, key_count)),
    )
