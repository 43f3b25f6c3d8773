"""Producers are dialled once, backed off from, and dialled again when there is news of them."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from transfer import peers as module
from transfer.door import Identity
from transfer.errors import Failure, FailureKind
from transfer.layout import GroupShape, KvLayout, RankLayout
from transfer.links import LinkError, LinkLimits
from transfer.peers import BACKOFFS_MAX, Peers, PeersSettings

LAYOUT = RankLayout(KvLayout(16), 0, (GroupShape(1, 1, 8, 8),))
ADDRESS = "10.0.0.1:14579"


class World:
    """A network on which nobody answers, and a clock that is set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, group: asyncio.TaskGroup) -> None:
        self.now_s = 100.0
        self.dialled: list[str] = []
        monkeypatch.setattr(module, "dial", self.dial)
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now_s)
        settings = PeersSettings(b"", "", LinkLimits(1.0, 1.0, 1 << 20), 4, 0.5, 4.0)

        def spawn(work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
            return group.create_task(work)

        self.peers = Peers(
            Identity("e", "1"), LAYOUT, {}, settings, spawn=spawn, hear=lambda *_: None, lost=lambda *_: None
        )

    async def dial(self, address: str, *_: Any) -> Any:
        self.dialled.append(address)
        await asyncio.sleep(0)
        raise LinkError(FailureKind.UNREACHABLE, "nobody is there")

    async def fails(self, address: str = ADDRESS) -> Failure:
        with pytest.raises(LinkError) as raised:
            await self.peers.connect(address)
        return raised.value.failure


async def test_back_off_doubles_up_to_its_bound_and_never_past_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async with asyncio.TaskGroup() as group:
        world = World(monkeypatch, group)
        for wait_s in (0.5, 1.0, 2.0, 4.0, 4.0, 4.0):
            count = len(world.dialled)
            assert (await world.fails()).kind is FailureKind.UNREACHABLE
            assert len(world.dialled) == count + 1
            world.now_s += wait_s - 0.01
            assert "not tried again yet" in (await world.fails()).detail
            assert len(world.dialled) == count + 1
            world.now_s += 0.02


async def test_a_ticket_of_a_new_epoch_is_dialled_for_at_once_but_only_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with asyncio.TaskGroup() as group:
        world = World(monkeypatch, group)
        await world.fails()
        for epoch, count in (("", 1), ("new", 2), ("new", 2), ("newer", 3), ("newer", 3)):
            world.peers.hint(ADDRESS, epoch)
            await world.fails()
            assert len(world.dialled) == count, epoch
        world.peers.hint("10.0.0.2:1", "any")


async def test_those_who_ask_at_once_share_one_dial(monkeypatch: pytest.MonkeyPatch) -> None:
    async with asyncio.TaskGroup() as group:
        world = World(monkeypatch, group)
        failures = await asyncio.gather(*(world.fails() for _ in range(5)))
        assert world.dialled == [ADDRESS]
        assert {failure.kind for failure in failures} == {FailureKind.UNREACHABLE}


async def test_one_who_gives_up_does_not_spoil_it_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    async with asyncio.TaskGroup() as group:
        world = World(monkeypatch, group)
        first = group.create_task(world.peers.connect(ADDRESS))
        second = group.create_task(world.fails())
        await asyncio.sleep(0)
        first.cancel()
        assert (await second).kind is FailureKind.UNREACHABLE
        assert first.cancelled()


async def test_what_is_remembered_of_failures_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async with asyncio.TaskGroup() as group:
        world = World(monkeypatch, group)
        for number in range(BACKOFFS_MAX + 5):
            world.peers._back_off(f"10.0.0.1:{number}", Failure(FailureKind.UNREACHABLE))
        assert len(world.peers._backoffs) == BACKOFFS_MAX
        assert "10.0.0.1:4" not in world.peers._backoffs


@pytest.mark.parametrize(
    ("address", "has_rdma", "names", "expected"),
    [
        ("10.0.0.2:1", False, ["nixl", "tcp"], ["tcp", "nixl"]),
        ("10.0.0.2:1", True, ["nixl", "tcp"], ["nixl", "tcp"]),
        ("127.0.0.1:1", False, ["nixl", "tcp"], ["nixl", "tcp"]),
        ("10.0.0.1:1", False, ["nixl", "tcp"], ["nixl", "tcp"]),
        ("[fd00::2]:1", False, ["ucx", "nixl", "tcp"], ["tcp", "ucx", "nixl"]),
        ("10.0.0.2:1", False, ["nixl"], ["nixl"]),
    ],
)
def test_nixl_is_not_left_to_tcp_between_hosts(
    address: str, names: list[str], expected: list[str], *, has_rdma: bool
) -> None:
    limits = LinkLimits(1.0, 1.0, 1 << 20)
    settings = PeersSettings(b"", "10.0.0.1", limits, 4, 0.5, 4.0, has_rdma=has_rdma)
    assert settings.preference(names, address) == expected
