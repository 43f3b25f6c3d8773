"""Which endpoints of a large pool are looked at for one request: bounded work, whatever the fleet's size.

A request is served best by an endpoint that has little to do or one that has much of its prompt. Both kinds
are kept, the best of each, and those in trouble besides; nothing is drawn by chance. In a pool that is no
larger than KEPT_MAX nobody is left out.
"""

import heapq
import itertools
from collections import defaultdict
from collections.abc import Collection, Mapping

from pdcoord.core.filters import PoolFit
from pdcoord.core.fleet import EndpointId, EndpointState
from pdcoord.core.ledger import Load

LEAST_BUSY = 40
MOST_CACHED = 20
TROUBLED_MAX = 4
KEPT_MAX = LEAST_BUSY + MOST_CACHED + TROUBLED_MAX


def pruned(fit: PoolFit, cached_tokens: Mapping[int, int], unlike: Collection[EndpointId]) -> PoolFit:
    """The endpoints of a pool that are worth a closer look.

    Least busy is who has the fewest requests, and of those whose turn is longest past; most cached, who
    has the most of the prompt, and of those the least busy.

    Args:
        cached_tokens: of the prompt, by endpoint ordinal.
        unlike: endpoints with a slow or tripped path, or slower than their pool: kept beside the others,
            as their load does not tell how good they are.
    """
    if len(fit.endpoints) <= KEPT_MAX:
        return fit
    endpoints = fit.endpoints
    kept = set(_least_busy(endpoints))
    if cached_tokens:
        kept.update(_most_cached(endpoints, cached_tokens))
    if unlike:
        apart = (index for index, (state, _, _) in enumerate(endpoints) if state.endpoint.id in unlike)
        kept.update(itertools.islice(apart, TROUBLED_MAX))
    return PoolFit(fit.pool, [fit.endpoints[index] for index in sorted(kept)], fit.endpoint_count)


def _least_busy(endpoints: list[tuple[EndpointState, Load, int]]) -> list[int]:
    """The LEAST_BUSY endpoints with the fewest requests, by index."""
    by_busy: defaultdict[int, list[int]] = defaultdict(list)
    for index, (_, load, others) in enumerate(endpoints):
        by_busy[load.request_count + others].append(index)
    kept: list[int] = []
    # Only among those that are as busy as the last that is kept do turns decide.
    for busy in sorted(by_busy):
        group = by_busy[busy]
        left = LEAST_BUSY - len(kept)
        if len(group) >= left:
            group.sort(key=[load.begun_ordinal for _, load, _ in endpoints].__getitem__)
            return kept + group[:left]
        kept += group
    return kept


def _most_cached(
    endpoints: list[tuple[EndpointState, Load, int]], cached_tokens: Mapping[int, int]
) -> list[int]:
    """The MOST_CACHED endpoints that have the most of the prompt, by index."""
    holders: list[tuple[int, int, int]] = []
    for index, (state, load, others) in enumerate(endpoints):
        cached = cached_tokens.get(state.ordinal, 0)
        if cached:
            holders.append((-cached, load.request_count + others, index))
    return [index for _, _, index in heapq.nsmallest(MOST_CACHED, holders)]
