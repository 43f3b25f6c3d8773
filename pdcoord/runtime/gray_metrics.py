"""Metrics of gray failures: endpoints in quarantine, samples that are not believed, second attempts."""

from collections import Counter
from collections.abc import Iterable
from itertools import product

from pdcoord.core.coordinator import Coordinator
from pdcoord.core.doubts import Doubt
from pdcoord.core.hedging import HedgeEnd
from pdcoord.core.trouble import Phase, Symptom
from pdcoord.runtime.metricspec import MetricSpec, MetricType

StateSample = tuple[tuple[str, ...], float]

QUARANTINED = MetricSpec(
    "pdcoord_gateway_quarantined_endpoints",
    MetricType.GAUGE,
    ("pool", "reason"),
    "Endpoints that pass for ready and are out of the choice for how they serve, or let in step by step.",
    "Above 0 for minutes: GET /fleet names them, see the engine's log. late, timeout, stalled: it hangs. "
    "slow: its accelerator or its host. prefill: it fails for several decode endpoints.",
)
QUARANTINES = MetricSpec(
    "pdcoord_gateway_quarantines_total",
    MetricType.COUNTER,
    ("pool", "reason"),
    "Times that an endpoint was put out of the choice, relapses on the way back among them.",
    "A lasting rate in one pool: an engine that comes and goes; restart it and keep its log.",
)
DOUBTED = MetricSpec(
    "pdcoord_gateway_doubted_endpoints",
    MetricType.GAUGE,
    ("pool", "reason"),
    "Endpoints whose own metrics contradict the requests that are known to be there, and are not believed.",
    "denies: they count nothing where streams go on. stale: they do not change. Look for a cache or proxy "
    "before /metrics, and for an engine whose main thread hangs.",
)
HEDGES = MetricSpec(
    "pdcoord_gateway_hedges_total",
    MetricType.COUNTER,
    ("model", "outcome"),
    "Second attempts beside one that showed no output, by what became of them; withheld ones were not sent.",
    "won rising: some endpoint is slow to begin, see `quarantined_endpoints` and `ttft_ratio`. withheld "
    "rising: many are late at once: the fleet is too small, or its predictions are wrong.",
)
GRAY_METRICS = (QUARANTINED, QUARANTINES, DOUBTED, HEDGES)


def gray_samples(coordinator: Coordinator) -> Iterable[tuple[MetricSpec, Iterable[StateSample]]]:
    """Read off the coordinator's state when somebody asks."""
    progress, models = coordinator.progress, coordinator.models()
    pools = sorted({pool.name for model in models for pool in model.pools})
    out: Counter[tuple[str, str]] = Counter()
    doubted: Counter[tuple[str, str]] = Counter()
    for state in coordinator.fleet.states():
        pool, trouble = state.endpoint.pool.name, progress.quarantine.trouble(state.endpoint.id)
        if trouble is not None and trouble.phase is not Phase.SUSPECTED:
            out[pool, trouble.symptom] += 1
        if (doubt := coordinator.doubt(state.endpoint.id)) is not None:
            doubted[pool, doubt] += 1
    yield QUARANTINED, [(key, float(out[key])) for key in product(pools, Symptom)]
    yield QUARANTINES, [(key, float(progress.outs[key])) for key in product(pools, Symptom)]
    yield DOUBTED, [(key, float(doubted[key])) for key in product(pools, Doubt)]
    counts = coordinator.hedges.counts
    yield HEDGES, [(key, float(counts[key])) for key in product([m.name for m in models], HedgeEnd)]
