"""Which places are in a rival's rotation, and which pairs of them may hand over."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from pdcoord.sim.routers.base import Surroundings


@dataclass(frozen=True, slots=True)
class Rotation:
    """The live places by what they may do; all in the order of their indices.

    Attributes:
        alone: may serve a whole call.
        prefills: may compute a prompt for at least one of `decodes_of` theirs.
        decodes: may generate: alone, or for at least one of `prefills_of` theirs.
        prefills_of: by decode place, who may hand over to it; never itself.
        decodes_of: by prefill place, to whom it may hand over; never itself.
    """

    alone: tuple[int, ...]
    prefills: tuple[int, ...]
    decodes: tuple[int, ...]
    prefills_of: tuple[tuple[int, ...], ...]
    decodes_of: tuple[tuple[int, ...], ...]

    @classmethod
    def of(
        cls, surroundings: Surroundings, is_live: Sequence[bool], without: Collection[int] = ()
    ) -> "Rotation":
        """What is left where `is_live[i]` is false or `i` is among `without`."""
        live = [place for place in surroundings.places if is_live[place.index] and place.index not in without]
        can_prefill = [place.index for place in live if place.endpoint.pool.can_prefill]
        can_decode = [place.index for place in live if place.endpoint.pool.can_decode]
        alone = tuple(place.index for place in live if place.endpoint.pool.can_serve_alone)
        prefills_of: list[tuple[int, ...]] = [()] * len(surroundings.places)
        decodes_of: list[tuple[int, ...]] = [()] * len(surroundings.places)
        may = surroundings.can_hand_over
        for decode in can_decode:
            prefills_of[decode] = tuple(p for p in can_prefill if p != decode and may[p][decode])
        for prefill in can_prefill:
            decodes_of[prefill] = tuple(d for d in can_decode if d != prefill and may[prefill][d])
        serves_alone = set(alone)
        return cls(
            alone=alone,
            prefills=tuple(p for p in can_prefill if decodes_of[p]),
            decodes=tuple(d for d in can_decode if d in serves_alone or prefills_of[d]),
            prefills_of=tuple(prefills_of),
            decodes_of=tuple(decodes_of),
        )

    @property
    def is_empty(self) -> bool:
        return not self.alone and not self.prefills
