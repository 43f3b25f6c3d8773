"""A GET of the gateway's admin listener, for commands that print what it knows."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pdcoord.feeds.keyfile import SecretFile, parse_admin_key
from pdcoord.policy.errors import PolicyError
from pdcoord.protocol.headers import HostPort, format_host_port
from pdcoord.wire.client import Client
from pdcoord.wire.tls import ClientTls

TIMEOUT_S = 5.0
_HTTPS = "https://"
_UNAUTHORIZED = 401


@dataclass(frozen=True, slots=True)
class AdminListener:
    """Where an admin listener is, and how it is asked.

    Attributes:
        url: such as http://127.0.0.1:8081, or https://... of one that speaks TLS.
        key_file: with the key that it asks for; None where it asks for none.
        ca_file: of who signed its certificate; needed with https.
    """

    url: str
    key_file: Path | None = None
    ca_file: Path | None = None

    def client(self) -> Client:
        """One that speaks to it; raises ValueError if the authority is missing or cannot be used."""
        if not self.url.startswith(_HTTPS):
            return Client()
        if self.ca_file is None:
            raise ValueError("https needs the authority of its certificate; give --admin-ca-file")
        return Client(tls=ClientTls("admin", self.ca_file))

    async def get(self, client: Client, target: str) -> bytes | None:
        """As of `get`; raises ValueError too if the URL or the key cannot be used."""
        return await get(client, admin_address(self.url), target, headers=self._headers())

    def _headers(self) -> list[tuple[bytes, bytes]]:
        if self.key_file is None:
            return []
        try:
            key = SecretFile(self.key_file, "admin-key", parse_admin_key).load_first()
        except PolicyError as error:
            raise ValueError(str(error)) from error
        return [(b"authorization", b"Bearer " + key)]


def admin_address(admin_url: str) -> HostPort:
    """host:port of a URL such as http://127.0.0.1:8081; the scheme and the port may be left out.

    Raises:
        ValueError: if it is of another scheme or names no host.
    """
    parts = urlsplit(admin_url if "://" in admin_url else f"http://{admin_url}")
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError(f"{admin_url!r} is neither http://host:port nor https://host:port")
    return format_host_port(parts.hostname, parts.port or 8081)


async def get(
    client: Client, address: HostPort, target: str, *, headers: Sequence[tuple[bytes, bytes]] = ()
) -> bytes | None:
    """The body of a 200, None of a 404.

    Raises:
        ValueError: on any other status.
        WireError, TimeoutError: if the listener does not answer.
    """
    async with asyncio.timeout(TIMEOUT_S):
        response = await client.request(
            "GET", address, target, headers=list(headers), head_timeout_s=TIMEOUT_S
        )
        async with response:
            body = await response.read_all(timeout_s=TIMEOUT_S)
            if response.status == 404:
                return None
            if response.status == _UNAUTHORIZED:
                raise ValueError("it asks for a key, or for another one: give --admin-key-file")
            if response.status != 200:
                raise ValueError(f"GET {target} answered {response.status}")
            return body
