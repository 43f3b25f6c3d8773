"""Metrics of what was promised: objectives and how often they are met, readiness, age of what is known."""

from collections.abc import Iterable

from pdcoord.core.coordinator import Coordinator
from pdcoord.core.events import Outcome
from pdcoord.core.fleet import Health
from pdcoord.front.ports import CallRecord
from pdcoord.runtime.metricspec import MetricSpec, MetricType

GaugeSample = tuple[tuple[str, ...], float]

_TPOT_SECONDS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)
_TPOT_TOKENS_MIN = 2

TPOT = MetricSpec(
    "pdcoord_gateway_tpot_seconds",
    MetricType.HISTOGRAM,
    ("model", "mode"),
    "Time per output token after the first, of whole streamed answers with two tokens or more.",
    "Rising with load: decode endpoints are full, see their `vllm:num_requests_running` and KV usage. Split "
    "far below colocated: prefills stall the streams of endpoints that do both.",
    _TPOT_SECONDS,
)
OBJECTIVE_SECONDS = MetricSpec(
    "pdcoord_gateway_objective_seconds",
    MetricType.GAUGE,
    ("model", "objective"),
    "The policy's objectives: ttft and tpot; no series where none is set.",
    "Compare `ttft_seconds` and `tpot_seconds` with it; a call's own objectives are counted in "
    "`objectives_total`.",
)
OBJECTIVES = MetricSpec(
    "pdcoord_gateway_objectives_total",
    MetricType.COUNTER,
    ("model", "objective", "met"),
    "Calls with objectives, their own or the policy's, by whether they met them: ttft, tpot, and all. "
    "Refused calls and those that engines failed met none; those that clients left or got wrong are not "
    "counted.",
    "The rate of all, yes is the goodput. Its share falling: see `ttft_ratio` (is it as predicted?), "
    "`waiting` (is the fleet too small?) and `rungs_total` (is something broken?).",
)
FALLBACK_SHARE_MAX = MetricSpec(
    "pdcoord_gateway_fallback_share_max",
    MetricType.GAUGE,
    ("model",),
    "`fallback.budget.colocated_share_max` of the policy, 0..1.",
    "Where `fallback_share` reaches it the budget is spent and calls are refused.",
)
FALLBACK_REFUSED = MetricSpec(
    "pdcoord_gateway_fallback_refused_total",
    MetricType.COUNTER,
    ("model",),
    "Calls that found no prefill and were refused because the fallback budget is spent, or the KV of decode "
    "endpoints is too full.",
    "Any lasting rate: bring prefill back. `fallback_share` goes up and down at its limit meanwhile.",
)
READY = MetricSpec(
    "pdcoord_gateway_ready",
    MetricType.GAUGE,
    (),
    "1 while /readyz says yes.",
    "0: GET /readyz says why: no policy, no endpoint that could serve a model, or the end of the process.",
)
SIGNAL_AGE = MetricSpec(
    "pdcoord_gateway_signal_age_seconds",
    MetricType.GAUGE,
    ("pool",),
    "Since the endpoint of a pool that was heard of least lately gave load figures; those that never did, "
    "or are draining, are left out.",
    "Far above PDCOORD_SCRAPE_INTERVAL_S: an engine is gone or stuck, or the gateway is short of CPU; "
    "GET /fleet names the endpoint. It gets no requests after two scrapes that fail.",
)
OBJECTIVE_METRICS = (
    TPOT,
    OBJECTIVE_SECONDS,
    OBJECTIVES,
    FALLBACK_SHARE_MAX,
    FALLBACK_REFUSED,
    READY,
    SIGNAL_AGE,
)


def tpot_s(record: CallRecord) -> float | None:
    """Seconds per output token after the first; None where that says nothing."""
    tokens, first_s = record.output_tokens, record.first_byte_s
    if not record.is_stream or tokens is None or tokens < _TPOT_TOKENS_MIN or first_s is None:
        return None
    return max(record.ended_s - first_s, 0.0) / (tokens - 1)


def objectives_met(record: CallRecord) -> dict[str, bool]:
    """Which objectives a call that ended met; empty where it had none, or it is the client's doing."""
    slo = record.slo
    if record.outcome in {Outcome.CLIENT_GONE, Outcome.CLIENT_ERROR}:
        return {}
    is_good = record.outcome is Outcome.OK
    met: dict[str, bool] = {}
    if slo.ttft_s is not None:
        first_s = record.first_byte_s
        met["ttft"] = is_good and first_s is not None and first_s - record.began_s <= slo.ttft_s
    if slo.tpot_s is not None:
        took_s = tpot_s(record)
        # An answer of one token, or in one piece, has no time between tokens to miss.
        met["tpot"] = is_good and (took_s is None or took_s <= slo.tpot_s)
    return {**met, "all": all(met.values())} if met else {}


def objective_gauges(
    coordinator: Coordinator, *, is_ready: bool, now_s: float
) -> Iterable[tuple[MetricSpec, Iterable[GaugeSample]]]:
    """Gauges that are read off the state when somebody asks."""
    models = coordinator.models()
    limits = {
        (model.name, name): limit
        for model in models
        for name, limit in (("ttft", model.slo.ttft_s), ("tpot", model.slo.tpot_s))
        if limit is not None
    }
    yield OBJECTIVE_SECONDS, list(limits.items())
    yield FALLBACK_SHARE_MAX, [((model.name,), model.fallback.colocated_share_max) for model in models]
    yield FALLBACK_REFUSED, [((name,), float(b.refused_count)) for name, b in coordinator.budgets.items()]
    yield READY, [((), float(is_ready))]
    ages: dict[tuple[str, ...], float] = {}
    for state in coordinator.fleet.states():
        # One that fell silent counts on: its pool would look the fresher for it.
        if state.health is not Health.DRAINING and state.sampled_s is not None:
            pool = (str(state.endpoint.pool.name),)
            ages[pool] = max(ages.get(pool, 0.0), now_s - state.sampled_s)
    yield SIGNAL_AGE, list(ages.items())
