"""A compiled workload: its parts' calls in the order of time, with tenant, priority and objectives."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import merge

from pdcoord.sim.workload.call import Call, CallId
from pdcoord.sim.workload.draws import Shares, mix, unit
from pdcoord.sim.workload.parts import TURNS_MAX, Part, Turn

_TENANT, _PRIORITY = 1 << 41, (1 << 41) + 1


@dataclass(frozen=True, slots=True)
class Dressing:
    """What a part's calls have besides their content."""

    kind: str
    seed: int
    tenants: tuple[str, ...]
    tenant_shares: Shares
    priorities: tuple[int, ...]
    priority_shares: Shares
    ttft_s_max: float | None
    tpot_s_max: float | None

    def tenant(self, number: int) -> str:
        if len(self.tenants) == 1:
            return self.tenants[0]
        return self.tenants[self.tenant_shares.at(unit(mix(self.seed, _TENANT), number))]

    def priority(self, number: int) -> int:
        if len(self.priorities) == 1:
            return self.priorities[0]
        return self.priorities[self.priority_shares.at(unit(mix(self.seed, _PRIORITY), number))]


class MixedWorkload:
    """The Workload of a file. Nothing of a run is kept in it, so that runs may share it.

    An id is the part's number, the session's and the turn's in one: ids are unique, not dense.

    Attributes:
        notes: what a person should know of how it was read, such as skipped rows of a trace.
    """

    def __init__(
        self, key_tokens: int, parts: Sequence[tuple[Part, Dressing]], notes: Sequence[str] = ()
    ) -> None:
        self._key_tokens = key_tokens
        self._parts = tuple(parts)
        self.notes = tuple(notes)

    @property
    def key_tokens(self) -> int:
        return self._key_tokens

    @property
    def call_count(self) -> int:
        return sum(part.call_count for part, _ in self._parts)

    def calls(self) -> Iterator[Call]:
        streams = [self._stream(index) for index in range(len(self._parts))]
        return streams[0] if len(streams) == 1 else merge(*streams, key=lambda call: call.at_s)

    def after(self, call: Call, ended_s: float) -> Call | None:
        place, index = divmod(call.id, len(self._parts))
        number, turn = divmod(place, TURNS_MAX)
        part, _ = self._parts[index]
        if not part.has_sessions:
            return None
        done = Turn(
            number, turn, call.at_s, call.prompt_tokens, call.output_tokens, call.keys, call.keys_after
        )
        following = part.after(done, ended_s)
        return None if following is None else self._call(index, following)

    def _stream(self, index: int) -> Iterator[Call]:
        return (self._call(index, turn) for turn in self._parts[index][0].turns())

    def _call(self, index: int, turn: Turn) -> Call:
        part, dressing = self._parts[index]
        part_count = len(self._parts)
        return Call(
            id=CallId((turn.number * TURNS_MAX + turn.turn) * part_count + index),
            at_s=turn.at_s,
            prompt_tokens=turn.prompt_tokens,
            output_tokens=turn.output_tokens,
            keys=turn.keys,
            keys_after=turn.keys_after,
            session=turn.number * part_count + index if part.has_sessions else -1,
            tenant=dressing.tenant(turn.number),
            priority=dressing.priority(turn.number),
            kind=dressing.kind,
            ttft_s_max=dressing.ttft_s_max,
            tpot_s_max=dressing.tpot_s_max,
        )
