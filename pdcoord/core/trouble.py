"""One endpoint that serves badly: how its latest requests fared, and how far it is let in again.

The rules, and whom they follow (Envoy 1.31's outlier detection; RFC 5681):
    Too much are FAILURES_MAX failures in a row, or FAILED_MAX of the last WINDOW outcomes. Envoy takes 5 in
    a row; here each costs a request all of its patience, so it is 3, as for paths.
    Out for OUT_S_MIN, doubled up to OUT_S_MAX each time that it fails again (base_ejection_time times the
    number of ejections); then one request is let in, with every success one more at a time, so that their
    number doubles with each round (slow start), until READMITTED_AT.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from pdcoord.core.fleet import EndpointId
from pdcoord.core.request import RequestId

FAILURES_MAX = 3
WINDOW = 20
FAILED_MAX = 8
"""Of the last WINDOW outcomes: who fails two in five requests is of no use, one in a hundred is chance."""
PARTNERS_MIN = 2
"""Failures that may be the other leg's must be with so many of those before they are this endpoint's own."""
OUT_S_MIN = 1.0
OUT_S_MAX = 60.0
READMITTED_AT = 16
"""Requests at a time past which an endpoint is one like any other."""
TRIALS_MAX = 2 * READMITTED_AT
STEP_S_MAX = 60.0
"""So long without a failure counts as if all that may be under way had succeeded: few tell little."""
RELAPSE_S = 120.0
"""Who fails again within this time of its readmission is put out for twice as long as the last time."""

_ROW = (1 << FAILURES_MAX) - 1
_ALL = (1 << WINDOW) - 1


class Track(StrEnum):
    """What is expected of an endpoint; failures in one are not made good by successes in another."""

    START = "start"
    """A first output in time."""
    FLOW = "flow"
    """Answers that go on to their end."""
    PACE = "pace"
    """Steps about as fast as its pool's."""
    PREFILL = "prefill"
    """Prompts computed for others."""


class Symptom(StrEnum):
    """What speaks against an endpoint; closed, a label of metrics."""

    LATE = "late"
    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"
    ERROR = "error"
    STALLED = "stalled"
    BROKEN_OFF = "broken-off"
    SLOW = "slow"
    PREFILL = "prefill"

    @property
    def track(self) -> Track:
        return _TRACKS.get(self, Track.START)

    @property
    def is_of_load(self) -> bool:
        """Whether a whole fleet shows it when it has too much to do."""
        return self in {Symptom.LATE, Symptom.SLOW, Symptom.PREFILL}


_TRACKS = {
    Symptom.STALLED: Track.FLOW,
    Symptom.BROKEN_OFF: Track.FLOW,
    Symptom.SLOW: Track.PACE,
    Symptom.PREFILL: Track.PREFILL,
}


class Phase(StrEnum):
    """Where an endpoint of which something is remembered stands; closed, a label of metrics."""

    SUSPECTED = "suspected"
    """Some of its latest requests failed; it gets work like any other."""
    OUT = "out"
    READMITTING = "readmitting"


@dataclass(slots=True)
class Trouble:
    """One endpoint of which something is remembered.

    Attributes:
        outcomes: by track, the latest in the lowest bit; a failure is a 1.
        partners: endpoints of the other legs of failures since the last success; None: it was its own fault.
        shown_s: when output last came from it, in time or late.
        row_s: when the failures in a row began that are counted now.
        out_s: length of the current or last time out; 0.0 before the first.
        until_s: when a request may be let in; meaningful while out.
        limit: requests that may be on trial there at a time, while it is being readmitted.
        trials: requests let in since it was put out, and whether they passed; those that did still may fail.
        stepped_s: when the limit was last raised.
        since_s: of the phase.
        readmitted_s: when it was last put among the others again; None if it never was.
    """

    symptom: Symptom
    since_s: float
    phase: Phase = Phase.SUSPECTED
    outcomes: dict[Track, int] = field(default_factory=dict)
    partners: dict[Track, set[EndpointId | None]] = field(default_factory=dict)
    shown_s: float = float("-inf")
    row_s: float = 0.0
    out_s: float = 0.0
    until_s: float = 0.0
    limit: int = 0
    trials: dict[RequestId, bool] = field(default_factory=dict)
    stepped_s: float = 0.0
    readmitted_s: float | None = None

    @property
    def is_failing(self) -> bool:
        """Whether the latest in any track was a failure."""
        return self.phase is not Phase.SUSPECTED or any(bits & 1 for bits in self.outcomes.values())

    @property
    def trial_count(self) -> int:
        """Requests that were let in and have told nothing yet."""
        return sum(not has_passed for has_passed in self.trials.values())

    def lets_pass(self, now_s: float) -> bool:
        match self.phase:
            case Phase.SUSPECTED:
                return True
            case Phase.OUT:
                return now_s >= self.until_s and not self.trial_count
            case Phase.READMITTING:
                return self.trial_count < self.limit

    @property
    def due_s(self) -> float:
        """When time alone takes a step; meaningful unless it is merely suspected."""
        return self.until_s if self.phase is Phase.OUT else self.stepped_s + STEP_S_MAX

    def is_past(self, now_s: float) -> bool:
        """Whether nothing of it need be remembered any more."""
        is_over = self.readmitted_s is None or now_s >= self.readmitted_s + RELAPSE_S
        return is_over and not any(self.outcomes.values())

    def note_well(self, track: Track) -> None:
        """A request got what it expected."""
        self.outcomes[track] = (self.outcomes.get(track, 0) << 1) & _ALL
        self.partners.pop(track, None)

    def note_ill(self, track: Track, partner: EndpointId | None, now_s: float) -> bool:
        """A request did not; whether that is too much by now, and the endpoint's own doing.

        Args:
            partner: endpoint of the other leg, where the fault may be that one's.
        """
        bits = self.outcomes.get(track, 0)
        if not bits & 1:
            self.row_s = now_s
        bits = self.outcomes[track] = (bits << 1 | 1) & _ALL
        partners = self.partners.setdefault(track, set())
        if len(partners) <= PARTNERS_MIN:
            partners.add(partner)
        is_own = None in partners or len(partners) >= PARTNERS_MIN
        return is_own and (bits & _ROW == _ROW or bits.bit_count() >= FAILED_MAX)

    def put_out(self, symptom: Symptom, now_s: float) -> None:
        """Out from now on, for longer where it failed so soon again."""
        is_relapse = self.phase is not Phase.SUSPECTED or (
            self.readmitted_s is not None and now_s < self.readmitted_s + RELAPSE_S
        )
        out_s = self.out_s * 2.0 if is_relapse else OUT_S_MIN
        self.out_s = min(max(out_s, OUT_S_MIN), OUT_S_MAX)
        self.until_s = now_s + self.out_s
        self.phase, self.symptom, self.since_s, self.limit = Phase.OUT, symptom, now_s, 0
        self.outcomes.clear()
        self.partners.clear()

    def let_in(self, now_s: float) -> None:
        """Its time out is over: one request at a time."""
        self.phase, self.since_s, self.stepped_s, self.limit = Phase.READMITTING, now_s, now_s, 1

    def step(self, now_s: float) -> bool:
        """One more request at a time, or all of them; whether its phase is another by that."""
        self.stepped_s = now_s
        if self.phase is Phase.OUT:
            self.phase, self.since_s, self.limit = Phase.READMITTING, now_s, 2
            return True
        self.limit += 1
        if self.limit <= READMITTED_AT:
            return False
        self.phase, self.since_s, self.readmitted_s = Phase.SUSPECTED, now_s, now_s
        self.outcomes.clear()
        self.partners.clear()
        return True

    def validate(self) -> None:
        """Assert that what is remembered is within its bounds."""
        assert len(self.trials) <= TRIALS_MAX, "too many trials"
        assert all(0 <= bits <= _ALL for bits in self.outcomes.values()), "too many outcomes"
        assert all(len(each) <= PARTNERS_MIN + 1 for each in self.partners.values()), "too many partners"
        assert 0.0 <= self.out_s <= OUT_S_MAX, f"out for {self.out_s} s"
        if self.phase is Phase.SUSPECTED:
            assert not self.trials, "a trial of who is not out"
        if self.phase is Phase.READMITTING:
            assert 1 <= self.limit <= READMITTED_AT, f"{self.limit} at a time"
