"""The error tree: one root, and data with the error that needs it."""

import pytest

from pdcoord.wire import errors


@pytest.mark.parametrize(
    "kind",
    [
        errors.InvalidRequestError,
        errors.ConnectError,
        errors.ResetError,
        errors.HeadTimeoutError,
        errors.StreamError,
        errors.BodyTooLargeError,
    ],
)
def test_one_root_holds_the_tree(kind: type[Exception]) -> None:
    assert issubclass(kind, errors.WireError)


def test_a_body_too_large_names_its_limit() -> None:
    error = errors.BodyTooLargeError(17)
    assert error.bytes_max == 17
    assert "17 bytes" in str(error)
