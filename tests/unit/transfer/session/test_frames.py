"""The side channel's bytes: any bytes give messages or a FrameError, and a signed channel only its own."""

import hashlib
import hmac
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer.errors import FailureKind, FrameError, NotAuthenticatedError
from transfer.session.frames import Channel, FrameReader, decode, encode
from transfer.session.messages import Done, Hello, Message, PatternAsk, Refusal, Renewal, Welcome

KEY = b"a shared secret of enough length"
A, B = b"a" * 16, b"b" * 16
HELLO = Hello(version=1, nonce=A, engine_id="e", epoch="1", layout={"rank": 0})
WELCOME = Welcome(version=1, nonce=B, engine_id="f", epoch="2", rank=0, ranks=("h:1",), layout={})
RENEWAL = Renewal(transfers=("c" * 32,))
DONE = Done(transfer="c" * 32, nonce=A, prompt_hash=B, reader_count=1)


def pair(key: bytes = KEY, other: bytes | None = None) -> tuple[Channel, Channel]:
    return (
        Channel(key, A, is_dialler=True),
        Channel(key if other is None else other, B, is_dialler=False),
    )


def met(key: bytes = KEY) -> tuple[Channel, Channel]:
    dialler, dialled = pair(key)
    assert dialled.feed(dialler.encode(HELLO)) == [HELLO]
    assert dialler.feed(dialled.encode(WELCOME)) == [WELCOME]
    return dialler, dialled


@given(st.lists(st.sampled_from([RENEWAL, DONE, HELLO]), max_size=6), st.integers(1, 40))
def test_frames_come_out_however_the_stream_is_cut(messages: list[Message], step: int) -> None:
    stream = b"".join(encode(m) for m in messages)
    reader = FrameReader()
    bodies = [b for at in range(0, len(stream), step) for b in reader.feed(stream[at : at + step])]
    assert [decode(body[1:]) for body in bodies] == messages
    reader.close()


@given(st.lists(st.binary(max_size=300)))
def test_any_bytes_give_messages_or_a_frame_error(chunks: list[bytes]) -> None:
    reader = FrameReader(bytes_max=200)
    channels = [*pair(b""), *pair(KEY)]
    for chunk in chunks:
        for feed in (reader.feed, *(c.feed for c in channels)):
            try:
                feed(chunk)
            except FrameError:
                continue
        assert reader.held_bytes < 204, "no more than one frame is held"


@given(st.binary(max_size=200))
def test_any_payload_is_a_message_or_a_frame_error(payload: bytes) -> None:
    for data in (payload, b"\x81\xa4type" + payload, b"\x82\xa4type\xa5hello" + payload):
        try:
            decode(data)
        except FrameError:
            continue


def mutated(valid: bytes, at: int, by: bytes) -> bytes:
    return valid[: at % len(valid)] + by + valid[at % len(valid) + len(by) :]


@given(st.sampled_from([HELLO, WELCOME, DONE, RENEWAL]), st.integers(0), st.binary(min_size=1, max_size=8))
def test_a_message_with_wrong_bytes_in_it_is_a_message_or_a_frame_error(
    message: Message, at: int, by: bytes
) -> None:
    try:
        decode(mutated(msgspec.msgpack.encode(message), at, by))
    except FrameError:
        return


@pytest.mark.parametrize(
    "layout",
    [
        b"\x81\xa1a" * 100_000 + b"\xc0",
        b"\x81" + b"\x91" * 100_000 + b"\xc0\xc0",
        b"\x81\x80\xc0",
        b"\x81\x91\x80\xc0",
        b"\xdf\xff\xff\xff\xff",
        b"\x81\xa1a\xc7\x0c\xff" + b"\xff" * 12,
        b"\x81\xa1a\xd4\x05\x00",
        b"\x81\xa1a\xdb\xff\xff\xff\xff",
    ],
    ids=[
        "deep maps",
        "deep key",
        "map as key",
        "key that holds a map",
        "map of 4 billion",
        "timestamp",
        "ext",
        "text of 4 GiB",
    ],
)
def test_hostile_layouts_are_refused_or_harmless(layout: bytes) -> None:
    head = msgspec.msgpack.encode({"type": "hello", "version": 1, "nonce": A, "engine_id": "", "epoch": ""})
    assert head[0] == 0x85
    try:
        decode(b"\x86" + head[1:] + b"\xa6layout" + layout)
    except FrameError:
        return


@pytest.mark.parametrize("head", [b"\0\0\0\0", b"\xff\xff\xff\xff", (1025).to_bytes(4, "big")])
def test_a_hostile_length_is_refused_before_its_bytes_come(head: bytes) -> None:
    reader = FrameReader(bytes_max=1024)
    with pytest.raises(FrameError, match="1 to 1024"):
        reader.feed(head)
    assert reader.held_bytes == 0


def test_a_stream_that_ends_inside_a_frame_is_told() -> None:
    dialler, dialled = met()
    dialled.feed(dialler.encode(DONE)[:-1])
    with pytest.raises(FrameError, match="ended"):
        dialled.close()


@pytest.mark.parametrize("key", [b"", KEY], ids=["plain", "signed"])
def test_both_sides_talk_after_their_first_words(key: bytes) -> None:
    dialler, dialled = met(key)
    assert dialler.is_agreed
    assert dialled.is_agreed
    for _ in range(3):
        assert dialled.feed(dialler.encode(RENEWAL) + dialler.encode(DONE)) == [RENEWAL, DONE]
        assert dialler.feed(dialled.encode(PatternAsk(length_bytes=4))) == [PatternAsk(length_bytes=4)]


@pytest.mark.parametrize(("ours", "theirs"), [(b"", KEY), (KEY, b""), (KEY, b"another key")])
def test_another_key_or_none_is_not_authenticated_on_both_sides(ours: bytes, theirs: bytes) -> None:
    dialler, dialled = pair(ours, theirs)
    with pytest.raises(NotAuthenticatedError):
        dialled.feed(dialler.encode(HELLO))
    refusal = Refusal(kind=FailureKind.NOT_AUTHENTICATED)
    with pytest.raises(NotAuthenticatedError):
        dialler.feed(dialled.encode(refusal))


def test_a_refusal_is_heard_and_ends_the_connection() -> None:
    dialler, dialled = pair()
    dialled.feed(dialler.encode(HELLO))
    refusal = Refusal(kind=FailureKind.VERSION_MISMATCH, detail="speak 1")
    assert dialler.feed(dialled.encode(refusal) + b"\0\0\0\1\0") == [refusal]
    with pytest.raises(FrameError, match="over"):
        dialler.feed(b"")


def twice(frames: list[bytes]) -> list[bytes]:
    return [frames[0], frames[0]]


def swapped(frames: list[bytes]) -> list[bytes]:
    return [frames[1], frames[0]]


def gap(frames: list[bytes]) -> list[bytes]:
    return [frames[0], frames[2]]


def changed(frames: list[bytes]) -> list[bytes]:
    return [frames[0][:-1] + bytes([frames[0][-1] ^ 1])]


def cut_tag(frames: list[bytes]) -> list[bytes]:
    return [(21).to_bytes(4, "big") + frames[0][4:25]]


@pytest.mark.parametrize("attack", [twice, swapped, gap, changed, cut_tag])
def test_replayed_reordered_lost_or_changed_frames_are_refused(
    attack: Callable[[list[bytes]], list[bytes]],
) -> None:
    dialler, dialled = met()
    frames = attack([dialler.encode(RENEWAL) for _ in range(3)])
    with pytest.raises(NotAuthenticatedError):
        for frame in frames:
            dialled.feed(frame)
    with pytest.raises(FrameError, match="over"):
        dialled.feed(dialler.encode(RENEWAL))


def test_a_frame_sent_back_is_refused() -> None:
    dialler, dialled = met()
    with pytest.raises(NotAuthenticatedError):
        dialler.feed(dialler.encode(RENEWAL))
    fresh = Channel(KEY, A, is_dialler=True)
    with pytest.raises(NotAuthenticatedError):
        fresh.feed(fresh.encode(HELLO))
    plain = Channel(b"", A, is_dialler=True)
    with pytest.raises(FrameError):
        plain.feed(plain.encode(HELLO))
    assert dialled.is_agreed


def test_a_connection_replayed_as_a_whole_gets_no_further_than_its_hello() -> None:
    dialler, dialled = pair()
    hello = dialler.encode(HELLO)
    dialled.feed(hello)
    dialler.feed(dialled.encode(WELCOME))
    done = dialler.encode(DONE)
    again = Channel(KEY, b"c" * 16, is_dialler=False)
    again.feed(hello)
    again.encode(msgspec.structs.replace(WELCOME, nonce=b"c" * 16))
    with pytest.raises(NotAuthenticatedError):
        again.feed(done)


def test_an_old_welcome_does_not_answer_a_new_hello() -> None:
    dialler, dialled = pair()
    dialled.feed(dialler.encode(HELLO))
    welcome = dialled.encode(WELCOME)
    later = Channel(KEY, b"d" * 16, is_dialler=True)
    later.encode(msgspec.structs.replace(HELLO, nonce=b"d" * 16))
    with pytest.raises(NotAuthenticatedError):
        later.feed(welcome)


@pytest.mark.parametrize("key", [b"", KEY], ids=["plain", "signed"])
def test_words_out_of_turn_are_refused(key: bytes) -> None:
    dialler, dialled = pair(key)
    with pytest.raises(FrameError, match="out of turn"):
        dialler.feed(encode(WELCOME))
    hello = pair(key)[0].encode(HELLO)
    with pytest.raises(FrameError, match="out of turn"):
        dialled.feed(hello + hello)
    one, other = met(key)
    with pytest.raises(FrameError, match="in the middle"):
        other.feed(one.encode(HELLO))


def test_the_first_word_is_hello() -> None:
    with pytest.raises(FrameError, match="first message is Done"):
        Channel(b"", B, is_dialler=False).feed(encode(DONE))


def test_a_frame_of_neither_kind_is_refused() -> None:
    with pytest.raises(FrameError, match="neither"):
        pair(b"")[1].feed(b"\0\0\0\2\7\7")


def test_a_message_too_long_for_a_frame_is_not_sent() -> None:
    dialler = Channel(KEY, A, is_dialler=True, bytes_max=100)
    with pytest.raises(FrameError, match="does not fit"):
        dialler.encode(msgspec.structs.replace(HELLO, host="x" * 100))


def test_the_first_frame_is_signed_as_documented() -> None:
    frame = pair()[0].encode(HELLO)
    payload = msgspec.msgpack.encode(HELLO)
    tag = hmac.digest(KEY, b"pdcoord-kv-1 first" + bytes(16) + b"D" + bytes(8) + payload, hashlib.sha256)
    assert frame == (33 + len(payload)).to_bytes(4, "big") + b"\1" + tag + payload
