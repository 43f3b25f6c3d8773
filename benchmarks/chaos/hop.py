"""A hop in a cable, made of TAP devices and this process: frames come late or are lost by what they are."""

import asyncio
import contextlib
import fcntl
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

_TUN = Path("/dev/net/tun")
# linux/if_tun.h
_TUNSETIFF = 0x4004_54CA
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000
_TCP = 6
_FRAME_BYTES = 65_536
_BATCH = 64
FRAMES_MAX = 4_096
"""Most that wait in one direction; more are lost, as in any router."""

Fate = Callable[[bytes, bool], float | None]
"""How late a frame goes on, in s, or None if it is lost; it is told whether the frame comes from the pod."""


def is_there() -> bool:
    """Whether this kernel has TAP devices."""
    return _TUN.exists()


def ports_of(frame: bytes) -> tuple[int, int] | None:
    """Source and target port of a TCP segment in plain IPv4 over Ethernet; None of other frames."""
    if len(frame) < 54 or frame[12:14] != b"\x08\x00" or frame[14] != 0x45 or frame[23] != _TCP:
        return None
    source, target = struct.unpack_from("!HH", frame, 34)
    return source, target


@contextlib.contextmanager
def tap(name: str) -> Iterator[int]:
    """A TAP device while it holds; what is written to it arrives from it, each frame whole.

    It asks for no offloads, so the kernel cuts segments to size and completes checksums before they are read.

    Raises:
        OSError: if it cannot be had.
    """
    device = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI))
        yield device
    finally:
        os.close(device)


@contextlib.contextmanager
def carried(near: int, far: int, fate: Fate) -> Iterator[None]:
    """Carry frames between two TAP devices in the running loop while it holds; the first is the pod's."""
    ways = [
        _Way(near, far, lambda frame: fate(frame, True)),
        _Way(far, near, lambda frame: fate(frame, False)),
    ]
    try:
        yield
    finally:
        for way in ways:
            way.close()


class _Way:
    """One direction; frames keep their order."""

    def __init__(self, source: int, target: int, fate: Callable[[bytes], float | None]) -> None:
        self._source = source
        self._target = target
        self._fate = fate
        self._waiting: deque[tuple[float, bytes]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(source, self._on_readable)

    def close(self) -> None:
        self._loop.remove_reader(self._source)
        if self._timer is not None:
            self._timer.cancel()

    def _on_readable(self) -> None:
        for _ in range(_BATCH):
            try:
                frame = os.read(self._source, _FRAME_BYTES)
            except OSError:
                # Nothing waits, or the device was just taken down.
                return
            delay_s = self._fate(frame)
            if delay_s is None or len(self._waiting) >= FRAMES_MAX:
                continue
            due_s = self._loop.time() + delay_s
            self._waiting.append((max(due_s, self._waiting[-1][0]) if self._waiting else due_s, frame))
            if self._timer is None:
                self._arm()

    def _arm(self) -> None:
        self._timer = self._loop.call_at(self._waiting[0][0], self._send_due) if self._waiting else None

    def _send_due(self) -> None:
        now_s = self._loop.time()
        while self._waiting and self._waiting[0][0] <= now_s:
            _, frame = self._waiting.popleft()
            with contextlib.suppress(OSError):
                os.write(self._target, frame)
        self._arm()
