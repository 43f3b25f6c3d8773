"""The metrics of the control stream."""

from pdcoord.runtime.metricspec import MetricSpec, MetricType

STREAMS = MetricSpec(
    "pdcoord_gateway_control_streams",
    MetricType.GAUGE,
    (),
    "Sidecars whose control stream is up; 0 where PDCOORD_CONTROL_PORT is not set.",
    "Below the number of decode endpoints: the load that others put on the rest is seen as a count "
    "of requests only. See `control_refused_total`, and control_failures_total of the sidecars.",
)
UNKNOWN = MetricSpec(
    "pdcoord_gateway_control_unknown_sidecars",
    MetricType.GAUGE,
    (),
    "Of those, sidecars whose address no endpoint has.",
    "Above 0 for long: --control-address of the sidecar is not what endpoints call it, or discovery "
    "lacks it. The log line control.unknown names it.",
)
REPORTS = MetricSpec(
    "pdcoord_gateway_control_reports_total",
    MetricType.COUNTER,
    ("kind",),
    "What sidecars told: event (of a request or a leg), snapshot (of all that is live, when a stream "
    "begins or was too slow), path (a probe).",
    "snapshot rising beside steady streams: this process has too little CPU to read all events.",
)
REFUSED = MetricSpec(
    "pdcoord_gateway_control_refused_total",
    MetricType.COUNTER,
    ("why",),
    "Control streams that were turned away or cut: version, key, malformed, silent, full, replaced (by "
    "another stream of the same address).",
    "key: give both sides one key. version: run one release. replaced rising steadily: two sidecars call "
    "themselves by one address, see --control-address; one when a pod starts again is nothing. The log "
    "lines control.refused and control.replaced have the peer and the names.",
)
REPORT_AGE = MetricSpec(
    "pdcoord_gateway_control_report_age_seconds",
    MetricType.GAUGE,
    (),
    "Since the connected sidecar that was silent longest told something, a sign of life included.",
    "Above 2 s for long: the network or a sidecar is stuck; past 6 s the stream is cut.",
)
REMOTE = MetricSpec(
    "pdcoord_gateway_remote_requests",
    MetricType.GAUGE,
    (),
    "Requests of other coordinators and routers in the ledger beside our own.",
    "0 beside other replicas under load: no control stream reaches this one.",
)
REMOTE_LEFT_OUT = MetricSpec(
    "pdcoord_gateway_remote_left_out_total",
    MetricType.COUNTER,
    (),
    "Requests of others that were told of and not taken in for want of room.",
    "Above 0: more requests are under way than this process keeps account of; decisions lack their load.",
)
CONTROL_METRICS = (STREAMS, UNKNOWN, REPORTS, REFUSED, REPORT_AGE, REMOTE, REMOTE_LEFT_OUT)
