"""Every metric of the gateway process: name, type, labels, meaning, and what to do when it moves.

The table in docs/metrics-gateway.md is made from this: `python -m pdcoord.runtime.catalog > that file`.
"""

import sys
from dataclasses import dataclass
from enum import StrEnum


class MetricType(StrEnum):
    """Prometheus' own."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric.

    Attributes:
        action: what an operator does when it moves; a metric that asks for nothing is not worth having.
    """

    name: str
    type: MetricType
    labels: tuple[str, ...]
    meaning: str
    action: str
    buckets: tuple[float, ...] = ()


_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_DECISION_SECONDS = (5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 0.1)

REQUESTS = MetricSpec(
    "pdcoord_gateway_requests_total",
    MetricType.COUNTER,
    ("model", "mode", "why", "outcome"),
    "Calls that ended. `mode` is how each was served in the end (split, colocated, none), `why` is the "
    "plan's reason, `outcome` is ok, client-gone, client-error, upstream-error or refused.",
    "upstream-error rising: look at `rungs_total` and the engines' logs. The share of `why` shows whether "
    "splitting happens at all and, if not, what stands in its way.",
)
TTFT = MetricSpec(
    "pdcoord_gateway_ttft_seconds",
    MetricType.HISTOGRAM,
    ("model", "mode"),
    "From the head of a call to the first byte of its answer, answers with status below 400 only.",
    "Split above colocated for like prompts: the speed figures or the link in the policy are too good; "
    "`pdcoord explain` shows the prediction beside what happened.",
    _SECONDS,
)
DURATION = MetricSpec(
    "pdcoord_gateway_request_duration_seconds",
    MetricType.HISTOGRAM,
    ("model", "mode"),
    "From the head of a call to the end of its answer, answers with status below 400 only.",
    "Grows with output length; compare per model.",
    (*_SECONDS, 600.0, 1_800.0, 3_600.0),
)
REFUSALS = MetricSpec(
    "pdcoord_gateway_refusals_total",
    MetricType.COUNTER,
    ("reason",),
    "Answers that pdcoord gave itself, by the closed list of reasons in `x-pdcoord-reason`.",
    "saturated: add endpoints or raise `limits.in_flight_max`. no-endpoints: see `endpoints`. internal: a "
    "defect, the log has it. The rest is the clients' own doing.",
)
RUNGS = MetricSpec(
    "pdcoord_gateway_rungs_total",
    MetricType.COUNTER,
    ("rung", "reason"),
    "Steps of the fallback ladder that were taken, by sidecars (other-prefill, colocated) and by the gateway "
    "(other-decode, refuse), with the reason why the leg before was given up.",
    "Any lasting rate is an outage that fallback hides: act on `reason`, then see `fallback_share`.",
)
FALLBACK_SHARE = MetricSpec(
    "pdcoord_gateway_fallback_share",
    MetricType.GAUGE,
    ("model",),
    "Share of a model's recent requests that fell back to a local prefill, 0..1.",
    "Near `fallback.budget.colocated_share_max` further requests are refused: bring prefill back.",
)
IN_FLIGHT = MetricSpec(
    "pdcoord_gateway_in_flight",
    MetricType.GAUGE,
    (),
    "Calls being served, from their head on.",
    "Scale the gateway by it; while draining it says what is left.",
)
LEDGER_OPEN = MetricSpec(
    "pdcoord_gateway_ledger_open",
    MetricType.GAUGE,
    (),
    "Requests in the coordinator's ledger.",
    "Above `in_flight` for longer than a scrape is a defect: report it with GET /decisions.",
)
ENDPOINTS = MetricSpec(
    "pdcoord_gateway_endpoints",
    MetricType.GAUGE,
    ("pool", "health"),
    "Endpoints by health: unknown, ready, unreachable, draining.",
    "unreachable above 0: GET /fleet names them. ready at 0 in a pool: nothing is sent there.",
)
BREAKERS = MetricSpec(
    "pdcoord_gateway_path_breakers",
    MetricType.GAUGE,
    ("state",),
    "Paths whose breaker is open or half-open; all others are closed.",
    "open above 0: GET /paths names the pairs; prefill legs or transfers between them fail.",
)
SCRAPE_FAILURES = MetricSpec(
    "pdcoord_gateway_scrape_failures_total",
    MetricType.COUNTER,
    ("pool", "why"),
    "Scrapes of an endpoint's /metrics that gave no sample.",
    "unreachable, timeout: the pod or the network. unreadable, status: it is no vLLM or SGLang server.",
)
PROBED_PATHS = MetricSpec(
    "pdcoord_gateway_probed_paths",
    MetricType.GAUGE,
    ("state",),
    "Paths that a sidecar probed: good, slow (far below `link_gbit_per_s`), shut (the last probe failed), "
    "stale (no probe for three intervals).",
    "shut above 0: nothing is sent over these; GET /paths says why. slow: the link fell back to TCP, or the "
    "policy's figure is too good. stale: a sidecar or its engine's agent hangs.",
)
PATH_REPORT_FAILURES = MetricSpec(
    "pdcoord_gateway_path_report_failures_total",
    MetricType.COUNTER,
    ("pool", "why"),
    "Questions to a sidecar's /paths that gave no report.",
    "unreachable: `metrics_port` in the policy and the sidecar's --metrics-host and --metrics-port disagree. "
    "status: the sidecar runs without --kv-agent.",
)
RELOADS = MetricSpec(
    "pdcoord_gateway_policy_reloads_total",
    MetricType.COUNTER,
    ("source", "outcome"),
    "Changes of the policy and endpoints files, accepted or refused.",
    "refused: the last good content is in force; the log and GET /policy say why.",
)
DECISION_SECONDS = MetricSpec(
    "pdcoord_gateway_decision_seconds",
    MetricType.HISTOGRAM,
    (),
    "The core's own time for one decision.",
    "Above 10 ms the gateway is short of CPU or the fleet too large for one policy.",
    _DECISION_SECONDS,
)
POLICY_STALE = MetricSpec(
    "pdcoord_gateway_policy_stale",
    MetricType.GAUGE,
    ("source",),
    "1 while a file holds something that is not in force because it was refused.",
    "Alert on 1: whoever changed the file believes in a policy that nobody follows.",
)
INFO = MetricSpec(
    "pdcoord_gateway_info",
    MetricType.GAUGE,
    ("version",),
    "1, with the version of pdcoord.",
    "Replicas of different versions during a roll-out are normal, after it they are not.",
)

METRICS = (
    REQUESTS,
    TTFT,
    DURATION,
    REFUSALS,
    RUNGS,
    FALLBACK_SHARE,
    IN_FLIGHT,
    LEDGER_OPEN,
    ENDPOINTS,
    BREAKERS,
    SCRAPE_FAILURES,
    PROBED_PATHS,
    PATH_REPORT_FAILURES,
    RELOADS,
    POLICY_STALE,
    DECISION_SECONDS,
    INFO,
)


def render_page() -> str:
    """docs/metrics-gateway.md, whole."""
    return "\n".join([_HEAD, *map(_row, METRICS), ""])


def _row(spec: MetricSpec) -> str:
    labels = ", ".join(f"`{label}`" for label in spec.labels) or "-"
    return f"| `{spec.name}` | {spec.type} | {labels} | {spec.meaning} | {spec.action} |"


_HEAD = """\
# Metrics of the gateway

`GET /metrics` on the gateway's own port, in Prometheus' text format. Label values are bounded: models are
those of the policy, everything else comes from closed lists. Names without `pdcoord_gateway_` in the last
column are other rows of this table.

| metric | type | labels | meaning | what to do when it moves |
|---|---|---|---|---|"""


if __name__ == "__main__":
    sys.stdout.write(render_page())
