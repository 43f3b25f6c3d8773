"""What all rivals share: who is alive, what was sent where and has not ended, what is retried."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

from pdcoord.core.fleet import Sample
from pdcoord.protocol.plans import ServedHeader
from pdcoord.sim.routers.base import Hold, Released, Route, Shed, Surroundings
from pdcoord.sim.routers.rotation import Rotation
from pdcoord.sim.workload.call import Call, CallId

NO_ENDPOINTS: Final = "no-endpoints"
NOT_RETRIED: Final = "not-retried"
ALONE: Final = "alone"
SPLIT: Final = "split"

Pick = Callable[[Sequence[int]], int]
"""One of the given places, of which there is at least one."""


@dataclass(slots=True)
class Entry:
    """One call that was sent and has not ended.

    Attributes:
        uncached_tokens: what the rival takes its prompt to cost where it is computed.
        began_s: when its first token was seen, or when it ended without one.
        tried: decode places that failed it.
    """

    call: Call
    route: Route
    uncached_tokens: int
    began_s: float | None = None
    tried: tuple[int, ...] = ()

    @property
    def is_prefilling(self) -> bool:
        """Its first token was not seen yet."""
        return self.began_s is None

    @property
    def worker(self) -> int:
        """Where the prompt is computed."""
        return self.route.decode if self.route.prefill is None else self.route.prefill


@dataclass(slots=True)
class Load:
    """A rival's own account of one place.

    Attributes:
        requests: calls with a leg here: a prefill leg until the first token, a decode leg until the end.
        decoding: those of them whose decode leg is here, from dispatch to end.
        prefilling: calls whose prompt is computed here and whose first token was not seen.
        prefill_tokens: uncached prompt tokens of those.
        prompt_tokens: all prompt tokens of those.
        context_tokens: prompt tokens of the decode legs.
    """

    requests: int = 0
    decoding: int = 0
    prefilling: int = 0
    prefill_tokens: int = 0
    prompt_tokens: int = 0
    context_tokens: int = 0


class Hooks:
    """What a rule may do when something happens; nothing unless it says so."""

    def on_opened(self, entry: Entry, now_s: float) -> None:
        """A call was sent."""

    def on_began(self, entry: Entry, now_s: float) -> None:
        """Its first token was seen, or it ended without one."""

    def on_closed(self, entry: Entry, now_s: float) -> None:
        """It ended, or failed and may be routed anew; comes after `on_began`."""

    def on_sample(self, index: int, sample: Sample, now_s: float) -> None:
        """A scrape came in."""

    def on_gone(self, index: int, now_s: float) -> None:
        """A place left the rotation."""

    def on_served(self, entry: Entry, output_tokens: int, now_s: float) -> None:
        """A call was answered whole; comes after `on_closed`."""

    def cached(self, index: int, stored: Sequence[int], removed: Sequence[int], now_s: float) -> None:
        """A KV event, for rivals that subscribe to them."""


class Rival(Hooks, ABC):
    """A router with its own account of load; a subclass is only its rule.

    A place is in rotation until a scrape of it fails and again from the next that does not: the readiness
    probe of a real deployment, which takes longer. Nothing is held back: no rival queues by default.

    Attributes:
        retries_max: how often a call whose decode place is dead is routed anew.
    """

    def __init__(self, surroundings: Surroundings, name: str, retries_max: int) -> None:
        self.name = name
        self.retries_max = retries_max
        self.surroundings = surroundings
        self.places = tuple(surroundings.places)
        self.random = Random(surroundings.seed)  # noqa: S311  # the same choices for the same seed
        self.loads = [Load() for _ in self.places]
        self.samples: list[Sample | None] = [None] * len(self.places)
        self._is_live = [True] * len(self.places)
        self._rotation = Rotation.of(surroundings, self._is_live)
        self._entries: dict[CallId, Entry] = {}

    @abstractmethod
    def choose(self, call: Call, rotation: Rotation, now_s: float) -> Route | Shed:
        """The rule: where a call goes, among the places of a rotation that is not empty."""

    def uncached_tokens(self, call: Call, worker: int) -> int:  # noqa: ARG002  # of rules that know prefixes
        """Prompt tokens that `worker` has to compute, as far as the rival can tell right after `choose`."""
        return call.prompt_tokens

    def route(self, call: Call, now_s: float) -> Route | Shed | Hold:
        return self._open(call, self._rotation, (), now_s)

    def failed(self, call: Call, route: Route, now_s: float) -> Route | Shed:
        entry = self._close(call.id, now_s)
        tried = (route.decode, *(() if entry is None else entry.tried))
        if len(tried) > self.retries_max:
            return Shed(NOT_RETRIED)
        return self._open(call, Rotation.of(self.surroundings, self._is_live, tried), tried, now_s)

    def began(self, call: Call, route: Route, served: ServedHeader | None, now_s: float) -> None:  # noqa: ARG002  # of the Protocol
        entry = self._entries.get(call.id)
        if entry is not None:
            self._begin(entry, now_s)

    def ended(self, call: Call, route: Route, output_tokens: int, now_s: float, *, is_ok: bool) -> None:  # noqa: ARG002  # of the Protocol
        entry = self._close(call.id, now_s)
        if entry is not None and is_ok:
            self.on_served(entry, output_tokens, now_s)

    def sampled(self, index: int, sample: Sample | None, now_s: float) -> None:
        is_live = sample is not None
        if self._is_live[index] is not is_live:
            self._is_live[index] = is_live
            self._rotation = Rotation.of(self.surroundings, self._is_live)
            if not is_live:
                self.on_gone(index, now_s)
        self.samples[index] = sample
        if sample is not None:
            self.on_sample(index, sample, now_s)

    def released(self, now_s: float) -> Released:  # noqa: ARG002  # of the Protocol
        return Released()

    def next_event_s(self) -> float | None:
        return None

    def validate(self) -> None:
        """Assert that the account of every place is the sum of the calls that are open."""
        expected = [Load() for _ in self.places]
        for entry in self._entries.values():
            _add(expected, entry, 1)
        assert self.loads == expected, "loads are not the sums of the open calls"

    def alone_or_split(self, rotation: Rotation, pick: Pick) -> Route:
        """One place by the rule; where none can serve alone, a prefill by the rule, then a decode of its."""
        if rotation.alone:
            return Route(pick(rotation.alone), why=ALONE)
        prefill = pick(rotation.prefills)
        return Route(pick(rotation.decodes_of[prefill]), prefill, why=SPLIT)

    def other_prefills(self, rotation: Rotation, prefill: int, decode: int) -> tuple[int, ...]:
        """Whom a router that retries pairs tries if the prefill fails: the least loaded partners."""
        others = [index for index in rotation.prefills_of[decode] if index != prefill]
        others.sort(key=lambda index: self.loads[index].requests)
        return tuple(others[: self.retries_max])

    def drawn(self, tied: Sequence[int]) -> int:
        """One of places that are equally good; draws only where there is more than one."""
        return tied[0] if len(tied) == 1 else tied[self.random.randrange(len(tied))]

    def _open(self, call: Call, rotation: Rotation, tried: tuple[int, ...], now_s: float) -> Route | Shed:
        if rotation.is_empty:
            return Shed(NO_ENDPOINTS)
        chosen = self.choose(call, rotation, now_s)
        if isinstance(chosen, Shed):
            return chosen
        worker = chosen.decode if chosen.prefill is None else chosen.prefill
        entry = Entry(call, chosen, self.uncached_tokens(call, worker), tried=tried)
        self._entries[call.id] = entry
        _add(self.loads, entry, 1)
        self.on_opened(entry, now_s)
        return chosen

    def _begin(self, entry: Entry, now_s: float) -> None:
        if entry.is_prefilling:
            _add(self.loads, entry, -1)
            entry.began_s = now_s
            _add(self.loads, entry, 1)
            self.on_began(entry, now_s)

    def _close(self, call_id: CallId, now_s: float) -> Entry | None:
        entry = self._entries.pop(call_id, None)
        if entry is not None:
            self._begin(entry, now_s)
            _add(self.loads, entry, -1)
            self.on_closed(entry, now_s)
        return entry


def best(candidates: Sequence[int], scores: Sequence[float]) -> list[int]:
    """The candidates whose score is the highest; `scores` is aligned with them."""
    top = max(scores)
    return [candidate for candidate, score in zip(candidates, scores, strict=True) if score == top]


def _add(loads: Sequence[Load], entry: Entry, sign: int) -> None:
    decode = loads[entry.route.decode]
    decode.requests += sign
    decode.decoding += sign
    decode.context_tokens += sign * entry.call.prompt_tokens
    if entry.is_prefilling:
        worker = loads[entry.worker]
        worker.requests += sign * (worker is not decode)
        worker.prefilling += sign
        worker.prefill_tokens += sign * entry.uncached_tokens
        worker.prompt_tokens += sign * entry.call.prompt_tokens
