"""Where each element of a block stands, as digits with strides: one description for every known page.

Plain pages, transposed keys, vector tiles and matrix-unit tiles are all the same thing: the indices of token,
head and element, cut into digits, each with its own stride. So one strided copy packs or unpacks any of them.
Only a page that no such cut describes needs a table of positions (`Learned`).
"""

from dataclasses import dataclass
from enum import StrEnum


class Axis(StrEnum):
    """What an index counts."""

    TOKEN = "token"  # noqa: S105  # no password, a word of prompts
    HEAD = "head"
    ELEMENT = "element"


@dataclass(frozen=True, slots=True)
class Digit:
    """One digit of an index; the sizes of an axis's digits multiply to its length.

    Attributes:
        stride: in elements.
    """

    axis: Axis
    size: int
    stride: int


@dataclass(frozen=True, slots=True)
class Side:
    """The keys (or values, or latents) of one block of one layer.

    Attributes:
        tensor: 0, or 1 for the values of a `separate` split.
        offset: of the first element, from the block's start, in elements.
        digits: of each axis, the most significant digit first; every axis has at least one digit.
        dim: elements of a head that count; the element digits may multiply to more (padding).
    """

    tensor: int
    offset: int
    digits: tuple[Digit, ...]
    dim: int

    def length(self, axis: Axis) -> int:
        """Length of an axis, padding included."""
        product = 1
        for digit in self.digits:
            if digit.axis is axis:
                product *= digit.size
        return product


@dataclass(frozen=True, slots=True)
class Arrangement:
    """One block of one layer.

    Attributes:
        sides: key and value, or one latent.
        block_strides: for each tensor, elements from one block's start to the next one's.
    """

    sides: tuple[Side, ...]
    block_strides: tuple[int, ...]
