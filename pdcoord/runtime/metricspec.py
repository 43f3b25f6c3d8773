"""What one metric of a coordinator process is, and what bounds each of its labels."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from pdcoord.core.doubts import Doubt
from pdcoord.core.events import Outcome
from pdcoord.core.fleet import Health
from pdcoord.core.hedging import HedgeEnd
from pdcoord.core.likeness import CanaryOutcome
from pdcoord.core.observations import ObservationKind
from pdcoord.core.paths import BreakerState
from pdcoord.core.plan import Why
from pdcoord.core.probes import ProbeState
from pdcoord.core.trials import PairState
from pdcoord.core.trouble import Symptom
from pdcoord.feeds.declared import Source
from pdcoord.feeds.kubewatch import WatchTrouble
from pdcoord.feeds.scrapes import ScrapeFailure
from pdcoord.feeds.tokens import TokensMissing, TokenSource
from pdcoord.front.keys import KeyFault
from pdcoord.front.ports import BreakOutcome
from pdcoord.front.rates import RateKind
from pdcoord.protocol.errors import RefuseReason, RungReason
from pdcoord.protocol.plans import Mode, RungKind
from pdcoord.resume.continuation import Unresumable
from pdcoord.wire.tracing import Fate


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


@dataclass(frozen=True, slots=True)
class Bound:
    """What keeps the values of a label few.

    Attributes:
        why: in words, for the reference.
        values: all there can be; empty where a policy or the code behind it has the list.
    """

    why: str
    values: frozenset[str] = frozenset()


def closed(*kinds: Iterable[str], extra: tuple[str, ...] = ()) -> Bound:
    """One of a list that is fixed in the code."""
    values = frozenset(str(value) for kind in kinds for value in kind) | frozenset(extra)
    return Bound("closed list", values)


_POLICY = Bound("names in the policy")

LABELS: Mapping[str, Bound] = {
    "direction": closed(("request", "response")),
    "model": Bound("models of the policy, and none"),
    "pool": _POLICY,
    "prefill_pool": _POLICY,
    "decode_pool": _POLICY,
    "priority": Bound("priorities that the policy's objectives name, and 0"),
    "mode": closed(Mode, extra=("none",)),
    "outcome": closed(Outcome, extra=("accepted", "refused")),
    "reason": closed(RefuseReason, RungReason),
    "rung": closed(RungKind),
    "health": closed(Health),
    "state": closed(BreakerState, ProbeState),
    "missing": closed(TokensMissing, extra=("",)),
    "by": closed(extra=("precise", "approximate")),
    "trust": closed(extra=("full", "partial", "none")),
    "objective": closed(extra=("ttft", "tpot", "all")),
    "met": closed(extra=("yes", "no")),
    "version": Bound("one: that of the program"),
    "resource": closed(extra=("pods", "inferencepools", "poolpolicies")),
}
"""By label; where metrics use one label for different things, see METRIC_LABELS."""

METRIC_LABELS: Mapping[tuple[str, str], Bound] = {
    ("pdcoord_gateway_requests_total", "why"): closed(Why, extra=("none",)),
    ("pdcoord_gateway_quarantined_endpoints", "reason"): closed(Symptom),
    ("pdcoord_gateway_quarantines_total", "reason"): closed(Symptom),
    ("pdcoord_gateway_doubted_endpoints", "reason"): closed(Doubt),
    ("pdcoord_gateway_hedges_total", "outcome"): closed(HedgeEnd),
    ("pdcoord_gateway_canaries_total", "outcome"): closed(CanaryOutcome),
    ("pdcoord_gateway_canary_state", "state"): closed(PairState),
    ("pdcoord_gateway_scrape_failures_total", "why"): closed(ScrapeFailure),
    ("pdcoord_gateway_path_report_failures_total", "why"): closed(ScrapeFailure),
    ("pdcoord_gateway_kubernetes_troubles_total", "why"): closed(WatchTrouble),
    ("pdcoord_gateway_pods_left_out", "reason"): Bound("closed list"),
    ("pdcoord_gateway_observations_left_out_total", "kind"): closed(ObservationKind),
    ("pdcoord_gateway_prefix_tokens_total", "kind"): closed(extra=("precise", "approximate", "apart")),
    ("pdcoord_gateway_policy_reloads_total", "source"): closed(Source),
    ("pdcoord_gateway_policy_stale", "source"): closed(Source),
    ("pdcoord_gateway_tokenized_total", "source"): closed(TokenSource),
    ("pdcoord_gateway_tokenize_seconds", "source"): closed(TokenSource),
    ("pdcoord_gateway_kv_event_blocks_total", "what"): Bound("closed list"),
    ("pdcoord_gateway_kv_event_troubles_total", "what"): Bound("closed list"),
    ("pdcoord_gateway_spans_total", "what"): closed(Fate),
    ("pdcoord_gateway_resumes_total", "outcome"): closed(BreakOutcome),
    ("pdcoord_gateway_unresumable_total", "why"): closed(Unresumable),
    ("pdcoord_gateway_control_reports_total", "kind"): closed(("event", "snapshot", "path")),
    ("pdcoord_gateway_control_refused_total", "why"): closed(
        ("version", "key", "malformed", "silent", "full", "replaced")
    ),
    ("pdcoord_gateway_auth_failures_total", "listener"): closed(("front", "admin")),
    ("pdcoord_gateway_auth_failures_total", "reason"): closed(KeyFault),
    ("pdcoord_gateway_rate_limited_total", "key"): Bound("names in the keys file"),
    ("pdcoord_gateway_rate_limited_total", "rate"): closed(RateKind),
    ("pdcoord_gateway_key_reloads_total", "file"): closed(("keys", "admin-key", "engine-key")),
    ("pdcoord_gateway_keys_stale", "file"): closed(("keys", "admin-key", "engine-key")),
    ("pdcoord_gateway_secret_reloads_total", "files"): closed(("listener", "admin", "upstream", "plan-keys")),
    **dict.fromkeys(
        (
            ("pdcoord_gateway_certificate_begins_timestamp_seconds", "use"),
            ("pdcoord_gateway_certificate_expires_timestamp_seconds", "use"),
        ),
        closed(("listener", "admin", "upstream", "control", "extproc")),
    ),
}


def bound_of(metric: str, label: str) -> Bound | None:
    """What bounds a label of a metric; None if nothing is known to."""
    return METRIC_LABELS.get((metric, label)) or LABELS.get(label)
