"""One call of simulated traffic, and where calls come from."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NewType, Protocol

CallId = NewType("CallId", int)


@dataclass(frozen=True, slots=True)
class Call:
    """One call as a client sends it; no text.

    Attributes:
        id: unique in its workload.
        at_s: when it is sent, from the start of the run.
        keys: of the prompt's full blocks in order, chained: equal keys mean equal prefixes.
        keys_after: of the full blocks of prompt and answer, which a later call may begin with; begins
            with `keys`. Empty where nobody goes on from this answer.
        session: calls of one conversation or agent share it; -1 for a call of its own.
        kind: which part of a mixed workload it is from, a label of results.
        ttft_s_max: objective of this call; None for the run's own.
    """

    id: CallId
    at_s: float
    prompt_tokens: int
    output_tokens: int
    keys: tuple[int, ...] = ()
    keys_after: tuple[int, ...] = ()
    session: int = -1
    tenant: str = ""
    priority: int = 0
    kind: str = ""
    ttft_s_max: float | None = None
    tpot_s_max: float | None = None


class Workload(Protocol):
    """Traffic. Deterministic from the seed it was made with.

    Attributes:
        key_tokens: prompt tokens that one key stands for, the same for all its calls.
    """

    @property
    def key_tokens(self) -> int: ...

    def calls(self) -> Iterator[Call]:
        """Calls whose time is known beforehand, in the order of `at_s`."""
        ...

    def after(self, call: Call, ended_s: float) -> Call | None:
        """The call that follows on this one's end, at or after it: the next turn of a session; else None."""
        ...

    @property
    def call_count(self) -> int:
        """How many calls there will be in all, those that follow on others included; for a progress bar."""
        ...
