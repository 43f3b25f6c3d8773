"""A follower against a server of lists and lines: in what order it asks, what it tells, that it lets go."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from pdcoord.feeds.kubeapi import Collection, KubeError
from pdcoord.feeds.kubefollow import Follower, FollowHooks
from pdcoord.feeds.kubewatch import KubeObject, WatchLimits, WatchTrouble

PODS = Collection("", "v1", "pods", "ns", labels="a=b")
DEADLINE_S = 20.0

Lines = list[list[KubeObject] | KubeError]


def thing(name: str, version: str = "5") -> KubeObject:
    return {"metadata": {"name": name, "resourceVersion": version}}


def line(type_: str, told: Any) -> KubeObject:
    return {"type": type_, "object": told}


def page(*names: str, rest: str = "", version: str = "5") -> KubeObject:
    return {"metadata": {"resourceVersion": version, "continue": rest}, "items": [thing(n) for n in names]}


class Script:
    """Answers lists and watches in turn; a watch whose lines are spent stays open.

    Attributes:
        open_count: watches that are open.
    """

    def __init__(self, pages: list[KubeObject | KubeError], watches: list[Lines]) -> None:
        self.asked: list[str] = []
        self.open_count = 0
        self._pages, self._watches = pages, watches

    async def list_page(self, of: Collection, *, size: int, page: str = "") -> KubeObject:
        self.asked.append(f"list {of.labels} {page}".rstrip())
        answer = self._pages.pop(0)
        if isinstance(answer, KubeError):
            raise answer
        return answer

    @asynccontextmanager
    async def watch(
        self, of: Collection, resource_version: str, *, last_s: int
    ) -> AsyncIterator[AsyncIterator[list[KubeObject]]]:
        self.asked.append(f"watch {of.labels} {resource_version}")
        lines = self._watches.pop(0) if self._watches else []
        self.open_count += 1
        try:
            yield self._lines(lines)
        finally:
            self.open_count -= 1

    async def _lines(self, lines: Lines) -> AsyncIterator[list[KubeObject]]:
        for each in lines:
            if isinstance(each, KubeError):
                raise each
            yield each
        await asyncio.Event().wait()


@asynccontextmanager
async def following(script: Script) -> AsyncIterator[tuple[Follower, list[str]]]:
    told: list[str] = []
    follower: Follower
    hooks = FollowHooks(
        lambda: told.append("changed " + " ".join(sorted(follower.objects))),
        lambda what, why, detail, _: told.append(f"{what} {why} {detail}".rstrip()),
    )
    follower = Follower(
        script,
        PODS,
        hooks=hooks,
        clock=lambda: 1.0,
        rng=random.Random(1),
        limits=WatchLimits(backoff_s=0.001, backoff_s_max=0.002),
    )
    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as group:
        task = group.create_task(follower.run())
        yield follower, told
        task.cancel()
    assert script.open_count == 0


async def until(script: Script, asked: list[str]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while len(script.asked) < len(asked):
            await asyncio.sleep(0.001)
    assert script.asked == asked


async def test_it_lists_watches_and_lists_anew() -> None:
    script = Script(
        [
            KubeError(WatchTrouble.DENIED, "told 403"),
            page("a", rest="more"),
            page("b", version="7"),
            page("b", "d", version="20"),
        ],
        [
            [
                [line("ADDED", thing("c", "8")), line("DELETED", thing("a", "9"))],
                KubeError(WatchTrouble.BROKEN, "cut"),
            ],
            [[line("ERROR", {"code": 410}), line("ADDED", thing("late", "10"))]],
        ],
    )
    async with following(script) as (follower, told):
        await until(
            script,
            [
                "list a=b",
                "list a=b",
                "list a=b more",
                "watch a=b 7",
                "watch a=b 9",
                "list a=b",
                "watch a=b 20",
            ],
        )
        assert told == [
            "pods denied told 403",
            "changed a b",
            "changed b c",
            "pods broken cut",
            "pods expired",
            "changed b d",
        ]
        assert follower.silent_s() == 0.0
        assert follower.listed == PODS


async def test_a_snapshot_that_was_taken_never_changes() -> None:
    script = Script([page("a")], [[[line("ADDED", thing("b"))]]])
    async with following(script) as (follower, told):
        async with asyncio.timeout(DEADLINE_S):
            while len(told) < 1:
                await asyncio.sleep(0)
        first = follower.objects
        async with asyncio.timeout(DEADLINE_S):
            while len(told) < 2:
                await asyncio.sleep(0.001)
        assert sorted(follower.objects) == ["a", "b"]
        assert follower.objects is not first


async def test_something_else_can_be_followed_and_what_is_known_stays_until_it_is_listed() -> None:
    script = Script([page("a"), KubeError(WatchTrouble.TIMEOUT, "slow"), page("z")], [])
    async with following(script) as (follower, told):
        await until(script, ["list a=b", "watch a=b 5"])
        other = Collection("", "v1", "pods", "ns", labels="c=d")
        follower.follow(PODS)
        follower.follow(other)
        assert sorted(follower.objects) == ["a"]
        assert follower.listed == PODS
        await until(script, ["list a=b", "watch a=b 5", "list c=d", "list c=d", "watch c=d 5"])
        assert told == ["changed a", "pods timeout slow", "changed z"]
        assert follower.listed == other
        assert script.open_count == 1


async def test_what_is_no_list_and_no_line_is_trouble() -> None:
    script = Script([{"items": 3}, page("a"), page("a")], [[[{"type": 3}]]])
    async with following(script) as (_, told):
        await until(script, ["list a=b", "list a=b", "watch a=b 5", "list a=b", "watch a=b 5"])
        assert told == ["pods unreadable", "changed a", "pods unreadable"]
