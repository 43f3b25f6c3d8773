"""Which endpoints may take a leg of a request, and a reason for each that may not."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from pdcoord.core.fleet import EndpointId, EndpointState, Health
from pdcoord.core.ledger import Ledger
from pdcoord.core.plan import DropReason
from pdcoord.core.request import Request

_HEALTH_DROPS = {
    Health.UNKNOWN: DropReason.NOT_READY,
    Health.UNREACHABLE: DropReason.UNREACHABLE,
    Health.DRAINING: DropReason.DRAINING,
}


@dataclass(slots=True)
class Eligible:
    """Endpoints that may take a leg, by what they may do, and why the others may not."""

    prefill: list[EndpointState] = field(default_factory=list)
    decode: list[EndpointState] = field(default_factory=list)
    drops: Counter[DropReason] = field(default_factory=Counter)


def eligible(
    states: Iterable[EndpointState],
    request: Request,
    ledger: Ledger,
    excluded: frozenset[EndpointId],
) -> Eligible:
    """Sort endpoints by what they may do for this request."""
    found = Eligible()
    for state in states:
        reason = _HEALTH_DROPS.get(state.health) or _drop_reason(state, request, ledger, excluded)
        if reason is not None:
            found.drops[reason] += 1
            continue
        pool = state.endpoint.pool
        if pool.can_prefill:
            found.prefill.append(state)
        if pool.can_decode:
            found.decode.append(state)
    return found


def _drop_reason(
    state: EndpointState, request: Request, ledger: Ledger, excluded: frozenset[EndpointId]
) -> DropReason | None:
    endpoint = state.endpoint
    limits = endpoint.pool.limits
    if endpoint.id in excluded:
        return DropReason.EXCLUDED
    load = ledger.load(endpoint.id)
    if load.request_count + load.others(state.sample) >= limits.in_flight_max:
        return DropReason.AT_LIMIT
    if (
        request.is_prompt_counted
        and limits.context_tokens_max is not None
        and request.prompt_tokens >= limits.context_tokens_max
    ):
        return DropReason.CONTEXT_TOO_LONG
    return None
