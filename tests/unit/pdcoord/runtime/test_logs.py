"""Logs are JSON lines, ours and the libraries'."""

import io
import json
import logging
from typing import Any

import pytest

from pdcoord.core.events import Outcome
from pdcoord.runtime.logs import configure_logs


@pytest.fixture
def stream() -> io.BytesIO:
    return io.BytesIO()


def lines(stream: io.BytesIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_has_time_level_event_and_values_as_keys(stream: io.BytesIO) -> None:
    log = configure_logs("info", stream)
    log.info("request.done", outcome=Outcome.OK, ttft_ms=None, path=object)
    log.debug("too.much")
    (line,) = lines(stream)
    assert list(line)[:3] == ["timestamp", "level", "event"]
    assert (line["event"], line["outcome"], line["ttft_ms"]) == ("request.done", "ok", None)
    assert line["path"] == repr(object)


def test_what_libraries_log_is_handed_on_but_for_what_we_do_on_purpose(stream: io.BytesIO) -> None:
    configure_logs("info", stream)
    server = logging.getLogger("uvicorn.error")
    server.error("ASGI callable returned without completing response.")
    server.info("not worth a line")
    server.error("Exception in ASGI application\n", exc_info=ValueError("inner"))
    (line,) = lines(stream)
    assert (line["event"], line["logger"], line["level"]) == ("library.message", "uvicorn.error", "error")
    assert line["message"] == "Exception in ASGI application"
    assert "ValueError: inner" in line["exception"]
