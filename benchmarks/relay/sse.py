"""The one event that every stream of the benchmark is made of, and how a reader tells events apart."""

import time

EVENT_BYTES = 250
MODEL = "bench/llama"
_MARK = b'"sent_ns":'
_SENT_DIGITS = 19
_HEAD = b'data: {"id":"cmpl-bench","object":"text_completion","model":"bench/llama",' + _MARK
_TAIL = b',"choices":[{"index":0,"text":"%b","finish_reason":null}]}\n\n'
_TEXT = b"x" * (EVENT_BYTES - len(_HEAD) - _SENT_DIGITS - len(_TAIL % b""))
_REST = _TAIL % _TEXT
# One chunk of chunked transfer coding per event, as engines send them.
_CHUNK_HEAD = b"%x\r\n" % EVENT_BYTES + _HEAD
_CHUNK_REST = _REST + b"\r\n"

LAST_CHUNKS = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


def chunk() -> bytes:
    """An event that carries the time it was made, as a chunk of an HTTP body."""
    return b"%b%0*d%b" % (_CHUNK_HEAD, _SENT_DIGITS, time.monotonic_ns(), _CHUNK_REST)


def count(data: bytes) -> int:
    """Events that begin in these bytes; one that a read splits inside its mark is missed, which is rare."""
    return data.count(_MARK)


def age_ns(data: bytes) -> int | None:
    """How long ago the first event in these bytes was made."""
    start = data.find(_MARK)
    digits = data[start + len(_MARK) : start + len(_MARK) + _SENT_DIGITS]
    if start < 0 or len(digits) < _SENT_DIGITS or not digits.isdigit():
        return None
    return time.monotonic_ns() - int(digits)
