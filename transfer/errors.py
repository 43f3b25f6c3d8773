"""The errors of transfer, cut by what the caller does next.

TransferError
├── LayoutError        a layout is malformed or cannot be learned: fix the policy or the engine
├── SettingError       a setting cannot work on this node: mend it before anything starts
├── FrameError         bytes on the side channel are not what it speaks: drop the connection
│   └── NotAuthenticatedError  the other side has no key, or another one: refuse it, mend the settings
└── BackendError       bytes could not be moved: give the transfer up
    ├── PeerLostError      the peer is gone: forget it, connect again
    └── ReadTimeoutError   the read did not end in time: forget the peer, connect again

How one transfer ended is no exception but a `Failure` with a `FailureKind`.
"""

from dataclasses import dataclass
from enum import StrEnum


class TransferError(Exception):
    """Base of everything transfer raises on purpose."""


class LayoutError(TransferError):
    """A layout field has a value no engine can have.

    Attributes:
        field: the name of the offending field.
        value: what was given.
    """

    def __init__(self, field: str, value: object, expected: str) -> None:
        super().__init__(f"{field} is {value!r}, expected {expected}")
        self.field = field
        self.value = value


class SettingError(TransferError):
    """A setting is wrong, or names what this node does not have.

    Attributes:
        field: the setting's name.
        value: what was given.
        remedy: what to give or install instead.
    """

    def __init__(self, field: str, value: object, remedy: str) -> None:
        super().__init__(f"{field} is {value!r}: {remedy}")
        self.field = field
        self.value = value
        self.remedy = remedy


class FrameError(TransferError):
    """A frame is too long, malformed, out of order or wrongly signed."""


class NotAuthenticatedError(FrameError):
    """A frame is not signed where a key is set, is signed where none is, or its signature is wrong."""


class BackendError(TransferError):
    """A backend could not move bytes."""


class PeerLostError(BackendError):
    """The peer of a read is gone or was forgotten."""


class ReadTimeoutError(BackendError):
    """A read did not end before its deadline."""


class FailureKind(StrEnum):
    """Why a transfer did not happen; closed, the reason label of metrics."""

    UNREACHABLE = "unreachable"
    HANDSHAKE_TIMEOUT = "handshake-timeout"
    NOT_AUTHENTICATED = "not-authenticated"
    VERSION_MISMATCH = "version-mismatch"
    IMPOSSIBLE_LAYOUT = "impossible-layout"
    STALE_EPOCH = "stale-epoch"
    UNKNOWN_TRANSFER = "unknown-transfer"
    REPLAYED_TICKET = "replayed-ticket"
    WRONG_NONCE = "wrong-nonce"
    WRONG_PROMPT = "wrong-prompt"
    LEASE_EXPIRED = "lease-expired"
    STAGING_FULL = "staging-full"
    STAGING_TIMEOUT = "staging-timeout"
    PREFILL_ABORTED = "prefill-aborted"
    PACK_FAILED = "pack-failed"
    READ_FAILED = "read-failed"
    PEER_LOST = "peer-lost"
    WRONG_DIGEST = "wrong-digest"
    TRANSFER_TIMEOUT = "transfer-timeout"
    UNPACK_FAILED = "unpack-failed"
    MALFORMED = "malformed"
    OVERLOADED = "overloaded"
    NOT_A_CONSUMER = "not-a-consumer"
    CANCELLED = "cancelled"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Failure:
    """How a transfer failed; `detail` is for logs and never holds prompt, ticket or key."""

    kind: FailureKind
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}" if self.detail else str(self.kind)
