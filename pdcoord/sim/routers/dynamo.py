"""Dynamo's KV router: least blocks to prefill and in use; splits always or conditionally.

Source: ai-dynamo/dynamo 07a6c9c (2026, after v1.3): lib/kv-router selector/default.rs and
conditional_disagg.rs; docs v1.3.0 "Configuration and Tuning", "Disaggregated Serving", "Conditional
Disaggregation", "Request Migration". Split, the prefill router tracks no blocks in use; the decode router has
overlap credit 0, no prefill tokens and counts every call's blocks apart (assume_kv_reuse=false), unless
splitting is conditional. A decode place is chosen among those the prefill place may hand over to (required
taints of topology-aware transfer).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import exp
from typing import Final

from pdcoord.sim.routers.base import Route, Surroundings
from pdcoord.sim.routers.keyindexes import ActiveIndex, EventIndex
from pdcoord.sim.routers.rival import ALONE, SPLIT, Entry, Rival
from pdcoord.sim.routers.rotation import Rotation
from pdcoord.sim.workload.call import Call

BYPASS: Final = "bypass"


class Bypass(StrEnum):
    """--router-conditional-disagg-config's policy, or none; closed."""

    NEVER = "never"
    ISL_BOUNDING = "isl_bounding"
    PREFILL_LOAD = "prefill_load"
    ISL_OR_LOAD = "isl_or_load"


@dataclass(frozen=True, slots=True)
class DynamoSettings:
    """KvRouterConfig, with its defaults.

    Attributes:
        is_split: there are prefill and decode workers, not aggregated ones.
        credit: overlap_score_credit; 0 for the decode router of a split deployment.
        credit_decay: overlap_score_credit_decay.
        prefill_load_scale: of the blocks left to prefill.
        active_request_blocks: decode_active_request_weight.
        temperature: 0 takes the least cost, more draws by softmax over normalised costs.
        predicted_ttl_s: router_predicted_ttl_secs, off by default: what was just sent counts as cached.
        bypass: conditional disaggregation.
        bypass_tokens: eff_isl_threshold: fewer uncached tokens may stay on the decode worker,
        bypass_share: eff_isl_ratio_threshold: if they are also a smaller share of the prompt.
        prefill_busy_share: prefill_busy_threshold: of step_tokens_max, for the policies that ask for load.
        decode_busy_share: decode_busy_threshold: of the KV pool, past which nothing bypasses.
        retries_max: --migration-limit; 0 by default, 3 in the guide.
    """

    is_split: bool = True
    credit: float = 1.0
    credit_decay: float = 0.0
    prefill_load_scale: float = 1.0
    active_request_blocks: float = 0.0
    temperature: float = 0.0
    predicted_ttl_s: float | None = None
    bypass: Bypass = Bypass.NEVER
    bypass_tokens: int = 2_048
    bypass_share: float = 0.7
    prefill_busy_share: float | None = None
    decode_busy_share: float | None = None
    retries_max: int = 0

    def __post_init__(self) -> None:
        needs_load = self.bypass in {Bypass.PREFILL_LOAD, Bypass.ISL_OR_LOAD}
        if needs_load and self.prefill_busy_share is None:
            raise ValueError(f"prefill_busy_share is None, expected a share with bypass {self.bypass}")

    @classmethod
    def aggregated(cls) -> "DynamoSettings":
        return cls(is_split=False, predicted_ttl_s=5.0, retries_max=3)

    @classmethod
    def split(cls) -> "DynamoSettings":
        return cls(predicted_ttl_s=5.0, retries_max=3)

    @classmethod
    def conditional(cls) -> "DynamoSettings":
        return cls(predicted_ttl_s=5.0, bypass=Bypass.ISL_BOUNDING, retries_max=3)


class Dynamo(Rival):
    """The KV router; one block is one key."""

    def __init__(self, surroundings: Surroundings, name: str, settings: DynamoSettings) -> None:
        super().__init__(surroundings, name, settings.retries_max)
        self._settings = settings
        self._key_tokens = surroundings.key_tokens
        keys_max = [2 * place.kv_tokens // surroundings.key_tokens + 1 for place in self.places]
        self._events = EventIndex(keys_max, settings.predicted_ttl_s)
        self._shares_blocks = not settings.is_split or settings.bypass is not Bypass.NEVER
        self._active = ActiveIndex(len(self.places))
        self._blocks = [0] * len(self.places)
        self._overlaps: dict[int, int] = {}

    def choose(self, call: Call, rotation: Rotation, now_s: float) -> Route:
        self._overlaps = self._events.match(call.keys, now_s)
        is_whole = not self._settings.is_split and rotation.alone
        if is_whole or not rotation.prefills:
            costs = self._whole_costs(call, rotation.alone)
            return Route(self._least(rotation.alone, costs), why=ALONE)
        prefill = self._least(rotation.prefills, self._prefill_costs(call, rotation.prefills))
        if self._settings.bypass is not Bypass.NEVER and rotation.alone:
            decode = self._least(rotation.alone, self._decode_costs(call, rotation.alone))
            if self._bypasses(call, prefill, decode):
                return Route(decode, why=BYPASS)
        decodes = rotation.decodes_of[prefill]
        return Route(self._least(decodes, self._decode_costs(call, decodes)), prefill, why=SPLIT)

    def uncached_tokens(self, call: Call, worker: int) -> int:
        return max(0, call.prompt_tokens - self._overlaps.get(worker, 0) * self._key_tokens)

    def on_opened(self, entry: Entry, now_s: float) -> None:
        keys, decode = entry.call.keys, entry.route.decode
        self._events.predict(entry.worker, keys, now_s)
        self._blocks[decode] += len(keys)
        if self._shares_blocks:
            self._active.open(decode, keys)

    def on_closed(self, entry: Entry, now_s: float) -> None:  # noqa: ARG002  # of the base
        keys, decode = entry.call.keys, entry.route.decode
        self._blocks[decode] -= len(keys)
        if self._shares_blocks:
            self._active.close(decode, keys)

    def on_gone(self, index: int, now_s: float) -> None:  # noqa: ARG002  # of the base
        self._events.forget(index)

    def cached(self, index: int, stored: Sequence[int], removed: Sequence[int], now_s: float) -> None:  # noqa: ARG002  # of the Protocol
        self._events.apply(index, stored, removed)

    def _whole_costs(self, call: Call, candidates: Sequence[int]) -> list[float]:
        """prefill_load_scale x blocks left to prefill + blocks in use with this call's."""
        prefills = self._prefill_costs(call, candidates)
        decodes = self._used_blocks(call, candidates)
        return [prefill + decode for prefill, decode in zip(prefills, decodes, strict=True)]

    def _prefill_costs(self, call: Call, candidates: Sequence[int]) -> list[float]:
        settings, block_tokens = self._settings, self._key_tokens
        least_tokens = min(self.loads[index].prefill_tokens for index in candidates)
        costs = []
        for index in candidates:
            active_tokens = self.loads[index].prefill_tokens
            credit = settings.credit
            if settings.credit_decay:
                excess = (active_tokens - least_tokens) / block_tokens / max(1, len(call.keys))
                credit /= 1.0 + settings.credit_decay * excess
            blocks = (active_tokens + call.prompt_tokens) / block_tokens
            left = max(0.0, blocks - credit * self._overlaps.get(index, 0))
            costs.append(settings.prefill_load_scale * left)
        return costs

    def _decode_costs(self, call: Call, candidates: Sequence[int]) -> list[float]:
        used = self._used_blocks(call, candidates)
        if self._settings.bypass is Bypass.NEVER:
            return used
        credit = self._settings.credit
        return [
            max(0.0, blocks - credit * self._overlaps.get(index, 0))
            for index, blocks in zip(candidates, used, strict=True)
        ]

    def _used_blocks(self, call: Call, candidates: Sequence[int]) -> list[float]:
        request_blocks = self._settings.active_request_blocks
        if not self._shares_blocks:
            return [
                self._blocks[index] + len(call.keys) + request_blocks * self.loads[index].decoding
                for index in candidates
            ]
        shared = self._active.match(call.keys)
        return [
            self._active.block_count(index)
            + len(call.keys)
            - shared.get(index, 0)
            + request_blocks * self.loads[index].decoding
            for index in candidates
        ]

    def _bypasses(self, call: Call, prefill: int, decode: int) -> bool:
        settings = self._settings
        if settings.decode_busy_share is not None:
            kv_blocks = self.places[decode].kv_tokens / self._key_tokens
            if self._active.block_count(decode) > settings.decode_busy_share * kv_blocks:
                return False
        uncached = self.uncached_tokens(call, decode)
        is_short = (
            uncached < settings.bypass_tokens
            and uncached / max(1, call.prompt_tokens) < settings.bypass_share
        )
        busy_tokens = (settings.prefill_busy_share or 0.0) * self.places[prefill].step_tokens_max
        is_busy = self.loads[prefill].prefill_tokens > busy_tokens
        match settings.bypass:
            case Bypass.NEVER:
                return False
            case Bypass.ISL_BOUNDING:
                return is_short
            case Bypass.PREFILL_LOAD:
                return is_busy
            case Bypass.ISL_OR_LOAD:
                return is_short or is_busy

    def _least(self, candidates: Sequence[int], costs: Sequence[float]) -> int:
        least, most = min(costs), max(costs)
        if self._settings.temperature > 0.0 and least < most:
            scale = (most - least) * self._settings.temperature
            weights = [exp((least - cost) / scale) for cost in costs]
            return self.random.choices(candidates, weights)[0]
        return self.drawn([index for index, cost in zip(candidates, costs, strict=True) if cost == least])
