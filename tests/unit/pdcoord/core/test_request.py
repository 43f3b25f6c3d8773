"""What a request says of itself."""

import pytest

from pdcoord.core.fleet import ModelName
from pdcoord.core.request import Request, RequestId


@pytest.mark.parametrize(("priority", "expected"), [(-1_000, True), (-1, True), (0, False), (1, False)])
def test_below_zero_a_request_is_sheddable(priority: int, *, expected: bool) -> None:
    assert Request(RequestId("r"), ModelName("m"), 1, priority=priority).is_sheddable is expected
