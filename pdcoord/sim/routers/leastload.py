"""smg's least_load: time to drain what is queued and in flight, plus a barrier against a full KV pool.

Source: lightseekorg/smg 3bb34d0 (2026) model_gateway/src/policies/least_load.rs:
(queued_tokens + inflight_tokens) / throughput + weight x k / (1 - k), least wins, the first of equals.

What a backend reports over gRPC and a scrape here does not say is rebuilt: queued tokens are the waiting
count times the mean prompt of calls that have not begun there; throughput is the running count times what one
call was given a second there of late, or until one has ended would be by the pool's own figures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pdcoord.core.fleet import Sample
from pdcoord.sim.routers.base import Route, Surroundings
from pdcoord.sim.routers.rival import SPLIT, Entry, Rival
from pdcoord.sim.routers.rotation import Rotation
from pdcoord.sim.workload.call import Call

RATE_WEIGHT: Final = 0.2
"""Of the last call that ended, in what a call is given a second."""


@dataclass(frozen=True, slots=True)
class LeastLoadSettings:
    """PolicyConfig::LeastLoad.

    Attributes:
        is_split: prefill and decode places picked independently, each by the same rule.
        kv_pressure_weight_s: weight of the barrier.
        default_tokens_per_s: throughput of a backend that reports none.
        mean_prefill_tokens: of a call, for a place that reports nothing.
        load_check_interval_s: how often load is read; what was sent since counts as in flight.
        stale_intervals: a reading older than so many intervals is none.
        is_throughput_measured: whether the backend reports its own, as SGLang's does.
        retries_max: of the gateway.
    """

    is_split: bool = False
    kv_pressure_weight_s: float = 0.15
    default_tokens_per_s: float = 2_000.0
    mean_prefill_tokens: int = 1_024
    load_check_interval_s: float = 10.0
    stale_intervals: int = 3
    is_throughput_measured: bool = True
    retries_max: int = 5


@dataclass(frozen=True, slots=True)
class Reading:
    """What one poll of a place said."""

    at_s: float
    queued_tokens: float
    kv_usage: float
    tokens_per_s: float


class LeastLoad(Rival):
    """Least time to drain."""

    def __init__(self, surroundings: Surroundings, name: str, settings: LeastLoadSettings) -> None:
        super().__init__(surroundings, name, settings.retries_max)
        self._settings = settings
        self._readings: list[Reading | None] = [None] * len(self.places)
        self._sent_tokens = [0] * len(self.places)
        self._call_tokens_per_s: list[float | None] = [None] * len(self.places)

    def choose(self, call: Call, rotation: Rotation, now_s: float) -> Route:  # noqa: ARG002  # of the base
        def pick(candidates: Sequence[int]) -> int:
            scores = self.scores(candidates, now_s)
            return candidates[scores.index(min(scores))]

        if self._settings.is_split and rotation.prefills:
            prefill = pick(rotation.prefills)
            decode = pick(rotation.decodes_of[prefill])
            others = self.other_prefills(rotation, prefill, decode)
            return Route(decode, prefill, why=SPLIT, other_prefills=others)
        return self.alone_or_split(rotation, pick)

    def scores(self, candidates: Sequence[int], now_s: float) -> list[float]:
        """Seconds to drain with the barrier, in order; counts of calls where no place reports."""
        fresh = [self._fresh(index, now_s) for index in candidates]
        reported = [reading.tokens_per_s for reading in fresh if reading is not None and reading.tokens_per_s]
        nominal = sum(reported) / len(reported) if reported else self._settings.default_tokens_per_s
        if not any(fresh):
            return [float(self.loads[index].requests) for index in candidates]
        return [
            self.loads[index].requests * self._settings.mean_prefill_tokens / nominal
            if reading is None
            else self._score(reading, self._sent_tokens[index])
            for index, reading in zip(candidates, fresh, strict=True)
        ]

    def on_opened(self, entry: Entry, now_s: float) -> None:  # noqa: ARG002  # of the base
        for index in {entry.route.decode, entry.worker}:
            self._sent_tokens[index] += entry.call.prompt_tokens

    def on_served(self, entry: Entry, output_tokens: int, now_s: float) -> None:
        if entry.began_s is None or now_s <= entry.began_s or output_tokens < 2:
            return
        index, rate = entry.route.decode, (output_tokens - 1) / (now_s - entry.began_s)
        last = self._call_tokens_per_s[index]
        self._call_tokens_per_s[index] = rate if last is None else last + RATE_WEIGHT * (rate - last)

    def on_sample(self, index: int, sample: Sample, now_s: float) -> None:
        last = self._readings[index]
        if last is not None and now_s - last.at_s < self._settings.load_check_interval_s:
            return
        load = self.loads[index]
        mean_prompt = load.prompt_tokens / load.prefilling if load.prefilling else 0.0
        self._readings[index] = Reading(
            at_s=now_s,
            queued_tokens=sample.waiting * mean_prompt,
            kv_usage=sample.kv_usage,
            tokens_per_s=self._tokens_per_s(index, sample),
        )
        self._sent_tokens[index] = 0

    def on_gone(self, index: int, now_s: float) -> None:  # noqa: ARG002  # of the base
        self._readings[index] = None
        self._sent_tokens[index] = 0
        self._call_tokens_per_s[index] = None

    def _score(self, reading: Reading, sent_tokens: int) -> float:
        throughput = reading.tokens_per_s or self._settings.default_tokens_per_s
        usage = min(max(reading.kv_usage, 0.0), 0.999)
        wait_s = (reading.queued_tokens + sent_tokens) / throughput
        return wait_s + self._settings.kv_pressure_weight_s * usage / (1.0 - usage)

    def _fresh(self, index: int, now_s: float) -> Reading | None:
        reading = self._readings[index]
        stale_s = self._settings.load_check_interval_s * self._settings.stale_intervals
        return reading if reading is not None and now_s - reading.at_s <= stale_s else None

    def _tokens_per_s(self, index: int, sample: Sample) -> float:
        """What the backend would report; 0 for nothing."""
        if not self._settings.is_throughput_measured or sample.running <= 0:
            return 0.0
        rate = self._call_tokens_per_s[index]
        if rate is None:
            place = self.places[index]
            context_tokens = int(min(max(sample.kv_usage, 0.0), 1.0) * place.kv_tokens)
            rate = 1.0 / place.endpoint.pool.speed.step_s(sample.running, context_tokens)
        return sample.running * rate
