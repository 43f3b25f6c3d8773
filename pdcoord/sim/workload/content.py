"""Prompts without text: which parts they are made of, and so which prefixes they share."""

from dataclasses import dataclass
from typing import Self

from pdcoord.sim.workload.draws import mix


@dataclass(frozen=True, slots=True)
class Content:
    """Parts one after another, each the beginning of an endless text with a number for a name.

    Two contents share a key exactly where they are made of the same parts up to there, cut at the same
    places. The keys of one part are consecutive numbers from a drawn one of 63 bits: two parts would have
    to be drawn within a part's length of each other to be taken for equal, which a million parts of a
    thousand keys are with a chance of 1 in 10,000.

    Attributes:
        state: stands for all parts before and the name of the last.
        keys: one for each full block.
    """

    key_tokens: int
    token_count: int = 0
    state: int = 0
    keys: tuple[int, ...] = ()

    def then(self, part: int, token_count: int) -> Self:
        """This with the first `token_count` tokens of a part behind it."""
        if token_count <= 0:
            return self
        state = mix(mix(self.state, self.token_count), part)
        total = self.token_count + token_count
        keys = self.keys + tuple(range(state + len(self.keys), state + total // self.key_tokens))
        return type(self)(self.key_tokens, total, state, keys)


def chained(ids: tuple[int, ...], id_tokens: int, token_count: int, key_tokens: int) -> tuple[int, ...]:
    """Keys of a prompt that is known by an id for each block of `id_tokens`, the last perhaps not full.

    `key_tokens` divides `id_tokens`.
    """
    keys: list[int] = []
    state = 0
    key_count = token_count // key_tokens
    per_id = id_tokens // key_tokens
    for block_id in ids:
        if len(keys) >= key_count:
            break
        state = mix(state, block_id)
        keys.extend(range(state, state + min(per_id, key_count - len(keys))))
    return tuple(keys)
