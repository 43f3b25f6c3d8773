"""What the sidecar tells the outside: its metrics, each documented, and one log line per request."""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pdcoord.protocol.errors import RefuseReason, RungReason
from pdcoord.protocol.plans import Mode, RungKind, ServedHeader
from pdcoord.wire.tracing import Fate
from sidecar.legs import Legs
from sidecar.vocabulary import LegKind

PREFIX = "pdcoord_sidecar_"
MODE_UNREAD = "pass-through"
CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"

# Seconds. From a refused connection to a prefill of the longest context.
_LEG_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 180.0)
_REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 180.0, 600.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric as it is exposed and documented.

    Attributes:
        kind: counter, gauge or histogram.
        action: what a person does when it moves.
    """

    name: str
    kind: str
    labels: tuple[str, ...]
    meaning: str
    action: str
    buckets: tuple[float, ...] = ()

    @property
    def full_name(self) -> str:
        return f"{PREFIX}{self.name}" + ("_total" if self.kind == "counter" else "")


METRICS: tuple[Metric, ...] = (
    Metric(
        "requests",
        "counter",
        ("mode", "outcome"),
        "Requests that ended. mode: split, colocated, prefill-leg (sent by another sidecar), pass-through "
        "(not a generative call). outcome: served, passed-on (an engine's own error), refused, broken-off "
        "(after the first byte), handed-back (the same, and whoever sent it goes on elsewhere), client-left, "
        "error (a bug).",
        "A rising share of refused or broken-off: see rungs and refusals for the reason.",
    ),
    Metric(
        "refusals",
        "counter",
        ("reason",),
        "Requests that the sidecar itself answered with an error, by x-pdcoord-reason.",
        "target-not-allowed: the allowlist lacks a prefill pod, or somebody probes. ladder-exhausted: "
        "prefill capacity is gone and the plan allows no colocated fallback. saturated: --live-max or "
        "--bodies-bytes-max is reached: send less here, or raise it.",
    ),
    Metric(
        "unsigned",
        "counter",
        ("why",),
        "Requests refused with plan-unsigned, by what is wrong with the signature: missing, malformed, "
        "key-unknown, wrong, too-old. Only with --plan-keys-file.",
        "key-unknown: a rotation did not reach both sides, see docs/tls.md. too-old: a clock is off, or "
        "somebody sends again what was heard. missing: somebody goes past the gateway.",
    ),
    Metric(
        "secret_reloads",
        "counter",
        ("files", "outcome"),
        "Changes of certificates (listener, metrics, upstream) and of plan keys (plan-keys), accepted or "
        "refused.",
        "refused: the last good ones are in force until they expire; the log line secret.refused says why.",
    ),
    Metric(
        "certificate_begins_timestamp_seconds",
        "gauge",
        ("use",),
        "From when on the certificate in force is good, in Unix seconds, by what it is for: listener (the "
        "metrics listener's is the same), upstream, control. No series where there is none.",
        "With the next one it tells how old the certificate may become.",
    ),
    Metric(
        "certificate_expires_timestamp_seconds",
        "gauge",
        ("use",),
        "Until when it is good; what was renewed on disk counts once it is in force.",
        "Alert long before: who has to verify it refuses every connection from then on. See whether it is "
        "renewed at all, then secret_reloads.",
    ),
    Metric(
        "rungs",
        "counter",
        ("rung", "reason"),
        "Rungs of the fallback ladder that were taken, by what was done next and why.",
        "prefill-*: look at the prefill pool. transfer-*: look at the link and the engines' KV connector. "
        "decode-*: look at the engine of this pod.",
    ),
    Metric(
        "leg_seconds",
        "histogram",
        ("leg", "outcome"),
        "Time of a generative call's leg from sending it to its end, by leg (prefill, decode) and outcome "
        "(ok, cancelled, rejected, or the reason of the rung).",
        "prefill ok growing: the prefill pool is short. cancelled growing: clients leave before the end.",
        _LEG_BUCKETS,
    ),
    Metric(
        "transfer_seconds",
        "histogram",
        (),
        "Split streams: from a good prefill leg to the first output, the first step included.",
        "Growing alone: the link is slow or shared; compare with the transfer deadline of the policy.",
        _LEG_BUCKETS,
    ),
    Metric(
        "first_output_seconds",
        "histogram",
        ("mode",),
        "From the request's whole body to the first output for the client. Calls that are not streamed "
        "count with their whole generation.",
        "Compare split with colocated: a split that is slower should not have been planned.",
        _LEG_BUCKETS,
    ),
    Metric(
        "request_seconds",
        "histogram",
        ("mode", "outcome"),
        "From the request's whole body to its end.",
        "Read it beside the engine's own latency; what is above that is this sidecar and the prefill leg.",
        _REQUEST_BUCKETS,
    ),
    Metric(
        "resumes",
        "counter",
        ("reason", "outcome"),
        "Continuations of streams that broke off, by why the leg before failed, and what became of it: ok "
        "(it came to the stream's end), cancelled, or why it failed.",
        "decode-*: look at the engine of this pod. Outcomes that are not ok: look at the decode pods that "
        "streams were to go on at.",
    ),
    Metric(
        "unresumed",
        "counter",
        ("why",),
        "Streams that broke off and ended with an error event, by what kept them from being continued: "
        "no-target, tries, age, no-stream, or what in the request or the stream forbids it.",
        "no-target: the plan names no decode endpoint that answers and is on the allowlist. tape-full: raise "
        "--resume-bytes-max. Others: such requests cannot be continued faithfully anywhere.",
    ),
    Metric(
        "resume_gap_seconds",
        "histogram",
        (),
        "From a stream's break, or the beginning of its stall, to the first output of its continuation.",
        "Growing: prompts are computed anew. See whether the prefill pod of the plan still has them cached.",
        _LEG_BUCKETS,
    ),
    Metric(
        "resume_bytes",
        "gauge",
        (),
        "What is kept of running streams, so that they can be continued.",
        "Near --resume-bytes-max: more streams run than can be continued.",
    ),
    Metric(
        "in_flight",
        "gauge",
        (),
        "Requests being served.",
        "At a plateau: the engine is full. Not falling after SIGTERM: raise --drain-s.",
    ),
    Metric(
        "tasks",
        "gauge",
        (),
        "asyncio tasks that have not ended.",
        "Some for the process and a few for each request. Rising while in_flight does not: a defect; restart "
        "the sidecar and report it.",
    ),
    Metric(
        "orphaned_leases",
        "counter",
        (),
        "Prefills that gave a ticket whose KV nothing shows to have been pulled. The prefill pod keeps it "
        "until the lease ends.",
        "Each pins KV on a prefill pod for up to the lease. Rising with client-left: clients give up; "
        "rising with transfer-*: repair the link.",
    ),
    Metric(
        "unsplit",
        "counter",
        ("field",),
        "Requests that a router wanted split but whose body forbids it, by the field that does.",
        "The router does not look at bodies: harmless, but its load figures for prefill pods are off.",
    ),
    Metric(
        "engine_ready",
        "gauge",
        (),
        "1 if the engine's last health answer was 200, else 0.",
        "0: the engine is down or loading; the pod is out of service until it is back.",
    ),
    Metric(
        "draining",
        "gauge",
        (),
        "1 after SIGTERM.",
        "Nothing; it explains refusals with reason draining.",
    ),
    Metric(
        "allowed_targets",
        "gauge",
        (),
        "Prefill targets on the allowlist.",
        "0 without --allow-any: no request can be split here.",
    ),
    Metric(
        "probes",
        "counter",
        ("outcome",),
        "Probes of prefill targets that ended: ok, agent-unreachable (this pod's own engine could not be "
        "asked), or how the transfer failed. Only with --kv-agent, as the next five.",
        "agent-unreachable: --kv-agent is wrong or the engine runs without our connector. Others: GET /paths "
        "on this port names the target and the detail.",
    ),
    Metric(
        "kv_agent_up",
        "gauge",
        (),
        "1 if the agent in this pod's own engine answered when it was last asked to probe.",
        "0: as probes with agent-unreachable.",
    ),
    Metric(
        "path_usable",
        "gauge",
        ("target",),
        "1 if the last probe of a target read a known pattern rightly, else 0.",
        "0: the log line path.changed and GET /paths say why; the coordinator sends nothing over that path.",
    ),
    Metric(
        "path_degraded",
        "gauge",
        ("target",),
        "1 if the last probe went over another transport than the engine's settings ask for, such as TCP in "
        "place of RoCE.",
        "1: run `pdcoord preflight` on both nodes.",
    ),
    Metric(
        "path_latency_seconds",
        "gauge",
        ("target",),
        "From asking for one small piece to having it, in the last good probe.",
        "Growing with load: the link or the producer is busy.",
    ),
    Metric(
        "path_bandwidth_bytes_per_second",
        "gauge",
        ("target",),
        "What the read of a known pattern reached in the last good probe.",
        "Far below link_gbit_per_s of the policy: correct the policy, or the link.",
    ),
    Metric(
        "spans",
        "counter",
        ("what",),
        "Spans of traced requests that ended: exported, failed (the collector refused them or did not "
        "answer), dropped (no place in the line, or no time at the end).",
        "failed: the log line traces.failing says why; see OTEL_EXPORTER_OTLP_ENDPOINT. dropped: sample less "
        "(OTEL_TRACES_SAMPLER), or raise OTEL_BSP_MAX_QUEUE_SIZE. No request waits for either.",
    ),
    Metric(
        "control_streams",
        "gauge",
        (),
        "Coordinator replicas that take this sidecar's reports. Only with --control, as the next four.",
        "Below the number of replicas: control_failures says why; each misses this pod's load.",
    ),
    Metric(
        "control_failures",
        "counter",
        ("why",),
        "Control streams that could not be had or ended: unresolved (the name has no address), unreachable, "
        "silent, broken, refused (key or certificate), version, full, files, replaced (another sidecar of "
        "the same address came).",
        "refused: both sides need one key or CA. version: run one release. replaced: two sidecars have one "
        "--control-address. A few unreachable while replicas are replaced are nothing.",
    ),
    Metric(
        "control_events",
        "counter",
        ("outcome",),
        "Events of requests and legs, for each stream: sent, or dropped because the coordinator was too slow "
        "and got a snapshot of what is live in their place.",
        "dropped rising: a coordinator has too little CPU; its view is right again after each snapshot.",
    ),
    Metric(
        "control_snapshots",
        "counter",
        (),
        "Snapshots sent: one for each stream that begins, and one whenever events were dropped.",
        "As control_events and control_failures.",
    ),
    Metric(
        "control_targets",
        "gauge",
        ("state",),
        "Prefill targets that coordinators name: usable, or shut where all connected ones call the path "
        "open or impossible.",
        "shut: GET /paths on this port has what each replica says and why.",
    ),
    Metric(
        "allow_file_errors",
        "counter",
        (),
        "Changes of --allow-file that could not be read; the last good list stays in force.",
        "Read the log line allowlist.refused, repair the file.",
    ),
)

_COUNTERS = {"counter": Counter, "gauge": Gauge}

TARGETS_SHOWN_MAX = 512
"""Targets that have series of their own; those beyond share one, so that a large fleet is no flood."""
OTHER = "other"
_CLOSED = "closed list"
_LABELS = {
    "target": f"prefill targets that are on the allowlist; beyond {TARGETS_SHOWN_MAX} all are `{OTHER}`",
    **dict.fromkeys(
        ("mode", "outcome", "reason", "rung", "leg", "field", "why", "what", "state", "files", "use"), _CLOSED
    ),
}
LABEL_VALUES: dict[str, frozenset[str]] = {
    "mode": frozenset({*Mode, "prefill-leg", MODE_UNREAD}),
    "reason": frozenset({*RungReason, *RefuseReason}),
    "rung": frozenset(RungKind),
    "leg": frozenset(LegKind),
    "what": frozenset(Fate),
}
"""The closed lists that are this process's own, for whoever writes queries."""


def bound_of(label: str) -> str | None:
    """What keeps the values of a label few; None if nothing is known to."""
    return _LABELS.get(label)


class Metrics:
    """The metrics of one process, on a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._by_name: dict[str, Any] = {}
        for each in METRICS:
            full_name = PREFIX + each.name
            if each.kind == "histogram":
                made: Any = Histogram(
                    full_name, each.meaning, each.labels, buckets=each.buckets, registry=self.registry
                )
            else:
                made = _COUNTERS[each.kind](full_name, each.meaning, each.labels, registry=self.registry)
            self._by_name[each.name] = made
        self._shown: dict[str, set[str]] = {each.name: set() for each in METRICS if "target" in each.labels}

    def count(self, name: str, *labels: str) -> None:
        self._child(name, labels).inc()

    def count_spans(self, fate: str, count: int) -> None:
        """Spans went out or were lost; called from another thread."""
        self._child("spans", (fate,)).inc(count)

    def add(self, name: str, amount: float, *labels: str) -> None:
        self._child(name, labels).inc(amount)

    def set(self, name: str, value: float, *labels: str) -> None:
        self._child(name, labels).set(value)

    def read(self, name: str, value: Callable[[], float], *labels: str) -> None:
        """Have a gauge ask for its value whenever somebody asks for the metrics."""
        self._child(name, labels).set_function(value)

    def drop(self, names: Iterable[str], *labels: str) -> None:
        """Forget these series, if they are there: what they told of is gone."""
        for name in names:
            self._by_name[name].remove(*labels)
            if name in self._shown:
                self._shown[name].discard(labels[0])

    def observe(self, name: str, seconds: float, *labels: str) -> None:
        self._child(name, labels).observe(max(seconds, 0.0))

    def record(self, legs: Legs, *, mode: str, outcome: str, seconds: float, now_s: float) -> None:
        """Everything that is known of a request at its end."""
        self.count("requests", mode, outcome)
        self.observe("request_seconds", seconds, mode, outcome)
        if mode == MODE_UNREAD:
            return
        for leg in legs.legs.values():
            ended_s = now_s if leg.ended_s is None else leg.ended_s
            self.observe("leg_seconds", ended_s - leg.began_s, leg.kind, leg.outcome or "cancelled")
        for taken in legs.rungs:
            self.count("rungs", taken.rung, taken.reason)
        for reason, became in legs.resumes():
            self.count("resumes", reason, became)
        for gap_s in legs.gaps_s:
            self.observe("resume_gap_seconds", gap_s)
        if legs.unresumed:
            self.count("unresumed", legs.unresumed)
        if legs.first_output_s is not None:
            self.observe("first_output_seconds", legs.first_output_s, mode)
            transfer_ms = legs.served().transfer_ms
            if transfer_ms is not None and legs.order.is_stream:
                self.observe("transfer_seconds", transfer_ms / 1e3)

    def exposition(self) -> bytes:
        """Prometheus text format 0.0.4."""
        return generate_latest(self.registry)

    def _child(self, name: str, labels: tuple[str, ...]) -> Any:
        metric = self._by_name[name]
        if name in self._shown:
            labels = (self._shown_target(name, labels[0]), *labels[1:])
        return metric.labels(*labels) if labels else metric

    def _shown_target(self, name: str, target: str) -> str:
        shown = self._shown[name]
        if target not in shown and len(shown) >= TARGETS_SHOWN_MAX:
            return OTHER
        shown.add(target)
        return target


def log_fields(served: ServedHeader, legs: Legs) -> dict[str, Any]:
    """What the log line of a request says of its legs and rungs."""
    fields: dict[str, Any] = {"leg_count": len(legs.legs)}
    if served.prefill is not None:
        fields["prefill"] = served.prefill
    if served.rungs:
        fields["rungs"] = [f"{taken.rung} {taken.reason} {taken.target}" for taken in served.rungs]
    for name in ("prefill_ms", "transfer_ms", "cached_tokens"):
        value = getattr(served, name)
        if value is not None:
            fields[name] = value
    if legs.first_output_s is not None:
        fields["first_output_ms"] = round(legs.first_output_s * 1e3, 3)
    resumes = legs.resumes()
    if resumes:
        fields["resumes"] = [f"{reason} {outcome}" for reason, outcome in resumes]
        fields["resume_gaps_ms"] = [round(gap_s * 1e3, 3) for gap_s in legs.gaps_s]
    if legs.unresumed:
        fields["unresumed"] = legs.unresumed
    return fields


def configure_log(level: str) -> None:
    """Log JSON lines to standard output from `level` on."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(serializer=_to_json),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.BytesLoggerFactory(file=sys.stdout.buffer),
        cache_logger_on_first_use=True,
    )


def _to_json(fields: Any, **_unused: Any) -> bytes:
    return msgspec.json.encode(fields, enc_hook=str)
