"""The gRPC server of the control stream: who may come in, and the pace of each stream."""

import asyncio
import secrets
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc
import grpc.aio
from structlog.typing import FilteringBoundLogger

from pdcoord.feeds.reports import NOTICE_S, STREAMS_MAX, ReportsFeed, Session, TooManyStreamsError
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
    SidecarHello,
    SidecarMessage,
    SidecarProof,
    coordinator_proof,
    is_proof,
    sidecar_proof,
)
from pdcoord.protocol.control_codec import decode_report, encode_notice
from pdcoord.protocol.headers import format_host_port, parse_host_port
from pdcoord.wire.validity import Validity, validity_of
from transfer.errors import SettingError
from transfer.settings import read_key_file

REFUSALS = ("version", "key", "malformed", "silent", "full", "replaced")
HANDSHAKES_MAX = 256
"""Streams beside STREAMS_MAX that may be proving themselves; gRPC turns away more."""
HANDSHAKE_S = 5.0
WRITE_S = LOST_S
_Context = Any
"""grpc.aio's context of a stream of bytes: its read and write are not in the stubs' signature of bytes."""

_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.so_reuseport", 0),  # Else a second process would share the port, and each see half.
)


@dataclass(frozen=True, slots=True)
class ControlSettings:
    """Where control streams are served, and who may open one.

    Attributes:
        replica: this process, as its plans name it.
        key_file: with the key that is shared with sidecars; None for none.
        cert_file, cert_key_file: with them streams are encrypted; read again when they change.
        ca_file: with it sidecars need a certificate that it has signed.
    """

    host: str
    port: int
    replica: str
    key_file: Path | None = None
    cert_file: Path | None = None
    cert_key_file: Path | None = None
    ca_file: Path | None = None


class _RefusedError(Exception):
    """Ends a stream with a status.

    Attributes:
        why: one of REFUSALS; a label of metrics.
    """

    def __init__(self, code: grpc.StatusCode, why: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.why = why


class _GoneError(Exception):
    """The sidecar is not there any more."""


class ControlServer:
    """Serves control streams while it is entered.

    Attributes:
        port: where it listens.
        refused: streams that were turned away or cut, by why.
    """

    def __init__(self, settings: ControlSettings, feed: ReportsFeed, log: FilteringBoundLogger) -> None:
        self.port = 0
        self.refused: Counter[str] = Counter()
        self._settings = settings
        self._feed = feed
        self._log = log
        self._key = b""
        self._server: grpc.aio.Server | None = None
        self._files: _Files | None = None

    def certificate_validity(self) -> Validity | None:
        """Of the certificate in force; None for streams in clear, and before it is entered."""
        return None if self._files is None else self._files.validity

    async def __aenter__(self) -> Self:
        """Listen.

        Raises:
            OSError: if the address cannot be listened on, or a file cannot be read.
        """
        settings = self._settings
        self._key = _read_key(settings.key_file)
        server = grpc.aio.server(options=list(_OPTIONS), maximum_concurrent_rpcs=STREAMS_MAX + HANDSHAKES_MAX)
        service, _, method = METHOD.removeprefix("/").partition("/")
        handler: Any = grpc.stream_stream_rpc_method_handler(self._serve)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        address = format_host_port(settings.host, settings.port)
        self._files = _certificate_files(settings)
        credentials = None if self._files is None else self._files.credentials()
        try:
            if credentials is None:
                self.port = server.add_insecure_port(address)
            else:
                self.port = server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address} for control streams: {error}") from error
        await server.start()
        self._server = server
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop at once: sidecars go on with the other replicas."""
        if self._server is not None:
            await self._server.stop(grace=None)

    async def _serve(self, _requests: object, context: _Context) -> None:
        """One stream from its first message to its end."""
        try:
            await self._run(context)
        except _GoneError:
            return
        except _RefusedError as error:
            self.refused[error.why] += 1
            self._log.warning("control.refused", peer=context.peer(), why=error.why, detail=str(error))
            await context.abort(error.code, str(error))

    async def _run(self, context: _Context) -> None:
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                hello = await self._greet(context)
        except TimeoutError as error:
            message = f"no proof came in {HANDSHAKE_S:g} s"
            raise _RefusedError(grpc.StatusCode.DEADLINE_EXCEEDED, "silent", message) from error
        if hello is None:
            return
        try:
            session = self._feed.open(hello)
        except TooManyStreamsError as error:
            raise _RefusedError(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", str(error)) from error
        try:
            async with asyncio.TaskGroup() as group:
                teller = group.create_task(self._tell(context, session))
                await self._hear(context, session)
                teller.cancel()
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        finally:
            self._feed.close(session)

    async def _greet(self, context: _Context) -> SidecarHello | None:
        """Both sides prove themselves; None if the sidecar left meanwhile."""
        settings = self._settings
        hello = await _read(context)
        if hello is None:
            return None
        if not isinstance(hello, SidecarHello):
            raise _malformed("the first message is no hello")
        if hello.version != CONTROL_VERSION:
            error = ControlVersionError(hello.version)
            raise _RefusedError(grpc.StatusCode.FAILED_PRECONDITION, "version", str(error))
        try:
            parse_host_port(hello.address)
        except ValueError as error:
            raise _malformed(f"the sidecar's address {error}") from error
        nonce = secrets.token_bytes(NONCE_BYTES)
        proof = coordinator_proof(self._key, hello, nonce, settings.replica)
        answer = CoordinatorHello(CONTROL_VERSION, settings.replica, nonce, proof)
        await _write(context, answer)
        proved = await _read(context)
        if proved is None:
            return None
        expected = sidecar_proof(self._key, hello, answer)
        is_proved = isinstance(proved, SidecarProof) and (not self._key or is_proof(proved.proof, expected))
        if not is_proved:
            message = (
                "the sidecar does not know the key; give it --control-key-file with the coordinators' key"
            )
            raise _RefusedError(grpc.StatusCode.UNAUTHENTICATED, "key", message)
        return hello

    async def _hear(self, context: _Context, session: Session) -> None:
        while True:
            try:
                async with asyncio.timeout(LOST_S):
                    message = await _read(context)
            except TimeoutError as error:
                heard = f"nothing heard for {LOST_S:g} s"
                raise _RefusedError(grpc.StatusCode.DEADLINE_EXCEEDED, "silent", heard) from error
            if message is None:
                return
            if isinstance(message, SidecarHello | SidecarProof):
                raise _malformed("a second hello")
            try:
                self._feed.hear(session, message)
            except ControlError as error:
                raise _malformed(str(error)) from error

    async def _tell(self, context: _Context, session: Session) -> None:
        while True:
            session.has_news.clear()
            if session.is_replaced:
                message = (
                    f"another sidecar has come as {session.address}; give each its own --control-address, "
                    "unless it is this one started again"
                )
                raise _RefusedError(grpc.StatusCode.ALREADY_EXISTS, "replaced", message)
            notice = self._feed.notice(session)
            if notice is not None:
                try:
                    await _write(context, notice)
                except TimeoutError as error:
                    message = f"the sidecar took nothing in for {WRITE_S:g} s"
                    raise _RefusedError(grpc.StatusCode.DEADLINE_EXCEEDED, "silent", message) from error
                await asyncio.sleep(NOTICE_S)
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    await session.has_news.wait()
            except TimeoutError:
                continue


def _read_key(path: Path | None) -> bytes:
    try:
        return b"" if path is None else read_key_file(str(path))
    except SettingError as error:
        raise OSError(f"the control stream's key file {path}: {error.remedy}") from error


def _malformed(message: str) -> _RefusedError:
    return _RefusedError(grpc.StatusCode.INVALID_ARGUMENT, "malformed", message)


async def _read(context: _Context) -> SidecarMessage | None:
    """The next message; None when the sidecar has ended the stream."""
    try:
        raw = await context.read()
    except grpc.aio.BaseError as error:
        raise _GoneError from error
    if not isinstance(raw, bytes):
        return None
    try:
        return decode_report(raw)
    except ControlError as error:
        raise _malformed(str(error)) from error


async def _write(context: _Context, message: CoordinatorMessage) -> None:
    try:
        for part in encode_notice(message):
            async with asyncio.timeout(WRITE_S):
                await context.write(part)
    except grpc.aio.BaseError as error:
        raise _GoneError from error


def _certificate_files(settings: ControlSettings) -> "_Files | None":
    """None for streams in clear."""
    if settings.cert_file is None or settings.cert_key_file is None:
        return None
    return _Files(settings.cert_file, settings.cert_key_file, settings.ca_file)


class _Files:
    """Certificate files that may be replaced while the process runs.

    Attributes:
        validity: of the certificate that was read last; None if it has no dates that could be read.
    """

    def __init__(self, cert: Path, key: Path, ca: Path | None) -> None:
        self._cert, self._key, self._ca = cert, key, ca
        self._read: tuple[bytes, ...] = ()
        self.validity: Validity | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """TLS with files that are looked at again for every new connection.

        Raises:
            OSError: if a file cannot be read.
        """
        fetch: Any = self.changed  # None says that nothing has changed; the stubs do not know that.
        return grpc.dynamic_ssl_server_credentials(
            self.configuration(), fetch, require_client_authentication=self._ca is not None
        )

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        """What they hold now.

        Raises:
            OSError: if one cannot be read.
        """
        self._read = self._contents()
        key, chain, *roots = self._read
        try:
            self.validity = validity_of(chain)
        except ValueError:
            self.validity = None
        return grpc.ssl_server_certificate_configuration([(key, chain)], roots[0] if roots else None)

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """What they hold now if that is something else; None too while they are half written or missing."""
        try:
            return None if self._contents() == self._read else self.configuration()
        except OSError:
            return None

    def _contents(self) -> tuple[bytes, ...]:
        files = (self._key, self._cert, *([] if self._ca is None else [self._ca]))
        return tuple(file.read_bytes() for file in files)
