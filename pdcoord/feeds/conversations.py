"""Tokens of recent texts, so that a text that begins as one of them costs only its end to tokenize."""

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

import xxhash

CHUNK_CHARS = 4_096
"""Grain at which a common beginning is found; encoding as much again takes about a millisecond."""
MARGIN_CHARS = 256
"""What tokens may depend on to their right: more than any word, run of spaces or merged punctuation."""
RUN_TOKENS = 32
"""Tokens in a row that must come out as before until the beginning is taken to be tokenized alike."""
_NUDGE_CHARS = 16
_ENTRY_BYTES = 512
_CHUNK_BYTES = 160
"""What Python keeps for one chunk: a key here, a key in the index, a mark."""

# Token ids in 32-bit words; the class takes no parameter at run time before Python 3.12.
if TYPE_CHECKING:
    Ids: TypeAlias = array[int]
else:
    Ids = array


class Encoding(Protocol):
    """What the `tokenizers` library tells of one encoded text (0.23)."""

    @property
    def ids(self) -> list[int]: ...

    def char_to_token(self, char_pos: int) -> int | None: ...

    def token_to_chars(self, token_index: int) -> tuple[int, int] | None: ...


Encode = Callable[[str], Encoding]
"""Tokenizes a text without adding special tokens."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in a text where a token begins.

    Attributes:
        chars: characters before it.
        tokens: tokens before it.
    """

    chars: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Encoded:
    """One text's tokens.

    Attributes:
        keys: chained hashes of its full chunks.
        marks: one near the end of each full chunk, in order.
    """

    ids: Ids
    keys: tuple[int, ...]
    marks: tuple[Mark, ...]

    @property
    def size_bytes(self) -> int:
        return _ENTRY_BYTES + self.ids.itemsize * len(self.ids) + _CHUNK_BYTES * len(self.keys)


class Conversations:
    """Encoded texts, least recently used first out; not safe to use from two threads at once.

    Attributes:
        bytes_max: of all that is kept; a text that alone is larger is not kept.
    """

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self._texts: OrderedDict[int, Encoded] = OrderedDict()
        self._by_chunk: dict[int, int] = {}
        self._used_bytes = 0

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    def get(self, key: int) -> Encoded | None:
        """The tokens of this very text."""
        known = self._texts.get(key)
        if known is not None:
            self._texts.move_to_end(key)
        return known

    def nearest(self, keys: tuple[int, ...]) -> tuple[Encoded, int] | None:
        """The text that begins as one of these chunks does for longest, and how many are common."""
        for count in range(len(keys), 0, -1):
            other = self._by_chunk.get(keys[count - 1])
            if other is not None:
                self._texts.move_to_end(other)
                return self._texts[other], count
        return None

    def keep(self, key: int, encoded: Encoded) -> None:
        """Note a text's tokens."""
        if key in self._texts or encoded.size_bytes > self.bytes_max:
            return
        self._texts[key] = encoded
        self._used_bytes += encoded.size_bytes
        self._by_chunk.update(dict.fromkeys(encoded.keys, key))
        while self._used_bytes > self.bytes_max:
            self._drop_oldest()

    def validate(self) -> None:
        """Assert that the index leads to what is kept, and that sizes add up."""
        assert self._used_bytes == sum(each.size_bytes for each in self._texts.values())
        assert self._used_bytes <= self.bytes_max
        for chunk, key in self._by_chunk.items():
            assert chunk in self._texts[key].keys, "a chunk leads to a text without it"

    def _drop_oldest(self) -> None:
        key, dropped = self._texts.popitem(last=False)
        self._used_bytes -= dropped.size_bytes
        for chunk in dropped.keys:
            if self._by_chunk.get(chunk) == key:
                del self._by_chunk[chunk]


def keys_of(text: str) -> tuple[int, tuple[int, ...]]:
    """The key of a text, and the chained keys of its full chunks.

    Raises:
        UnicodeError: if the text holds half a surrogate pair.
    """
    chain = 0
    keys = []
    whole = len(text) // CHUNK_CHARS * CHUNK_CHARS
    for start in range(0, whole, CHUNK_CHARS):
        chunk = text[start : start + CHUNK_CHARS].encode()
        chain = xxhash.xxh3_64_intdigest(chunk, chain)
        keys.append(chain)
    rest = text[whole:].encode()
    # The length sets a text apart from one of its own chunks.
    return xxhash.xxh3_64_intdigest(rest + len(text).to_bytes(8, "little"), chain), tuple(keys)


def encode_whole(encode: Encode, text: str, keys: tuple[int, ...]) -> Encoded:
    """Tokenize a text of which nothing is known."""
    encoding = encode(text)
    return Encoded(array("I", encoding.ids), keys, tuple(_marks(encoding, len(keys), Mark(0, 0), 0)))


def encode_end(
    encode: Encode, text: str, keys: tuple[int, ...], known: Encoded, common_chunks: int
) -> Encoded | None:
    """Tokenize a text whose first chunks are those of a known one; None where that cannot be relied on.

    Tokens are those of the whole text for every tokenizer that finds into step again within RUN_TOKENS
    of a place where it was set down, and looks no further ahead than MARGIN_CHARS.
    """
    limit = common_chunks * CHUNK_CHARS - MARGIN_CHARS
    usable = [mark for mark in known.marks[:common_chunks] if mark.chars <= limit]
    if len(usable) < 2:
        return None
    begin, meet = usable[-2:]
    encoding = encode(text[begin.chars :])
    at = _token_at(encoding, meet.chars - begin.chars)
    if at is None or at[0] != meet.chars - begin.chars:
        return None
    fresh = array("I", encoding.ids)
    index = at[1]
    if index < RUN_TOKENS or meet.tokens - begin.tokens < RUN_TOKENS:
        return None
    if fresh[index - RUN_TOKENS : index] != known.ids[meet.tokens - RUN_TOKENS : meet.tokens]:
        return None
    ids = known.ids[: meet.tokens] + fresh[index:]
    kept = tuple(usable)
    shift = Mark(begin.chars, meet.tokens - index)
    return Encoded(ids, keys, kept + tuple(_marks(encoding, len(keys), shift, len(kept))))


def _marks(encoding: Encoding, chunk_count: int, shift: Mark, first: int) -> Iterator[Mark]:
    """Marks at the chunks from `first` on, in the coordinates of the whole text.

    Ends at the first chunk that has none: an index stands for the chunk in `Encoded.marks`.
    """
    for chunk in range(first + 1, chunk_count + 1):
        # Back from the chunk's end, so that a text which has only this chunk in common can use it.
        place = _token_at(encoding, chunk * CHUNK_CHARS - 2 * MARGIN_CHARS - shift.chars)
        if place is None:
            return
        yield Mark(place[0] + shift.chars, place[1] + shift.tokens)


def _token_at(encoding: Encoding, char: int) -> tuple[int, int] | None:
    """Where a token at or just behind a character begins, and its index; spaces may be part of none."""
    for near in range(max(char, 0), max(char, 0) + _NUDGE_CHARS):
        index = encoding.char_to_token(near)
        if index is not None:
            span = encoding.token_to_chars(index)
            return None if span is None else (span[0], index)
    return None
