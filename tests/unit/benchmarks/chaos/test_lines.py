"""What becomes of frames on a disturbed line, and which parts have a line to disturb."""

import random
import struct
from pathlib import Path

from benchmarks.chaos.fleet import DECODES, PREFILLS, lay_out
from benchmarks.chaos.lines import (
    DELAY_S,
    HOP_KINDS,
    LINE_KINDS,
    LOST_SHARE,
    deaf,
    late,
    losing_others,
    lossy,
    mute,
)

SIDE, HTTP, OTHER, ANOTHER = 20_510, 8_000, 40_000, 50_000


def segment(source: int, target: int) -> bytes:
    ip = struct.pack("!BBHHHBBH8s", 0x45, 0, 40, 0, 0, 64, 6, 0, b"\x0a\x4d\0\x01\x0a\x4d\0\x02")
    return bytes(12) + b"\x08\x00" + ip + struct.pack("!HH", source, target) + bytes(16)


ARP = bytes(12) + b"\x08\x06" + bytes(46)


def test_one_way_of_the_side_channel_is_lost() -> None:
    question, answer = segment(OTHER, SIDE), segment(SIDE, OTHER)
    is_deaf, is_mute = deaf({SIDE}), mute({SIDE})
    assert is_deaf(question, False) is None
    assert is_mute(answer, True) is None
    # The same ports of another host are not this pod's.
    for fate, frame, is_from_pod in ((is_deaf, question, True), (is_mute, answer, False)):
        assert fate(frame, is_from_pod) == 0
    for fate, lost_way in ((is_deaf, False), (is_mute, True)):
        assert {fate(frame, lost_way) for frame in (segment(OTHER, HTTP), segment(HTTP, OTHER), ARP)} == {0.0}
    assert is_deaf(answer, True) == 0
    assert is_mute(question, False) == 0


def test_bytes_are_lost_and_what_has_a_known_port_is_not() -> None:
    fate = losing_others({SIDE, HTTP})
    for is_from_pod in (True, False):
        assert fate(segment(OTHER, ANOTHER), is_from_pod) is None
        for frame in (segment(OTHER, SIDE), segment(HTTP, OTHER), ARP):
            assert fate(frame, is_from_pod) == 0


def test_frames_are_late_or_lost_as_often_as_told() -> None:
    fate = late(random.Random(1))
    delays_s = [fate(ARP, True) for _ in range(500)]
    assert all(each is not None and DELAY_S[0] <= each <= DELAY_S[1] for each in delays_s)
    fate = lossy(random.Random(1))
    lost = sum(fate(ARP, True) is None for _ in range(10_000))
    assert 0.5 * LOST_SHARE < lost / 10_000 < 2 * LOST_SHARE


def test_engines_have_side_channels_and_every_kind_has_a_line(tmp_path: Path) -> None:
    parts = {part.name: part for part in lay_out(tmp_path, kv_backend="nixl")}
    for name in (*PREFILLS, *DECODES):
        assert len(parts[name].side_ports) == 2
        assert parts[name].env["UCX_TLS"] == "tcp,self"
    assert not parts[f"{DECODES[0]}-sidecar"].side_ports
    assert all(set(roles) <= {"prefill", "decode"} for roles in (LINE_KINDS | HOP_KINDS).values())
    assert '"kv_backend": "nixl"' in (tmp_path / "fleet.yaml").read_text()
