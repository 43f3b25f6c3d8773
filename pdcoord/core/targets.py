"""What sidecars are told of: prefill targets, with verdict and breaker of each path, and their own peers."""

from collections.abc import Mapping

from pdcoord.core.fleet import Endpoint, EndpointState, Fleet
from pdcoord.core.paths import BreakerState, PathTable
from pdcoord.protocol.control import TARGETS_MAX, Target
from pdcoord.protocol.headers import HostPort


class TargetLists:
    """What sidecars may dial, by the sidecar's address.

    Attributes:
        generation: changes with the fleet; a list of an endpoint without trouble changes only with it.
    """

    def __init__(self, fleet: Fleet, paths: PathTable) -> None:
        self.generation = 0
        self._fleet = fleet
        self._paths = paths
        self._listed: list[Endpoint] = []

    def look(self) -> None:
        """Take note of a changed fleet."""
        listed = [state.endpoint for state in self._fleet.states()]
        if listed != self._listed:
            self._listed = listed
            self.generation += 1

    def is_troubled(self, sidecar: HostPort) -> bool:
        """Whether a path into what is at that address is tripped, shut or slow."""
        return any(state.endpoint.id in self._paths.troubled for state in self._fleet.at(sidecar))

    def of(self, sidecar: HostPort, now_s: float) -> dict[HostPort, Target]:
        """Every prefill target of the models that are served there, at most TARGETS_MAX.

        An address that serves several models is listed once, as the model that may use it sees it.
        """
        found: dict[HostPort, Target] = {}
        for decode in self._fleet.at(sidecar):
            if not decode.endpoint.pool.can_decode:
                continue
            for group in self._fleet.groups(decode.endpoint.pool.model):
                if not group.pool.can_prefill:
                    continue
                for prefill in group.states():
                    address = prefill.endpoint.address
                    known = found.get(address)
                    is_new = known is None and len(found) < TARGETS_MAX and address != sidecar
                    if is_new or (known is not None and known.is_shut):
                        found[address] = self._target(prefill, decode, now_s)
        return found

    def peers(self, sidecar: HostPort) -> frozenset[HostPort]:
        """The other decode endpoints of the pools that are served there, at most TARGETS_MAX.

        A stream may go on there: pools are of one layout, so the plan's prefill endpoints suit them too.
        """
        found: set[HostPort] = set()
        for decode in self._fleet.at(sidecar):
            pool = decode.endpoint.pool
            if not pool.can_decode:
                continue
            for group in self._fleet.groups(pool.model):
                if group.pool == pool:
                    found.update(state.endpoint.address for state in group.states())
        found.discard(sidecar)
        return frozenset(sorted(found)[:TARGETS_MAX] if len(found) > TARGETS_MAX else found)

    def _target(self, prefill: EndpointState, decode: EndpointState, now_s: float) -> Target:
        endpoint = prefill.endpoint
        verdict = self._paths.verdict(endpoint.pool, decode.endpoint.pool)
        state = BreakerState.CLOSED
        if endpoint.id in self._paths.troubled:
            state = self._paths.state(endpoint.id, decode.endpoint.id, now_s)
        return Target(
            address=endpoint.address,
            verdict=verdict.kind,
            verdict_reason=verdict.reason,
            breaker=state,
            bootstrap_port=endpoint.bootstrap_port,
            kv_port=endpoint.kv_port,
        )


def changes(
    before: Mapping[HostPort, Target], now: Mapping[HostPort, Target]
) -> tuple[tuple[Target, ...], tuple[HostPort, ...]]:
    """The targets that are new or changed, and the addresses that are gone."""
    changed = tuple(target for address, target in now.items() if before.get(address) != target)
    return changed, tuple(address for address in before if address not in now)
