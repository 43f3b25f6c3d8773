"""Envoy LEAST_REQUEST: of two random endpoints the one with fewer active requests.

Source: Envoy 1.32.4, extensions.load_balancing_policies.least_request.v3 and least_request_lb.cc: N_CHOICES,
equal weights, drawn with replacement, the first stays where both are equal; active requests are the proxy's
own. Retries: Istio's default policy, 2 after the first try, not on a host that has failed the call.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pdcoord.sim.routers.base import Route, Surroundings
from pdcoord.sim.routers.rival import Rival
from pdcoord.sim.routers.rotation import Rotation
from pdcoord.sim.workload.call import Call


@dataclass(frozen=True, slots=True)
class LeastRequestSettings:
    """Envoy's policy.

    Attributes:
        choice_count: hosts drawn for one choice.
        retries_max: of Istio; Envoy itself retries nothing unless told to.
    """

    choice_count: int = 2
    retries_max: int = 2


class LeastRequest(Rival):
    """Power of two choices on the proxy's own active requests."""

    def __init__(self, surroundings: Surroundings, name: str, settings: LeastRequestSettings) -> None:
        super().__init__(surroundings, name, settings.retries_max)
        self._settings = settings

    def choose(self, call: Call, rotation: Rotation, now_s: float) -> Route:  # noqa: ARG002  # blind to both
        return self.alone_or_split(rotation, self._pick)

    def _pick(self, candidates: Sequence[int]) -> int:
        count = len(candidates)
        drawn = [candidates[self.random.randrange(count)] for _ in range(self._settings.choice_count)]
        return min(drawn, key=lambda index: self.loads[index].requests)
