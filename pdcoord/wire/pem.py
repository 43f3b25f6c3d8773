"""PEM files for TLS, tried at start: gRPC would take bad ones and fail at every connection."""

import ssl
from pathlib import Path

from pdcoord.wire.files import read_regular
from pdcoord.wire.validity import Validity, certificates_of, validity_of

FILE_BYTES_MAX = 1 << 20


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
        read_authorities(ca)
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


def read_validity(cert: Path) -> Validity:
    """When a certificate is good.

    Raises:
        PemError: if that cannot be read.
    """
    raw = _readable("cert", cert)
    try:
        return validity_of(raw)
    except ValueError as error:
        raise PemError("cert", cert, f"{error}; give another") from error


def read_authorities(ca: Path) -> list[Validity]:
    """When each certificate that could verify another is good, one at least.

    A certificate that signs for itself verifies itself; another has to be an authority's.

    Raises:
        PemError: if the file cannot be read, or could verify nobody: it would lock everyone out.
    """
    raw, authorities = _check_certificates("ca", ca)
    try:
        found = [each.validity for each in certificates_of(raw) if each.is_self_issued]
        found += [validity_of(ssl.DER_cert_to_PEM_cert(each).encode()) for each in authorities]
    except ValueError as error:
        raise PemError("ca", ca, f"{error}; give another") from error
    if not found:
        remedy = "holds no certificate of an authority (basicConstraints CA:TRUE); give that of whoever signs"
        raise PemError("ca", ca, remedy)
    return found


def _check_certificates(part: str, path: Path) -> tuple[bytes, list[bytes]]:
    """What the file holds, and the authorities in it as DER."""
    raw = _readable(part, path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise PemError(
            part, path, "holds no certificate in PEM; give one (BEGIN CERTIFICATE), not DER or a key"
        ) from error
    return raw, context.get_ca_certs(binary_form=True)


def _readable(part: str, path: Path) -> bytes:
    try:
        raw = read_regular(path, FILE_BYTES_MAX)
    except OSError as error:
        raise PemError(part, path, f"cannot be read: {error.strerror}; give a file in PEM") from error
    if len(raw) > FILE_BYTES_MAX:
        raise PemError(part, path, f"is longer than {FILE_BYTES_MAX} bytes; is it PEM?")
    return raw
