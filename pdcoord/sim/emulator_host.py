"""One emulated engine in real time: the model, its clock, and whoever waits for what it does."""

import asyncio
import datetime as dt
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from random import Random
from typing import Any, Generic, TypeVar

from pdcoord.protocol.headers import HostPort
from pdcoord.sim.emulator_bytes import Arrival, KvBytes
from pdcoord.sim.emulator_kv import KvEventPublisher
from pdcoord.sim.emulator_metrics import EngineMetrics
from pdcoord.sim.emulator_peers import Peers
from pdcoord.sim.engine import EngineModel
from pdcoord.sim.messages import (
    Abort,
    AskHandshake,
    AskPull,
    ClosePull,
    DenyPull,
    EngineEffect,
    EngineEvent,
    EngineRequest,
    GrantPull,
    KvChanged,
    KvTicket,
    Rejected,
    RemoteTicket,
    RequestDone,
    RequestFailed,
    SendHeartbeat,
    SendRelease,
    Submit,
    TellShare,
    Tick,
    TokenOut,
    TransferDone,
)
from pdcoord.sim.settings import EngineSettings
from pdcoord.wire.client import Client

Answer = TokenOut | RequestDone | RequestFailed
ProducerWord = GrantPull | TellShare | DenyPull | None
"""What a producer tells along a pull; None once the pull is over."""

T = TypeVar("T")


class Mailbox(Generic[T]):
    """What is said to one reader, in order; bounded by what its sender can have to say."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: T) -> None:
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def peek(self) -> T | None:
        """What `get` would return at once."""
        return self._items[0] if self._items else None

    async def get(self, *, timeout_s: float) -> T:
        """The next item.

        Raises:
            TimeoutError: if none comes in time.
        """
        if not self._items:
            async with asyncio.timeout(timeout_s):
                while not self._items:
                    self._waiter = asyncio.get_running_loop().create_future()
                    await self._waiter
        return self._items.popleft()


class EngineHost:
    """An engine from its start to its end; a crashed one is followed by another host.

    Attributes:
        running: set once requests may be submitted.
        drained: set once a shutdown has nothing to wait for.
        publisher: of KV events, if the engine has one.
        side_address: where consumers find the side channel, as tickets say it.
    """

    def __init__(
        self,
        settings: EngineSettings,
        engine_id: str,
        *,
        seed: int,
        side_address: HostPort,
        client: Client,
        publisher: KvEventPublisher | None = None,
        kv: KvBytes | None = None,
        side_channels: Mapping[HostPort, HostPort] | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.model = EngineModel(settings, Random(seed), engine_id, self._loop.time())  # noqa: S311  # jitter
        self.metrics = EngineMetrics(self.model)
        self.side_address = side_address
        self._wall_s = dt.datetime.now(tz=dt.UTC).timestamp() - self._loop.time()
        self.publisher = publisher
        self._answers: dict[str, Mailbox[Answer]] = {}
        self._refusal: Rejected | None = None
        self._words: dict[str, Mailbox[ProducerWord]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at_s: float | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self._running: set[asyncio.Task[None]] = set()
        self._over = asyncio.Event()
        self.running = asyncio.Event()
        self.drained = asyncio.Event()
        self._kv = kv
        self._side_channels = side_channels or {}
        self._prompts: dict[str, tuple[tuple[int, ...], KvTicket | None]] = {}
        self._peers = Peers(
            client,
            self.post,
            self._spawn,
            self.model.counters,
            patience_s=settings.pull_s_max + 60.0,
            admit=self._fetch_bytes,
        )

    @property
    def now_s(self) -> float:
        return self._loop.time()

    @property
    def is_over(self) -> bool:
        return self._over.is_set()

    def wall_s(self, at_s: float) -> float:
        """The model's time as seconds since 1970."""
        return at_s + self._wall_s

    async def run(self) -> None:
        """Live until `end` is called or this is cancelled."""
        async with asyncio.TaskGroup() as self._tasks:
            self.running.set()
            if self.publisher is not None:
                self._spawn(self.publisher.serve_replay())
            try:
                await self._over.wait()
            finally:
                self.end()
                for task in list(self._running):
                    task.cancel()

    def end(self) -> None:
        """Die: nothing is handled any more, whoever waits is left alone."""
        self._over.set()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        assert self._tasks is not None, "the host does not run"
        task = self._tasks.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    # Requests.

    def submit(self, request: EngineRequest, mailbox: Mailbox[Answer]) -> Rejected | None:
        """Hand a request to the engine; it ends with anything but a TokenOut in the mailbox.

        Returns:
            The refusal of an engine that does not take it; then nothing comes into the mailbox.
        """
        self._answers[request.id] = mailbox
        if self._kv is not None and request.has_bytes:
            self._prompts[request.id] = (request.prompt, request.kv)
        self._refusal = None
        self.metrics.arrived(request.id, self.now_s)
        self.post(Submit(request))
        return self._refusal

    def abort(self, request_id: str) -> None:
        """Nobody reads this mailbox any more; a request that has ended is passed over."""
        self._prompts.pop(request_id, None)
        if self._answers.pop(request_id, None) is not None:
            self.metrics.left(request_id)
            self.post(Abort(request_id))

    # Real bytes, where there are any.

    def meant(self, ticket: RemoteTicket | None) -> RemoteTicket | None:
        """A ticket that names a transfer agent, with the side channel of that engine in its place."""
        if ticket is None or ticket.address not in self._side_channels:
            return ticket
        return replace(ticket, address=self._side_channels[ticket.address])

    def kv_member(self, request_id: str) -> dict[str, Any]:
        """What a prefill leg's answer says of its bytes."""
        member = None if self._kv is None else self._kv.ticket(request_id)
        return {} if member is None else {"pdcoord": member}

    def arrival(self, request_id: str) -> Arrival | None:
        return None if self._kv is None else self._kv.arrivals.get(request_id)

    def kv_state(self) -> dict[str, Any] | None:
        """What became of real KV here; None of an engine that has none."""
        return None if self._kv is None else self._kv.state()

    def _stage_bytes(self, effect: Answer) -> None:
        """If a prefill leg has ended, put its prompt's KV where its consumer can fetch it."""
        if isinstance(effect, TokenOut) or effect.request_id not in self._prompts:
            return
        prompt, asked = self._prompts.pop(effect.request_id)
        leases = (lease for lease in self.model.producer.leases() if lease.request_id == effect.request_id)
        lease = next(leases, None)
        if self._kv is not None and lease is not None:
            self._kv.offer(effect.request_id, asked, prompt, lease.blocks)

    async def _fetch_bytes(self, pull_id: str) -> bool:
        fetch = next((each for each in self.model.consumer.fetches() if each.pull_id == pull_id), None)
        ticket = None if fetch is None else fetch.live.request.ticket
        if self._kv is None or fetch is None or ticket is None or ticket.kv is None:
            return True
        live = fetch.live
        prompt = live.request.prompt[: ticket.token_count]
        failure = await self._kv.fetch(
            live.id, ticket.kv, prompt, live.blocks, len(prompt) - fetch.missing_tokens
        )
        return failure is None

    # Pulls that consumers opened here.

    def open_words(self, pull_id: str) -> Mailbox[ProducerWord]:
        """Where the producer's words for a pull arrive.

        Raises:
            ValueError: if the pull is open already.
        """
        if pull_id in self._words:
            raise ValueError(f"pull {pull_id} is open already")
        mailbox = self._words[pull_id] = Mailbox()
        return mailbox

    def close_words(self, pull_id: str) -> None:
        mailbox = self._words.pop(pull_id, None)
        if mailbox is not None:
            mailbox.put(None)

    # The model.

    def post(self, event: EngineEvent) -> None:
        """Tell the engine something; a dead one hears nothing."""
        if self.is_over:
            return
        for effect in self.model.handle(event, self.now_s):
            self.metrics.observe(effect)
            self._do(effect)
        if self.model.is_drained:
            self.drained.set()
        self._arm()

    def _arm(self) -> None:
        at_s = self.model.next_event_s()
        if self._timer is not None:
            if self._timer_at_s == at_s:
                return
            self._timer.cancel()
            self._timer = None
        self._timer_at_s = at_s
        if at_s is not None:
            # uvloop hands out no TimerHandle for a time that is past, so the time is kept beside it.
            self._timer = self._loop.call_at(at_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.post(Tick())

    def _do(self, effect: EngineEffect) -> None:
        match effect:
            case TokenOut() | RequestDone() | RequestFailed():
                self._stage_bytes(effect)
                self._answer(effect)
            case Rejected():
                # Of the request that is being submitted: the engine refuses at once or never.
                self._refusal = effect
                self._prompts.pop(effect.request_id, None)
                del self._answers[effect.request_id]
                self.metrics.left(effect.request_id)
            case KvChanged():
                if self.publisher is not None:
                    self.publisher.publish(effect.events, self.wall_s(effect.at_s))
            case GrantPull() | TellShare() | DenyPull():
                mailbox = self._words.get(effect.pull_id)
                if mailbox is not None:
                    mailbox.put(effect)
            case AskHandshake() | AskPull() | ClosePull() | SendHeartbeat() | SendRelease():
                self._peers.do(effect)
            case TransferDone():
                pass  # The metrics have seen it.

    def _answer(self, effect: Answer) -> None:
        mailbox = self._answers.get(effect.request_id)
        if mailbox is None:
            return
        if not isinstance(effect, TokenOut):
            del self._answers[effect.request_id]
            self.metrics.left(effect.request_id)
        mailbox.put(effect)


HostOf = Callable[[], EngineHost]
"""The host that lives now; an app outlives a crash."""
