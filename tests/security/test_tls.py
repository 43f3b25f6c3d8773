"""Who may listen in or pose as a part of the fleet: TLS on listeners and to peers, with reload."""

import asyncio
import shutil
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop
from cryptography.x509.oid import ExtendedKeyUsageOID

from pdcoord.wire.asgi import send_head
from pdcoord.wire.client import Client
from pdcoord.wire.errors import ConnectError, StreamError, WireError
from pdcoord.wire.pem import PemError
from pdcoord.wire.relay import relay_body
from pdcoord.wire.tls import ClientTls, ServerTls

WAIT_S = 20.0
WHOLE = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"


def on_uvloop(test: Callable[..., Any]) -> Callable[..., Any]:
    """Run a coroutine on the loop that processes use, whose TLS is another than asyncio's."""

    def run(**fixtures: Any) -> None:
        uvloop.run(test(**fixtures))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    run.__signature__ = __import__("inspect").signature(test)  # type: ignore[attr-defined]
    return run


def resume(context: ssl.SSLContext, port: int, session: ssl.SSLSession | None) -> ssl.SSLSession | None:
    """Send a request, in an earlier session if one is given; a ticket for the next, if there was one."""
    with (
        socket.create_connection(("127.0.0.1", port), WAIT_S) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1", session=session) as secured,
    ):
        secured.sendall(WHOLE)
        answer = b""
        while part := secured.recv(4_096):
            answer += part
        assert answer.startswith(b"HTTP/1.1 200 ")
        return secured.session if secured.session and secured.session.has_ticket else None


async def ask(client: Client, address: Any) -> bytes:
    async with await client.request("GET", address, "/", head_timeout_s=WAIT_S) as response:
        return await response.read_all(timeout_s=WAIT_S)


@on_uvloop
async def test_a_listener_with_a_certificate_speaks_nothing_else(authority: Any, serving: Any) -> None:
    pair = authority.issue("server")
    async with serving(tls=ServerTls("listener", pair.cert, pair.key)) as served:
        assert await served.say(WHOLE) == b""
        async with Client(tls=ClientTls("upstream", authority.ca)) as client:
            assert await ask(client, served.address) == b"{}"
        old = ssl.create_default_context(cafile=str(authority.ca))
        old.minimum_version = ssl.TLSVersion.TLSv1_2
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        assert (await served.say(WHOLE, old)).startswith(b"HTTP/1.1 200 ")
        assert len(served.seen) == 2


@on_uvloop
async def test_no_version_before_1_2_is_spoken(authority: Any, serving: Any) -> None:
    pair = authority.issue("server")
    async with serving(tls=ServerTls("listener", pair.cert, pair.key)) as served:
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.load_verify_locations(authority.ca)
        old.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.warns(DeprecationWarning, match="deprecated"):
            old.minimum_version = ssl.TLSVersion.TLSv1
        with pytest.warns(DeprecationWarning, match="deprecated"):
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await served.say(WHOLE, old)


@pytest.mark.parametrize("fault", ["stranger", "other-name", "expired", "for-clients"])
async def test_a_peer_that_cannot_prove_its_name_is_sent_nothing(
    authority: Any, make_authority: Any, serving: Any, fault: str
) -> None:
    trusted = authority
    match fault:
        case "stranger":
            trusted, pair = make_authority("stranger"), authority.issue("server")
        case "other-name":
            pair = authority.issue("server", host="127.0.0.2")
        case "expired":
            pair = authority.issue("server", days=-1)
        case _:
            pair = authority.issue("server", uses=[ExtendedKeyUsageOID.CLIENT_AUTH])
    async with serving(tls=ServerTls("listener", pair.cert, pair.key)) as served:
        async with Client(tls=ClientTls("upstream", trusted.ca)) as client:
            with pytest.raises(ConnectError):
                await ask(client, served.address)
        assert served.seen == []


async def test_pods_that_share_a_name_are_known_by_it(authority: Any, serving: Any) -> None:
    pair = authority.issue("server", host="sidecar.pdcoord.svc")
    async with serving(tls=ServerTls("listener", pair.cert, pair.key)) as served:
        named = ClientTls("upstream", authority.ca, peer_name="sidecar.pdcoord.svc")
        async with Client(tls=named) as client:
            assert await ask(client, served.address) == b"{}"
        other = ClientTls("upstream", authority.ca, peer_name="other.pdcoord.svc")
        async with Client(tls=other) as client:
            with pytest.raises(ConnectError):
                await ask(client, served.address)


@pytest.mark.parametrize("fault", ["none", "stranger", "expired", "for-servers"])
async def test_a_client_without_a_certificate_of_ours_is_not_served(
    authority: Any, make_authority: Any, serving: Any, fault: str
) -> None:
    pair = authority.issue("server")
    match fault:
        case "none":
            shown = None
        case "stranger":
            shown = make_authority("stranger").issue("client")
        case "expired":
            shown = authority.issue("client", days=-1)
        case _:
            shown = authority.issue("client", uses=[ExtendedKeyUsageOID.SERVER_AUTH])
    async with serving(tls=ServerTls("listener", pair.cert, pair.key, authority.ca)) as served:
        good = authority.issue("good")
        async with Client(tls=ClientTls("upstream", authority.ca, cert=good.cert, key=good.key)) as client:
            assert await ask(client, served.address) == b"{}"
        more = {} if shown is None else {"cert": shown.cert, "key": shown.key}
        async with Client(tls=ClientTls("upstream", authority.ca, **more)) as client:
            with pytest.raises(WireError):
                await ask(client, served.address)
        assert len(served.seen) == 1


@on_uvloop
async def test_a_renewed_certificate_is_used_without_a_restart(
    authority: Any, make_authority: Any, serving: Any
) -> None:
    pair = authority.issue("server")
    tls = ServerTls("listener", pair.cert, pair.key)
    other = make_authority("other")
    async with serving(tls=tls) as served, Client(tls=ClientTls("upstream", authority.ca)) as before:
        assert await ask(before, served.address) == b"{}"
        renewed = other.issue("renewed")
        shutil.copy(renewed.key, pair.key)
        shutil.copy(renewed.cert, pair.cert)
        assert tls.look()
        assert not tls.look()
        assert await ask(before, served.address) == b"{}", "what is connected stays"
        async with Client(tls=ClientTls("upstream", other.ca)) as after:
            assert await ask(after, served.address) == b"{}"
        async with Client(tls=ClientTls("upstream", authority.ca)) as late:
            with pytest.raises(ConnectError):
                await ask(late, served.address)


@pytest.mark.parametrize("fault", ["half", "garbage", "gone", "expired"])
async def test_a_bad_pair_leaves_the_last_good_one_in_force(authority: Any, serving: Any, fault: str) -> None:
    pair = authority.issue("server")
    tls = ServerTls("listener", pair.cert, pair.key)
    renewed = authority.issue("renewed")
    async with serving(tls=tls) as served:
        match fault:
            case "half":
                shutil.copy(renewed.cert, pair.cert)
            case "garbage":
                pair.cert.write_text("no PEM")
            case "expired":
                expired = authority.issue("expired", days=-1)
                shutil.copy(expired.key, pair.key)
                shutil.copy(expired.cert, pair.cert)
            case _:
                pair.key.unlink()
        with pytest.raises(PemError):
            tls.look()
        assert not tls.look(), "said once"
        async with Client(tls=ClientTls("upstream", authority.ca)) as client:
            assert await ask(client, served.address) == b"{}"
        shutil.copy(renewed.cert, pair.cert)
        shutil.copy(renewed.key, pair.key)
        assert tls.look()


@on_uvloop
async def test_an_authority_that_is_taken_away_lets_nobody_in_again(
    authority: Any, make_authority: Any, serving: Any, tmp_path: Path
) -> None:
    clients = make_authority("clients")
    pair, mine = authority.issue("server"), clients.issue("client")
    roots = tmp_path / "roots.crt"
    shutil.copy(clients.ca, roots)
    tls = ServerTls("listener", pair.cert, pair.key, roots)
    shown = ClientTls("upstream", authority.ca, cert=mine.cert, key=mine.key)
    async with serving(tls=tls) as served:
        async with Client(tls=shown) as client:
            assert await ask(client, served.address) == b"{}"
        stranger = ssl.create_default_context(cafile=str(authority.ca))
        stranger.load_cert_chain(mine.cert, mine.key)
        session = await asyncio.to_thread(resume, stranger, served.port, None)
        assert session is None, "TLS 1.3: every session is begun anew"
        stranger.maximum_version = ssl.TLSVersion.TLSv1_2
        session = await asyncio.to_thread(resume, stranger, served.port, None)
        assert session is not None
        shutil.copy(authority.ca, roots)
        assert tls.look()
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.to_thread(resume, stranger, served.port, session)
        async with Client(tls=shown) as client:
            with pytest.raises(WireError):
                await ask(client, served.address)


async def test_a_body_that_a_stranger_could_cut_is_not_taken(authority: Any) -> None:
    pair = authority.issue("server")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.cert, pair.key)

    class Cutting(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            self.transport.write(b"HTTP/1.1 200 OK\r\n\r\nhalf of")
            self.transport.close()

    server = await asyncio.get_running_loop().create_server(Cutting, "127.0.0.1", 0, ssl=context)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with Client(tls=ClientTls("upstream", authority.ca)) as client:
        with pytest.raises(StreamError):
            await ask(client, address)
    server.close()


@on_uvloop
async def test_a_relayed_stream_is_whole_over_tls_on_both_sides(authority: Any, serving: Any) -> None:
    pair = authority.issue("server")
    parts = [b"data: %d %b\n\n" % (index, b"x" * (index % 1_500)) for index in range(2_000)]

    async def engine(scope: Any, receive: Any, send: Any) -> None:
        await send_head(send, 200, [(b"content-type", b"text/event-stream")])
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    tls = ServerTls("listener", pair.cert, pair.key)
    async with (
        serving(engine, tls=tls) as behind,
        Client(tls=ClientTls("upstream", authority.ca)) as client,
    ):

        async def relay(scope: Any, receive: Any, send: Any) -> None:
            async with await client.request("GET", behind.address, "/", head_timeout_s=WAIT_S) as response:
                await send_head(send, 200, [(b"content-type", b"text/event-stream")])
                await relay_body(scope, send, response, idle_timeout_s=WAIT_S)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        async with serving(relay, tls=tls) as front:
            assert await ask(client, front.address) == b"".join(parts)


async def test_a_handshake_that_stalls_is_cut(
    authority: Any, serving: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdcoord.wire.server.HANDSHAKE_S_MAX", 0.1)
    pair = authority.issue("server")
    async with serving(tls=ServerTls("listener", pair.cert, pair.key)) as served:
        assert await served.say(b"\x16\x03\x01") == b""
