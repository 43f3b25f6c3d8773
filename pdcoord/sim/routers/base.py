"""What every router of the simulator is: told of the fleet and of what happens, asked where a call goes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pdcoord.core.fleet import Endpoint, Sample
from pdcoord.protocol.plans import ServedHeader
from pdcoord.sim.workload.call import Call


@dataclass(frozen=True, slots=True)
class Place:
    """One simulated endpoint as a router may know it.

    Attributes:
        index: its number, by which routes and events name it.
        endpoint: its pool with role, vendor, layout and the policy's figures, and its address.
        kv_tokens: what its KV pool holds.
        running_max: sequences in its batch at most (vLLM's max_num_seqs).
        step_tokens_max: tokens in one step at most (vLLM's max_num_batched_tokens).
        block_tokens: tokens in one block of its cache.
    """

    index: int
    endpoint: Endpoint
    kv_tokens: int
    running_max: int
    step_tokens_max: int
    block_tokens: int


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a router is given at its start.

    Attributes:
        key_tokens: prompt tokens that one key of a call stands for.
        can_hand_over: can_hand_over[p][d]: whether p's KV can reach d with what this router has. Rivals
            are given pairs of one vendor only, or all pairs, as if they could cross.
        seed: for routers that draw.
    """

    places: Sequence[Place]
    key_tokens: int
    can_hand_over: Sequence[Sequence[bool]]
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Route:
    """Where a call goes.

    Attributes:
        decode: index of the place that generates.
        prefill: index of the place that computes the prompt and hands its KV over; None if `decode` does.
        why: a short word from the router's own closed list, a label of results.
        other_prefills: whom to try if that fails, in order; empty goes to `decode` itself.
    """

    decode: int
    prefill: int | None = None
    why: str = ""
    other_prefills: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Shed:
    """Refuse the call: 429."""

    why: str


@dataclass(frozen=True, slots=True)
class Hold:
    """Keep the call back; it comes out of a later `released`."""


@dataclass(slots=True)
class Released:
    """Calls that were held and now have a route, or are shed."""

    routes: list[tuple[Call, Route | Shed]] = field(default_factory=list)


class Router(Protocol):
    """Decides for one fleet and hears of everything a real one would hear of, when it would.

    Prompts, keys and limits on output are known to it; output lengths are not, except as calls end.
    """

    @property
    def name(self) -> str: ...

    def route(self, call: Call, now_s: float) -> Route | Shed | Hold:
        """Where a call goes that has just arrived."""
        ...

    def began(self, call: Call, route: Route, served: ServedHeader | None, now_s: float) -> None:
        """The first token of its answer was seen; `served` as a sidecar would say it."""
        ...

    def ended(self, call: Call, route: Route, output_tokens: int, now_s: float, *, is_ok: bool) -> None:
        """Its last token was seen, or it failed."""
        ...

    def failed(self, call: Call, route: Route, now_s: float) -> Route | Shed:
        """The decode place is dead and nothing was answered: where else it goes."""
        ...

    def sampled(self, index: int, sample: Sample | None, now_s: float) -> None:
        """A scrape of a place's metrics; None where it did not answer."""
        ...

    def cached(self, index: int, stored: Sequence[int], removed: Sequence[int], now_s: float) -> None:
        """A KV event: these keys are now in a place's prefix cache, and those no longer."""
        ...

    def released(self, now_s: float) -> Released:
        """Held calls that may go now; asked after every event."""
        ...

    def next_event_s(self) -> float | None:
        """When `released` should be asked though nothing happens."""
        ...
