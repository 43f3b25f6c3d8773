"""What the core asks of parts that may be replaced: today seeds from the policy, later learned ones."""

from typing import Protocol

from pdcoord.core.costs import PathFigures
from pdcoord.core.events import Action, Event
from pdcoord.core.fleet import Endpoint


class SpeedModel(Protocol):
    """Predicts what work costs on an endpoint and on the way between two.

    Figures are a pool's: every endpoint of it, and every path between two pools, has the same. They
    grow with their arguments.
    """

    def prefill_s(self, endpoint: Endpoint, uncached_tokens: int) -> float: ...

    def step_s(self, endpoint: Endpoint, batch: int, context_tokens: int) -> float: ...

    def path(self, prefill: Endpoint, decode: Endpoint) -> PathFigures: ...


class Handler(Protocol):
    """The coordinator with its clock bound: how edges tell it what happened."""

    def handle(self, event: Event) -> list[Action]: ...
