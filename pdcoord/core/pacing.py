"""Whether one more stream would push an endpoint's streams past their objective for a token.

Where all endpoints are past it, least violation makes all of them equally bad: the next request is then worth
more in the gateway, until a stream has ended, than in a batch in which nobody meets the objective any more.
"""

PACE_SHARE_MAX = 0.9
"""Of the objective, the pace up to which an endpoint takes more: who comes later adds to it. Found in the
simulator, where 1.0 and 1.1 had a tenth of the streams miss it."""
HOLD_SHARE = 0.9
"""A request is held back for so much of its objective for the first token, and no longer."""


def is_crowded(pace_s: float, tpot_s: float | None, *, alone_s: float, neighbour_count: int) -> bool:
    """Whether to hold a request back from an endpoint for the pace that it would have there.

    Args:
        pace_s: predicted time per output token with this request in the batch.
        tpot_s: the objective; None for none.
        alone_s: one step with nobody else there: where that is too slow, waiting helps nobody.
        neighbour_count: requests that are there.
    """
    if tpot_s is None or not neighbour_count:
        return False
    latest_s = tpot_s * PACE_SHARE_MAX
    return pace_s > latest_s >= alone_s
