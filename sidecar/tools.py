"""What every request of a process is served with, and a request as it may go to an engine."""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import PlannedLoad
from pdcoord.protocol.signing import Steering
from pdcoord.resume.tape import Shelf
from pdcoord.wire.client import Client
from pdcoord.wire.errors import BodyTooLargeError, ConnectError, HeadTimeoutError, ResetError, WireError
from pdcoord.wire.plankeys import PlanKeysFile
from pdcoord.wire.reading import Readers
from pdcoord.wire.tracing import Tracing
from sidecar import dialects
from sidecar.guard import LEG, PREFILL_LEG, Headers
from sidecar.observe import Metrics
from sidecar.reporter import Reporter
from sidecar.vocabulary import Fault

TAPE_BYTES_MAX = 8 << 20
"""What is kept of one stream that may have to be continued: 300 bytes for each of 27,000 tokens."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What every exchange of a process shares.

    Attributes:
        rng: draws SGLang's rooms and pdcoord's pairings; cryptographic, since others share the engines.
        kv_port: KV side channel of a prefill target that names none.
        shelf: bounds what is kept of all streams that may have to be continued.
        tracing: makes spans of generative calls; None where nothing is traced.
        reporter: tells coordinators of requests; None where there is no control stream.
        keys: sign legs that go to other sidecars; None where nothing is signed.
        readers: read the streams that broke off.
    """

    client: Client
    engine: HostPort
    metrics: Metrics
    rng: Random
    bootstrap_port: int
    kv_port: int
    now_s: Callable[[], float]
    shelf: Shelf
    tracing: Tracing | None = None
    reporter: Reporter | None = None
    keys: PlanKeysFile | None = None
    readers: Readers = field(default_factory=Readers)

    def prefill_headers(self, target: str, request_id: bytes) -> Headers:
        """What says that a POST is a prefill leg, to the sidecar that may stand before the engine."""
        what = Steering(b"POST", target.encode("latin-1"), request_id, leg=PREFILL_LEG)
        return [(LEG, PREFILL_LEG), *self.signed(what)]

    def signed(self, what: Steering) -> Headers:
        """The signature of what steers another sidecar, as headers; none where nothing is signed."""
        return [] if self.keys is None else self.keys.headers(what)


@dataclass(frozen=True, slots=True)
class Call:
    """One request as it may go to an engine.

    Attributes:
        target: path and query.
        headers: filtered by `guard.for_engine`.
        raw: the body, with nothing in it that no client may set.
        body: the same, read; None for a call that is not generative.
        load: what the plan says that it costs, if there is one.
    """

    method: str
    target: str
    headers: Headers
    raw: bytes
    request_id: bytes
    body: dialects.ClientBody | None = None
    load: PlannedLoad | None = None


def fault_of(error: WireError, *, has_head: bool) -> Fault:
    """How a leg failed, as the machine is told."""
    match error:
        case ConnectError():
            return Fault.UNREACHABLE
        case HeadTimeoutError():
            return Fault.TIMED_OUT
        case ResetError():
            return Fault.LOST_BEFORE_HEAD
        case BodyTooLargeError():
            return Fault.MALFORMED
        case _:
            return Fault.LOST_IN_BODY if has_head else Fault.MALFORMED
