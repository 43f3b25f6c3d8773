"""What travels on the control stream of a sidecar and a coordinator, and how each proves itself."""

import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.paths import PathReport
from pdcoord.protocol.plans import PlannedLoad, ServedHeader

CONTROL_VERSION = 1
METHOD = "/pdcoord.control.v1.Control/Report"
"""What the sidecar calls: a stream of SidecarMessage for a stream of CoordinatorMessage."""
NONCE_BYTES = 16
KEY_BYTES_MIN = 16
EVENTS_MAX = 512
"""Events in one message."""
REQUESTS_MAX = 8_192
"""Requests under way that one sidecar tells of."""
TARGETS_MAX = 16_384
"""Prefill targets that one sidecar is told of."""
PART_BYTES = 1 << 20
"""A longer message is sent in parts, each of which is longer by one entry at most."""
MESSAGE_BYTES_MAX = 4 << 20
HEARTBEAT_S = 2.0
"""Longest silence of either side; three times as long, and the other takes the stream for lost."""
LOST_S = 3.0 * HEARTBEAT_S


class ControlLegKind(StrEnum):
    """Which half of a request a leg is."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class SidecarHello:
    """The sidecar's first message.

    Attributes:
        address: as endpoints name this sidecar.
        epoch: of this life of its process.
    """

    version: int
    name: str
    address: HostPort
    epoch: str
    nonce: bytes


@dataclass(frozen=True, slots=True)
class SidecarProof:
    """That it knows the shared key; empty where it has none."""

    proof: bytes


@dataclass(frozen=True, slots=True)
class RequestBegan:
    """A request is being served.

    Attributes:
        ordinal: grows with each request of one epoch.
        prefill: the planned prefill endpoint; None when colocated.
        is_sequential: KV moves after the prefill has answered, so that `transfer_ms` is the transfer's.
        has_output: its output has begun; in snapshots only.
        age_s: since it began, when the message was made.
    """

    ordinal: int
    load: PlannedLoad
    prefill: HostPort | None = None
    is_streamed: bool = True
    is_sequential: bool = True
    has_output: bool = False
    age_s: float = 0.0


@dataclass(frozen=True, slots=True)
class LegBegan:
    """A leg was sent.

    Attributes:
        prefill: the prefill endpoint of this attempt, for decode legs too; None when colocated.
    """

    ordinal: int
    leg: int
    kind: ControlLegKind
    prefill: HostPort | None


@dataclass(frozen=True, slots=True)
class LegEnded:
    """A leg is over.

    Attributes:
        outcome: ok, cancelled, rejected, or the reason of the rung.
    """

    ordinal: int
    leg: int
    kind: ControlLegKind
    prefill: HostPort | None
    outcome: str
    took_s: float


@dataclass(frozen=True, slots=True)
class OutputBegan:
    """The first output is on its way to the client: the prompt is computed, and its KV has come."""

    ordinal: int
    served: ServedHeader


@dataclass(frozen=True, slots=True)
class RequestEnded:
    """A request is over.

    Attributes:
        served: what was done, where its output never began.
    """

    ordinal: int
    outcome: str
    served: ServedHeader | None = None


LoadEvent = RequestBegan | LegBegan | LegEnded | OutputBegan | RequestEnded


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All requests that the sidecar is serving, oldest first: whatever was told before is void.

    Attributes:
        has_more: this is not the last part; nothing counts before that has come.
    """

    requests: tuple[RequestBegan, ...] = ()
    has_more: bool = False


@dataclass(frozen=True, slots=True)
class Events:
    """What happened since, in order; none at all is a sign of life."""

    events: tuple[LoadEvent, ...] = ()


@dataclass(frozen=True, slots=True)
class PathFacts:
    """Probes of paths that were not told before on this stream."""

    interval_s: float
    is_agent_up: bool
    paths: tuple[PathReport, ...] = ()


SidecarMessage = SidecarHello | SidecarProof | Snapshot | Events | PathFacts


@dataclass(frozen=True, slots=True)
class CoordinatorHello:
    """The coordinator's first message.

    Attributes:
        replica: the process, as its plans name it.
        proof: that it knows the shared key; empty where it has none.
    """

    version: int
    replica: str
    nonce: bytes
    proof: bytes


@dataclass(frozen=True, slots=True)
class Target:
    """A prefill target as a coordinator sees the path from it.

    Attributes:
        verdict: a VerdictKind, with its reason.
        breaker: closed, open or half-open.
    """

    address: HostPort
    verdict: str
    verdict_reason: str
    breaker: str
    bootstrap_port: int | None = None
    kv_port: int | None = None

    @property
    def is_shut(self) -> bool:
        """Whether the coordinator would send nothing over this path now."""
        return self.breaker == "open" or self.verdict == "impossible"


@dataclass(frozen=True, slots=True)
class Targets:
    """Prefill targets that changed; none at all is a sign of life.

    Attributes:
        decodes: decode endpoints at which the sidecar's streams may go on, those that are new.
        decodes_removed: those that are gone.
        is_whole: what was told before is void.
        has_more: this is not the last part; nothing counts before that has come.
    """

    changed: tuple[Target, ...] = ()
    removed: tuple[HostPort, ...] = ()
    is_whole: bool = False
    has_more: bool = False
    decodes: tuple[HostPort, ...] = ()
    decodes_removed: tuple[HostPort, ...] = ()

    @property
    def has_news(self) -> bool:
        """Whether it is more than a sign of life."""
        return bool(self.is_whole or self.changed or self.removed or self.decodes or self.decodes_removed)


CoordinatorMessage = CoordinatorHello | Targets


class ControlError(ValueError):
    """A message that cannot be read, or that no peer of this version sends."""


class ControlVersionError(ControlError):
    """The other side speaks another version."""

    def __init__(self, version: int) -> None:
        super().__init__(
            f"the control stream's version is {version}, expected {CONTROL_VERSION}: run sidecars and "
            "coordinators of one release"
        )
        self.version = version


def joined(parts: Sequence[Targets]) -> Targets | None:
    """What the parts of one message say together; None while the last has not come.

    Raises:
        ControlError: if they name more than one sidecar is told of.
    """
    last = parts[-1]
    if len(parts) == 1 and not last.has_more:
        return last
    lists = [(part.changed, part.removed, part.decodes, part.decodes_removed) for part in parts]
    counts = [sum(map(len, column)) for column in zip(*lists, strict=True)]
    if max(counts) > TARGETS_MAX or len(parts) > TARGETS_MAX:
        raise ControlError(f"a message has more than {TARGETS_MAX} targets")
    if last.has_more:
        return None
    return Targets(
        changed=tuple(target for part in parts for target in part.changed),
        removed=tuple(address for part in parts for address in part.removed),
        is_whole=parts[0].is_whole,
        decodes=tuple(address for part in parts for address in part.decodes),
        decodes_removed=tuple(address for part in parts for address in part.decodes_removed),
    )


def sidecar_proof(key: bytes, hello: SidecarHello, answer: CoordinatorHello) -> bytes:
    """What shows a coordinator that a sidecar knows the key; empty with an empty key."""
    parts = (b"sidecar", hello.nonce, answer.nonce, hello.address.encode(), hello.epoch.encode())
    return _proof(key, (*parts, hello.name.encode()))


def coordinator_proof(key: bytes, hello: SidecarHello, nonce: bytes, replica: str) -> bytes:
    """What shows a sidecar that a coordinator knows the key; empty with an empty key."""
    return _proof(key, (b"coordinator", hello.nonce, nonce, hello.address.encode(), replica.encode()))


def is_proof(given: bytes, expected: bytes) -> bool:
    """Compare in constant time."""
    return hmac.compare_digest(given, expected)


def _proof(key: bytes, parts: tuple[bytes, ...]) -> bytes:
    if not key:
        return b""
    told = b"".join(len(part).to_bytes(4, "big") + part for part in (b"pdcoord-control-1", *parts))
    return hmac.digest(key, told, "sha256")
