"""Other endpoints for a request, for those who retry without asking again."""

import heapq
import itertools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from pdcoord.core.fleet import Endpoint, EndpointId, EndpointState, Fleet, Health
from pdcoord.core.ledger import IDLE, Load
from pdcoord.core.plan import Plan
from pdcoord.core.request import is_allowed

LOOKED_AT_MAX = 64
"""Endpoints of a pool that are compared, so that the work is bounded whatever the pool's size."""


def alternatives(
    fleet: Fleet,
    loads: Mapping[EndpointId, Load],
    plan: Plan,
    allowed: frozenset[str] | None,
    count_max: int,
    *,
    barred: Collection[EndpointId] = (),
) -> list[Endpoint]:
    """Endpoints that could stand in for a plan's decode endpoint, least busy first.

    Only of its own pool: there layouts are equal, so that the plan's prefill endpoints suit them too. None of
    those themselves: a call would be prefilled on its own decode endpoint and moved to where it is.

    Args:
        barred: endpoints that serve badly: behind all others, since one of them is better than none.
    """
    chosen = plan.decode
    named = plan.endpoint_ids()
    for group in fleet.groups(chosen.pool.model):
        if group.pool is chosen.pool or group.pool == chosen.pool:
            ready = group.by_health[Health.READY].values()
            fit = [
                (state.endpoint.id in barred, loads.get(state.endpoint.id, IDLE).request_count, index, state)
                for index, state in enumerate(itertools.islice(ready, LOOKED_AT_MAX))
                if state.endpoint.id not in named and is_allowed(allowed, state.endpoint.address)
            ]
            in_flight_max = chosen.pool.limits.in_flight_max
            roomy = [each for each in fit if each[1] < in_flight_max]
            return [state.endpoint for _, _, _, state in heapq.nsmallest(count_max, roomy)]
    return []


def moved(plan: Plan, decode: Endpoint) -> Plan:
    """A plan as another decode endpoint than its own carries it out: colocated if that is its prefill."""
    chosen = replace(plan.chosen, decode=decode)
    rungs = tuple(rung for rung in plan.rungs if rung.prefill is None or rung.prefill.id != decode.id)
    if plan.prefill is not None and plan.prefill.id == decode.id:
        figures = replace(chosen.figures, transfer_s=0.0, transfer_bytes=0)
        chosen, rungs = replace(chosen, prefill=None, verdict=None, figures=figures), ()
    return replace(plan, chosen=chosen, rungs=rungs, attempt=plan.attempt + 1)


def least_busy(
    states: Iterable[EndpointState],
    loads: Mapping[EndpointId, Load],
    allowed: frozenset[str] | None,
    *,
    barred: Collection[EndpointId] = (),
) -> Endpoint | None:
    """The ready endpoint with the fewest requests that answers calls itself; None if there is none.

    Args:
        barred: endpoints that serve badly: behind all others.
    """
    found: Endpoint | None = None
    least: tuple[bool, int, int] | None = None
    for state in states:
        endpoint = state.endpoint
        is_fit = state.health is Health.READY and endpoint.pool.can_decode
        if is_fit and is_allowed(allowed, endpoint.address):
            load = loads.get(endpoint.id, IDLE)
            rank = (endpoint.id in barred, load.request_count, load.begun_ordinal)
            if least is None or rank < least:
                found, least = endpoint, rank
    return found
