"""A coordinator process: the core with its clock, its files and feeds, and a front before it."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Protocol

from structlog.typing import FilteringBoundLogger

from pdcoord.core.coordinator import Coordinator
from pdcoord.feeds.canary import CanaryFeed
from pdcoord.feeds.declared import DeclaredFeed, Reload, Source
from pdcoord.feeds.kvevents import KvEventsFeed
from pdcoord.feeds.metrics import MetricsFeed
from pdcoord.feeds.paths import PathsFeed
from pdcoord.feeds.tokens import TokenHooks, TokensFeed
from pdcoord.front.gate import Gate
from pdcoord.front.ports import Tokens
from pdcoord.gateway.admin import make_admin_app
from pdcoord.gateway.admin_guard import guarded
from pdcoord.policy.errors import PolicyError
from pdcoord.runtime.access import Access
from pdcoord.runtime.canaries import CanaryRecord
from pdcoord.runtime.control import make_control, replica_name
from pdcoord.runtime.decisions import DecisionLog
from pdcoord.runtime.logs import configure_logs
from pdcoord.runtime.loop import CoordinatorLoop
from pdcoord.runtime.observe import Metrics
from pdcoord.runtime.prefix_state import kv_events_samples
from pdcoord.runtime.process_metrics import task_samples
from pdcoord.runtime.secured import SecretError, Secured
from pdcoord.runtime.settings import CoordinatorSettings
from pdcoord.runtime.sources import Sources
from pdcoord.runtime.startup import StartError, check_start, doubts
from pdcoord.wire.asgi import App
from pdcoord.wire.client import Client, Headers
from pdcoord.wire.server import Listener, run, stop_on_signals
from pdcoord.wire.server import serve as serve_listeners
from pdcoord.wire.tls import ServerTls
from pdcoord.wire.tracing import Tracing, TracingError, start_tracing

START_FAILED = 2
ADMIN_CLOSE_S = 1.0
"""For answers of the admin listener that are under way when all else has ended."""
PUSH_PAUSE_S = 0.02
"""A rolling update changes many pods at once; matching thousands of them for each is not needed."""


@dataclass(frozen=True, slots=True)
class Backstage:
    """What a front works with."""

    loop: CoordinatorLoop
    client: Client
    tokens: Tokens
    metrics: Metrics
    log: FilteringBoundLogger
    secured: Secured
    gate: Gate
    tracing: Tracing | None = None


class Front(Protocol):
    """How calls come to a coordinator process: the gateway's HTTP, or Envoy's ext_proc.

    Attributes:
        command: what started it, for messages on stderr.
    """

    command: str

    def listeners(self, stage: Backstage) -> Sequence[Listener]:
        """HTTP apps, served beside the admin listener and drained with it."""
        ...

    def services(self, stage: Backstage) -> Sequence[AbstractAsyncContextManager[object]]:
        """What else serves: it listens once entered, and has drained when left.

        Entering one raises OSError if its address cannot be listened on.
        """
        ...

    def addresses(self, ports: Sequence[int]) -> dict[str, str]:
        """Where it serves, for the log; `ports` are those of its listeners, in order."""
        ...


def url_of(tls: ServerTls | None, host: str, port: int) -> str:
    """Where a listener is reached, for the log."""
    return f"{'http' if tls is None else 'https'}://{host}:{port}"


def run_process(settings: CoordinatorSettings, front: Front) -> int:
    """Run a process until SIGTERM or SIGINT; the exit status: 0 stopped as asked, 2 not started."""
    log = configure_logs(settings.log_level)
    try:
        check_start(settings)
        process = Process(settings, front, log)
        process.access.load_first()
        process.files.load_first()
    except (PolicyError, StartError, SecretError) as error:
        sys.stderr.write(f"{front.command}: not started: {error}\n")
        return START_FAILED
    for doubt in doubts(settings, process.files, os.environ):
        log.warning("settings.doubtful", doubt=doubt)
    return run(process.run())


class Process:
    """The parts of one coordinator process and how they hang together.

    Attributes:
        coordinator: the only state that decides anything.
        files: what the policy and endpoints sources declare; `load_first` comes before `run`.
        access: who is let in; its `load_first` does too.
        ports: of the front's listeners and, last, the admin listener, once they listen.
    """

    def __init__(self, settings: CoordinatorSettings, front: Front, log: FilteringBoundLogger) -> None:
        self._settings = settings
        self._front = front
        self._log = log
        self._metrics = Metrics()
        self._tracing: Tracing | None = None
        replica = replica_name(settings)
        self.coordinator = Coordinator(replica=replica, has_canaries=True)
        self.loop = CoordinatorLoop(
            self.coordinator,
            clock=time.monotonic,
            decisions=DecisionLog(settings.decisions_max),
            metrics=self._metrics,
        )
        self.loop.is_starting = True
        self._sources = Sources(settings, self._metrics, log)
        self.files = DeclaredFeed(self.loop, self._sources.policies, self._sources.endpoints)
        self.loop.files = self.files
        self._canaries = CanaryRecord(self.coordinator.canaries, time.monotonic, log)
        self._metrics.read_state_from(self._canaries.samples)
        self._kv_events = KvEventsFeed(self.loop, self.loop.precise_endpoints, time.monotonic)
        self._metrics.read_state_from(lambda: kv_events_samples(self._kv_events))
        self.control = make_control(settings, self.coordinator, self.loop, replica=replica, log=log)
        self._metrics.read_state_from(self.control.samples)
        self.secured = Secured(settings, log)
        self.secured.watch("control", self.control.certificate_validity)
        self._metrics.read_state_from(self.secured.samples)
        self._metrics.read_state_from(task_samples)
        self.access = Access(settings, log)
        self._metrics.read_state_from(self.access.samples)
        self.ports: list[int] = []
        self._warned: list[str] | None = None

    async def run(
        self, stop: asyncio.Event | None = None, on_started: Callable[[], None] | None = None
    ) -> int:
        """Serve until `stop` is set; by default the first SIGTERM or SIGINT sets it."""
        stop = stop if stop is not None else stop_on_signals()
        look_now = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, look_now.set)
        failure: OSError | TracingError | None
        try:
            self._tracing = start_tracing(
                os.environ,
                self._front.command.replace(" ", "-"),
                version=version("pdcoord"),
                count=self._metrics.count_spans,
                log=self._log,
            )
            connect_timeout_s = self._settings.connect_timeout_s
            async with Client(connect_timeout_s=connect_timeout_s, tls=self.secured.upstream) as client:
                failure = await self._run_parts(client, stop, look_now, on_started)
        except TracingError as error:
            failure = error
        finally:
            if self._tracing is not None:
                await asyncio.to_thread(self._tracing.close)
            asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)
        if failure is not None:
            sys.stderr.write(f"{self._front.command}: not started: {failure}\n")
            return START_FAILED
        self._log.info("process.stopped")
        return 0

    async def _run_parts(
        self,
        client: Client,
        stop: asyncio.Event,
        look_now: asyncio.Event,
        on_started: Callable[[], None] | None,
    ) -> OSError | None:
        """Run everything until `stop`; why the listeners could not be opened, if they could not."""
        settings = self._settings
        failure: OSError | None = None

        def started(ports: list[int]) -> None:
            self.ports = ports
            self.loop.is_starting = False
            self._log.info(
                "process.started",
                **self._front.addresses(ports[:-1]),
                control_port=self.control.port,
                admin_url=url_of(self.secured.admin, settings.admin_host, ports[-1]),
                models=[model.name for model in self.coordinator.models()],
                warnings=[str(problem) for problem in self.files.warnings],
            )
            if on_started is not None:
                on_started()

        closing, over = asyncio.Event(), asyncio.Event()
        admin_port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        tokens_feed = self._tokens_feed(client)
        stage = self._stage(client, tokens_feed)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._serve_admin(over, admin_port))
            background = [
                *(group.create_task(feed.run()) for feed in (*self._feeds(client), tokens_feed)),
                *(group.create_task(part) for part in self._parts(look_now)),
                group.create_task(self._await_stop(stop, closing)),
            ]
            try:
                async with AsyncExitStack() as services:
                    own_port = await admin_port
                    for service in (*self.control.services(), *self._front.services(stage)):
                        await services.enter_async_context(service)
                    await serve_listeners(
                        self._front.listeners(stage),
                        stop=closing,
                        drain_s=settings.drain_s,
                        on_started=lambda ports: started([*ports, own_port]),
                    )
            except OSError as error:
                failure = error
            finally:
                over.set()
                for task in background:
                    task.cancel()
        return failure

    def _tokens_feed(self, client: Client) -> TokensFeed:
        return TokensFeed(
            models=self.loop.models,
            ready=self.loop.ready_endpoints,
            client=client,
            clock=time.monotonic,
            limits=self._settings.token_limits(),
            hooks=TokenHooks(self._metrics.tokenized, self._tokenizer_failed),
        )

    def _stage(self, client: Client, tokens: Tokens) -> Backstage:
        return Backstage(
            self.loop,
            client,
            tokens,
            self._metrics,
            self._log,
            self.secured,
            self.access.gate,
            self._tracing,
        )

    async def _serve_admin(self, over: asyncio.Event, port: "asyncio.Future[int]") -> None:
        """Serve what tells of this process: up before anything else is, and down after all has drained.

        Args:
            port: gets where it listens, or why it cannot.
        """
        settings = self._settings
        admin = Listener(self._admin_app(), settings.admin_host, settings.admin_port, self.secured.admin)
        try:
            await serve_listeners(
                [admin], stop=over, drain_s=ADMIN_CLOSE_S, on_started=lambda ports: port.set_result(ports[0])
            )
        except OSError as error:
            port.set_exception(error)

    def _admin_app(self) -> App:
        app = make_admin_app(self.loop)
        return guarded(app, lambda: self.access.admin_key, self.access.admin_refused)

    def _parts(self, look_now: asyncio.Event) -> Sequence[Coroutine[None, None, None]]:
        """What else runs beside the listeners."""
        return (
            self._follow_files(look_now),
            self._sources.run(),
            self._follow_pushes(),
            self.loop.alarm.run(),
            self.control.run(),
            self.secured.run(),
        )

    def _feeds(self, client: Client) -> tuple[MetricsFeed, PathsFeed, KvEventsFeed, CanaryFeed]:
        """Those whose signals go to the core."""
        keys = self.secured.plan_keys
        settings, loop = self._settings, self.loop
        return (
            MetricsFeed(loop, loop.endpoints, client, time.monotonic, settings.scrape_limits()),
            PathsFeed(
                loop,
                loop.endpoints,
                client,
                time.monotonic,
                settings.paths_limits(),
                loop.report_failed,
                self.control.tells_paths,
            ),
            self._kv_events,
            CanaryFeed(
                loop,
                loop.due_canaries,
                client,
                self._canaries.told,
                sign=None if keys is None else keys.headers,
                authorization=self._engine_headers,
            ),
        )

    def _engine_headers(self) -> Headers:
        """What engines ask of pdcoord's own requests."""
        key = self.access.gate.engine_key
        return [] if key is None else [(b"authorization", b"Bearer " + key)]

    async def _await_stop(self, stop: asyncio.Event, closing: asyncio.Event) -> None:
        await stop.wait()
        self.loop.is_draining = True
        self._log.info("process.draining", in_flight=self.coordinator.live_count)
        await asyncio.sleep(self._settings.drain_notice_s)
        closing.set()

    async def _follow_files(self, look_now: asyncio.Event) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.reload_interval_s):
                    await look_now.wait()
            # A change counts when two looks find it; on SIGHUP the writer says that it is done.
            looks = 2 if look_now.is_set() else 1
            look_now.clear()
            for _ in range(looks):
                await self.access.poll()
                for reload in await self.files.poll():
                    self._report(reload)

    async def _follow_pushes(self) -> None:
        """Apply what the API server tells, what came together at one time."""
        while True:
            await self._sources.pushed.wait()
            await asyncio.sleep(PUSH_PAUSE_S)
            for reload in await self.files.poll(self._sources.take_changed()):
                self._report(reload)

    def _tokenizer_failed(self, file: str, why: str) -> None:
        self._log.error("tokenizer.refused", file=file, why=why)

    def _report(self, reload: Reload) -> None:
        self._metrics.count_reload(reload)
        if reload.is_accepted:
            warnings = [str(problem) for problem in reload.warnings]
            # Pods come and go all day; what is worth a line is what somebody should change.
            is_pods = reload.source is Source.ENDPOINTS and self._sources.has_pods
            is_news = not is_pods or self._warned != warnings
            if is_pods:
                self._warned = warnings
            tell = self._log.info if is_news else self._log.debug
            tell("policy.accepted", source=reload.source, warnings=warnings)
        else:
            problems = [str(problem) for problem in reload.problems]
            self._log.error("policy.refused", source=reload.source, problems=problems)
