"""What the prefix indexes have to show for themselves, as metrics read off the coordinator's state."""

from collections import Counter
from collections.abc import Iterable

from pdcoord.core.coordinator import Coordinator
from pdcoord.core.exact import ExactCount
from pdcoord.core.model import PrefixMode
from pdcoord.core.prefixes import RoutedBy, Trust
from pdcoord.feeds.kvevents import KvEventsFeed
from pdcoord.feeds.kvsequence import Trouble
from pdcoord.runtime import catalog
from pdcoord.runtime.metricspec import MetricSpec

StateSample = tuple[tuple[str, ...], float]


def prefix_samples(coordinator: Coordinator) -> Iterable[tuple[MetricSpec, Iterable[StateSample]]]:
    """Samples of every model whose prefixes are precise; of the others there is nothing to tell."""
    routed: list[StateSample] = []
    tokens: list[StateSample] = []
    events: list[StateSample] = []
    blocks: list[StateSample] = []
    heard: list[StateSample] = []
    for model in coordinator.models():
        if model.prefix_mode is not PrefixMode.PRECISE:
            continue
        name = model.name
        comparison, index = coordinator.prefixes.comparison(name), coordinator.prefixes.index(name)
        if comparison is None or index is None:
            continue
        routed += [((name, by), float(comparison.requests[by])) for by in RoutedBy]
        tokens += [
            ((name, "precise"), float(comparison.precise_tokens)),
            ((name, "approximate"), float(comparison.approximate_tokens)),
            ((name, "apart"), float(comparison.apart_tokens)),
        ]
        events += [((name, count), float(index.counts[count])) for count in ExactCount]
        blocks.append(((name,), float(index.block_count)))
        states = coordinator.fleet.of_model(name)
        trusted = Counter((s.endpoint.pool.name, coordinator.prefixes.trust(s)) for s in states)
        pools = [pool.name for pool in model.pools]
        heard += [((pool, trust), float(trusted[pool, trust])) for pool in pools for trust in Trust]
    yield catalog.PREFIX_REQUESTS, routed
    yield catalog.PREFIX_TOKENS, tokens
    yield catalog.KV_EVENTS, events
    yield catalog.PREFIX_BLOCKS, blocks
    yield catalog.KV_HEARD, heard


def kv_events_samples(feed: KvEventsFeed) -> Iterable[tuple[MetricSpec, Iterable[StateSample]]]:
    """Samples of the streams of KV events, over all endpoints."""
    yield catalog.KV_BATCHES, [((), float(feed.batches))]
    yield catalog.KV_TROUBLES, [((trouble,), float(feed.troubles[trouble])) for trouble in Trouble]
