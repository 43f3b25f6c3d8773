"""One control stream to one coordinator replica, from the proof of who is there to its end."""

import asyncio
import secrets
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio

from pdcoord.protocol.control import (
    CONTROL_VERSION,
    HEARTBEAT_S,
    LOST_S,
    MESSAGE_BYTES_MAX,
    METHOD,
    NONCE_BYTES,
    ControlError,
    ControlVersionError,
    CoordinatorHello,
    CoordinatorMessage,
    Events,
    SidecarHello,
    SidecarMessage,
    SidecarProof,
    Snapshot,
    Targets,
    coordinator_proof,
    is_proof,
    joined,
    sidecar_proof,
)
from pdcoord.protocol.control_codec import decode_notice, encode_report
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.paths import PathsReport
from sidecar.observe import Metrics
from sidecar.reports import Journal, PathNews, Reader

HANDSHAKE_S = 5.0
WRITE_S = LOST_S
FLUSH_S = 0.01
"""What happens within this is told in one message."""
PATHS_LOOK_S = 0.5
_CHANNEL_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),  # Else the backoff of one attempt would hold up the next.
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
)
_REFUSALS = {
    grpc.StatusCode.UNAUTHENTICATED: "refused",
    grpc.StatusCode.PERMISSION_DENIED: "refused",
    grpc.StatusCode.FAILED_PRECONDITION: "version",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "full",
    grpc.StatusCode.ALREADY_EXISTS: "replaced",
    grpc.StatusCode.UNIMPLEMENTED: "version",
}


class LinkFailedError(Exception):
    """A stream could not be had, or ended.

    Attributes:
        kind: unreachable, silent, broken, refused, version, full, files or replaced (another sidecar of the
            same address came), a label of metrics; or duplicate (the replica has a stream already).
    """

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail[:300])
        self.kind = kind

    @property
    def is_refusal(self) -> bool:
        """Whether trying again soon is of no use."""
        return self.kind in {"refused", "version", "full", "files", "replaced", "duplicate"}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a coordinator replica listens.

    Attributes:
        host: as it was asked for: what a certificate has to name.
    """

    address: HostPort
    host: str

    @property
    def target(self) -> str:
        """As gRPC names it."""
        return f"ipv6:{self.address}" if self.address.startswith("[") else f"ipv4:{self.address}"


@dataclass(frozen=True, slots=True)
class Credentials:
    """What the sides prove themselves with; files are read anew for each stream.

    Attributes:
        key: shared; empty for none.
        ca_file: of the coordinators' certificates; None for a stream in the clear.
    """

    key: bytes = b""
    ca_file: Path | None = None
    cert_file: Path | None = None
    cert_key_file: Path | None = None

    def channel(self) -> grpc.ChannelCredentials | None:
        """TLS credentials; None for none.

        Raises:
            LinkFailedError: if a file cannot be read.
        """
        if self.ca_file is None:
            return None
        files = (self.ca_file, self.cert_key_file, self.cert_file)
        try:
            roots, key, chain = (None if path is None else path.read_bytes() for path in files)
        except OSError as error:
            raise LinkFailedError("files", f"{error.filename} cannot be read: {error.strerror}") from error
        made: grpc.ChannelCredentials = grpc.ssl_channel_credentials(roots, key, chain)
        return made


@dataclass(frozen=True, slots=True)
class Source:
    """What every stream tells of.

    Attributes:
        wakers: set whenever the journal has something new.
        paths: what was probed; None where nothing is.
    """

    journal: Journal
    wakers: set[asyncio.Event]
    paths: Callable[[], PathsReport] | None
    metrics: Metrics
    now_s: Callable[[], float]


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this sidecar is."""

    name: str
    address: HostPort
    epoch: str


class Link:
    """One stream.

    Args:
        claim: whether this is to be the stream to that replica; asked once it has proved itself.
        on_targets: told of the replica and of each of its notices; the first says that the stream is up.

    Attributes:
        replica: as it calls itself; empty before it has proved itself.
        was_up: a notice has come: the coordinator takes what it is told.
    """

    def __init__(
        self,
        place: Place,
        credentials: Credentials,
        source: Source,
        *,
        identity: Identity,
        claim: Callable[[str], bool],
        on_targets: Callable[[str, Targets], None],
    ) -> None:
        self.replica = ""
        self.was_up = False
        self._place = place
        self._credentials = credentials
        self._source = source
        self._identity = identity
        self._claim = claim
        self._on_targets = on_targets
        self._parts: list[Targets] = []

    async def run(self) -> None:
        """Tell and listen until the stream ends.

        Raises:
            LinkFailedError: when it does; it never ends otherwise.
        """
        async with self._channel() as channel:
            call: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream(METHOD)()
            try:
                async with asyncio.timeout(HANDSHAKE_S):
                    await self._handshake(call)
            except TimeoutError as error:
                raise LinkFailedError("silent", f"no answer in {HANDSHAKE_S:g} s") from error
            try:
                raise await self._first_failure(self._tell(call), self._listen(call))
            finally:
                call.cancel()

    @staticmethod
    async def _first_failure(*parts: Coroutine[None, None, None]) -> LinkFailedError:
        """Run parts that end by failing until one has.

        None of them fails in the eyes of the group: Python 3.11's drops a cancellation from outside that
        comes in the same moment as a failure inside.
        """
        failures: list[LinkFailedError] = []

        async def run(part: Coroutine[None, None, None]) -> None:
            try:
                await part
            except LinkFailedError as error:
                failures.append(error)
                for task in tasks:
                    task.cancel()

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(run(part)) for part in parts]
        return failures[0]

    def _channel(self) -> grpc.aio.Channel:
        credentials = self._credentials.channel()
        options: list[tuple[str, str | int]] = list(_CHANNEL_OPTIONS)
        if credentials is None:
            return grpc.aio.insecure_channel(self._place.target, options)
        options.append(("grpc.ssl_target_name_override", self._place.host))
        return grpc.aio.secure_channel(self._place.target, credentials, options)

    async def _handshake(self, call: "grpc.aio.StreamStreamCall[bytes, bytes]") -> None:
        who, key = self._identity, self._credentials.key
        nonce = secrets.token_bytes(NONCE_BYTES)
        hello = SidecarHello(CONTROL_VERSION, who.name, who.address, who.epoch, nonce)
        await self._write(call, hello)
        answer = await self._read(call)
        if not isinstance(answer, CoordinatorHello):
            raise LinkFailedError("version", "its first message is no hello")
        if answer.version != CONTROL_VERSION:
            raise LinkFailedError("version", str(ControlVersionError(answer.version)))
        expected = coordinator_proof(key, hello, answer.nonce, answer.replica)
        if key and not is_proof(answer.proof, expected):
            raise LinkFailedError("refused", "it does not know the key of --control-key-file")
        if not self._claim(answer.replica):
            raise LinkFailedError("duplicate", f"there is a stream to {answer.replica} by another address")
        await self._write(call, SidecarProof(sidecar_proof(key, hello, answer)))
        self.replica = answer.replica
        # Not before it has taken us: a write to a stream that is being refused would hide why.
        self._take(await self._read(call))

    async def _tell(self, call: "grpc.aio.StreamStreamCall[bytes, bytes]") -> None:
        source = self._source
        reader, news, waker = Reader(source.journal), PathNews(), asyncio.Event()
        sent_s = looked_s = -HEARTBEAT_S
        source.wakers.add(waker)
        try:
            while True:
                now_s = source.now_s()
                message: SidecarMessage | None = reader.next(now_s)
                if message is None and source.paths is not None and now_s >= looked_s + PATHS_LOOK_S:
                    looked_s = now_s
                    message = news.news(source.paths())
                if message is None and now_s >= sent_s + HEARTBEAT_S:
                    message = Events()
                if message is not None:
                    self._count(message, reader)
                    await self._write(call, message)
                    sent_s = now_s
                    continue
                await _wait(waker)
        finally:
            source.wakers.discard(waker)

    def _count(self, message: SidecarMessage, reader: Reader) -> None:
        metrics = self._source.metrics
        match message:
            case Snapshot():
                metrics.count("control_snapshots")
                metrics.add("control_events", reader.take_lost(), "dropped")
            case Events(events):
                metrics.add("control_events", len(events), "sent")
            case _:
                pass

    async def _listen(self, call: "grpc.aio.StreamStreamCall[bytes, bytes]") -> None:
        while True:
            try:
                async with asyncio.timeout(LOST_S):
                    message = await self._read(call)
            except TimeoutError as error:
                raise LinkFailedError("silent", f"nothing heard for {LOST_S:g} s") from error
            self._take(message)

    def _take(self, message: CoordinatorMessage) -> None:
        if not isinstance(message, Targets):
            raise LinkFailedError("broken", "a second hello")
        self._parts.append(message)
        try:
            told = joined(self._parts)
        except ControlError as error:
            raise LinkFailedError("broken", str(error)) from error
        if told is not None:
            self._parts.clear()
            self.was_up = True
            self._on_targets(self.replica, told)

    async def _write(self, call: "grpc.aio.StreamStreamCall[bytes, bytes]", message: SidecarMessage) -> None:
        """Send one message; a replica that does not read holds up nothing but this stream."""
        try:
            for part in encode_report(message):
                async with asyncio.timeout(WRITE_S):
                    await call.write(part)
        except TimeoutError as error:
            raise LinkFailedError("silent", f"it took nothing in for {WRITE_S:g} s") from error
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError) as error:
            # A write to a stream that has ended fails with INTERNAL, whatever it ended with.
            raise await _ended(call) from error

    async def _read(self, call: "grpc.aio.StreamStreamCall[bytes, bytes]") -> CoordinatorMessage:
        try:
            raw = await call.read()
        except grpc.aio.AioRpcError as error:
            raise _failure(error.code(), error.details()) from error
        if not isinstance(raw, bytes):
            raise await _ended(call)
        try:
            return decode_notice(raw)
        except ControlError as error:
            raise LinkFailedError("broken", str(error)) from error


async def _wait(waker: asyncio.Event) -> None:
    """Until there is something new, at most until paths are looked at again."""
    waker.clear()
    try:
        async with asyncio.timeout(PATHS_LOOK_S):
            await waker.wait()
    except TimeoutError:
        return
    await asyncio.sleep(FLUSH_S)


async def _ended(call: "grpc.aio.StreamStreamCall[bytes, bytes]") -> LinkFailedError:
    """Why a stream that has ended did."""
    try:
        async with asyncio.timeout(WRITE_S):
            code, detail = await call.code(), await call.details()
    except TimeoutError:
        return LinkFailedError("broken", "it ended without a status")
    return _failure(code, detail)


def _failure(code: grpc.StatusCode, detail: str | None) -> LinkFailedError:
    kind = "unreachable" if code is grpc.StatusCode.UNAVAILABLE else _REFUSALS.get(code, "broken")
    return LinkFailedError(kind, f"{code.name}: {detail}")
