"""Which URLs name an admin listener."""

import pytest

from pdcoord.runtime.adminclient import AdminListener, admin_address


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://127.0.0.1:8081", "127.0.0.1:8081"),
        ("http://gateway/", "gateway:8081"),
        ("10.0.0.1:9000", "10.0.0.1:9000"),
        ("http://[::1]:7", "[::1]:7"),
        ("https://gateway:7", "gateway:7"),
    ],
)
def test_an_address_is_taken_from_a_url(url: str, address: str) -> None:
    assert admin_address(url) == address


@pytest.mark.parametrize("url", ["https://", "http://", "", "ftp://x"])
def test_what_is_no_such_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"is neither http://host:port nor https://host:port"):
        admin_address(url)


def test_https_needs_an_authority() -> None:
    with pytest.raises(ValueError, match="give --admin-ca-file"):
        AdminListener("https://gateway:8081").client()
    AdminListener("http://gateway:8081").client()
