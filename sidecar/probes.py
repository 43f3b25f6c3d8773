"""Has this pod's own engine probe the KV side channel of every allowed prefill target, now and then."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from random import Random

import structlog

from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.paths import PathsReport, encode_paths
from pdcoord.protocol.plans import PrefillTarget
from sidecar.errors import AgentLostError
from sidecar.observe import Metrics
from sidecar.paths import Path, PathBook
from transfer.session.messages import ProbeTold

PROBE_S_MAX = 5.0
"""Longest probe: a handshake of a new pair, which is the slow part, and a read of some MiB."""
PROBES_MAX = 4
"""Probes at a time: they share the link with requests."""
_AGENT_LOST = "agent-unreachable"
_NOT_ASKED = "own agent: "
"""How `ask_probe` begins the detail where not even the own agent could be asked."""
_GAUGES = ("path_usable", "path_degraded", "path_latency_seconds", "path_bandwidth_bytes_per_second")

Ask = Callable[[HostPort], Awaitable[ProbeTold]]
"""Asks the own engine's agent to probe a KV side channel.

Raises:
    AgentLostError: if that agent could not be asked.
"""

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class ProbeRules:
    """How often.

    Attributes:
        interval_s: longest time between two probes of a target that answers.
        kv_port: of a target that names none.
        look_s: longest time until a change of the targets is seen.
    """

    interval_s: float
    kv_port: int
    look_s: float = 1.0


def ask_through(agent: HostPort, key: bytes) -> Ask:
    """Ask the agent at this side channel address; an empty key if it has none."""
    # The side channel needs xxhash, which a sidecar that probes nothing need not have.
    from transfer.side_client import ask_probe  # noqa: PLC0415

    async def ask(producer: HostPort) -> ProbeTold:
        told = await ask_probe(agent, producer, key, PROBE_S_MAX)
        if told.detail.startswith(_NOT_ASKED):
            raise AgentLostError(f"{told.failure}: {told.detail}")
        return told

    return ask


class Prober:
    """Probes until cancelled; what it knows is on GET /paths and in metrics by target.

    Args:
        targets: the prefill targets; asked again at each look.
        now_s: monotonic seconds.
    """

    def __init__(
        self,
        ask: Ask,
        targets: Callable[[], Iterable[PrefillTarget]],
        rules: ProbeRules,
        *,
        rng: Random,
        metrics: Metrics,
        now_s: Callable[[], float],
    ) -> None:
        self._book = PathBook(interval_s=rules.interval_s, kv_port=rules.kv_port, rng=rng)
        self._look_s = rules.look_s
        self._ask = ask
        self._targets = targets
        self._metrics = metrics
        self._now_s = now_s
        self._under_way = 0
        self._ended = asyncio.Event()
        self._book.sync(targets(), now_s())

    def is_warm(self) -> bool:
        """Whether every target has been probed once: the first request need not wait for a handshake."""
        return self._book.is_warm

    def told(self) -> PathsReport:
        """What was probed."""
        return self._book.report(self._now_s())

    def report(self) -> bytes:
        """The same as JSON."""
        return encode_paths(self.told())

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                now_s = self._now_s()
                for address in self._book.sync(self._targets(), now_s):
                    self._metrics.drop(_GAUGES, address)
                for path in self._book.take_due(now_s, PROBES_MAX - self._under_way):
                    self._under_way += 1
                    group.create_task(self._probe(path))
                await self._wait(now_s)

    async def _wait(self, now_s: float) -> None:
        """Until a path is due and there is room to probe it; the targets are looked at at least so often."""
        is_full = self._under_way >= PROBES_MAX
        wait_s = self._look_s if is_full else self._book.wait_s(now_s, self._look_s)
        self._ended.clear()
        try:
            async with asyncio.timeout(wait_s):
                await self._ended.wait()
        except TimeoutError:
            return

    async def _probe(self, path: Path) -> None:
        try:
            # The agent keeps the deadline itself; the second more is for its answer.
            async with asyncio.timeout(PROBE_S_MAX + 1.0):
                told = await self._ask(path.kv_address)
        except (AgentLostError, TimeoutError) as error:
            self._note_agent_lost(path, error)
        else:
            self._note(path, told)
        finally:
            self._under_way -= 1
            self._ended.set()

    def _note_agent_lost(self, path: Path, error: Exception) -> None:
        self._metrics.count("probes", _AGENT_LOST)
        if self._book.note_agent_lost(path, self._now_s()):
            _log.warning("agent.lost", error=str(error)[:200] or "no answer")
        self._metrics.set("kv_agent_up", 0.0)

    def _note(self, path: Path, told: ProbeTold) -> None:
        was_up = self._book.is_agent_up
        has_changed = self._book.note(path, told, self._now_s())
        self._metrics.count("probes", (path.told and path.told.failure) or "ok")
        self._metrics.set("kv_agent_up", 1.0)
        if not was_up:
            _log.info("agent.found")
        if self._book.is_current(path):
            self._show(path, has_changed=has_changed)

    def _show(self, path: Path, *, has_changed: bool) -> None:
        told, address = path.told, path.target.address
        assert told is not None
        is_usable = not told.failure
        figures = (float(is_usable), float(told.is_degraded), told.latency_s, told.bytes_per_s)
        for name, value in zip(_GAUGES, figures, strict=True):
            if value is None:
                self._metrics.drop((name,), address)
            else:
                self._metrics.set(name, value, address)
        if has_changed:
            write = _log.info if is_usable and not told.is_degraded else _log.warning
            write(
                "path.changed",
                target=address,
                kv_address=path.kv_address,
                is_usable=is_usable,
                failure=told.failure or None,
                detail=told.detail or None,
                verdict=told.verdict or None,
                verdict_reason=told.verdict_reason or None,
                transport=told.transport or None,
                is_degraded=told.is_degraded,
                latency_ms=None if told.latency_s is None else round(told.latency_s * 1e3, 3),
                gbit_per_s=None if told.bytes_per_s is None else round(told.bytes_per_s * 8e-9, 3),
            )
