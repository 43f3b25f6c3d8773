"""What two agents say to each other on the side channel: msgpack maps, one a frame.

A consumer dials and sends Hello; the producer answers Welcome or Refusal. The consumer's first Renewal is
answered with Admission. Then it fetches, renews and releases, and the producer offers and denies. A sidecar
dials its own engine's agent to ask for probes. Everything that is compared for equality, or that limits what
is read, stands in the messages themselves.
"""

from typing import Any

import msgspec

from transfer.canonical import Form
from transfer.errors import FailureKind

VERSION = 1
"""Raised whenever a peer of the version before could misunderstand."""

Layout = dict[str, Any]
"""A RankLayout as `wire.rank_layout_to_wire` gives it."""


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """The dialling side tells of itself.

    Attributes:
        nonce: 16 random bytes of this connection.
        epoch: of the process; new at every start.
        layout: None from a sidecar, which moves no KV.
        backends: names in order of preference, each with its metadata.
        host: address by which others reach it; empty if it serves nobody.
    """

    version: int
    nonce: bytes
    engine_id: str
    epoch: str
    layout: Layout | None = None
    backends: tuple[tuple[str, bytes], ...] = ()
    host: str = ""


class Welcome(msgspec.Struct, frozen=True, kw_only=True, tag="welcome"):
    """The dialled side consents.

    Attributes:
        nonce: 16 random bytes of this connection.
        ranks: side channel addresses of all ranks of the engine, by rank.
        backend: which of both sides' backends is used; empty to a sidecar.
        staging_bytes: size of its staging buffer: reads beyond it are malformed.
        verdict: VerdictKind and reason, as the dialled side judges the pair.
    """

    version: int
    nonce: bytes
    engine_id: str
    epoch: str
    rank: int
    ranks: tuple[str, ...]
    layout: Layout
    backend: str = ""
    staging_bytes: int = 0
    verdict: tuple[str, str] = ("", "")
    heartbeat_s: float = 5.0


class Admission(msgspec.Struct, frozen=True, kw_only=True, tag="admission"):
    """What opens the dialled side's staging: sent when the dialling side has proved itself in this session.

    A Hello can be recorded and sent again; the Renewal that must follow the Welcome is signed with the
    session's own key. Whoever is admitted can read all of the staging buffer, if it knows where to look.

    Attributes:
        metadata: of the backend that Welcome named, of the dialled side; empty to a sidecar.
    """

    metadata: bytes = b""


class Refusal(msgspec.Struct, frozen=True, kw_only=True, tag="refusal"):
    """The dialled side does not consent; it closes the connection after this."""

    kind: FailureKind
    detail: str = ""


class Fetch(msgspec.Struct, frozen=True, kw_only=True, tag="fetch"):
    """See vocabulary.FetchAsked."""

    transfer: str
    nonce: bytes
    prompt_hash: bytes
    first_token: int
    reader_count: int
    wait_s: float


class WirePart(msgspec.Struct, frozen=True, kw_only=True):
    """See vocabulary.StagedPart."""

    form: Form
    group: int
    head_first: int
    head_count: int
    token_first: int
    token_count: int
    offset: int
    length_bytes: int
    digest: bytes


class Offer(msgspec.Struct, frozen=True, kw_only=True, tag="offer"):
    """See vocabulary.SendOffer."""

    transfer: str
    parts: tuple[WirePart, ...]
    token_count: int
    is_last: bool


class Denial(msgspec.Struct, frozen=True, kw_only=True, tag="denial"):
    """See vocabulary.SendDenial."""

    transfer: str
    kind: FailureKind
    detail: str = ""


class Renewal(msgspec.Struct, frozen=True, kw_only=True, tag="renewal"):
    """See vocabulary.RenewAsked."""

    transfers: tuple[str, ...]


class Done(msgspec.Struct, frozen=True, kw_only=True, tag="done"):
    """See vocabulary.DoneHeard."""

    transfer: str
    nonce: bytes
    prompt_hash: bytes
    reader_count: int


class ProbeAsk(msgspec.Struct, frozen=True, kw_only=True, tag="probe-ask"):
    """From a sidecar to its own engine's agent: connect this producer, read a pattern from it, and tell."""

    address: str
    timeout_s: float


class ProbeTold(msgspec.Struct, frozen=True, kw_only=True, tag="probe-told"):
    """How a probe went.

    Attributes:
        failure: empty if the pattern came and was right.
        verdict: VerdictKind; empty if the producer could not be asked.
        transport: what really carried the bytes, such as `nixl/UCX rc_mlx5` or `tcp`.
        is_degraded: the transport is not one that the settings asked for, such as TCP in place of RoCE.
    """

    address: str
    failure: str = ""
    detail: str = ""
    verdict: str = ""
    verdict_reason: str = ""
    backend: str = ""
    transport: str = ""
    is_degraded: bool = False
    latency_s: float | None = None
    bytes_per_s: float | None = None
    epoch: str = ""


class PatternAsk(msgspec.Struct, frozen=True, kw_only=True, tag="pattern-ask"):
    """From a consumer to a producer: where may I read a known pattern of at most this size?"""

    length_bytes: int


class PatternTold(msgspec.Struct, frozen=True, kw_only=True, tag="pattern-told"):
    """A piece of the staging buffer whose bytes are `digest.pattern(epoch, length)`."""

    offset: int
    length_bytes: int
    digest: bytes


Message = (
    Hello
    | Welcome
    | Admission
    | Refusal
    | Fetch
    | Offer
    | Denial
    | Renewal
    | Done
    | ProbeAsk
    | ProbeTold
    | PatternAsk
    | PatternTold
)
