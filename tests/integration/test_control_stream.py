"""The control stream over real gRPC: who may come in, who is believed, and what a slow or old peer costs."""

import asyncio
import contextlib
import datetime as dt
import ipaddress
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pdcoord.core.coordinator import Coordinator
from pdcoord.core.costs import SpeedFigures
from pdcoord.core.events import Action, Event, PathProbed, SidecarLost, SidecarReported
from pdcoord.core.fleet import (
    Endpoint,
    EndpointId,
    EndpointSeen,
    EngineKind,
    ModelName,
    Pool,
    PoolName,
    Role,
)
from pdcoord.core.request import RequestId
from pdcoord.core.targets import TargetLists
from pdcoord.feeds import reports
from pdcoord.feeds.reports import ReportsFeed
from pdcoord.feeds.reports_server import ControlServer, ControlSettings
from pdcoord.protocol.control import (
    CONTROL_VERSION,
    METHOD,
    CoordinatorHello,
    Events,
    RequestBegan,
    RequestEnded,
    SidecarHello,
    SidecarProof,
    Snapshot,
    Targets,
)
from pdcoord.protocol.control_codec import decode_report, encode_notice, encode_report
from pdcoord.protocol.errors import RungReason
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.paths import PathReport, PathsReport
from pdcoord.protocol.plans import DialectName, PlannedLoad
from pdcoord.wire.pem import read_validity
from sidecar.guard import Allowlist
from sidecar.observe import Metrics
from sidecar.report_link import Credentials
from sidecar.reporter import Reporter, ReporterSettings
from sidecar.vocabulary import Order
from transfer.layout import KvLayout
from transfer.verdict import Connector, Side

WAIT_S = 30.0
KEY, OTHER_KEY = "k" * 32, "o" * 32
SIDECAR = HostPort("127.0.0.1:18000")
PREFILL = HostPort("127.0.0.1:18001")
ORDER = Order(dialect=DialectName.NIXLV2, engine=HostPort("127.0.0.1:1"))


def endpoint(name: str, role: Role, address: HostPort) -> Endpoint:
    pool = Pool(
        name=PoolName(role),
        model=ModelName("m"),
        role=role,
        vendor="v",
        engine=EngineKind.VLLM,
        side=Side(Connector.PDCOORD, KvLayout(16)),
        speed=SpeedFigures(0.01, 1e-4, 0.01),
        kv_bytes_per_token=1_000,
        link_bytes_per_s=1e10,
    )
    return Endpoint(EndpointId(name), pool, address)


class Replica:
    """A coordinator behind a control server, and what it was told."""

    def __init__(self) -> None:
        self.coordinator = Coordinator(replica="a/1")
        self.events: list[Event] = []
        self.feed = ReportsFeed(
            self,
            TargetLists(self.coordinator.fleet, self.coordinator.paths),
            at=lambda address: [state.endpoint for state in self.coordinator.fleet.at(address)],
            replica="a/1",
            clock=time.monotonic,
            log=structlog.get_logger(),
        )
        self.server: ControlServer | None = None
        for each in (endpoint("d", Role.DECODE, SIDECAR), endpoint("p", Role.PREFILL, PREFILL)):
            self.handle(EndpointSeen(each))

    def handle(self, event: Event) -> list[Action]:
        self.events.append(event)
        actions = self.coordinator.handle(event, time.monotonic())
        self.coordinator.validate()
        return actions

    @property
    def refused(self) -> dict[str, int]:
        assert self.server is not None
        return dict(self.server.refused)

    @property
    def address(self) -> HostPort:
        assert self.server is not None
        return HostPort(f"127.0.0.1:{self.server.port}")

    @asynccontextmanager
    async def serving(self, **settings: Any) -> AsyncIterator[None]:
        given = {"host": "127.0.0.1", "port": 0, "replica": "a/1"} | settings
        self.server = ControlServer(ControlSettings(**given), self.feed, structlog.get_logger())
        async with self.server, asyncio.TaskGroup() as group:
            looking = group.create_task(self.feed.run())
            yield
            looking.cancel()


class Told:
    """The sidecar's side, with its metrics."""

    def __init__(
        self,
        *coordinators: HostPort,
        key: bytes = b"",
        paths: Callable[[], PathsReport] | None = None,
        **files: Path,
    ) -> None:
        self.metrics = Metrics()
        self.reporter = Reporter(
            ReporterSettings(coordinators, "pod", SIDECAR, Credentials(key, **files)),
            metrics=self.metrics,
            rng=random.Random(1),
            now_s=time.monotonic,
            paths=paths,
        )
        self.reporter.listening(18_000)

    def value(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"pdcoord_sidecar_{name}", labels) or 0.0

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Told"]:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self.reporter.run())
            yield self
            task.cancel()


async def until(is_so: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not is_so():
            await asyncio.sleep(0.01)


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    path.chmod(0o600)
    return path


async def test_requests_and_probes_are_told_and_targets_come_back(tmp_path: Path) -> None:
    key = write(tmp_path / "key", KEY)
    replica = Replica()
    probed = PathsReport(
        interval_s=30.0,
        is_agent_up=True,
        paths=(PathReport(target=PREFILL, kv_address=PREFILL, probe_count=1, age_s=0.5),),
    )
    async with replica.serving(key_file=key):
        told = Told(replica.address, key=KEY.encode(), paths=lambda: probed)
        allowlist = Allowlist()
        allowlist.follow(told.reporter.targets)
        async with told.running():
            await until(lambda: replica.feed.stream_count == 1 and told.reporter.targets.get(PREFILL))
            assert allowlist.allows(PREFILL)
            assert [target.address for target in allowlist.targets()] == [PREFILL]
            own = told.reporter.begin(ORDER, PlannedLoad(replica="a/1", model="m"))
            other = told.reporter.begin(ORDER, PlannedLoad(replica="b/1", model="m"))
            await until(lambda: replica.coordinator.remote.count == 1)
            handoff: Any = _Silent()
            told.reporter.end(other, handoff, "served")
            told.reporter.end(own, handoff, "served")
            await until(lambda: replica.coordinator.remote.count == 0)
            await until(lambda: any(isinstance(event, PathProbed) for event in replica.events))
            assert replica.feed.tells_paths(SIDECAR)
            assert replica.feed.reports["snapshot"] == 1
            await until(lambda: told.value("control_streams") == 1.0)
        await until(lambda: replica.feed.stream_count == 0)
        assert not replica.feed.tells_paths(SIDECAR)


class _Silent:
    """A handoff to which nothing has happened."""

    legs: dict[int, Any] = {}  # noqa: RUF012  # never changed
    first_output_s = None

    @staticmethod
    def served() -> None:
        return None


@pytest.mark.parametrize(
    ("sidecars", "coordinators"), [(OTHER_KEY, KEY), ("", KEY), (KEY, OTHER_KEY), (KEY, "")]
)
async def test_who_does_not_know_the_key_is_not_believed(
    tmp_path: Path, sidecars: str, coordinators: str
) -> None:
    replica = Replica()
    key_file = write(tmp_path / "key", coordinators) if coordinators else None
    async with replica.serving(key_file=key_file):
        told = Told(replica.address, key=sidecars.encode())
        async with told.running():
            await until(lambda: told.value("control_failures_total", why="refused"))
            if not sidecars:
                assert replica.refused == {"key": 1}
        assert replica.feed.stream_count == 0
        assert told.reporter.targets.get(PREFILL) is None
        assert not any(isinstance(event, SidecarReported) for event in replica.events)


def make_certificate(
    folder: Path, name: str, signed_by: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None = None
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """Write NAME.pem and NAME.key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    issuer = subject if signed_by is None else signed_by[0].subject
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=signed_by is None, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName(
                [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            ),
            critical=False,
        )
        .sign(key if signed_by is None else signed_by[1], hashes.SHA256())
    )
    write(folder / f"{name}.pem", made.public_bytes(serialization.Encoding.PEM))
    write(
        folder / f"{name}.key",
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )
    return made, key


def files(folder: Path, name: str, ca: str = "ca") -> dict[str, Path]:
    found = {"cert_file": folder / f"{name}.pem", "cert_key_file": folder / f"{name}.key"}
    return found | {"ca_file": folder / f"{ca}.pem"}


async def test_certificates_say_who_may_come_in_and_may_be_replaced(tmp_path: Path) -> None:
    authority = make_certificate(tmp_path, "ca")
    other = make_certificate(tmp_path, "other-ca")
    for name, signer in (("server", authority), ("pod", authority), ("stranger", other)):
        make_certificate(tmp_path, name, signer)
    replica = Replica()
    async with replica.serving(**files(tmp_path, "server")):
        stranger = Told(replica.address, **files(tmp_path, "stranger"))
        nobody = Told(replica.address, ca_file=tmp_path / "ca.pem")
        deceived = Told(replica.address, **files(tmp_path, "pod", ca="other-ca"))
        clear = Told(replica.address)
        for each in (stranger, nobody, deceived, clear):
            async with each.running():
                await until(lambda each=each: each.value("control_failures_total", why="unreachable"))
        assert replica.feed.stream_count == 0
        assert replica.server is not None
        assert replica.server.certificate_validity() == read_validity(tmp_path / "server.pem")
        named = HostPort(replica.address.replace("127.0.0.1", "localhost"))
        async with Told(named, **files(tmp_path, "pod")).running():
            await until(lambda: replica.feed.stream_count == 1)
            # Both sides' authority is replaced; the next stream uses the new one.
            for name in ("server", "pod"):
                make_certificate(tmp_path, name, other)
            (tmp_path / "ca.pem").write_bytes((tmp_path / "other-ca.pem").read_bytes())
            async with Told(replica.address, **files(tmp_path, "pod")).running() as renewed:
                await until(lambda: renewed.reporter.targets.get(PREFILL))
        assert replica.server.certificate_validity() == read_validity(tmp_path / "server.pem")


async def ending(call: Any) -> tuple[grpc.StatusCode, str]:
    """How the other side ended a stream."""
    async with asyncio.timeout(WAIT_S):
        with contextlib.suppress(grpc.aio.AioRpcError):
            while await call.read() is not grpc.aio.EOF:
                pass
        return await call.code(), await call.details()


async def test_another_version_is_named_on_either_side_and_nothing_is_lost() -> None:
    replica = Replica()
    async with replica.serving(), grpc.aio.insecure_channel(replica.address) as channel:
        call: Any = channel.stream_stream(METHOD)()
        await call.write(*encode_report(SidecarHello(CONTROL_VERSION + 1, "pod", SIDECAR, "e", b"n")))
        code, details = await ending(call)
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "version is 2, expected 1" in details
        assert replica.refused == {"version": 1}

    async def answer_old(_requests: object, context: Any) -> None:
        await context.read()
        await context.write(*encode_notice(CoordinatorHello(0, "old", b"", b"")))
        await context.read()

    async with raw_server(answer_old) as address:
        told = Told(address)
        async with told.running():
            await until(lambda: told.value("control_failures_total", why="version"))
            report = told.reporter.begin(ORDER, None)
            told.reporter.end(report, _Silent(), "served")  # type: ignore[arg-type]
            assert told.value("control_streams") == 0.0


@asynccontextmanager
async def raw_server(serve: Callable[[object, Any], Any]) -> AsyncIterator[HostPort]:
    server = grpc.aio.server()
    service, _, method = METHOD.removeprefix("/").partition("/")
    handler: Any = grpc.stream_stream_rpc_method_handler(serve)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield HostPort(f"127.0.0.1:{port}")
    finally:
        await server.stop(grace=None)


@pytest.mark.parametrize(
    ("messages", "code", "why"),
    [
        ([b"\xff\xff"], grpc.StatusCode.INVALID_ARGUMENT, "malformed"),
        (encode_report(Events()), grpc.StatusCode.INVALID_ARGUMENT, "malformed"),
        (
            encode_report(SidecarHello(CONTROL_VERSION, "pod", HostPort("no port"), "e", b"n")),
            grpc.StatusCode.INVALID_ARGUMENT,
            "malformed",
        ),
        (
            [
                *encode_report(SidecarHello(CONTROL_VERSION, "pod", SIDECAR, "e", b"n")),
                *encode_report(SidecarProof(b"")),
                *encode_report(SidecarProof(b"")),
            ],
            grpc.StatusCode.INVALID_ARGUMENT,
            "malformed",
        ),
    ],
)
async def test_what_no_sidecar_tells_ends_its_stream_alone(
    messages: list[bytes], code: grpc.StatusCode, why: str
) -> None:
    replica = Replica()
    async with replica.serving(), grpc.aio.insecure_channel(replica.address) as channel:
        call: Any = channel.stream_stream(METHOD)()
        for message in messages:
            await call.write(message)
        assert (await ending(call))[0] is code
        assert replica.refused == {why: 1}
        async with Told(replica.address).running():
            await until(lambda: replica.feed.stream_count == 1)


async def test_a_coordinator_that_does_not_read_holds_up_nobody_and_gets_a_snapshot() -> None:
    """Events beyond what is kept are dropped for it alone; the other replica hears all of them."""
    quick, may_read, heard = Replica(), asyncio.Event(), []

    async def serve_late(_requests: object, context: Any) -> None:
        await context.read()
        await context.write(*encode_notice(CoordinatorHello(CONTROL_VERSION, "late/1", b"m", b"")))
        await context.read()
        await context.write(*encode_notice(Targets(is_whole=True)))
        while not may_read.is_set():
            await context.write(*encode_notice(Targets()))  # It lives, and goes on saying so.
            with suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await may_read.wait()
        while (raw := await context.read()) is not grpc.aio.EOF:
            heard.append(decode_report(raw))

    async with quick.serving(), raw_server(serve_late) as late:
        told = Told(quick.address, late)
        async with told.running():
            await until(lambda: quick.feed.stream_count == 1 and told.value("control_streams") == 2.0)
            load = PlannedLoad(replica="b/1", model="m" * 200)
            for _ in range(60):
                for _ in range(500):
                    report = told.reporter.begin(ORDER, load)
                    told.reporter.end(report, _Silent(), "served")  # type: ignore[arg-type]
                await asyncio.sleep(0.001)
            last = told.reporter.begin(ORDER, load)
            await until(lambda: quick.coordinator.remote.count == 1)
            may_read.set()
            await until(lambda: told.value("control_events_total", outcome="dropped"))
            await until(lambda: heard and live_after(heard) == 1)
            assert sum(isinstance(each, Snapshot) for each in heard) >= 2
            told.reporter.end(last, _Silent(), "served")  # type: ignore[arg-type]
            await until(lambda: live_after(heard) == 0 and quick.coordinator.remote.count == 0)


def live_after(messages: list[Any]) -> int:
    live: set[int] = set()
    for message in messages:
        if isinstance(message, Snapshot):
            live = {each.ordinal for each in message.requests}
        elif isinstance(message, Events):
            for event in message.events:
                if isinstance(event, RequestBegan):
                    live.add(event.ordinal)
                elif isinstance(event, RequestEnded):
                    live.remove(event.ordinal)
    return len(live)


async def test_what_a_lost_sidecar_told_holds_for_a_grace_and_is_whole_again_after_a_reconnect(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replica = Replica()
    async with replica.serving():
        told = Told(replica.address)
        async with told.running():
            told.reporter.begin(ORDER, PlannedLoad(replica="b/1", model="m"))
            await until(lambda: replica.coordinator.remote.count == 1)
        await until(lambda: replica.feed.stream_count == 0)
        assert replica.coordinator.remote.count == 1
        async with told.running():
            await until(lambda: replica.feed.stream_count == 1)
            assert replica.coordinator.remote.count == 1
        await until(lambda: replica.feed.stream_count == 0)
        monkeypatch.setattr(reports, "GRACE_S", 0.0)
        await until(lambda: replica.coordinator.remote.count == 0)
        assert any(isinstance(event, SidecarLost) for event in replica.events)


async def test_a_replica_that_comes_back_at_the_same_address_is_found_and_told_all() -> None:
    first = Replica()
    async with first.serving():
        address = first.address
        told = Told(address)
        running = told.running()
        await running.__aenter__()
        told.reporter.begin(ORDER, PlannedLoad(replica="b/1", model="m"))
        await until(lambda: first.coordinator.remote.count == 1)
    second = Replica()
    async with second.serving(port=int(address.rpartition(":")[2])):
        await until(lambda: second.coordinator.remote.count == 1)
        await running.__aexit__(None, None, None)


async def test_breakers_are_told_as_they_change() -> None:
    replica = Replica()
    async with replica.serving():
        told = Told(replica.address)
        async with told.running():
            await until(lambda: told.reporter.targets.get(PREFILL))
            assert not told.reporter.targets.is_shut(PREFILL)
            path = (EndpointId("p"), EndpointId("d"))
            replica.coordinator.paths.fail(
                path, RungReason.PREFILL_UNREACHABLE, RequestId("r"), time.monotonic()
            )
            await until(lambda: told.reporter.targets.is_shut(PREFILL))
            await until(lambda: told.value("control_targets", state="shut") == 1.0)
            await until(lambda: not told.reporter.targets.is_shut(PREFILL))  # Half-open after a second.


async def test_a_port_that_is_taken_is_said() -> None:
    first, second = Replica(), Replica()
    async with first.serving():
        with pytest.raises(OSError, match=r"cannot listen on 127\.0\.0\.1"):
            async with second.serving(port=int(first.address.rpartition(":")[2])):
                raise AssertionError("two listen on one port")


async def test_a_key_file_that_cannot_be_used_is_said(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="key file"):
        async with Replica().serving(key_file=write(tmp_path / "key", "short")):
            raise AssertionError("it serves with a short key")
