"""Which calls may go where no plan is made."""

import pytest

from pdcoord.extproc.paths import path_of, why_not
from pdcoord.protocol.openai import APIS


@pytest.mark.parametrize(
    ("target", "path"),
    [
        (b"/v1/chat/completions", "/v1/chat/completions"),
        (b"/v1/chat/completions/?a=/", "/v1/chat/completions"),
        (b"/v1/chat/%63ompletions", "/v1/chat/completions"),
        (b"/v1/chat%2Fcompletions%2f", "/v1/chat/completions"),
        (b"/v1/chat/%2563ompletions", "/v1/chat/%63ompletions"),
        (b"/v1/chat/completions//", "/v1/chat/completions/"),
        (b"/%", "/%"),
        (b"/", "/"),
        (b"", ""),
    ],
)
def test_a_path_is_read_as_servers_read_it(target: bytes, path: str) -> None:
    assert path_of(target) == path


@pytest.mark.parametrize("method", [b"POST", b"PUT", b"DELETE", b"PATCH", b"OPTIONS", b"GET", b"get", None])
@pytest.mark.parametrize(
    "path",
    ["", "/", "/invocations", "/sleep", "/v1/load_lora_adapter", "/metrics", "/v1/chat/completions/", "*"],
)
def test_what_is_not_named_goes_nowhere(method: bytes | None, path: str) -> None:
    refusal = why_not(method, path, frozenset())
    assert refusal is not None
    assert refusal.status == 404
    assert "--pass-paths" in refusal.message
    assert why_not(method, path, frozenset({path})) is None


def test_pages_are_read_and_the_api_is_posted_to() -> None:
    for path in ("/v1/models", "/health", "/v1/models/org/model"):
        for method in (b"GET", b"HEAD"):
            assert why_not(method, path, ()) is None
        refusal = why_not(b"DELETE", path, ())
        assert refusal is not None
        assert refusal.status == 405
    for path in APIS:
        assert why_not(b"POST", path, ()) is None
        refusal = why_not(b"GET", path, ())
        assert refusal is not None
        assert refusal.status == 405


@pytest.mark.parametrize("path", ["/v1/models/../sleep", "/v1/models/./x", "/v1/models//x", "/v1/models/"])
def test_a_model_has_a_name_that_leads_nowhere_else(path: str) -> None:
    assert why_not(b"GET", path, ()) is not None


def test_a_refusal_shows_no_more_than_a_line() -> None:
    refusal = why_not(b"X" * 9_999, "/" + "x" * 9_999, ())
    assert refusal is not None
    assert len(refusal.message) < 300
