"""The room that probes take, and who may ask for one."""

from types import SimpleNamespace
from typing import Any

import pytest

from transfer.digest import part_digest
from transfer.errors import FailureKind, SettingError
from transfer.probe import LANDINGS, PATTERN_SHARE_MAX, PatternServer, failed_probe, may_ask_probes
from transfer.session.arena import Arena
from transfer.staging import HostStaging

SIZE = 1 << 20


@pytest.fixture
def staging() -> Any:
    made = HostStaging(SIZE)
    yield made
    made.close()


def test_the_pattern_is_where_and_what_it_is_told_to_be(staging: HostStaging) -> None:
    arena = Arena(SIZE)
    server = PatternServer(staging, arena, "epoch", SIZE)
    assert server.length_bytes == SIZE // PATTERN_SHARE_MAX
    assert server.reserved_bytes == arena.used_bytes == (1 + LANDINGS) * server.length_bytes
    for asked in (1, 4_096, SIZE):
        told = server.tell(asked)
        assert told.length_bytes == min(asked, server.length_bytes)
        assert part_digest(staging.read_bytes(told.offset, told.length_bytes)) == told.digest
        assert all(
            landing >= told.offset + server.length_bytes or landing + server.length_bytes <= told.offset
            for landing in server.landings
        )
    other = PatternServer(staging, Arena(SIZE), "another epoch", SIZE)
    assert other.tell(4_096).digest != told.digest


def test_too_little_staging_is_refused(staging: HostStaging) -> None:
    with pytest.raises(SettingError, match="staging_bytes"):
        PatternServer(staging, Arena(16_384), "epoch", 4_096)


@pytest.mark.parametrize(
    ("host", "key", "may"),
    [("127.0.0.1", b"", True), ("10.0.0.1", b"", False), ("10.0.0.1", b"a key of the fleet", True)],
)
def test_a_stranger_may_not_have_others_dialled(host: str, key: bytes, *, may: bool) -> None:
    link: Any = SimpleNamespace(host=host)
    assert may_ask_probes(link, key) is may


def test_only_layouts_that_never_fit_are_told_as_a_verdict() -> None:
    told = failed_probe("a:1", FailureKind.IMPOSSIBLE_LAYOUT, "x" * 5_000)
    assert (told.verdict, told.failure) == ("impossible", "impossible-layout")
    assert len(told.detail) == 1_000
    told = failed_probe("a:1", FailureKind.PEER_LOST, "gone")
    assert (told.verdict, told.verdict_reason, told.detail) == ("", "", "gone")
