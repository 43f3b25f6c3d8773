"""The least that pdcoord.wire allows between two sockets: a raw ASGI relay that decides nothing."""

import argparse
import asyncio

from pdcoord.protocol.headers import HostPort, format_host_port
from pdcoord.wire.asgi import Receive, Scope, Send, read_body, send_head, watch_disconnect
from pdcoord.wire.client import Client
from pdcoord.wire.heads import end_to_end
from pdcoord.wire.relay import relay_body
from pdcoord.wire.server import Listener, run, serve, stop_on_signals

_IDLE_TIMEOUT_S = 60.0


class Relay:
    def __init__(self, client: Client, upstream: HostPort) -> None:
        self._client = client
        self._upstream = upstream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_body(receive, bytes_max=1 << 20, timeout_s=30.0)
        async with asyncio.TaskGroup() as group:
            pump = group.create_task(self._pump(scope, send, body))
            await watch_disconnect(receive)
            pump.cancel()

    async def _pump(self, scope: Scope, send: Send, body: bytes) -> None:
        response = await self._client.request(
            scope["method"],
            self._upstream,
            scope["path"],
            headers=scope["headers"],
            body=body,
            head_timeout_s=30.0,
        )
        async with response:
            await send_head(send, response.status, end_to_end(response.headers))
            await relay_body(scope, send, response, idle_timeout_s=_IDLE_TIMEOUT_S)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def main(upstream_port: int) -> int:
    stop = stop_on_signals()
    async with Client() as client:
        app = Relay(client, format_host_port("127.0.0.1", upstream_port))
        await serve(
            [Listener(app)],
            stop=stop,
            drain_s=0.0,
            on_started=lambda ports: print("ready", ports[0], flush=True),
        )
    return 0


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--upstream-port", type=int, required=True)
    raise SystemExit(run(main(arguments.parse_args().upstream_port)))
