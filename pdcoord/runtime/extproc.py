"""`pdcoord extproc`: the endpoint picker before a coordinator."""

import os
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Annotated, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_settings import NoDecode

from pdcoord.extproc.calls import Picker, PickRules
from pdcoord.extproc.health import Health
from pdcoord.extproc.listener import Address, Certificates, GrpcListener
from pdcoord.extproc.paths import path_of
from pdcoord.extproc.server import Processor
from pdcoord.front.ports import Limits
from pdcoord.protocol.errors import Refusal, RefuseReason
from pdcoord.runtime.extproc_flags import FlagError, read_flags
from pdcoord.runtime.observe import Metrics, Telemetry
from pdcoord.runtime.process import START_FAILED, Backstage, run_process, url_of
from pdcoord.runtime.settings import CoordinatorSettings, PortNumber, Seconds, SettingsError, load
from pdcoord.wire.asgi import App, Receive, Scope, Send, send_head, send_json
from pdcoord.wire.pem import PemError, check_pem
from pdcoord.wire.server import Listener
from pdcoord.wire.tls import ServerTls

_CLIENT_CA = "PDCOORD_GRPC_CLIENT_CA_FILE"
_METRICS_CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
_HEALTH_MESSAGE_BYTES_MAX = 1 << 16
_HEALTH_CALLS_MAX = 1_024


def _paths(given: object) -> object:
    """Paths with commas between, each as it is looked up.

    Raises:
        ValueError: naming one that no call could have.
    """
    if not isinstance(given, str):
        return given
    paths = [path.strip() for path in given.split(",") if path.strip()]
    for path in paths:
        if not path.startswith("/") or path_of(path.encode()) != path:
            raise ValueError(f"{path!r} is no path; begin with /, leave out %, ? and a last /")
    return frozenset(paths)


class ExtprocSettings(CoordinatorSettings):
    """Everything that `pdcoord extproc` can be told.

    Attributes:
        host: all addresses by default, as gateways' manifests for pickers expect.
        grpc_port: where Envoy asks; here and below 0 lets the kernel pick one.
        grpc_health_port: the health service alone, in plain text.
        metrics_port: GET /metrics, /livez and /readyz.
        secure_serving: TLS on `grpc_port`.
        cert_path: folder with tls.crt and tls.key, looked at again at each handshake; without it a
            certificate is made at each start.
        grpc_client_ca_file: with it Envoy needs a certificate on `grpc_port` that it has signed; it is looked
            at again as well.
        fallbacks_max: endpoints named behind the primary, for Envoy's retries.
        conformance: obey the header test-epp-endpoint-selection, and let any path pass.
        bodies_bytes_max: bodies of all calls together that are being read or wait for their route.
        pass_paths: what any endpoint may be sent whatever the method, with commas between.
        drain_notice_s: longer than a health check's interval of what watches `grpc_health_port`.
    """

    host: str = "0.0.0.0"  # noqa: S104  # Envoy runs in another pod.
    grpc_port: PortNumber = 9002
    grpc_health_port: PortNumber = 9003
    metrics_port: PortNumber = 9090
    secure_serving: bool = True
    cert_path: Path | None = None
    grpc_client_ca_file: Path | None = None
    fallbacks_max: Annotated[int, Field(ge=0, le=16)] = 2
    conformance: bool = False
    pass_paths: Annotated[frozenset[str], NoDecode, BeforeValidator(_paths)] = frozenset()

    body_bytes_max: Annotated[int, Field(ge=1_024, le=1 << 30)] = 32 << 20
    bodies_bytes_max: Annotated[int, Field(ge=1_024, le=1 << 36)] = 256 << 20
    body_timeout_s: Seconds = 60.0
    request_deadline_s: Seconds = 3_600.0
    streams_max: Annotated[int, Field(ge=1, le=1 << 20)] = 16_384
    drain_notice_s: Annotated[float, Field(ge=0, le=3_600)] = 5.0

    @model_validator(mode="after")
    def _clients_are_known_by_tls(self) -> Self:
        if self.grpc_client_ca_file is not None and not self.secure_serving:
            raise ValueError(
                f"{_CLIENT_CA} is {str(self.grpc_client_ca_file)!r}, which needs TLS on the port for Envoy: "
                "leave out --secure-serving=false (PDCOORD_SECURE_SERVING), or this"
            )
        return self

    def limits(self) -> Limits:
        """Bounds on one call."""
        return Limits(
            body_bytes_max=self.body_bytes_max,
            bodies_bytes_max=self.bodies_bytes_max,
            body_timeout_s=self.body_timeout_s,
            request_deadline_s=self.request_deadline_s,
            live_max=self.streams_max,
        )

    def certificates(self) -> Certificates | None:
        """TLS as asked for; None for plain text.

        Raises:
            SettingsError: if the certificate or its key cannot be used, or the authority of clients.
        """
        if not self.secure_serving:
            return None
        try:
            check_pem(None, None, self.grpc_client_ca_file)
            return Certificates(self.cert_path, self.grpc_client_ca_file)
        except PemError as error:
            raise SettingsError(f"{_CLIENT_CA} is {str(error.path)!r}: {error.remedy}") from error
        except OSError as error:
            why = error.strerror or str(error)
            raise SettingsError(
                f"--cert-path (PDCOORD_CERT_PATH) is {str(self.cert_path)!r}: {why}; give a folder with "
                "tls.crt and tls.key, or leave it out for a certificate of its own"
            ) from error


def main(arguments: Sequence[str]) -> int:
    """Run the picker with command-line flags in place of settings, until SIGTERM or SIGINT.

    The exit status: 0 stopped as asked, 2 not started.
    """
    try:
        flags = read_flags(arguments, os.environ)
        if flags.help:
            sys.stdout.write(flags.help)
            return 0
        settings = load(ExtprocSettings, flags.settings)
        front = ExtprocFront(settings, settings.certificates(), flags.ignored)
    except (FlagError, SettingsError, OSError) as error:
        sys.stderr.write(f"{ExtprocFront.command}: not started: {error}\n")
        return START_FAILED
    return run_process(settings, front)


class ExtprocFront:
    """Envoy asks over gRPC where calls go, and sends them there itself.

    Args:
        certificates: of the port for Envoy; None for plain text.
        ignored: flags that were taken but mean nothing here, for the log.
    """

    command = "pdcoord extproc"

    def __init__(
        self,
        settings: ExtprocSettings,
        certificates: Certificates | None,
        ignored: Sequence[str] = (),
    ) -> None:
        self._settings = settings
        self._certificates = certificates
        self._ignored = ignored
        self._grpc: GrpcListener | None = None
        self._health: GrpcListener | None = None
        self._tls: ServerTls | None = None

    def listeners(self, stage: Backstage) -> Sequence[Listener]:
        """Metrics, and health over HTTP."""
        app = make_pages(stage.metrics.render, stage.loop.unready)
        self._tls = stage.secured.listener
        return [Listener(app, self._settings.host, self._settings.metrics_port, self._tls)]

    def services(self, stage: Backstage) -> Sequence[AbstractAsyncContextManager[object]]:
        """The picker with its health, and health alone for probes."""
        settings = self._settings
        if self._ignored:
            stage.log.warning("flags.ignored", flags=list(self._ignored))
        picker = Picker(
            coordination=stage.loop,
            observer=Telemetry(stage.metrics, stage.log),
            limits=settings.limits(),
            clock=time.monotonic,
            new_id=lambda: uuid.uuid4().hex,
            tokens=stage.tokens,
            rules=PickRules(settings.fallbacks_max, settings.conformance, settings.pass_paths),
        )
        picker.tracing = stage.tracing
        picker.gate = stage.gate
        if stage.secured.plan_keys is not None:
            picker.sign = stage.secured.plan_keys.headers
        if self._certificates is not None:
            stage.secured.watch("extproc", self._certificates.validity)
        health = Health(stage.loop.unready).handler()
        processor = Processor(picker, ExtprocMeter(stage.metrics))
        self._grpc = GrpcListener(
            [processor.handler(), health],
            Address(settings.host, settings.grpc_port),
            credentials=None if self._certificates is None else self._certificates.credentials(),
            body_bytes_max=settings.body_bytes_max,
            streams_max=2 * settings.streams_max,
            drain_s=settings.drain_s,
            end_all=processor.end_all,
        )
        self._health = GrpcListener(
            [health],
            Address(settings.host, settings.grpc_health_port),
            credentials=None,
            body_bytes_max=_HEALTH_MESSAGE_BYTES_MAX,
            streams_max=_HEALTH_CALLS_MAX,
            drain_s=0.0,
        )
        return [self._health, self._grpc]

    def addresses(self, ports: Sequence[int]) -> dict[str, str]:
        """Where Envoy, probes and Prometheus are served."""
        assert self._grpc is not None, "asked before the services were made"
        assert self._health is not None, "asked before the services were made"
        return {
            "grpc": str(self._grpc.address),
            "grpc_health": str(self._health.address),
            "metrics_url": f"{url_of(self._tls, self._settings.host, ports[0])}/metrics",
        }


class ExtprocMeter:
    """Counts streams, answers and bytes in the process's metrics."""

    def __init__(self, metrics: Metrics) -> None:
        self._open = metrics.extproc_streams
        self._answers = metrics.extproc_answers
        self._violations = metrics.extproc_violations
        self._request_bytes = metrics.extproc_body_bytes.labels("request")
        self._response_bytes = metrics.extproc_body_bytes.labels("response")

    def stream_began(self) -> None:
        self._open.inc()

    def stream_ended(self, request_bytes: int, response_bytes: int) -> None:
        self._open.dec()
        self._request_bytes.inc(request_bytes)
        self._response_bytes.inc(response_bytes)

    def answered(self, reason: RefuseReason) -> None:
        self._answers.labels(reason).inc()

    def violated(self) -> None:
        self._violations.inc()


def make_pages(render: Callable[[], bytes], unready: Callable[[], Refusal | None]) -> App:
    """The pages of the metrics listener as an ASGI app."""

    async def serve(scope: Scope, _receive: Receive, send: Send) -> None:
        path = scope["path"]
        if scope["method"] not in {"GET", "HEAD"}:
            await _refuse(send, Refusal(RefuseReason.METHOD_NOT_ALLOWED, "Only GET is served here."))
        elif path == "/metrics":
            body = render()
            length = (b"content-length", b"%d" % len(body))
            await send_head(send, 200, [(b"content-type", _METRICS_CONTENT_TYPE), length])
            await send({"type": "http.response.body", "body": body, "more_body": False})
        elif path == "/livez":
            await send_json(send, 200, b'{"status":"ok"}')
        elif path == "/readyz":
            refusal = unready()
            if refusal is not None:
                await _refuse(send, refusal)
            else:
                await send_json(send, 200, b'{"status":"ready"}')
        else:
            what = "There are /metrics, /livez and /readyz here."
            await _refuse(send, Refusal(RefuseReason.PATH_UNKNOWN, what))

    return serve


async def _refuse(send: Send, refusal: Refusal) -> None:
    await send_json(send, refusal.status, refusal.body(), refusal.headers())
