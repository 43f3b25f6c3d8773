"""What an emulated engine is told and what it asks for: the only way in and out of its model."""

from dataclasses import dataclass, field
from enum import StrEnum

import msgspec

from pdcoord.protocol.headers import HostPort
from pdcoord.sim.kvpool import PoolEvent
from transfer.layout import KvLayout
from transfer.verdict import Connector

# What engines say to each other. These travel between processes as JSON.


class PeerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A producer's answer to a handshake.

    Attributes:
        engine_id: new at every start.
        speaks: the producer's connector.
    """

    engine_id: str
    model: str
    speaks: Connector
    layout: KvLayout


class PullAsk(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A consumer's request for KV, by ticket, by transfer or by room.

    Attributes:
        engine_id: the producer's, from the ticket; empty with a transfer and with a room.
        request_id: the producer's own id of the prefill, or the transfer's id; empty with a room.
        block_ids: the producer's blocks, a list for each KV group.
        room: SGLang's bootstrap room.
    """

    engine_id: str = ""
    request_id: str = ""
    block_ids: tuple[tuple[int, ...], ...] = ()
    room: int | None = None


class PullGrant(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A producer's consent: what its blocks hold, and how fast they may leave.

    Attributes:
        digest: of the tokens whose KV the blocks hold, see `tokens.prompt_digest`.
        taint: 0 if that KV is right.
        first_token: SGLang hands the prefill's token over with the KV; None with a ticket.
        sent_tokens: leading tokens whose KV left while later ones were computed (connector pdcoord, where
            the consumer asked before the prefill was done).
    """

    token_count: int
    digest: int
    kv_bytes_per_token: int
    share_bytes_per_s: float
    block_tokens: int
    taint: int = 0
    cached_tokens: int = 0
    first_token: int | None = None
    sent_tokens: int = 0


# What a request is.


@dataclass(frozen=True, slots=True)
class KvTicket:
    """Where the real bytes of a prefill are, or are asked to be; the model does not look into it.

    Attributes:
        transfer, nonce: 32 hex digits each.
        address: of the producer's transfer agent; empty in a prefill leg.
        epoch: of that agent; empty where both legs were sent at once.
    """

    transfer: str
    nonce: str = field(repr=False)
    address: str = ""
    epoch: str = ""


@dataclass(frozen=True, slots=True)
class RemoteTicket:
    """A ticket as a decode leg brings it, read from `kv_transfer_params` of vLLM 0.32.

    With both legs under way at once there is no ticket yet: `engine_id` is empty, and `request_id` is the
    id of the transfer that both legs name (connector pdcoord).

    Attributes:
        address: the producer's side channel.
        token_count: None where the producer did not say; then the whole prompt.
    """

    engine_id: str
    request_id: str
    block_ids: tuple[tuple[int, ...], ...]
    address: HostPort
    token_count: int | None = None
    kv: KvTicket | None = None


@dataclass(frozen=True, slots=True)
class RoomCall:
    """SGLang's rendezvous: where the prefill's bootstrap server is, and the room both legs name."""

    address: HostPort
    room: int


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One sequence to compute.

    Attributes:
        output_tokens_max: None lets the model stop of its own accord.
        ignores_eos: the model never stops of its own accord.
        is_prefill_leg: `do_remote_decode`: end after the first token and keep the KV for a consumer.
        ticket: `do_remote_prefill`: fetch the KV before running.
        transfer: of a prefill leg whose decode leg may ask before it is done; empty otherwise.
        kv: of the same leg, for its real bytes, if the leg brought it.
        has_bytes: of a prefill leg: stage real bytes.
        lease_s: in place of the engine's own; 0.0 expires at once.
        is_pooling: compute the prompt only, no token comes out.
    """

    id: str
    prompt: tuple[int, ...]
    output_tokens_max: int | None = None
    ignores_eos: bool = False
    cache_salt: str = ""
    choice_index: int = 0
    is_prefill_leg: bool = False
    ticket: RemoteTicket | None = None
    transfer: str = ""
    kv: KvTicket | None = None
    has_bytes: bool = False
    room: RoomCall | None = None
    lease_s: float | None = None
    is_pooling: bool = False


# Events: what the engine is told.


@dataclass(frozen=True, slots=True)
class Submit:
    """A request arrived."""

    request: EngineRequest


@dataclass(frozen=True, slots=True)
class Abort:
    """Nobody waits for this request any more; an unknown one has just ended."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class HandshakeAnswered:
    """A producer told of itself."""

    address: HostPort
    info: PeerInfo


@dataclass(frozen=True, slots=True)
class HandshakeFailed:
    """Nobody answered at a producer's address."""

    address: HostPort


@dataclass(frozen=True, slots=True)
class PullGranted:
    """To the consumer."""

    pull_id: str
    grant: PullGrant


@dataclass(frozen=True, slots=True)
class PullShareChanged:
    """To the consumer: the producer's NIC gives this pull more or less now."""

    pull_id: str
    share_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class PullDenied:
    """To the consumer: the producer refuses, at the start or half-way."""

    pull_id: str
    reason: "DenyReason"


@dataclass(frozen=True, slots=True)
class PullBroken:
    """To the consumer: the producer's connection is gone."""

    pull_id: str


@dataclass(frozen=True, slots=True)
class PullCancelled:
    """To the consumer: the pull that it closed unfinished writes no more into its blocks."""

    pull_id: str


@dataclass(frozen=True, slots=True)
class PullAsked:
    """To the producer: a consumer opened a pull."""

    pull_id: str
    ask: PullAsk


@dataclass(frozen=True, slots=True)
class PullClosed:
    """To the producer: a consumer finished its pull, or went away without finishing."""

    pull_id: str
    is_done: bool


@dataclass(frozen=True, slots=True)
class HeartbeatHeard:
    """To the producer: these prefills are still waited for; transfers, where the engine id is empty."""

    engine_id: str
    request_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ReleaseHeard:
    """To the producer: nobody will fetch this prefill; a transfer, where the engine id is empty."""

    engine_id: str
    request_id: str


@dataclass(frozen=True, slots=True)
class LinkSlowed:
    """The NIC runs at this share of its speed, both ways; 1.0 heals it."""

    factor: float


@dataclass(frozen=True, slots=True)
class StepsSlowed:
    """The engine computes at this share of its speed, the step under way too; 1.0 heals it."""

    factor: float


@dataclass(frozen=True, slots=True)
class ShutDown:
    """Answer every further request with finish reason abort, as vLLM 0.32 does; those under way go on."""


@dataclass(frozen=True, slots=True)
class CacheCleared:
    """Forget the prefix cache."""


ConsumerEvent = (
    HandshakeAnswered
    | HandshakeFailed
    | PullGranted
    | PullShareChanged
    | PullDenied
    | PullBroken
    | PullCancelled
)
ProducerEvent = PullAsked | PullClosed | HeartbeatHeard | ReleaseHeard
EngineEvent = (
    Submit | Abort | Tick | LinkSlowed | StepsSlowed | ShutDown | CacheCleared | ConsumerEvent | ProducerEvent
)


# Effects: what the engine does and asks for.


class RejectReason(StrEnum):
    """Why a request was not taken at all; closed."""

    QUEUE_FULL = "queue-full"
    CONTEXT_TOO_LONG = "context-too-long"
    EMPTY_PROMPT = "empty-prompt"
    ROOM_REQUIRED = "room-required"
    ROOM_TAKEN = "room-taken"
    ID_IN_USE = "id-in-use"


class DenyReason(StrEnum):
    """Why a producer refuses a pull; closed."""

    STALE_ENGINE = "stale-engine"
    UNKNOWN_REQUEST = "unknown-request"
    LEASE_EXPIRED = "lease-expired"
    WRONG_BLOCKS = "wrong-blocks"
    PREFILL_FAILED = "prefill-failed"
    BYTES_FAILED = "bytes-failed"
    ROOM_IN_USE = "room-in-use"


class FailReason(StrEnum):
    """Why a request that was taken ended in an error; closed."""

    HANDSHAKE_FAILED = "handshake-failed"
    INCOMPATIBLE = "incompatible"
    PULL_DENIED = "pull-denied"
    PULL_BROKEN = "pull-broken"
    PULL_TIMEOUT = "pull-timeout"
    DECODE_GONE = "decode-gone"


class FinishReason(StrEnum):
    """How an answer ended, in OpenAI's words and vLLM's; abort is of one that came during a shutdown."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class IssuedTicket:
    """What a prefill leg's answer hands to a consumer; the driver adds where the side channel is."""

    engine_id: str
    request_id: str
    block_ids: tuple[tuple[int, ...], ...]
    token_count: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Rejected:
    """The request was not taken."""

    request_id: str
    reason: RejectReason
    message: str


@dataclass(frozen=True, slots=True)
class TokenOut:
    """One token of an answer.

    Attributes:
        at_s: when its step ended, which may be before the call that returns this.
    """

    request_id: str
    token_id: int
    position: int
    at_s: float


@dataclass(frozen=True, slots=True)
class RequestDone:
    """The request ended well, or was turned away because the engine shuts down.

    Attributes:
        cached_tokens: prompt tokens found in this engine's own cache.
        external_tokens: prompt tokens fetched from a producer.
        scheduled_s: when it first ran or began to fetch.
        ticket: of a prefill leg.
    """

    request_id: str
    finish: FinishReason
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    external_tokens: int
    arrived_s: float
    scheduled_s: float
    first_token_s: float
    at_s: float
    ticket: IssuedTicket | None = None


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """The request ended in an error."""

    request_id: str
    reason: FailReason
    detail: str


@dataclass(frozen=True, slots=True)
class KvChanged:
    """The prefix cache changed, in this order."""

    events: tuple[PoolEvent, ...]
    at_s: float


@dataclass(frozen=True, slots=True)
class AskHandshake:
    """Ask the producer at this address about itself."""

    address: HostPort


@dataclass(frozen=True, slots=True)
class AskPull:
    """Open a pull at a producer."""

    pull_id: str
    address: HostPort
    ask: PullAsk


@dataclass(frozen=True, slots=True)
class ClosePull:
    """Consumer's end of a pull. One that is not done is answered with PullCancelled."""

    pull_id: str
    is_done: bool


@dataclass(frozen=True, slots=True)
class SendHeartbeat:
    address: HostPort
    engine_id: str
    request_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SendRelease:
    address: HostPort
    engine_id: str
    request_id: str


@dataclass(frozen=True, slots=True)
class GrantPull:
    """Producer's consent to a pull."""

    pull_id: str
    grant: PullGrant


@dataclass(frozen=True, slots=True)
class TellShare:
    """Producer's NIC share for a pull under way."""

    pull_id: str
    share_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class DenyPull:
    """Producer's refusal; the pull is over."""

    pull_id: str
    reason: DenyReason


@dataclass(frozen=True, slots=True)
class TransferDone:
    """A pull came to its end on the consumer; for metrics."""

    request_id: str
    transfer_bytes: int
    descriptor_count: int
    transfer_s: float


EngineEffect = (
    Rejected
    | TokenOut
    | RequestDone
    | RequestFailed
    | KvChanged
    | AskHandshake
    | AskPull
    | ClosePull
    | SendHeartbeat
    | SendRelease
    | GrantPull
    | TellShare
    | DenyPull
    | TransferDone
)
