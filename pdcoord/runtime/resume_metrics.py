"""Metrics of streams that broke off in their middle."""

from prometheus_client import CollectorRegistry, Counter, Histogram

from pdcoord.front.ports import Break, BreakOutcome, CallRecord
from pdcoord.protocol.errors import RungReason
from pdcoord.resume.continuation import Unresumable
from pdcoord.runtime.metricspec import MetricSpec, MetricType

RESUMES = MetricSpec(
    "pdcoord_gateway_resumes_total",
    MetricType.COUNTER,
    ("reason", "outcome"),
    "Streams that broke off in their middle, each time, by why (decode-stalled made no progress, "
    "decode-draining was given back by a pod that goes away, decode-diverged was continued by an engine that "
    "drew other tokens than the client had, decode-error is the rest) and what became of "
    "them: continued elsewhere, finished (nothing was left to "
    "generate), unresumable, refused (the policy or the fleet had no way to go on), left (by the client "
    "meanwhile).",
    "continued: clients saw a pause, but engines die or hang: their logs say why. refused: a decode pod's "
    "streams found no place on the others, see `endpoints`, `fallback_share` and `fallback.resume` of the "
    "policy. unresumable: see `unresumable_total`.",
)
UNRESUMABLE = MetricSpec(
    "pdcoord_gateway_unresumable_total",
    MetricType.COUNTER,
    ("why",),
    "Streams that broke off and could not be continued faithfully, by what of the call or its answer "
    "forbids it.",
    "tape-full: raise PDCOORD_RESUME_BYTES_MAX. lossy-text, template, token-prompt, held-back: clients that "
    "set `return_token_ids` can be continued. The rest is what clients ask for; they must send the call "
    "again.",
)
RESUME_GAP = MetricSpec(
    "pdcoord_gateway_resume_gap_seconds",
    MetricType.HISTOGRAM,
    (),
    "From when a break was noticed to the first byte of what goes on elsewhere.",
    "Of the order of `ttft_seconds` for as long prompts. Above it: the first endpoints that were tried "
    "failed as well, see `rungs_total`.",
    (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)

RESUME_METRICS = (RESUMES, UNRESUMABLE, RESUME_GAP)
REASONS = (
    RungReason.DECODE_ERROR,
    RungReason.DECODE_STALLED,
    RungReason.DECODE_DIVERGED,
    RungReason.DECODE_DRAINING,
)


class ResumeMetrics:
    """Counts breaks, in a registry that has more."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.resumes = Counter(RESUMES.name, RESUMES.meaning, RESUMES.labels, registry=registry)
        self.unresumable = Counter(
            UNRESUMABLE.name, UNRESUMABLE.meaning, UNRESUMABLE.labels, registry=registry
        )
        spec = RESUME_GAP
        self.gap = Histogram(spec.name, spec.meaning, buckets=spec.buckets, registry=registry)
        # There from the start, so that `rate` sees the first step.
        for reason in REASONS:
            for outcome in BreakOutcome:
                self.resumes.labels(reason, outcome)
        for why in Unresumable:
            self.unresumable.labels(why)

    def count(self, broke: Break) -> None:
        """A call that had this break has ended."""
        self.resumes.labels(broke.reason, broke.outcome).inc()
        if broke.why is not None:
            self.unresumable.labels(broke.why).inc()
        if broke.gap_s is not None:
            self.gap.observe(broke.gap_s)


def fields_of(record: CallRecord) -> dict[str, int | float | str | None]:
    """What a call's log line tells of its breaks; nothing where there were none."""
    breaks = record.breaks
    if not breaks:
        return {}
    gaps = [broke.gap_s for broke in breaks if broke.gap_s is not None]
    return {
        "resumes": len(gaps),
        "resume_gap_ms": round(max(gaps) * 1e3, 2) if gaps else None,
        "broke": breaks[-1].reason,
        "break_outcome": breaks[-1].outcome,
        "unresumable": breaks[-1].why,
    }
