"""What a simulated run is made of besides its traffic: the engines, the ways between them, the trouble."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from pdcoord.sim.routers.base import Place
from pdcoord.sim.settings import EngineSettings


class TroubleKind(StrEnum):
    """What goes wrong; closed."""

    KILL = "kill"
    SLOW_ENGINE = "slow-engine"
    SLOW_LINK = "slow-link"
    BREAK_PATH = "break-path"


@dataclass(frozen=True, slots=True)
class Trouble:
    """One thing that goes wrong.

    Attributes:
        place: whom it strikes; the prefill place of a path.
        other: the decode place of a path; None otherwise.
        factor: what is left of the speed, for what is slow: 0.5 is half.
        ends_s: when it is over; None if never. What was killed starts anew with an empty cache.
    """

    at_s: float
    kind: TroubleKind
    place: int
    other: int | None = None
    factor: float = 1.0
    ends_s: float | None = None


@dataclass(frozen=True, slots=True)
class Scene:
    """One fleet in one condition.

    Attributes:
        places: what routers are told of each engine; `places[i].index == i`.
        settings: what each engine is; its speed may differ from what the policy believes of it.
        scrape_interval_s: between two samples of one engine.
        signal_age_s: how old a sample is when a router hears of it.
        troubles: in any order.
        sheds_after_s: a call that has not begun after this long leaves and has failed; None if clients
            wait for ever.
        prefill_s_max: longest wait for one prefill leg's answer, as a plan's prefill_deadline_s.
        transfer_s_max: longest wait from then to the first token, as a plan's transfer_deadline_s.
    """

    places: Sequence[Place]
    settings: Sequence[EngineSettings]
    scrape_interval_s: float = 0.2
    signal_age_s: float = 0.0
    troubles: Sequence[Trouble] = ()
    sheds_after_s: float | None = None
    prefill_s_max: float = 60.0
    transfer_s_max: float = 20.0
