"""What single paths carry, as transfers over them showed lately."""

from collections import OrderedDict
from collections.abc import Container
from dataclasses import replace

from pdcoord.core.costs import PathFigures
from pdcoord.core.estimators import PathBandwidth
from pdcoord.core.fleet import EndpointId, PathKey
from pdcoord.core.probes import SLOW_SHARE

STALE_S = 60.0
"""A path of which nothing was heard for so long is taken to be as the policy says: so it is tried again."""
PATHS_MAX = 1 << 16
"""Paths remembered; of more, those not used for longest are forgotten."""
SHORT_SHARE = 0.9
"""Of what its links carry: a path that carries less is counted with what it carries."""


class PathBandwidths:
    """Bandwidths by path. Only those that carry less than their links cost a decision anything."""

    def __init__(self) -> None:
        self._paths: OrderedDict[PathKey, PathBandwidth] = OrderedDict()
        self._short: dict[PathKey, float] = {}
        self._slow: set[PathKey] = set()

    def __len__(self) -> int:
        return len(self._paths)

    @property
    def has_short(self) -> bool:
        """Whether `cap` may say anything."""
        return bool(self._short)

    def is_slow(self, path: PathKey) -> bool:
        """Whether the path was no twin of its pool's others when it was last heard of."""
        return path in self._slow

    def learn(
        self, path: PathKey, bytes_per_s: float, *, seeded: float, bytes_per_s_min: float, now_s: float
    ) -> None:
        """A transfer went over this path at so many bytes a second.

        Args:
            seeded: what the policy says of its links; above 0.
            bytes_per_s_min: a path with less is not used.
        """
        known = self._paths.get(path)
        if known is None or known.until_s <= now_s:
            known = self._paths[path] = PathBandwidth(seeded)
        known.learn(bytes_per_s, seeded)
        known.until_s = now_s + STALE_S
        self._paths.move_to_end(path)
        slow = known.bytes_per_s < SLOW_SHARE * seeded
        (self._slow.add if slow else self._slow.discard)(path)
        # Other delays than the path's are in these times. Only what they cannot explain may shut it.
        counted = known.bytes_per_s if slow else max(known.bytes_per_s, min(bytes_per_s_min, seeded))
        if counted < SHORT_SHARE * seeded:
            self._short[path] = counted
        else:
            self._short.pop(path, None)

    def cap(self, path: PathKey, figures: PathFigures, now_s: float) -> PathFigures:
        """Figures of a path, no better than what it carried lately."""
        counted = self._short.get(path)
        if counted is None or counted >= figures.bandwidth_bytes_per_s or self._paths[path].until_s <= now_s:
            return figures
        return replace(figures, bandwidth_bytes_per_s=counted)

    def surplus(self, now_s: float) -> list[PathKey]:
        """Paths to forget: stale ones, and one too many. Looks at no more than it names, and one."""
        found: list[PathKey] = []
        left = len(self._paths)
        for path, known in self._paths.items():
            if left <= PATHS_MAX and known.until_s > now_s:
                break
            found.append(path)
            left -= 1
        return found

    def of(self, endpoint_id: EndpointId) -> list[PathKey]:
        """The paths remembered that this endpoint is part of."""
        return [path for path in self._paths if endpoint_id in path]

    def forget(self, path: PathKey) -> None:
        self._paths.pop(path, None)
        self._short.pop(path, None)
        self._slow.discard(path)

    def validate(self, endpoints: Container[EndpointId]) -> None:
        """Assert bounds, and that only paths between endpoints that exist are remembered."""
        assert len(self._paths) <= PATHS_MAX, "too many paths"
        assert self._short.keys() <= self._paths.keys(), "a short path that is not known"
        assert self._slow <= self._paths.keys(), "a slow path that is not known"
        for path in self._paths:
            assert all(endpoint_id in endpoints for endpoint_id in path), f"{path}: no path of this fleet"
