"""The fleet as kinds of engines: how many are alike, and what one of them is."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pdcoord.core.fleet import Role
from pdcoord.sim.fleetfile import EngineSpec, LoadedFleet
from pdcoord.sim.profiles import PROFILES
from pdcoord.sim.settings import EngineSettings

KINDS_MAX = 16


class AdviceError(Exception):
    """There is no advice for this fleet and workload; the message names the remedy."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Engines that differ in nothing but name, role and ports.

    Attributes:
        settings: of one of them; its name and role say nothing.
        cost_per_hour: of one; None if the fleet file does not say.
        roles: as the fleet file has them, one for each engine.
    """

    name: str
    vendor: str
    settings: EngineSettings
    cost_per_hour: float | None
    roles: tuple[Role, ...]

    @property
    def count(self) -> int:
        return len(self.roles)

    @property
    def kv_tokens(self) -> int:
        return self.settings.block_total * self.settings.layout.block_tokens


def kinds_of(fleet: LoadedFleet) -> tuple[Kind, ...]:
    """Group a fleet's engines, in the order in which the file names them first.

    Raises:
        AdviceError: if they are of more than KINDS_MAX kinds.
    """
    groups: dict[tuple[EngineSettings, str, float | None], list[EngineSpec]] = {}
    for engine in fleet.fleet.engines:
        settings = replace(
            engine.settings(fleet.fleet.model, fleet.fleet.seed), name="", role=Role.BOTH, jitter_share=0.0
        )
        groups.setdefault((settings, engine.profile, engine.cost_per_hour), []).append(engine)
    if len(groups) > KINDS_MAX:
        raise AdviceError(
            f"{fleet.file}: engines are of {len(groups)} kinds, expected at most {KINDS_MAX}; "
            "give those that are alike equal figures"
        )
    names = _names([profile for _, profile, _ in groups], list(groups.values()))
    return tuple(
        Kind(
            name=name,
            vendor=PROFILES[profile].vendor,
            settings=settings,
            cost_per_hour=cost,
            roles=tuple(engine.role for engine in engines),
        )
        for name, ((settings, profile, cost), engines) in zip(names, groups.items(), strict=True)
    )


def _names(profiles: Sequence[str], groups: Sequence[Sequence[EngineSpec]]) -> list[str]:
    """The profile's name; with that of the first engine where two kinds have one profile."""
    return [
        profile if profiles.count(profile) == 1 else f"{profile} ({engines[0].name})"
        for profile, engines in zip(profiles, groups, strict=True)
    ]
