"""A gRPC server on one address: bounds, TLS with certificates that may change, and a drain."""

import asyncio
import errno
import ipaddress
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc import aio

from pdcoord.wire.validity import Validity, validity_of

CERT_FILE, KEY_FILE = "tls.crt", "tls.key"
"""Names in a certificate's folder, as in a Kubernetes Secret of type kubernetes.io/tls."""

_OWN_VALID_DAYS = 3_650
_MESSAGE_SLACK_BYTES = 1 << 20
"""What a message holds beside a body: headers, which Envoy bounds at 60 KiB, metadata, attributes."""
_PING_INTERVAL_MS_MIN = 5_000
_END_S_MAX = 1.0


class CertificateError(OSError):
    """The certificate or its key cannot be used."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen; port 0 lets the kernel pick one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def self_signed() -> tuple[bytes, bytes]:
    """A key and a certificate of its own, in PEM, for clients that do not verify.

    Gateways do not verify a picker's certificate unless they are told to (endpoint-picker protocol 1.0.0).
    """
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pdcoord-extproc")])
    now = datetime.now(UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.IPv4Address("127.0.0.1"))]
    builder = x509.CertificateBuilder(
        issuer_name=name,
        subject_name=name,
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=now - timedelta(hours=1),
        not_valid_after=now + timedelta(days=_OWN_VALID_DAYS),
    ).add_extension(x509.SubjectAlternativeName(names), critical=False)
    certificate = builder.sign(key, hashes.SHA256())
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return key_pem, certificate.public_bytes(serialization.Encoding.PEM)


@dataclass(frozen=True, slots=True)
class _Read:
    """What the files held, in PEM.

    Attributes:
        client_ca: None where clients need no certificate.
    """

    key: bytes
    chain: bytes
    client_ca: bytes | None

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(self.key, self.chain)], self.client_ca)


class Certificates:
    """A certificate's folder and who signs clients' certificates, looked at again at each handshake.

    What cannot be read or does not fit together is left alone: what was good last stays in force.
    """

    def __init__(self, folder: Path | None, client_ca: Path | None = None) -> None:
        """Reads the files.

        Args:
            folder: None for a certificate of its own, made now.
            client_ca: with it a client needs a certificate for clients that it has signed.

        Raises:
            OSError: if a file cannot be used.
        """
        self._folder = folder
        self._client_ca = client_ca
        self._own = None if folder is not None else self_signed()
        self._stamp: tuple[int, ...] = ()
        self._stamp = self._look()
        self._read = self._load()

    def credentials(self) -> grpc.ServerCredentials:
        """For `aio.Server.add_secure_port`."""
        # None, for no change, is as documented; the stubs do not know it.
        fetch = cast("Callable[[], grpc.ServerCertificateConfiguration]", self._fetch)
        return grpc.dynamic_ssl_server_credentials(
            self._read.configuration(), fetch, require_client_authentication=self._client_ca is not None
        )

    def validity(self) -> Validity:
        """Of the certificate in force."""
        return validity_of(self._read.chain)

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """What is to be used from now on; None for no change. Called from a thread of gRPC's."""
        try:
            stamp = self._look()
            if stamp == self._stamp:
                return None
            self._stamp = stamp
            read = self._load()
        except OSError:
            return None
        self._read = read
        return read.configuration()

    def _look(self) -> tuple[int, ...]:
        files = [] if self._folder is None else [self._folder / CERT_FILE, self._folder / KEY_FILE]
        stats = [file.stat() for file in (*files, *(() if self._client_ca is None else (self._client_ca,)))]
        return tuple(value for stat in stats for value in (stat.st_mtime_ns, stat.st_size, stat.st_ino))

    def _load(self) -> _Read:
        """What is to be used.

        Raises:
            CertificateError: naming the file, if one cannot be used.
        """
        key, chain = self._own or self._pair()
        return _Read(key, chain, self._authority())

    def _pair(self) -> tuple[bytes, bytes]:
        """Key and certificates of the folder."""
        assert self._folder is not None, "without one it has a pair of its own"
        key, chain = (self._folder / KEY_FILE).read_bytes(), (self._folder / CERT_FILE).read_bytes()
        try:
            own = serialization.load_pem_private_key(key, None).public_key()
            first = x509.load_pem_x509_certificates(chain)[0].public_key()
        except (ValueError, TypeError) as error:
            raise CertificateError(
                errno.EINVAL, f"{self._folder}: {KEY_FILE} or {CERT_FILE} is no PEM: {error}"
            ) from error
        form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        if own.public_bytes(*form) != first.public_bytes(*form):
            raise CertificateError(errno.EINVAL, f"{self._folder}: {KEY_FILE} is not the key of {CERT_FILE}")
        return key, chain

    def _authority(self) -> bytes | None:
        if self._client_ca is None:
            return None
        pem = self._client_ca.read_bytes()
        try:
            x509.load_pem_x509_certificates(pem)
        except ValueError as error:
            raise CertificateError(errno.EINVAL, f"{self._client_ca} is no PEM: {error}") from error
        return pem


class GrpcListener:
    """Serves handlers while it is entered; leaving it drains.

    Args:
        credentials: None for plain text.
        body_bytes_max: longest body in one message.
        streams_max: calls at a time; gRPC refuses what is beyond with RESOURCE_EXHAUSTED.
        drain_s: how long calls may take to end before they are cancelled.
        end_all: asked to end them just before that, so that none need be cancelled.

    Attributes:
        address: where it listens, with the port in place of 0 once it is entered.
    """

    def __init__(
        self,
        handlers: Sequence[grpc.GenericRpcHandler],
        address: Address,
        *,
        credentials: grpc.ServerCredentials | None,
        body_bytes_max: int,
        streams_max: int,
        drain_s: float,
        end_all: Callable[[], None] | None = None,
    ) -> None:
        self._handlers = tuple(handlers)
        self._credentials = credentials
        self._body_bytes_max = body_bytes_max
        self._streams_max = streams_max
        self._drain_s = drain_s
        self._end_all = end_all
        self._server: aio.Server | None = None
        self.address = address

    async def __aenter__(self) -> Self:
        """Listen.

        Raises:
            OSError: naming the address, if it cannot be listened on.
        """
        server = aio.server(
            options=[
                ("grpc.max_receive_message_length", self._body_bytes_max + _MESSAGE_SLACK_BYTES),
                ("grpc.max_send_message_length", self._body_bytes_max + _MESSAGE_SLACK_BYTES),
                ("grpc.so_reuseport", 0),
                # Envoy's keepalive may be shorter than what gRPC takes for abuse by default.
                ("grpc.http2.min_ping_interval_without_data_ms", _PING_INTERVAL_MS_MIN),
                ("grpc.keepalive_permit_without_calls", 1),
            ],
            maximum_concurrent_rpcs=self._streams_max,
        )
        server.add_generic_rpc_handlers(self._handlers)
        try:
            if self._credentials is None:
                port = server.add_insecure_port(str(self.address))
            else:
                port = server.add_secure_port(str(self.address), self._credentials)
        except RuntimeError as error:
            raise OSError(errno.EADDRINUSE, f"cannot listen on {self.address}: {error}") from error
        self.address = Address(self.address.host, port)
        await server.start()
        self._server = server
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take no more calls, let those under way end, end the rest."""
        if self._server is None:
            return
        drain_s = self._drain_s if kind is None else 0.0
        if self._end_all is None:
            await self._server.stop(drain_s)
            return
        ending = asyncio.get_running_loop().call_later(drain_s, self._end_all)
        try:
            await self._server.stop(drain_s + _END_S_MAX)
        finally:
            ending.cancel()
