"""llm-d: weighted scorers over scraped metrics and prefix matches, and a static decision to split.

Source: llm-d-router ebab687 (2026-08-22, about v0.10): scheduling profiles, max-score-picker,
disagg-profile-handler in stage order decode-first, approx- and precise-prefix-cache-producer,
inflight-load-producer. The constructors name the published configurations.

A client's call is not retried: max-score-picker names one endpoint (maxNumOfEndpoints 1).
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from pdcoord.core.fleet import Sample
from pdcoord.sim.routers.base import Route, Shed, Surroundings
from pdcoord.sim.routers.keyindexes import EventIndex, SentIndex
from pdcoord.sim.routers.llmdscorers import (
    AffinityFilter,
    SaturationDetector,
    active_request_scores,
    kv_scores,
    no_hit_lru_scores,
    prefix_scores,
    queue_scores,
    token_load_scores,
)
from pdcoord.sim.routers.rival import ALONE, SPLIT, Entry, Rival, best
from pdcoord.sim.routers.rotation import Rotation
from pdcoord.sim.workload.call import Call, CallId

SATURATED: Final = "rejected-saturated"


class Decider(StrEnum):
    """When a call is split; closed."""

    NEVER = "never"
    THRESHOLD = "threshold"
    ALWAYS = "always"


@dataclass(frozen=True, slots=True)
class Profile:
    """One scheduling profile: weights of its scorers, 0 for those it lacks, and its filter."""

    prefix: float = 0.0
    queue: float = 0.0
    kv: float = 0.0
    no_hit_lru: float = 0.0
    active_request: float = 0.0
    token_load: float = 0.0
    affinity: AffinityFilter | None = None


@dataclass(frozen=True, slots=True)
class LlmdSettings:
    """An EndpointPickerConfig.

    Attributes:
        decode: profile of the place that generates, or serves alone.
        prefill: profile of the place that only prefills.
        uncached_tokens_min: prefix-based-pd-decider's nonCachedTokens; 0, its default, never splits.
        prompt_tokens_min: its promptTokens.
        is_precise: prefixes from KV events instead of from what was sent.
        predicted_ttl_s: speculativeIndexing of the precise index, off by default.
        block_tokens_min: floor under the engine's block size that autoTune finds (minBlockSizeTokens).
        match_tokens_max: maxPrefixTokensToMatch.
        lru_blocks_per_server: lruCapacityPerServer, where the engine's block count is not known; with
            autoTune it is, and capacity is the engine's count of blocks.
        retries_max: see the module.
    """

    decode: Profile
    prefill: Profile = field(default_factory=Profile)
    decider: Decider = Decider.NEVER
    uncached_tokens_min: int = 0
    prompt_tokens_min: int = 0
    is_precise: bool = False
    predicted_ttl_s: float | None = None
    block_tokens_min: int = 64
    match_tokens_max: int = 131_072
    lru_blocks_per_server: int = 31_250
    is_auto_tuned: bool = True
    idle_max: int = 0
    busy_score_max: float = 1.0
    tokens_max: int = 4_194_304
    saturation: SaturationDetector = field(default_factory=SaturationDetector)
    retries_max: int = 0

    @classmethod
    def scored(cls) -> "LlmdSettings":
        """Guide optimized-baseline of 2026-06: prefix 3, queue 2, KV 2, no-hit-LRU 2."""
        return cls(Profile(prefix=3.0, queue=2.0, kv=2.0, no_hit_lru=2.0))

    @classmethod
    def precise(cls) -> "LlmdSettings":
        """Guide precise-prefix-cache-routing of 2026-08: the same weights, speculative indexing for 2 s."""
        return cls(
            Profile(prefix=3.0, queue=2.0, kv=2.0, no_hit_lru=2.0), is_precise=True, predicted_ttl_s=2.0
        )

    @classmethod
    def sticky(cls) -> "LlmdSettings":
        """Guide optimized-baseline of 2026-08: affinity filter, then token load."""
        return cls(Profile(token_load=1.0, affinity=AffinityFilter()), match_tokens_max=40_960)

    @classmethod
    def threshold(cls) -> "LlmdSettings":
        """deploy/config/pd-epp-config.yaml: prefix 2, queue 1 on both sides; 16 uncached tokens split."""
        profile = Profile(prefix=2.0, queue=1.0)
        return cls(profile, profile, Decider.THRESHOLD, uncached_tokens_min=16, match_tokens_max=16_384)

    @classmethod
    def always(cls) -> "LlmdSettings":
        """Guide pd-disaggregation of 2026-06: always split."""
        return cls(
            decode=Profile(active_request=2.0, prefix=3.0),
            prefill=Profile(prefix=3.0, queue=2.0, kv=2.0),
            decider=Decider.ALWAYS,
        )

    @classmethod
    def always_sticky(cls) -> "LlmdSettings":
        """Guide pd-disaggregation of 2026-08: always split, affinity filter and token load on prefills."""
        return cls(
            decode=Profile(active_request=1.0),
            prefill=Profile(token_load=1.0, affinity=AffinityFilter(peak_prefill_tokens_per_s=33_821.0)),
            decider=Decider.ALWAYS,
        )


@dataclass(frozen=True, slots=True)
class _View:
    """One call as the producers see it: blocks and who has how many of them."""

    call: Call
    matched: dict[int, int]
    blocks: Sequence[int]
    block_tokens: int

    @property
    def block_count(self) -> int:
        return len(self.blocks)

    def matched_tokens(self, index: int) -> int:
        return self.matched.get(index, 0) * self.block_tokens

    def uncached_tokens(self, index: int) -> int:
        return max(0, self.call.prompt_tokens - self.matched_tokens(index))


class Llmd(Rival):
    """llm-d's scheduler with one configuration."""

    def __init__(self, surroundings: Surroundings, name: str, settings: LlmdSettings) -> None:
        super().__init__(surroundings, name, settings.retries_max)
        self._settings = settings
        key_tokens = surroundings.key_tokens
        engine_block_tokens = self.places[0].block_tokens if settings.is_auto_tuned and self.places else 16
        block_tokens = max(settings.block_tokens_min, engine_block_tokens)
        self._sent = SentIndex(key_tokens, block_tokens, settings.match_tokens_max)
        keys_max = [2 * place.kv_tokens // key_tokens + 1 for place in self.places]
        self._events = EventIndex(keys_max, settings.predicted_ttl_s)
        self._cold: OrderedDict[int, None] = OrderedDict()
        self._view = _View(_NO_CALL, {}, (), 1)
        self._is_cold = False

    def choose(self, call: Call, rotation: Rotation, now_s: float) -> Route | Shed:
        settings = self._settings
        if call.priority < 0 and self._is_saturated(rotation):
            return Shed(SATURATED)
        view = self._view = self._seen(call, now_s)
        self._is_cold = False
        is_whole = settings.decider is Decider.NEVER and rotation.alone
        decode = self._run(settings.decode, rotation.alone if is_whole else rotation.decodes, view)
        # An SGLang worker in decode mode serves nothing alone, whatever the decider says.
        if (decode in rotation.alone and not self._splits(view, decode)) or not rotation.prefills_of[decode]:
            return Route(decode, why=ALONE)
        profile = settings.prefill if settings.decider is not Decider.NEVER else settings.decode
        return Route(decode, self._run(profile, rotation.prefills_of[decode], view), why=SPLIT)

    def uncached_tokens(self, call: Call, worker: int) -> int:  # noqa: ARG002  # the call of the last view
        return self._view.uncached_tokens(worker)

    def on_opened(self, entry: Entry, now_s: float) -> None:
        legs = (entry.route.decode,) if entry.route.prefill is None else (entry.route.decode, entry.worker)
        if self._settings.is_precise:
            for index in legs:
                self._events.predict(index, entry.call.keys, now_s)
        else:
            for index in legs:
                self._sent.record(index, self._view.blocks, self._capacity(index))
        if self._is_cold:
            for index in legs:
                self._cold[index] = None
                self._cold.move_to_end(index)

    def on_gone(self, index: int, now_s: float) -> None:  # noqa: ARG002  # of the base
        self._sent.forget(index)
        self._events.forget(index)
        self._cold.pop(index, None)

    def cached(self, index: int, stored: Sequence[int], removed: Sequence[int], now_s: float) -> None:  # noqa: ARG002  # of the Protocol
        if self._settings.is_precise:
            self._events.apply(index, stored, removed)

    def _seen(self, call: Call, now_s: float) -> _View:
        if self._settings.is_precise:
            matched = self._events.match(call.keys, now_s)
            return _View(call, matched, call.keys, self.surroundings.key_tokens)
        blocks = self._sent.blocks(call.keys)
        return _View(call, self._sent.match(blocks), blocks, self._sent.block_tokens)

    def _splits(self, view: _View, decode: int) -> bool:
        settings = self._settings
        match settings.decider:
            case Decider.NEVER:
                return False
            case Decider.ALWAYS:
                return True
            case Decider.THRESHOLD:
                if not settings.uncached_tokens_min or view.call.prompt_tokens < settings.prompt_tokens_min:
                    return False
                return view.uncached_tokens(decode) >= settings.uncached_tokens_min

    def _run(self, profile: Profile, candidates: Sequence[int], view: _View) -> int:
        """A scheduling profile: filter, scores, the highest sum; a draw among equals."""
        if profile.affinity is not None and len(candidates) > 1:
            matches = prefix_scores([view.matched.get(i, 0) for i in candidates], view.block_count)
            tokens = [self.loads[i].prefill_tokens for i in candidates]
            candidates = profile.affinity(candidates, matches, tokens)
        if len(candidates) == 1:
            return candidates[0]
        totals = [0.0] * len(candidates)
        for weight, scores in self._scored(profile, candidates, view):
            totals = [total + weight * score for total, score in zip(totals, scores, strict=True)]
        return self.drawn(best(candidates, totals))

    def _scored(
        self, profile: Profile, candidates: Sequence[int], view: _View
    ) -> list[tuple[float, list[float]]]:
        settings = self._settings
        scored: list[tuple[float, list[float]]] = []
        if profile.prefix:
            matched = [view.matched.get(i, 0) for i in candidates]
            scored.append((profile.prefix, prefix_scores(matched, view.block_count)))
        if profile.queue or profile.kv:
            waiting, usages = self._metrics(candidates)
            scored += [(profile.queue, queue_scores(waiting)), (profile.kv, kv_scores(usages))]
        if profile.no_hit_lru:
            self._is_cold = not any(i in view.matched for i in candidates)
            scores = no_hit_lru_scores(self._ranks(candidates), is_cold=self._is_cold)
            scored.append((profile.no_hit_lru, scores))
        if profile.active_request:
            counts = [self.loads[i].requests for i in candidates]
            scores = active_request_scores(counts, settings.idle_max, settings.busy_score_max)
            scored.append((profile.active_request, scores))
        if profile.token_load:
            tokens = [self.loads[i].prefill_tokens + view.uncached_tokens(i) for i in candidates]
            scored.append((profile.token_load, token_load_scores(tokens, settings.tokens_max)))
        return scored

    def _metrics(self, candidates: Sequence[int]) -> tuple[list[int], list[float]]:
        samples = [self.samples[index] or _UNSAMPLED for index in candidates]
        return [sample.waiting for sample in samples], [sample.kv_usage for sample in samples]

    def _ranks(self, candidates: Sequence[int]) -> list[int]:
        never = [index for index in candidates if index not in self._cold]
        ranks = {index: rank for rank, index in enumerate(never)}
        wanted = set(candidates)
        for index in self._cold:
            if index in wanted:
                ranks[index] = len(ranks)
        return [ranks[index] for index in candidates]

    def _is_saturated(self, rotation: Rotation) -> bool:
        waiting, usages = self._metrics(sorted({*rotation.alone, *rotation.prefills, *rotation.decodes}))
        return self._settings.saturation.saturation(waiting, usages) >= 1.0

    def _capacity(self, index: int) -> int:
        place = self.places[index]
        if self._settings.is_auto_tuned:
            return max(1, place.kv_tokens // place.block_tokens)
        return self._settings.lru_blocks_per_server


_NO_CALL = Call(id=CallId(-1), at_s=0.0, prompt_tokens=0, output_tokens=0)
_UNSAMPLED = Sample(running=0, waiting=0, kv_usage=0.0, at_s=0.0)
