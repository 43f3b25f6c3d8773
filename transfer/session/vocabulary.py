"""The words of a session: what can happen to staged and to loaded KV, and what is ordered done.

One rank's `Outbox` (session/outbox.py) is the producer's side, its `Inbox` (session/inbox.py) the consumer's.
Both are `handle(event, now_s) -> list[Action]`; the agent does what they order and tells them what happened.
"""

from dataclasses import dataclass
from typing import NewType

from transfer.canonical import PartShape, TokenRange
from transfer.errors import Failure
from transfer.layout import RankLayout

TransferId = NewType("TransferId", str)
"""Names one hand-over, 32 hexadecimal digits from a cryptographic source; minted by whoever starts it."""

Tables = tuple[tuple[int, ...], ...]
"""A request's block ids by KV cache group: token t is in block `table[t // block_tokens]`.

0 or a negative number stands for a block that the group no longer keeps (sliding window).
"""


@dataclass(frozen=True, slots=True)
class Proof:
    """What a consumer must know to be given a transfer's KV.

    Attributes:
        nonce: 16 random bytes of this transfer.
        prompt_hash: `digest.prompt_hash` of the prompt's token ids (and what else makes KV differ).
    """

    nonce: bytes
    prompt_hash: bytes


@dataclass(frozen=True, slots=True)
class StagedPart:
    """One part in a producer's staging buffer.

    Attributes:
        offset: from the start of the staging buffer.
        digest: 16 bytes over the part, taken when it was packed.
    """

    shape: PartShape
    offset: int
    length_bytes: int
    digest: bytes


# The producer's side. Events.


@dataclass(frozen=True, slots=True)
class Opened:
    """The engine took a prefill whose KV is to be handed over."""

    transfer: TransferId
    request: str
    proof: Proof
    token_count: int


@dataclass(frozen=True, slots=True)
class ChunkComputed:
    """These tokens' KV stands in the engine's blocks, after all earlier tokens of the transfer.

    Attributes:
        is_last: the prefill is complete with these; `tokens.count` may then be 0.
    """

    transfer: TransferId
    tokens: TokenRange
    tables: Tables
    is_last: bool


@dataclass(frozen=True, slots=True)
class Packed:
    """A Pack was carried out."""

    transfer: TransferId
    chunk: int
    digests: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class PackFailed:
    """A Pack could not be carried out."""

    transfer: TransferId
    chunk: int
    detail: str


@dataclass(frozen=True, slots=True)
class Aborted:
    """The engine gave the prefill up, or takes its blocks back: what is not packed yet is never offered."""

    transfer: TransferId


@dataclass(frozen=True, slots=True)
class FetchAsked:
    """A consumer rank wants a transfer, perhaps before the engine has opened it.

    Attributes:
        consumer: names the rank's connection; new at every connect.
        first_token: parts that end at or before it are not wanted.
        reader_count: ranks of the consumer that will read from this rank.
        wait_s: how long the consumer is ready to wait for the first part.
    """

    consumer: str
    transfer: TransferId
    proof: Proof
    first_token: int
    reader_count: int
    is_layout_equal: bool
    wait_s: float


@dataclass(frozen=True, slots=True)
class RenewAsked:
    """A consumer rank still waits for these."""

    consumer: str
    transfers: tuple[TransferId, ...]


@dataclass(frozen=True, slots=True)
class DoneHeard:
    """A consumer rank has all it wants of a transfer, or wants none of it any more.

    Attributes:
        reader_count: as in FetchAsked, for a rank that never fetched.
    """

    consumer: str
    transfer: TransferId
    proof: Proof
    reader_count: int


@dataclass(frozen=True, slots=True)
class ConsumerGone:
    """A consumer's connection is closed; its reads are over."""

    consumer: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; due at `deadline_s`."""


OutboxEvent = (
    Opened
    | ChunkComputed
    | Packed
    | PackFailed
    | Aborted
    | FetchAsked
    | RenewAsked
    | DoneHeard
    | ConsumerGone
    | Tick
)


# Actions.


@dataclass(frozen=True, slots=True)
class Slot:
    """A part to be packed, and where."""

    shape: PartShape
    offset: int
    length_bytes: int


@dataclass(frozen=True, slots=True)
class Pack:
    """Copy tokens from the engine's blocks into these slots and answer Packed or PackFailed.

    Until then neither the blocks nor the slots are given to anyone else.
    """

    transfer: TransferId
    chunk: int
    slots: tuple[Slot, ...]
    tables: Tables


@dataclass(frozen=True, slots=True)
class SendOffer:
    """Tell a consumer of parts that it may read now.

    Attributes:
        token_count: of the whole prompt.
        is_last: no more parts will come.
    """

    consumer: str
    transfer: TransferId
    parts: tuple[StagedPart, ...]
    token_count: int
    is_last: bool


@dataclass(frozen=True, slots=True)
class SendDenial:
    """Tell a consumer that it will get nothing, or nothing more, of a transfer."""

    consumer: str
    transfer: TransferId
    failure: Failure


@dataclass(frozen=True, slots=True)
class BlocksFree:
    """The engine's own blocks of this request are read no more; exactly once per Opened."""

    request: str


@dataclass(frozen=True, slots=True)
class TransferEnded:
    """The staging memory of a transfer is free again; exactly once per Opened.

    Attributes:
        failure: None if every reader was done.
    """

    transfer: TransferId
    failure: Failure | None


@dataclass(frozen=True, slots=True)
class DropConsumer:
    """Close a consumer's connection and answer ConsumerGone: it holds memory of a transfer that is over."""

    consumer: str


OutboxAction = Pack | SendOffer | SendDenial | BlocksFree | TransferEnded | DropConsumer


# The consumer's side. Events.


@dataclass(frozen=True, slots=True)
class LoadAsked:
    """The engine wants a prompt's KV in its blocks.

    Attributes:
        address: side channel of the producer's rank 0, `host:port`.
        epoch: the producer's, from the ticket; empty if the ticket was minted before the producer was known.
        tokens: what is missing here. A count of 0 means that nothing is, and the producer is only released.
        wait_s: longest time from now to the last unpacked part.
    """

    request: str
    transfer: TransferId
    proof: Proof
    address: str
    epoch: str
    tables: Tables
    tokens: TokenRange
    wait_s: float


@dataclass(frozen=True, slots=True)
class LoadCancelled:
    """The engine no longer wants it; a Report still comes, and only then may its blocks be reused."""

    request: str


@dataclass(frozen=True, slots=True)
class Source:
    """A producer rank that is connected and holds heads that this rank needs.

    Attributes:
        id: names the connection; new at every connect.
        reader_count: ranks of this consumer that read from it.
        staging_bytes: size of its staging buffer, from its Welcome; parts beyond it are malformed.
    """

    id: str
    layout: RankLayout
    reader_count: int
    staging_bytes: int


@dataclass(frozen=True, slots=True)
class PeerReady:
    """A producer's ranks are connected; `sources` are those that this rank reads from."""

    address: str
    epoch: str
    sources: tuple[Source, ...]


@dataclass(frozen=True, slots=True)
class PeerFailed:
    """A producer cannot be connected, or is not what it should be."""

    address: str
    failure: Failure


@dataclass(frozen=True, slots=True)
class Offered:
    """A source has parts for us; see SendOffer."""

    source: str
    transfer: TransferId
    parts: tuple[StagedPart, ...]
    token_count: int
    is_last: bool


@dataclass(frozen=True, slots=True)
class Denied:
    """A source gives nothing, or nothing more."""

    source: str
    transfer: TransferId
    failure: Failure


@dataclass(frozen=True, slots=True)
class SourceLost:
    """A source's connection is gone. Reads from it still end with PartArrived or PartFailed."""

    source: str
    failure: Failure


@dataclass(frozen=True, slots=True)
class PartArrived:
    """A ReadPart ended well: the bytes are in the landing place and nobody writes there any more."""

    request: str
    part: int
    read: int


@dataclass(frozen=True, slots=True)
class PartFailed:
    """A ReadPart or an Unpack ended badly, and nobody writes to its places any more.

    Attributes:
        read: the number of the ReadPart; 0 of an Unpack.
    """

    request: str
    part: int
    failure: Failure
    read: int = 0


@dataclass(frozen=True, slots=True)
class PartUnpacked:
    """An Unpack ended well."""

    request: str
    part: int


InboxEvent = (
    LoadAsked
    | LoadCancelled
    | PeerReady
    | PeerFailed
    | Offered
    | Denied
    | SourceLost
    | PartArrived
    | PartFailed
    | PartUnpacked
    | Tick
)


# Actions.


@dataclass(frozen=True, slots=True)
class Connect:
    """Connect the producer at this address, all ranks that are needed; answer PeerReady or PeerFailed."""

    address: str


@dataclass(frozen=True, slots=True)
class SendFetch:
    """Ask a source for a transfer; Offered or Denied come back, more than one Offered perhaps."""

    source: str
    transfer: TransferId
    proof: Proof
    first_token: int
    reader_count: int
    wait_s: float


@dataclass(frozen=True, slots=True)
class ReadPart:
    """Read a part into staging memory; answer PartArrived or PartFailed.

    Attributes:
        read: a number that no other read of this rank has; goes into the answer.
        landing: offset in this rank's staging buffer.
    """

    request: str
    part: int
    read: int
    source: str
    remote_offset: int
    landing: int
    length_bytes: int
    wait_s: float


@dataclass(frozen=True, slots=True)
class Unpack:
    """Verify the digest of a part that arrived, then put its tokens into the blocks.

    Answer PartUnpacked, or PartFailed with WRONG_DIGEST (nothing was written) or UNPACK_FAILED.

    Attributes:
        source: the producer rank's layout, which says how the part is to be read.
        tokens: those of the part that are wanted.
    """

    request: str
    part: int
    shape: PartShape
    source: RankLayout
    landing: int
    length_bytes: int
    digest: bytes
    tables: Tables
    tokens: TokenRange


@dataclass(frozen=True, slots=True)
class SendDone:
    """Tell a source that nothing more is wanted of a transfer, come what may."""

    source: str
    transfer: TransferId
    proof: Proof
    reader_count: int


@dataclass(frozen=True, slots=True)
class SendRenewal:
    """Tell a source which transfers are still waited for."""

    source: str
    transfers: tuple[TransferId, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """Tell the engine how a load ended; exactly once per LoadAsked, when its blocks are not written any more.

    Attributes:
        failure: None if every wanted token is in the blocks.
    """

    request: str
    failure: Failure | None
    loaded_bytes: int


InboxAction = Connect | SendFetch | ReadPart | Unpack | SendDone | SendRenewal | Report
