"""Metrics that only the endpoint picker moves."""

from pdcoord.runtime.metricspec import MetricSpec, MetricType

STREAMS = MetricSpec(
    "pdcoord_gateway_extproc_streams",
    MetricType.GAUGE,
    (),
    "Streams that Envoys have open to this picker, one for each call.",
    "Scale the picker by it. Above `in_flight` for long: Envoy opens streams and sends nothing on them.",
)
ANSWERS = MetricSpec(
    "pdcoord_gateway_extproc_immediate_answers_total",
    MetricType.COUNTER,
    ("reason",),
    "Calls that the picker had Envoy answer at once instead of naming an endpoint.",
    "As of `refusals_total`. internal without a crash in the log: Envoy's filter is set up so that the "
    "picker does not see bodies; the answer's message says what to set.",
)
BODY_BYTES = MetricSpec(
    "pdcoord_gateway_extproc_body_bytes_total",
    MetricType.COUNTER,
    ("direction",),
    "Bytes of bodies that Envoy sent here, of requests and of responses.",
    "response far above request: what it costs to see answers; `response_body_mode: NONE` ends that, and "
    "with it what is learned of output lengths.",
)
VIOLATIONS = MetricSpec(
    "pdcoord_gateway_extproc_violations_total",
    MetricType.COUNTER,
    (),
    "Streams that broke off because messages came out of order, could not be read, or did not end in time.",
    "Above 0: another kind or version of proxy than was tried, or filters around ext_proc that hold bodies.",
)

EXTPROC_METRICS = (STREAMS, ANSWERS, BODY_BYTES, VIOLATIONS)
