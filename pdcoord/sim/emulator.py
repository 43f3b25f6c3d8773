"""Emulated engines as a process: started from a fleet file, stopped by a signal."""

import asyncio
import contextlib
import sys
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from random import Random
from typing import TextIO

import msgspec
import xxhash

from pdcoord.core.fleet import EngineKind
from pdcoord.policy.errors import PolicyError
from pdcoord.protocol.headers import HostPort, format_host_port
from pdcoord.sim.emulator_bytes import KvBytes, make_backend
from pdcoord.sim.emulator_door import Door
from pdcoord.sim.emulator_host import EngineHost
from pdcoord.sim.emulator_http import BODY_BYTES_MAX, Api
from pdcoord.sim.emulator_kv import KvEventForm, KvEventPublisher
from pdcoord.sim.emulator_side import SideChannel
from pdcoord.sim.emulator_state import state_of
from pdcoord.sim.faults import FaultKind, FaultsBody, FaultsBodyError, FaultSet, parse_faults
from pdcoord.sim.fleetfile import (
    EmulatedFleet,
    EngineSpec,
    Placement,
    PlacementError,
    load_fleet,
)
from pdcoord.sim.messages import LinkSlowed, ShutDown, StepsSlowed
from pdcoord.wire.asgi import ClientGoneError, Receive, Scope, Send, read_body, send_json
from pdcoord.wire.client import Client
from pdcoord.wire.errors import BodyTooLargeError
from pdcoord.wire.server import run as run_process
from pdcoord.wire.server import stop_on_signals
from transfer.backends.loopback import LoopbackNetwork
from transfer.errors import SettingError
from transfer.settings import read_key_file

_ADMIN_S_MAX = 5.0
_LAST_WORDS_S_MAX = 0.5
COMMAND = "pdcoord emulate"
START_FAILED = 2


class EmulatedEngine:
    """One engine through all its lives: a crash ends one, a restart begins the next.

    Attributes:
        api, side: what it listens on.
        started: set once it listens for the first time.
    """

    def __init__(
        self, spec: EngineSpec, fleet: EmulatedFleet, client: Client, network: LoopbackNetwork
    ) -> None:
        self.spec = spec
        self._settings = spec.settings(fleet.model, fleet.seed)
        self._side_channels = {
            format_host_port(each.told_host, each.kv_port): format_host_port(
                each.told_host, each.side_channel_port
            )
            for each in fleet.engines
            if each.kv_port is not None
        }
        self._seed = xxhash.xxh3_64_intdigest(spec.name.encode(), seed=fleet.seed)
        self._client = client
        self._network = network
        self.host = self._new_host(None)
        self.faults = self._new_faults()
        self.started = asyncio.Event()
        self._crashed = asyncio.Event()
        self._revived = asyncio.Event()
        self._fault_timer: asyncio.TimerHandle | None = None
        self._kv_ports = [spec.kv_events_port or 0, spec.kv_events_replay_port or 0]
        is_sglang = spec.engine is EngineKind.SGLANG
        side_port = (spec.bootstrap_port or 0) if is_sglang else spec.side_channel_port
        self.api = Door(Api(self), spec.host, spec.port)
        self.side = Door(SideChannel(lambda: self.host), spec.host, side_port)

    @property
    def is_alive(self) -> bool:
        return not self.host.is_over

    @property
    def address(self) -> HostPort:
        """Where the API is, once it has started."""
        return format_host_port(self.spec.told_host, self.api.port)

    def _new_faults(self) -> FaultSet:
        return FaultSet(Random(self._seed))  # noqa: S311  # emulated failures, not secrets

    def _new_host(self, publisher: KvEventPublisher | None, kv: KvBytes | None = None) -> EngineHost:
        """A host with an engine id that no earlier start had."""
        return EngineHost(
            self._settings,
            f"{self.spec.name}-{uuid.uuid4()}",
            seed=self._seed,
            side_address=format_host_port(self.spec.told_host, self.spec.side_channel_port),
            client=self._client,
            publisher=publisher,
            kv=kv,
            side_channels=self._side_channels,
        )

    async def run(self) -> None:
        """Live, and after each crash live again, until cancelled.

        Raises:
            OSError: if a port cannot be listened on.
        """
        try:
            while True:
                await self._live()
                await self._lie_dead()
        finally:
            self._set_fault_timer(None)

    async def _live(self) -> None:
        """From start to crash."""
        self._crashed.clear()
        self._revived.clear()
        async with AsyncExitStack() as stack:
            publisher = await self._publisher(stack)
            self.host = self._new_host(publisher, await self._kv(stack))
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self.host.run())]
                await self.host.running.wait()
                tasks.append(group.create_task(self.side.run()))
                await self.side.opened.wait()
                self.host.side_address = format_host_port(self.spec.told_host, self.side.port)
                tasks.append(group.create_task(self.api.run()))
                await self.api.opened.wait()
                if publisher is not None and self.spec.kv_events_topic is None:
                    publisher.topic = f"kv@{self.address}@{self._settings.model}"
                self.started.set()
                try:
                    await self._crashed.wait()
                finally:
                    self.host.end()
                    for task in tasks:
                        task.cancel()

    async def _lie_dead(self) -> None:
        """From crash to restart."""
        crash = self.faults.active(FaultKind.CRASH, self.host.now_s)
        wait_s = None if crash is None else crash.restart_after_s
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._revived.wait()
        # A new process knows nothing of the failures of the old one.
        self.faults = self._new_faults()
        self._set_fault_timer(None)
        self.api.open()

    async def _publisher(self, stack: AsyncExitStack) -> KvEventPublisher | None:
        spec = self.spec
        if spec.kv_events_port is None:
            return None
        form = KvEventForm(is_map=spec.kv_events_form == "map", has_int_hashes=spec.kv_events_hash == "int")
        publisher = KvEventPublisher(
            spec.host,
            self._kv_ports[0],
            topic=spec.kv_events_topic or "",
            form=form,
            replay_port=None if spec.kv_events_replay_port is None else self._kv_ports[1],
        )
        await stack.enter_async_context(publisher)
        # The next life has the same ports, whoever picked them.
        self._kv_ports = [
            int((address or "0").rpartition(":")[2])
            for address in (publisher.address, publisher.replay_address)
        ]
        return publisher

    async def _kv(self, stack: AsyncExitStack) -> KvBytes | None:
        spec = self.spec
        if spec.kv_port is None:
            return None
        address = f"{spec.host}:{spec.kv_port}"
        backend = make_backend(spec.kv_backend, spec.host, self._network, spec.told_host)
        kv = KvBytes(
            self._settings,
            f"{spec.name}-{uuid.uuid4()}",
            address,
            backend,
            advertise_host=spec.told_host,
            key=read_key_file(spec.kv_key_file) if spec.kv_key_file else b"",
        )
        stack.push_async_callback(kv.close)
        await kv.start()
        return kv

    async def drain(self) -> None:
        """What vLLM 0.32 does on SIGTERM before it drops everything: wait for what runs, up to its timeout.

        Meanwhile the API goes on: it is healthy, and answers new calls with finish reason abort.
        """
        drain_s = self.spec.shutdown_timeout_s
        if not drain_s or not self.is_alive:
            return
        self.host.post(ShutDown())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                await self.host.drained.wait()
                # What the engine said last has yet to reach its clients.
                await self.api.wait_until_idle(_LAST_WORDS_S_MAX)

    # Failures.

    def set_faults(self, body: FaultsBody) -> None:
        """Put these failures in place of all there were, at once; a dead engine without a crash revives."""
        now_s = self.host.now_s
        self.faults.replace(body, now_s)
        if not self.is_alive:
            if self.faults.active(FaultKind.CRASH, now_s) is None:
                self._revived.set()
            return
        self._apply_lasting()
        if self.faults.active(FaultKind.CRASH, now_s) is not None:
            # After the answer to this call has left.
            asyncio.get_running_loop().call_later(0.05, self._crash)

    def _crash(self) -> None:
        self._crashed.set()

    def _apply_lasting(self) -> None:
        """Bring what lasts to what the failures say now; again when the next one ends."""
        now_s = self.host.now_s
        if self.faults.active(FaultKind.REFUSE, now_s) is None:
            self.api.open()
        else:
            self.api.shut()
        self.host.post(LinkSlowed(self.faults.factor(FaultKind.SLOW_LINK, now_s)))
        self.host.post(StepsSlowed(self.faults.factor(FaultKind.SLOW, now_s)))
        metrics = self.host.metrics
        metrics.shows_idle = self.faults.active(FaultKind.LYING_METRICS, now_s) is not None
        metrics.freeze(is_frozen=self.faults.active(FaultKind.STALE_METRICS, now_s) is not None)
        self._set_fault_timer(self.faults.next_end_s(now_s))

    def _set_fault_timer(self, at_s: float | None) -> None:
        if self._fault_timer is not None:
            self._fault_timer.cancel()
            self._fault_timer = None
        if at_s is not None:
            self._fault_timer = asyncio.get_running_loop().call_at(at_s, self._apply_lasting)


class AdminApp:
    """Failures and state of every engine of the process, in life and death.

    GET /emulator lists engines; GET and POST /emulator/NAME/faults, GET /emulator/NAME/state.
    """

    def __init__(self, engines: Sequence[EmulatedEngine]) -> None:
        self._engines = {engine.spec.name: engine for engine in engines}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, parts = scope["method"], scope["path"].strip("/").split("/")
        match method, parts:
            case "GET", ["emulator"]:
                await send_json(send, 200, self._listing())
            case "GET" | "POST", ["emulator", name, "faults"] if name in self._engines:
                await self._on_faults(self._engines[name], method, receive, send)
            case "GET", ["emulator", name, "state"] if name in self._engines:
                await send_json(send, 200, state_of(self._engines[name].host))
            case _:
                await send_json(send, 404, msgspec.json.encode({"error": {"message": "Not Found"}}))

    def _listing(self) -> bytes:
        engines = [
            {
                "name": name,
                "address": engine.address,
                "side_channel": engine.host.side_address,
                "is_alive": engine.is_alive,
            }
            for name, engine in self._engines.items()
        ]
        return msgspec.json.encode({"engines": engines})

    @staticmethod
    async def _on_faults(engine: EmulatedEngine, method: str, receive: Receive, send: Send) -> None:
        if method == "POST":
            try:
                raw = await read_body(receive, bytes_max=BODY_BYTES_MAX, timeout_s=_ADMIN_S_MAX)
                engine.set_faults(parse_faults(raw))
            except ClientGoneError:
                return
            except (FaultsBodyError, BodyTooLargeError) as error:
                await send_json(send, 400, msgspec.json.encode({"error": {"message": str(error)}}))
                return
        state = engine.faults.state(engine.host.now_s)
        await send_json(send, 200, msgspec.json.encode({"faults": state}))


@asynccontextmanager
async def running(
    fleet: EmulatedFleet, specs: Sequence[EngineSpec]
) -> AsyncIterator[tuple[list[EmulatedEngine], Door | None]]:
    """Run engines, and the admin listener if the fleet has one, while the block runs.

    Raises:
        OSError: inside an exception group, if a port cannot be listened on.
    """
    async with Client() as client, asyncio.TaskGroup() as group:
        network = LoopbackNetwork()
        engines = [EmulatedEngine(spec, fleet, client, network) for spec in specs]
        admin = None
        if fleet.admin is not None:
            admin = Door(AdminApp(engines), fleet.admin.host, fleet.admin.port)
        tasks = [group.create_task(each.run()) for each in engines]
        if admin is not None:
            tasks.append(group.create_task(admin.run()))
        try:
            for engine in engines:
                await engine.started.wait()
            if admin is not None:
                await admin.opened.wait()
            yield engines, admin
        finally:
            for task in tasks:
                task.cancel()


def run(
    fleet_path: Path, engine_names: list[str], placement: Placement | None = None, out: TextIO | None = None
) -> int:
    """Run the engines of a fleet file, all or those named, until SIGTERM; the exit status, 2 if not started.

    Args:
        placement: where the one engine that is named runs, in place of what the file says.
    """
    stream = sys.stdout if out is None else out
    try:
        loaded = load_fleet(fleet_path)
        specs = (placement or Placement()).of(loaded.chosen(engine_names))
    except (PolicyError, PlacementError) as error:
        return _not_started([error])
    return run_engines(loaded.fleet, specs, stream)


def run_engines(
    fleet: EmulatedFleet, specs: Sequence[EngineSpec], stream: TextIO, command: str = COMMAND
) -> int:
    """Run engines until SIGTERM; the exit status, 2 if they could not be started."""
    try:
        for path in {spec.kv_key_file for spec in specs} - {None, ""}:
            read_key_file(str(path))
    except SettingError as error:
        return _not_started([error], command)
    return run_process(_main(fleet, specs, stream, command))


async def _main(fleet: EmulatedFleet, specs: Sequence[EngineSpec], stream: TextIO, command: str) -> int:
    stop = stop_on_signals()
    try:
        async with running(fleet, specs) as (engines, admin):
            stream.writelines(_ready_line(engine) for engine in engines)
            if admin is not None:
                stream.write(f"admin ready http://{format_host_port(admin.host, admin.port)}/emulator\n")
            stream.flush()
            await stop.wait()
            async with asyncio.TaskGroup() as group:
                for engine in engines:
                    group.create_task(engine.drain())
    except* OSError as errors:
        return_code = _not_started(_leaves(errors), command)
    else:
        return_code = 0
    return return_code


def _not_started(errors: Sequence[Exception], command: str = COMMAND) -> int:
    for error in errors:
        sys.stderr.write(f"{command}: not started: {error}\n")
    return START_FAILED


def _leaves(group: BaseExceptionGroup[OSError]) -> list[OSError]:
    found: list[OSError] = []
    for each in group.exceptions:
        found += _leaves(each) if isinstance(each, BaseExceptionGroup) else [each]
    return found


def _ready_line(engine: EmulatedEngine) -> str:
    spec = engine.spec
    parts = [
        f"{spec.name} ready http://{engine.address}",
        f"profile={spec.profile}",
        f"engine={spec.engine}",
        f"role={spec.role}",
        f"connector={spec.connector_kind}",
        f"side_channel={engine.host.side_address}",
    ]
    if engine.host.publisher is not None:
        parts.append(f"kv_events={engine.host.publisher.address}")
    return " ".join(parts) + "\n"
