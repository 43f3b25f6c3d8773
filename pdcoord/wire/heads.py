"""Request heads to bytes, what no head may hold, and which headers may travel on; pure."""

import re
from collections.abc import Iterable

from pdcoord.protocol.errors import Refusal, RefuseReason
from pdcoord.protocol.headers import HOP_BY_HOP
from pdcoord.wire.errors import InvalidRequestError

Headers = list[tuple[bytes, bytes]]
"""Header fields in order, names in lower case."""

_METHOD = re.compile(r"[A-Z]+")
# RFC 9112 section 3.2: origin-form without the characters that would end the request line.
_TARGET = re.compile(r"/[\x21-\x7e]*|\*")
_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110 section 5.6.2: token.
_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")  # RFC 9110 section 5.5, without CR, LF, NUL and the like.

# Set by the client itself from what it sends; "expect" would ask for an interim answer nobody waits for.
_OWN = HOP_BY_HOP | {b"host", b"content-length", b"expect"}
_METHODS_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})

HEADERS_MAX = 128
"""Fields of one head, either way; browsers, proxies and engines send a few dozen."""
_VERSIONS = frozenset({"1.0", "1.1"})
_HOST = re.compile(rb"[A-Za-z0-9._~!$&'()*+,;=:\[\]%-]*")  # RFC 9110 section 7.2: uri-host and port.
_CODING_FAULT = "transfer-encoding is not chunked alone; send chunked, or a content-length"


def request_fault(version: str, method: bytes, target: bytes, headers: Headers) -> Refusal | None:
    """What of a request's head no server of ours takes, though llhttp in its strict mode does.

    That refuses by itself: content-length beside transfer-encoding or more than once, whatever else that is
    in doubt about a body's length, folded lines, lines that do not end in CR LF, NUL and other control
    characters, spaces in and behind names. Source: RFC 9112 sections 3.2, 6.1 and 11.2.

    Args:
        headers: names in lower case.
    """
    if version not in _VERSIONS:
        return _fault(f"its version is {version}; send HTTP/1.1")
    if not target.startswith(b"/") and not (target == b"*" and method == b"OPTIONS"):
        return _fault("its target is no path; send the path alone, with the host in its own field")
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1 or (not hosts and version == "1.1"):
        return _fault(f"it has {len(hosts)} host fields; send one")
    if hosts and _HOST.fullmatch(hosts[0]) is None:
        return _fault("its host field has a character that no host has")
    return None if are_codings_plain(version, headers) else _fault(_CODING_FAULT)


def are_codings_plain(version: str, headers: Headers) -> bool:
    """Whether a body's framing can be read in one way only: `chunked` once, in HTTP/1.1, or nothing."""
    codings = [value for name, value in headers if name == b"transfer-encoding"]
    return not codings or (version == "1.1" and [each.lower() for each in codings] == [b"chunked"])


def head_too_large(why: str) -> Refusal:
    return Refusal(RefuseReason.HEAD_TOO_LARGE, f"The head of the request is too large: {why}.")


def _fault(why: str) -> Refusal:
    return Refusal(RefuseReason.MALFORMED_HTTP, f"The head of the request cannot be taken: {why}.")


def encode_request_head(
    method: str, target: str, host: str, headers: Iterable[tuple[bytes, bytes]], body_bytes: int
) -> bytes:
    """The request line and headers up to the blank line, with host and content-length of our own.

    Hop-by-hop headers, and those that a given Connection header names, are left out.

    Raises:
        InvalidRequestError: naming the part at fault; a header's value is never quoted.
    """
    if _METHOD.fullmatch(method) is None:
        raise InvalidRequestError(f"method is {method[:32]!r}, expected upper-case letters")
    if _TARGET.fullmatch(target) is None:
        raise InvalidRequestError("target is not a path of visible ASCII characters that begins with '/'")
    parts = [f"{method} {target} HTTP/1.1\r\nhost: {host}\r\n".encode("ascii")]
    if body_bytes or method in _METHODS_WITH_BODY:
        parts.append(b"content-length: %d\r\n" % body_bytes)
    for name, value in end_to_end(headers, _OWN):
        if _NAME.fullmatch(name) is None:
            raise InvalidRequestError(f"header name {name[:64]!r} has a character that no header name has")
        if _VALUE.fullmatch(value) is None:
            raise InvalidRequestError(
                f"value of header {name.decode('ascii')} has a control character; remove it"
            )
        parts.append(b"%b: %b\r\n" % (name, value))
    parts.append(b"\r\n")
    return b"".join(parts)


def end_to_end(headers: Iterable[tuple[bytes, bytes]], dropped: frozenset[bytes] = HOP_BY_HOP) -> Headers:
    """The headers that a proxy passes on: all but `dropped` and those a Connection header names.

    Source: RFC 9110 section 7.6.1.
    """
    kept = []
    nominated: set[bytes] = set()
    for name, value in headers:
        lowered = name.lower()
        if lowered == b"connection":
            nominated.update(token.strip().lower() for token in value.split(b","))
        if lowered not in dropped:
            kept.append((lowered, value))
    if nominated:
        return [pair for pair in kept if pair[0] not in nominated]
    return kept
