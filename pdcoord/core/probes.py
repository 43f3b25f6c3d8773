"""What a sidecar's probe of a path says, and for how long."""

from dataclasses import dataclass
from enum import StrEnum

from pdcoord.core.costs import PathFigures
from transfer.errors import FailureKind
from transfer.verdict import VerdictKind

STALE_INTERVALS = 3.0
"""Probes missed in a row after which the last one says nothing any more: its sidecar is gone or stuck."""
SLOW_SHARE = 0.5
"""A path is slow below this share of what the policy's links carry. Above it the difference is that of a
single read from many at a time, and no reason to look at the path apart from its twins."""

# The producer or the prober had no room, or the probe was called off: overload is not a failure of the path.
_TELLS_NOTHING = frozenset(
    {
        FailureKind.OVERLOADED,
        FailureKind.STAGING_FULL,
        FailureKind.STAGING_TIMEOUT,
        FailureKind.CANCELLED,
        FailureKind.CLOSED,
    }
)


class ProbeState(StrEnum):
    """What the last probe of a path says now; closed, a label of metrics."""

    GOOD = "good"
    SLOW = "slow"
    SHUT = "shut"
    STALE = "stale"


@dataclass(frozen=True, slots=True)
class Probe:
    """One probe of one path: a handshake and the read of a known pattern.

    Attributes:
        at_s: when it ended, at the latest.
        interval_s: when the next may be expected, at the latest.
        failure: a FailureKind; empty if the pattern came and was right.
        verdict: a VerdictKind as the engines themselves judged; empty if the producer did not answer.
        transport: what really carried the bytes.
        is_degraded: it is not a transport that the engine's settings ask for, such as TCP in place of RoCE.
        latency_s, bandwidth_bytes_per_s: as measured; None where nothing was.
    """

    at_s: float
    interval_s: float
    failure: str = ""
    detail: str = ""
    verdict: str = ""
    verdict_reason: str = ""
    transport: str = ""
    is_degraded: bool = False
    latency_s: float | None = None
    bandwidth_bytes_per_s: float | None = None

    @property
    def tells_nothing(self) -> bool:
        """Whether it ended without saying anything of the path."""
        return self.failure in _TELLS_NOTHING

    @property
    def fault(self) -> str:
        """Why nothing can go over the path: a failure, or `impossible`; empty if something can."""
        if self.failure:
            return self.failure
        return self.verdict if self.verdict == VerdictKind.IMPOSSIBLE else ""

    def is_fresh(self, now_s: float) -> bool:
        return now_s < self.at_s + STALE_INTERVALS * self.interval_s

    def is_slow(self, seeded_bytes_per_s: float, bytes_per_s_min: float) -> bool:
        """Whether the path is so much slower than its links that it is no twin of its pool's others."""
        measured = self.bandwidth_bytes_per_s
        return measured is not None and measured < min(
            seeded_bytes_per_s, max(SLOW_SHARE * seeded_bytes_per_s, bytes_per_s_min)
        )

    def cap(self, seeded: PathFigures) -> PathFigures:
        """The policy's figures, no better than measured."""
        bandwidth, latency = self.bandwidth_bytes_per_s, self.latency_s
        return PathFigures(
            latency_s=seeded.latency_s if latency is None else max(seeded.latency_s, latency),
            bandwidth_bytes_per_s=seeded.bandwidth_bytes_per_s
            if bandwidth is None
            else min(seeded.bandwidth_bytes_per_s, bandwidth),
            spread_share=seeded.spread_share,
        )
