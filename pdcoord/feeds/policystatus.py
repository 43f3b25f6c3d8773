"""Tells PoolPolicy objects in their status whether they are in force, and if not, why."""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from pdcoord.feeds.kubeapi import Collection, KubeError
from pdcoord.feeds.kubewatch import KubeObject, WatchTrouble, version_of
from pdcoord.policy.crd import CONDITION
from pdcoord.policy.objects import Judgement, Verdict, condition_of


class StatusApi(Protocol):
    """What of `KubeApi` is needed here."""

    async def patch_status(self, of: Collection, name: str, patch: KubeObject) -> KubeObject:
        """Merge into an object's status; raises KubeError."""
        ...


@dataclass(frozen=True, slots=True)
class StatusLimits:
    """Bounds on writing.

    Attributes:
        look_s: how often the last judgement is compared with what the objects say.
        spread_s: a write waits for a random time up to this: of several replicas that want to write the
            same, one is first, and the others see that there is nothing left to write.
        interval_s: between two writes of this process, whatever they are about.
        backoff_s: what a further write of the same to one object waits, doubled with each, up to
            `backoff_s_max`: after a failure, and where somebody else keeps writing something else.
    """

    look_s: float = 0.25
    spread_s: float = 1.0
    interval_s: float = 0.1
    backoff_s: float = 1.0
    backoff_s_max: float = 300.0


@dataclass(frozen=True, slots=True)
class StatusWrite:
    """A write to make now.

    Attributes:
        version: of the object that it is based on; on any other the server refuses it.
    """

    name: str
    version: str
    patch: KubeObject


@dataclass(slots=True)
class _Task:
    """What is to be told to one object that does not say it yet.

    Attributes:
        written_on: version of the object that a write succeeded on; its successor is still to be seen.
        attempts: writes of the same so far.
    """

    verdict: Verdict
    due_s: float
    written_on: str = ""
    attempts: int = 0


@dataclass(slots=True)
class StatusDesk:
    """The rules of writing; does no I/O.

    Only what an object's status does not say already is written, so a change of a status, our own or that
    of another replica, leads to no other. Each write is bound to the version that it was decided on: if the
    object has changed in between the server answers 409 (conflict), and the new version is judged first.
    """

    limits: StatusLimits
    rng: random.Random
    _tasks: dict[str, _Task] = field(default_factory=dict)
    _judgement: Judgement | None = None
    _free_s: float = 0.0

    def look(self, judgement: Judgement, now_s: float) -> None:
        """Compare what objects say with what they should."""
        if judgement is self._judgement:
            return
        self._judgement = judgement
        tasks: dict[str, _Task] = {}
        for name, given in judgement.objects.items():
            verdict, task = judgement.verdicts[name], self._tasks.get(name)
            if task is None or task.verdict != verdict:
                task = _Task(verdict, now_s + self.rng.uniform(0.0, self.limits.spread_s))
            if not says(given, verdict):
                tasks[name] = task
            elif task.attempts:
                # Kept, so that who overwrites it again and again is answered more and more slowly.
                tasks[name] = task
        self._tasks = tasks

    def due(self, now_s: float, wall: datetime) -> StatusWrite | None:
        """The write to make now, if there is one; `wall` is the time that it tells."""
        if now_s < self._free_s or self._judgement is None:
            return None
        ready = [
            (task.due_s, name)
            for name, task in self._tasks.items()
            if task.due_s <= now_s and self._is_open(name, task)
        ]
        if not ready:
            return None
        _, name = min(ready)
        task, given = self._tasks[name], self._judgement.objects[name]
        limits = self.limits
        pause_s = min(limits.backoff_s * 2.0 ** min(task.attempts, 16), limits.backoff_s_max)
        task.due_s, task.attempts = now_s + pause_s, task.attempts + 1
        self._free_s = now_s + limits.interval_s
        return StatusWrite(name, version_of(given), _patch(given, task.verdict, wall))

    def written(self, write: StatusWrite) -> None:
        """A write succeeded."""
        if (task := self._tasks.get(write.name)) is not None:
            task.written_on = write.version

    def failed(self, write: StatusWrite, retry_after_s: float | None, now_s: float) -> None:
        """A write was not taken; it is made again, later, if it is still wanted then."""
        task = self._tasks.get(write.name)
        if task is not None and retry_after_s is not None:
            task.due_s = max(task.due_s, now_s + min(retry_after_s, self.limits.backoff_s_max))

    def validate(self) -> None:
        """Raises AssertionError if the state contradicts itself."""
        assert self._judgement is not None or not self._tasks
        assert self._judgement is None or self._tasks.keys() <= self._judgement.objects.keys()

    def _is_open(self, name: str, task: _Task) -> bool:
        assert self._judgement is not None
        given = self._judgement.objects[name]
        is_awaited = task.written_on != "" and task.written_on == version_of(given)
        return not is_awaited and not says(given, task.verdict)


class StatusWriter:
    """Keeps the status of the objects equal to the last judgement, while `run` runs."""

    def __init__(
        self,
        api: StatusApi,
        collection: Collection,
        *,
        judgement: Callable[[], Judgement | None],
        clock: Callable[[], float],
        rng: random.Random,
        troubled: Callable[[str, WatchTrouble, str], None],
        limits: StatusLimits | None = None,
    ) -> None:
        """`troubled` is told of the object, the kind of trouble and its words, once per failed write."""
        self._api = api
        self._collection = collection
        self._judgement = judgement
        self._clock = clock
        self._troubled = troubled
        self._limits = limits or StatusLimits()
        self._desk = StatusDesk(self._limits, rng)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            if (judged := self._judgement()) is not None:
                self._desk.look(judged, self._clock())
            write = self._desk.due(self._clock(), datetime.now(UTC))
            if write is not None:
                await self._make(write)
            await asyncio.sleep(self._limits.look_s if write is None else self._limits.interval_s)

    async def _make(self, write: StatusWrite) -> None:
        try:
            await self._api.patch_status(self._collection, write.name, write.patch)
        except KubeError as error:
            self._desk.failed(write, error.retry_after_s, self._clock())
            self._troubled(write.name, error.trouble, str(error))
        else:
            self._desk.written(write)


def says(given: KubeObject, verdict: Verdict) -> bool:
    """Whether an object's status is what the verdict on it would write."""
    told = condition_of(given)
    if told is None or any(told.get(key) != value for key, value in _condition(verdict).items()):
        return False
    status = given["status"]
    return all(status.get(key) == value for key, value in _figures(verdict).items())


def _condition(verdict: Verdict) -> dict[str, Any]:
    return {
        "type": CONDITION,
        "status": "True" if verdict.is_accepted else "False",
        "observedGeneration": verdict.generation,
        "reason": str(verdict.reason),
        "message": verdict.message,
    }


def _figures(verdict: Verdict) -> dict[str, Any]:
    """What stands beside the conditions; of a refused object, what tells of its last good content stays."""
    figures: dict[str, Any] = {"observedGeneration": verdict.generation}
    if verdict.is_accepted:
        figures |= {"acceptedGeneration": verdict.generation, "pools": verdict.pools}
    return figures


def _patch(given: KubeObject, verdict: Verdict, wall: datetime) -> KubeObject:
    """A JSON merge patch (RFC 7396), which replaces lists whole: others' conditions are in it as they are."""
    told = condition_of(given)
    condition = _condition(verdict)
    is_same = told is not None and told.get("status") == condition["status"]
    since = told.get("lastTransitionTime") if is_same and told is not None else None
    condition["lastTransitionTime"] = since or wall.strftime("%Y-%m-%dT%H:%M:%SZ")
    status = given.get("status")
    listed = status.get("conditions") if isinstance(status, dict) else None
    others = [each for each in listed if each is not told] if isinstance(listed, list) else []
    return {
        "metadata": {"resourceVersion": version_of(given)},
        "status": {**_figures(verdict), "conditions": [*others, condition]},
    }
