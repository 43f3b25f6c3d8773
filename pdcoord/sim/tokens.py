"""What a prompt hashes to, and which tokens an emulated model answers it with."""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from pdcoord.sim import text
from pdcoord.sim.text import WORD_BYTES, WORD_FIRST, WORD_TOTAL

BlockHash = bytes
"""Chained hash of a block and all blocks before it, 32 bytes, as vLLM's sha256 hashes are."""

DRAWN_TOKENS_MIN = 16
DRAWN_TOKENS_MAX = 256
_MASK = 2**64 - 1


def pack_ids(ids: Sequence[int]) -> bytes:
    """Token ids as little-endian 32-bit words."""
    return struct.pack(f"<{len(ids)}I", *ids)


def root_hash(model: str, cache_salt: str) -> BlockHash:
    """The parent of a prompt's first block: prompts of another model or salt never match."""
    return hashlib.sha256(f"{model}\0{cache_salt}".encode("utf-8", "surrogatepass")).digest()


def chain_hashes(parent: BlockHash, ids: Sequence[int], block_tokens: int) -> list[BlockHash]:
    """One hash for each full block of `ids`; a partial last block has none."""
    packed = pack_ids(ids)
    step = 4 * block_tokens
    hashes = []
    for end in range(step, len(packed) + 1, step):
        parent = hashlib.sha256(parent + packed[end - step : end]).digest()
        hashes.append(parent)
    return hashes


def prompt_digest(ids: Sequence[int]) -> int:
    """64 bits that stand for the content of a run of tokens, whatever the block size."""
    return xxhash.xxh3_64_intdigest(pack_ids(ids))


def mix(one: int, other: int) -> int:
    """A 64-bit digest of two, in order."""
    return xxhash.xxh3_64_intdigest(struct.pack("<QQ", one & _MASK, other & _MASK))


@dataclass(frozen=True, slots=True)
class Context:
    """What a model makes the rest of an answer from.

    Attributes:
        content: digest of what was asked, for `answer_token` and `drawn_length`.
        said: tokens of the answer to it that the prompt ends with already.
    """

    content: int
    said: int


def read_context(model_seed: int, prompt: Sequence[int], choice_index: int) -> Context:
    """Tell what was asked from what the model has answered to it.

    An answer that is put behind its prompt, as ids or as text, goes on as it would have without. So the words
    at a prompt's end count as said if they are, from one of them to the last, the model's answer to all that
    is before them. The longest such run is taken: then a prompt with one more word of its own answer has the
    same beginning, and an answer may be continued any number of times.
    """
    data = text.read(prompt)
    words = list(text.said(data))
    digest = xxhash.xxh3_64(data[: len(data) - WORD_BYTES * len(words)])
    while words:
        content = mix(model_seed, digest.intdigest())
        if words[-1] == answer_token(content, 0, choice_index) and all(
            each == answer_token(content, at, choice_index) for at, each in enumerate(reversed(words))
        ):
            return Context(content, len(words))
        digest.update(text.piece(words.pop()))
    return Context(mix(model_seed, digest.intdigest()), 0)


def answer_token(content: int, position: int, choice_index: int) -> int:
    """The token a model puts at `position` of its answer to a context of digest `content`.

    Independent of engine, block size and batch, so that a split answer equals a colocated one.
    """
    drawn = xxhash.xxh3_64_intdigest(struct.pack("<QII", content & _MASK, position, choice_index))
    return WORD_FIRST + drawn % WORD_TOTAL


def answer_ids(model_seed: int, prompt: Sequence[int], count: int, choice_index: int = 0) -> tuple[int, ...]:
    """The first tokens that a model of this seed answers, from right KV, whoever computes them."""
    context = read_context(model_seed, prompt, choice_index)
    return tuple(answer_token(context.content, context.said + at, choice_index) for at in range(count))


def drawn_length(content: int, choice_index: int) -> int:
    """How many tokens the model answers of its own accord, in 16..256."""
    drawn = mix(content, choice_index + 1)
    return DRAWN_TOKENS_MIN + drawn % (DRAWN_TOKENS_MAX - DRAWN_TOKENS_MIN + 1)
