"""A GET of the gateway's admin listener, for commands that print what it knows."""

import asyncio
from urllib.parse import urlsplit

from pdcoord.protocol.headers import HostPort, format_host_port
from pdcoord.wire.client import Client

TIMEOUT_S = 5.0


def admin_address(admin_url: str) -> HostPort:
    """host:port of a URL such as http://127.0.0.1:8081; the scheme and the port may be left out.

    Raises:
        ValueError: if it is of another scheme or names no host.
    """
    parts = urlsplit(admin_url if "://" in admin_url else f"http://{admin_url}")
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError(f"{admin_url!r} is not http://host:port")
    return format_host_port(parts.hostname, parts.port or 8081)


async def get(client: Client, address: HostPort, target: str) -> bytes | None:
    """The body of a 200, None of a 404.

    Raises:
        ValueError: on any other status.
        WireError, TimeoutError: if the listener does not answer.
    """
    async with asyncio.timeout(TIMEOUT_S):
        response = await client.request("GET", address, target, head_timeout_s=TIMEOUT_S)
        async with response:
            body = await response.read_all(timeout_s=TIMEOUT_S)
            if response.status == 404:
                return None
            if response.status != 200:
                raise ValueError(f"GET {target} answered {response.status}")
            return body
