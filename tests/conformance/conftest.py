"""Plays Envoy towards an endpoint picker, and starts `pdcoord extproc` where no other picker is named.

What a test gets: `target`, what is known of the picker; `envoy`, which opens streams to it. README.md has the
options. Nothing here imports pdcoord.
"""

import asyncio
import json
import os
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from envoy.config.core.v3.base_pb2 import HeaderMap, HeaderValue, HeaderValueOption
from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from envoy.service.ext_proc.v3.external_processor_pb2_grpc import ExternalProcessorStub
from google.protobuf.struct_pb2 import Struct

WAIT_S = 60.0
"""Longest wait for anything that must happen; the machine may be busy."""
STOP_S = 10.0
DESTINATION = "x-gateway-destination-endpoint"
SUBSET = ("envoy.lb.subset_hint", "x-gateway-destination-endpoint-subset")
SERVED = ("envoy.lb", "x-gateway-destination-endpoint-served")
OPTIONS = {
    "picker": "HOST:PORT of the picker's gRPC; pdcoord's own is started where it is not given",
    "picker-health": "HOST:PORT of its gRPC health service (default: port 9003 of the same host)",
    "picker-secure": "yes if it serves TLS; its certificate is not verified",
    "picker-endpoints": "HOST:PORT,... that it may pick, all of them ready; needed with --picker",
    "picker-model": "model to ask for; needed with --picker",
    "picker-alias": "another name of that model, which the picker replaces in the body",
    "picker-model-full": "a model whose endpoints take one call at a time, and none waits",
    "picker-body-bytes-max": "longest body that it takes",
    "picker-body-ends": "yes if it gives up a body that does not go on",
    "picker-kind": "pdcoord, to run the tests of what is pdcoord's own",
}


# What is tested, and how.


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance", "conformance of an endpoint picker")
    for name, text in OPTIONS.items():
        group.addoption(f"--{name}", help=f"{text} [env: {name.replace('-', '_').upper()}]")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "optional: what the protocol allows and does not ask for")
    config.addinivalue_line("markers", "pdcoord: what pdcoord does beyond the protocol; others skip it")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    is_ours = option(config, "picker") is None or option(config, "picker-kind") == "pdcoord"
    for item in items:
        if is_ours or not item.path.is_relative_to(here):
            continue
        if item.get_closest_marker("pdcoord"):
            item.add_marker(pytest.mark.skip(reason="pdcoord's own: --picker-kind pdcoord runs it"))
        if item.get_closest_marker("optional"):
            item.add_marker(pytest.mark.xfail(reason="optional", strict=False))


def option(config: pytest.Config, name: str) -> str | None:
    # This file is loaded too late for options of a run that does not name this folder.
    given = config.getoption(f"--{name}", default=None) or os.environ.get(name.replace("-", "_").upper())
    return str(given) if given else None


@dataclass(frozen=True, slots=True)
class Target:
    """What is known of the picker under test; see OPTIONS."""

    address: str
    health: str
    endpoints: frozenset[str]
    model: str
    is_secure: bool = False
    alias: str | None = None
    model_full: str | None = None
    body_bytes_max: int | None = None
    has_body_deadline: bool = False

    def need(self, name: str) -> Any:
        """An attribute without which the test says nothing."""
        value = getattr(self, name)
        if not value:
            pytest.skip(f"needs --picker-{name.replace('_', '-')}")
        return value


@pytest.fixture(scope="session")
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    def given(name: str) -> str | None:
        return option(request.config, name)

    address = given("picker")
    if address is None:
        with own_picker(tmp_path_factory.mktemp("picker")) as own:
            yield own
        return
    endpoints, model = given("picker-endpoints"), given("picker-model")
    assert endpoints, "--picker-endpoints is not given"
    assert model, "--picker-model is not given"
    yield Target(
        address=address,
        health=given("picker-health") or f"{address.rpartition(':')[0]}:9003",
        endpoints=frozenset(each.strip() for each in endpoints.split(",")),
        model=model,
        is_secure=given("picker-secure") == "yes",
        alias=given("picker-alias"),
        model_full=given("picker-model-full"),
        body_bytes_max=int(given("picker-body-bytes-max") or 0) or None,
        has_body_deadline=given("picker-body-ends") == "yes",
    )


# Envoy's side of the protocol.


@dataclass(slots=True)
class Told:
    """What a picker said in one phase (request or response) of a stream.

    Attributes:
        kinds: of its messages, in order.
        heads: its answers to headers; `mutations` are those of the one that there may be.
        pieces: length and end_of_stream of every piece of body.
        refusal: its ImmediateResponse, after which there is nothing.
        code: status of the stream, once the picker has ended it.
    """

    kinds: list[str] = field(default_factory=list)
    heads: list[ext_proc.CommonResponse] = field(default_factory=list)
    pieces: list[tuple[int, bool]] = field(default_factory=list)
    body: bytes = b""
    metadata: dict[str, dict[str, Any]] = field(default_factory=dict)
    refusal: ext_proc.ImmediateResponse | None = None
    code: grpc.StatusCode | None = None

    def take(self, answer: ext_proc.ProcessingResponse) -> None:
        kind = answer.WhichOneof("response")
        self.kinds.append(kind)
        for namespace, fields in answer.dynamic_metadata.items():
            self.metadata.setdefault(namespace, {}).update(fields)
        if kind == "immediate_response":
            self.refusal = answer.immediate_response
        elif kind in {"request_headers", "response_headers"}:
            self.heads.append(getattr(answer, kind).response)
        elif kind in {"request_body", "response_body"}:
            piece = getattr(answer, kind).response.body_mutation.streamed_response
            self.pieces.append((len(piece.body), piece.end_of_stream))
            self.body += piece.body

    @property
    def status(self) -> int | None:
        """HTTP status of the refusal, if it is one."""
        return None if self.refusal is None else int(self.refusal.status.code)

    @property
    def destinations(self) -> list[str]:
        """The endpoints that were picked, in order."""
        assert self.refusal is None, self.refusal
        return self.headers([])[DESTINATION].split(",")

    def headers(self, sent: Sequence[tuple[str, str]]) -> dict[str, str]:
        """What Envoy 1.40 makes of headers with the picker's mutations: removals first, then what is set.

        A value counts only as raw_value; without append or an append_action it replaces.
        """
        result: dict[str, list[str]] = {}
        for name, value in sent:
            result.setdefault(name, []).append(value)
        for head in self.heads:
            for name in head.header_mutation.remove_headers:
                result.pop(name.lower(), None)
            for each in head.header_mutation.set_headers:
                name, value = each.header.key.lower(), each.header.raw_value.decode()
                assert not (each.header.value and value), f"{name} has value and raw_value"
                is_there = name in result
                match each.append_action:
                    case HeaderValueOption.ADD_IF_ABSENT if is_there:
                        continue
                    case HeaderValueOption.OVERWRITE_IF_EXISTS if not is_there:
                        continue
                if not each.append.value:
                    result[name] = []
                result.setdefault(name, []).append(value)
        return {name: ",".join(values) for name, values in result.items()}


class Stream:
    """One call as Envoy's filter shows it to a picker in FULL_DUPLEX_STREAMED."""

    def __init__(self, rpc: Any) -> None:
        self.rpc = rpc
        self._is_first = True

    async def send(self, *, hints: dict[tuple[str, str], Any] | None = None, **message: Any) -> None:
        """One message; `hints` is its metadata context: value by namespace and key."""
        request = ext_proc.ProcessingRequest(**message)
        for (namespace, key), value in (hints or {}).items():
            fields = Struct()
            fields.update({key: value})
            request.metadata_context.filter_metadata[namespace].MergeFrom(fields)
        if self._is_first:
            request.protocol_config.request_body_mode = ProcessingMode.FULL_DUPLEX_STREAMED
            request.protocol_config.response_body_mode = ProcessingMode.FULL_DUPLEX_STREAMED
            self._is_first = False
        async with asyncio.timeout(WAIT_S):
            await self.rpc.write(request)

    async def send_all(self, messages: Iterable[dict[str, Any]], told: Told) -> None:
        """Messages, until they are sent or the picker has refused."""
        for message in messages:
            if told.refusal is not None or told.code is not None:
                return
            try:
                await self.send(**message)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                return  # The picker ended the stream; the reader says how.

    async def hear(self, told: Told, is_over: Callable[[Told], bool]) -> Told:
        """Its messages until the phase is over, it refuses, or it ends the stream."""
        while told.refusal is None and not is_over(told):
            try:
                async with asyncio.timeout(WAIT_S):
                    answer = await self.rpc.read()
                    if answer is grpc.aio.EOF:
                        told.code = await self.rpc.code()
                        return told
            except grpc.aio.AioRpcError as error:
                told.code = error.code()
                return told
            except TimeoutError:
                raise AssertionError(f"silence for {WAIT_S:.0f} s after {told.kinds}") from None
            told.take(answer)
        return told

    async def talk(self, messages: Iterable[dict[str, Any]], is_over: Callable[[Told], bool]) -> Told:
        """Say all of it while listening, as Envoy does."""
        told = Told()
        fault: AssertionError | None = None
        async with asyncio.TaskGroup() as group:
            group.create_task(self.send_all(messages, told))
            try:
                await self.hear(told, is_over)
            except AssertionError as error:  # Told as it is and not within a group.
                fault, told.code = error, grpc.StatusCode.CANCELLED
        if fault is not None:
            raise fault
        return told

    async def ask(
        self,
        body: bytes | None,
        *,
        chunks: Iterable[bytes] | None = None,
        headers: Sequence[tuple[str, str]] | None = None,
        hints: dict[tuple[str, str], Any] | None = None,
        has_trailers: bool = False,
    ) -> Told:
        """The request phase, whole: no body ends with the headers; trailers end a body without its mark."""
        heads = post_headers() if headers is None else headers
        pieces = [] if body is None else [body] if chunks is None else list(chunks)
        first = head_message("request_headers", heads, is_last=body is None and not has_trailers)
        messages = [first, *body_messages("request_body", pieces, has_trailers=has_trailers)]
        if has_trailers:
            messages.append({"request_trailers": ext_proc.HttpTrailers()})
        ends = "request_trailers" if has_trailers else "request_headers" if body is None else ""
        return await self.talk(({**each, "hints": hints} for each in messages), over(ends))

    async def answer(
        self,
        chunks: Iterable[bytes],
        *,
        headers: Sequence[tuple[str, str]],
        served: str | None,
        has_trailers: bool = False,
    ) -> Told:
        """The response phase, whole; `served` is the endpoint that the data plane says it was."""
        pieces = list(chunks)
        is_bare = not pieces and not has_trailers
        messages = [head_message("response_headers", headers, is_last=is_bare)]
        messages += body_messages("response_body", pieces, has_trailers=has_trailers)
        if has_trailers:
            trailers = ext_proc.HttpTrailers(trailers=header_map([("x-trailer", "1")]))
            messages.append({"response_trailers": trailers})
        hints = None if served is None else {SERVED: served}
        ends = "response_trailers" if has_trailers else "response_headers" if is_bare else ""
        return await self.talk(({**each, "hints": hints} for each in messages), over(ends))

    async def end(self) -> grpc.StatusCode:
        """Say that nothing follows; the status that the picker ends the stream with."""
        await self.rpc.done_writing()
        return await self.status()

    async def status(self) -> grpc.StatusCode:
        async with asyncio.timeout(WAIT_S):
            with suppress(grpc.aio.AioRpcError):
                while await self.rpc.read() is not grpc.aio.EOF:
                    pass
            code: grpc.StatusCode = await self.rpc.code()
            return code


def over(ends: str) -> Callable[[Told], bool]:
    """A phase ends with a message of this kind, or with the last piece of its body."""

    def is_over(told: Told) -> bool:
        return told.kinds[-1:] == [ends] if ends else any(is_last for _, is_last in told.pieces)

    return is_over


def header_map(headers: Sequence[tuple[str, str]]) -> HeaderMap:
    return HeaderMap(headers=[HeaderValue(key=key, raw_value=value.encode()) for key, value in headers])


def head_message(kind: str, headers: Sequence[tuple[str, str]], *, is_last: bool) -> dict[str, Any]:
    return {kind: ext_proc.HttpHeaders(headers=header_map(headers), end_of_stream=is_last)}


def body_messages(kind: str, pieces: Sequence[bytes], *, has_trailers: bool) -> list[dict[str, Any]]:
    last = len(pieces) - 1
    return [
        {kind: ext_proc.HttpBody(body=piece, end_of_stream=index == last and not has_trailers)}
        for index, piece in enumerate(pieces)
    ]


def post_headers(path: str = "/v1/completions", **more: str) -> list[tuple[str, str]]:
    """Headers of a call, in the order in which Envoy gives them."""
    return [
        (":authority", "example"),
        (":path", path),
        (":method", "POST"),
        (":scheme", "http"),
        ("content-type", "application/json"),
        *((name.replace("_", "-"), value) for name, value in more.items()),
    ]


class Envoy:
    """Opens streams to the picker."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = ExternalProcessorStub(channel)
        self.post_headers = post_headers

    @asynccontextmanager
    async def stream(self) -> AsyncIterator[Stream]:
        """A call; one that is left before its end is reset, as by a client that goes away."""
        rpc = self._stub.Process()
        try:
            yield Stream(rpc)
        finally:
            rpc.cancel()

    async def ask(self, body: bytes | None, **how: Any) -> Told:
        """Only the request phase of a call, which is then reset."""
        async with self.stream() as stream:
            return await stream.ask(body, **how)


@pytest.fixture
async def envoy(target: Target) -> AsyncIterator[Envoy]:
    async with AsyncExitStack() as stack:
        address = target.address
        if target.is_secure:
            address = await stack.enter_async_context(unverified(address))
        yield Envoy(await stack.enter_async_context(grpc.aio.insecure_channel(address)))


@asynccontextmanager
async def unverified(address: str) -> AsyncIterator[str]:
    """A plain address on loopback whose bytes go to a TLS server without a look at its certificate.

    Proxies connect to pickers in this way, since pickers make their own certificates; gRPC cannot.
    """
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")

    busy: set[asyncio.Task[Any]] = set()

    async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(1 << 16):
                sink.write(data)
                await sink.drain()
        sink.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        busy.add(task)
        far_reader, far_writer = await asyncio.open_connection(host, int(port), ssl=context)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(copy(reader, far_writer))
                group.create_task(copy(far_reader, writer))
        finally:
            for each in (writer, far_writer):
                each.transport.abort()
                with suppress(OSError):
                    await each.wait_closed()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    for task in busy:
        task.cancel()  # gRPC may keep a connection for its next channel.
    if busy:
        await asyncio.wait(busy, timeout=STOP_S)


# pdcoord's own picker.


@contextmanager
def own_picker(folder: Path, *flags: str) -> Iterator[Target]:
    """The picker of pdcoord_picker.py, in processes of its own that end with this one."""
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("pdcoord_picker.py")), str(folder), *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, f"the picker did not start:\n{(folder / 'log').read_text()}"
        fields = json.loads(line)
        yield Target(**{**fields, "endpoints": frozenset(fields["endpoints"])})
    finally:
        process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(2 * STOP_S)
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def start_own(tmp_path: Path) -> Iterator[Callable[..., Target]]:
    """Starts further pickers of pdcoord's, which end with the test."""
    with ExitStack() as stack:
        yield lambda *flags: stack.enter_context(own_picker(tmp_path, *flags))
