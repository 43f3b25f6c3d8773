"""Chance as a function of numbers: the same seed, session and turn give the same draw in any order."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

_MASK = (1 << 64) - 1
# Odd 64-bit multipliers: 2^64 over the golden ratio, and those of MurmurHash3's and SplitMix64's finalizers.
_STATE = 0x9E3779B97F4A7C15
_VALUE = 0xC2B2AE3D27D4EB4F
_FIRST = 0xFF51AFD7ED558CCD
_SECOND = 0x94D049BB133111EB
_UNIT = 2.0**-52


def mix(state: int, value: int) -> int:
    """A number of 63 bits that looks drawn, for two of up to 64."""
    x = (state * _STATE + value * _VALUE + _FIRST) & _MASK
    x = ((x ^ (x >> 32)) * _FIRST) & _MASK
    x = ((x ^ (x >> 29)) * _SECOND) & _MASK
    return (x ^ (x >> 31)) >> 1


def unit(state: int, value: int) -> float:
    """A draw from (0, 1), both ends left out."""
    return ((mix(state, value) >> 11) + 0.5) * _UNIT


class Shares:
    """Chooses among numbered things by their weights.

    Raises:
        ValueError: if a weight is negative or none is above 0.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        if min(weights, default=0.0) < 0.0 or sum(weights) <= 0.0:
            raise ValueError(f"weights are {list(weights)}, expected none below 0 and one above")
        self._steps = list(accumulate(weights))
        # The last of weight 0 cannot be chosen by rounding.
        self._last = max(index for index, weight in enumerate(weights) if weight > 0.0)

    def at(self, draw: float) -> int:
        """The index that a draw from [0, 1) falls on."""
        return min(bisect_right(self._steps, draw * self._steps[-1]), self._last)


def zipf(count: int, exponent: float) -> Shares:
    """Weights 1 / rank ** exponent; an exponent of 0 makes all equal."""
    return Shares([rank**-exponent for rank in range(1, count + 1)])
