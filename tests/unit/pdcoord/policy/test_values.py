"""Tests of addresses, names and labels."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from pdcoord.policy.values import Address, EndpointName, LabelKey, Labels, LabelValue, Name, ServedName
from pdcoord.protocol.headers import parse_host_port


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("10.0.0.1:8000", "10.0.0.1:8000"),
        ("Host-1.Example:1", "host-1.example:1"),
        ("decode_0:8000", "decode_0:8000"),
        ("[2001:DB8:0::1]:8000", "[2001:db8::1]:8000"),
        ("host.:80", "host.:80"),
    ],
)
def test_addresses_are_written_in_one_way(written: str, canonical: str) -> None:
    assert TypeAdapter(Address).validate_python(written) == canonical


@pytest.mark.parametrize(
    "written",
    [
        "",
        "10.0.0.1",
        ":8000",
        "10.0.0.1:",
        "10.0.0.1:0",
        "10.0.0.1:65536",
        "300.0.0.1:80",
        "10.0.0:80",
        "2001:db8::1:80",
        "[2001:db8::g]:80",
        "[fe80::1%eth0]:80",
        "http://host:80",
        "host:80/path",
        "user@host:80",
        "-host:80",
        "a..b:80",
        "höst:80",
        "ho st:80",
        "host\n:80",
        "host:80\r\nx-evil: 1",
        "h" * 254 + ":80",
    ],
)
def test_what_is_no_address_is_refused(written: str) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Address).validate_python(written)


@given(st.text(max_size=20) | st.text(alphabet="a0.:[]-_1", max_size=20).map(lambda host: f"{host}:80"))
@settings(deadline=None)
def test_an_accepted_address_is_safe_in_a_header_and_stays_as_it_is(text: str) -> None:
    try:
        address = TypeAdapter(Address).validate_python(text)
    except ValidationError:
        return
    assert re.fullmatch(r"[a-z0-9._:\[\]-]+", address)
    assert parse_host_port(address)
    assert TypeAdapter(Address).validate_python(address) == address


@pytest.mark.parametrize(
    ("value_type", "good", "bad"),
    [
        (
            Name,
            ["a", "h100-prefill", "0", "a" * 63],
            ["", "A", "-a", "a-", "a_b", "a/b", "a b", "a\n", "a" * 64],
        ),
        (EndpointName, ["a", "Pod-0.ns", "0_a"], ["", "a/b", "a:1", ".a", "a b", "a\n", "a" * 254]),
        (ServedName, ["a", "org/Model-1.0:x"], ["", "a b", "a\n", "ä", "a" * 257]),
        (LabelKey, ["role", "llm-d.ai/role", "A_b.c"], ["", "/a", "a/", "a/b/c", "a b", "_a", "A/b"]),
        (LabelValue, ["", "a", "1", "a_b.c-D"], ["-a", "a b", "a/b", "a" * 64]),
    ],
)
def test_names_are_held_to_their_alphabet(value_type: type, good: list[str], bad: list[str]) -> None:
    adapter: TypeAdapter[str] = TypeAdapter(value_type)
    for text in good:
        assert adapter.validate_python(text) == text
    for text in bad:
        with pytest.raises(ValidationError):
            adapter.validate_python(text)


def test_labels_are_bounded() -> None:
    adapter: TypeAdapter[dict[str, str]] = TypeAdapter(Labels)
    assert adapter.validate_python({"a": "b"}) == {"a": "b"}
    with pytest.raises(ValidationError):
        adapter.validate_python({f"k{i}": "v" for i in range(65)})
