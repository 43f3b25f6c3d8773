"""What the security suite shares: an authority, listeners with raw clients, and a fleet of real processes."""

import asyncio
import contextlib
import ipaddress
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from pdcoord.protocol.headers import HostPort
from pdcoord.sim.demo.processes import Processes
from pdcoord.sim.ports import free_ports
from pdcoord.sim.profiles import PROFILES, policy_layout, policy_speed
from pdcoord.wire.asgi import App, Receive, Scope, Send, read_body, send_json
from pdcoord.wire.client import Client
from pdcoord.wire.plankeys import PlanKeysFile
from pdcoord.wire.server import Listener, serve
from pdcoord.wire.tls import ClientTls, ServerTls
from sidecar.guard import Allowlist
from sidecar.health import Health
from sidecar.observe import Metrics
from sidecar.process import make_proxy
from sidecar.proxy import Proxy
from sidecar.settings import parse

WAIT_S = 40.0
MODEL = "security/model"
METRICS = b"vllm:num_requests_running 0\nvllm:num_requests_waiting 0\n"


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, as files."""

    cert: Path
    key: Path


class Authority:
    """Signs certificates; its own is in `ca`."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        made = self._certificate(self._name, self._key, [], is_ca=True)
        self.ca = folder / f"{name}.crt"
        self.ca.write_bytes(made.public_bytes(serialization.Encoding.PEM))

    def issue(
        self, name: str, *, host: str = "127.0.0.1", days: int = 1, uses: Sequence[Any] | None = None
    ) -> Pair:
        """A pair of that name, for servers and clients unless `uses` says for what."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        try:
            names: list[x509.GeneralName] = [x509.IPAddress(ipaddress.ip_address(host))]
        except ValueError:
            names = [x509.DNSName(host)]
        purposes = uses or (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
        made = self._certificate(subject, key, names, days=days, uses=purposes)
        pair = Pair(self._folder / f"{name}.crt", self._folder / f"{name}.key")
        pem = serialization.Encoding.PEM
        pair.key.write_bytes(
            key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )
        pair.cert.write_bytes(made.public_bytes(pem))
        return pair

    def _certificate(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        names: list[x509.GeneralName],
        *,
        is_ca: bool = False,
        days: int = 1,
        uses: Sequence[Any] = (),
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=2))
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        if uses:
            builder = builder.add_extension(x509.ExtendedKeyUsage(list(uses)), critical=False)
        return builder.sign(self._key, hashes.SHA256())


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "ca")


@pytest.fixture
def make_authority(tmp_path: Path) -> Callable[[str], Authority]:
    return lambda name: Authority(tmp_path, name)


def _set_event() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


@dataclass
class Served:
    """One listener while it runs.

    Attributes:
        seen: the requests that came to its app: method, path, headers, body.
        answers: set; while it is not, its app answers no POST.
    """

    port: int = 0
    seen: list[tuple[str, str, list[tuple[bytes, bytes]], bytes]] = field(default_factory=list)
    app: App | None = None
    answers: asyncio.Event = field(default_factory=_set_event)

    @property
    def address(self) -> HostPort:
        return HostPort(f"127.0.0.1:{self.port}")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = list(scope["headers"])
        body = await read_body(receive, bytes_max=1 << 20, timeout_s=WAIT_S)
        self.seen.append((scope["method"], scope["path"], headers, body))
        if scope["method"] == "POST":
            async with asyncio.timeout(WAIT_S):
                await self.answers.wait()
        await send_json(send, 200, METRICS if scope["path"] == "/metrics" else body or b"{}")

    async def say(self, data: bytes, tls: ssl.SSLContext | None = None) -> bytes:
        """All that is answered to these bytes, until the listener closes or has said whole answers."""
        async with asyncio.timeout(WAIT_S):
            host = "127.0.0.1"
            reader, writer = await asyncio.open_connection(host, self.port, ssl=tls)
            try:
                writer.write(data)
                answer = b""
                with contextlib.suppress(ConnectionError, ssl.SSLError):
                    while part := await reader.read(65_536):
                        answer += part
                return answer
            finally:
                writer.transport.abort()


Serving = Callable[..., AbstractAsyncContextManager[Served]]


@pytest.fixture
def serving() -> Serving:
    """Serves an app, or one that notes what it got, on a port of its own."""

    @contextlib.asynccontextmanager
    async def serving(
        app: App | None = None, tls: ServerTls | None = None, **more: Any
    ) -> AsyncIterator[Served]:
        served = Served()
        stop = asyncio.Event()
        ports: asyncio.Queue[list[int]] = asyncio.Queue()
        listener = Listener(app or served, tls=tls, **more)
        async with asyncio.TaskGroup() as group:
            group.create_task(serve([listener], stop=stop, drain_s=0.2, on_started=ports.put_nowait))
            (served.port,) = await ports.get()
            try:
                yield served
            finally:
                stop.set()

    return serving


class _Saying(asyncio.Protocol):
    """Answers each head with the same bytes."""

    def __init__(self, answer: bytes, open_: set[asyncio.Transport], *, closes: bool) -> None:
        self._answer = answer
        self._closes = closes
        self._open = open_

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._open.add(transport)

    def data_received(self, data: bytes) -> None:
        if b"\r\n\r\n" in data:
            self._transport.write(self._answer)
            if self._closes:
                self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._open.discard(self._transport)


@pytest.fixture
def saying() -> Callable[..., AbstractAsyncContextManager[HostPort]]:
    """An engine that answers every request with the same bytes, whatever they are."""

    @contextlib.asynccontextmanager
    async def saying(answer: bytes, *, closes: bool = False) -> AsyncIterator[HostPort]:
        open_: set[asyncio.Transport] = set()
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _Saying(answer, open_, closes=closes), "127.0.0.1", 0)
        try:
            yield HostPort(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
        finally:
            server.close()
            for transport in open_:
                transport.abort()

    return saying


@dataclass
class Beside:
    """A sidecar in this process, before an engine that notes what it got.

    Attributes:
        metrics: the sidecar's.
    """

    served: Served
    engine: Served
    metrics: Metrics
    proxy: Proxy

    @property
    def address(self) -> HostPort:
        return self.served.address


@pytest.fixture
def sidecar(serving: Serving) -> Callable[..., AbstractAsyncContextManager[Beside]]:
    """Starts one with these flags, before another engine if one is named; signs nothing without `keys`."""

    @contextlib.asynccontextmanager
    async def sidecar(
        *flags: str, keys: PlanKeysFile | None = None, before: HostPort | None = None
    ) -> AsyncIterator[Beside]:
        async with serving() as engine, Client() as client:
            settings = parse(["--engine", before or engine.address, *flags], {})
            allowlist = Allowlist(settings.allow, path=settings.allow_file, is_open=settings.allow_any)
            metrics = Metrics()
            health = Health(client, settings.engine, metrics)
            proxy = make_proxy(settings, allowlist, client, metrics, health, keys=keys)
            async with serving(proxy) as served:
                yield Beside(served, engine, metrics, proxy)

    return sidecar


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """Starts gateway processes before one endpoint; gives their address once they are ready."""
    async with Processes(tmp_path) as processes:

        async def start(endpoint: HostPort, *flags: str, **variables: str) -> HostPort:
            port, admin = free_ports(2)
            profile = PROFILES["nvidia-h100-8b"]
            pool = {"name": "both", "role": "both", "vendor": "v", "engine": "vllm", "connector": "none"}
            pool |= {"kv_bytes_per_token": 1_024, "speed": policy_speed(profile)}
            pool |= {"endpoints": [{"name": "a", "address": str(endpoint)}]}
            policy = {"apiVersion": "pdcoord.io/v1alpha1", "kind": "PoolPolicy", "metadata": {"name": "m"}}
            model = {"name": MODEL, "adapters": [f"{MODEL}:sql", f"{MODEL}:law"]}
            policy |= {"model": model, "pools": [pool]}
            policy |= {"admission": {"objectives": {"critical": 9, "batch": -1}}}
            (tmp_path / "policy.yaml").write_text(yaml.safe_dump(policy, sort_keys=False))
            command = ["pdcoord", "serve", "--policy", str(tmp_path / "policy.yaml"), "--port", str(port)]
            command += ["--admin-port", str(admin), *flags]
            await processes.start("gateway", command, {"PDCOORD_LOG_LEVEL": "debug", **variables})
            address = HostPort(f"127.0.0.1:{port}")
            async with Client() as client:
                await processes.wait_ready("gateway", address, "/readyz", client)
            return address

        yield start


# A fleet of processes.


@dataclass
class Fleet:
    """An emulated prefill pod, an emulated decode pod, each behind a sidecar, and a gateway, as processes.

    Attributes:
        flags: of each process, beside those that it needs; variables likewise. Set them before `start`.
        tls: how its listeners are spoken to; None for a fleet in clear.
    """

    folder: Path
    processes: Processes
    flags: dict[str, list[str]] = field(default_factory=dict)
    variables: dict[str, dict[str, str]] = field(default_factory=dict)
    tls: ClientTls | None = None
    ports: dict[str, int] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=dict)

    def address(self, name: str) -> HostPort:
        return HostPort(f"127.0.0.1:{self.ports[name]}")

    async def start(self) -> None:
        names = [
            f"{pod}-{what}" for pod in ("prefill", "decode") for what in ("engine", "side", "kv", "metrics")
        ]
        names += ["prefill", "decode", "gateway", "admin"]
        self.ports = dict(zip(names, free_ports(len(names)), strict=True))
        self._write()
        fleet = str(self.folder / "fleet.yaml")
        for pod in ("prefill", "decode"):
            await self._begin(f"{pod}-engine", ["pdcoord", "emulate", fleet, "--engine", pod])
        for pod in ("prefill", "decode"):
            command = ["pdcoord-sidecar", "--host", "127.0.0.1", "--port", str(self.ports[pod])]
            command += ["--engine", self.address(f"{pod}-engine"), "--allow", self.address("prefill")]
            command += ["--metrics-port", str(self.ports[f"{pod}-metrics"]), "--log-level", "debug"]
            await self._begin(f"{pod}-sidecar", command)
        serve_ = ["pdcoord", "serve", "--policy", str(self.folder / "policy.yaml")]
        serve_ += ["--port", str(self.ports["gateway"]), "--admin-port", str(self.ports["admin"])]
        await self._begin("gateway", serve_)
        async with Client() as plain, Client(tls=self.tls) as client:
            for pod in ("prefill", "decode"):
                engine = self.address(f"{pod}-engine")
                await self.processes.wait_ready(f"{pod}-engine", engine, "/health", plain)
                await self.processes.wait_ready(f"{pod}-sidecar", self.address(pod), "/health", client)
            await self.processes.wait_ready("gateway", self.address("gateway"), "/readyz", client)

    async def _begin(self, name: str, command: list[str]) -> None:
        variables = {"PDCOORD_LOG_LEVEL": "debug", **self.variables.get(name, {})}
        await self.processes.start(name, [*command, *self.flags.get(name, [])], variables)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def _write(self) -> None:
        profile = PROFILES["nvidia-h100-8b"]
        engines = [
            {
                "name": pod,
                "profile": "nvidia-h100-8b",
                "role": pod,
                "port": self.ports[f"{pod}-engine"],
                "side_channel_port": self.ports[f"{pod}-side"],
                "kv_port": self.ports[f"{pod}-kv"],
            }
            for pod in ("prefill", "decode")
        ]
        pools = [
            {
                "name": pod,
                "role": pod,
                "vendor": "nvidia",
                "engine": "vllm",
                "connector": "nixl",
                "layout": policy_layout(profile.layout),
                "kv_bytes_per_token": profile.kv_bytes_per_token,
                "link_gbit_per_s": profile.link_gbit_per_s.value,
                "endpoints": [{"name": pod, "address": str(self.address(pod))}],
                "speed": policy_speed(profile),
            }
            for pod in ("prefill", "decode")
        ]
        head = {"apiVersion": "pdcoord.io/v1alpha1"}
        fleet = {**head, "kind": "EmulatedFleet", "seed": 1, "model": MODEL, "engines": engines}
        policy = {**head, "kind": "PoolPolicy", "metadata": {"name": "m"}, "model": {"name": MODEL}}
        policy |= {"pools": pools, "disaggregation": {"mode": "always"}, **self.policy}
        (self.folder / "fleet.yaml").write_text(yaml.safe_dump(fleet, sort_keys=False))
        (self.folder / "policy.yaml").write_text(yaml.safe_dump(policy, sort_keys=False))


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    """Not started yet."""
    async with Processes(tmp_path) as processes:
        yield Fleet(tmp_path, processes)
