"""Server-sent events as engines write them: where one ends, and what it says.

Source: WHATWG HTML, server-sent events. Lines end in LF or CRLF; a bare CR, which none writes, ends none.
"""

import re
from collections.abc import Iterator

DONE = b"[DONE]"
EVENT_END = re.compile(rb"\n\r?\n")
"""Of an event whose lines end in CRLF the last CR is left to it, which is faster than to look for one."""


def whole_events(data: bytes) -> tuple[list[bytes], bytes]:
    """Cut into whole events, each with the blank line that ends it, and the unfinished rest."""
    events = []
    start = 0
    for match in EVENT_END.finditer(data):
        events.append(data[start : match.end()])
        start = match.end()
    return events, data[start:]


def end_of_last(data: bytes) -> int:
    """Where the last whole event ends; 0 if there is none."""
    plain = data.rfind(b"\n\n") + 2
    crlf = data.rfind(b"\n\r\n") + 3
    return max(plain if plain > 1 else 0, crlf if crlf > 2 else 0)


def data_of(event: bytes) -> bytes | None:
    """What an event carries, its data lines joined; None for a comment or anything else without data."""
    lines = list(_data_lines(event))
    return b"\n".join(lines) if lines else None


def other_lines(event: bytes) -> bytes:
    """The lines of an event that are not data: its name, its id, comments."""
    kept = [line for line in event.splitlines() if line and not _is_data(line)]
    return b"".join(line + b"\n" for line in kept)


def _is_data(line: bytes) -> bool:
    return line == b"data" or line.startswith(b"data:")


def _data_lines(event: bytes) -> Iterator[bytes]:
    for line in event.splitlines():
        if _is_data(line):
            yield line[5:].removeprefix(b" ")
