"""Every field that a peer fills is held to a bound."""

import math

import msgspec
import pytest

from transfer.canonical import Form
from transfer.errors import FailureKind, FrameError
from transfer.session.bounds import check_message
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
    WirePart,
)

ID, NONCE = "a" * 32, b"n" * 16
PART = WirePart(
    form=Form.TOKENS,
    group=0,
    head_first=0,
    head_count=1,
    token_first=0,
    token_count=1,
    offset=0,
    length_bytes=1,
    digest=NONCE,
)
HELLO = Hello(version=1, nonce=NONCE, engine_id="e", epoch="1", backends=(("tcp", b"m"),), host="h:1")
WELCOME = Welcome(version=1, nonce=NONCE, engine_id="e", epoch="1", rank=0, ranks=("h:1",), layout={})
FETCH = Fetch(transfer=ID, nonce=NONCE, prompt_hash=NONCE, first_token=0, reader_count=1, wait_s=1.0)
OFFER = Offer(transfer=ID, parts=(PART,), token_count=1, is_last=True)
DONE = Done(transfer=ID, nonce=NONCE, prompt_hash=NONCE, reader_count=1)
TOLD = ProbeTold(address="h:1", latency_s=0.1, bytes_per_s=1e9)
PATTERN = PatternTold(offset=0, length_bytes=1, digest=NONCE)


@pytest.mark.parametrize(
    "message",
    [
        HELLO,
        WELCOME,
        Refusal(kind=FailureKind.OVERLOADED),
        FETCH,
        OFFER,
        Denial(transfer=ID, kind=FailureKind.LEASE_EXPIRED),
        Renewal(transfers=(ID,)),
        DONE,
        ProbeAsk(address="h:1", timeout_s=1.0),
        TOLD,
        PatternAsk(length_bytes=1),
        PATTERN,
    ],
    ids=lambda m: type(m).__name__,
)
def test_a_message_within_bounds_passes(message: Message) -> None:
    check_message(message)


def parts(**changes: object) -> dict[str, object]:
    return {"parts": (msgspec.structs.replace(PART, **changes),)}


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (HELLO, {"nonce": b"short"}),
        (HELLO, {"engine_id": "x" * 1025}),
        (HELLO, {"host": "x" * 1025}),
        (HELLO, {"backends": (("b", b""),) * 17}),
        (HELLO, {"backends": (("b" * 1025, b""),)}),
        (HELLO, {"backends": (("b", b"m" * (512 * 1024 + 1)),)}),
        (HELLO, {"version": -1}),
        (WELCOME, {"nonce": b""}),
        (WELCOME, {"rank": -1}),
        (WELCOME, {"ranks": ("h",) * 1025}),
        (WELCOME, {"verdict": ("native", "x" * 1025)}),
        (WELCOME, {"staging_bytes": 1 << 63}),
        (Admission(), {"metadata": b"m" * (512 * 1024 + 1)}),
        (WELCOME, {"heartbeat_s": math.nan}),
        (FETCH, {"transfer": "A" * 32}),
        (FETCH, {"transfer": "a" * 31}),
        (FETCH, {"prompt_hash": b"x" * 15}),
        (FETCH, {"first_token": -1}),
        (FETCH, {"reader_count": 0}),
        (FETCH, {"reader_count": 1025}),
        (FETCH, {"wait_s": math.inf}),
        (FETCH, {"wait_s": -0.1}),
        (OFFER, {"token_count": (1 << 28) + 1}),
        (OFFER, {"parts": (PART,) * 1025}),
        (OFFER, parts(digest=b"")),
        (OFFER, parts(length_bytes=0)),
        (OFFER, parts(offset=-1)),
        (OFFER, parts(head_count=0)),
        (OFFER, parts(token_count=1 << 40)),
        (OFFER, parts(group=64)),
        (Denial(transfer=ID, kind=FailureKind.CLOSED), {"detail": "x" * 1025}),
        (Refusal(kind=FailureKind.CLOSED), {"detail": "x" * 1025}),
        (Renewal(transfers=()), {"transfers": (ID,) * 4097}),
        (Renewal(transfers=()), {"transfers": ("",)}),
        (DONE, {"nonce": b"x" * 17}),
        (DONE, {"reader_count": -1}),
        (ProbeAsk(address="", timeout_s=1.0), {"timeout_s": 1e9}),
        (TOLD, {"latency_s": -1.0}),
        (TOLD, {"bytes_per_s": math.nan}),
        (TOLD, {"transport": "x" * 1025}),
        (PatternAsk(length_bytes=1), {"length_bytes": (1 << 30) + 1}),
        (PatternAsk(length_bytes=1), {"length_bytes": 0}),
        (PATTERN, {"offset": -1}),
        (PATTERN, {"digest": b""}),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, msgspec.Struct) else "-".join(v),
)
def test_a_field_out_of_bounds_is_refused(message: Message, changes: dict[str, object]) -> None:
    with pytest.raises(FrameError, match="of a message is not"):
        check_message(msgspec.structs.replace(message, **changes))
