"""A second attempt beside one that shows no output: when it is asked for, how often, and under which id.

As in Dean and Barroso, "The Tail at Scale" (2013): the second is sent only where the first has taken longer
than nearly all do, and of few requests, so that a fleet that is slow as a whole is not asked twice.
"""

from collections.abc import Iterable, Iterator
from enum import StrEnum

from pdcoord.core.events import HedgeOver
from pdcoord.core.fleet import EndpointId
from pdcoord.core.model import Model
from pdcoord.core.plan import Figures, Plan
from pdcoord.core.progress import expected_s, late_after_s
from pdcoord.core.request import Request, RequestId
from pdcoord.protocol.headers import REQUEST_ID_BYTES_MAX
from pdcoord.protocol.plans import RungKind

FACTOR_MIN = 2.0
SPREADS_MIN = 3.0
"""No second attempt before so many times the prediction of the first, and spreads of it."""
LEFT_FACTOR = 1.5
"""Of the prediction, what the second must have left of the objective: its own output comes no sooner."""
_SUFFIX = "-hedge"


class HedgeEnd(StrEnum):
    """What became of a second attempt; closed, a label of metrics."""

    WON = "won"
    LOST = "lost"
    FAILED = "failed"
    WITHHELD = "withheld"
    """It was asked for and not sent: their share of requests is spent."""


def id_of(request_id: RequestId) -> RequestId:
    """The id of a request's second attempt: engines do not take two requests of one id."""
    return RequestId(request_id + _SUFFIX)


def may_have_second(name: str) -> bool:
    """Whether a request may have this id: it is no second attempt's, and that would be none too long."""
    return not name.endswith(_SUFFIX) and len(name) + len(_SUFFIX) <= REQUEST_ID_BYTES_MAX


def after_s(request: Request, model: Model, figures: Figures) -> float | None:
    """How long after its dispatch a request may be asked of a second endpoint; None for never.

    As late as its objective allows, since most first attempts answer until then, but not before the first is
    later than nearly all are; without an objective, when it is late.
    """
    rules = model.fallback
    late_s = late_after_s(request, figures)
    is_allowed = rules.hedge_share_max > 0.0 and RungKind.OTHER_DECODE in rules.rungs
    if late_s is None or not is_allowed or request.is_resumed:
        return None
    wait_s = late_s
    objective_s = request.slo.ttft_s or model.slo.ttft_s
    if objective_s is not None and request.is_streamed:
        least_s = FACTOR_MIN * expected_s(request, figures) + SPREADS_MIN * figures.spread_s
        wait_s = min(max(objective_s - LEFT_FACTOR * figures.ttft_s, least_s), late_s)
    return max(wait_s, rules.hedge_after_s_min)


def exclusions(
    plan: Plan, failed: frozenset[EndpointId], barred: Iterable[EndpointId]
) -> Iterator[frozenset[EndpointId]]:
    """Whom a second attempt avoids, the best first: which leg keeps the first one waiting is not known."""
    avoided = failed | {plan.decode.id} | frozenset(barred)
    if plan.prefill is not None:
        yield avoided | {plan.prefill.id}
    yield avoided


def end_of(event: HedgeOver) -> HedgeEnd:
    if event.is_won:
        return HedgeEnd.WON
    return HedgeEnd.LOST if event.reason is None else HedgeEnd.FAILED
