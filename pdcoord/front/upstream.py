"""What goes to a decode endpoint with a call, and what its answer means; pure."""

from collections.abc import Callable, Iterable, Mapping

import msgspec

from pdcoord.core.fleet import Endpoint
from pdcoord.core.model import Fallback
from pdcoord.core.plan import Plan
from pdcoord.core.resumes import STALL_STEPS
from pdcoord.protocol import headers as names
from pdcoord.protocol.errors import Refusal, RefuseReason, RungReason
from pdcoord.protocol.plans import (
    Mode,
    PlanHeader,
    PlannedLoad,
    PrefillTarget,
    RungKind,
    ServedHeader,
    decode_served,
    encode_plan,
)
from pdcoord.protocol.signing import Steering
from pdcoord.wire.errors import ConnectError, HeadTimeoutError, ResetError, WireError
from pdcoord.wire.heads import Headers, end_to_end

Sign = Callable[[Steering], Headers]
"""Gives the signature of what steers a sidecar, as headers."""

# Names that an answer's own connection or pdcoord itself decides, in either direction.
_NOT_SENT_ON = names.HOP_BY_HOP | {b"host", b"content-length", b"expect", names.REQUEST_ID}
_NOT_SENT_BACK = names.HOP_BY_HOP | {names.REQUEST_ID}

# What a sidecar's refusal says of this attempt. Reasons that are not here are the client's own fault
# (a malformed body, say) and are relayed.
_SIDECAR_FAILURES: dict[str, RungReason] = {
    RefuseReason.DRAINING: RungReason.DECODE_DRAINING,
    RefuseReason.NO_ENDPOINTS: RungReason.DECODE_ERROR,
    RefuseReason.SATURATED: RungReason.DECODE_OVERLOADED,
    RefuseReason.QUEUE_FULL: RungReason.DECODE_OVERLOADED,
    RefuseReason.WAITED_TOO_LONG: RungReason.DECODE_OVERLOADED,
    RefuseReason.DEADLINE: RungReason.DECODE_OVERLOADED,
    RefuseReason.SHED: RungReason.DECODE_OVERLOADED,
    RefuseReason.LADDER_EXHAUSTED: RungReason.DECODE_ERROR,
    RefuseReason.UPSTREAM_FAILED: RungReason.DECODE_ERROR,
    RefuseReason.UPSTREAM_TIMEOUT: RungReason.DECODE_TIMEOUT,
    RefuseReason.STREAM_LOST: RungReason.DECODE_ERROR,
    RefuseReason.TARGET_NOT_ALLOWED: RungReason.TARGET_NOT_ALLOWED,
    # A key or a clock is wrong, and nothing was asked of the engine.
    RefuseReason.PLAN_UNSIGNED: RungReason.PLAN_REFUSED,
    RefuseReason.INTERNAL: RungReason.DECODE_ERROR,
}

_NOT_SERVED = frozenset({404, 405})
_DETAIL_MAX = 2_000
"""Characters of an engine's own explanation that are carried over."""

_top_level = msgspec.json.Decoder(dict[str, msgspec.Raw])


def with_fields(raw: bytes, texts: Mapping[str, str], dropped: Iterable[str] = ()) -> bytes:
    """A JSON object that was already read, with some of its top-level fields set to texts, or gone.

    Every other value keeps its bytes: a number that no float holds, or a key order that a prompt
    template depends on, must reach the engine as the client wrote it. A field that was there twice is there
    once, with its last value, as engines read it.
    """
    fields = _top_level.decode(raw)
    for name, text in texts.items():
        fields[name] = msgspec.Raw(msgspec.json.encode(text))
    for name in dropped:
        fields.pop(name, None)
    return msgspec.json.encode(fields)


def plan_header(plan: Plan, *, is_resumed_above: bool = False, is_ended_above: bool = False) -> PlanHeader:
    """The part of a plan that its sidecar executes.

    Args:
        is_resumed_above: whoever sends it continues the stream if it breaks off.
        is_ended_above: whoever sends it cannot, and says why.
    """
    targets = [plan.prefill, *(rung.prefill for rung in plan.rungs if rung.kind is RungKind.OTHER_PREFILL)]
    return PlanHeader(
        prefills=tuple(
            PrefillTarget(address=e.address, bootstrap_port=e.bootstrap_port, kv_port=e.kv_port)
            for e in targets
            if e
        ),
        dialect=plan.dialect,
        is_colocated_allowed=plan.prefill is None or any(r.kind is RungKind.COLOCATED for r in plan.rungs),
        prefill_deadline_ms=plan.prefill_deadline_s * 1e3,
        transfer_deadline_ms=plan.transfer_deadline_s * 1e3,
        load=_planned_load(plan) if plan.replica else None,
        is_resumed_above=is_resumed_above,
        is_ended_above=is_ended_above,
    )


def resumed_below(plan: Plan, rules: Fallback, others: Iterable[Endpoint]) -> PlanHeader:
    """The same for a sidecar that continues the stream itself, where nobody above it can.

    Args:
        others: decode endpoints that could stand in for the plan's own, best first.
    """
    header = plan_header(plan)
    if RungKind.RESUME not in rules.rungs:
        return header
    stall_s = max(rules.resume_stall_s_min, STALL_STEPS * plan.chosen.figures.step_s)
    return msgspec.structs.replace(
        header,
        resumes=tuple(each.address for each in others)[: rules.resume_tries_max],
        resume_tries_max=rules.resume_tries_max,
        resume_age_ms_max=rules.resume_age_s_max * 1e3,
        resume_stall_ms=stall_s * 1e3,
    )


def _planned_load(plan: Plan) -> PlannedLoad:
    """What the ledger has of a plan, for the ledgers of others."""
    figures = plan.chosen.figures
    return PlannedLoad(
        replica=plan.replica,
        model=plan.decode.pool.model,
        prefill_us=round(figures.prefill_s * 1e6),
        prompt_tokens=figures.cached_tokens + figures.uncached_tokens,
        landing_tokens=figures.landing_tokens,
        transfer_bytes=figures.transfer_bytes,
    )


def headers_for(
    plan: Plan,
    client: Iterable[tuple[bytes, bytes]],
    request_id: bytes,
    target: str,
    sign: Sign | None = None,
    *,
    is_resumed_above: bool = False,
    is_ended_above: bool = False,
) -> Headers:
    """A client's headers with the plan in place of whatever could steer routing.

    A foreign sidecar reads only the prefill's address.

    Args:
        target: as of `steering_headers`.
        is_resumed_above, is_ended_above: as of `plan_header`.
    """
    headers = [pair for pair in end_to_end(client, _NOT_SENT_ON) if not names.is_routing(pair[0])]
    steering = plan_header(plan, is_resumed_above=is_resumed_above, is_ended_above=is_ended_above)
    return headers + steering_headers(steering, request_id, target, sign)


def steering_headers(plan: PlanHeader, request_id: bytes, target: str, sign: Sign | None = None) -> Headers:
    """What steers a sidecar, with the first prefill target in the words of a foreign one.

    Args:
        target: path and query of the POST that these headers are for; signed, they are good for no other.
    """
    encoded = encode_plan(plan)
    headers = [(names.REQUEST_ID, request_id), (names.PLAN, encoded)]
    prefills = plan.prefills[0].address.encode() if plan.prefills else b""
    if prefills:
        headers.append((names.PREFILLER_HOST_PORT, prefills))
    if sign is not None:
        call = (b"POST", target.encode("latin-1"), request_id)
        headers += sign(Steering(*call, plan=encoded, prefills=prefills))
    return headers


def headers_to_client(headers: Headers) -> Headers:
    """What of an answer's headers goes to the client: none of its connection, none of our own."""
    kept = end_to_end(headers, _NOT_SENT_BACK)
    return [
        (name, value) for name, value in kept if not name.startswith(names.PREFIX) or name == names.REASON
    ]


def decision_header(plan: Plan, served: ServedHeader | None) -> bytes:
    """`mode; reason`: how the call was served, and why so."""
    if served is None or served.mode is plan.mode:
        return f"{plan.mode}; {plan.why}".encode()
    # Planned otherwise: the last rung that was taken is why.
    why: str = served.rungs[-1].reason if served.rungs else plan.why
    return f"{served.mode}; {why}".encode()


def served_of(header: bytes | None) -> ServedHeader | None:
    """The sidecar's report, if there is one that can be read and agrees with itself."""
    served = decode_served(header) if header is not None else None
    if served is not None and served.mode is Mode.SPLIT and served.prefill is None:
        return None
    return served


def failure_of_answer(status: int, sidecar_reason: bytes | None) -> RungReason | None:
    """Why an answer's head counts as a failure of this endpoint; None if it is to be relayed.

    An engine's own 4xx is about the request, and would be the same anywhere.
    """
    if sidecar_reason is not None:
        failure = _SIDECAR_FAILURES.get(sidecar_reason.decode("latin-1"))
        if failure is not None:
            return failure
    if status < 500:
        return None
    return {503: RungReason.DECODE_OVERLOADED, 504: RungReason.DECODE_TIMEOUT}.get(
        status, RungReason.DECODE_ERROR
    )


def failure_of_error(error: WireError) -> RungReason:
    """Why an attempt that got no answer failed."""
    match error:
        # A reset came twice, the second time on a fresh connection: nobody serves there.
        case ConnectError() | ResetError():
            return RungReason.DECODE_UNREACHABLE
        case HeadTimeoutError():
            return RungReason.DECODE_TIMEOUT
        case _:
            return RungReason.DECODE_ERROR


def error_body(status: int, body: bytes, path: str = "") -> bytes:
    """An engine's error as its API's clients expect it; one that has an `error` member is left as it is.

    vLLM 0.32 answers an API that its model does not have with FastAPI's own `{"detail": "Not Found"}`.
    """
    try:
        fields = _top_level.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        fields = {}
    if "error" in fields:
        return body
    if bytes(fields.get("object", b"")) == b'"error"':
        # SGLang 0.5.23 and vLLM before 0.10 write the members of `error` at the top.
        return msgspec.json.encode({"error": {"param": None, **fields}})
    if status in _NOT_SERVED:
        message = f"The engine answered {status}: the model it serves does not have this API."
        return Refusal(RefuseReason.NOT_SERVED, message).body(path)
    detail = bytes(fields.get("detail", b"")).decode("utf-8", "replace")[:_DETAIL_MAX]
    message = f"The engine answered {status}{': ' if detail else '.'}{detail}"
    reason = RefuseReason.UPSTREAM_FAILED if status >= 500 else RefuseReason.INVALID_FIELD
    return Refusal(reason, message).body(path)
