"""A hop carries frames in their order, late or not at all, and reads the ports of those that have some."""

import asyncio
import os
import socket
import struct
from collections.abc import Iterator

import pytest

from benchmarks.chaos import hop
from benchmarks.chaos.hop import carried, ports_of


def segment(source: int, target: int, *, protocol: int = 6) -> bytes:
    ip = struct.pack("!BBHHHBBH8s", 0x45, 0, 40, 0, 0, 64, protocol, 0, b"\x0a\x4d\0\x01\x0a\x4d\0\x02")
    return bytes(12) + b"\x08\x00" + ip + struct.pack("!HH", source, target) + bytes(16)


def test_only_tcp_over_plain_ipv4_has_ports() -> None:
    assert ports_of(segment(80, 5_000)) == (80, 5_000)
    options = segment(1, 2)[:14] + b"\x46" + segment(1, 2)[15:]
    for frame in (segment(1, 2, protocol=17), segment(1, 2)[:53], bytes(60), options, b""):
        assert ports_of(frame) is None


@pytest.fixture
def ends() -> Iterator[tuple[int, int, int, int]]:
    """Two devices, and what is behind them: as with a TAP device, a read takes one frame."""
    near, pod = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    far, net = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sockets = (near, far, pod, net)
    for each in sockets:
        each.setblocking(False)
    yield tuple(each.fileno() for each in sockets)  # type: ignore[misc]  # four of them
    for each in sockets:
        each.close()


async def read(end: int) -> bytes:
    async with asyncio.timeout(20):
        while True:
            try:
                return os.read(end, 65_536)
            except BlockingIOError:
                await asyncio.sleep(0.001)


async def test_frames_keep_their_order_and_some_are_lost(ends: tuple[int, int, int, int]) -> None:
    near, far, pod, net = ends
    delays_s = iter([0.05, 0.0, None, 0.01])
    told = []

    def fate(frame: bytes, is_from_pod: bool) -> float | None:
        told.append((frame, is_from_pod))
        return next(delays_s) if is_from_pod else 0.0

    with carried(near, far, fate):
        for frame in (b"a", b"b", b"c", b"d"):
            os.write(pod, frame)
        os.write(net, b"back")
        assert [await read(net) for _ in range(3)] == [b"a", b"b", b"d"]
        assert await read(pod) == b"back"
    assert [frame for frame, is_from_pod in told if is_from_pod] == [b"a", b"b", b"c", b"d"]
    os.write(pod, b"e")
    await asyncio.sleep(0)
    with pytest.raises(BlockingIOError):
        os.read(net, 10)


async def test_no_more_wait_than_may(
    ends: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far, pod, net = ends
    monkeypatch.setattr(hop, "FRAMES_MAX", 3)
    with carried(near, far, lambda _, __: 0.01):
        for frame in (b"a", b"b", b"c", b"too much"):
            os.write(pod, frame)
        assert [await read(net) for _ in range(3)] == [b"a", b"b", b"c"]
        os.write(pod, b"d")
        assert await read(net) == b"d"
