"""Links without a network: addresses, what is sent and heard, and the reasons of an end."""

import asyncio
from typing import Any

import pytest

from transfer.errors import FailureKind
from transfer.links import (
    MISSED_MAX,
    Link,
    LinkError,
    LinkLimits,
    Peer,
    is_dialable,
    is_loopback,
    receive_one,
    split_address,
)
from transfer.session.frames import Channel
from transfer.session.messages import Done, Hello, Message, Renewal, Welcome

NONCES = bytes(range(16)), bytes(range(16, 32))
PEER = Peer("engine", "epoch", None)
LIMITS = LinkLimits(heartbeat_s=0.01, handshake_timeout_s=1.0, out_bytes_max=10_000)


@pytest.mark.parametrize(
    ("address", "found"),
    [("10.0.0.1:80", ("10.0.0.1", 80)), ("[::1]:65535", ("::1", 65_535)), ("a.b:1", ("a.b", 1))],
)
def test_addresses(address: str, found: tuple[str, int]) -> None:
    assert split_address(address) == found


@pytest.mark.parametrize(
    "address", ["", "a", ":1", "a:", "a:0", "a:65536", "a:-1", "a:1e3", "a:٣", "a:9999999999"]
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(LinkError) as raised:
        split_address(address)
    assert raised.value.failure.kind is FailureKind.UNREACHABLE


def test_whose_addresses_these_are() -> None:
    for host in ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost", "::ffff:127.0.0.1", "::1%lo"):
        assert is_loopback(host)
        assert not is_dialable(host)
    for host in ("10.1.2.3", "fd00::1", "node-7.example"):
        assert not is_loopback(host)
        assert is_dialable(host)
    for host in ("", "0.0.0.0", "::", "[::]"):
        assert not is_dialable(host)


class Wire:
    """Stands for writer and transport: keeps what was written; `stuck_bytes` of it were not taken."""

    def __init__(self) -> None:
        self.data = b""
        self.stuck_bytes = 0
        self.is_aborted = False
        self.transport = self

    def get_extra_info(self, _: str) -> tuple[str, int]:
        return ("192.0.2.9", 1)

    def get_write_buffer_size(self) -> int:
        return self.stuck_bytes

    def write(self, data: bytes) -> None:
        self.data += data

    def close(self) -> None:
        pass

    async def wait_closed(self) -> None:
        pass

    def abort(self) -> None:
        self.is_aborted = True


def agreed(key: bytes = b"") -> tuple[Channel, Channel]:
    """Both ends of a channel after the handshake."""
    dialler = Channel(key, NONCES[0], is_dialler=True)
    dialled = Channel(key, NONCES[1], is_dialler=False)
    dialled.feed(dialler.encode(Hello(version=1, nonce=NONCES[0], engine_id="a", epoch="b")))
    welcome = Welcome(version=1, nonce=NONCES[1], engine_id="c", epoch="d", rank=0, ranks=(), layout={})
    dialler.feed(dialled.encode(welcome))
    return dialler, dialled


class Pair:
    def __init__(self, limits: LinkLimits = LIMITS, key: bytes = b"") -> None:
        own, self.other = agreed(key)
        self.reader = asyncio.StreamReader()
        self.wire = Wire()
        writer: Any = self.wire
        self.link = Link(self.reader, writer, own, PEER, limits)
        self.heard: list[Message] = []

    async def run(self) -> FailureKind:
        async with asyncio.timeout(20):
            return (await self.link.run(self.heard.append)).kind


PATIENT = LinkLimits(heartbeat_s=60.0, handshake_timeout_s=1.0, out_bytes_max=1_000)


async def test_messages_go_both_ways_and_the_end_is_told() -> None:
    pair = Pair(PATIENT)
    said = Renewal(transfers=("0" * 32,))
    pair.link.send(said)
    assert pair.other.feed(pair.wire.data) == [said]
    frame = pair.other.encode(said)
    pair.reader.feed_data(frame[:7])
    pair.reader.feed_data(frame[7:] + pair.other.encode(said))
    pair.reader.feed_eof()
    assert await pair.run() is FailureKind.PEER_LOST
    assert pair.heard == [said, said]
    assert pair.wire.is_aborted
    before = pair.wire.data
    pair.link.send(said)
    assert pair.wire.data == before
    pair.link.end(FailureKind.CLOSED)
    assert pair.link.failure is not None
    assert pair.link.failure.kind is FailureKind.PEER_LOST, "the first reason stays"


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (b"\xff\xff\xff\xff", FailureKind.MALFORMED),
        (b"\0\0\0\x05\0half"[:6], FailureKind.PEER_LOST),
        (b"\0\0\0\x22\x01" + bytes(33), FailureKind.NOT_AUTHENTICATED),
    ],
)
async def test_bytes_that_are_no_messages_end_it(words: bytes, kind: FailureKind) -> None:
    pair = Pair(PATIENT)
    pair.reader.feed_data(words)
    pair.reader.feed_eof()
    assert await pair.run() is kind


async def test_a_silent_peer_is_gone_after_some_heartbeats() -> None:
    pair = Pair()
    assert await pair.run() is FailureKind.PEER_LOST
    assert pair.link.failure is not None
    assert "silent" in pair.link.failure.detail
    assert pair.other.feed(pair.wire.data) == [Renewal(transfers=())] * (MISSED_MAX - 1)


async def test_a_peer_that_takes_nothing_is_gone_though_it_speaks() -> None:
    pair = Pair()
    pair.link.send(Renewal(transfers=("0" * 32,)))

    async def speak() -> None:
        while True:
            # It never takes more than it has, however much is sent.
            pair.wire.stuck_bytes = len(pair.wire.data)
            pair.reader.feed_data(pair.other.encode(Renewal(transfers=())))
            await asyncio.sleep(0.001)

    async with asyncio.TaskGroup() as group:
        speaking = group.create_task(speak())
        assert await pair.run() is FailureKind.PEER_LOST
        speaking.cancel()
    assert pair.link.failure is not None
    assert "does not read" in pair.link.failure.detail


async def test_what_waits_to_be_sent_is_bounded() -> None:
    pair = Pair(PATIENT)
    pair.wire.stuck_bytes = 990
    pair.link.send(Done(transfer="0" * 32, nonce=bytes(16), prompt_hash=bytes(16), reader_count=1))
    assert pair.link.failure is not None
    assert pair.link.failure.kind is FailureKind.OVERLOADED


async def test_only_signs_of_life_may_follow_the_answer_to_a_hello() -> None:
    for behind, is_fine in ((Renewal(transfers=()), True), (Done, False)):
        dialler = Channel(b"", NONCES[0], is_dialler=True)
        dialled = Channel(b"", NONCES[1], is_dialler=False)
        dialled.feed(dialler.encode(Hello(version=1, nonce=NONCES[0], engine_id="a", epoch="b")))
        welcome = Welcome(version=1, nonce=NONCES[1], engine_id="c", epoch="d", rank=0, ranks=(), layout={})
        reader = asyncio.StreamReader()
        more = (
            behind
            if isinstance(behind, Renewal)
            else Done(transfer="0" * 32, nonce=bytes(16), prompt_hash=bytes(16), reader_count=1)
        )
        reader.feed_data(dialled.encode(welcome) + dialled.encode(more))
        if is_fine:
            assert await receive_one(reader, dialler) == welcome
        else:
            with pytest.raises(Exception, match="more than one message"):
                await receive_one(reader, dialler)
    reader = asyncio.StreamReader()
    reader.feed_eof()
    with pytest.raises(LinkError):
        await receive_one(reader, Channel(b"", NONCES[0], is_dialler=True))
