"""The digests that prove a part arrived as it was packed, and a prompt is the one that was prefilled."""

import hashlib
import sys
from array import array
from collections.abc import Sequence

import xxhash

DIGEST_BYTES = 16


def part_digest(data: bytes | bytearray | memoryview) -> bytes:
    """XXH3-128 of a part: finds what a network, a late write or a reused buffer did; no signature."""
    return xxhash.xxh3_128_digest(data)


def prompt_hash(token_ids: Sequence[int], extra: Sequence[str] = ()) -> bytes:
    """BLAKE2b-128 of a prompt.

    Args:
        token_ids: in 0 .. 2**32 - 1.
        extra: whatever else makes the KV of the same tokens differ (a LoRA adapter, images).
    """
    hasher = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for text in extra:
        raw = text.encode()
        hasher.update(len(raw).to_bytes(4, "little"))
        hasher.update(raw)
    hasher.update(b"\xff\xff\xff\xff")
    packed = array("I", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    hasher.update(packed)
    return hasher.digest()


def pattern(seed: str, length_bytes: int) -> bytes:
    """Bytes that nobody has by chance, for probes; the same for the same seed."""
    return hashlib.shake_256(seed.encode()).digest(length_bytes)
