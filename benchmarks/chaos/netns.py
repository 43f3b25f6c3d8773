"""Hosts in network namespaces on one bridge, and what can go wrong between them; root only."""

import asyncio
import contextlib
import os
import re
import signal
import socket
import struct
import subprocess
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Self

from benchmarks.chaos.hop import Fate, carried, ports_of, tap

_SUBNETS = 512
"""Of 198.18.0.0/15, which RFC 2544 keeps for tests of networks; one for each run at a time."""
_NOWHERE = "02:00:00:00:00:01"
"""A hardware address that nobody has: what is sent to it is lost without a word."""
_RATE = "400kbit"
_ETH_ALL, _TCP = 0x0003, 6
_SYN, _RST, _ACK = 0x02, 0x04, 0x10
_FRAME_BYTES = 65_536
_SPACES, _LINKS = Path("/run/netns"), Path("/sys/class/net")


class NoNetworkError(Exception):
    """Namespaces cannot be had here; the message says why."""


def _ip(*words: str) -> str:
    """Run ip(8); what it printed.

    Raises:
        NoNetworkError: with what it says, if it fails.
    """
    try:
        done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise NoNetworkError("ip(8) is not installed") from error
    if done.returncode:
        raise NoNetworkError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def _try_ip(*words: str) -> None:
    with contextlib.suppress(NoNetworkError):
        _ip(*words)


def remove_forgotten() -> None:
    """Remove what runs that were killed have left: their namespaces, who lives there, and bridges."""
    names = [each.name for folder in (_SPACES, _LINKS) if folder.exists() for each in folder.iterdir()]
    for name in names:
        owner = re.fullmatch(r"pdc(\d+)([nbh])\d*", name)
        if owner is None or Path(f"/proc/{owner[1]}").exists():
            continue
        if owner[2] != "n":
            _try_ip("link", "del", name)
            continue
        for pid in _lives_in(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _try_ip("netns", "del", name)


def _lives_in(space: str) -> Iterator[int]:
    with contextlib.suppress(NoNetworkError):
        yield from map(int, _ip("netns", "pids", space).split())


class Hosts:
    """Pods as hosts of their own; leaving it removes what it made and nothing else.

    Attributes:
        addresses: IPv4 address of each pod.
        prefixes: what precedes a pod's commands.
    """

    def __init__(self, pods: Sequence[str]) -> None:
        self._tag = f"pdc{os.getpid()}"
        self._index = {pod: index for index, pod in enumerate(pods)}
        high, low = divmod(os.getpid() % _SUBNETS, 256)
        self._subnet = f"198.{18 + high}.{low}"
        self.addresses = {pod: f"{self._subnet}.{index + 1}" for pod, index in self._index.items()}
        self.prefixes = {pod: ("ip", "netns", "exec", self._space(pod)) for pod in pods}

    def _space(self, pod: str) -> str:
        return f"{self._tag}n{self._index[pod]}"

    def _port(self, pod: str) -> str:
        """The bridge's end of a pod's cable."""
        return f"{self._tag}v{self._index[pod]}"

    def __enter__(self) -> Self:
        if os.geteuid() != 0:
            raise NoNetworkError("network namespaces need root")
        bridge = f"{self._tag}b"
        remove_forgotten()
        try:
            _ip("link", "add", bridge, "type", "bridge")
            _ip("addr", "add", f"{self._subnet}.254/24", "dev", bridge)
            _ip("link", "set", bridge, "up")
            for pod, address in self.addresses.items():
                space, port = self._space(pod), self._port(pod)
                _ip("netns", "add", space)
                _ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", space)
                _ip("link", "set", port, "master", bridge, "up")
                _ip("-n", space, "link", "set", "lo", "up")
                _ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
                _ip("-n", space, "link", "set", "eth0", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for pod, index in self._index.items():
            _try_ip("netns", "del", self._space(pod))
            _try_ip("link", "del", self._port(pod))
            _try_ip("link", "del", f"{self._tag}h{index}")
        _try_ip("link", "del", f"{self._tag}b")

    def pids(self) -> list[int]:
        """Processes that live on these hosts."""
        return [pid for pod in self._index for pid in _lives_in(self._space(pod))]

    # What goes wrong. Each is undone by its counterpart.

    def cut(self, pod: str, *, is_on: bool) -> None:
        """Pull a pod's cable, or plug it in again: nothing reaches it, and nobody is told."""
        _ip("link", "set", self._port(pod), "down" if is_on else "up")

    def lose(self, source: str, target: str, *, is_on: bool) -> None:
        """Lose what one pod sends to another; the other way all arrives."""
        space, address = self._space(source), self.addresses[target]
        if is_on:
            how = ("lladdr", _NOWHERE, "dev", "eth0", "nud", "permanent")
            _ip("-n", space, "neigh", "replace", address, *how)
        else:
            _ip("-n", space, "neigh", "del", address, "dev", "eth0")

    def slow(self, pod: str, *, is_on: bool) -> None:
        """Let a pod send 400 kbit/s, which delays what waits for its turn."""
        shape = ("tbf", "rate", _RATE, "burst", "8kbit", "latency", "2s") if is_on else ()
        where = ("tc", "qdisc", "replace" if is_on else "del", "dev", "eth0", "root")
        _ip("netns", "exec", self._space(pod), *where, *shape)

    @contextlib.asynccontextmanager
    async def hop(self, pod: str, fate: Fate) -> AsyncIterator[None]:
        """Lay a pod's cable through this process, which decides on each frame, both ways."""
        index = self._index[pod]
        near, far, middle = (f"{self._tag}{letter}{index}" for letter in "tuh")
        port, bridge = self._port(pod), f"{self._tag}b"
        with tap(near) as near_device, tap(far) as far_device, carried(near_device, far_device, fate):
            try:
                _ip("link", "add", middle, "type", "bridge")
                _ip("link", "set", middle, "up")
                _ip("link", "set", near, "master", middle, "up")
                _ip("link", "set", far, "master", bridge, "up")
                _ip("link", "set", port, "master", middle)
                yield
            finally:
                _ip("link", "set", port, "master", bridge)
                _try_ip("link", "del", middle)

    async def reset(self, pod: str, seconds: float, ports: Collection[int] = ()) -> int:
        """Reset each connection over which a pod sends something in this time, at both ends; how many.

        Args:
            ports: only connections that have one of these at an end; all if there are none.
        """
        loop = asyncio.get_running_loop()
        struck: set[tuple[bytes, bytes]] = set()
        pods = {socket.inet_aton(address): each for each, address in self.addresses.items()}
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_ALL)) as raw:
            raw.bind((self._port(pod), 0))
            raw.setblocking(False)

            def on_frame() -> None:
                # Nothing waits, or a cable is out.
                with contextlib.suppress(OSError):
                    frame, (_, _, direction, *_) = raw.recvfrom(_FRAME_BYTES)
                    if direction == socket.PACKET_OUTGOING:
                        return
                    flow = (frame[26:34], frame[34:38])
                    if ports and not set(ports).intersection(ports_of(frame) or ()):
                        return
                    if flow not in struck and (resets := resets_for(frame)) is not None:
                        struck.add(flow)
                        raw.send(resets[0])
                        if (other := pods.get(frame[30:34])) is not None:
                            raw.sendto(resets[1], (self._port(other), 0))

            loop.add_reader(raw, on_frame)
            try:
                await asyncio.sleep(seconds)
            finally:
                loop.remove_reader(raw)
        return len(struck)


def resets_for(frame: bytes) -> tuple[bytes, bytes] | None:
    """The frames that reset both ends of a TCP segment's connection, its sender's first; None of others.

    Sources: RFC 9293 section 3.5.2 and RFC 5961 section 3: a reset counts if its sequence number is the next
    that whom it reaches expects. That is what the segment acknowledges, and the number behind what it
    carries. Plain IPv4 over Ethernet without tags.
    """
    if ports_of(frame) is None:
        return None
    if not frame[47] & _ACK or frame[47] & (_RST | _SYN):
        return None
    sent = struct.unpack_from("!H", frame, 16)[0] - 20 - 4 * (frame[46] >> 4)
    ends = _End(frame[6:12], frame[26:30], frame[34:36]), _End(frame[:6], frame[30:34], frame[36:38])
    sequence, expected = struct.unpack_from("!II", frame, 38)
    return _reset(ends[1], ends[0], expected), _reset(ends[0], ends[1], (sequence + sent) & 0xFFFF_FFFF)


class _End(NamedTuple):
    """One end of a connection, as frames write it."""

    hardware: bytes
    address: bytes
    port: bytes


def _reset(source: _End, target: _End, sequence: int) -> bytes:
    head = source.port + target.port + struct.pack("!IIBBHHH", sequence, 0, 0x50, _RST, 0, 0, 0)
    pseudo = source.address + target.address + struct.pack("!BBH", 0, _TCP, len(head))
    head = head[:16] + struct.pack("!H", _checksum(pseudo + head)) + head[18:]
    outer = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(head), 0, 0x4000, 64, _TCP, 0)
    outer += source.address + target.address
    outer = outer[:10] + struct.pack("!H", _checksum(outer)) + outer[12:]
    return target.hardware + source.hardware + b"\x08\x00" + outer + head


def _checksum(data: bytes) -> int:
    """RFC 1071."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return 0xFFFF ^ total
