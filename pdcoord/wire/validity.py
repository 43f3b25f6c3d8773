"""From when to when a certificate is good, as it says itself."""

import base64
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

_BLOCK = re.compile(rb"-----BEGIN ((?:X509 |TRUSTED )?CERTIFICATE)-----([A-Za-z0-9+/=\s]+)-----END \1-----")
_VERSION, _UTC_TIME = 0xA0, 0x17
_BEFORE_ISSUER = 2
"""Fields of a certificate between version and issuer: serial number, algorithm. Dates and subject follow."""


@dataclass(frozen=True, slots=True)
class Validity:
    """Its first and last moment, in Unix seconds."""

    begins_s: float
    ends_s: float

    def fault(self, now_s: float) -> str | None:
        """What is wrong with the dates at that time, with the remedy; None if nothing is."""
        if now_s < self.begins_s:
            return "is not valid yet; look at its dates and at this host's clock"
        if now_s > self.ends_s:
            return "has expired; renew it, or look at this host's clock"
        return None


@dataclass(frozen=True, slots=True)
class Certificate:
    """What one certificate says of itself.

    Attributes:
        is_self_issued: it names itself as who issued it.
    """

    validity: Validity
    is_self_issued: bool


def validity_of(pem: bytes) -> Validity:
    """The dates of the first certificate in a PEM file, which is the one that peers are shown.

    Raises:
        ValueError: as `certificates_of`, of the first alone.
    """
    found = _BLOCK.search(pem)
    if found is None:
        raise ValueError("holds no certificate in PEM")
    return _certificate(found[2]).validity


def certificates_of(pem: bytes) -> list[Certificate]:
    """Those in a PEM file, at least one.

    Sources: RFC 7468 and RFC 5280, section 4.1.

    Raises:
        ValueError: if there is none, or one has no dates that could be read.
    """
    found = [_certificate(block[2]) for block in _BLOCK.finditer(pem)]
    if not found:
        raise ValueError("holds no certificate in PEM")
    return found


def _certificate(text: bytes) -> Certificate:
    try:
        _, certificate = next(_elements(base64.b64decode(text)))
        _, signed = next(_elements(certificate))
        fields = list(_elements(signed))
        issuer, (_, validity), subject = fields[_BEFORE_ISSUER + (fields[0][0] == _VERSION) :][:3]
        begins, ends = _elements(validity)
        return Certificate(Validity(_unix_s(*begins), _unix_s(*ends)), is_self_issued=issuer == subject)
    except (ValueError, IndexError, StopIteration) as error:
        raise ValueError("holds a certificate whose dates cannot be read") from error


def _elements(der: bytes) -> Iterator[tuple[int, bytes]]:
    """Tag and content of each element, in order (X.690, definite lengths)."""
    at = 0
    while at < len(der):
        tag, size, at = der[at], der[at + 1], at + 2
        if size & 0x80:
            count = size & 0x7F
            size, at = int.from_bytes(der[at : at + count], "big"), at + count
        if at + size > len(der):
            raise ValueError("cut short")
        yield tag, der[at : at + size]
        at += size


def _unix_s(tag: int, content: bytes) -> float:
    text = content.decode("ascii")
    if tag == _UTC_TIME:
        text = ("20" if text < "50" else "19") + text
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()
