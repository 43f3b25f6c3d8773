"""Request heads: what is written, what is refused, what is not passed on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.wire.errors import InvalidRequestError, WireError
from pdcoord.wire.heads import Headers, encode_request_head, end_to_end, request_fault


def test_writes_host_and_length_itself_and_drops_what_belongs_to_one_connection() -> None:
    given_headers = [
        (b"Host", b"evil"),
        (b"content-length", b"999"),
        (b"Transfer-Encoding", b"chunked"),
        (b"connection", b"keep-alive, X-Hop"),
        (b"x-hop", b"1"),
        (b"expect", b"100-continue"),
        (b"X-Request-Id", b"a"),
        (b"x-empty", b""),
    ]
    head = encode_request_head("POST", "/v1/completions?a=b", "h:1", given_headers, 5)
    assert head == (
        b"POST /v1/completions?a=b HTTP/1.1\r\nhost: h:1\r\ncontent-length: 5\r\n"
        b"x-request-id: a\r\nx-empty: \r\n\r\n"
    )


@pytest.mark.parametrize(
    ("method", "body_bytes", "is_sent"),
    [
        ("GET", 0, False),
        ("HEAD", 0, False),
        ("DELETE", 0, False),
        ("POST", 0, True),
        ("PUT", 0, True),
        ("GET", 3, True),
    ],
)
def test_content_length_goes_with_a_body_or_a_method_that_has_one(
    method: str, body_bytes: int, *, is_sent: bool
) -> None:
    head = encode_request_head(method, "/", "h:1", [], body_bytes)
    assert (b"content-length: %d\r\n" % body_bytes in head) is is_sent


@pytest.mark.parametrize("method", ["", "get", "GET /x", "G\r\nET", "GÉT"])
def test_refuses_a_method_that_is_none(method: str) -> None:
    with pytest.raises(InvalidRequestError, match="method"):
        encode_request_head(method, "/", "h:1", [], 0)


@pytest.mark.parametrize(
    "target", ["", "x", "/a b", "/a\r\nx: y", "/a\n", "/a\0", "/é", "//\x7f", "http://h/"]
)
def test_refuses_a_target_that_would_end_the_request_line(target: str) -> None:
    with pytest.raises(InvalidRequestError, match="target"):
        encode_request_head("GET", target, "h:1", [], 0)


@pytest.mark.parametrize("name", [b"", b"a b", b"a:b", b"a\r\nb", b"a\0", b"\xe9", b"a\n"])
def test_refuses_a_header_name_that_is_none(name: bytes) -> None:
    with pytest.raises(InvalidRequestError, match="header name"):
        encode_request_head("GET", "/", "h:1", [(name, b"v")], 0)


@pytest.mark.parametrize("value", [b"a\r\nx: y", b"a\nb", b"a\rb", b"a\0b", b"a\x7f", b"a\n"])
def test_refuses_a_header_value_with_a_control_character_and_does_not_quote_it(value: bytes) -> None:
    with pytest.raises(InvalidRequestError, match="x-key") as caught:
        encode_request_head("GET", "/", "h:1", [(b"x-key", b"secret" + value)], 0)
    assert "secret" not in str(caught.value)


def test_an_invalid_request_is_both_a_wire_error_and_a_value_error() -> None:
    assert issubclass(InvalidRequestError, WireError)
    assert issubclass(InvalidRequestError, ValueError)


@given(st.lists(st.tuples(st.binary(max_size=12), st.binary(max_size=12)), max_size=6), st.text(max_size=12))
def test_whatever_is_given_no_line_is_added(headers: list[tuple[bytes, bytes]], target: str) -> None:
    try:
        head = encode_request_head("GET", target, "h:1", headers, 0)
    except InvalidRequestError:
        return
    assert head.endswith(b"\r\n\r\n")
    lines = head[:-4].split(b"\r\n")
    assert len(lines) <= 2 + len(headers)
    assert all(b"\n" not in line and b"\r" not in line and b"\0" not in line for line in lines)


def test_end_to_end_lowers_names_keeps_order_and_drops_nominated_headers() -> None:
    headers = [
        (b"B", b"1"),
        (b"Connection", b"close, b2"),
        (b"b2", b"2"),
        (b"Keep-Alive", b"x"),
        (b"a", b"3"),
    ]
    assert end_to_end(headers) == [(b"b", b"1"), (b"a", b"3")]


GET = (b"GET", b"/v1/models")
HOST = (b"host", b"gateway:8080")


@pytest.mark.parametrize(
    ("version", "line", "headers"),
    [
        ("1.1", GET, [HOST]),
        ("1.1", GET, [(b"host", b"[::1]:8080")]),
        ("1.1", GET, [(b"host", b"")]),
        ("1.0", GET, []),
        ("1.1", (b"OPTIONS", b"*"), [HOST]),
        ("1.1", (b"POST", b"/"), [HOST, (b"transfer-encoding", b"Chunked")]),
        ("1.1", (b"POST", b"/"), [HOST, (b"content-length", b"3")]),
    ],
)
def test_plain_heads_are_taken(version: str, line: tuple[bytes, bytes], headers: Headers) -> None:
    assert request_fault(version, *line, headers) is None


@pytest.mark.parametrize(
    ("version", "line", "headers", "said"),
    [
        ("0.9", GET, [HOST], "its version is 0.9"),
        ("2.0", GET, [HOST], "its version is 2.0"),
        ("1.1", (b"GET", b"http://a/"), [HOST], "its target is no path"),
        ("1.1", (b"GET", b"*"), [HOST], "its target is no path"),
        ("1.1", (b"CONNECT", b"a:1"), [HOST], "its target is no path"),
        ("1.1", GET, [], "it has 0 host fields"),
        ("1.0", GET, [HOST, HOST], "it has 2 host fields"),
        ("1.1", GET, [(b"host", b"a b")], "its host field has a character"),
        ("1.1", GET, [HOST, (b"transfer-encoding", b"gzip, chunked")], "transfer-encoding is not chunked"),
        ("1.0", GET, [(b"transfer-encoding", b"chunked")], "transfer-encoding is not chunked alone"),
    ],
)
def test_heads_in_doubt_are_refused_with_why(
    version: str, line: tuple[bytes, bytes], headers: Headers, said: str
) -> None:
    fault = request_fault(version, *line, headers)
    assert fault is not None
    assert (fault.status, said in fault.message) == (400, True)
