"""What is done to the fleet: faults from a seed, spread so that it can serve, each made good again."""

import asyncio
import contextlib
import json
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from benchmarks.chaos.lines import HOP_KINDS, LINE_KINDS, Lines
from benchmarks.chaos.netns import Hosts
from benchmarks.chaos.programs import ChaosError, Programs
from pdcoord.protocol.headers import HostPort

ENGINES = ("prefill", "decode")
_ALL = ("prefill", "decode", "sidecar", "gateway")
_END_S_MAX = 20.0
_LOOK_S = 0.2
_ENDED_BY_UCX = "Fatal: unexpected error: Endpoint timeout"


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is done to one part, and for how long."""

    kind: str
    target: str
    seconds: float
    tokens: int

    def __str__(self) -> str:
        return f"{self.kind} {self.target} for {self.seconds:.1f} s"


_SWITCHED: dict[str, Callable[[Fault], dict[str, object]]] = {
    "reset": lambda fault: {"after_tokens": fault.tokens, "probability": 0.7},
    "stall": lambda fault: {"after_tokens": fault.tokens, "count": 3},
    "never-answers": lambda _: {"kind": "stall", "count": 3},
    "stream_error": lambda fault: {"after_tokens": fault.tokens, "probability": 0.7},
    "abort": lambda fault: {"after_tokens": fault.tokens, "probability": 0.5},
    "error": lambda _: {"status": 503, "probability": 0.5},
    "slow": lambda _: {"factor": 0.05},
    "crawl": lambda _: {"kind": "slow", "factor": 0.001},
    "slow_link": lambda _: {"factor": 0.0005},
    "stale_metrics": lambda _: {},
    "lying_metrics": lambda _: {},
    "refuse": lambda _: {},
    "lost_ticket": lambda _: {},
    "expired_lease": lambda _: {},
}
"""Failures that the emulated engines have themselves."""
_KINDS: dict[str, tuple[str, ...]] = {
    "kill": _ALL,
    "stop": _ALL,
    "terminate": _ALL,
    **dict.fromkeys(_SWITCHED, ENGINES),
    "stall": ("decode",),
    "lost_ticket": ("prefill",),
    "expired_lease": ("prefill",),
}
_WEIGHTS = {"kill": 6, "stop": 4, "terminate": 3, "reset": 2, "stall": 2, "crawl": 2}
_LEFT_MIN = {"prefill": 1, "decode": 1, "sidecar": 1, "gateway": 1}


class Trouble:
    """Strikes parts and mends them; knows which are struck.

    Attributes:
        counts: faults that struck, by kind.
        failures: what the parts did not do that they were told.
    """

    def __init__(self, programs: Programs, rng: random.Random, hosts: Hosts | None = None) -> None:
        self._programs = programs
        self._rng = rng
        self._lines: Lines | None = None
        self._kinds = dict(_KINDS)
        self._weights = _WEIGHTS
        if hosts is not None:
            self._lines = Lines(hosts, programs.parts)
            self._kinds = dict(self._lines.kinds)
            self._weights = dict.fromkeys(self._kinds, 2) | {"kill": 4, "stop": 3}
            self._kinds |= {"kill": _ALL, "stop": ("prefill", "decode", "sidecar")}
        self._struck: set[str] = set()
        self._lost_s: dict[HostPort, float] = {}
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []

    def draw(self) -> Fault | None:
        """The next fault; None if as much is struck as may be."""
        rng, kinds = self._rng, list(self._kinds)
        kind = rng.choices(kinds, [self._weights.get(each, 1) for each in kinds])[0]
        seconds, tokens = rng.uniform(0.3, 3.0), rng.randrange(0, 60)
        targets = [part.name for part in self._programs.parts.values() if part.kind in self._kinds[kind]]
        rng.shuffle(targets)
        target = next((each for each in targets if self._may_strike(each)), None)
        return None if target is None else Fault(kind, target, seconds, tokens)

    def _may_strike(self, name: str) -> bool:
        parts = self._programs.parts
        pod = name.removesuffix("-sidecar")
        if any(each.removesuffix("-sidecar") == pod for each in self._struck):
            return False
        for kind, left_min in _LEFT_MIN.items():
            well = [
                each
                for each, part in parts.items()
                if part.kind == kind
                and each != name
                and each.removesuffix("-sidecar") != pod
                and not any(each.removesuffix("-sidecar") == s.removesuffix("-sidecar") for s in self._struck)
            ]
            if len(well) < left_min:
                return False
        return True

    @property
    def connections_reset(self) -> int:
        """How many, between hosts."""
        return 0 if self._lines is None else self._lines.connections_reset

    def hold(self, name: str) -> None:
        """Take a part for struck: nothing else befalls it, and others of its kind are spared the more."""
        self._struck.add(name)

    def is_struck(self, name: str) -> bool:
        return name in self._struck

    def is_lost(self, gateway: HostPort, since_s: float) -> bool:
        """Whether this gateway died, or was told to, since then: its own connections may break."""
        return self._lost_s.get(gateway, 0.0) >= since_s

    async def strike(self, fault: Fault) -> None:
        """Do it, wait, and make it good."""
        self.hold(fault.target)
        self.counts[fault.kind] += 1
        try:
            await _DEEDS.get(fault.kind, Trouble._switch)(self, fault)
        finally:
            self._struck.discard(fault.target)

    async def keep_running(self) -> None:
        """Start engines again that UCX has ended, as whoever runs pods would; see docs/transfer.md."""
        while True:
            await asyncio.sleep(_LOOK_S)
            for name, part in self._programs.parts.items():
                is_down = not self.is_struck(name) and not self._programs.is_running(name)
                if is_down and part.kind in ENGINES and _ENDED_BY_UCX in self._programs.log_tail(name, 80):
                    await self.strike(Fault("ended-by-ucx", name, 0.0, 0))

    def _note_lost(self, name: str) -> None:
        part = self._programs.parts[name]
        if part.kind == "gateway":
            self._lost_s[part.address] = time.monotonic()

    async def _revive(self, fault: Fault) -> None:
        await asyncio.sleep(fault.seconds / 2)
        await self._programs.start(fault.target)
        try:
            await self._programs.until_ready(fault.target)
        except ChaosError as error:
            self.failures.append(str(error))
        if self._programs.parts[fault.target].kind == "gateway":
            await self._until_serving(fault.target)

    async def _until_serving(self, gateway: str) -> None:
        """Wait until a Service would send somebody there; it need not come, for lack of others."""
        address = self._programs.parts[gateway].address
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_S_MAX):
                while (await self._programs.get(address, "/readyz"))[0] != 200:  # noqa: ASYNC110  # of a process
                    await asyncio.sleep(_LOOK_S)

    async def _kill(self, fault: Fault) -> None:
        self._programs.signal(fault.target, signal.SIGKILL)
        self._note_lost(fault.target)
        await self._programs.until_ended(fault.target, _END_S_MAX)
        await self._revive(fault)

    async def _stop(self, fault: Fault) -> None:
        self._programs.signal(fault.target, signal.SIGSTOP)
        try:
            await asyncio.sleep(fault.seconds)
        finally:
            self._programs.signal(fault.target, signal.SIGCONT)

    async def _terminate(self, fault: Fault) -> None:
        self._programs.signal(fault.target, signal.SIGTERM)
        has_ended = await self._programs.until_ended(fault.target, _END_S_MAX)
        if not has_ended:
            self.failures.append(f"{fault.target} had not ended {_END_S_MAX:g} s after SIGTERM")
            self._programs.signal(fault.target, signal.SIGKILL)
            await self._programs.until_ended(fault.target, _END_S_MAX)
        self._note_lost(fault.target)
        await self._revive(fault)

    async def _disturb(self, fault: Fault) -> None:
        assert self._lines is not None, "there are no hosts"
        await self._lines.disturb(fault.kind, fault.target, fault.seconds)

    async def _switch(self, fault: Fault) -> None:
        part = self._programs.parts[fault.target]
        spec = {"kind": fault.kind, "duration_s": fault.seconds, **_SWITCHED[fault.kind](fault)}
        body = json.dumps({"faults": [spec]}).encode()
        status = await self._programs.post(part.address, "/emulator/faults", body)
        if status != 200:
            self.failures.append(f"{fault} was answered {status}")
        await asyncio.sleep(fault.seconds)


_DEEDS: dict[str, Callable[[Trouble, Fault], Awaitable[None]]] = {
    "kill": Trouble._kill,  # noqa: SLF001  # its own table
    "stop": Trouble._stop,  # noqa: SLF001
    "terminate": Trouble._terminate,  # noqa: SLF001
    "ended-by-ucx": Trouble._revive,  # noqa: SLF001
    **dict.fromkeys(LINE_KINDS | HOP_KINDS, Trouble._disturb),  # noqa: SLF001
}
