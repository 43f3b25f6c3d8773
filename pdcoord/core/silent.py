"""Pulls that failed without a word: an engine that computes the prompt anew answers as if nothing were wrong.

Its counters tell. They are of an engine, not of a path: blame falls on a path that all of its split requests
took meanwhile, or on all paths where next to nothing came over any. Nor are they of one coordinator: pulls
may have failed that others asked for, or that were told of as they failed; so those that arrived count too.
"""

from collections.abc import Container
from dataclasses import dataclass, field

from pdcoord.core.fleet import EndpointId, PathKey, Sample

JUDGED_MIN = 3
"""Split requests on an endpoint before its counters are judged: what failed once may be chance."""
FAILED_SHARE = 0.5
"""Share of them that has to have failed where they all took one path."""
ALL_FAILED_SHARE = 0.9
"""Share of them that has to have failed where they took several: then it is all of them, or the engine."""
COMPUTED_SHARE = 0.5
"""Of the tokens that should have come, computed by the engine instead: others of its requests compute too."""
LEGS_MAX = 1_024
"""Legs remembered for one endpoint; of more, the first ones say enough."""


@dataclass(slots=True)
class _Window:
    """What is known of one decode endpoint since it was last judged.

    Attributes:
        legs: split requests that were answered, by prefill endpoint.
        computed_tokens: prompt tokens that the engine had computed itself by then.
        expected_tokens: what they should have pulled.
    """

    failed_pulls: int | None = None
    arrived_pulls: int | None = None
    pulled_tokens: int | None = None
    computed_tokens: int | None = None
    legs: dict[EndpointId, int] = field(default_factory=dict)
    leg_count: int = 0
    expected_tokens: int = 0

    def start(self, sample: Sample) -> None:
        self.failed_pulls, self.arrived_pulls = sample.failed_pulls, sample.arrived_pulls
        self.pulled_tokens, self.computed_tokens = sample.pulled_tokens, sample.computed_tokens
        self.legs, self.leg_count, self.expected_tokens = {}, 0, 0


@dataclass(frozen=True, slots=True)
class Judgement:
    """Paths into one endpoint that its own counters speak against, and those that they speak for."""

    bad: tuple[PathKey, ...] = ()
    good: tuple[PathKey, ...] = ()


class SilentFailures:
    """Holds what sidecars say went well against what the engines' counters say."""

    def __init__(self) -> None:
        self._windows: dict[EndpointId, _Window] = {}

    def answered(self, prefill: EndpointId, decode: EndpointId, expected_tokens: int) -> None:
        """A split request was answered, as if its KV had come over this path."""
        window = self._windows.setdefault(decode, _Window())
        if window.leg_count < LEGS_MAX:
            window.legs[prefill] = window.legs.get(prefill, 0) + 1
            window.leg_count += 1
            window.expected_tokens += expected_tokens

    def sampled(self, decode: EndpointId, sample: Sample) -> Judgement:
        """Judge the paths into an endpoint by its latest counters; most often there is nothing to say.

        A window begins with the first sample and ends with the first that has JUDGED_MIN legs behind it. The
        counters may be read before the last of them is counted, which is why shares decide.
        """
        window = self._windows.get(decode)
        if window is None:
            if sample.failed_pulls is None and sample.pulled_tokens is None:
                return Judgement()
            window = self._windows[decode] = _Window()
            window.start(sample)
            return Judgement()
        failed = _since(window.failed_pulls, sample.failed_pulls)
        pulled = _since(window.pulled_tokens, sample.pulled_tokens)
        if failed is None and pulled is None:
            # Counters that begin, or that went back: another process counts from here.
            window.start(sample)
            return Judgement()
        if window.leg_count < JUDGED_MIN:
            return Judgement()
        share = FAILED_SHARE if len(window.legs) == 1 else ALL_FAILED_SHARE
        arrived = _since(window.arrived_pulls, sample.arrived_pulls)
        is_bad = failed is not None and failed >= share * window.leg_count
        # As many arrived as were answered here: what failed was someone else's, or was told of.
        is_bad = is_bad and (arrived is None or arrived <= (1.0 - share) * window.leg_count)
        # No token came, and the engine computed what should have come: else it had it cached unknown to us.
        computed = _since(window.computed_tokens, sample.computed_tokens)
        is_computed = computed is not None and computed >= COMPUTED_SHARE * window.expected_tokens
        is_bad = is_bad or (pulled == 0 and is_computed and window.expected_tokens > 0)
        is_good = not failed and not is_bad
        paths = tuple((prefill, decode) for prefill in window.legs)
        window.start(sample)
        return Judgement(bad=paths if is_bad else (), good=paths if is_good else ())

    def forget(self, endpoint_id: EndpointId) -> None:
        """The endpoint is gone, or is another process by now."""
        self._windows.pop(endpoint_id, None)
        for window in self._windows.values():
            window.legs.pop(endpoint_id, None)

    def validate(self, endpoints: Container[EndpointId]) -> None:
        """Assert that only endpoints that exist are remembered, within bounds."""
        for decode, window in self._windows.items():
            assert decode in endpoints, f"{decode}: counters of an endpoint that is gone"
            assert all(prefill in endpoints for prefill in window.legs), f"{decode}: a leg from nowhere"
            assert window.leg_count <= LEGS_MAX, f"{decode}: too many legs"


def _since(before: int | None, now: int | None) -> int | None:
    return None if before is None or now is None or now < before else now - before
