"""The control stream of a coordinator process: its parts put together, or none of them."""

import secrets
import socket
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from structlog.typing import FilteringBoundLogger

from pdcoord.core.coordinator import Coordinator
from pdcoord.core.targets import TargetLists
from pdcoord.feeds.reports import ReportsFeed
from pdcoord.feeds.reports_server import REFUSALS, ControlServer, ControlSettings
from pdcoord.protocol.headers import HostPort
from pdcoord.runtime import control_metrics as catalog
from pdcoord.runtime.loop import CoordinatorLoop
from pdcoord.runtime.metricspec import MetricSpec
from pdcoord.runtime.settings import CoordinatorSettings
from pdcoord.wire.validity import Validity

_KINDS = ("event", "snapshot", "path")
_Sample = tuple[tuple[str, ...], float]


def replica_name(settings: CoordinatorSettings) -> str:
    """How plans name this process: its replica and a word of this life; empty without a control stream.

    A replica that was restarted is another process: what its last life planned is a request of others.
    """
    if settings.control_port is None:
        return ""
    return f"{settings.replica or socket.gethostname()}/{secrets.token_hex(4)}"


@dataclass(frozen=True, slots=True)
class Control:
    """The feed and its server; both None where no port is set."""

    coordinator: Coordinator
    feed: ReportsFeed | None = None
    server: ControlServer | None = None

    @property
    def port(self) -> int | None:
        """Where sidecars are listened to, once that is so."""
        return None if self.server is None else self.server.port

    def certificate_validity(self) -> Validity | None:
        """Of the certificate in force; None for a stream in clear."""
        return None if self.server is None else self.server.certificate_validity()

    def services(self) -> Sequence[AbstractAsyncContextManager[object]]:
        return () if self.server is None else (self.server,)

    async def run(self) -> None:
        """Look after the streams until cancelled."""
        if self.feed is not None:
            await self.feed.run()

    def tells_paths(self, address: HostPort) -> bool:
        """Whether the sidecar at that address need not be asked about its paths."""
        return self.feed is not None and self.feed.tells_paths(address)

    def samples(self) -> Iterable[tuple[MetricSpec, Iterable[_Sample]]]:
        """For /metrics."""
        feed, server, remote = self.feed, self.server, self.coordinator.remote
        yield catalog.STREAMS, [((), float(feed.stream_count if feed is not None else 0))]
        yield catalog.UNKNOWN, [((), float(feed.unknown_count if feed is not None else 0))]
        yield catalog.REPORT_AGE, [((), feed.report_age_s if feed is not None else 0.0)]
        told = feed.reports if feed is not None else {}
        yield catalog.REPORTS, [((kind,), float(told.get(kind, 0))) for kind in _KINDS]
        refused = server.refused if server is not None else {}
        yield catalog.REFUSED, [((why,), float(refused.get(why, 0))) for why in REFUSALS]
        yield catalog.REMOTE, [((), float(remote.count))]
        yield catalog.REMOTE_LEFT_OUT, [((), float(remote.left_out))]


def make_control(
    settings: CoordinatorSettings,
    coordinator: Coordinator,
    loop: CoordinatorLoop,
    *,
    replica: str,
    log: FilteringBoundLogger,
) -> Control:
    """The control stream as the settings ask for it."""
    if settings.control_port is None:
        return Control(coordinator)
    feed = ReportsFeed(
        loop,
        TargetLists(coordinator.fleet, coordinator.paths),
        at=lambda address: [state.endpoint for state in coordinator.fleet.at(address)],
        replica=replica,
        clock=time.monotonic,
        log=log,
    )
    control = ControlSettings(
        host=settings.control_host,
        port=settings.control_port,
        replica=replica,
        key_file=settings.control_key_file,
        cert_file=settings.control_cert_file,
        cert_key_file=settings.control_cert_key_file,
        ca_file=settings.control_ca_file,
    )
    return Control(coordinator, feed, ControlServer(control, feed, log))
