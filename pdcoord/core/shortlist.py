"""The few endpoints of a pool that can be part of the best pair, whatever the size of the pool."""

from collections.abc import Container
from typing import TypeVar

from pdcoord.core.fleet import EndpointId

LISTED_MAX = 32
TROUBLED_MAX = 16
"""Endpoints with a tripped path that are kept besides; they may be open to some only."""

T = TypeVar("T")
Six = tuple[float, float, float, float, float, float]
Row = tuple[Six, float, int, int, EndpointId, T]
"""The six figures that decide, price, turn, index (so that nothing behind it is compared), whose."""


class ShortList:
    """Keeps what fewer than `room` others match or beat in all six figures.

    Within a pool speed, verdict and link are equal. If a pair's violation and time grow with these
    figures of its end and with nothing else of it, one that is matched so often is in no better
    pair than those who match it. Endpoints with a tripped path count for nobody's matching, since they
    may not be open to the same others. Lossless but for price among pairs equal within the noise, and
    past LISTED_MAX endpoints of which none matches another.
    """

    def __init__(self, room: int, troubled: Container[EndpointId]) -> None:
        self._room = room
        self._troubled = troubled

    def kept(self, rows: list[Row[T]]) -> list[T]:
        """What is kept, least first figure first; sorts `rows`."""
        rows.sort()
        least = tuple(map(min, zip(*(row[0] for row in rows), strict=True)))[1:]
        kept: list[T] = []
        clear: list[Six] = []
        perfect_left, troubled_left = self._room, TROUBLED_MAX
        for figures, _, _, _, endpoint_id, item in rows:
            if self._is_matched(clear, figures):
                continue
            if endpoint_id not in self._troubled:
                clear.append(figures)
                perfect_left -= figures[1:] == least
            elif troubled_left:
                troubled_left -= 1
            else:
                continue
            kept.append(item)
            # Whatever follows is no less in the first figure, and cannot be in the others.
            if not perfect_left or len(clear) == LISTED_MAX:
                break
        return kept

    def _is_matched(self, clear: list[Six], figures: Six) -> bool:
        matched = 0
        _, second, third, fourth, fifth, sixth = figures
        # Sorted by the first figure, which is therefore matched by whoever is here.
        for _, a, b, c, d, e in clear:
            if a <= second and b <= third and c <= fourth and d <= fifth and e <= sixth:
                matched += 1
                if matched == self._room:
                    return True
        return False
