"""How large, how many and how long what a peer says on the side channel may be."""

import math
from collections.abc import Callable, Iterable
from typing import Final

from transfer.digest import DIGEST_BYTES
from transfer.errors import FrameError
from transfer.session.messages import (
    Admission,
    Denial,
    Done,
    Fetch,
    Hello,
    Message,
    Offer,
    PatternAsk,
    PatternTold,
    ProbeAsk,
    ProbeTold,
    Refusal,
    Renewal,
    Welcome,
)

NONCE_BYTES: Final = 16
TRANSFER_CHARS: Final = 32
TEXT_CHARS_MAX: Final = 1024
METADATA_BYTES_MAX: Final = 512 * 1024
BACKENDS_MAX: Final = 16
RANKS_MAX: Final = 1024
GROUPS_MAX: Final = 64
LAYERS_MAX: Final = 1024
HEADS_MAX: Final = 4096
DIM_MAX: Final = 65_536
BLOCK_TOKENS_MAX: Final = 65_536
TOKENS_MAX: Final = 1 << 28
PARTS_PER_OFFER_MAX: Final = 1024
TRANSFERS_PER_RENEWAL_MAX: Final = 4096
PATTERN_BYTES_MAX: Final = 1 << 30
WAIT_S_MAX: Final = 3600.0
OFFSET_MAX: Final = (1 << 63) - 1


def check_message(message: Message) -> None:
    """Hold every field of a message that a peer sent to its bounds; layouts are left to their own function.

    Raises:
        FrameError: naming the field.
    """
    _CHECKS[type(message)](message)


def _fail(field: str, expected: str) -> FrameError:
    return FrameError(f"{field} of a message is not {expected}")


def _in_range(value: int, field: str, most: int, least: int = 0) -> None:
    if not least <= value <= most:
        raise _fail(field, f"in {least}..{most}")


def _exact(value: bytes, field: str, length: int) -> None:
    if len(value) != length:
        raise _fail(field, f"{length} bytes")


def _short(texts: Iterable[str], field: str) -> None:
    if any(len(text) > TEXT_CHARS_MAX for text in texts):
        raise _fail(field, f"at most {TEXT_CHARS_MAX} characters")


def _few(items: tuple[object, ...], field: str, count_max: int) -> None:
    if len(items) > count_max:
        raise _fail(field, f"a list of at most {count_max}")


def _transfer(value: str) -> None:
    if len(value) != TRANSFER_CHARS or not set(value) <= set("0123456789abcdef"):
        raise _fail("transfer", f"{TRANSFER_CHARS} hexadecimal digits")


def _duration(value: float, field: str, most: float = WAIT_S_MAX) -> None:
    if not 0.0 <= value <= most:  # NaN is in no range.
        raise _fail(field, f"in 0..{most}")


def _check_hello(m: Hello) -> None:
    _in_range(m.version, "version", OFFSET_MAX)
    _exact(m.nonce, "nonce", NONCE_BYTES)
    _short((m.engine_id, m.epoch, m.host), "engine_id, epoch or host")
    _few(m.backends, "backends", BACKENDS_MAX)
    _short((name for name, _ in m.backends), "backends")
    if any(len(metadata) > METADATA_BYTES_MAX for _, metadata in m.backends):
        raise _fail("metadata", f"at most {METADATA_BYTES_MAX} bytes")


def _check_welcome(m: Welcome) -> None:
    _in_range(m.version, "version", OFFSET_MAX)
    _exact(m.nonce, "nonce", NONCE_BYTES)
    _short((m.engine_id, m.epoch, m.backend, *m.verdict), "engine_id, epoch, backend or verdict")
    _in_range(m.rank, "rank", RANKS_MAX - 1)
    _few(m.ranks, "ranks", RANKS_MAX)
    _short(m.ranks, "ranks")
    _in_range(m.staging_bytes, "staging_bytes", OFFSET_MAX)
    _duration(m.heartbeat_s, "heartbeat_s")


def _check_admission(m: Admission) -> None:
    if len(m.metadata) > METADATA_BYTES_MAX:
        raise _fail("metadata", f"at most {METADATA_BYTES_MAX} bytes")


def _check_refusal(m: Refusal) -> None:
    _short((m.detail,), "detail")


def _check_fetch(m: Fetch) -> None:
    _transfer(m.transfer)
    _exact(m.nonce, "nonce", NONCE_BYTES)
    _exact(m.prompt_hash, "prompt_hash", DIGEST_BYTES)
    _in_range(m.first_token, "first_token", TOKENS_MAX)
    _in_range(m.reader_count, "reader_count", RANKS_MAX, 1)
    _duration(m.wait_s, "wait_s")


def _check_offer(m: Offer) -> None:
    _transfer(m.transfer)
    _in_range(m.token_count, "token_count", TOKENS_MAX)
    _few(m.parts, "parts", PARTS_PER_OFFER_MAX)
    for part in m.parts:
        _in_range(part.group, "group", GROUPS_MAX - 1)
        _in_range(part.head_first, "head_first", HEADS_MAX)
        _in_range(part.head_count, "head_count", HEADS_MAX, 1)
        _in_range(part.token_first, "token_first", TOKENS_MAX)
        _in_range(part.token_count, "token_count", TOKENS_MAX, 1)
        _in_range(part.offset, "offset", OFFSET_MAX)
        _in_range(part.length_bytes, "length_bytes", OFFSET_MAX, 1)
        _exact(part.digest, "digest", DIGEST_BYTES)


def _check_denial(m: Denial) -> None:
    _transfer(m.transfer)
    _short((m.detail,), "detail")


def _check_renewal(m: Renewal) -> None:
    _few(m.transfers, "transfers", TRANSFERS_PER_RENEWAL_MAX)
    for transfer in m.transfers:
        _transfer(transfer)


def _check_done(m: Done) -> None:
    _transfer(m.transfer)
    _exact(m.nonce, "nonce", NONCE_BYTES)
    _exact(m.prompt_hash, "prompt_hash", DIGEST_BYTES)
    _in_range(m.reader_count, "reader_count", RANKS_MAX, 1)


def _check_probe_ask(m: ProbeAsk) -> None:
    _short((m.address,), "address")
    _duration(m.timeout_s, "timeout_s")


def _check_probe_told(m: ProbeTold) -> None:
    texts = (m.address, m.failure, m.detail, m.verdict, m.verdict_reason, m.backend, m.transport, m.epoch)
    _short(texts, "text")
    _duration(m.latency_s or 0.0, "latency_s", math.inf)
    _duration(m.bytes_per_s or 0.0, "bytes_per_s", math.inf)


def _check_pattern_ask(m: PatternAsk) -> None:
    _in_range(m.length_bytes, "length_bytes", PATTERN_BYTES_MAX, 1)


def _check_pattern_told(m: PatternTold) -> None:
    _in_range(m.offset, "offset", OFFSET_MAX)
    _in_range(m.length_bytes, "length_bytes", PATTERN_BYTES_MAX)
    _exact(m.digest, "digest", DIGEST_BYTES)


_CHECKS: dict[type, Callable[..., None]] = {
    Hello: _check_hello,
    Welcome: _check_welcome,
    Admission: _check_admission,
    Refusal: _check_refusal,
    Fetch: _check_fetch,
    Offer: _check_offer,
    Denial: _check_denial,
    Renewal: _check_renewal,
    Done: _check_done,
    ProbeAsk: _check_probe_ask,
    ProbeTold: _check_probe_told,
    PatternAsk: _check_pattern_ask,
    PatternTold: _check_pattern_told,
}
