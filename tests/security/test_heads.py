"""One request stays one request: what every listener and the client refuse to read."""

import asyncio
import json
from typing import Any

import pytest

from pdcoord.wire import protocol
from pdcoord.wire.client import Client
from pdcoord.wire.errors import InvalidRequestError, StreamError

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\n"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"


async def assert_refused(serving: Any, attack: bytes, status: int = 400) -> None:
    async with serving() as served:
        answer = await served.say(attack)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % status), answer
        assert b"\r\nconnection: close" in head
        assert json.loads(body)["error"]["type"] == "invalid_request_error"
        assert served.seen == []


@pytest.mark.parametrize(
    "lines",
    [
        b"Content-Length: 3\r\n" + CHUNKED,
        CHUNKED + b"Content-Length: 3\r\n",
        b"Content-Length: 3\r\nContent-Length: 3\r\n",
        b"Content-Length: 3\r\nContent-Length: 40\r\n",
        b"Content-Length: 3, 3\r\n",
        b"Content-Length: +3\r\n",
        b"Content-Length: 0x3\r\n",
        b"Content-Length: 3 4\r\n",
        b"Content-Length: -1\r\n",
        b"Content-Length:\r\n",
        b"Content-Length: 99999999999999999999999\r\n",
    ],
)
async def test_a_body_of_two_lengths_is_refused(serving: Any, lines: bytes) -> None:
    await assert_refused(serving, HEAD + lines + b"\r\n0\r\n\r\n" + SMUGGLED)


@pytest.mark.parametrize(
    "lines",
    [
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n",
        CHUNKED + CHUNKED,
        b"Transfer-Encoding: chunked, identity\r\n",
        b"Transfer-Encoding: identity\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"Transfer-Encoding:\x0bchunked\r\n",
        b"Transfer-Encoding : chunked\r\n",
    ],
)
async def test_a_coding_that_is_not_chunked_alone_is_refused(serving: Any, lines: bytes) -> None:
    await assert_refused(serving, HEAD + lines + b"\r\n0\r\n\r\n" + SMUGGLED)


async def test_chunks_in_http_1_0_are_refused(serving: Any) -> None:
    old = b"POST / HTTP/1.0\r\nhost: a\r\n" + CHUNKED + b"\r\n0\r\n\r\n"
    await assert_refused(serving, old + SMUGGLED)


@pytest.mark.parametrize(
    "lines",
    [
        b"a: b\r\n c\r\n\r\n",
        b" a: b\r\n\r\n",
        b"a: b\n\r\n",
        b"a: b\r\n\n",
        b"a: b\rc: d\r\n\r\n",
        b"a: b\x00c\r\n\r\n",
        b"a: b\x01c\r\n\r\n",
        b"a : b\r\n\r\n",
        b"a\t: b\r\n\r\n",
        b"a\x00: b\r\n\r\n",
        b"a\xe4: b\r\n\r\n",
        b": b\r\n\r\n",
        b"no colon\r\n\r\n",
    ],
)
async def test_a_field_that_readers_take_differently_is_refused(serving: Any, lines: bytes) -> None:
    await assert_refused(serving, b"GET / HTTP/1.1\r\nhost: a\r\n" + lines + SMUGGLED)


@pytest.mark.parametrize(
    "line",
    [
        b"GET http://other/v1/models HTTP/1.1\r\n",
        b"GET * HTTP/1.1\r\n",
        b"GET v1/models HTTP/1.1\r\n",
        b"GET /a b HTTP/1.1\r\n",
        b"GET /a\x00b HTTP/1.1\r\n",
        b"GET /\xe4 HTTP/1.1\r\n",
        b"CONNECT other:443 HTTP/1.1\r\n",
        b"GET / HTTP/0.9\r\n",
        b"GET / HTTP/2.0\r\n",
        b"PRI * HTTP/2.0\r\n",
        b"get / HTTP/1.1\r\n",
        b"GET / HTTP/1.1 \r\n",
        b"GET / HTTP/1.1\n",
    ],
)
async def test_a_request_line_that_is_not_plain_is_refused(serving: Any, line: bytes) -> None:
    await assert_refused(serving, line + b"host: a\r\n\r\n" + SMUGGLED)


@pytest.mark.parametrize("lines", [b"", b"host: a\r\nhost: b\r\n", b"host: a/b\r\n", b"host: a@b\r\n"])
async def test_a_host_in_doubt_is_refused(serving: Any, lines: bytes) -> None:
    await assert_refused(serving, b"GET / HTTP/1.1\r\n" + lines + b"\r\n" + SMUGGLED)


@pytest.mark.parametrize(
    "body",
    [
        b"3 \r\nabc\r\n0\r\n\r\n",
        b"3\nabc\n0\n\n",
        b"3\r\nabcX\r\n0\r\n\r\n",
        b"-3\r\nabc\r\n0\r\n\r\n",
        b"0x3\r\nabc\r\n0\r\n\r\n",
        b"fffffffffffffffff\r\nabc\r\n0\r\n\r\n",
        b"3;a=\n\r\nabc\r\n0\r\n\r\n",
    ],
)
async def test_a_chunk_in_doubt_ends_the_connection(serving: Any, body: bytes) -> None:
    await assert_refused(serving, HEAD + CHUNKED + b"\r\n" + body + SMUGGLED)


async def test_framing_without_content_is_bounded(serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "FRAMING_BYTES_MAX", 4_096)
    chunk = b"1;" + b"x" * 2_000 + b"\r\na\r\n"
    await assert_refused(serving, HEAD + CHUNKED + b"\r\n" + chunk * 8)


@pytest.mark.parametrize("lines", [b"a: " + b"x" * 300_000, b"a: b\r\n" * 200])
async def test_a_head_is_bounded_in_size_and_fields(serving: Any, lines: bytes) -> None:
    await assert_refused(serving, b"GET / HTTP/1.1\r\nhost: a\r\n" + lines + b"\r\n\r\n", status=431)


async def test_a_trailer_is_no_header(serving: Any) -> None:
    body = b"3\r\nabc\r\n0\r\nX-Pdcoord-Plan: {}\r\nX-Prefiller-Host-Port: 10.0.0.1:1\r\n\r\n"
    async with serving() as served:
        answer = await served.say(HEAD + CHUNKED + b"connection: close\r\n\r\n" + body)
        assert answer.startswith(b"HTTP/1.1 200 ")
        ((_, _, headers, got),) = served.seen
        assert got == b"abc"
        assert [name for name, _ in headers if name.startswith(b"x-")] == []


@pytest.mark.parametrize("spelling", [b"Upgrade", b"UPGRADE", b"upgrade"])
@pytest.mark.parametrize("cut", [None, 70, 90])
async def test_an_offer_to_upgrade_changes_nothing(serving: Any, spelling: bytes, cut: int | None) -> None:
    body = b"upgrade: a line of the body\r\n\r\n"
    offer = b"Connection: Upgrade, HTTP2-Settings, close\r\n" + spelling + b": h2c\r\nHTTP2-Settings: AA\r\n"
    request = HEAD + offer + b"content-length: %d\r\n\r\n" % len(body) + body
    async with serving() as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(request[:cut])
        if cut is not None:
            await writer.drain()
            await asyncio.sleep(0.01)
            writer.write(request[cut:])
        async with asyncio.timeout(20.0):
            assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
        writer.transport.abort()
        assert [got for *_, got in served.seen] == [body]


async def test_a_malformed_request_does_not_answer_inside_another_answer(serving: Any) -> None:
    begun = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        begun.set()
        while (await receive())["type"] != "http.disconnect":
            pass

    async with serving(app) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        await begun.wait()
        writer.write(b"GET / HTTP/1.1\r\nhost : a\r\n\r\n")
        async with asyncio.timeout(20.0):
            answer = await reader.read()
        writer.transport.abort()
        assert answer.endswith(b"\r\n\r\n5\r\nfirst\r\n"), "cut off, with nothing of another answer in it"


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nabc",
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\na: b\r\n c\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\na: b\nset-cookie: x\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\na: b\rset-cookie: x\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\na: b\x00\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\na : b\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\n\n",
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 300 + b"content-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\na: " + b"b" * 400_000 + b"\r\ncontent-length: 0\r\n\r\n",
    ],
)
async def test_an_engines_malformed_head_is_an_error_and_ends_its_connection(
    saying: Any, answer: bytes
) -> None:
    async with saying(answer) as address, Client() as client:
        with pytest.raises(StreamError):
            await client.request("GET", address, "/", head_timeout_s=10.0)
        assert client.connection_count == 0


async def test_bytes_behind_an_answer_are_not_the_next_answer(saying: Any) -> None:
    whole = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
    forged = b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nforged"
    async with saying(whole + forged) as address, Client() as client:
        for _ in range(2):
            async with await client.request("GET", address, "/", head_timeout_s=10.0) as response:
                assert await response.read_all(timeout_s=10.0) == b"ok"


@pytest.mark.parametrize(
    ("target", "name", "value"),
    [
        ("/", b"a", b"b\r\nx-pdcoord-plan: {}"),
        ("/", b"a", b"b\nc: d"),
        ("/", b"a", b"b\x00"),
        ("/", b"a\r\nc", b"d"),
        ("/", b"a b", b"c"),
        ("/ HTTP/1.1\r\na: b", b"a", b"b"),
        ("/\x80", b"a", b"b"),
    ],
)
async def test_no_header_or_target_becomes_two_upstream(target: str, name: bytes, value: bytes) -> None:
    async with Client() as client:
        with pytest.raises(InvalidRequestError):
            await client.request(
                "GET",
                "127.0.0.1:9",
                target,
                headers=[(name, value)],
                head_timeout_s=1.0,  # type: ignore[arg-type]
            )


async def test_connections_of_one_listener_are_bounded(serving: Any) -> None:
    async with serving(connections_max=2) as served:
        held = [await asyncio.open_connection("127.0.0.1", served.port) for _ in range(2)]
        for _, writer in held:
            writer.write(b"GET / HTTP/1.1\r\n")
        whole = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
        assert await served.say(whole) == b""
        for _, writer in held:
            writer.write(b"host: a\r\nconnection: close\r\n\r\n")
        async with asyncio.timeout(20.0):
            answers = [await reader.read() for reader, _ in held]
        assert all(answer.startswith(b"HTTP/1.1 200 ") for answer in answers)
        for _, writer in held:
            writer.transport.abort()


async def test_a_head_that_never_ends_is_cut(serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_S_MAX", 0.1)
    async with serving() as served:
        assert await served.say(b"GET / HTTP/1.1\r\nhost: a\r\n") == b""
        assert served.seen == []
