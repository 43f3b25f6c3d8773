"""What an agent hands over to its engine, and what it counts; written and read in different threads."""

import threading
from collections import Counter
from dataclasses import dataclass, field

from transfer.backends.base import Region
from transfer.errors import Failure, FailureKind
from transfer.session.vocabulary import Report


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What has ended since it was last asked.

    Attributes:
        free_blocks: requests whose blocks are read no more, once for each that was opened.
        reports: one for each load.
    """

    free_blocks: tuple[str, ...] = ()
    reports: tuple[Report, ...] = ()


class Results:
    """Ends of opened and loaded requests: each expected one comes out once, whatever happens to the agent."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._opened: set[str] = set()
        self._loading: set[str] = set()
        self._free: list[str] = []
        self._reports: list[Report] = []
        self._is_closed = False
        self._closed = threading.Event()

    def expect_blocks(self, request: str) -> None:
        with self._lock:
            if self._is_closed:
                self._free.append(request)
            else:
                self._opened.add(request)

    def expect_report(self, request: str) -> None:
        with self._lock:
            if self._is_closed:
                self._reports.append(_closed(request))
            else:
                self._loading.add(request)

    def free(self, request: str) -> None:
        """An opened request's blocks are free; told again, or never opened, it is dropped."""
        with self._lock:
            if request in self._opened:
                self._opened.remove(request)
                self._free.append(request)

    def report(self, report: Report) -> None:
        """A load has ended; told again, or never asked, it is dropped."""
        with self._lock:
            if report.request in self._loading:
                self._loading.remove(report.request)
                self._reports.append(report)

    def drain(self) -> Outcomes:
        if not self._free and not self._reports:
            return _NONE  # Asked in every step of an engine: no lock where there is nothing.
        with self._lock:
            outcomes = Outcomes(tuple(self._free), tuple(self._reports))
            self._free.clear()
            self._reports.clear()
        return outcomes

    def close(self) -> None:
        """Nothing will end by itself any more: end all that is expected, and all that comes. Idempotent."""
        with self._lock:
            self._is_closed = True
            self._free += sorted(self._opened)
            self._reports += [_closed(request) for request in sorted(self._loading)]
            self._opened.clear()
            self._loading.clear()
        self._closed.set()

    def wait_closed(self, timeout_s: float) -> bool:
        """Wait until nothing of the engine's is read or written any more; whether that came in time."""
        return self._closed.wait(timeout_s)


_NONE = Outcomes()


def _closed(request: str) -> Report:
    return Report(request, Failure(FailureKind.CLOSED, "the transfer agent has stopped"), 0)


@dataclass(frozen=True, slots=True)
class AgentStats:
    """Counts since the start; seconds are those of threads, which overlap.

    Attributes:
        loads, load_failures: ended loads, and the failed of them by kind.
        offers, offer_failures: ended hand-overs from here, and the failed of them by kind.
        staging_used_bytes: held now by offers and landings, of `staging_bytes`.
    """

    loads: int
    loaded_bytes: int
    load_failures: dict[str, int]
    offers: int
    offer_failures: dict[str, int]
    packed_bytes: int
    pack_s: float
    read_bytes: int
    read_s: float
    unpacked_bytes: int
    unpack_s: float
    staging_used_bytes: int
    staging_bytes: int


@dataclass(slots=True)
class Counters:
    """The running counts behind AgentStats."""

    _lock: threading.Lock = field(default_factory=threading.Lock)
    _sums: Counter[str] = field(default_factory=Counter)
    _seconds: dict[str, float] = field(default_factory=lambda: {"pack": 0.0, "read": 0.0, "unpack": 0.0})
    _load_failures: Counter[str] = field(default_factory=Counter)
    _offer_failures: Counter[str] = field(default_factory=Counter)

    def packed(self, byte_count: int, took_s: float) -> None:
        self._add("pack", byte_count, took_s)

    def read(self, byte_count: int, took_s: float) -> None:
        self._add("read", byte_count, took_s)

    def unpacked(self, byte_count: int, took_s: float) -> None:
        self._add("unpack", byte_count, took_s)

    def _add(self, name: str, byte_count: int, took_s: float) -> None:
        with self._lock:
            self._sums[name] += byte_count
            self._seconds[name] += took_s

    def loaded(self, report: Report) -> None:
        with self._lock:
            self._sums["loads"] += 1
            self._sums["loaded_bytes"] += report.loaded_bytes
            if report.failure is not None:
                self._load_failures[report.failure.kind] += 1

    def ended(self, failure: Failure | None) -> None:
        with self._lock:
            self._sums["offers"] += 1
            if failure is not None:
                self._offer_failures[failure.kind] += 1

    def stats(self, staging_used_bytes: int, staging: Region) -> AgentStats:
        with self._lock:
            return AgentStats(
                loads=self._sums["loads"],
                loaded_bytes=self._sums["loaded_bytes"],
                load_failures=dict(self._load_failures),
                offers=self._sums["offers"],
                offer_failures=dict(self._offer_failures),
                packed_bytes=self._sums["pack"],
                pack_s=self._seconds["pack"],
                read_bytes=self._sums["read"],
                read_s=self._seconds["read"],
                unpacked_bytes=self._sums["unpack"],
                unpack_s=self._seconds["unpack"],
                staging_used_bytes=staging_used_bytes,
                staging_bytes=staging.length_bytes,
            )
