"""Paths between prefill and decode endpoints: verdict and breaker of each."""

from collections import Counter
from collections.abc import Container
from dataclasses import dataclass
from enum import StrEnum

from pdcoord.core.fleet import Endpoint, EndpointId, EngineKind, Pool, Role
from pdcoord.core.request import RequestId
from pdcoord.protocol.errors import RungReason
from transfer.verdict import Side, Verdict, VerdictKind, verdict

FAILURES_MAX = 3
"""Failures in a row that open a path; one timeout may be chance, three in a row are not."""
OPEN_S_MIN = 1.0
OPEN_S_MAX = 60.0
"""How long a path stays open (closed to traffic) before a probe: doubled with each failed probe."""

# Overload is not a failure of the path (an open breaker under load turns a slow fleet into a dead
# one), and neither is anything the decode side did after the KV arrived.
_FAILURES: dict[RungReason, int] = {
    RungReason.PREFILL_UNREACHABLE: FAILURES_MAX,
    RungReason.TARGET_NOT_ALLOWED: FAILURES_MAX,
    RungReason.PREFILL_TIMEOUT: 1,
    RungReason.PREFILL_ERROR: 1,
    RungReason.PREFILL_NO_TICKET: 1,
    RungReason.TRANSFER_FAILED: 1,
    RungReason.TRANSFER_TIMEOUT: 1,
}


class BreakerState(StrEnum):
    """Closed lets traffic pass; half-open lets one request probe."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@dataclass(slots=True)
class Breaker:
    """Circuit breaker of one path.

    Attributes:
        failure_count: failures in a row, weighted.
        open_s: length of the current or last open period.
        open_until_s: when a probe may go; meaningful once tripped.
        probe: the request that probes a tripped path, while it is under way.
    """

    failure_count: int = 0
    open_s: float = 0.0
    open_until_s: float = 0.0
    is_tripped: bool = False
    probe: RequestId | None = None

    def state(self, now_s: float) -> BreakerState:
        if not self.is_tripped:
            return BreakerState.CLOSED
        return BreakerState.HALF_OPEN if now_s >= self.open_until_s else BreakerState.OPEN

    def lets_pass(self, now_s: float) -> bool:
        if not self.is_tripped:
            return True
        return now_s >= self.open_until_s and self.probe is None

    def begin(self, request_id: RequestId) -> None:
        """A request was sent over this path; where it is tripped that is the probe."""
        if self.is_tripped:
            self.probe = request_id

    def fail(self, weight: int, request_id: RequestId, now_s: float) -> None:
        if self.is_tripped and self.probe != request_id:
            # Sent before the path opened: old news, and a burst of it is still one failure.
            return
        self.failure_count += weight
        self.probe = None
        if self.is_tripped or self.failure_count >= FAILURES_MAX:
            self.is_tripped = True
            self.open_s = min(max(self.open_s * 2.0, OPEN_S_MIN), OPEN_S_MAX)
            self.open_until_s = now_s + self.open_s

    def abandon(self, request_id: RequestId) -> None:
        if self.probe == request_id:
            self.probe = None


class PathTable:
    """Verdicts by pair of pools and breakers by pair of endpoints.

    Only paths that failed since their last success have a breaker, so memory follows trouble, not
    the square of the fleet.
    """

    def __init__(self) -> None:
        self._verdicts: dict[tuple[Side, Side], Verdict] = {}
        self._breakers: dict[tuple[EndpointId, EndpointId], Breaker] = {}
        self._tripped_counts: dict[EndpointId, int] = {}

    @property
    def breaker_count(self) -> int:
        return len(self._breakers)

    @property
    def troubled(self) -> Container[EndpointId]:
        """Endpoints with a tripped path; every path of any other lets requests pass."""
        return self._tripped_counts

    def verdict(self, prefill: Pool, decode: Pool) -> Verdict:
        """What the layouts of two pools allow; also impossible where the engines differ in dialect."""
        if prefill.engine is not decode.engine:
            return _engines_differ(prefill, decode)
        if prefill.engine is EngineKind.SGLANG and (prefill.role, decode.role) != _SGLANG_ROLES:
            return _SGLANG_MODES
        pair = (prefill.side, decode.side)
        found = self._verdicts.get(pair)
        if found is None:
            found = self._verdicts[pair] = verdict(*pair)
        return found

    def state(self, prefill: EndpointId, decode: EndpointId, now_s: float) -> BreakerState:
        breaker = self._breakers.get((prefill, decode))
        return BreakerState.CLOSED if breaker is None else breaker.state(now_s)

    def lets_pass(self, prefill: EndpointId, decode: EndpointId, now_s: float) -> bool:
        breaker = self._breakers.get((prefill, decode))
        return breaker is None or breaker.lets_pass(now_s)

    def begin(self, prefill: EndpointId, decode: EndpointId, request_id: RequestId) -> None:
        """A request was sent over this path."""
        breaker = self._breakers.get((prefill, decode))
        if breaker is not None:
            breaker.begin(request_id)

    def succeed(self, prefill: EndpointId, decode: EndpointId) -> None:
        self._drop((prefill, decode))

    def fail(
        self, path: tuple[EndpointId, EndpointId], reason: RungReason, request_id: RequestId, now_s: float
    ) -> None:
        """A leg over this path was given up; reasons that are not the path's fault end a probe only."""
        weight = _FAILURES.get(reason, 0)
        if not weight:
            self.abandon(*path, request_id)
            return
        breaker = self._breakers.setdefault(path, Breaker())
        was_tripped = breaker.is_tripped
        breaker.fail(weight, request_id, now_s)
        if breaker.is_tripped and not was_tripped:
            for endpoint_id in path:
                self._tripped_counts[endpoint_id] = self._tripped_counts.get(endpoint_id, 0) + 1

    def abandon(self, prefill: EndpointId, decode: EndpointId, request_id: RequestId) -> None:
        """A request over this path ended without telling whether the path works."""
        breaker = self._breakers.get((prefill, decode))
        if breaker is not None:
            breaker.abandon(request_id)

    def forget(self, endpoint_id: EndpointId) -> None:
        """The endpoint is gone, and with it every path it was part of."""
        for path in [path for path in self._breakers if endpoint_id in path]:
            self._drop(path)

    def forget_verdicts(self) -> None:
        """Layouts may have changed with a new policy."""
        self._verdicts.clear()

    def validate(self, endpoints: Container[EndpointId], live: Container[RequestId]) -> None:
        """Assert that breakers are of endpoints that exist, and probes of requests under way."""
        counts: Counter[EndpointId] = Counter()
        for path, breaker in self._breakers.items():
            assert all(endpoint_id in endpoints for endpoint_id in path), f"{path}: a breaker of no path"
            assert breaker.probe is None or breaker.is_tripped, f"{path}: a probe of a closed path"
            assert breaker.probe is None or breaker.probe in live, f"{path}: its probe has ended"
            counts.update(path if breaker.is_tripped else ())
        assert counts == self._tripped_counts, "the count of tripped paths is wrong"

    def _drop(self, path: tuple[EndpointId, EndpointId]) -> None:
        breaker = self._breakers.pop(path, None)
        if breaker is None or not breaker.is_tripped:
            return
        for endpoint_id in path:
            left = self._tripped_counts.pop(endpoint_id) - 1
            if left:
                self._tripped_counts[endpoint_id] = left


_SGLANG_ROLES = (Role.PREFILL, Role.DECODE)
# SGLang 0.5.23 starts a worker in one mode: prefill, decode, or null, which serves alone and knows no rooms.
_SGLANG_MODES = Verdict(
    VerdictKind.IMPOSSIBLE,
    "sglang hands over from a prefill worker to a decode worker only, not from or to both",
)


def _engines_differ(prefill: Pool, decode: Pool) -> Verdict:
    return Verdict(
        VerdictKind.IMPOSSIBLE, f"a {prefill.engine} prefill cannot hand over to a {decode.engine} decode"
    )


@dataclass(frozen=True, slots=True)
class PathView:
    """One path as the admin listener shows it."""

    prefill: Endpoint
    decode: Endpoint
    verdict: Verdict
    state: BreakerState
    bandwidth_bytes_per_s: float
    bytes_in_flight: int
