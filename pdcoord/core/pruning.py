"""Which endpoints of a large pool are looked at for one request: bounded work, whatever the fleet's size.

A request is served best by an endpoint that has little to do or one that has much of its prompt. Both kinds
are kept, the best of each, and those in trouble besides; nothing is drawn by chance. In a pool that is no
larger than KEPT_MAX nobody is left out.
"""

import heapq
from collections.abc import Container, Mapping

from pdcoord.core.filters import PoolFit
from pdcoord.core.fleet import EndpointId

LEAST_BUSY = 40
MOST_CACHED = 20
TROUBLED_MAX = 4
KEPT_MAX = LEAST_BUSY + MOST_CACHED + TROUBLED_MAX


def pruned(fit: PoolFit, cached_tokens: Mapping[int, int], unlike: Container[EndpointId]) -> PoolFit:
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
    turns: list[tuple[int, int, int]] = []
    holders: list[tuple[int, int, int]] = []
    apart: list[int] = []
    for index, (state, load, others) in enumerate(fit.endpoints):
        busy = load.request_count + others
        if state.endpoint.id in unlike:
            apart.append(index)
        turns.append((busy, load.begun_ordinal, index))
        cached = cached_tokens.get(state.ordinal, 0)
        if cached:
            holders.append((-cached, busy, index))
    turns.sort()
    kept = {index for _, _, index in turns[:LEAST_BUSY]}
    kept.update(index for _, _, index in heapq.nsmallest(MOST_CACHED, holders))
    kept.update(apart[:TROUBLED_MAX])
    return PoolFit(fit.pool, [fit.endpoints[index] for index in sorted(kept)], fit.endpoint_count)
