"""PEM files for TLS, tried at start: gRPC would take bad ones and fail at every connection."""

import ssl
from pathlib import Path

_TURNS = 4
"""Each side's in a handshake: TLS 1.3 needs two of the client's."""
_DATE_FAULTS = {
    9: "is not valid yet; look at its dates and at this host's clock",
    10: "has expired; renew it, or look at this host's clock",
}
"""By OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED."""


class PemError(ValueError):
    """A file that cannot be used.

    Attributes:
        part: `cert`, `cert_key` or `ca`: which of the files.
        path: the file.
        remedy: what is wrong with it and what to give instead.
    """

    def __init__(self, part: str, path: Path, remedy: str) -> None:
        super().__init__(f"{path}: {remedy}")
        self.part = part
        self.path = path
        self.remedy = remedy


def check_pem(cert: Path | None, key: Path | None, ca: Path | None) -> None:
    """Try a certificate chain with its key, and the certificates of an authority; None for no file.

    Raises:
        PemError: for the first that cannot be used.
    """
    if ca is not None:
        _check_certificates("ca", ca)
    if cert is None or key is None:
        return
    _check_certificates("cert", cert)
    _readable("cert_key", key)
    try:
        # Without a password it would ask the terminal for one.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=lambda: "")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise PemError("cert_key", key, f"is not the key of {cert}; give that one") from error
        raise PemError(
            "cert_key", key, "holds no key in PEM; give one without a passphrase (BEGIN PRIVATE KEY)"
        ) from error


def date_fault(cert: Path, key: Path) -> str | None:
    """What is wrong with a usable certificate's dates today; None if nothing is.

    It is shown, in memory, to a client that trusts it: what dates a file holds is for TLS itself to say.
    """
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    server.load_cert_chain(cert, key, password=lambda: "")
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client.load_verify_locations(cert)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (client.wrap_bio(down, up), server.wrap_bio(up, down, server_side=True))
    for _ in range(_TURNS):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError as error:
                return _DATE_FAULTS.get(error.verify_code)
            except ssl.SSLError:
                return None  # Of other faults its peers will say more.
    return None


def _check_certificates(part: str, path: Path) -> None:
    _readable(part, path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError as error:
        raise PemError(
            part, path, "holds no certificate in PEM; give one (BEGIN CERTIFICATE), not DER or a key"
        ) from error


def _readable(part: str, path: Path) -> None:
    try:
        path.read_bytes()
    except OSError as error:
        raise PemError(part, path, f"cannot be read: {error.strerror}; give a file in PEM") from error
