"""The floor to compare with: bytes from socket to socket on uvloop, nothing parsed."""

import argparse
import asyncio
import contextlib
from typing import cast

import uvloop


class Half(asyncio.Protocol):
    """One side of a pair; what it reads is written to the other."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.other: Half | None = None
        self.early: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.write(data)
        else:
            self.early.append(data)

    def pause_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.resume_reading()

    def connection_lost(self, _exc: Exception | None) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()
        self.transport = None


async def main(upstream_port: int) -> None:
    loop = asyncio.get_running_loop()

    async with asyncio.TaskGroup() as group:

        class Front(Half):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                super().connection_made(transport)
                group.create_task(self.dial())

            async def dial(self) -> None:
                async with asyncio.timeout(3.0):
                    _, back = await loop.create_connection(Half, "127.0.0.1", upstream_port)
                self.other, back.other = back, self
                if back.transport is not None:
                    back.transport.writelines(self.early)
                    if self.transport is None:
                        back.transport.close()

        server = await loop.create_server(Front, "127.0.0.1", 0, backlog=1_024)
        print("ready", server.sockets[0].getsockname()[1], flush=True)
        async with server:
            await server.serve_forever()


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--upstream-port", type=int, required=True)
    options = arguments.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(main(options.upstream_port))
