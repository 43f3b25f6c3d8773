"""A NIC shared fairly by the transfers on it, in whatever time the caller keeps."""

import math
from dataclasses import dataclass

# A transfer is done when what is left would take less than this: floats of a clock that has run
# for weeks resolve no finer.
_DONE_S = 1e-6


@dataclass(slots=True)
class _Flow:
    bytes_left: float
    peer_share: float


class Nic:
    """One direction of one NIC; each of n flows gets an n-th of it.

    A flow moves at the least of its share here and its share on the other side's NIC, of which the
    other side tells. A producer's flow only takes up its share: the consumer counts the bytes.
    Unused share is not given to others, as with per-flow pacing on RoCE.

    Attributes:
        factor: 1.0 when healthy; a slow link has less.
    """

    def __init__(self, bytes_per_s: float) -> None:
        if bytes_per_s <= 0.0:
            raise ValueError(f"bytes_per_s is {bytes_per_s}, expected more than 0")
        self.bytes_per_s = bytes_per_s
        self.factor = 1.0
        self._flows: dict[str, _Flow] = {}
        self._at_s = 0.0

    def __len__(self) -> int:
        return len(self._flows)

    def __contains__(self, flow_id: str) -> bool:
        return flow_id in self._flows

    @property
    def flow_ids(self) -> tuple[str, ...]:
        return tuple(self._flows)

    @property
    def share_bytes_per_s(self) -> float:
        """What each flow gets now, or the first one would."""
        return self.bytes_per_s * self.factor / max(1, len(self._flows))

    def begin(
        self, flow_id: str, now_s: float, bytes_left: float = math.inf, peer_share: float = math.inf
    ) -> None:
        """Add a flow; endless until `end` if no size is given.

        Raises:
            ValueError: if the id is in use or the size is negative.
        """
        if flow_id in self._flows:
            raise ValueError(f"flow {flow_id!r} is already on this NIC")
        if bytes_left < 0.0:
            raise ValueError(f"bytes_left is {bytes_left}, expected at least 0")
        self._move(now_s)
        self._flows[flow_id] = _Flow(bytes_left, peer_share)

    def set_peer_share(self, flow_id: str, peer_share: float, now_s: float) -> None:
        """The other side's share changed; an unknown flow has just ended and is passed over."""
        self._move(now_s)
        flow = self._flows.get(flow_id)
        if flow is not None:
            flow.peer_share = peer_share

    def set_factor(self, factor: float, now_s: float) -> None:
        """Slow the link down or heal it.

        Raises:
            ValueError: if the factor is not in (0, 1].
        """
        if not 0.0 < factor <= 1.0:
            raise ValueError(f"factor is {factor}, expected more than 0 and at most 1")
        self._move(now_s)
        self.factor = factor

    def end(self, flow_id: str, now_s: float) -> None:
        """Take a flow off, finished or not; an unknown one is passed over."""
        self._move(now_s)
        self._flows.pop(flow_id, None)

    def advance(self, now_s: float) -> list[str]:
        """Take finished flows off and name them, in the order they began."""
        self._move(now_s)
        share = self.share_bytes_per_s
        done = [
            flow_id
            for flow_id, flow in self._flows.items()
            if flow.bytes_left <= _DONE_S * min(share, flow.peer_share)
        ]
        for flow_id in done:
            del self._flows[flow_id]
        return done

    def next_completion_s(self) -> float | None:
        """When the first flow will be done if nothing changes; None if none will."""
        share = self.share_bytes_per_s
        waits = [
            flow.bytes_left / min(share, flow.peer_share)
            for flow in self._flows.values()
            if math.isfinite(flow.bytes_left) and flow.peer_share > 0.0
        ]
        return self._at_s + min(waits) if waits else None

    def _move(self, now_s: float) -> None:
        elapsed_s = now_s - self._at_s
        if elapsed_s <= 0.0:
            return
        share = self.share_bytes_per_s
        for flow in self._flows.values():
            flow.bytes_left = max(0.0, flow.bytes_left - elapsed_s * min(share, flow.peer_share))
        self._at_s = now_s
