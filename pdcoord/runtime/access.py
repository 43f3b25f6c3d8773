"""Who is let in by a coordinator process: its files of keys, followed while it runs, and what it counts."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Any

from structlog.typing import FilteringBoundLogger

from pdcoord.feeds.keyfile import SecretFile, parse_admin_key, parse_engine_key
from pdcoord.feeds.keys import parse_keys
from pdcoord.front.gate import Gate
from pdcoord.front.keys import KeyFault, KeyRing
from pdcoord.front.rates import RateKind
from pdcoord.policy.errors import PolicyError
from pdcoord.runtime import key_metrics as catalog
from pdcoord.runtime.metricspec import MetricSpec
from pdcoord.runtime.secured import SecretError, written
from pdcoord.runtime.settings import CoordinatorSettings
from pdcoord.wire.plankeys import unix_now_s

_Sample = tuple[tuple[str, ...], float]
_OUTCOMES = ("accepted", "refused")


class KeyFile(StrEnum):
    """Which file; closed, a label of metrics."""

    KEYS = "keys"
    ADMIN = "admin-key"
    ENGINE = "engine-key"


_FIELDS: dict[str, str] = {
    KeyFile.KEYS: "keys_file",
    KeyFile.ADMIN: "admin_key_file",
    KeyFile.ENGINE: "engine_key_file",
}
"""The setting of each."""


class Access:
    """The gate that calls pass, the admin listener's key, and the files behind both.

    Attributes:
        gate: open until keys were loaded.
        admin_key: None where the admin listener asks for none.
    """

    def __init__(self, settings: CoordinatorSettings, log: FilteringBoundLogger) -> None:
        self._log = log
        self._refused: Counter[KeyFault] = Counter()
        self._admin_refused: Counter[KeyFault] = Counter()
        self._limited: Counter[tuple[str, RateKind]] = Counter()
        self._reloads: Counter[tuple[str, str]] = Counter()
        self._names: tuple[str, ...] = ()
        self.gate = Gate(clock=time.monotonic, wall=unix_now_s, observer=self)
        self.admin_key: bytes | None = None
        self._files: list[tuple[SecretFile[Any], Callable[[Any], None]]] = []
        if settings.keys_file is not None:
            self._files.append((SecretFile(settings.keys_file, KeyFile.KEYS, parse_keys), self.use_keys))
        if settings.admin_key_file is not None:
            admin = SecretFile(settings.admin_key_file, KeyFile.ADMIN, parse_admin_key)
            self._files.append((admin, self._use_admin_key))
        if settings.engine_key_file is not None:
            engine = SecretFile(settings.engine_key_file, KeyFile.ENGINE, parse_engine_key)
            self._files.append((engine, self._use_engine_key))

    def load_first(self) -> None:
        """Put in force what the files hold before the process runs.

        Raises:
            SecretError: if any of them cannot be used; a process should not start so.
        """
        for file, use in self._files:
            try:
                use(file.load_first())
            except PolicyError as error:
                raise SecretError(f"{written(_FIELDS[file.name])}: {error}") from error

    async def poll(self) -> None:
        """Look at the files again; a change counts when two polls in a row find it.

        Reading is done in a thread, as with policies: thousands of keys take a while.
        """
        for file, use in self._files:
            try:
                found = await asyncio.to_thread(file.poll)
            except PolicyError as error:
                self._reloads[file.name, "refused"] += 1
                problems = [str(problem) for problem in error.problems]
                self._log.error("keys.refused", file=file.name, problems=problems)
                continue
            if found is not None:
                use(found)
                self._reloads[file.name, "accepted"] += 1
                self._log.info("keys.accepted", file=file.name, keys=len(self._names))

    def use_keys(self, ring: KeyRing) -> None:
        """Let calls in by these keys from now on."""
        self.gate.use(ring)
        self._names = tuple(sorted(key.name for key in ring.keys))
        # What is counted of keys is bounded by the keys that there are.
        gone = {key for key, _ in self._limited}.difference(self._names)
        for name in gone:
            for kind in RateKind:
                del self._limited[name, kind]

    def key_refused(self, fault: KeyFault) -> None:
        """As of `GateObserver`."""
        self._refused[fault] += 1

    def rate_limited(self, key: str, kind: RateKind) -> None:
        """As of `GateObserver`."""
        self._limited[key, kind] += 1

    def admin_refused(self, fault: KeyFault) -> None:
        """Somebody was not let in at the admin listener."""
        self._admin_refused[fault] += 1

    def samples(self) -> Iterable[tuple[MetricSpec, Iterable[_Sample]]]:
        """For /metrics."""
        yield (
            catalog.AUTH_FAILURES,
            [
                ((listener, fault), float(counts[fault]))
                for listener, counts in (("front", self._refused), ("admin", self._admin_refused))
                for fault in KeyFault
            ],
        )
        limited = self._limited
        rates = ((name, kind) for name in self._names for kind in RateKind)
        yield catalog.RATE_LIMITED, [(rate, float(limited[rate])) for rate in rates]
        kinds = ((file, outcome) for file in KeyFile for outcome in _OUTCOMES)
        yield catalog.KEY_RELOADS, [(kind, float(self._reloads[kind])) for kind in kinds]
        stale = {file.name for file, _ in self._files if file.problems}
        yield catalog.KEYS_STALE, [((file,), float(file in stale)) for file in KeyFile]
        yield catalog.KEYS, [((), float(len(self._names)))]

    def _use_admin_key(self, key: bytes) -> None:
        self.admin_key = key

    def _use_engine_key(self, key: bytes) -> None:
        self.gate.engine_key = key
