"""Who can be run in a study: pdcoord, and each rival within one vendor or as if it could cross."""

from collections.abc import Callable
from dataclasses import dataclass

from pdcoord.sim.coarse.cluster import run
from pdcoord.sim.routers.base import Router, Surroundings
from pdcoord.sim.routers.ours import OurRouter
from pdcoord.sim.routers.registry import RIVALS
from pdcoord.sim.study.results import OURS, CallResult
from pdcoord.sim.study.stage import Reach, Stage, hand_over
from pdcoord.sim.workload.call import Workload

CROSSING = "+cross"
"""Behind a rival's name: it may split over every pair, as if it could move KV between vendors."""


class UnknownContenderError(ValueError):
    """No router of this name: choose another."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A router and the pairs it may split over."""

    name: str
    reach: Reach

    @property
    def label(self) -> str:
        return f"{self.name}{CROSSING}" if self.is_crossing else self.name

    @property
    def is_ours(self) -> bool:
        return self.name == OURS

    @property
    def is_crossing(self) -> bool:
        return self.reach is Reach.ALL

    def surroundings(self, stage: Stage, *, key_tokens: int, seed: int) -> Surroundings:
        places = stage.scene.places
        return Surroundings(places, key_tokens, hand_over(places, self.reach), seed)

    def router(self, stage: Stage, surroundings: Surroundings) -> Router:
        """A new one, which has seen nothing yet."""
        return OurRouter(stage.model, surroundings) if self.is_ours else RIVALS[self.name](surroundings)


def run_on(
    stage: Stage,
    each: Contender,
    workload: Workload,
    *,
    seed: int = 0,
    until_s: float | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[CallResult]:
    """Run one contender; calls that have no objectives of their own are held to the policy's."""
    surroundings = each.surroundings(stage, key_tokens=workload.key_tokens, seed=seed)
    return run(
        stage.scene,
        each.router(stage, surroundings),
        workload,
        surroundings=surroundings,
        until_s=until_s,
        progress=progress,
        ttft_s_max=stage.model.slo.ttft_s,
        tpot_s_max=stage.model.slo.tpot_s,
    )


def contender(label: str) -> Contender:
    """The contender of a label as people write it: a name, with `+cross` behind it or not; `ours` is pdcoord.

    Raises:
        UnknownContenderError: naming those there are.
    """
    name, crossing, rest = label.partition(CROSSING)
    name = OURS if name == "ours" else name
    if rest or (name not in RIVALS and name != OURS) or (name == OURS and crossing):
        known = ", ".join((OURS, *RIVALS))
        message = (
            f"{label!r} is no router; choose of {known}, a rival with {CROSSING} behind it to let it cross"
        )
        raise UnknownContenderError(message)
    if name == OURS:
        return Contender(OURS, Reach.VERDICTS)
    return Contender(name, Reach.ALL if crossing else Reach.ONE_VENDOR)


def rivals(*, is_crossing: bool) -> list[Contender]:
    """Every rival in one of the two columns."""
    reach = Reach.ALL if is_crossing else Reach.ONE_VENDOR
    return [Contender(name, reach) for name in RIVALS]
