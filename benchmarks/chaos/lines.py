"""What goes wrong between hosts: cables, directions, timing, and single ports, as of the KV side channel."""

import asyncio
import random
from collections.abc import Collection, Mapping

from benchmarks.chaos import hop
from benchmarks.chaos.fleet import DECODES, GATEWAYS
from benchmarks.chaos.hop import Fate, ports_of
from benchmarks.chaos.netns import Hosts
from benchmarks.chaos.programs import Part

LINE_KINDS: dict[str, tuple[str, ...]] = {
    "cut": ("prefill", "decode"),
    "lose-kv-questions": ("prefill",),
    "lose-kv-answers": ("prefill",),
    "lose-all-answers": ("decode",),
    "slow-line": ("prefill", "decode"),
    "reset-line": ("prefill", "decode"),
    "reset-side-channel": ("prefill",),
}
"""KV questions go from decode to prefill pods: over the side channel, and for the bytes."""
HOP_KINDS: dict[str, tuple[str, ...]] = {
    "late-line": ("prefill", "decode"),
    "lossy-line": ("prefill", "decode"),
    "lose-side-questions": ("prefill",),
    "lose-side-answers": ("prefill",),
    "lose-kv-bytes": ("prefill", "decode"),
}
"""Those that need a hop: the side channel fails while bytes pass, and the other way round."""
DELAY_S = (0.03, 0.09)
LOST_SHARE = 0.05


def late(rng: random.Random) -> Fate:
    """Every frame comes late, and not evenly so."""
    return lambda _, __: rng.uniform(*DELAY_S)


def lossy(rng: random.Random) -> Fate:
    """Some frames are lost, both ways."""
    return lambda _, __: None if rng.random() < LOST_SHARE else 0.0


def deaf(ports: Collection[int]) -> Fate:
    """What is sent to these ports of the pod is lost; what they send arrives."""
    return lambda frame, is_from_pod: (
        None if not is_from_pod and (found := ports_of(frame)) and found[1] in ports else 0.0
    )


def mute(ports: Collection[int]) -> Fate:
    """What these ports of the pod send is lost; what is sent to them arrives."""
    return lambda frame, is_from_pod: (
        None if is_from_pod and (found := ports_of(frame)) and found[0] in ports else 0.0
    )


def losing_others(known: Collection[int]) -> Fate:
    """Connections with none of these ports at either end lose everything, both ways."""
    return lambda frame, _: None if (found := ports_of(frame)) and not set(found) & set(known) else 0.0


class Lines:
    """Disturbs the lines of pods and makes them good.

    Attributes:
        kinds: what can be done here, and to parts of which kinds.
        connections_reset: how many so far.
    """

    def __init__(self, hosts: Hosts, parts: Mapping[str, Part]) -> None:
        self._hosts = hosts
        self._side_ports = {name: part.side_ports for name, part in parts.items()}
        self._known = frozenset(port for part in parts.values() for port in part.ports)
        # Its own: how many frames pass must not decide which faults are drawn.
        self._rng = random.Random(0)
        self.kinds = LINE_KINDS | (HOP_KINDS if hop.is_there() else {})
        self.connections_reset = 0

    async def disturb(self, kind: str, pod: str, seconds: float) -> None:
        """Do something to a pod's line for as long as told."""
        if kind in HOP_KINDS:
            async with self._hosts.hop(pod, self._fate(kind, pod)):
                await asyncio.sleep(seconds)
        elif kind.startswith("reset"):
            ports = self._side_ports[pod] if kind == "reset-side-channel" else ()
            self.connections_reset += await self._hosts.reset(pod, seconds, ports)
        else:
            self._switch(kind, pod, is_on=True)
            try:
                await asyncio.sleep(seconds)
            finally:
                self._switch(kind, pod, is_on=False)

    def _fate(self, kind: str, pod: str) -> Fate:
        match kind:
            case "late-line":
                return late(self._rng)
            case "lossy-line":
                return lossy(self._rng)
            case "lose-side-questions":
                return deaf(self._side_ports[pod])
            case "lose-side-answers":
                return mute(self._side_ports[pod])
            case _:
                return losing_others(self._known)

    def _switch(self, kind: str, pod: str, *, is_on: bool) -> None:
        if kind == "cut":
            self._hosts.cut(pod, is_on=is_on)
        elif kind == "slow-line":
            self._hosts.slow(pod, is_on=is_on)
        lost = {
            "lose-kv-questions": [(each, pod) for each in DECODES],
            "lose-kv-answers": [(pod, each) for each in DECODES],
            "lose-all-answers": [(pod, each) for each in GATEWAYS],
        }
        for source, target in lost.get(kind, []):
            self._hosts.lose(source, target, is_on=is_on)
