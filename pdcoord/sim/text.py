"""The emulated model's tokenizer: reversible for any text, four bytes a token for ASCII."""

import struct
from collections.abc import Iterator, Sequence

# Ranges of ids. They do not overlap, and all stay below 2**31.
WORD_FIRST = 256
"""Ids below are single bytes; from here on come the words that the model itself says."""
WORD_TOTAL = 4_096
_PAIR_FIRST = 1 << 16
_QUAD_FIRST = 1 << 24
"""Four ASCII bytes as one little-endian word; the last is not NUL, hence at least this."""
TOKEN_ID_LIMIT = 1 << 31

_HEADS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w", "y", "z")
_TAILS = ("a", "e", "i", "o")
_SYLLABLES = tuple(head + tail for head in _HEADS for tail in _TAILS)
WORD_BYTES = 5
"""Every word with its leading space."""
_UNREADABLE = b"\xff"
"""In front of an id that this tokenizer never makes; in no UTF-8 text."""


class UnknownTokenError(ValueError):
    """An id that this tokenizer never makes."""

    def __init__(self, token_id: int) -> None:
        super().__init__(f"token id is {token_id}, which is in no range of this vocabulary")
        self.token_id = token_id


def encode(text: str) -> list[int]:
    """Token ids of a text; equal beginnings give equal ids up to the last four bytes of them.

    But a text of nothing but words, as the model says them, has their ids: so who asks how long an answer is
    learns what it was counted as.
    """
    data = text.encode("utf-8", "surrogatepass")
    words = list(said(data))
    if WORD_BYTES * len(words) == len(data):
        return words[::-1]
    if data.isascii() and b"\0" not in data:
        return _encode_plain(data)
    ids: list[int] = []
    at = 0
    while at < len(data):
        quad = data[at : at + 4]
        if len(quad) == 4 and quad.isascii() and b"\0" not in quad:
            ids.append(int.from_bytes(quad, "little"))
            at += 4
        elif len(quad) >= 2:
            ids.append(_PAIR_FIRST + int.from_bytes(quad[:2], "little"))
            at += 2
        else:
            ids.append(quad[0])
            at += 1
    return ids


def _encode_plain(data: bytes) -> list[int]:
    quads = len(data) // 4
    ids = list(struct.unpack_from(f"<{quads}I", data))
    rest = data[4 * quads :]
    if len(rest) >= 2:
        ids.append(_PAIR_FIRST + int.from_bytes(rest[:2], "little"))
        rest = rest[2:]
    ids.extend(rest)
    return ids


def word(token_id: int) -> str:
    """What an id of the answer range reads as, with its leading space."""
    first, second = divmod(token_id - WORD_FIRST, len(_SYLLABLES))
    return f" {_SYLLABLES[first]}{_SYLLABLES[second]}"


def piece(token_id: int) -> bytes:
    """The bytes of one token.

    Raises:
        UnknownTokenError: if the id is in no range.
    """
    if 0 <= token_id < WORD_FIRST:
        return bytes((token_id,))
    if token_id < WORD_FIRST + WORD_TOTAL and token_id >= 0:
        return _WORDS[token_id - WORD_FIRST]
    if _PAIR_FIRST <= token_id < 2 * _PAIR_FIRST:
        return (token_id - _PAIR_FIRST).to_bytes(2, "little")
    if _QUAD_FIRST <= token_id < TOKEN_ID_LIMIT:
        return token_id.to_bytes(4, "little")
    raise UnknownTokenError(token_id)


def said(data: bytes) -> Iterator[int]:
    """The words that a text ends with, last first, as ids."""
    end = len(data)
    while (word_id := _WORD_IDS.get(data[max(0, end - WORD_BYTES) : end])) is not None:
        yield word_id
        end -= WORD_BYTES


def read(ids: Sequence[int]) -> bytes:
    """What a model reads of token ids: one text gives the same bytes however it was cut into tokens."""
    # All of an ASCII prompt but its end, and that is most prompts: the ids are the bytes.
    quads = len(ids) - 3 if len(ids) > 3 and min(ids[:-3]) >= _QUAD_FIRST else 0
    return struct.pack(f"<{quads}I", *ids[:quads]) + b"".join(map(_piece_or_id, ids[quads:]))


def _piece_or_id(token_id: int) -> bytes:
    if _QUAD_FIRST <= token_id < TOKEN_ID_LIMIT:
        return token_id.to_bytes(4, "little")
    try:
        return piece(token_id)
    except UnknownTokenError:
        return _UNREADABLE + struct.pack("<q", token_id)


def decode(ids: Sequence[int]) -> str:
    """The text of token ids; bytes that are no UTF-8 read as the replacement character.

    Raises:
        UnknownTokenError: if an id is in no range.
    """
    return b"".join(map(piece, ids)).decode("utf-8", "replace")


_WORDS = tuple(word(each).encode() for each in range(WORD_FIRST, WORD_FIRST + WORD_TOTAL))
_WORD_IDS = {each: WORD_FIRST + index for index, each in enumerate(_WORDS)}
