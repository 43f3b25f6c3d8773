"""The metrics of canaries."""

from pdcoord.runtime.metricspec import MetricSpec, MetricType

_PAIR = ("model", "prefill_pool", "decode_pool")

CANARIES = MetricSpec(
    "pdcoord_gateway_canaries_total",
    MetricType.COUNTER,
    (*_PAIR, "outcome"),
    "Canaries of unlike pairs of pools that ended: passed, canary-tokens, canary-logprobs, canary-digest, "
    "canary-error, inconclusive (it could not be served as asked, so it says nothing), or unproven (the "
    "answers are equal, but behind a sidecar that is not pdcoord's nothing says that the prompt was split).",
    "canary-*: see `canary_state`. inconclusive without end: the log line canary.judged says why; a pair "
    "that is enforced stays shut meanwhile. unproven: the pair is open as if observed; only pdcoord's own "
    "sidecar can prove it.",
)
STATE = MetricSpec(
    "pdcoord_gateway_canary_state",
    MetricType.GAUGE,
    (*_PAIR, "state"),
    "1 for what is known of an unlike pair of pools: untried, passed, unproven (right, and open, behind a "
    "sidecar that is not pdcoord's), failed, or unjudged (no pool of the model can serve a prompt alone to "
    "compare with), 0 for the others.",
    "Alert on failed: this pair gives other tokens than the decode engine alone. With canary.mode enforce it "
    "is shut, and GET /paths says which layouts; with observe requests go over it.",
)
SUSPECTS = MetricSpec(
    "pdcoord_gateway_canary_suspects",
    MetricType.GAUGE,
    _PAIR,
    "Endpoints whose last canary failed while others of the pair pass.",
    "Above 0: GET /paths names them. One host is broken, or runs another version than its pool.",
)
AGE = MetricSpec(
    "pdcoord_gateway_canary_age_seconds",
    MetricType.GAUGE,
    _PAIR,
    "Since the last canary of the pair that said something; missing before the first.",
    "Far above canary.interval_s: endpoints are too busy, or canaries are inconclusive.",
)

CANARY_METRICS = (CANARIES, STATE, SUSPECTS, AGE)
