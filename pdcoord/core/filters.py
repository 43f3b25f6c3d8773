"""Which endpoints may take a leg of a request, and a reason for each that may not."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from pdcoord.core.fleet import EndpointId, EndpointState, Health, Pool, PoolGroup
from pdcoord.core.ledger import IDLE, Ledger, Load
from pdcoord.core.plan import DropReason
from pdcoord.core.request import Request

_HEALTH_DROPS = {
    Health.UNKNOWN: DropReason.NOT_READY,
    Health.UNREACHABLE: DropReason.UNREACHABLE,
    Health.DRAINING: DropReason.DRAINING,
}


_NOBODY: frozenset[EndpointId] = frozenset()

RESUMED_SHARE_MAX = 2
"""Of `in_flight_max` for requests that were admitted once: the streams of an endpoint that died go to the
others, whose engines queue what is more than they can run."""


# Not frozen, though nobody changes it: that would double what making it costs each request.
@dataclass(slots=True)
class PoolFit:
    """Endpoints of one pool that may take a leg.

    Attributes:
        endpoints: each with its account and how many requests of others run on it.
        endpoint_count: of the pool that may take a leg, with those that are not looked at.
    """

    pool: Pool
    endpoints: list[tuple[EndpointState, Load, int]]
    endpoint_count: int


# Not frozen, though nobody changes it: that would double what making it costs each request.
@dataclass(slots=True)
class Eligible:
    """Pools with endpoints that may take a leg, and why other endpoints may not."""

    pools: list[PoolFit]
    drops: Counter[DropReason]


def eligible(
    groups: Iterable[PoolGroup],
    request: Request,
    ledger: Ledger,
    excluded: frozenset[EndpointId],
    shunned: frozenset[EndpointId] = _NOBODY,
) -> Eligible:
    """Sort out which endpoints may serve this request.

    Args:
        excluded: those that failed it.
        shunned: those that serve badly.
    """
    found = Eligible([], Counter())
    apart = {
        **dict.fromkeys(shunned, DropReason.QUARANTINED),
        **dict.fromkeys(excluded, DropReason.EXCLUDED),
    }
    for group in groups:
        for health, endpoints_of in group.by_health.items():
            if endpoints_of and health is not Health.READY:
                found.drops[_HEALTH_DROPS[health]] += len(endpoints_of)
        ready = _allowed(group.by_health[Health.READY], request, found.drops)
        if ready and _is_too_long(request, group.pool):
            found.drops[DropReason.CONTEXT_TOO_LONG] += len(ready)
        elif ready:
            in_flight_max = group.pool.limits.in_flight_max
            if request.is_resumed:
                in_flight_max *= RESUMED_SHARE_MAX
            endpoints = _within_limits(in_flight_max, ready, ledger, apart, found.drops)
            if endpoints:
                found.pools.append(PoolFit(group.pool, endpoints, len(endpoints)))
    return found


def _allowed(
    ready: dict[EndpointId, EndpointState], request: Request, drops: Counter[DropReason]
) -> dict[EndpointId, EndpointState]:
    """Those whose address the request may go to."""
    if request.allowed is None:
        return ready
    allowed = {each: state for each, state in ready.items() if request.allows(state.endpoint.address)}
    if len(allowed) < len(ready):
        drops[DropReason.NOT_ALLOWED] += len(ready) - len(allowed)
    return allowed


def is_too_long_everywhere(request: Request, pools: Iterable[Pool]) -> bool:
    """Whether no pool could ever serve this prompt, whatever the state of its endpoints."""
    return all(_is_too_long(request, pool) for pool in pools if pool.can_decode)


def _is_too_long(request: Request, pool: Pool) -> bool:
    tokens_max = pool.limits.context_tokens_max
    return request.is_prompt_counted and tokens_max is not None and request.prompt_tokens >= tokens_max


def _within_limits(
    in_flight_max: int,
    ready: dict[EndpointId, EndpointState],
    ledger: Ledger,
    apart: dict[EndpointId, DropReason],
    drops: Counter[DropReason],
) -> list[tuple[EndpointState, Load, int]]:
    loads = ledger.accounts
    endpoints: list[tuple[EndpointState, Load, int]] = []
    full_count = 0
    # A thousand times for each request: `Ledger.load` and `Load.others`, without their calls.
    for endpoint_id, state in ready.items():
        load = loads.get(endpoint_id, IDLE)
        sample, others = state.sample, 0
        if sample is not None and (seen := sample.running + sample.waiting) > load.own_at_sample:
            others = seen - load.own_at_sample
        if apart and endpoint_id in apart:
            drops[apart[endpoint_id]] += 1
        elif load.request_count + others >= in_flight_max:
            full_count += 1
        else:
            endpoints.append((state, load, others))
    if full_count:
        drops[DropReason.AT_LIMIT] += full_count
    return endpoints
