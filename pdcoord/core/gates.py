"""What canaries keep shut: pairs of pools, and single endpoints of a pair that is open."""

from collections import Counter
from collections.abc import Collection

from pdcoord.core.fleet import Endpoint, EndpointId, Pool, PoolName

UNTRIED = "canary-untried"
"""Fault of a pair of pools over which no canary has passed yet."""

PairKey = tuple[PoolName, PoolName]
"""Prefill pool, decode pool; a pool's name is its own over all models."""
EndKey = tuple[PairKey, EndpointId]


class CanaryGates:
    """Shut gates with their faults; what is not here is open.

    Few are shut at a time: pairs of pools are few, and an endpoint is shut only by a canary that failed.
    """

    def __init__(self) -> None:
        self._pairs: dict[PairKey, str] = {}
        self._ends: dict[EndKey, str] = {}
        self._counts: Counter[EndpointId] = Counter()

    @property
    def endpoints(self) -> Collection[EndpointId]:
        """Those that are shut for some pool, though others of their pool are open to it."""
        return self._counts.keys()

    def pair_fault(self, prefill: Pool, decode: Pool) -> str:
        """Why nothing goes from one pool to the other; empty if it may."""
        return self._pairs.get((prefill.name, decode.name), "") if self._pairs else ""

    def end_fault(self, prefill: Endpoint, decode: Endpoint) -> str:
        """Why one of two endpoints is kept from the other's pool; empty if neither is."""
        if not self._ends:
            return ""
        pair = (prefill.pool.name, decode.pool.name)
        return self._ends.get((pair, prefill.id)) or self._ends.get((pair, decode.id), "")

    def fault(self, prefill: Endpoint, decode: Endpoint) -> str:
        """Why a path is shut, for whichever reason; empty if it is open."""
        return self.pair_fault(prefill.pool, decode.pool) or self.end_fault(prefill, decode)

    def set_pair(self, pair: PairKey, fault: str) -> None:
        """Shut a pair of pools, or open it where there is no fault."""
        if fault:
            self._pairs[pair] = fault
        else:
            self._pairs.pop(pair, None)

    def set_end(self, pair: PairKey, endpoint_id: EndpointId, fault: str) -> None:
        """Shut one endpoint for the other pool of the pair, or open it where there is no fault."""
        key = (pair, endpoint_id)
        was_shut = key in self._ends
        if fault:
            self._ends[key] = fault
        else:
            self._ends.pop(key, None)
        self._counts[endpoint_id] += bool(fault) - was_shut
        if not self._counts[endpoint_id]:
            del self._counts[endpoint_id]

    def validate(self) -> None:
        """Assert that endpoints are counted as they are shut."""
        assert self._counts == Counter(endpoint_id for _, endpoint_id in self._ends), (
            "shut ends are miscounted"
        )
