"""One unlike pair of pools and its endpoints: what canaries said so far, whom to blame, whom to try next."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from pdcoord.core.fleet import Endpoint, EndpointId, ModelName, Pool
from pdcoord.core.gates import UNTRIED, PairKey
from pdcoord.core.likeness import CanaryOutcome, Finding
from pdcoord.core.model import CanaryRules, Model
from pdcoord.protocol.plans import DialectName

FAILURES_MAX = 3
"""Failures in a row that shut a pair which was open: two may be of the two endpoints of one bad path."""
RETRY_S_MIN = 5.0
RETRY_S_MAX = 300.0
"""Pause behind a canary that failed, doubled with each further one."""
UNTOLD_S_MIN = 2.0
UNTOLD_S_MAX = 60.0
"""The same behind one that said nothing."""

NEW, RETRY, REPEAT, NOT_NEEDED = range(4)
"""How much an endpoint needs a canary, most first: none passed, the last one failed, it passed long ago."""
Rank = tuple[int, int, float, int, int]
"""Of an endpoint, least first: need, whether it is a suspect, when it was tried, its load, its ordinal."""
Side = list[tuple[Rank, Endpoint]]


class PairState(StrEnum):
    """What is known of a pair of pools; closed, a label of metrics.

    unproven: answers are right, and no sidecar of ours says that they were split; open, as if observed only.
    unjudged: no pool of the model can serve the prompt alone, so that there is nothing to compare with.
    """

    UNTRIED = "untried"
    PASSED = "passed"
    UNPROVEN = "unproven"
    FAILED = "failed"
    UNJUDGED = "unjudged"


@dataclass(frozen=True, slots=True)
class CanaryOrder:
    """One canary: a prompt served by `reference` alone, then split over the path.

    Attributes:
        ordinal: of this order, in this process.
        has_sidecar: a sidecar of ours has spoken at the decode endpoint.
    """

    ordinal: int
    model: ModelName
    prefill: Endpoint
    decode: Endpoint
    reference: Endpoint
    rules: CanaryRules
    dialect: DialectName
    prompt_tokens_min: int
    bytes_per_token: float
    has_sidecar: bool = False

    @property
    def pair(self) -> PairKey:
        return self.prefill.pool.name, self.decode.pool.name

    @property
    def ends(self) -> tuple[EndpointId, EndpointId]:
        return self.prefill.id, self.decode.id


@dataclass(slots=True)
class End:
    """One endpoint as an end of one pair.

    Attributes:
        is_passed: its last canary that said something found nothing wrong.
        tried_s: of its last canary, be it its fault or not.
        held_s: until when it is left alone, since a canary with it said nothing.
        failure_count: in a row, of which its partner was not blamed alone.
    """

    tried_s: float
    is_passed: bool = False
    fault: str = ""
    failure_count: int = 0
    held_s: float = -math.inf

    def need(self, interval_s: float, now_s: float) -> int:
        """How much it needs a canary of an open pair: NEW most, NOT_NEEDED not at all.

        Args:
            interval_s: after which a pass is repeated.
        """
        if self.fault:
            wait_s, need = pause_s(self.failure_count - 1, RETRY_S_MIN, RETRY_S_MAX), RETRY
        elif self.is_passed:
            wait_s, need = interval_s, REPEAT
        else:
            wait_s, need = 0.0, NEW
        return NOT_NEEDED if now_s < max(self.held_s, self.tried_s + wait_s) else need


@dataclass(slots=True)
class UnlikePair:
    """One unlike pair of pools.

    Attributes:
        failure_count: canaries in a row that failed.
        untold_count: canaries in a row that said nothing.
        judged_s: of the last canary that said something, and `finding` what it said.
        void_s: when an order under way is given up.
        suspect_count: endpoints with a fault; kept by whoever changes them.
    """

    model: Model
    prefill: Pool
    decode: Pool
    state: PairState
    due_s: float
    failure_count: int = 0
    untold_count: int = 0
    judged_s: float | None = None
    finding: Finding | None = None
    prefills: dict[EndpointId, End] = field(default_factory=dict)
    decodes: dict[EndpointId, End] = field(default_factory=dict)
    running: CanaryOrder | None = None
    void_s: float = 0.0
    suspect_count: int = 0

    @property
    def key(self) -> PairKey:
        return self.prefill.name, self.decode.name

    @property
    def revision(self) -> tuple[object, ...]:
        """What a result holds for; with another of it the pair is another."""
        sides = [(p.side, p.vendor, p.engine, p.role, p.model) for p in (self.prefill, self.decode)]
        return (*sides, self.state is PairState.UNJUDGED)

    @property
    def is_open(self) -> bool:
        """Whether requests go over it because canaries found nothing wrong."""
        return self.state in {PairState.PASSED, PairState.UNPROVEN}

    @property
    def is_borne_out(self) -> bool:
        """Whether on both sides a process is there that passed and did not fail since."""
        return all(any(end.is_passed for end in side.values()) for side in (self.prefills, self.decodes))

    def ends(self) -> Iterator[tuple[EndpointId, End]]:
        yield from self.prefills.items()
        yield from self.decodes.items()

    @property
    def fault(self) -> str:
        """Why nothing may go over the pair; empty if it may."""
        if self.state is PairState.UNTRIED:
            return UNTRIED
        if self.state is PairState.FAILED:
            assert self.finding is not None, f"{self.key} failed, and nothing was found"
            return self.finding.outcome
        return ""

    def is_repeat(self, order: CanaryOrder) -> bool:
        """Whether both ends of it have passed, so that it only repeats what is known."""
        ends = (self.prefills.get(order.prefill.id), self.decodes.get(order.decode.id))
        return self.is_open and all(end is not None and end.is_passed for end in ends)

    def judge(self, order: CanaryOrder, finding: Finding, now_s: float) -> None:
        """What one canary of this pair came to."""
        ends = (
            self.prefills.setdefault(order.prefill.id, End(now_s)),
            self.decodes.setdefault(order.decode.id, End(now_s)),
        )
        for end in ends:
            end.tried_s = now_s
        if finding.outcome is CanaryOutcome.INCONCLUSIVE:
            self.untold_count += 1
            until_s = now_s + pause_s(self.untold_count, UNTOLD_S_MIN, UNTOLD_S_MAX)
            self.due_s = now_s if self.is_open else until_s
            for end in ends:
                end.held_s = until_s
            return
        self.untold_count, self.judged_s, self.finding = 0, now_s, finding
        if not finding.outcome.is_failure:
            for end in ends:
                end.is_passed, end.fault, end.failure_count = True, "", 0
            is_proven = finding.outcome is CanaryOutcome.PASSED or self.state is PairState.PASSED
            self.state = PairState.PASSED if is_proven else PairState.UNPROVEN
            self.failure_count, self.due_s = 0, now_s
            return
        self.failure_count += 1
        self.due_s = now_s
        if self.is_open:
            _blame(ends, finding.outcome)
            if self.failure_count < FAILURES_MAX and self.is_borne_out:
                return
        self.state = PairState.FAILED
        self.due_s = now_s + pause_s(self.failure_count, RETRY_S_MIN, RETRY_S_MAX)


def neediest(prefills: Side, decodes: Side) -> tuple[Endpoint, Endpoint]:
    """Whoever needs a canary most, and the best partner for it.

    A suspect is tried with one that is none, or the result would say nothing of either.
    """
    prefill, decode = min(prefills, key=_rank_of), min(decodes, key=_rank_of)
    if prefill[0] <= decode[0]:
        return prefill[1], min(decodes, key=_trust_of)[1]
    return min(prefills, key=_trust_of)[1], decode[1]


def least_tried(side: Side) -> Endpoint:
    """Of a pair that is shut each try is of other endpoints, so that one bad host does not keep it shut."""
    return min(side, key=lambda each: each[0][1:])[1]


def pause_s(count: int, least_s: float, most_s: float) -> float:
    """For the count-th time in a row: 0, least, twice that, four times, up to most."""
    return 0.0 if count <= 0 else min(least_s * 2.0 ** min(count - 1, 16), most_s)


def _blame(ends: tuple[End, End], outcome: CanaryOutcome) -> None:
    """Of two endpoints the one that was a suspect before; else both are from now on."""
    suspects = [end for end in ends if end.fault] or ends
    for end in suspects:
        end.fault, end.is_passed = outcome, False
        end.failure_count += 1


def _rank_of(each: tuple[Rank, Endpoint]) -> Rank:
    return each[0]


def _trust_of(each: tuple[Rank, Endpoint]) -> tuple[int, Rank]:
    return each[0][1], each[0]
