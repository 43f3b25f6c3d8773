"""An engine's whole error, in its API's form, kept to be relayed when nothing better is left."""

from dataclasses import dataclass

from pdcoord.front import upstream as wires
from pdcoord.front.ports import Limits
from pdcoord.wire.errors import WireError
from pdcoord.wire.heads import Headers
from pdcoord.wire.response import Response


@dataclass(frozen=True, slots=True)
class Held:
    """A status, headers that may go to the client, and a body."""

    status: int
    headers: Headers
    body: bytes


async def hold(response: Response, limits: Limits, path: str) -> Held | None:
    """Read an error of the API at `path` whole; None if it broke off, or is longer than may be kept."""
    try:
        body = await response.read_all(timeout_s=limits.stream_idle_s, bytes_max=limits.held_bytes_max)
    except WireError:
        return None
    headers = wires.headers_to_client(response.headers)
    is_plain = response.header(b"content-encoding") is None
    shown = wires.error_body(response.status, body, path) if is_plain else body
    if shown is not body:
        headers = [pair for pair in headers if pair[0] != b"content-type"]
    return Held(response.status, headers, shown)
