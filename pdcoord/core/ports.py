"""What the core asks of parts that may be replaced: how fast things are, and who drives it."""

from collections.abc import Collection, Mapping
from typing import Protocol

from pdcoord.core.costs import PathFigures
from pdcoord.core.events import Action, Event
from pdcoord.core.fleet import Endpoint, EndpointId, ModelName
from pdcoord.core.observations import Observation, ObservationKind, StepsSeen


class SpeedModel(Protocol):
    """Predicts what work costs on an endpoint and on the way between two.

    Figures are finite, at least 0 and grow with their arguments. Two endpoints of one pool have the same
    unless one of them is in `unlike`.
    """

    @property
    def unlike(self) -> Collection[EndpointId]:
        """Endpoints that are known to be faster or slower than their pool."""
        ...

    @property
    def left_out(self) -> Mapping[ObservationKind, int]:
        """How many observations were nonsense."""
        ...

    def prefill_s(self, endpoint: Endpoint, uncached_tokens: int) -> float: ...

    def prefill_spread_s(self, endpoint: Endpoint, uncached_tokens: int) -> float:
        """How far one prefill may be from its prediction: about one standard deviation."""
        ...

    def step_s(self, endpoint: Endpoint, batch: int, context_tokens: int) -> float: ...

    def path(self, prefill: Endpoint, decode: Endpoint) -> PathFigures:
        """What the way between two endpoints costs, by their pools alone."""
        ...

    def output_tokens(self, model: ModelName, tenant: str) -> float | None:
        """How many tokens an answer is expected to have; None where nothing is known."""
        ...

    def pace(self, seen: StepsSeen) -> float | None:
        """How many times longer these steps took than its pool's do; None while little is known of them."""
        ...

    def learn(self, observation: Observation) -> None:
        """Take in what was seen. Nonsense is counted and left out, never believed."""
        ...

    def forget(self, endpoint_id: EndpointId) -> None:
        """The endpoint is gone, or is another process by now."""
        ...

    def validate(self) -> None:
        """Assert that what was learned is finite, bounded and of one mind."""
        ...


class Handler(Protocol):
    """The coordinator with its clock bound: how edges tell it what happened."""

    def handle(self, event: Event) -> list[Action]: ...
