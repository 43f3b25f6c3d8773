"""Keeps a copy of a Kubernetes collection up to date: list, then watch, and list again when that expires.

Protocol: Kubernetes API concepts, "Efficient detection of changes" (release 1.37).
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

KubeObject = Mapping[str, Any]
"""An object as the API answers it; never changed once it is here."""

STEADY_S = 1.0
"""A watch that ends sooner, and told of nothing, counts as a failure: it must not be opened in a loop."""


class WatchTrouble(StrEnum):
    """What went wrong between here and the API server; closed, a label of metrics."""

    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"
    BROKEN = "broken"
    EXPIRED = "expired"
    THROTTLED = "throttled"
    DENIED = "denied"
    MISSING = "missing"
    STATUS = "status"
    UNREADABLE = "unreadable"
    TOO_MANY = "too-many"


def trouble_of_status(status: int) -> WatchTrouble:
    """What an HTTP status, or the `code` of a Status object in a watch, means here."""
    match status:
        case 410:
            return WatchTrouble.EXPIRED
        case 429:
            return WatchTrouble.THROTTLED
        case 401 | 403:
            return WatchTrouble.DENIED
        case 404:
            return WatchTrouble.MISSING
        case _:
            return WatchTrouble.STATUS


@dataclass(frozen=True, slots=True)
class WatchLimits:
    """Bounds on following one collection.

    Attributes:
        objects_max: further ones are left out, and counted as trouble.
        backoff_s: the pause after the first failure, doubled with each, up to `backoff_s_max`; what the
            server asks for in Retry-After goes before, up to the same.
    """

    objects_max: int = 16_384
    backoff_s: float = 0.2
    backoff_s_max: float = 30.0


# Events: what came of the last action.


@dataclass(frozen=True, slots=True)
class Started:
    """Begin, or begin anew because something else is to be followed; what is known stays known."""


@dataclass(frozen=True, slots=True)
class PageListed:
    """One page of a list.

    Attributes:
        next_page: the server's token for the rest; empty after the last page.
    """

    objects: Sequence[KubeObject]
    resource_version: str
    next_page: str = ""


@dataclass(frozen=True, slots=True)
class WatchOpened:
    """The server has taken the watch."""


@dataclass(frozen=True, slots=True)
class WatchTold:
    """One line of a watch: its type (ADDED, MODIFIED, DELETED, BOOKMARK or ERROR) and object."""

    type: str
    object: KubeObject


@dataclass(frozen=True, slots=True)
class WatchEnded:
    """The server ended the watch, as it does now and then."""


@dataclass(frozen=True, slots=True)
class Failed:
    """A list or a watch failed.

    Attributes:
        retry_after_s: what the server asks to wait; None where it says nothing.
    """

    trouble: WatchTrouble
    retry_after_s: float | None = None


WatchEvent = Started | PageListed | WatchOpened | WatchTold | WatchEnded | Failed


# Actions: what to do next; of the first two exactly one, unless a watch is open already.


@dataclass(frozen=True, slots=True)
class ListPage:
    """After a pause, ask for a page; an empty token asks for the first."""

    page: str
    pause_s: float = 0.0


@dataclass(frozen=True, slots=True)
class OpenWatch:
    """After a pause, watch for what happened since a resource version; give up a watch that is open."""

    resource_version: str
    pause_s: float = 0.0


@dataclass(frozen=True, slots=True)
class TellChange:
    """`objects` is not what it was."""


@dataclass(frozen=True, slots=True)
class TellTrouble:
    """Something for the log and the metrics; what is known stays in force."""

    trouble: WatchTrouble
    retry_s: float


WatchAction = ListPage | OpenWatch | TellChange | TellTrouble


@dataclass(slots=True)
class WatchMachine:
    """The rules of following one collection in one namespace; does no I/O.

    Attributes:
        rng: spreads pauses, so that replicas do not come back all at once.
        keep: what of an object is worth memory, its name at least; a change of the rest is none.
        objects: by name, as last known; after any failure they stay until a whole new list is there.
        has_listed: whether `objects` was ever complete.
        heard_s: when the server last said something of use; None if it never did.
        list_count: complete lists so far.
        watch_count: watches opened so far.
    """

    limits: WatchLimits
    rng: random.Random
    keep: Callable[[KubeObject], KubeObject] = lambda given: given
    objects: dict[str, KubeObject] = field(default_factory=dict)
    has_listed: bool = False
    heard_s: float | None = None
    list_count: int = 0
    watch_count: int = 0
    _pending: dict[str, KubeObject] | None = None
    _left_out: bool = False
    _version: str = ""
    _failures: int = 0
    _opened_s: float | None = None
    _has_told: bool = False

    def handle(self, event: WatchEvent, now_s: float) -> list[WatchAction]:
        """Take in what came, and say what to do."""
        if not isinstance(event, Started | Failed):
            self.heard_s = now_s
        match event:
            case Started():
                self._failures, self._opened_s = 0, None
                return self._list_anew(0.0)
            case PageListed():
                return self._take_page(event)
            case WatchOpened():
                self.watch_count += 1
                self._opened_s, self._has_told = now_s, False
                return []
            case WatchTold("ERROR", status):
                return self._fail(_failure_of(status))
            case WatchTold(type_, told):
                return self._take_told(type_, told)
            case WatchEnded():
                is_steady = self._has_told or now_s - (self._opened_s or now_s) >= STEADY_S
                if is_steady:
                    self._failures = 0
                    return self._watch(0.0)
                return self._fail(Failed(WatchTrouble.BROKEN))
            case Failed():
                return self._fail(event)

    def validate(self) -> None:
        """Raises AssertionError if the state contradicts itself."""
        assert len(self.objects) <= self.limits.objects_max
        assert all(name_of(known) == name for name, known in self.objects.items())
        assert self.has_listed or not self.objects
        assert (self._opened_s is None) or (self._pending is None)

    # Lists.

    def _list_anew(self, pause_s: float) -> list[WatchAction]:
        self._pending, self._left_out, self._opened_s = {}, False, None
        return [ListPage("", pause_s)]

    def _take_page(self, page: PageListed) -> list[WatchAction]:
        if self._pending is None:
            return []
        for listed in page.objects:
            self._put(self._pending, self.keep(listed))
        if page.next_page and len(self._pending) < self.limits.objects_max:
            return [ListPage(page.next_page)]
        self._left_out = self._left_out or bool(page.next_page)
        is_change = self._pending != self.objects or not self.has_listed
        self.objects, self._pending, self._version = self._pending, None, page.resource_version
        self.has_listed = True
        self.list_count += 1
        told: list[WatchAction] = [TellChange()] if is_change else []
        return [*told, *self._tell_left_out(), *self._watch(0.0)]

    def _tell_left_out(self) -> list[WatchAction]:
        return [TellTrouble(WatchTrouble.TOO_MANY, 0.0)] if self._left_out else []

    def _put(self, objects: dict[str, KubeObject], given: KubeObject) -> bool:
        """Take an object in, unless it has no name or would be one too many; whether it was."""
        name = name_of(given)
        if not name:
            return False
        if name not in objects and len(objects) >= self.limits.objects_max:
            self._left_out = True
            return False
        objects[name] = given
        return True

    # Watches.

    def _watch(self, pause_s: float) -> list[WatchAction]:
        self._opened_s = None
        return [OpenWatch(self._version, pause_s)]

    def _take_told(self, type_: str, told: KubeObject) -> list[WatchAction]:
        if self._opened_s is None:
            return []  # What a watch that was given up had still in its buffer.
        self._version = version_of(told) or self._version
        self._failures, self._has_told = 0, True
        name, had_left_out = name_of(told), self._left_out
        match type_:
            case "ADDED" | "MODIFIED":
                kept = self.keep(told)
                if self.objects.get(name) == kept:
                    return []
                if self._put(self.objects, kept):
                    return [TellChange()]
                return [] if had_left_out else self._tell_left_out()
            case "DELETED":
                if self.objects.pop(name, None) is None:
                    return []
                # There is room again for one that was left out.
                return [TellChange(), *(self._list_anew(0.0) if had_left_out else [])]
            case _:
                return []  # BOOKMARK, and types of later versions.

    # Failures.

    def _fail(self, failed: Failed) -> list[WatchAction]:
        is_first = self._failures == 0
        self._failures += 1
        pause_s = self._pause_s(failed.retry_after_s)
        is_listing = self._pending is not None
        if failed.trouble is WatchTrouble.EXPIRED and is_first and not is_listing:
            pause_s = 0.0  # The normal end of an old version.
        told = TellTrouble(failed.trouble, pause_s)
        # Only after a failure on the way can one go on where one was. A server that has lost the version,
        # or says what cannot be read, has to be asked for everything.
        can_go_on = failed.trouble not in {WatchTrouble.EXPIRED, WatchTrouble.UNREADABLE}
        if not is_listing and self.has_listed and can_go_on:
            return [told, *self._watch(pause_s)]
        return [told, *self._list_anew(pause_s)]

    def _pause_s(self, retry_after_s: float | None) -> float:
        limits = self.limits
        doubled_s = min(limits.backoff_s * 2.0 ** min(self._failures - 1, 16), limits.backoff_s_max)
        if retry_after_s is not None:
            doubled_s = max(doubled_s, min(retry_after_s, limits.backoff_s_max))
            return doubled_s * self.rng.uniform(1.0, 1.1)
        return doubled_s * self.rng.uniform(0.5, 1.0)


def name_of(given: KubeObject) -> str:
    """`metadata.name`; empty where there is none."""
    return _metadata_text(given, "name")


def version_of(given: KubeObject) -> str:
    """`metadata.resourceVersion`; empty where there is none."""
    return _metadata_text(given, "resourceVersion")


def _metadata_text(given: KubeObject, key: str) -> str:
    metadata = given.get("metadata")
    text = metadata.get(key) if isinstance(metadata, Mapping) else None
    return text if isinstance(text, str) else ""


def _failure_of(status: KubeObject) -> Failed:
    """A Status object in a watch: its `code`, and `details.retryAfterSeconds` if it has that."""
    code, details = status.get("code"), status.get("details")
    wait_s = details.get("retryAfterSeconds") if isinstance(details, Mapping) else None
    trouble = trouble_of_status(code) if isinstance(code, int) else WatchTrouble.UNREADABLE
    return Failed(trouble, float(wait_s) if isinstance(wait_s, int | float) and wait_s > 0 else None)
