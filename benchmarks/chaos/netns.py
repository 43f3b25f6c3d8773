"""Hosts in network namespaces on one bridge, and what can go wrong between them; root only."""

import asyncio
import contextlib
import os
import socket
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

_SUBNET = "10.77.0"
_NOWHERE = "02:00:00:00:00:01"
"""A hardware address that nobody has: what is sent to it is lost without a word."""
_RATE = "400kbit"
_DELAY_MS = 60
_ETH_ALL, _TCP = 0x0003, 6
_SYN, _RST, _ACK = 0x02, 0x04, 0x10
_FRAME_BYTES = 65_536


class NoNetworkError(Exception):
    """Namespaces cannot be had here; the message says why."""


def _ip(*words: str) -> None:
    """Run ip(8).

    Raises:
        NoNetworkError: with what it says, if it fails.
    """
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoNetworkError(f"ip {' '.join(words)}: {done.stderr.strip()}")


class Hosts:
    """Pods as hosts of their own; leaving it removes what it made and nothing else.

    Attributes:
        addresses: IPv4 address of each pod.
        prefixes: what precedes a pod's commands.
        has_netem: whether this kernel can delay packets.
    """

    def __init__(self, pods: Sequence[str]) -> None:
        self._tag = f"pdc{os.getpid() % 100_000}"
        self._index = {pod: index for index, pod in enumerate(pods)}
        self.addresses = {pod: f"{_SUBNET}.{index + 1}" for pod, index in self._index.items()}
        self.prefixes = {pod: ("ip", "netns", "exec", self._space(pod)) for pod in pods}
        self.has_netem = False

    def _space(self, pod: str) -> str:
        return f"{self._tag}n{self._index[pod]}"

    def _port(self, pod: str) -> str:
        """The bridge's end of a pod's cable."""
        return f"{self._tag}v{self._index[pod]}"

    def __enter__(self) -> Self:
        if os.geteuid() != 0:
            raise NoNetworkError("network namespaces need root")
        bridge = f"{self._tag}b"
        try:
            _ip("link", "add", bridge, "type", "bridge")
            _ip("addr", "add", f"{_SUBNET}.254/24", "dev", bridge)
            _ip("link", "set", bridge, "up")
            for pod, address in self.addresses.items():
                space, port = self._space(pod), self._port(pod)
                _ip("netns", "add", space)
                _ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", space)
                _ip("link", "set", port, "master", bridge, "up")
                _ip("-n", space, "link", "set", "lo", "up")
                _ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
                _ip("-n", space, "link", "set", "eth0", "up")
        except (NoNetworkError, FileNotFoundError) as error:
            self.__exit__()
            raise NoNetworkError(str(error)) from error
        self.has_netem = self._has_netem()
        return self

    def _has_netem(self) -> bool:
        pod = next(iter(self._index))
        try:
            _ip("netns", "exec", self._space(pod), "tc", "qdisc", "replace", "dev", "lo", "root", "netem")
        except NoNetworkError:
            return False
        _ip("netns", "exec", self._space(pod), "tc", "qdisc", "del", "dev", "lo", "root")
        return True

    def __exit__(self, *_: object) -> None:
        for pod in self._index:
            for words in (("netns", "del", self._space(pod)), ("link", "del", self._port(pod))):
                with contextlib.suppress(NoNetworkError, FileNotFoundError):
                    _ip(*words)
        with contextlib.suppress(NoNetworkError, FileNotFoundError):
            _ip("link", "del", f"{self._tag}b")

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
        self._shape(pod, ("tbf", "rate", _RATE, "burst", "8kbit", "latency", "2s") if is_on else ())

    def delay(self, pod: str, *, is_on: bool) -> None:
        """Have what a pod sends arrive late, and not evenly so."""
        self._shape(pod, ("netem", "delay", f"{_DELAY_MS}ms", f"{_DELAY_MS // 2}ms") if is_on else ())

    def _shape(self, pod: str, discipline: Sequence[str]) -> None:
        verb = "replace" if discipline else "del"
        where = ("tc", "qdisc", verb, "dev", "eth0", "root", *discipline)
        _ip("netns", "exec", self._space(pod), *where)

    async def reset(self, pod: str, seconds: float) -> int:
        """Reset each connection over which a pod sends something in this time, at both ends; how many."""
        loop = asyncio.get_running_loop()
        struck: set[tuple[bytes, bytes]] = set()
        pods = {socket.inet_aton(address): each for each, address in self.addresses.items()}
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_ALL)) as raw:
            raw.bind((self._port(pod), 0))
            raw.setblocking(False)

            def on_frame() -> None:
                with contextlib.suppress(BlockingIOError):
                    frame, (_, _, direction, *_) = raw.recvfrom(_FRAME_BYTES)
                    if direction == socket.PACKET_OUTGOING:
                        return
                    flow = (frame[26:34], frame[34:38])
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
    if len(frame) < 54 or frame[12:14] != b"\x08\x00" or frame[14] != 0x45 or frame[23] != _TCP:
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


def is_allowed() -> bool:
    """Whether there is anything to try: root, and ip(8)."""
    return os.geteuid() == 0 and any((Path(each) / "ip").exists() for each in os.get_exec_path())
