"""The parts that the core ships fit its own ports."""

from pdcoord.core.coordinator import Coordinator
from pdcoord.core.events import Action, Event, ModelsReplaced
from pdcoord.core.ports import Handler, SpeedModel
from pdcoord.core.speed import SeededSpeed


class Clocked:
    """A coordinator with its clock bound, as the runtime does it."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    def handle(self, event: Event) -> list[Action]:
        return self._coordinator.handle(event, 7.0)


def test_the_seeded_speed_is_a_speed_model() -> None:
    speed: SpeedModel = SeededSpeed()
    assert Coordinator(speed).models() == ()


def test_a_coordinator_with_its_clock_bound_is_a_handler() -> None:
    handler: Handler = Clocked(Coordinator())
    assert handler.handle(ModelsReplaced(())) == []
