"""Who may ask the endpoint picker over gRPC: real clients with and without a certificate."""

import asyncio
import shutil
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID
from grpc import aio
from grpc_health.v1 import health_pb2

from pdcoord.extproc.health import Health
from pdcoord.extproc.listener import Address, Certificates, GrpcListener

WAIT_S = 20.0
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
"""The preface of RFC 9113 with empty settings, which a server answers with its own."""


@dataclass
class Served:
    """A listener as the picker has it, and the files that it follows."""

    listener: GrpcListener
    roots: Path
    server_ca: Path

    async def ask(self, pair: Any = None) -> int:
        """Its health, as a client with that pair is told it."""
        shown = (None, None) if pair is None else (pair.key.read_bytes(), pair.cert.read_bytes())
        credentials = grpc.ssl_channel_credentials(self.server_ca.read_bytes(), *shown)
        options = (("grpc.use_local_subchannel_pool", 1),)
        async with aio.secure_channel(str(self.listener.address), credentials, options=options) as channel:
            check = channel.unary_unary(
                "/grpc.health.v1.Health/Check",
                request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
                response_deserializer=health_pb2.HealthCheckResponse.FromString,
            )
            answer = await check(health_pb2.HealthCheckRequest(service="liveness"), timeout=WAIT_S)
            return int(answer.status)

    def resume(self, context: ssl.SSLContext, session: ssl.SSLSession | None) -> tuple[bool, Any]:
        """Connect, in an earlier session if one is given: whether it was resumed, and the one for the next.

        Raises:
            OSError: if the server does not answer.
        """
        address = (self.listener.address.host, self.listener.address.port)
        with (
            socket.create_connection(address, WAIT_S) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1", session=session) as secured,
        ):
            secured.sendall(HTTP2)
            if not secured.recv(4_096):
                raise ConnectionResetError("it closed")
            return bool(secured.session_reused), secured.session


@asynccontextmanager
async def served(authority: Any, clients: Any, folder: Path) -> AsyncIterator[Served]:
    """Serves whoever `clients` has signed."""
    pair, roots = authority.issue("picker"), folder / "roots.crt"
    shutil.copy(pair.cert, folder / "tls.crt")
    shutil.copy(pair.key, folder / "tls.key")
    shutil.copy(clients.ca, roots)
    listener = GrpcListener(
        [Health(lambda: None).handler()],
        Address("127.0.0.1", 0),
        credentials=Certificates(folder, roots).credentials(),
        body_bytes_max=1_024,
        streams_max=16,
        drain_s=0.0,
    )
    async with listener:
        yield Served(listener, roots, authority.ca)


@pytest.mark.parametrize("fault", ["none", "stranger", "expired", "for servers only"])
async def test_the_picker_answers_nobody_without_a_certificate_of_ours(
    authority: Any, make_authority: Any, tmp_path: Path, fault: str
) -> None:
    clients = make_authority("clients")
    match fault:
        case "none":
            shown = None
        case "stranger":
            shown = make_authority("stranger").issue("client")
        case "expired":
            shown = clients.issue("client", days=-1)
        case _:
            shown = clients.issue("client", uses=[ExtendedKeyUsageOID.SERVER_AUTH])
    async with served(authority, clients, tmp_path) as picker:
        assert await picker.ask(clients.issue("good")) == 1
        with pytest.raises(aio.AioRpcError) as caught:
            await picker.ask(shown)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_the_picker_lets_nobody_in_by_an_authority_that_is_taken_away(
    authority: Any, make_authority: Any, tmp_path: Path
) -> None:
    before, after = make_authority("before"), make_authority("after")
    old, new = before.issue("old"), after.issue("new")
    async with served(authority, before, tmp_path) as picker:
        assert await picker.ask(old) == 1
        contexts: dict[ssl.SSLContext, ssl.SSLSession] = {}
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            context = ssl.create_default_context(cafile=str(authority.ca))
            context.set_alpn_protocols(["h2"])
            context.minimum_version = context.maximum_version = version
            context.load_cert_chain(old.cert, old.key)
            _, session = await asyncio.to_thread(picker.resume, context, None)
            is_resumed, contexts[context] = await asyncio.to_thread(picker.resume, context, session)
            assert is_resumed, "else what follows would show nothing"
        picker.roots.write_text("half of a fi")
        assert await picker.ask(old) == 1, "what cannot be used changes nothing"
        shutil.copy(after.ca, picker.roots)
        assert await picker.ask(new) == 1
        with pytest.raises(aio.AioRpcError):
            await picker.ask(old)
        for context, session in contexts.items():
            with pytest.raises(OSError, match=r"."):
                await asyncio.to_thread(picker.resume, context, session)
