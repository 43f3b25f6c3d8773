"""Frames that reset a connection, and hosts that cannot be had."""

import os
import struct

import pytest

from benchmarks.chaos.netns import Hosts, NoNetworkError, resets_for

ETHERNET = bytes.fromhex("0200000000aa0200000000bb0800")


def segment(flags: int, *, protocol: int = 6, ack: int = 7_000) -> bytes:
    """From 10.77.0.1:80 to 10.77.0.2:5000."""
    ip = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, 43, 0, 0, 64, protocol, 0, b"\x0a\x4d\0\x01", b"\x0a\x4d\0\x02"
    )
    return ETHERNET + ip + struct.pack("!HHIIBBHHH", 80, 5_000, 100, ack, 0x50, flags, 99, 0, 0) + b"abc"


def folded(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def test_both_ends_are_reset_with_the_numbers_that_they_expect() -> None:
    resets = resets_for(segment(0x18))
    assert resets is not None
    back, onward = resets
    assert back[:14] == ETHERNET[6:12] + ETHERNET[:6] + ETHERNET[12:]
    assert onward[:14] == ETHERNET
    assert back[26:34] == b"\x0a\x4d\0\x02\x0a\x4d\0\x01"
    assert onward[26:34] == b"\x0a\x4d\0\x01\x0a\x4d\0\x02"
    assert struct.unpack_from("!HHIIBB", back, 34) == (5_000, 80, 7_000, 0, 0x50, 0x04)
    assert struct.unpack_from("!HHIIBB", onward, 34) == (80, 5_000, 103, 0, 0x50, 0x04)
    for each in resets:
        assert folded(each[14:34]) == 0xFFFF
        assert folded(each[26:34] + struct.pack("!BBH", 0, 6, 20) + each[34:]) == 0xFFFF


@pytest.mark.parametrize(
    "frame", [segment(0x02), segment(0x14), segment(0x10, protocol=17), segment(0x10)[:40], b""]
)
def test_what_acknowledges_nothing_is_left_alone(frame: bytes) -> None:
    assert resets_for(frame) is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may have them")
def test_without_root_there_are_no_hosts() -> None:
    with pytest.raises(NoNetworkError, match="root"), Hosts(["a"]):
        pass
