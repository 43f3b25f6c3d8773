"""Engines' figures of themselves that our own account contradicts: those are not believed, the account is.

A cache before an engine's metrics, a stuck exporter or a broken build answers every scrape, and what it says
makes an endpoint look idle that is full, or full that is idle.
"""

from collections.abc import Container
from dataclasses import dataclass, replace
from enum import StrEnum

from pdcoord.core.fleet import EndpointId, Sample
from pdcoord.core.ledger import Load

SAMPLES_MIN = 5
"""Samples in a row that have to contradict the account: one may be older than what was sent meanwhile."""
ENDED_MIN = 5
"""Requests that ended there while no figure changed: fewer may have come and gone between two readings."""


class Doubt(StrEnum):
    """Why an endpoint's samples are not believed; closed, a label of metrics."""

    DENIES = "denies"
    """They count no request while streams of ours go on there."""
    STALE = "stale"
    """They stay the same while requests of ours end there."""


@dataclass(slots=True)
class _Watch:
    """What is known of one endpoint's samples.

    Attributes:
        sample: the last one, as it was read.
        streaming_count, ended_count: of the account then.
        denied_count: samples in a row that count nothing while streams go on.
        same_count: samples in a row that equal the first of them.
        same_ended_count: `ended_count` at the first of them.
    """

    sample: Sample
    streaming_count: int
    ended_count: int
    same_ended_count: int
    denied_count: int = 0
    same_count: int = 0
    doubt: Doubt | None = None


class Doubts:
    """Holds what engines say of themselves against what is known to be there."""

    def __init__(self) -> None:
        self._watches: dict[EndpointId, _Watch] = {}

    def doubt(self, endpoint: EndpointId) -> Doubt | None:
        """Why its samples are not believed now; None if they are."""
        watch = self._watches.get(endpoint)
        return watch.doubt if watch is not None else None

    def sampled(self, endpoint: EndpointId, sample: Sample, load: Load) -> Sample:
        """What to go by in place of a sample: itself, unless it is not believed.

        Args:
            load: the endpoint's account as the sample came.
        """
        watch = self._watches.get(endpoint)
        if watch is None:
            self._watches[endpoint] = _Watch(sample, load.streaming_count, load.ended_count, load.ended_count)
            return sample
        # At least so many streamed at the last sample and do now.
        lasting_count = watch.streaming_count - (load.ended_count - watch.ended_count)
        if sample.running + sample.waiting:
            watch.denied_count = 0
        elif lasting_count > 0:
            watch.denied_count += 1
        if _is_same(sample, watch.sample):
            watch.same_count += 1
        else:
            watch.same_count, watch.same_ended_count = 0, load.ended_count
        watch.sample, watch.streaming_count, watch.ended_count = (
            sample,
            load.streaming_count,
            load.ended_count,
        )
        watch.doubt = _doubt(watch, sample, load)
        return sample if watch.doubt is None else _of_account(sample, load)

    def forget(self, endpoint: EndpointId) -> None:
        """The endpoint is gone, or is another process by now."""
        self._watches.pop(endpoint, None)

    def validate(self, endpoints: Container[EndpointId]) -> None:
        """Assert that only endpoints that exist are remembered."""
        assert all(name in endpoints for name in self._watches), "samples of an endpoint that is gone"


def _doubt(watch: _Watch, sample: Sample, load: Load) -> Doubt | None:
    if watch.denied_count >= SAMPLES_MIN:
        return Doubt.DENIES
    # Without a counter an engine may say the same all day, whatever comes and goes between two readings.
    could_tell = sample.computed_tokens is not None or sample.pulled_tokens is not None
    ended_count = load.ended_count - watch.same_ended_count
    if could_tell and watch.same_count >= SAMPLES_MIN and ended_count >= ENDED_MIN:
        return Doubt.STALE
    return None


def _is_same(sample: Sample, before: Sample) -> bool:
    return replace(sample, at_s=before.at_s) == before


def _of_account(sample: Sample, load: Load) -> Sample:
    """What the endpoint would say if it had nothing but what is known here."""
    usage = load.context_tokens / sample.kv_tokens if sample.kv_tokens else 0.0
    return Sample(
        running=load.streaming_count,
        waiting=load.request_count - load.streaming_count,
        kv_usage=min(usage, 1.0),
        at_s=sample.at_s,
        kv_tokens=sample.kv_tokens,
    )
