"""TLS from PEM files that may change: contexts for listeners, and for connections to peers."""

import ssl
from datetime import UTC, datetime
from pathlib import Path

from pdcoord.wire.followed import Stamp
from pdcoord.wire.pem import PemError, check_pem, read_authorities, read_validity
from pdcoord.wire.validity import Validity

HANDSHAKE_S_MAX = 10.0
"""Of a client that connects and says nothing, or says it slowly."""
SHUTDOWN_S_MAX = 2.0
"""How long a peer may take to say goodbye before the connection is dropped."""
_PROTOCOLS = ["http/1.1"]


class _Current(ssl.SSLContext):
    """Hands each new connection to the context that was made last.

    An event loop keeps the context that a listener was given. One that is loaded again in place keeps the
    authorities it had, and resumes sessions that these let in; so each reading makes a new one.
    """

    inner: ssl.SSLContext

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,  # noqa: FBT001, FBT002  # ssl's own signature
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        return self.inner.wrap_bio(incoming, outgoing, server_side, server_hostname, session)


class _Tls:
    """Files, and what was last made of them.

    Attributes:
        doubt: what is wrong with the dates of what a process started with.
        validity: of the certificate in force; None where there is none.
    """

    def __init__(
        self, name: str, protocol: int, *, cert: Path | None, key: Path | None, ca: Path | None
    ) -> None:
        self.name = name
        self._protocol = protocol
        self._cert, self._key, self._ca = cert, key, ca
        self._stamp = Stamp((cert, key, ca))
        self.context = _Current(protocol)
        self.doubt: str | None = None
        self.validity: Validity | None = None
        self.look()

    def look(self) -> bool:
        """As `followed.Followed.look`; raises PemError."""
        if not self._stamp.is_changed():
            return False
        # Tried apart from the context in force, which a chain without its key would spoil.
        check_pem(self._cert, self._key, self._ca)
        try:
            validity = self._dates()
            self.context.inner = self._make()
        except PemError:
            raise
        except (OSError, ValueError) as error:
            # Replaced between the trial and the reading: the next look finds another stamp.
            path = self._cert or self._ca
            assert path is not None, "TLS without any file is not asked for"
            raise PemError("cert", path, f"cannot be used: {error}") from error
        self.validity = validity
        return True

    def _dates(self) -> Validity | None:
        """A bad date at the start is a doubt, since there is nothing better; later it is a fault.

        Of several authorities one with a good date is enough: the others are on their way out or in.
        """
        now_s = datetime.now(UTC).timestamp()
        validity = None if self._cert is None or self._key is None else read_validity(self._cert)
        faults: list[PemError] = []
        if self._cert is not None and validity is not None and (fault := validity.fault(now_s)):
            faults.append(PemError("cert", self._cert, fault))
        if self._ca is not None:
            of_each = [each.fault(now_s) for each in read_authorities(self._ca)]
            if None not in of_each and (fault := of_each[0]):
                faults.append(PemError("ca", self._ca, f"no certificate in it is good: the first {fault}"))
        if faults and hasattr(self.context, "inner"):
            raise faults[0]
        self.doubt = "; ".join(str(fault) for fault in faults) or None
        return validity

    def _make(self) -> ssl.SSLContext:
        context = ssl.SSLContext(self._protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
        context.set_alpn_protocols(_PROTOCOLS)
        if self._cert is not None and self._key is not None:
            context.load_cert_chain(self._cert, self._key, password=lambda: "")
        if self._ca is not None:
            context.load_verify_locations(self._ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context


class ServerTls(_Tls):
    """TLS of a listener, 1.2 at least.

    Attributes:
        name: the listener, for logs and metrics.
        context: for the event loop; a new connection gets what the files last held.
    """

    def __init__(self, name: str, cert: Path, key: Path, client_ca: Path | None = None) -> None:
        """Reads the files.

        Args:
            client_ca: with it a client needs a certificate for clients that it has signed.

        Raises:
            PemError: for the first that cannot be used.
        """
        super().__init__(name, ssl.PROTOCOL_TLS_SERVER, cert=cert, key=key, ca=client_ca)

    def _make(self) -> ssl.SSLContext:
        context = super()._make()
        if self._ca is not None:
            # A resumed session lets in whoever was let in once: for 2 h with TLS 1.3, for 5 min with 1.2, of
            # which a new reading of the files knows none. Envoy speaks 1.2 upstream unless told otherwise.
            context.num_tickets = 0
        return context


class ClientTls(_Tls):
    """TLS of connections to peers, 1.2 at least, each certificate verified with its name.

    Attributes:
        name: what the connections are for, for logs and metrics.
        context: for the event loop; a new connection gets what the files last held.
        peer_name: the name that every peer's certificate must bear; None for the host that is dialled.
    """

    def __init__(
        self,
        name: str,
        ca: Path,
        *,
        cert: Path | None = None,
        key: Path | None = None,
        peer_name: str | None = None,
    ) -> None:
        """Reads the files.

        Args:
            cert, key: shown to peers that ask for a certificate; both or neither.

        Raises:
            PemError: for the first that cannot be used.
        """
        self.peer_name = peer_name
        super().__init__(name, ssl.PROTOCOL_TLS_CLIENT, cert=cert, key=key, ca=ca)
