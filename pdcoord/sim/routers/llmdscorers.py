"""llm-d's scorers and its affinity filter: one figure for each candidate, in order.

Source: llm-d-router ebab687 (2026-08-22, about v0.10), pkg/epp/framework/plugins/scheduling/{scorer,filter}.
Scores lie in 0..1 and higher is better; defaults are the plugins' own.
"""

from collections.abc import Sequence
from dataclasses import dataclass


def prefix_scores(matched_blocks: Sequence[int], block_count: int) -> list[float]:
    """prefix-cache-scorer with matchLengthWeight 0: share of the prompt's blocks that match."""
    if not block_count:
        return [0.0] * len(matched_blocks)
    return [matched / block_count for matched in matched_blocks]


def queue_scores(waiting: Sequence[int]) -> list[float]:
    """queue-scorer: shortest queue 1, longest 0, linear between; 1 for all where they are equal."""
    shortest, longest = min(waiting), max(waiting)
    if shortest == longest:
        return [1.0] * len(waiting)
    return [(longest - count) / (longest - shortest) for count in waiting]


def kv_scores(usages: Sequence[float]) -> list[float]:
    """kv-cache-utilization-scorer: the free share of the KV pool."""
    return [min(1.0, max(0.0, 1.0 - usage)) for usage in usages]


def active_request_scores(
    counts: Sequence[int], idle_max: int = 0, busy_score_max: float = 1.0
) -> list[float]:
    """active-request-scorer: idle 1, the busiest 0, linear between up to `busy_score_max`."""
    most = max(counts)
    return [1.0 if count <= idle_max else (most - count) / most * busy_score_max for count in counts]


def token_load_scores(tokens: Sequence[int], tokens_max: int = 4_194_304) -> list[float]:
    """token-load-scorer: uncached tokens in flight, this call's included; queueThresholdTokens."""
    return [1.0 - min(max(load, 0), tokens_max) / tokens_max for load in tokens]


def no_hit_lru_scores(ranks: Sequence[int], *, is_cold: bool) -> list[float]:
    """no-hit-lru-scorer: 0.5 for a warm call; for a cold one 1 for rank 0, 0 for the last.

    Rank 0 got a cold call the longest ago, or never.
    """
    count = len(ranks)
    if not is_cold:
        return [0.5] * count
    if count == 1:
        return [1.0]
    return [max(0.0, 1.0 - rank / (count - 1)) for rank in ranks]


@dataclass(frozen=True, slots=True)
class AffinityFilter:
    """prefix-cache-affinity-filter: keeps the places that hold the prompt, unless they are far busier.

    Attributes:
        match_min: affinityThreshold.
        ttft_penalty_s_max: maxTTFTPenaltyMs; 0 keeps to the holders at any price.
        peak_prefill_tokens_per_s: peakPrefillThroughput, one figure for the whole pool. The default was
            measured on Qwen3-32B on two H100; guides measure their own.
    """

    match_min: float = 0.80
    ttft_penalty_s_max: float = 18.0
    peak_prefill_tokens_per_s: float = 15_928.0

    def __call__(
        self, candidates: Sequence[int], matches: Sequence[float], tokens: Sequence[int]
    ) -> list[int]:
        """Who stays, by their prefix scores and their uncached tokens in flight; never nobody."""
        everyone = list(candidates)
        sticky = [at for at, match in enumerate(matches) if match >= self.match_min]
        if not sticky or len(sticky) == len(everyone):
            return everyone
        if self.ttft_penalty_s_max > 0.0:
            held = set(sticky)
            least_sticky = min(tokens[at] for at in sticky)
            least_other = min(tokens[at] for at in range(len(everyone)) if at not in held)
            if (least_sticky - least_other) / self.peak_prefill_tokens_per_s > self.ttft_penalty_s_max:
                return everyone
        return [everyone[at] for at in sticky]


@dataclass(frozen=True, slots=True)
class SaturationDetector:
    """utilization-detector: mean over the places of the worse of queue and KV use, unweighted."""

    queue_depth: int = 5
    kv_usage: float = 0.8

    def saturation(self, waiting: Sequence[int], usages: Sequence[float]) -> float:
        """1 or more is saturated."""
        shares = [
            max(count / self.queue_depth, usage / self.kv_usage)
            for count, usage in zip(waiting, usages, strict=True)
        ]
        return sum(shares) / len(shares) if shares else 1.0
