"""The dialled side of the side channel: who may come in, and what they are told."""

import asyncio
import logging
import secrets
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from transfer.backends.base import Backend
from transfer.errors import (
    BackendError,
    FailureKind,
    FrameError,
    LayoutError,
    NotAuthenticatedError,
    SettingError,
)
from transfer.layout import RankLayout
from transfer.links import (
    LAST_WORDS_S,
    Link,
    LinkError,
    LinkLimits,
    Peer,
    close_writer,
    is_dialable,
    is_loopback,
    receive_one,
)
from transfer.session.bounds import NONCE_BYTES
from transfer.session.frames import Channel
from transfer.session.messages import VERSION, Admission, Hello, Message, Refusal, Renewal, Welcome
from transfer.session.wire import rank_layout_from_wire, rank_layout_to_wire
from transfer.verdict import judge_ranks

_log = logging.getLogger("pdcoord.transfer")


@dataclass(frozen=True, slots=True)
class Identity:
    """One life of one engine's transfer side.

    Attributes:
        engine_id: the engine's own name for itself.
        epoch: new at every start of the engine, the same on all of its ranks.
    """

    engine_id: str
    epoch: str


@dataclass(frozen=True, slots=True)
class House:
    """What a door tells of the rank behind it.

    Attributes:
        advertise_host: address that peers are told to dial.
        staging_bytes: size of the staging buffer.
        ranks_of: side channel addresses of all ranks of the engine, as far as they are known.
    """

    identity: Identity
    layout: RankLayout
    backends: Mapping[str, Backend]
    advertise_host: str
    staging_bytes: int
    ranks_of: Callable[[], tuple[str, ...]]


STRANGERS_MAX = 64
"""Connections beyond `connections_max` that are still told so; any more are closed unheard."""


_ACCEPT_TURNS = 8
"""Turns of the event loop until a connection that was just accepted is certain to have met `come_in`."""


class Door:
    """Listens, greets, and passes links on; at most `connections_max` at a time."""

    def __init__(self, house: House, key: bytes, limits: LinkLimits, connections_max: int) -> None:
        self._house = house
        self._key = key
        self._limits = limits
        self._connections_max = connections_max
        self._count = 0
        self._is_closing = False
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    async def open(self, host: str, port: int, serve: Callable[[Link], Coroutine[Any, Any, None]]) -> None:
        """Listen; `serve` runs each link to its end.

        Raises:
            SettingError: if the address cannot be listened on.
        """

        async def come_in(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if self._is_closing or self._count >= self._connections_max + STRANGERS_MAX:
                writer.transport.abort()
                return
            task = asyncio.current_task()
            assert task is not None, "runs in a task"
            self._tasks.add(task)
            self._count += 1
            try:
                link = await self._greet(reader, writer)
                if link is not None:
                    await serve(link)
            except asyncio.CancelledError:
                pass  # The door closes; a cancelled handler would only be reported by the server.
            finally:
                self._tasks.discard(task)
                self._count -= 1
                writer.transport.abort()  # Whoever ended it has sent what was to be sent.

        try:
            self._server = await asyncio.start_server(come_in, host, port)
        except (OSError, UnicodeError) as error:
            detail = getattr(error, "strerror", None) or type(error).__name__
            remedy = f"cannot be listened on ({detail}): give a free port, or 0 for any"
            raise SettingError("port", f"{host}:{port}", remedy) from error
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Let nobody in any more, and end the handshakes and links that are under way."""
        self._is_closing = True
        if self._server is not None:
            self._server.close()
            self._server = None
            for _ in range(_ACCEPT_TURNS):
                await asyncio.sleep(0)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=2 * LAST_WORDS_S)

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Link | None:
        """A link if the peer is let in; None once it has been told why not."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        channel = Channel(self._key, nonce, is_dialler=False)
        host = str((writer.get_extra_info("peername") or ("?",))[0])
        try:
            async with asyncio.timeout(self._limits.handshake_timeout_s):
                hello = await receive_one(reader, channel)
                assert isinstance(hello, Hello), "the channel lets nothing else through"
                peer, welcome = self._judge(hello, nonce, host)
                writer.write(channel.encode(welcome))
                await writer.drain()
                await self._admit(reader, writer, channel, peer.backend)
        except LinkError as error:
            await self._refuse(writer, channel, error.failure.kind, error.failure.detail)
        except NotAuthenticatedError as error:
            await self._refuse(writer, channel, FailureKind.NOT_AUTHENTICATED, str(error))
        except (FrameError, LayoutError) as error:
            await self._refuse(writer, channel, FailureKind.MALFORMED, str(error))
        except BackendError as error:
            await self._refuse(writer, channel, FailureKind.UNREACHABLE, str(error))
        except (TimeoutError, OSError):
            await close_writer(writer)
        else:
            return Link(reader, writer, channel, peer, self._limits)
        return None

    async def _admit(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, channel: Channel, backend: str
    ) -> None:
        """Open the staging buffer to a peer that has proved itself in this session."""
        first = await receive_one(reader, channel)
        if not isinstance(first, Renewal):
            raise FrameError(f"a {type(first).__name__} before the first Renewal")
        metadata = self._house.backends[backend].metadata() if backend else b""
        writer.write(channel.encode(Admission(metadata=metadata)))
        await writer.drain()

    async def _refuse(
        self, writer: asyncio.StreamWriter, channel: Channel, kind: FailureKind, detail: str
    ) -> None:
        _log.info("side channel refused: %s: %s", kind, detail)
        try:
            writer.write(channel.encode(Refusal(kind=kind, detail=detail[:1000])))
            async with asyncio.timeout(self._limits.handshake_timeout_s):
                await writer.drain()
        except (OSError, TimeoutError, FrameError):
            pass  # It does not listen either.
        await close_writer(writer)

    def _judge(self, hello: Hello, nonce: bytes, host: str) -> tuple[Peer, Message]:
        """Who the peer is and what it is told.

        Raises:
            LinkError: if it is not let in.
            LayoutError: if its layout is none.
        """
        house = self._house
        if self._count > self._connections_max:
            raise LinkError(FailureKind.OVERLOADED, f"{self._connections_max} peers are connected")
        if hello.version != VERSION:
            raise LinkError(
                FailureKind.VERSION_MISMATCH, f"this side speaks version {VERSION}, not {hello.version}"
            )
        if not is_loopback(host) and not is_dialable(house.advertise_host):
            raise LinkError(
                FailureKind.UNREACHABLE,
                f"advertise_host is {house.advertise_host!r}, which no other host can dial: "
                "set it to this host's address on the KV network",
            )
        layout, verdict, backend = None, ("", ""), ""
        if hello.layout is not None:
            layout = rank_layout_from_wire(hello.layout)
            found = judge_ranks(house.layout, layout)
            if not found.is_possible:
                raise LinkError(FailureKind.IMPOSSIBLE_LAYOUT, found.reason)
            verdict = (str(found.kind), found.reason[:1000])
            backend = self._common(hello)
        ranks = house.ranks_of()
        peer = Peer(hello.engine_id, hello.epoch, layout, backend=backend, verdict=verdict)
        return peer, Welcome(
            version=VERSION,
            nonce=nonce,
            engine_id=house.identity.engine_id,
            epoch=house.identity.epoch,
            rank=house.layout.rank,
            ranks=ranks,
            layout=rank_layout_to_wire(house.layout),
            backend=backend,
            staging_bytes=house.staging_bytes,
            verdict=verdict,
            heartbeat_s=self._limits.heartbeat_s,
        )

    def _common(self, hello: Hello) -> str:
        """The first backend of the peer's that this side has too."""
        for name, _ in hello.backends:
            if name in self._house.backends:
                return name
        theirs = ", ".join(name for name, _ in hello.backends) or "none"
        raise LinkError(
            FailureKind.UNREACHABLE,
            f"no backend in common: this side has {', '.join(self._house.backends)}, the peer {theirs}",
        )
