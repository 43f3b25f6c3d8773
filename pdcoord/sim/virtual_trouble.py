"""What goes wrong in a simulation, done to its parts and made good again."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from pdcoord.core.coordinator import Coordinator
from pdcoord.core.events import ModelsReplaced
from pdcoord.core.fleet import Endpoint, EndpointDraining, EndpointGone, EndpointSeen
from pdcoord.sim.scenario import Fault, FaultKind

if TYPE_CHECKING:
    from pdcoord.sim.simulation import Simulation

_SLOW_LINK = 0.01
_SPEED_LEFT = {FaultKind.STALL: 1e-6, FaultKind.SLOW: 0.1}
_OF_THE_LIVING = {FaultKind.KILL, FaultKind.STALL, FaultKind.SLOW, FaultKind.SHUT_DOWN, FaultKind.SLOW_LINK}

Deed = Callable[[Fault, Endpoint, Endpoint], None]


class Trouble:
    """Strikes a simulation's parts with faults."""

    def __init__(self, simulation: "Simulation") -> None:
        self._simulation = simulation
        self._engines = simulation.engines
        self._strikes: dict[FaultKind, Deed] = {
            FaultKind.KILL: lambda _, one, __: self._engines.kill(one.address),
            FaultKind.CUT: lambda _, one, other: self._engines.cut(one.address, other.address),
            FaultKind.CUT_KV: lambda _, one, other: self._engines.cut_kv(one.address, other.address),
            FaultKind.SLOW_LINK: lambda _, one, __: self._engines.slow_link(one.address, _SLOW_LINK),
            FaultKind.DRAIN: lambda _, one, __: self._drain(one),
            FaultKind.POLICY: lambda *_: self._replace_policy(),
            FaultKind.STALL: self._slow,
            FaultKind.SLOW: self._slow,
            FaultKind.SHUT_DOWN: lambda _, one, __: self._engines.shut_down(one.address),
            FaultKind.SIDECAR: lambda _, one, __: self._kill_sidecar(one),
            FaultKind.REPLICA: lambda *_: self._lose_replica(),
        }
        self._mends: dict[FaultKind, Deed] = {
            FaultKind.KILL: lambda _, one, __: self._revive(one),
            FaultKind.CUT: lambda _, one, other: self._engines.mend(one.address, other.address),
            FaultKind.CUT_KV: lambda _, one, other: self._engines.mend(one.address, other.address),
            FaultKind.SLOW_LINK: lambda _, one, __: self._engines.slow_link(one.address, 1.0),
            FaultKind.DRAIN: lambda _, one, __: self._come_back(one),
            FaultKind.STALL: lambda _, one, __: self._engines.slow_steps(one.address, 1.0),
            FaultKind.SLOW: lambda _, one, __: self._engines.slow_steps(one.address, 1.0),
            FaultKind.SHUT_DOWN: lambda _, one, __: self._renew(one),
            FaultKind.SIDECAR: lambda _, one, __: simulation.dead_sidecars.discard(one.id),
        }

    def strike(self, fault: Fault) -> None:
        """Let a fault happen, and have it made good when its time has come."""
        simulation = self._simulation
        one = simulation.endpoints[fault.endpoint]
        other = simulation.endpoints[fault.other or fault.endpoint]
        if fault.kind in _OF_THE_LIVING and not self._engines.is_alive(one.address):
            return
        simulation.result.struck[fault.kind] += 1
        self._strikes[fault.kind](fault, one, other)
        mend = self._mends.get(fault.kind)
        if fault.ends_after_s is not None and mend is not None:
            simulation.loop.after(fault.ends_after_s, partial(mend, fault, one, other))

    def _slow(self, fault: Fault, one: Endpoint, _other: Endpoint) -> None:
        self._engines.slow_steps(one.address, _SPEED_LEFT[fault.kind])

    def _drain(self, endpoint: Endpoint) -> None:
        self._simulation.draining.add(endpoint.id)
        self._simulation.tell(EndpointDraining(endpoint.id))

    def _come_back(self, endpoint: Endpoint) -> None:
        self._simulation.tell(EndpointGone(endpoint.id))
        self._simulation.tell(EndpointSeen(endpoint))
        self._simulation.draining.discard(endpoint.id)

    def _replace_policy(self) -> None:
        self._simulation.tell(ModelsReplaced((self._simulation.scenario.model,)))

    def _revive(self, endpoint: Endpoint) -> None:
        if not self._engines.is_alive(endpoint.address):
            self._engines.start(endpoint.address)

    def _renew(self, endpoint: Endpoint) -> None:
        """End an engine that shuts down, and start the one that takes its place."""
        if self._engines.is_alive(endpoint.address):
            self._engines.kill(endpoint.address)
            self._engines.start(endpoint.address)

    def _kill_sidecar(self, endpoint: Endpoint) -> None:
        """Its connections close, to engines and gateway alike; until it is back nobody reaches the pod."""
        self._simulation.dead_sidecars.add(endpoint.id)
        for call in self._simulation.calls.values():
            call.lose_sidecar(endpoint.id)

    def _lose_replica(self) -> None:
        """The gateway dies with its calls, and another begins with nothing known."""
        for call in self._simulation.calls.values():
            call.lose_gateway()
        self._simulation.coordinator = Coordinator()
        self._simulation.inform()
