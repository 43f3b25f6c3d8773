"""The workers' half of the vLLM connector: carries a step's orders to the agent, and its outcomes back.

No vLLM and no torch. One thread, the engine's own; nothing here waits for the network.
"""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from transfer.engines.vllm.metadata import Settle, StepOrders
from transfer.errors import FailureKind
from transfer.session.vocabulary import ChunkComputed, LoadAsked, Opened, Report, Tables, TransferId

SETTLE_S_MAX = 1.0
"""Longest that a step waits for packs to let go of blocks; then the hand-overs are given up, not the step."""

ABORT_S_MAX = 15.0
"""Longest that a step waits for a hand-over that was given up: for what is being packed, a chunk at most."""


class Told(Protocol):
    """What an agent's poll gives."""

    @property
    def free_blocks(self) -> Collection[str]: ...
    @property
    def reports(self) -> Sequence[Report]: ...


class Agent(Protocol):
    """What this half asks of transfer.agent.Agent."""

    def open(self, opened: Opened) -> None: ...
    def stage(self, chunk: ChunkComputed, ready: Callable[[], None] | None = None) -> None: ...
    def abort(self, transfer: TransferId) -> None: ...
    def wait_packed(self, request_ids: Collection[str], timeout_s: float) -> bool: ...
    def load(self, asked: LoadAsked) -> None: ...
    def cancel(self, request: str) -> None: ...
    def poll(self) -> Told: ...


@dataclass(frozen=True, slots=True)
class Results:
    """What the scheduler is told after a step.

    Attributes:
        sent: requests whose blocks may be freed.
        received: requests whose load is over.
        failed: those of `received` whose blocks hold nothing.
    """

    sent: set[str]
    received: set[str]
    failed: set[str]


@dataclass(slots=True)
class Tally:
    """What happened since the last look, for metrics.

    Attributes:
        seconds: of each load that ended well, from its order on.
        failures: loads that failed, by FailureKind.
    """

    seconds: list[float] = field(default_factory=list)
    loaded_bytes: int = 0
    failures: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class TableShape:
    """How the scheduler's block ids become the kernels' own.

    Attributes:
        groups: indices of the groups that are transferred, of all the scheduler's.
        kernel_blocks: of each of them, how many kernel blocks make one of the scheduler's blocks.
    """

    groups: tuple[int, ...]
    kernel_blocks: tuple[int, ...]

    def tables(self, tables: Tables) -> Tables:
        """Block 0 is vLLM's null block: it stays 0, which stands for a block that is not kept.

        No tables at all become empty ones.
        """
        if not tables:
            return ((),) * len(self.groups)
        return tuple(
            tables[group] if count == 1 else _split(tables[group], count)
            for group, count in zip(self.groups, self.kernel_blocks, strict=True)
        )


def _split(table: Sequence[int], count: int) -> tuple[int, ...]:
    return tuple(block * count + part if block > 0 else 0 for block in table for part in range(count))


class WorkerSide:
    """Keeps what the scheduler may be told: each load exactly once, held blocks once they are free.

    Args:
        clock: as time.monotonic.
    """

    def __init__(self, agent: Agent, shape: TableShape, clock: Callable[[], float]) -> None:
        self._agent = agent
        self._shape = shape
        self._clock = clock
        self._open: dict[str, TransferId] = {}
        self._given_up: set[TransferId] = set()
        self._stillborn: set[str] = set()
        self._free: set[str] = set()
        self._held: set[str] = set()
        self._loading: dict[str, float] = {}
        self._tally = Tally()

    def before_forward(self, orders: StepOrders) -> None:
        """What must not wait for the step's forward pass: letting go of blocks, loads and their ends."""
        self._settle(orders.settle)
        for asked in orders.loads:
            if asked.tokens.count:
                self._loading[asked.request] = self._clock()
            self._agent.load(replace(asked, tables=self._shape.tables(asked.tables)))
        for request in orders.cancelled:
            self._agent.cancel(request)

    def _settle(self, settles: Sequence[Settle]) -> None:
        open_ones = [s for s in settles if s.request in self._open]
        if not open_ones or self._agent.wait_packed({s.request for s in open_ones}, SETTLE_S_MAX):
            return
        # What is packed after this step has begun may be another request's KV: nobody must be given it.
        late = [s for s in open_ones if not self._agent.wait_packed({s.request}, 0.0)]
        for settle in late:
            self._given_up.add(settle.transfer)
            self._agent.abort(settle.transfer)
        self._agent.wait_packed({s.request for s in late}, ABORT_S_MAX)

    def after_forward(self, orders: StepOrders, ready: Callable[[], None] | None) -> None:
        """Stage what the step has computed.

        Args:
            ready: blocks until the device has written it.
        """
        for opened in orders.opened:
            self._open[opened.request] = opened.transfer
            self._agent.open(opened)
        for chunk in orders.chunks:
            if chunk.transfer not in self._given_up:
                self._agent.stage(replace(chunk, tables=self._shape.tables(chunk.tables)), ready)
        for transfer in orders.aborted:
            if transfer not in self._given_up:
                self._agent.abort(transfer)
        for opened in orders.stillborn:
            self._stillborn.add(opened.request)
            self._agent.open(opened)
            self._agent.abort(opened.transfer)
        self._held.update(orders.held)

    def results(self) -> Results:
        """What has ended since the last call."""
        outcomes = self._agent.poll()
        for request in outcomes.free_blocks:
            if request in self._stillborn:
                self._stillborn.remove(request)
            else:
                self._free.add(request)
        sent = self._free & self._held
        self._free -= sent
        self._held -= sent
        for request in sent:
            self._given_up.discard(self._open.pop(request))
        received: set[str] = set()
        failed: set[str] = set()
        for report in outcomes.reports:
            self._count(report)
            if self._loading.pop(report.request, None) is not None:
                received.add(report.request)
                if report.failure is not None:
                    failed.add(report.request)
        return Results(sent, received, failed)

    def _count(self, report: Report) -> None:
        begun_s = self._loading.get(report.request)
        if report.failure is not None:
            if report.failure.kind is not FailureKind.CANCELLED:
                self._tally.failures[report.failure.kind] += 1
        elif begun_s is not None:
            self._tally.seconds.append(self._clock() - begun_s)
            self._tally.loaded_bytes += report.loaded_bytes

    def take_tally(self) -> Tally | None:
        """What happened since the last call; None if nothing did."""
        if not self._tally.seconds and not self._tally.failures:
            return None
        taken, self._tally = self._tally, Tally()
        return taken
