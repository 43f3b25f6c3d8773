"""What the admin listener says of decisions, as JSON: what was chosen, from what, and what became of it.

Times are milliseconds; moments are ages, since the process's clock means nothing outside it.
"""

from collections.abc import Iterable

import msgspec

from pdcoord.core.fleet import Endpoint
from pdcoord.core.plan import Candidate, Figures, Plan


class FiguresView(msgspec.Struct, frozen=True, kw_only=True):
    """The prediction behind one candidate."""

    queue_ms: float
    prefill_ms: float
    transfer_ms: float
    step_ms: float
    stall_ms: float
    ttft_ms: float
    time_ms: float
    slo_excess: float
    cost: float
    uncached_tokens: int
    cached_tokens: int
    transfer_bytes: int
    unfit: int = 0
    spread_ms: float = 0.0


class CandidateView(msgspec.Struct, frozen=True, kw_only=True):
    """One way to serve a request."""

    mode: str
    prefill: str | None
    decode: str
    verdict: str | None
    verdict_reason: str | None
    figures: FiguresView


class RungView(msgspec.Struct, frozen=True, kw_only=True):
    """One step of the ladder: as planned without a reason, as taken with one."""

    rung: str
    target: str | None
    reason: str | None = None


class ServedView(msgspec.Struct, frozen=True, kw_only=True):
    """What the sidecar said it did."""

    mode: str
    prefill: str | None
    rungs: list[RungView]
    prefill_ms: float | None
    transfer_ms: float | None
    cached_tokens: int | None


class AttemptView(msgspec.Struct, frozen=True, kw_only=True):
    """One plan of a request and what became of it.

    Attributes:
        failure: why the decode endpoint gave no answer, or not all of it; None if it did, or has not yet.
        broke_after_tokens: output tokens that the client had when the stream broke off; None if it did not.
        is_second: it was made beside the one before, which showed no output.
        is_outrun: of two attempts at a time the other was faster.
    """

    mode: str
    why: str
    dialect: str
    chosen: CandidateView
    runner_up: CandidateView | None
    rungs: list[RungView]
    drops: dict[str, int]
    prefill_deadline_ms: float
    transfer_deadline_ms: float
    is_outage: bool
    failure: str | None
    served: ServedView | None
    broke_after_tokens: int | None = None
    is_second: bool = False
    is_outrun: bool = False


class DecisionView(msgspec.Struct, frozen=True, kw_only=True):
    """GET /decisions/{request_id}.

    Attributes:
        adapter: of the model, that was asked for; None for the model itself.
        outcome: None while the request is being served.
        refusal: what pdcoord answered itself, if it did.
        decision_ms: the core's own time for the first plan.
        first_byte_ms: from arrival to the first byte of the answer.
        is_waiting: it waits for its turn.
        waited_ms: how long it did; None if it was not told to, or still waits.
    """

    id: str
    model: str
    adapter: str | None = None
    age_ms: float
    prompt_tokens: int
    output_tokens_max: int | None
    choice_count: int
    is_generative: bool
    outcome: str | None
    refusal: str | None
    decision_ms: float
    tenant: str
    priority: int
    is_waiting: bool
    waited_ms: float | None
    first_byte_ms: float | None
    duration_ms: float | None
    attempts: list[AttemptView]


class DecisionSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One row of GET /decisions."""

    id: str
    model: str
    mode: str | None
    why: str | None
    outcome: str | None
    age_ms: float


class DecisionsView(msgspec.Struct, frozen=True, kw_only=True):
    """GET /decisions: the latest first."""

    decisions: list[DecisionSummary]


def candidate_view(candidate: Candidate) -> CandidateView:
    return CandidateView(
        mode=candidate.mode,
        prefill=_id(candidate.prefill),
        decode=candidate.decode.id,
        verdict=candidate.verdict.kind if candidate.verdict is not None else None,
        verdict_reason=candidate.verdict.reason if candidate.verdict is not None else None,
        figures=_figures_view(candidate.figures),
    )


def planned_rungs(plan: Plan) -> list[RungView]:
    return [RungView(rung=rung.kind, target=_id(rung.prefill)) for rung in plan.rungs]


def drop_counts(plan: Plan) -> dict[str, int]:
    """Most frequent first; reasons that dropped nothing are left out."""
    counted: Iterable[tuple[str, int]] = (
        (str(reason), count) for reason, count in plan.drops.items() if count
    )
    return dict(sorted(counted, key=lambda item: -item[1]))


def _figures_view(figures: Figures) -> FiguresView:
    return FiguresView(
        queue_ms=figures.queue_s * 1e3,
        prefill_ms=figures.prefill_s * 1e3,
        transfer_ms=figures.transfer_s * 1e3,
        step_ms=figures.step_s * 1e3,
        stall_ms=figures.stall_s * 1e3,
        ttft_ms=figures.ttft_s * 1e3,
        time_ms=figures.time_s * 1e3,
        slo_excess=figures.slo_excess,
        cost=figures.cost,
        uncached_tokens=figures.uncached_tokens,
        cached_tokens=figures.cached_tokens,
        transfer_bytes=figures.transfer_bytes,
        spread_ms=figures.spread_s * 1e3,
        unfit=figures.unfit,
    )


def _id(endpoint: Endpoint | None) -> str | None:
    return endpoint.id if endpoint is not None else None
