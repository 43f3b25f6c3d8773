"""The few endpoints of a pool that can be part of the best pair, whatever the size of the pool."""

from collections.abc import Container
from typing import TypeVar

from pdcoord.core.fleet import EndpointId

LISTED_MAX = 32
TROUBLED_MAX = 16
"""Endpoints with a tripped path that are kept besides; they may be open to some only."""

T = TypeVar("T")
Row = tuple[float, float, float, float, int, int, EndpointId, T]
"""The three figures that decide, price, turn, index (so that nothing behind it is compared), whose."""


class ShortList:
    """Keeps what fewer than `room` others match or beat in all three figures.

    Within a pool speed, verdict and link are equal. If a pair's violation and time grow with these
    three figures of its end and with nothing else of it, one that is matched so often is in no better
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
        least = min((row[1] for row in rows), default=0.0), min((row[2] for row in rows), default=0.0)
        kept: list[T] = []
        clear: list[tuple[float, float, float]] = []
        perfect_left, troubled_left = self._room, TROUBLED_MAX
        for first, second, third, _, _, _, endpoint_id, item in rows:
            if self._is_matched(clear, first, second, third):
                continue
            if endpoint_id not in self._troubled:
                clear.append((first, second, third))
                perfect_left -= (second, third) == least
            elif troubled_left:
                troubled_left -= 1
            else:
                continue
            kept.append(item)
            # Whatever follows is no less in the first figure, and cannot be in the others.
            if not perfect_left or len(clear) == LISTED_MAX:
                break
        return kept

    def _is_matched(
        self, clear: list[tuple[float, float, float]], first: float, second: float, third: float
    ) -> bool:
        matched = 0
        for figures in clear:
            if figures[0] <= first and figures[1] <= second and figures[2] <= third:
                matched += 1
                if matched == self._room:
                    return True
        return False
