"""Host and port in headers, and which headers a client may not send."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.protocol import headers
from pdcoord.protocol.headers import (
    REQUEST_ID_BYTES_MAX,
    format_host_port,
    is_request_id,
    is_routing,
    parse_host_port,
)

names = st.from_regex(
    r"[a-zA-Z0-9]([a-zA-Z0-9_-]{0,10}[a-zA-Z0-9])?(\.[a-zA-Z0-9]{1,8}){0,3}", fullmatch=True
)
hosts = names | st.ip_addresses(v=4).map(str) | st.ip_addresses(v=6).map(str)
ports = st.integers(1, 65_535)


@given(hosts, ports)
def test_format_then_parse_is_the_identity(host: str, port: int) -> None:
    assert parse_host_port(format_host_port(host, port)) == (host, port)
    assert parse_host_port(f" {format_host_port(host, port)}\t") == (host, port)


def test_a_zone_is_part_of_an_ipv6_host() -> None:
    assert parse_host_port("[fe80::1%eth0]:8000") == ("fe80::1%eth0", 8000)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "host",
        "host:",
        ":8000",
        "host:0",
        "host:65536",
        "host:100000",
        "host:-1",
        "host:+1",
        "host:8_0",
        "host:٣",
        "host:80 80",
        "::1:8000",
        "[]:8000",
        "[host]:8000",
        "[::1:8000",
        "::1]:8000",
        "[::1]",
        "host/path:80",
        "user@host:80",
        "user:secret@host:80",
        "http://host:80",
        "host?x:80",
        "host#x:80",
        "ho st:80",
        "host\r\nx-evil:80",
        "a,b:80",
        "a;b:80",
        'a"b:80',
        "a\\b:80",
        "a%41:80",
        "a\x00b:80",
        "a\x7fb:80",
        "a\u2028b:80",
        "bücher:80",
    ],
)
def test_what_is_not_a_host_and_a_port_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="is not host:port"):
        parse_host_port(text)


@given(st.text())
def test_whatever_passes_holds_no_character_that_could_steer_anything(text: str) -> None:
    try:
        host, port = parse_host_port(text)
    except ValueError:
        return
    assert 1 <= port <= 65_535
    assert host.isascii()
    assert all(c.isalnum() or c in "._-:%" for c in host)


@given(names, ports, st.sampled_from("\r\n\t\0 ,;/@?#[]\\\"'<>%"), st.data())
def test_one_foreign_character_inside_spoils_it(
    host: str, port: int, character: str, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(1, len(host)))
    with pytest.raises(ValueError, match="is not host:port"):
        parse_host_port(f"{host[:cut]}{character}x:{port}")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (headers.PREFILLER_HOST_PORT, True),
        (headers.ENCODER_HOSTS_PORTS, True),
        (headers.DATA_PARALLEL_HOST_PORT, True),
        (headers.KV_CACHE_SOURCE_HOST_PORT, True),
        (headers.DESTINATION_ENDPOINT, True),
        (headers.PLAN, True),
        (headers.SERVED, True),
        (b"x-pdcoord-anything", True),
        (headers.REQUEST_ID, False),
        (b"authorization", False),
        (b"content-type", False),
    ],
)
def test_headers_that_steer_routing_are_known(name: bytes, *, expected: bool) -> None:
    assert is_routing(name) is expected


def test_names_are_lower_case_as_asgi_gives_them() -> None:
    for name in [*headers.ROUTING_FROM_OUTSIDE, *headers.HOP_BY_HOP, headers.PLAN, headers.REQUEST_ID]:
        assert name == name.lower()


@pytest.mark.parametrize("value", [b"a", b"req-1/2:3~", b"x" * REQUEST_ID_BYTES_MAX])
def test_a_visible_request_id_is_taken_over(value: bytes) -> None:
    assert is_request_id(value)


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b" ",
        b"a b",
        b"a\r\nx-evil: 1",
        b"a\x00",
        b"a\x7f",
        b"\xc3\xa9",
        b"x" * (REQUEST_ID_BYTES_MAX + 1),
    ],
)
def test_any_other_request_id_is_not(value: bytes) -> None:
    assert not is_request_id(value)
