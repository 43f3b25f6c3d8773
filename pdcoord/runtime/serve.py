"""`pdcoord serve`: the gateway before a coordinator."""

import time
import uuid
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime

from pdcoord.gateway.app import GatewayApp
from pdcoord.gateway.arrival import Door
from pdcoord.gateway.relay import Relay
from pdcoord.runtime.observe import Telemetry
from pdcoord.runtime.process import Backstage, run_process, url_of
from pdcoord.runtime.settings import GatewaySettings
from pdcoord.wire.server import Listener
from pdcoord.wire.tls import ServerTls


def serve(settings: GatewaySettings) -> int:
    """Run the gateway until SIGTERM or SIGINT; the exit status: 0 stopped as asked, 2 not started."""
    return run_process(settings, GatewayFront(settings))


class GatewayFront:
    """OpenAI calls over HTTP, relayed by this process."""

    command = "pdcoord serve"

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._tls: ServerTls | None = None

    def listeners(self, stage: Backstage) -> Sequence[Listener]:
        """The front door."""
        plan_keys = stage.secured.plan_keys
        relay = Relay(
            door=Door(stage.loop, stage.gate, self._settings.limits(), stage.tokens),
            upstream=stage.client,
            observer=Telemetry(stage.metrics, stage.log),
            clock=time.monotonic,
            new_id=lambda: uuid.uuid4().hex,
            sign=plan_keys.headers if plan_keys is not None else None,
            tracing=stage.tracing,
        )
        created = int(datetime.now(UTC).timestamp())
        app = GatewayApp(relay, metrics=stage.metrics.render, created_unix_s=created)
        self._tls = stage.secured.listener
        return [
            Listener(
                app,
                self._settings.host,
                self._settings.port,
                self._tls,
                is_leaving=lambda: stage.loop.is_draining,
            )
        ]

    def services(self, _stage: Backstage) -> Sequence[AbstractAsyncContextManager[object]]:
        """None: everything comes by HTTP."""
        return ()

    def addresses(self, ports: Sequence[int]) -> dict[str, str]:
        """The front door's URL."""
        return {"url": url_of(self._tls, self._settings.host, ports[0])}
