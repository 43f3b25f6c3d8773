"""One connection of the side channel: the handshake, frames both ways, signs of life, and its end.

A link belongs to the event loop that opened it. It ends once, for whatever reason, and says why.
"""

import asyncio
import contextlib
import ipaddress
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from transfer.errors import Failure, FailureKind, FrameError, LayoutError, NotAuthenticatedError
from transfer.layout import RankLayout
from transfer.session.bounds import NONCE_BYTES
from transfer.session.frames import Channel
from transfer.session.messages import VERSION, Admission, Hello, Message, Refusal, Renewal, Welcome
from transfer.session.wire import rank_layout_from_wire

READ_BYTES = 64 << 10
MISSED_MAX = 3
"""A peer that is silent for this many heartbeats is gone."""
LAST_WORDS_S = 1.0


class LinkError(Exception):
    """A connection could not be made, or is over.

    Attributes:
        failure: what transfers that need it end with.
    """

    def __init__(self, kind: FailureKind, detail: str = "") -> None:
        self.failure = Failure(kind, detail)
        super().__init__(str(self.failure))


@dataclass(frozen=True, slots=True)
class LinkLimits:
    """Bounds of every link; see the fields of the same name in AgentSettings."""

    heartbeat_s: float
    handshake_timeout_s: float
    out_bytes_max: int


@dataclass(frozen=True, slots=True)
class Peer:
    """What the other side told of itself.

    Attributes:
        layout: None of a sidecar.
        ranks: side channel addresses of its engine's ranks; empty of a dialling side.
        backend: that both sides use; empty with a sidecar.
        verdict: kind and reason, as the dialled side judges the pair.
    """

    engine_id: str
    epoch: str
    layout: RankLayout | None
    ranks: tuple[str, ...] = ()
    backend: str = ""
    metadata: bytes = b""
    staging_bytes: int = 0
    verdict: tuple[str, str] = ("", "")


class Link:
    """A connection whose handshake is done; `run` it until it ends.

    Attributes:
        id: names the connection; new at every connect.
        host: the peer's address.
        failure: why it ended; None while it lives.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        channel: Channel,
        peer: Peer,
        limits: LinkLimits,
    ) -> None:
        """Take over a connection on which nothing waits to be heard."""
        self.id = secrets.token_hex(8)
        self.peer = peer
        self.host = str((writer.get_extra_info("peername") or ("",))[0])
        self.failure: Failure | None = None
        self._reader = reader
        self._writer = writer
        self._channel = channel
        self._limits = limits
        self._over = asyncio.Event()
        self._heard_count = 0
        self._sent_bytes = 0

    @property
    def is_open(self) -> bool:
        return self.failure is None

    def send(self, message: Message) -> None:
        """Send a message; what is sent on a link that is over is lost, as its end has been told."""
        if not self.is_open:
            return
        try:
            frame = self._channel.encode(message)
        except FrameError as error:
            self.end(FailureKind.MALFORMED, str(error))
            return
        if self._unsent_bytes + len(frame) > self._limits.out_bytes_max:
            self.end(FailureKind.OVERLOADED, "the peer does not read the side channel")
            return
        self._sent_bytes += len(frame)
        self._writer.write(frame)

    @property
    def _unsent_bytes(self) -> int:
        return self._writer.transport.get_write_buffer_size()

    def end(self, kind: FailureKind, detail: str = "") -> None:
        """Close the connection; the first reason stays."""
        if self.failure is None:
            self.failure = Failure(kind, detail)
            self._over.set()

    async def run(self, hear: Callable[[Message], None]) -> Failure:
        """Pass on what the peer says until the link ends; return why it did."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._read(hear)), group.create_task(self._beat())]
            try:
                await self._over.wait()
            finally:
                for task in tasks:
                    task.cancel()
                self.end(FailureKind.CLOSED)
                await close_writer(self._writer)
        assert self.failure is not None, "a link that ended has a reason"
        return self.failure

    async def _read(self, hear: Callable[[Message], None]) -> None:
        try:
            while self.is_open:
                # `_beat` bounds this wait: a timeout around each read would cost more than the read.
                data = await self._reader.read(READ_BYTES)
                if not data:  # Perhaps inside a frame: so a process ends that is killed.
                    self.end(FailureKind.PEER_LOST, "the peer closed the side channel")
                    return
                self._heard_count += 1
                for message in self._channel.feed(data):
                    hear(message)
        except NotAuthenticatedError as error:
            self.end(FailureKind.NOT_AUTHENTICATED, str(error))
        except FrameError as error:
            self.end(FailureKind.MALFORMED, str(error))
        except OSError as error:
            self.end(
                FailureKind.PEER_LOST, f"the side channel broke: {error.strerror or type(error).__name__}"
            )

    async def _beat(self) -> None:
        """Give signs of life, and end the link of a peer that gives none or takes nothing."""
        silent_count = stuck_count = heard_count = taken_bytes = 0
        while self.is_open:
            await asyncio.sleep(self._limits.heartbeat_s)
            silent_count = silent_count + 1 if heard_count == self._heard_count else 0
            heard_count = self._heard_count
            taken = self._sent_bytes - self._unsent_bytes
            stuck_count = stuck_count + 1 if self._unsent_bytes and taken == taken_bytes else 0
            taken_bytes = taken
            if silent_count >= MISSED_MAX:
                self.end(FailureKind.PEER_LOST, f"the peer was silent for {MISSED_MAX} heartbeats")
            elif stuck_count >= MISSED_MAX:
                self.end(FailureKind.PEER_LOST, "the peer does not read the side channel")
            else:
                self.send(Renewal(transfers=()))


async def close_writer(writer: asyncio.StreamWriter) -> None:
    """Close a connection once what was said is sent, but wait for no peer that does not read."""
    writer.close()
    try:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                await writer.wait_closed()
    finally:
        writer.transport.abort()


async def receive_one(reader: asyncio.StreamReader, channel: Channel) -> Message:
    """The peer's next message; nothing but signs of life may come behind it yet.

    Raises:
        LinkError: if it closes first.
        FrameError: if its bytes are not what should come.
    """
    while True:
        data = await reader.read(READ_BYTES)
        if not data:
            raise LinkError(FailureKind.PEER_LOST, "the peer closed the side channel in the handshake")
        messages = channel.feed(data)
        if any(not isinstance(behind, Renewal) for behind in messages[1:]):
            raise FrameError("more than one message came in the handshake")
        if messages:
            return messages[0]


async def dial(address: str, hello: Hello, key: bytes, limits: LinkLimits) -> Link:
    """Connect a side channel and be welcomed.

    Args:
        hello: its nonce is replaced by a fresh one.

    Raises:
        LinkError: whatever went wrong, in the words of a transfer's failure.
    """
    host, port = split_address(address)
    try:
        async with asyncio.timeout(limits.handshake_timeout_s):
            reader, writer = await asyncio.open_connection(host, port)
    except TimeoutError:
        raise LinkError(
            FailureKind.UNREACHABLE,
            f"{address} did not accept a connection in {limits.handshake_timeout_s:g} s",
        ) from None
    except (OSError, UnicodeError, ValueError) as error:
        detail = getattr(error, "strerror", None) or type(error).__name__
        raise LinkError(FailureKind.UNREACHABLE, f"{address}: {detail}") from None
    link = None
    try:
        async with asyncio.timeout(limits.handshake_timeout_s):
            link = await _greet(address, reader, writer, hello, (key, limits))
    except (TimeoutError, FrameError, LayoutError, OSError) as error:
        raise _as_link_error(address, error) from None
    finally:
        if link is None:
            writer.close()
    return link


def _as_link_error(address: str, error: Exception) -> LinkError:
    """What a handshake's exception means to a transfer."""
    match error:
        case TimeoutError():  # An OSError too.
            return LinkError(FailureKind.HANDSHAKE_TIMEOUT, f"{address} accepted and did not answer")
        case NotAuthenticatedError():
            return LinkError(FailureKind.NOT_AUTHENTICATED, f"{address}: {error}")
        case OSError():
            return LinkError(FailureKind.PEER_LOST, f"{address}: {error.strerror or type(error).__name__}")
        case _:
            return LinkError(FailureKind.MALFORMED, f"{address}: {error}")


async def _greet(
    address: str,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    hello: Hello,
    means: tuple[bytes, LinkLimits],
) -> Link:
    key, limits = means
    nonce = secrets.token_bytes(NONCE_BYTES)
    channel = Channel(key, nonce, is_dialler=True)
    writer.write(
        channel.encode(
            Hello(
                version=hello.version,
                nonce=nonce,
                engine_id=hello.engine_id,
                epoch=hello.epoch,
                layout=hello.layout,
                backends=hello.backends,
                host=hello.host,
            )
        )
    )
    await writer.drain()
    answer = await receive_one(reader, channel)
    if isinstance(answer, Refusal):
        raise LinkError(answer.kind, f"{address} refuses: {answer.detail}")
    assert isinstance(answer, Welcome), "the channel lets nothing else through"
    if answer.version != VERSION:
        raise LinkError(
            FailureKind.VERSION_MISMATCH, f"{address} speaks version {answer.version}, this side {VERSION}"
        )
    # Signed with this session's key, which a recorded Hello does not give.
    writer.write(channel.encode(Renewal(transfers=())))
    await writer.drain()
    admission = await receive_one(reader, channel)
    if not isinstance(admission, Admission):
        raise LinkError(FailureKind.MALFORMED, f"{address} answered with {type(admission).__name__}")
    peer = Peer(
        engine_id=answer.engine_id,
        epoch=answer.epoch,
        layout=rank_layout_from_wire(answer.layout),
        ranks=answer.ranks,
        backend=answer.backend,
        metadata=admission.metadata,
        staging_bytes=answer.staging_bytes,
        verdict=answer.verdict,
    )
    if peer.layout is not None and peer.layout.rank != answer.rank:
        raise LinkError(FailureKind.MALFORMED, f"{address} tells of two ranks at once")
    return Link(reader, writer, channel, peer, limits)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port`, an IPv6 host in brackets or not.

    Raises:
        LinkError: if it is none.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port[:6]) <= 65_535:
        raise LinkError(FailureKind.UNREACHABLE, f"{address[:100]!r} is not host:port")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether an address is this host's own and nobody else's; names are, if they are `localhost`."""
    try:
        found = ipaddress.ip_address(host.partition("%")[0].strip("[]"))
    except ValueError:
        return host.lower() in {"localhost", "localhost.localdomain"}
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_loopback


def is_wildcard(host: str) -> bool:
    """Whether this names no host at all, but all addresses of one, or nothing."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_unspecified
    except ValueError:
        return not host


def is_dialable(host: str) -> bool:
    """Whether peers on other hosts can dial this advertised address."""
    return not is_wildcard(host) and not is_loopback(host)
