"""The words of a handoff: its states, what can happen to it, and what it orders done."""

from dataclasses import dataclass
from enum import StrEnum

from pdcoord.protocol.errors import RefuseReason
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import DialectName, PrefillTarget
from pdcoord.protocol.tickets import Ticket


class State(StrEnum):
    """Where one request stands; the value is the name used in docs."""

    IDLE = "idle"
    PREFILLING = "prefilling"
    PAIRED = "paired"
    HELD = "held"
    PULLING = "pulling"
    LOCAL = "local"
    RELAYING = "relaying"
    RESUMING = "resuming"
    DONE = "done"


STATE_MEANINGS: dict[State, str] = {
    State.IDLE: "nothing sent yet",
    State.PREFILLING: "nixlv2: the prefill leg runs, the decode leg is not sent yet",
    State.PAIRED: "sglang, pdcoord: both legs run, neither has answered",
    State.HELD: "sglang, pdcoord: the decode leg has output, held back until the prefill leg is known good",
    State.PULLING: "the prefill leg is good, the decode leg is to show its first output",
    State.LOCAL: "colocated: the engine does both phases, no output yet",
    State.RELAYING: "committed: the client has the head, output flows to it",
    State.RESUMING: "the stream broke off; a continuation of it runs, and is to show its first output",
    State.DONE: "over",
}


class LegKind(StrEnum):
    """Which half of a request a leg is."""

    PREFILL = "prefill"
    DECODE = "decode"


class Fault(StrEnum):
    """How a leg's connection failed, as the edge saw it."""

    UNREACHABLE = "unreachable"
    LOST_BEFORE_HEAD = "lost-before-head"
    LOST_IN_BODY = "lost-in-body"
    TIMED_OUT = "timed-out"
    MALFORMED = "malformed"
    TORN = "torn"
    """The engine itself said that it failed or gave the request up, in mid-stream or in a whole answer."""
    DIVERGED = "diverged"
    """What should have continued a stream did not go where that had gone; no fault of the engine."""


class Outcome(StrEnum):
    """How a request ended; the outcome label of metrics and of the log line."""

    SERVED = "served"
    PASSED_ON = "passed-on"
    REFUSED = "refused"
    BROKEN_OFF = "broken-off"
    HANDED_BACK = "handed-back"
    """Broken off without a word, for whoever sent the request to go on with it elsewhere."""
    CLIENT_LEFT = "client-left"


class NotResumed(StrEnum):
    """Why a stream that broke off was not, or no longer, continued; beside the reasons of its body."""

    NO_TARGET = "no-target"
    TRIES = "tries"
    AGE = "age"
    NO_STREAM = "no-stream"
    """The engine answered in one piece what was asked for as a stream."""


@dataclass(frozen=True, slots=True)
class Resume:
    """How a stream that its engine lost may go on.

    Attributes:
        targets: decode endpoints in the order to try; each once, and after them the own engine.
        refused: those of them that the allowlist turns down; their rungs are skipped.
        tries_max: continuations of one stream, at least 1.
        age_s_max: a stream that began longer ago is not continued.
        stall_s: longest time in which a stream that may be continued, and has output, makes no progress.
    """

    targets: tuple[HostPort, ...]
    refused: frozenset[HostPort] = frozenset()
    tries_max: int = 1
    age_s_max: float = 600.0
    stall_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Order:
    """What is asked of one handoff.

    Attributes:
        engine: the engine beside this sidecar, as rungs and records name it.
        prefills: prefill targets in the order to try; empty means serve colocated.
        refused: those of them that the allowlist turns down; their rungs are skipped.
        shut: fallbacks among them whose path every coordinator calls shut by now; likewise.
        is_colocated_allowed: whether the ladder may end on the engine's own prefill.
        is_stream: whether the client asked for a stream. Only a stream's first output tells that the
            KV has moved; an answer in one piece comes after the whole generation.
        answer_deadline_s: longest wait for the first output where the transfer deadline cannot apply.
        idle_deadline_s: longest time in which a begun answer may make no progress; also of one try to
            continue it.
        resume: None where a stream that breaks off stays broken off.
        is_resumed_above: whoever sent the request continues its stream.
        is_ended_above: whoever sent the request says so itself if its stream breaks off.
    """

    dialect: DialectName
    engine: HostPort
    prefills: tuple[PrefillTarget, ...] = ()
    refused: frozenset[HostPort] = frozenset()
    shut: frozenset[HostPort] = frozenset()
    is_colocated_allowed: bool = True
    is_stream: bool = False
    prefill_deadline_s: float = 60.0
    transfer_deadline_s: float = 20.0
    answer_deadline_s: float = 600.0
    idle_deadline_s: float = 60.0
    resume: Resume | None = None
    is_resumed_above: bool = False
    is_ended_above: bool = False


# Events: what can happen to a request. `leg` is the number that the Send action gave.


@dataclass(frozen=True, slots=True)
class Begun:
    """The request was read and may start."""


@dataclass(frozen=True, slots=True)
class PrefillAnswered:
    """The prefill leg answered 200 and its body was read.

    Attributes:
        ticket: None if the body had none; always None in sglang, where none is needed.
        cached_tokens: prompt tokens that the prefill engine had cached, if it says.
    """

    leg: int
    ticket: Ticket | None = None
    cached_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class PrefillRejected:
    """The prefill leg answered with a status other than 200; the edge keeps the whole answer."""

    leg: int
    status: int


@dataclass(frozen=True, slots=True)
class PrefillLost:
    """The prefill leg ended without an answer that can be used."""

    leg: int
    fault: Fault


@dataclass(frozen=True, slots=True)
class DecodeOpened:
    """The decode leg answered 200 and shows its first output, which the edge holds back.

    Attributes:
        is_error: the first output is an error event: the 200 came before the failure was known.
        is_output_due: a colocated stream that may be continued has only shown signs of life.
    """

    leg: int
    is_error: bool = False
    is_output_due: bool = False


@dataclass(frozen=True, slots=True)
class DecodeRejected:
    """The decode leg answered with a status that is not a success; the edge keeps the whole answer."""

    leg: int
    status: int


@dataclass(frozen=True, slots=True)
class DecodeLost:
    """The decode leg ended before its answer was whole."""

    leg: int
    fault: Fault


@dataclass(frozen=True, slots=True)
class DecodeEnded:
    """The decode leg's answer was relayed to its end."""

    leg: int


@dataclass(frozen=True, slots=True)
class Progressed:
    """Output reached the client since the deadline was set, last at `at_s`.

    Given when the deadline comes; at once of the first output where that `is_output_due`.
    """

    at_s: float


@dataclass(frozen=True, slots=True)
class Unresumed:
    """What was passed on so far cannot be continued.

    Attributes:
        why: a closed list's word.
    """

    leg: int
    why: str


@dataclass(frozen=True, slots=True)
class GraceEnding:
    """The process is about to end.

    Attributes:
        is_over: nothing can be waited for any more.
    """

    is_over: bool = False


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """`Handoff.deadline_s` came and nothing had happened."""


@dataclass(frozen=True, slots=True)
class ClientLeft:
    """The client closed its connection."""


LegEvent = (
    PrefillAnswered
    | PrefillRejected
    | PrefillLost
    | DecodeOpened
    | DecodeRejected
    | DecodeLost
    | DecodeEnded
    | Unresumed
)
Event = Begun | LegEvent | Progressed | GraceEnding | DeadlinePassed | ClientLeft


# Actions: what the edge must do, in order.


@dataclass(frozen=True, slots=True)
class SendPrefill:
    """Send a prefill leg.

    Attributes:
        attempt: legs of one attempt share what pairs them (sglang: the room, pdcoord: transfer and nonce).
    """

    leg: int
    attempt: int
    target: PrefillTarget


@dataclass(frozen=True, slots=True)
class SendDecode:
    """Send a decode leg to the engine.

    Attributes:
        ticket: nixlv2's, to the byte; None otherwise.
        peer: the prefill target where both legs are sent at once; None otherwise. With neither, the leg
            is colocated.
    """

    leg: int
    attempt: int
    ticket: Ticket | None = None
    peer: PrefillTarget | None = None


@dataclass(frozen=True, slots=True)
class SendContinuation:
    """Send a decode leg that goes on where the stream broke off.

    Its events are a decode leg's. DecodeEnded without DecodeOpened says that nothing was left to generate.

    Attributes:
        target: a decode endpoint, or the own engine, which is asked for its health until it is well.
        prefill: the prefill pod whose KV the stream began with; its prefix cache may still have the prompt.
    """

    leg: int
    attempt: int
    target: HostPort
    prefill: PrefillTarget | None = None


@dataclass(frozen=True, slots=True)
class CancelLeg:
    """Close the leg's connection, which is how an engine learns that it may stop."""

    leg: int


@dataclass(frozen=True, slots=True)
class Commit:
    """Give the client the decode leg's head, if it has none yet, and what was held back, then relay."""

    leg: int


@dataclass(frozen=True, slots=True)
class PassOn:
    """Give the client this leg's own answer, status, headers and body as they came."""

    leg: int


@dataclass(frozen=True, slots=True)
class Refuse:
    """Answer with an error of our own; nothing was sent to the client yet."""

    reason: RefuseReason


@dataclass(frozen=True, slots=True)
class BreakOff:
    """End a begun answer unfinished, by closing the connection.

    Attributes:
        is_told: an error event goes before it, in a stream.
        why: what kept the stream from being continued; empty where nobody was to.
    """

    reason: RefuseReason
    is_told: bool = True
    why: str = ""


@dataclass(frozen=True, slots=True)
class OrphanLease:
    """A prefill finished and nothing shows that its KV was pulled; its lease must run out."""

    target: HostPort


@dataclass(frozen=True, slots=True)
class End:
    """The request is over; exactly one per request, the last action."""

    outcome: Outcome


Action = (
    SendPrefill
    | SendDecode
    | SendContinuation
    | CancelLeg
    | Commit
    | PassOn
    | Refuse
    | BreakOff
    | OrphanLease
    | End
)


@dataclass(slots=True)
class Leg:
    """The record of one leg, for the log line, metrics and the served header.

    Attributes:
        ended_s: None while the leg is live.
        outcome: `ok`, `cancelled`, `rejected` (its own answer was passed on), or a RungReason.
    """

    number: int
    kind: LegKind
    attempt: int
    target: HostPort
    began_s: float
    ended_s: float | None = None
    outcome: str = ""

    @property
    def is_live(self) -> bool:
        return self.ended_s is None
