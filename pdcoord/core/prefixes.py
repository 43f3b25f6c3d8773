"""What of a prompt each endpoint has cached: by its own word where it gives it, else by what it was sent."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from pdcoord.core.exact import ExactCount, ExactIndex
from pdcoord.core.fleet import EndpointState, ModelName
from pdcoord.core.inuse import PromptsInUse
from pdcoord.core.kvcache import KvCleared, KvLost, KvRemoved, KvSignal, KvStored
from pdcoord.core.model import Model, PrefixMode
from pdcoord.core.predicted import PREDICTION_S_MAX, Predictions
from pdcoord.core.prefix import PrefixIndex
from pdcoord.core.request import Request

SILENCE_S_MAX = 30.0
"""An endpoint that was sent new blocks and tells of none for so long is not heard.

Longer than a long prompt waits for its prefill, since a block is told of when it is full.
"""


class Trust(StrEnum):
    """How far the exact index is believed of one endpoint; closed.

    None of one that was never heard or fell silent: the approximate index answers. Partial where events
    were missed: what is told is there, what is not told may be, so the better of both answers. Full
    where everything was heard since its cache was empty.
    """

    NONE = "none"
    PARTIAL = "partial"
    FULL = "full"


class RoutedBy(StrEnum):
    """Which index stood behind a routed request's endpoint; closed, a metric's label."""

    PRECISE = "precise"
    APPROXIMATE = "approximate"


@dataclass(slots=True)
class PrefixComparison:
    """One model's routed requests and what the two indexes said of the endpoint that computes them.

    Attributes:
        requests: by the index that was believed.
        compared: requests that both could speak on.
        precise_tokens: cached ones as the exact index said, over those; predictions do not count.
        approximate_tokens: the same as the approximate index said.
        apart_tokens: sum of the differences, none taken against another.
    """

    requests: Counter[RoutedBy] = field(default_factory=Counter)
    compared: int = 0
    precise_tokens: int = 0
    approximate_tokens: int = 0
    apart_tokens: int = 0


@dataclass(slots=True)
class _Hearing:
    """What was heard of one model's endpoints.

    Attributes:
        partial: ordinals that events were missed of.
        full: ordinals that everything was heard of.
        unanswered: ordinals that were sent new blocks and since when nothing was heard, earliest first.
    """

    partial: set[int] = field(default_factory=set)
    full: set[int] = field(default_factory=set)
    unanswered: dict[int, float] = field(default_factory=dict)

    def hear(self, ordinal: int, *, is_whole: bool | None) -> None:
        """Something came; None if it says nothing of what came before."""
        self.unanswered.pop(ordinal, None)
        if is_whole is not None:
            self.forget(ordinal)
        if is_whole:
            self.full.add(ordinal)
        elif ordinal not in self.full:
            self.partial.add(ordinal)

    def expire(self, now_s: float) -> list[int]:
        """Those that fell silent; nothing is believed of them any more."""
        silent = []
        for ordinal, since_s in self.unanswered.items():
            if now_s - since_s <= SILENCE_S_MAX:
                break
            silent.append(ordinal)
        for ordinal in silent:
            self.forget(ordinal)
        return silent

    def forget(self, ordinal: int) -> None:
        self.partial.discard(ordinal)
        self.full.discard(ordinal)
        self.unanswered.pop(ordinal, None)

    def trust(self, ordinal: int) -> Trust:
        if ordinal in self.full:
            return Trust.FULL
        return Trust.PARTIAL if ordinal in self.partial else Trust.NONE


@dataclass(slots=True)
class _Precise:
    """The precise half of one model."""

    index: ExactIndex
    predictions: Predictions = field(default_factory=Predictions)
    hearing: _Hearing = field(default_factory=_Hearing)
    comparison: PrefixComparison = field(default_factory=PrefixComparison)

    def forget(self, ordinal: int) -> None:
        self.index.clear(ordinal)
        self.predictions.forget(ordinal)
        self.hearing.forget(ordinal)

    def settle(self, now_s: float) -> None:
        """Let run out what time ends."""
        self.predictions.expire(now_s)
        for ordinal in self.hearing.expire(now_s):
            self.forget(ordinal)


class Prefixes:
    """The exact index of every precise model, and the approximate one of all.

    Attributes:
        in_use: of what is cached, what requests under way hold.
    """

    def __init__(self, approximate: PrefixIndex | None = None) -> None:
        self.in_use = PromptsInUse()
        self.approximate = approximate if approximate is not None else PrefixIndex()
        self._precise: dict[ModelName, _Precise] = {}

    def replace_models(self, models: Iterable[Model]) -> None:
        """From now on these are all models. One whose key size changed starts anew."""
        kept, self._precise = self._precise, {}
        for model in models:
            if model.prefix_mode is not PrefixMode.PRECISE:
                continue
            precise = kept.get(model.name)
            if precise is None or precise.index.block_tokens != model.precise_block_tokens:
                index = ExactIndex(model.name, model.precise_block_tokens, model.precise_blocks_max)
                precise = _Precise(index)
            precise.index.set_bound(model.precise_blocks_max)
            self._precise[model.name] = precise

    def take(self, state: EndpointState, signal: KvSignal) -> None:
        """Take in what an endpoint told of its cache."""
        precise = self._precise.get(state.endpoint.pool.model)
        if precise is None:
            return
        ordinal, index = state.ordinal, precise.index
        is_whole: bool | None = None
        match signal:
            case KvStored():
                index.store(ordinal, signal)
            case KvRemoved():
                index.remove(ordinal, signal)
            case KvCleared(_, tier):
                index.clear(ordinal, tier)
                index.counts[ExactCount.CLEARED_EVENTS] += 1
                if tier is None:
                    precise.predictions.forget(ordinal)
                    is_whole = True
            case KvLost():
                index.clear(ordinal)
                precise.predictions.forget(ordinal)
                index.counts[ExactCount.LOST_EVENTS] += 1
                is_whole = False
        precise.hearing.hear(ordinal, is_whole=is_whole)

    def cached_tokens(self, request: Request, model: Model, now_s: float) -> dict[int, int]:
        """Tokens of the prompt that need not be computed, by endpoint ordinal; those with none may be absent.

        Tokens in a slower tier than the GPU count for less than one each.
        """
        # The last token is always computed, to get the logits of the next.
        most = max(0, request.prompt_tokens - 1)
        sent = self.approximate.match(request.block_keys)
        cached = {o: min(blocks * request.block_tokens, most) for o, blocks in sent.items()}
        precise = self._precise_of(request, model)
        if precise is None:
            return cached
        precise.settle(now_s)
        told = precise.index.match(request.token_keys, precise.predictions.holders)
        size = request.token_block_tokens
        exact = {o: min(int(blocks * size), most) for o, blocks in told.items()}
        for ordinal in cached.keys() - precise.hearing.full:
            exact[ordinal] = max(exact.get(ordinal, 0), cached[ordinal])
        return exact

    def record(
        self, state: EndpointState, request: Request, model: Model, now_s: float, *, wait_s: float = 0.0
    ) -> None:
        """Note that a request was sent to an endpoint, which will have computed its prompt after `wait_s`."""
        ordinal = state.ordinal
        self.approximate.record(ordinal, request.block_keys, _blocks_max(state, request, model))
        precise = self._precise_of(request, model)
        if precise is None or precise.hearing.trust(ordinal) is Trust.NONE:
            return
        keys, index = request.token_keys, precise.index
        known = index.depth(ordinal, keys)
        index.touch(keys[:known])
        # What is cached now may be gone when a queue is over, but it will have been computed again then.
        predicted = keys if wait_s > PREDICTION_S_MAX else keys[known:]
        precise.predictions.note(ordinal, predicted, now_s, wait_s)
        if len(keys) - known > index.told_at_once(ordinal):
            precise.hearing.unanswered.setdefault(ordinal, now_s)

    def compare(self, state: EndpointState, request: Request, model: Model) -> None:
        """Note what the indexes say of the endpoint that will compute this prompt, before it is recorded."""
        precise = self._precise.get(model.name)
        if precise is None:
            return
        comparison, trust = precise.comparison, precise.hearing.trust(state.ordinal)
        is_told = bool(request.token_keys) and trust is not Trust.NONE
        comparison.requests[RoutedBy.PRECISE if is_told else RoutedBy.APPROXIMATE] += 1
        if not (is_told and trust is Trust.FULL and request.block_keys):
            return
        told = precise.index.cached_tokens(state.ordinal, request.token_keys)
        sent = self.approximate.depth(state.ordinal, request.block_keys) * request.block_tokens
        comparison.compared += 1
        comparison.precise_tokens += told
        comparison.approximate_tokens += sent
        comparison.apart_tokens += abs(told - sent)

    def forget(self, ordinal: int) -> None:
        """The endpoint is gone, or is another process by now."""
        self.approximate.forget(ordinal)
        self.in_use.forget(ordinal)
        for precise in self._precise.values():
            precise.forget(ordinal)

    def index(self, model: ModelName) -> ExactIndex | None:
        """The exact index of a precise model, for its counts and size."""
        precise = self._precise.get(model)
        return precise.index if precise is not None else None

    def comparison(self, model: ModelName) -> PrefixComparison | None:
        """The two indexes side by side, of a precise model."""
        precise = self._precise.get(model)
        return precise.comparison if precise is not None else None

    def trust(self, state: EndpointState) -> Trust:
        """How far an endpoint's own word is believed."""
        precise = self._precise.get(state.endpoint.pool.model)
        return precise.hearing.trust(state.ordinal) if precise is not None else Trust.NONE

    def validate(self) -> None:
        """Assert that every index is whole in itself."""
        self.approximate.validate()
        for precise in self._precise.values():
            precise.index.validate()
            precise.predictions.validate()
            hearing = precise.hearing
            assert not hearing.full & hearing.partial, "an endpoint is heard both in full and in part"
            heard = hearing.full | hearing.partial
            known = precise.index.ordinals() | precise.predictions.ordinals()
            assert known <= heard, "something is known of an endpoint that is not heard"
            assert hearing.unanswered.keys() <= heard, "nobody to wait for"

    def _precise_of(self, request: Request, model: Model) -> _Precise | None:
        """The precise half where the request can use it; keys of another size are no use."""
        precise = self._precise.get(model.name)
        is_keyed = bool(request.token_keys) and request.token_block_tokens == model.precise_block_tokens
        return precise if is_keyed else None


def _blocks_max(state: EndpointState, request: Request, model: Model) -> int:
    """How many blocks an endpoint is taken to keep: no more than its KV pool holds, where it says so."""
    sample = state.sample
    if sample is None or not sample.kv_tokens:
        return model.prefix_blocks_per_endpoint_max
    return min(model.prefix_blocks_per_endpoint_max, max(1, sample.kv_tokens // request.block_tokens))
