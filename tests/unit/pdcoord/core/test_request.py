"""What a request says of itself."""

import pytest

from pdcoord.core.fleet import ModelName
from pdcoord.core.request import Request, RequestId, is_allowed
from pdcoord.protocol.headers import HostPort


@pytest.mark.parametrize(("priority", "expected"), [(-1_000, True), (-1, True), (0, False), (1, False)])
def test_below_zero_a_request_is_sheddable(priority: int, *, expected: bool) -> None:
    assert Request(RequestId("r"), ModelName("m"), 1, priority=priority).is_sheddable is expected


@pytest.mark.parametrize(
    ("allowed", "address", "expected"),
    [
        (None, "10.0.0.1:80", True),
        (frozenset(), "10.0.0.1:80", False),
        (frozenset({"10.0.0.1:80"}), "10.0.0.1:80", True),
        (frozenset({"10.0.0.1:80"}), "10.0.0.1:8", False),
        (frozenset({"10.0.0.1"}), "10.0.0.1:80", True),
        (frozenset({"10.0.0.1"}), "10.0.0.11:80", False),
        (frozenset({"[fd00::1]:80"}), "[fd00::1]:80", True),
        (frozenset({"fd00::1"}), "[fd00::1]:80", True),
    ],
)
def test_an_address_is_allowed_by_itself_or_by_its_host(
    allowed: frozenset[str] | None, address: str, *, expected: bool
) -> None:
    assert is_allowed(allowed, HostPort(address)) is expected
