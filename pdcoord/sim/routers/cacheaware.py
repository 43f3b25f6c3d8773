"""cache_aware of the sglang and vllm routers: the longest known prefix while load is even.

Source: vllm-project/router 16917f4 (2026) src/policies/{cache_aware,power_of_two}.rs with the command line's
defaults, and sglang's model gateway v0.3.1, whose rule differs in whom it takes for an unknown prefix. The
library's own defaults (threshold 0.5, 32, 1.1) are overridden by the command line. Load is the router's own
count of calls under way. With separate pools, prefill and decode places are picked independently: cache_aware
for prefills and power_of_two for decodes, as the PD guides start it, and every call is split. Retries: 5, of
the whole pair. Session keys from headers are not used: calls here carry none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from pdcoord.core.fleet import Sample
from pdcoord.sim.routers.base import Route, Surroundings
from pdcoord.sim.routers.keyindexes import SentIndex
from pdcoord.sim.routers.rival import ALONE, SPLIT, Entry, Rival
from pdcoord.sim.routers.rotation import Rotation
from pdcoord.sim.workload.call import Call

MATCHED: Final = "cache-affinity"
UNMATCHED: Final = "low-match"
UNEVEN: Final = "load-balance"


class Unknown(StrEnum):
    """Whom a prompt goes to that matches nothing well; closed."""

    LEAST_LOAD = "least-load"
    SMALLEST_TREE = "smallest-tree"


@dataclass(frozen=True, slots=True)
class CacheAwareSettings:
    """The command line.

    Attributes:
        is_split: --pd-disaggregation.
        match_min: --cache-threshold: share of the prompt that must match, exclusive.
        imbalance_abs: --balance-abs-threshold, and
        imbalance_rel: --balance-rel-threshold: uneven if most - least is more than the one and most is more
            than least times the other.
        unknown: vllm-router takes the least load, sglang's gateway the smallest tree.
        tree_chars_max: --max-tree-size, of each place; 4 characters are taken for a token. Enforced at once
            rather than every 120 s (--eviction-interval).
        load_interval_s: how often power_of_two reads a place's own load; its count is added to the router's.
        retries_max: --retry-max-retries.
    """

    is_split: bool = False
    match_min: float = 0.3
    imbalance_abs: int = 64
    imbalance_rel: float = 1.5
    unknown: Unknown = Unknown.LEAST_LOAD
    tree_chars_max: int = 67_108_864
    load_interval_s: float = 5.0
    retries_max: int = 5


class CacheAware(Rival):
    """cache_aware for whole calls and prefills, power_of_two for decodes."""

    def __init__(self, surroundings: Surroundings, name: str, settings: CacheAwareSettings) -> None:
        super().__init__(surroundings, name, settings.retries_max)
        self._settings = settings
        key_tokens = surroundings.key_tokens
        # The tree holds characters: keys are the finest that can be had here.
        self._tree = SentIndex(key_tokens, key_tokens, match_tokens_max=1 << 40)
        self._tree_blocks_max = max(1, settings.tree_chars_max // (4 * key_tokens))
        self._tree_sizes = [0] * len(self.places)
        self._blocks: Sequence[int] = ()
        self._matched: dict[int, int] = {}
        self._read: list[tuple[float, int]] = [(float("-inf"), 0)] * len(self.places)

    def choose(self, call: Call, rotation: Rotation, now_s: float) -> Route:  # noqa: ARG002  # of the base
        self._blocks = self._tree.blocks(call.keys)
        self._matched = self._tree.match(self._blocks)
        if rotation.alone and not (self._settings.is_split and rotation.prefills):
            decode, why = self._aware(call, rotation.alone)
            return Route(decode, why=f"{ALONE}-{why}")
        prefill, why = self._aware(call, rotation.prefills)
        decode = self._of_two(rotation.decodes_of[prefill])
        others = self.other_prefills(rotation, prefill, decode)
        return Route(decode, prefill, why=f"{SPLIT}-{why}", other_prefills=others)

    def on_opened(self, entry: Entry, now_s: float) -> None:  # noqa: ARG002  # of the base
        worker = entry.worker
        new = len(self._blocks) - self._matched.get(worker, 0)
        self._tree.record(worker, self._blocks, self._tree_blocks_max)
        self._tree_sizes[worker] = min(self._tree_sizes[worker] + new, self._tree_blocks_max)

    def on_gone(self, index: int, now_s: float) -> None:  # noqa: ARG002  # of the base
        self._tree.forget(index)
        self._tree_sizes[index] = 0
        self._read[index] = (float("-inf"), 0)

    def on_sample(self, index: int, sample: Sample, now_s: float) -> None:
        if now_s - self._read[index][0] >= self._settings.load_interval_s:
            self._read[index] = (now_s, sample.running + sample.waiting)

    def _aware(self, call: Call, candidates: Sequence[int]) -> tuple[int, str]:
        settings = self._settings
        loads = [self.loads[index].requests for index in candidates]
        least, most = min(loads), max(loads)
        if most - least > settings.imbalance_abs and most > settings.imbalance_rel * least:
            return candidates[loads.index(least)], UNEVEN
        depth = max(self._matched.get(index, 0) for index in candidates)
        if depth * self._tree.block_tokens > settings.match_min * call.prompt_tokens:
            deepest = [index for index in candidates if self._matched.get(index, 0) == depth]
            # A node of the tree names one of its holders, always the same.
            return deepest[self._blocks[depth - 1] % len(deepest)], MATCHED
        if settings.unknown is Unknown.LEAST_LOAD:
            return candidates[loads.index(least)], UNMATCHED
        return min(candidates, key=lambda index: self._tree_sizes[index]), UNMATCHED

    def _of_two(self, candidates: Sequence[int]) -> int:
        if len(candidates) == 1:
            return candidates[0]
        first, second = self.random.sample(candidates, 2)
        return first if self._load(first) <= self._load(second) else second

    def _load(self, index: int) -> int:
        return self._read[index][1] + self.loads[index].requests
