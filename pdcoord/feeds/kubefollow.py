"""Follows a Kubernetes collection as `kubewatch` says: asks, listens, waits, and tells of changes."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from pdcoord.feeds.kubeapi import Collection, KubeError
from pdcoord.feeds.kubewatch import (
    Failed,
    KubeObject,
    ListPage,
    OpenWatch,
    PageListed,
    Started,
    TellChange,
    TellTrouble,
    WatchAction,
    WatchEnded,
    WatchEvent,
    WatchLimits,
    WatchMachine,
    WatchOpened,
    WatchTold,
    WatchTrouble,
    version_of,
)

PAGE_SIZE = 200
"""Pods of a page: about 3 MB of JSON, 10 ms to parse, which nothing else on this thread gets."""
WATCH_S = 60
"""How long a watch is asked to last. A connection that died in silence is noticed this late."""


class Api(Protocol):
    """What of `KubeApi` is needed here."""

    async def list_page(self, of: Collection, *, size: int, page: str = "") -> KubeObject:
        """A page of a list; raises KubeError."""
        ...

    def watch(
        self, of: Collection, resource_version: str, *, last_s: int
    ) -> AbstractAsyncContextManager[AsyncIterator[list[KubeObject]]]:
        """A watch's lines; raises KubeError."""
        ...


@dataclass(frozen=True, slots=True)
class FollowHooks:
    """Who is told what.

    Attributes:
        changed: the follower's `objects` are others now.
        troubled: of the collection, what, in words, and the pause before the next try.
    """

    changed: Callable[[], None]
    troubled: Callable[[str, WatchTrouble, str, float], None]


class Follower:
    """A copy of one collection, kept up to date while `run` runs; of one event loop.

    Attributes:
        collection: what is followed.
        objects: by name, as last known; replaced as a whole and never changed, so another thread may read.
        listed: what `objects` was a complete list of; None before the first.
    """

    def __init__(
        self,
        api: Api,
        collection: Collection,
        *,
        hooks: FollowHooks,
        clock: Callable[[], float],
        rng: random.Random,
        limits: WatchLimits | None = None,
        keep: Callable[[KubeObject], KubeObject] = lambda given: given,
    ) -> None:
        self.collection = collection
        self.objects: Mapping[str, KubeObject] = {}
        self.listed: Collection | None = None
        self.machine = WatchMachine(limits or WatchLimits(), rng, keep)
        self._api = api
        self._hooks = hooks
        self._clock = clock
        self._is_other = asyncio.Event()

    def follow(self, collection: Collection) -> None:
        """Follow something else from now on; what is known stays until the first new list is complete."""
        if collection != self.collection:
            self.collection = collection
            self._is_other.set()

    def silent_s(self) -> float | None:
        """Since the server last said something; None if it never did."""
        heard_s = self.machine.heard_s
        return None if heard_s is None else max(0.0, self._clock() - heard_s)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._is_other.clear()
            async with asyncio.TaskGroup() as group:
                following = group.create_task(self._follow())
                await self._is_other.wait()
                following.cancel()

    async def _follow(self) -> None:
        step = self._next(self._take(Started()))
        while True:
            # Cancellation ends each of these by itself: every resource is in an `async with`.
            await asyncio.sleep(step.pause_s)
            step = await (self._list(step) if isinstance(step, ListPage) else self._watch(step))

    async def _list(self, step: ListPage) -> ListPage | OpenWatch:
        try:
            listed = await self._api.list_page(self.collection, size=PAGE_SIZE, page=step.page)
        except KubeError as error:
            return self._failed(error)
        return self._next(self._take(_page_of(listed)))

    async def _watch(self, step: OpenWatch) -> ListPage | OpenWatch:
        try:
            async with self._api.watch(self.collection, step.resource_version, last_s=WATCH_S) as told:
                self._take(WatchOpened())
                async for lines in told:
                    actions = self._take(*(_told_of(line) for line in lines))
                    if any(isinstance(action, ListPage | OpenWatch) for action in actions):
                        return self._next(actions)
        except KubeError as error:
            return self._failed(error)
        return self._next(self._take(WatchEnded()))

    def _failed(self, error: KubeError) -> ListPage | OpenWatch:
        return self._next(self._take(Failed(error.trouble, error.retry_after_s), why=str(error)))

    def _take(self, *events: WatchEvent, why: str = "") -> list[WatchAction]:
        """Hand events to the machine; a change is told once for all of them."""
        now_s, list_count = self._clock(), self.machine.list_count
        actions = [action for event in events for action in self.machine.handle(event, now_s)]
        for action in actions:
            if isinstance(action, TellTrouble):
                self._hooks.troubled(self.collection.plural, action.trouble, why, action.retry_s)
        is_other = self.machine.list_count > list_count and self.listed != self.collection
        if is_other:
            self.listed = self.collection
        if is_other or any(isinstance(action, TellChange) for action in actions):
            self.objects = dict(self.machine.objects)
            self._hooks.changed()
        return actions

    @staticmethod
    def _next(actions: list[WatchAction]) -> ListPage | OpenWatch:
        """The last step that was asked for; there is one wherever a step has ended."""
        return next(action for action in reversed(actions) if isinstance(action, ListPage | OpenWatch))


def _page_of(listed: KubeObject) -> WatchEvent:
    """A List object; items of it that are no objects are left out."""
    items, metadata = listed.get("items"), listed.get("metadata")
    if not isinstance(items, list) or not isinstance(metadata, Mapping):
        return Failed(WatchTrouble.UNREADABLE)
    next_page = metadata.get("continue")
    return PageListed(
        [item for item in items if isinstance(item, Mapping)],
        version_of(listed),
        next_page if isinstance(next_page, str) else "",
    )


def _told_of(line: KubeObject) -> WatchEvent:
    type_, told = line.get("type"), line.get("object")
    if not isinstance(type_, str) or not isinstance(told, Mapping):
        return Failed(WatchTrouble.UNREADABLE)
    return WatchTold(type_, told)
