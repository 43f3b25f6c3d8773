"""Kubernetes Service: endpoints in turn (IPVS) or at random (iptables), blind to everything but readiness.

Source: Kubernetes documentation, "Virtual IPs and Service Proxies" (read 2026): mode ipvs with its default
scheduler rr; mode iptables picks a random endpoint. Both act on a connection; here every call has its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from pdcoord.sim.routers.base import Route, Surroundings
from pdcoord.sim.routers.rival import ALONE, SPLIT, Rival
from pdcoord.sim.routers.rotation import Rotation
from pdcoord.sim.workload.call import Call


class ProxyMode(StrEnum):
    """kube-proxy's `mode`; closed."""

    IPVS = "ipvs"
    IPTABLES = "iptables"


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """A Kubernetes Service.

    Attributes:
        retries_max: a Service balances connections and retries none.
    """

    mode: ProxyMode = ProxyMode.IPVS
    retries_max: int = 0


class RoundRobin(Rival):
    """Every place of the rotation in turn."""

    def __init__(self, surroundings: Surroundings, name: str, settings: ServiceSettings) -> None:
        super().__init__(surroundings, name, settings.retries_max)
        self._settings = settings
        # One turn for whole calls and prefills, one for decodes.
        self._last = [-1, -1]

    def choose(self, call: Call, rotation: Rotation, now_s: float) -> Route:  # noqa: ARG002  # blind to both
        if rotation.alone:
            return Route(self._next(rotation.alone, 0), why=ALONE)
        prefill = self._next(rotation.prefills, 0)
        return Route(self._next(rotation.decodes_of[prefill], 1), prefill, why=SPLIT)

    def _next(self, candidates: Sequence[int], turn: int) -> int:
        if self._settings.mode is ProxyMode.IPTABLES:
            return self.drawn(candidates)
        last = self._last[turn]
        chosen = next((index for index in candidates if index > last), candidates[0])
        self._last[turn] = chosen
        return chosen
