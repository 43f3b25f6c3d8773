"""The sidecar as it runs: settings in, listeners up, a drain on SIGTERM."""

import asyncio
import logging
import os
import random
import socket
import sys
import time
import uuid
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import msgspec
import structlog
from prometheus_client import disable_created_metrics

from pdcoord.protocol.paths import PathsReport, encode_paths
from pdcoord.resume.tape import Shelf
from pdcoord.wire.client import Client
from pdcoord.wire.misspelt import misspelt
from pdcoord.wire.pem import PemError, check_pem
from pdcoord.wire.places import Place, PlaceError, check_places
from pdcoord.wire.plankeys import PlanKeysFile
from pdcoord.wire.server import Listener, run, serve, stop_on_signals
from pdcoord.wire.tracing import Tracing, TracingError, start_tracing
from sidecar.describe import SECTIONS, section
from sidecar.errors import SettingsError
from sidecar.guard import Allowlist, Guard
from sidecar.health import Health
from sidecar.observe import Metrics, configure_log
from sidecar.probes import Prober, ProbeRules, ask_through
from sidecar.proxy import Backstage, Limits, Proxy
from sidecar.report_link import Credentials
from sidecar.reporter import Reporter, ReporterSettings
from sidecar.secured import Secured
from sidecar.settings import ENV_PREFIX, FLAGS, Settings, parse
from sidecar.tools import TAPE_BYTES_MAX, Tools
from transfer.errors import SettingError
from transfer.settings import read_key_file

USAGE_ERROR = 2
ALLOW_FILE_POLL_S = 1.0
NEVER_S = 86_400.0
"""The interval of probes that a page without probes names."""
GRACE_S_MAX = 2.0
"""Before the drain runs out, so that what is left to others goes on there while this pod still answers."""
# After the drain, for what the server itself still has to write.
CLOSE_S = 1.0

_log = structlog.get_logger()


def main() -> int:
    """Run the sidecar; the exit status is 2 for settings that cannot be used.

    `--describe SECTION` prints a section of the reference instead: see `describe.SECTIONS`.
    """
    arguments = sys.argv[1:]
    if len(arguments) == 2 and arguments[0] == "--describe" and arguments[1] in SECTIONS:
        sys.stdout.write(section(arguments[1]))
        return 0
    try:
        settings = parse(arguments, os.environ)
        allowlist = Allowlist(settings.allow, path=settings.allow_file, is_open=settings.allow_any)
        key = read_key("--kv-key-file", settings.kv_key_file)
        control_key = read_key("--control-key-file", settings.control_key_file)
        check_start(settings)
        secured = Secured(settings)
    except (SettingsError, PlaceError) as error:
        sys.stderr.write(f"pdcoord-sidecar: {error}\n")
        return USAGE_ERROR
    configure_log(settings.log_level)
    disable_created_metrics()  # type: ignore[no-untyped-call]  # prometheus_client leaves it bare
    # uvicorn would report each answer that is broken off on purpose; request.done tells of those.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    for doubt in misspelt(os.environ, ENV_PREFIX, {flag.variable for flag in FLAGS}):
        _log.warning("settings.doubtful", doubt=doubt)
    return run(_main(settings, allowlist, secured, key, control_key))


def read_key(flag: str, path: Path | None) -> bytes:
    """A shared key; empty without a file.

    Raises:
        SettingsError: if the file cannot be used.
    """
    if path is None:
        return b""
    try:
        return read_key_file(str(path))
    except SettingError as error:
        raise SettingsError(flag, str(path), error.remedy) from error


def check_start(settings: Settings) -> None:
    """Try the addresses and certificates that the settings name.

    Raises:
        SettingsError: for a file that cannot be used.
        PlaceError: for an address that cannot be listened on.
    """
    try:
        check_pem(settings.control_cert_file, settings.control_cert_key_file, settings.control_ca_file)
    except PemError as error:
        flag = f"--control-{error.part.replace('_', '-')}-file"
        raise SettingsError(flag, str(error.path), error.remedy) from error
    own, metrics = (
        Place(host, port, *(f"--{name} ({ENV_PREFIX}{name.replace('-', '_').upper()})" for name in names))
        for host, port, names in (
            (settings.host, settings.port, ("host", "port")),
            (settings.metrics_host, settings.metrics_port, ("metrics-host", "metrics-port")),
        )
    )
    check_places((own, metrics))


async def _main(
    settings: Settings, allowlist: Allowlist, secured: Secured, key: bytes, control_key: bytes
) -> int:
    signalled = stop_on_signals()
    stop = asyncio.Event()
    metrics = Metrics()
    try:
        tracing = make_tracing(metrics)
    except TracingError as error:
        sys.stderr.write(f"pdcoord-sidecar: {error}\n")
        return USAGE_ERROR
    metrics.set("allowed_targets", len(allowlist))
    metrics.read("tasks", lambda: float(len(asyncio.all_tasks())))
    secured.show(metrics)
    async with Client(tls=secured.upstream, plain=(settings.engine,)) as client:
        prober = make_prober(settings, allowlist, metrics, key)
        reporter = make_reporter(settings, allowlist, metrics, control_key, prober)
        health = Health(client, settings.engine, metrics, *([] if prober is None else [prober.is_warm]))
        backstage = Backstage(metrics, health, paths_page(prober, reporter))
        keys = secured.plan_keys
        proxy = make_proxy(
            settings, allowlist, client, metrics, health, tracing=tracing, reporter=reporter, keys=keys
        )
        listeners = [
            Listener(proxy, settings.host, settings.port, secured.listener),
            Listener(backstage, settings.metrics_host, settings.metrics_port, secured.metrics),
        ]
        status = 0
        async with asyncio.TaskGroup() as group:
            background = [
                group.create_task(_poll_allowlist(allowlist, metrics)),
                group.create_task(secured.run(metrics)),
                group.create_task(_drain(signalled, stop, proxy, settings.drain_s)),
            ]
            parts = [part for part in (prober, reporter) if part is not None]
            background += [group.create_task(part.run()) for part in parts]
            announce = _announce(settings, allowlist, reporter)
            try:
                await serve(listeners, stop=stop, drain_s=CLOSE_S, on_started=announce)
            except OSError as error:
                sys.stderr.write(f"pdcoord-sidecar: {error.strerror or error}\n")
                status = USAGE_ERROR
            finally:
                for task in background:
                    task.cancel()
    if tracing is not None:
        await asyncio.to_thread(tracing.close)
    if status == 0:
        _log.info("sidecar.stopped")
    return status


def _announce(
    settings: Settings, allowlist: Allowlist, reporter: Reporter | None
) -> Callable[[list[int]], None]:
    def announce(ports: list[int]) -> None:
        if reporter is not None:
            reporter.listening(ports[0])
        _log.info(
            "sidecar.started",
            port=ports[0],
            metrics_port=ports[1],
            engine=settings.engine,
            dialect=str(settings.dialect),
            allowed_targets="any" if settings.allow_any else len(allowlist),
        )

    return announce


def make_prober(settings: Settings, allowlist: Allowlist, metrics: Metrics, key: bytes) -> Prober | None:
    """Probes through the own engine's agent; None where none is named."""
    agent = settings.kv_agent
    if agent is None:
        return None
    return Prober(
        ask_through(agent, key),
        allowlist.targets,
        ProbeRules(settings.probe_interval_s, settings.kv_port),
        rng=random.SystemRandom(),
        metrics=metrics,
        now_s=time.monotonic,
    )


def make_reporter(
    settings: Settings, allowlist: Allowlist, metrics: Metrics, key: bytes, prober: Prober | None
) -> Reporter | None:
    """The control streams; None where no coordinator is named."""
    if not settings.control:
        return None
    credentials = Credentials(
        key, settings.control_ca_file, settings.control_cert_file, settings.control_cert_key_file
    )
    reporter = Reporter(
        ReporterSettings(
            destinations=settings.control,
            name=socket.gethostname(),
            address=settings.control_address,
            credentials=credentials,
        ),
        metrics=metrics,
        rng=random.SystemRandom(),
        now_s=time.monotonic,
        paths=None if prober is None else prober.told,
    )
    if settings.allow_from_control:
        allowlist.follow(reporter.targets)
    return reporter


def paths_page(prober: Prober | None, reporter: Reporter | None) -> Callable[[], bytes] | None:
    """The body of GET /paths: what was probed here, and what coordinators tell."""
    if prober is None and reporter is None:
        return None

    def page() -> bytes:
        told = prober.told() if prober is not None else PathsReport(interval_s=NEVER_S, is_agent_up=False)
        rows = () if reporter is None else tuple(reporter.targets.rows())
        return encode_paths(msgspec.structs.replace(told, told=rows))

    return page


def make_tracing(metrics: Metrics) -> Tracing | None:
    """Spans of requests; None unless OTEL_* variables ask for them.

    Raises:
        TracingError: if they cannot be had as asked.
    """
    count = metrics.count_spans
    return start_tracing(os.environ, "pdcoord-sidecar", version=version("pdcoord"), count=count, log=_log)


def make_proxy(
    settings: Settings,
    allowlist: Allowlist,
    client: Client,
    metrics: Metrics,
    health: Health,
    *,
    tracing: Tracing | None = None,
    reporter: Reporter | None = None,
    keys: PlanKeysFile | None = None,
) -> Proxy:
    tools = Tools(
        client=client,
        engine=settings.engine,
        metrics=metrics,
        rng=random.SystemRandom(),
        bootstrap_port=settings.bootstrap_port,
        kv_port=settings.kv_port,
        now_s=time.monotonic,  # uvloop's own clock counts whole milliseconds
        shelf=Shelf(settings.resume_bytes_max, TAPE_BYTES_MAX),
        tracing=tracing,
        reporter=reporter,
        keys=keys,
    )
    guard = Guard(
        allowlist=allowlist,
        dialect=settings.dialect,
        is_colocated_allowed=settings.fallback_colocated,
        prefill_deadline_ms=settings.prefill_deadline_ms,
        transfer_deadline_ms=settings.transfer_deadline_ms,
        make_request_id=lambda: uuid.uuid4().hex,
        bootstrap_port=settings.bootstrap_port,
        kv_port=settings.kv_port,
        seal=keys,
        count_doubt=lambda doubt: metrics.count("unsigned", doubt),
    )
    limits = Limits(
        answer_s=settings.answer_ms / 1e3,
        stream_idle_s=settings.stream_idle_ms / 1e3,
        body_bytes_max=settings.body_bytes_max,
        bodies_bytes_max=settings.bodies_bytes_max,
        live_max=settings.live_max,
    )
    return Proxy(tools, guard, health, limits)


async def _poll_allowlist(allowlist: Allowlist, metrics: Metrics) -> None:
    while True:
        await asyncio.sleep(ALLOW_FILE_POLL_S)
        try:
            metrics.set("allowed_targets", len(allowlist))
            if allowlist.reload():
                metrics.set("allowed_targets", len(allowlist))
                _log.info("allowlist.reloaded", allowed_targets=len(allowlist))
        except SettingsError as error:
            metrics.count("allow_file_errors")
            _log.warning("allowlist.refused", error=str(error))


async def _drain(signalled: asyncio.Event, stop: asyncio.Event, proxy: Proxy, drain_s: float) -> None:
    """On the first signal refuse what is new, wait for what runs, then stop the listeners."""
    await signalled.wait()
    proxy.begin_drain()
    _log.info("sidecar.draining", in_flight=proxy.in_flight, drain_s=drain_s)
    grace_s = min(GRACE_S_MAX, drain_s / 4)
    if not await proxy.wait_idle(drain_s - grace_s):
        proxy.end_grace(is_over=False)
        if not await proxy.wait_idle(grace_s):
            _log.warning("sidecar.drain_cut", in_flight=proxy.in_flight)
            proxy.end_grace(is_over=True)
            await proxy.wait_idle(CLOSE_S)
    stop.set()
