"""PEM files for TLS, tried at start: gRPC would take bad ones and fail at every connection."""

import ssl
from pathlib import Path


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
