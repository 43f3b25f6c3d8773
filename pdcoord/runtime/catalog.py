"""Every metric of the gateway process: name, type, labels, meaning, and what to do when it moves.

The table in docs/metrics-gateway.md is made from this: `python -m pdcoord.runtime.catalog > that file`.
"""

import sys

from pdcoord.runtime.canary_metrics import CANARY_METRICS
from pdcoord.runtime.control_metrics import CONTROL_METRICS
from pdcoord.runtime.extproc_metrics import EXTPROC_METRICS
from pdcoord.runtime.gray_metrics import GRAY_METRICS
from pdcoord.runtime.key_metrics import KEY_METRICS
from pdcoord.runtime.metricspec import METRIC_LABELS, Bound, MetricSpec, MetricType, bound_of
from pdcoord.runtime.objectives import OBJECTIVE_METRICS
from pdcoord.runtime.process_metrics import PROCESS_METRICS
from pdcoord.runtime.resume_metrics import RESUME_METRICS
from pdcoord.runtime.secured import RELOADS as SECRET_RELOADS

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKENIZE_SECONDS = (2.5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 1.0)
_RATIOS = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0)
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
    ("model", "reason"),
    "Answers that pdcoord gave itself, by the closed list of reasons in `x-pdcoord-reason`; model none where "
    "it was not known yet.",
    "saturated, queue-full, waited-too-long, deadline, shed: see `shed_total`. no-endpoints: see "
    "`endpoints`. internal: a defect, the log has it. The rest is the clients' own doing.",
)
SHED = MetricSpec(
    "pdcoord_gateway_shed_total",
    MetricType.COUNTER,
    ("model", "priority", "reason"),
    "Requests refused for lack of capacity, before any work was done for them: saturated (endpoints at "
    "their limits and nobody may wait, or the fallback budget is spent), queue-full, waited-too-long, "
    "deadline (their own, x-llm-d-slo-ttft-ms), shed (gave way to others).",
    "Add endpoints, or raise `limits.in_flight_max` where engines have room. queue-full beside low "
    "`waiting_work_seconds`: raise `admission.requests_max`. deadline without waiting requests: the fleet "
    "is too slow for what clients ask. Of priorities below 0 it is as meant.",
)
WAIT_SECONDS = MetricSpec(
    "pdcoord_gateway_wait_seconds",
    MetricType.HISTOGRAM,
    ("model", "priority"),
    "How long requests waited here for their turn, those refused in the end too; those that need not wait "
    "are not counted.",
    "Rising for the highest priority: the fleet is too small for it. Rising for lower ones only: as meant.",
    _SECONDS,
)
WAITING = MetricSpec(
    "pdcoord_gateway_waiting",
    MetricType.GAUGE,
    ("model", "priority"),
    "Requests that wait here for their turn; none where there is no line.",
    "Scale the engines by it, not by their own queues, which stay short while requests wait here.",
)
WAITING_WORK = MetricSpec(
    "pdcoord_gateway_waiting_work_seconds",
    MetricType.GAUGE,
    ("model", "priority"),
    "Predicted seconds of one endpoint's time that those requests take.",
    "Divided by the endpoints of the model it is the wait of who comes now.",
)
UNKNOWN_OBJECTIVES = MetricSpec(
    "pdcoord_gateway_unknown_objectives_total",
    MetricType.COUNTER,
    ("model",),
    "Calls that named an objective in x-llm-d-inference-objective that is not in `admission.objectives`, or "
    "that is not for their API key; they have priority 0.",
    "Add the name to the policy or to `objectives` of the key, or correct the client.",
)
RUNGS = MetricSpec(
    "pdcoord_gateway_rungs_total",
    MetricType.COUNTER,
    ("rung", "reason"),
    "Steps of the fallback ladder that were taken, by sidecars (other-prefill, colocated) and by the gateway "
    "(other-decode, refuse), with the reason why the leg before was given up.",
    "Any lasting rate is an outage that fallback hides: act on `reason`, then see `fallback_share`. "
    "plan-refused: sidecars answer 403 plan-unsigned, their plan keys or their clock are not the "
    "coordinator's; see `unsigned_total` of the sidecars.",
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
TTFT_RATIO = MetricSpec(
    "pdcoord_gateway_ttft_ratio",
    MetricType.HISTOGRAM,
    ("model", "mode"),
    "Time from dispatch to first token over the predicted one, of streamed calls served as planned.",
    "Below 1 or above 1 for long: speed is learned, so this is load that others put on the engines, or work "
    "that pdcoord does not see. Wide: predictions mean little, and few requests are split.",
    _RATIOS,
)
LEFT_OUT = MetricSpec(
    "pdcoord_gateway_observations_left_out_total",
    MetricType.COUNTER,
    ("kind",),
    "Times and counts (prefill, steps, transfer, output) that cannot have been measured: negative, not a "
    "number, absurdly large.",
    "Any lasting rate: a sidecar or an engine tells nonsense; GET /decisions shows what it says.",
)
RELOADS = MetricSpec(
    "pdcoord_gateway_policy_reloads_total",
    MetricType.COUNTER,
    ("source", "outcome"),
    "Changes of the policy and endpoints files, accepted or refused.",
    "refused: the last good content is in force; the log and GET /policy say why.",
)
TOKENIZED = MetricSpec(
    "pdcoord_gateway_tokenized_total",
    MetricType.COUNTER,
    ("model", "source", "missing"),
    "Prompts of models with precise prefixes, by where their token ids came from (call, library, engine, "
    "render) or, with source none, why they are not known: then the approximate index decides.",
    "deadline: raise `model.tokenizer.deadline_ms` or PDCOORD_TOKENIZER_THREADS. no-server, failed, "
    "refused: no ready vLLM endpoint, or no `render` server, answers. busy: too few threads. no-tokenizer: "
    "the log says what is wrong with the file. The rest is the calls' own kind.",
)
TOKENIZE_SECONDS = MetricSpec(
    "pdcoord_gateway_tokenize_seconds",
    MetricType.HISTOGRAM,
    ("source",),
    "What a request waited for its token ids; source none: in vain.",
    "Near `model.tokenizer.deadline_ms` more and more prompts go without; see `tokenized_total`.",
    _TOKENIZE_SECONDS,
)
PREFIX_REQUESTS = MetricSpec(
    "pdcoord_gateway_prefix_requests_total",
    MetricType.COUNTER,
    ("model", "by"),
    "Routed requests of models with precise prefixes, by the index that spoke for the chosen endpoint.",
    "approximate rising: see `tokenized_total` for prompts without tokens and `kv_events_endpoints` for "
    "engines that are not heard.",
)
PREFIX_TOKENS = MetricSpec(
    "pdcoord_gateway_prefix_tokens_total",
    MetricType.COUNTER,
    ("model", "kind"),
    "The two indexes side by side, where both can speak: cached prompt tokens of the chosen endpoint as the "
    "precise index says and as the approximate one says, and apart, the sum of their differences.",
    "approximate far above precise: engines evict what was sent to them, or restarted; a small `apart` for "
    "long says that approximate would do.",
)
KV_EVENTS = MetricSpec(
    "pdcoord_gateway_kv_event_blocks_total",
    MetricType.COUNTER,
    ("model", "what"),
    "What the precise index made of engines' KV events: blocks stored, removed, repeated, and those left "
    "out, by reason; with `-events` in the name events are counted, not blocks.",
    "lost-events: events were missed and the endpoint starts over; give it a `kv_events_replay_port`. "
    "evicted: raise `prefix.precise_blocks_max`. orphaned, conflicting, malformed-events: an engine tells "
    "nonsense.",
)
KV_BATCHES = MetricSpec(
    "pdcoord_gateway_kv_event_batches_total",
    MetricType.COUNTER,
    (),
    "Batches of KV events taken in.",
    "Standing still while requests are served: no engine is heard, see `kv_events_endpoints`.",
)
KV_TROUBLES = MetricSpec(
    "pdcoord_gateway_kv_event_troubles_total",
    MetricType.COUNTER,
    ("what",),
    "What went wrong with streams of KV events: gap (batches missing), replay (asked for again), "
    "replay-failed, restart (the engine is another process), lost (what was known is given up), throttled "
    "(too many blocks a second), unreadable batches, events and frames.",
    "gap without replay: set `kv_events_replay_port`. replay-failed, lost: the engine keeps too few batches "
    "(buffer_steps). throttled: an engine floods. unreadable: it is no vLLM or SGLang publisher.",
)
PREFIX_BLOCKS = MetricSpec(
    "pdcoord_gateway_prefix_blocks",
    MetricType.GAUGE,
    ("model",),
    "Engine blocks in the precise index.",
    "At `prefix.precise_blocks_max` the oldest are dropped: raise it if the gateway has the memory.",
)
KV_HEARD = MetricSpec(
    "pdcoord_gateway_kv_events_endpoints",
    MetricType.GAUGE,
    ("pool", "trust"),
    "Endpoints of models with precise prefixes by how far their KV events are believed: full, partial "
    "(events were missed), none (not heard yet, or silent).",
    "none above 0: `kv_events_port` is wrong, the engine runs without --kv-events-config, or a firewall is "
    "between. partial for long: the engine keeps too few events (buffer_steps) or has no replay.",
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
SPANS = MetricSpec(
    "pdcoord_gateway_spans_total",
    MetricType.COUNTER,
    ("what",),
    "Spans of traced calls that ended: exported, failed (the collector refused them or did not answer), "
    "dropped (no place in the line, or no time at the end). All 0 where nothing is traced.",
    "failed: the log line traces.failing says why; see OTEL_EXPORTER_OTLP_ENDPOINT. dropped: sample less "
    "(OTEL_TRACES_SAMPLER), or raise OTEL_BSP_MAX_QUEUE_SIZE. No call waits for either.",
)
KUBERNETES_LISTS = MetricSpec(
    "pdcoord_gateway_kubernetes_lists_total",
    MetricType.COUNTER,
    ("resource",),
    "Whole lists of a resource (pods, inferencepools, poolpolicies) that were taken from the API server: one "
    "at the start, and one whenever a watch cannot go on where it was.",
    "More than a few an hour: see `kubernetes_troubles_total`; `expired` often means an API server that "
    "keeps little history.",
)
KUBERNETES_WATCHES = MetricSpec(
    "pdcoord_gateway_kubernetes_watches_total",
    MetricType.COUNTER,
    ("resource",),
    "Watches that were opened; each lasts a minute.",
    "Standing still: see `kubernetes_silent_seconds`. Far above one a minute: the API server, or a proxy "
    "before it, ends them.",
)
KUBERNETES_TROUBLES = MetricSpec(
    "pdcoord_gateway_kubernetes_troubles_total",
    MetricType.COUNTER,
    ("resource", "why"),
    "Lists and watches that failed: unreachable, timeout, broken, expired, throttled, denied, missing, "
    "status, unreadable, too-many (objects above the bound are left out). What was known stays in force.",
    "denied: the Role lacks a verb, see docs/kubernetes.md. missing: the CRD is not installed. throttled: "
    "the API server is short of capacity. The log has the server's own words.",
)
KUBERNETES_SILENT = MetricSpec(
    "pdcoord_gateway_kubernetes_silent_seconds",
    MetricType.GAUGE,
    ("resource",),
    "Since the API server last said something about a resource, or since the start if it never did; for that "
    "long what is in force may be out of date.",
    "Up to 70 is normal where nothing changes. Alert on 300: pods that start or end are not seen.",
)
PODS_LEFT_OUT = MetricSpec(
    "pdcoord_gateway_pods_left_out",
    MetricType.GAUGE,
    ("reason",),
    "Pods that get no requests: not-running, no-address, not-ready (these pass), no-labels, bad-label, "
    "bad-annotation, malformed, repeated (its address is another's), too-many, ambiguous (two pools of a "
    "model pick it), unpicked (no pool's selector picks it).",
    "Any of those that do not pass: the log and GET /policy name the pods and what to change.",
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
    SHED,
    WAIT_SECONDS,
    WAITING,
    WAITING_WORK,
    UNKNOWN_OBJECTIVES,
    RUNGS,
    FALLBACK_SHARE,
    IN_FLIGHT,
    LEDGER_OPEN,
    ENDPOINTS,
    BREAKERS,
    SCRAPE_FAILURES,
    PROBED_PATHS,
    PATH_REPORT_FAILURES,
    TTFT_RATIO,
    LEFT_OUT,
    RELOADS,
    POLICY_STALE,
    KUBERNETES_LISTS,
    KUBERNETES_WATCHES,
    KUBERNETES_TROUBLES,
    KUBERNETES_SILENT,
    PODS_LEFT_OUT,
    TOKENIZED,
    TOKENIZE_SECONDS,
    PREFIX_REQUESTS,
    PREFIX_TOKENS,
    KV_EVENTS,
    KV_BATCHES,
    KV_TROUBLES,
    PREFIX_BLOCKS,
    KV_HEARD,
    DECISION_SECONDS,
    *OBJECTIVE_METRICS,
    *RESUME_METRICS,
    *EXTPROC_METRICS,
    *CONTROL_METRICS,
    *CANARY_METRICS,
    *GRAY_METRICS,
    *KEY_METRICS,
    SECRET_RELOADS,
    *PROCESS_METRICS,
    SPANS,
    INFO,
)


def render_page() -> str:
    """docs/metrics-gateway.md, whole."""
    return "\n".join([_HEAD, *map(_row, METRICS), _LABELS_HEAD, *_label_rows(), ""])


def _label_rows() -> list[str]:
    rows: set[str] = set()
    for spec in METRICS:
        for label in spec.labels:
            bound = bound_of(spec.name, label) or Bound("")
            where = f" of `{spec.name}`" if (spec.name, label) in METRIC_LABELS else ""
            values = ", ".join(sorted(value or "empty" for value in bound.values))
            rows.add(f"| `{label}`{where} | {bound.why}{': ' if values else ''}{values} |")
    return sorted(rows)


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

_LABELS_HEAD = """
## What bounds the labels

| label | values |
|---|---|"""


if __name__ == "__main__":
    sys.stdout.write(render_page())
