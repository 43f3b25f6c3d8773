"""Keeps a control stream to every coordinator replica, and tells each of this sidecar's requests."""

import asyncio
import ipaddress
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import structlog

from pdcoord.protocol.control import Targets
from pdcoord.protocol.headers import HostPort, format_host_port, parse_host_port
from pdcoord.protocol.paths import PathsReport
from pdcoord.protocol.plans import PlannedLoad
from sidecar.legs import Legs
from sidecar.observe import Metrics
from sidecar.report_link import Credentials, Identity, Link, LinkFailedError, Place, Source
from sidecar.report_targets import TargetBook
from sidecar.reports import Journal, RequestReport
from sidecar.vocabulary import Order

RESOLVE_S_MIN, RESOLVE_S_MAX = 0.5, 2.0
"""Between two looks at a name: often while replicas come and go, seldom while all is well."""
RESOLVE_TIMEOUT_S = 5.0
RETRY_S_MIN, RETRY_S_MAX = 0.05, 0.5
"""Between two attempts at a replica that does not answer."""
REFUSED_S_MAX = 10.0
"""Between two attempts at a replica that does not take us: key, certificate or version."""
GONE_LOOKS = 4
"""Looks in a row at which an address is missing before it is given up, if no stream to it is up."""
REPLICAS_MAX = 64
SHOW_S = 0.5

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class ReporterSettings:
    """Who is told, and how.

    Attributes:
        destinations: a name is resolved to all its addresses, again and again.
        address: as endpoints name this sidecar; None for the local address that reaches a coordinator,
            with the port that the sidecar listens on.
    """

    destinations: tuple[HostPort, ...]
    name: str
    address: HostPort | None = None
    credentials: Credentials = field(default_factory=Credentials)


class Reporter:
    """What the proxy tells of requests, and the streams that carry it.

    Telling costs one append for each event of a leg; no stream is ever waited for.

    Attributes:
        targets: what coordinators tell of paths.
        doubles: further addresses of replicas that have a stream, as with a Service of two address families.
    """

    def __init__(
        self,
        settings: ReporterSettings,
        *,
        metrics: Metrics,
        rng: Random,
        now_s: Callable[[], float],
        paths: Callable[[], PathsReport] | None = None,
    ) -> None:
        self.targets = TargetBook()
        self.doubles: set[HostPort] = set()
        self._settings = settings
        self._metrics = metrics
        self._rng = rng
        self._now_s = now_s
        self._journal = Journal()
        self._wakers: set[asyncio.Event] = set()
        self._epoch = secrets.token_hex(8)
        self._listening = asyncio.Event()
        self._own_port = 0
        self._links: dict[HostPort, asyncio.Task[None]] = {}
        self._up: set[HostPort] = set()
        self._streams: dict[str, HostPort] = {}
        self._source = Source(self._journal, self._wakers, paths, metrics, now_s)

    def begin(self, order: Order, load: PlannedLoad | None) -> RequestReport:
        """A request is about to be served."""
        report = RequestReport(self._journal, order, load, self._now_s())
        self._wake()
        return report

    def look(self, report: RequestReport, legs: Legs) -> None:
        """Something happened to it."""
        if report.look(legs, self._now_s()):
            self._wake()

    def end(self, report: RequestReport, legs: Legs, outcome: str) -> None:
        """It is over."""
        report.end(legs, outcome, self._now_s())
        self._wake()

    def listening(self, port: int) -> None:
        """The sidecar serves on this port; before that nobody is told of it."""
        self._own_port = port
        self._listening.set()

    async def run(self) -> None:
        """Keep the streams up until cancelled."""
        await self._listening.wait()
        self._links.clear()
        async with asyncio.TaskGroup() as group:
            for destination in self._settings.destinations:
                group.create_task(self._follow(destination, group))
            while True:
                self.targets.sweep(self._now_s())
                self._show()
                await asyncio.sleep(SHOW_S)

    def _wake(self) -> None:
        for waker in self._wakers:
            waker.set()

    def _show(self) -> None:
        metrics, states = self._metrics, self.targets.states()
        metrics.set("control_streams", len(self._up))
        for state in ("usable", "shut"):
            metrics.set("control_targets", states[state], state)

    async def _follow(self, destination: HostPort, group: asyncio.TaskGroup) -> None:
        """Keep a stream to every address of a destination."""
        host, port = parse_host_port(destination)
        missing: dict[HostPort, int] = {}
        while True:
            found = await self._resolve(host, port)
            for address in found or ():
                missing[address] = 0
                if address not in self._links and len(self._links) < REPLICAS_MAX:
                    self._links[address] = group.create_task(self._keep(Place(address, host)))
            if found is not None:
                self._give_up_gone(found, missing)
            is_steady = bool(found) and (self._up | self.doubles).issuperset(found or ())
            pause_s = RESOLVE_S_MAX if is_steady else RESOLVE_S_MIN
            await asyncio.sleep(pause_s * self._rng.uniform(0.5, 1.0))

    def _give_up_gone(self, found: set[HostPort], missing: dict[HostPort, int]) -> None:
        for address in [each for each in missing if each not in found]:
            missing[address] += 1
            if missing[address] >= GONE_LOOKS and address not in self._up:
                del missing[address]
                self.doubles.discard(address)
                task = self._links.pop(address, None)
                if task is not None:
                    task.cancel()

    async def _resolve(self, host: str, port: int) -> set[HostPort] | None:
        """The addresses of a name now; None if nobody could say."""
        try:
            return {format_host_port(str(ipaddress.ip_address(host)), port)}
        except ValueError:
            pass  # A name.
        try:
            async with asyncio.timeout(RESOLVE_TIMEOUT_S):
                found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, TimeoutError):
            self._metrics.count("control_failures", "unresolved")
            return None
        return {format_host_port(str(each[4][0]), port) for each in found}

    async def _keep(self, place: Place) -> None:
        """Keep a stream to one replica up, and begin anew when it ends."""
        pause_s, told = RETRY_S_MIN, ""
        while True:
            link = self._link(place)
            failure = await self._run(place, link)
            if link.was_up:
                pause_s, told = RETRY_S_MIN, ""
            if failure.kind == "replaced":
                pause_s = (
                    REFUSED_S_MAX  # Else two sidecars of one address would push each other out for ever.
                )
            if failure.kind != told:
                told = failure.kind
                _log.warning("control.failed", coordinator=place.address, why=told, detail=str(failure))
            await asyncio.sleep(pause_s * self._rng.uniform(0.5, 1.0))
            pause_s = min(pause_s * 2.0, REFUSED_S_MAX if failure.is_refusal else RETRY_S_MAX)

    def _link(self, place: Place) -> Link:
        settings = self._settings
        address = settings.address or local_address(place.address, self._own_port)

        def take(replica: str, told: Targets) -> None:
            if place.address not in self._up:
                self._up.add(place.address)
                self.targets.connect(replica)
                _log.info("control.connected", coordinator=place.address, replica=replica)
            if told.has_news:
                self.targets.take(replica, told)

        def claim(replica: str) -> bool:
            return self._streams.setdefault(replica, place.address) == place.address

        identity = Identity(settings.name, address, self._epoch)
        return Link(
            place, settings.credentials, self._source, identity=identity, claim=claim, on_targets=take
        )

    async def _run(self, place: Place, link: Link) -> LinkFailedError:
        """Run one stream to its end; why it ended."""
        try:
            await link.run()
        except LinkFailedError as error:
            if error.kind == "duplicate":
                self.doubles.add(place.address)
            else:
                self.doubles.discard(place.address)
                self._metrics.count("control_failures", error.kind)
            return error
        finally:
            self._up.discard(place.address)
            for replica in [name for name, address in self._streams.items() if address == place.address]:
                del self._streams[replica]
            if link.replica:
                self.targets.lose(link.replica, self._now_s())
        raise AssertionError("a stream ends with why it did")


def local_address(coordinator: HostPort, port: int) -> HostPort:
    """This pod's own address as the coordinator sees it, unless something between them changes it."""
    host, coordinator_port = parse_host_port(coordinator)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, coordinator_port))  # Sends nothing: it only asks for the route.
        except OSError:
            return format_host_port("localhost", port)
        return format_host_port(str(probe.getsockname()[0]), port)
