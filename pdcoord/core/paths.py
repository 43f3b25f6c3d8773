"""Paths between prefill and decode endpoints: verdict and breaker of each."""

from dataclasses import dataclass
from enum import StrEnum

from pdcoord.core.fleet import Endpoint, EndpointId, Pool
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
        open_until_s: when a probe may go; meaningful unless closed.
        is_probing: a probe is under way.
    """

    failure_count: int = 0
    open_s: float = 0.0
    open_until_s: float = 0.0
    is_tripped: bool = False
    is_probing: bool = False

    def state(self, now_s: float) -> BreakerState:
        if not self.is_tripped:
            return BreakerState.CLOSED
        return BreakerState.HALF_OPEN if now_s >= self.open_until_s else BreakerState.OPEN

    def lets_pass(self, now_s: float) -> bool:
        if not self.is_tripped:
            return True
        return now_s >= self.open_until_s and not self.is_probing

    def fail(self, weight: int, now_s: float) -> None:
        self.failure_count += weight
        self.is_probing = False
        if self.is_tripped or self.failure_count >= FAILURES_MAX:
            self.is_tripped = True
            self.open_s = min(max(self.open_s * 2.0, OPEN_S_MIN), OPEN_S_MAX)
            self.open_until_s = now_s + self.open_s

    def succeed(self) -> None:
        self.failure_count = 0
        self.is_probing = False
        self.is_tripped = False
        self.open_s = 0.0


class PathTable:
    """Verdicts by pair of pools and breakers by pair of endpoints.

    Only paths that failed since their last success have a breaker, so memory follows trouble, not
    the square of the fleet.
    """

    def __init__(self) -> None:
        self._verdicts: dict[tuple[Side, Side], Verdict] = {}
        self._breakers: dict[tuple[EndpointId, EndpointId], Breaker] = {}

    def verdict(self, prefill: Pool, decode: Pool) -> Verdict:
        """What the layouts of two pools allow; also impossible where the engines differ in dialect."""
        if prefill.engine is not decode.engine:
            return _engines_differ(prefill, decode)
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

    def begin(self, prefill: EndpointId, decode: EndpointId) -> None:
        """A request was sent over this path; where the breaker is tripped it is the probe."""
        breaker = self._breakers.get((prefill, decode))
        if breaker is not None and breaker.is_tripped:
            breaker.is_probing = True

    def succeed(self, prefill: EndpointId, decode: EndpointId) -> None:
        self._breakers.pop((prefill, decode), None)

    def fail(self, prefill: EndpointId, decode: EndpointId, reason: RungReason, now_s: float) -> None:
        """A leg over this path was given up; reasons that are not the path's fault end a probe only."""
        weight = _FAILURES.get(reason, 0)
        if weight:
            self._breakers.setdefault((prefill, decode), Breaker()).fail(weight, now_s)
        else:
            self.abandon(prefill, decode)

    def abandon(self, prefill: EndpointId, decode: EndpointId) -> None:
        """A request over this path ended without telling whether the path works."""
        breaker = self._breakers.get((prefill, decode))
        if breaker is not None:
            breaker.is_probing = False

    def forget(self, endpoint_id: EndpointId) -> None:
        """The endpoint is gone, and with it every path it was part of."""
        for pair in [pair for pair in self._breakers if endpoint_id in pair]:
            del self._breakers[pair]

    def forget_verdicts(self) -> None:
        """Layouts may have changed with a new policy."""
        self._verdicts.clear()


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
