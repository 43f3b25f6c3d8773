"""What goes wrong in the adversity part, drawn from the run's seed: the same for every router."""

from collections.abc import Callable
from dataclasses import replace
from random import Random

from pdcoord.sim.coarse.scene import Scene, Trouble, TroubleKind

SLOW_VENDOR = "amd"
BROKEN_SHARE = 0.3
SIGNAL_AGE_S = 5.0


def strike(scene: Scene, kind: str, seed: int, seconds: float) -> Scene:
    """The scene with that trouble in it; `seconds` is how long calls arrive."""
    return KINDS[kind](scene, Random(seed), seconds)


def _broken_paths(scene: Scene, rng: Random, seconds: float) -> Scene:
    """Three in ten of all paths break for good at some time in the first half."""
    troubles = [
        Trouble(rng.uniform(0.0, seconds / 2), TroubleKind.BREAK_PATH, p.index, d.index)
        for p in scene.places
        for d in scene.places
        if p is not d and rng.random() < BROKEN_SHARE
    ]
    return replace(scene, troubles=troubles)


def _slow_vendor(scene: Scene, rng: Random, seconds: float) -> Scene:  # noqa: ARG001 - as the others
    """Every engine of one vendor is at half its speed from the start; no policy says so."""
    troubles = [
        Trouble(0.0, TroubleKind.SLOW_ENGINE, place.index, factor=0.5)
        for place in scene.places
        if place.endpoint.pool.vendor == SLOW_VENDOR
    ]
    return replace(scene, troubles=troubles)


def _old_signals(scene: Scene, rng: Random, seconds: float) -> Scene:  # noqa: ARG001 - as the others
    """Samples of metrics are 5 s old when routers hear of them."""
    return replace(scene, signal_age_s=SIGNAL_AGE_S)


def _killed_pods(scene: Scene, rng: Random, seconds: float) -> Scene:
    """A tenth of the pods die and come back 30 s later with empty caches."""
    struck = rng.sample(range(len(scene.places)), max(1, len(scene.places) // 10))
    troubles = []
    for index in sorted(struck):
        at_s = rng.uniform(0.0, seconds / 2)
        troubles.append(Trouble(at_s, TroubleKind.KILL, index, ends_s=at_s + 30.0))
    return replace(scene, troubles=troubles)


KINDS: dict[str, Callable[[Scene, Random, float], Scene]] = {
    "paths broken": _broken_paths,
    "a vendor at half speed": _slow_vendor,
    "signals 5 s old": _old_signals,
    "pods killed": _killed_pods,
}
