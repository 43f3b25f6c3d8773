"""The transfer side of one engine rank, as the engine sees it: ask, and poll for what came of it.

One thread runs an event loop with both session machines and the side channel; a few threads pack and unpack;
backends bring their own. The engine calls from its own thread and is never made to wait for the network.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import CancelledError, Future

from transfer.agent_state import AgentStats, Counters, Outcomes, Results
from transfer.backends.base import Backend
from transfer.control import Control, Surroundings
from transfer.door import Identity
from transfer.errors import FailureKind
from transfer.layout import RankLayout
from transfer.mailbox import Mailbox
from transfer.probe import failed_probe
from transfer.repack.base import Repacker
from transfer.session.messages import ProbeTold
from transfer.session.vocabulary import (
    Aborted,
    ChunkComputed,
    LoadAsked,
    LoadCancelled,
    Opened,
    TransferId,
)
from transfer.settings import AgentSettings
from transfer.staging import Staging
from transfer.workers import Workers

START_S_MAX = 10.0
CLOSE_S_MAX = 4.0
"""Longest time to close connections."""
WORK_END_S_MAX = 10.0
"""Longest wait for a pack or an unpack under way, before the engine is told that its blocks are its own."""
DRAIN_PAUSE_S = 0.02
_log = logging.getLogger("pdcoord.transfer")
_FAILED = "the transfer agent has failed; the engine goes on without transfers"


class Agent:
    """Moves KV for one rank, both ways.

    Args:
        backends: in order of preference; started and closed by the agent.
        staging: outlives the agent; the repacker works on the same buffer.
    """

    def __init__(
        self,
        settings: AgentSettings,
        identity: Identity,
        staging: Staging,
        repacker: Repacker,
        backends: Sequence[Backend],
    ) -> None:
        self._repacker = repacker
        self._lease_s = settings.lease_s
        self._staging = staging
        self._backends = {backend.name: backend for backend in backends}
        self._results = Results()
        self._counters = Counters()
        self._started: Future[None] = Future()
        self._stop = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._mailbox = Mailbox(self._loop, self._fail)
        self._thread = threading.Thread(target=self._run_loop, name="pdcoord-kv-control", daemon=True)
        self._workers = Workers(settings.repack_threads, "pdcoord-kv-repack")
        self._lock = threading.Lock()
        self._is_closed = False
        self._control = Control(
            settings,
            identity,
            staging,
            repacker,
            self._backends,
            surroundings=Surroundings(
                self._mailbox.post, self._workers.submit, self._results, self._counters, self._fail
            ),
        )

    @property
    def layout(self) -> RankLayout:
        return self._repacker.layout

    @property
    def address(self) -> str:
        """Where peers dial this rank, once it has started."""
        return self._control.address

    def start(self) -> None:
        """Register staging, listen, and begin.

        Raises:
            SettingError: if the settings cannot work here.
            BackendError: if a backend cannot register the staging buffer.
        """
        try:
            for backend in self._backends.values():
                backend.start(self._staging.region)
            self._workers.start()
            self._thread.start()
            self._started.result(START_S_MAX)
        except BaseException:
            self.close()
            raise

    def set_ranks(self, addresses: Sequence[str]) -> None:
        """Addresses of all ranks of this engine, by rank; with one rank there is no need."""
        ranks = tuple(addresses)
        self._mailbox.post(lambda: self._control.set_ranks(ranks))

    # The producer's side.

    def open(self, opened: Opened) -> None:
        """A prefill begins whose KV is to be handed over; `poll` tells once when its blocks are free."""
        self._results.expect_blocks(opened.request)
        self._mailbox.post(lambda: self._control.open(opened))

    def stage(self, chunk: ChunkComputed, ready: Callable[[], None] | None = None) -> None:
        """Tokens of an opened prefill are computed.

        Args:
            ready: blocks until they can be seen in the engine's blocks; called in a repack thread before
                those are read.
        """
        self._mailbox.post(lambda: self._control.stage(chunk, ready))

    def abort(self, transfer: TransferId) -> None:
        """The engine gives an opened prefill up."""
        self._mailbox.post(lambda: self._control.tell_outbox(Aborted(transfer)))

    def wait_packed(self, request_ids: Collection[str], timeout_s: float) -> bool:
        """Wait until no blocks of these requests are read, or about to be; False if that took too long."""
        waiter: Future[None] = Future()
        names = frozenset(request_ids)
        if not self._mailbox.post(lambda: self._control.wait_for_packs(names, waiter)):
            return self._results.wait_closed(timeout_s)
        try:
            waiter.result(timeout_s)
        except TimeoutError:
            waiter.cancel()
            return False
        except CancelledError:  # The agent ends.
            return self._results.wait_closed(timeout_s)
        return True

    # The consumer's side.

    def load(self, asked: LoadAsked) -> None:
        """Fetch a prompt's KV into the engine's blocks; `poll` tells once how it ended."""
        self._results.expect_report(asked.request)
        self._mailbox.post(lambda: self._control.load(asked))

    def cancel(self, request: str) -> None:
        """The engine no longer wants a load; its Report comes all the same."""
        self._mailbox.post(lambda: self._control.tell_inbox(LoadCancelled(request)))

    # Both.

    def poll(self) -> Outcomes:
        """What has ended since the last call; never blocks."""
        return self._results.drain()

    def probe(self, address: str, timeout_s: float) -> "Future[ProbeTold]":
        """Connect a producer and read a known pattern from it; failures are told in the result."""
        told: Future[ProbeTold] = Future()
        told.set_running_or_notify_cancel()
        if not self._mailbox.post(lambda: self._control.probe_into(told, address, timeout_s)):
            told.set_result(failed_probe(address, FailureKind.CLOSED, "the transfer agent has stopped"))
        return told

    def stats(self) -> AgentStats:
        return self._counters.stats(self._control.staging_used_bytes, self._staging.region)

    def drain(self) -> bool:
        """Wait until peers have fetched what was handed over to them; whether it came to that within a lease.

        An engine whose prefills are done frees their blocks as soon as they are staged, and knows of nothing
        that it should wait for.
        """
        deadline_s = time.monotonic() + self._lease_s
        while self._thread.is_alive() and self._control.offered_count:
            if time.monotonic() >= deadline_s:
                return False
            time.sleep(DRAIN_PAUSE_S)
        return True

    def close(self) -> None:
        """End everything; what was under way is reported as CLOSED. Within a few seconds, idempotent."""
        with self._lock:
            is_first, self._is_closed = not self._is_closed, True
        if self._thread.ident is None:
            if is_first:
                self._mailbox.close()
                self._loop.close()
                self._results.close()
        else:
            self._mailbox.post(self._stop.set)
            self._thread.join(CLOSE_S_MAX + WORK_END_S_MAX)
        for backend in self._backends.values():
            backend.close()

    # The control thread.

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(
                self._control.run(self._stop, lambda: self._started.set_result(None))
            )
        except BaseException as error:  # noqa: BLE001  # whatever it is, the engine must hear of it
            if self._started.done():
                _log.exception(_FAILED)
            else:
                self._started.set_exception(_only(error))
        finally:
            self._mailbox.close()
            if not self._workers.close(WORK_END_S_MAX):
                _log.error("a pack or unpack has not ended in %g s", WORK_END_S_MAX)
            self._results.close()
            self._end_tasks()
            self._loop.close()

    def _end_tasks(self) -> None:
        """Nothing is left by now but what asyncio itself began, such as a look-up of a name."""
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        if left:
            self._loop.run_until_complete(asyncio.wait(left, timeout=CLOSE_S_MAX))

    def _fail(self) -> None:
        """Called while a fault of ours is handled: everything under way fails, and nothing begins."""
        _log.exception(_FAILED)
        self._mailbox.close()
        self._stop.set()


def _only(error: BaseException) -> BaseException:
    """The one error inside groups of one."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
