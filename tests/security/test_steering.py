"""Who decides where a request goes: the coordinator alone, and only to addresses of this fleet."""

import contextlib
import json
from typing import Any

import pytest

from pdcoord.extproc import calls
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import PlanHeader, PrefillTarget, encode_plan
from pdcoord.wire.client import Client
from pdcoord.wire.errors import StreamError

WAIT_S = 40.0
CHAT = "/v1/chat/completions"
JSON = (b"content-type", b"application/json")
STEERING = [
    b"x-pdcoord-plan",
    b"x-pdcoord-plan-signature",
    b"x-pdcoord-leg",
    b"x-pdcoord-anything",
    b"x-prefiller-host-port",
    b"x-prefiller-url",
    b"x-encoder-hosts-ports",
    b"x-data-parallel-host-port",
    b"x-data-parallel-rank",
    b"x-kv-cache-source-host-port",
    b"x-gateway-destination-endpoint",
    b"x-override-bootstrap-host",
    b"x-vllm-priority",
]
SPELLINGS = [bytes.upper, bytes.title, lambda name: name.replace(b"-", b"_")]


def body(**more: Any) -> bytes:
    message = {"role": "user", "content": "hello"}
    return json.dumps({"model": "security/model", "messages": [message], **more}).encode()


async def ask(address: HostPort, *headers: tuple[bytes, bytes], raw: bytes | None = None) -> tuple[int, Any]:
    async with (
        Client() as client,
        await client.request(
            "POST", address, CHAT, headers=[JSON, *headers], body=raw or body(), head_timeout_s=WAIT_S
        ) as response,
    ):
        told = await response.read_all(timeout_s=WAIT_S)
        return response.status, json.loads(told) if told.startswith(b"{") else {}


async def test_no_spelling_of_a_steering_header_passes_the_gateway(gateway: Any, serving: Any) -> None:
    lines = b"".join(
        spell(name) + b": mine\r\n" for name in STEERING for spell in SPELLINGS for _ in range(2)
    )
    sent = body()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
    head += lines + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(sent)
    async with serving() as engine:
        front = await gateway(engine.address)
        engine.port, port = int(front.rpartition(":")[2]), engine.port
        answer = await engine.say(head + sent)
        engine.port = port
        assert answer.startswith(b"HTTP/1.1 200 "), answer
        (headers,) = [headers for method, path, headers, _ in engine.seen if path == CHAT]
    given = [name for name, value in headers if value == b"mine"]
    assert given == []
    assert [name for name, _ in headers if name.startswith(b"x-p")] == [b"x-pdcoord-plan"], (
        "the gateway's own"
    )


@pytest.mark.parametrize("name", STEERING)
def test_no_spelling_of_a_steering_header_passes_the_picker(name: bytes) -> None:
    client = [(spell(name).lower(), b"mine") for spell in SPELLINGS]
    removed = calls._removed(client, [], frozenset())
    kept = {each for each, _ in client} - set(removed)
    # The picker's own answer replaces this one.
    assert kept <= {b"x-gateway-destination-endpoint"}


async def test_no_header_that_steers_reaches_an_engine(sidecar: Any) -> None:
    headers = [
        (name, b"") for name in STEERING if not name.startswith((b"x-pdcoord-plan", b"x-prefiller-host"))
    ]
    headers += [(name.replace(b"-", b"_"), b"10.0.0.1:1") for name in STEERING]
    async with sidecar() as beside:
        assert (await ask(beside.address, *headers))[0] == 200
        ((_, _, got, _),) = [seen for seen in beside.engine.seen if seen[1] == CHAT]
    names = {name.replace(b"_", b"-") for name, _ in got}
    assert names.isdisjoint(STEERING)


@pytest.mark.parametrize(
    "named",
    [
        "10.0.0.2:8000",
        "10.0.0.1:8001",
        "10.0.0.1.:8001",
        "169.254.169.254:80",
        "[::1]:8000",
        "localhost:8000",
    ],
)
@pytest.mark.parametrize("by_plan", [True, False])
async def test_a_prefill_target_off_the_list_is_not_dialled(
    sidecar: Any, serving: Any, named: str, *, by_plan: bool
) -> None:
    async with sidecar("--allow", "10.0.0.1:8000") as beside:
        if by_plan:
            target = PrefillTarget(address=HostPort(named))
            plan = PlanHeader(prefills=(target,), is_colocated_allowed=False)
            status, told = await ask(beside.address, (b"x-pdcoord-plan", encode_plan(plan)))
            assert status == 503
            assert "target-not-allowed" in told["error"]["message"]
        else:
            status, told = await ask(beside.address, (b"x-prefiller-host-port", named.encode()))
            assert (status, told["error"]["code"]) == (403, "target-not-allowed")
        assert CHAT not in [path for _, path, *_ in beside.engine.seen]


async def test_the_port_of_an_allowed_host_counts(sidecar: Any, serving: Any) -> None:
    async with serving() as allowed, serving() as other, sidecar("--allow", allowed.address) as beside:
        status, _ = await ask(beside.address, (b"x-prefiller-host-port", other.address.encode()))
        assert (status, other.seen) == (403, [])
        await ask(beside.address, (b"x-prefiller-host-port", allowed.address.encode()))
        assert [path for _, path, *_ in allowed.seen] == [CHAT]
        for ports in ({"kv_port": 6379}, {"bootstrap_port": 22}):
            target = PrefillTarget(address=HostPort(allowed.address), **ports)
            await ask(beside.address, (b"x-pdcoord-plan", encode_plan(PlanHeader(prefills=(target,)))))
        assert [path for _, path, *_ in allowed.seen] == [CHAT]


async def test_a_stream_is_continued_at_listed_endpoints_only(
    sidecar: Any, serving: Any, saying: Any
) -> None:
    event = b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"hi"},"finish_reason":null}]}\n\n'
    broken = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    broken += b"%x\r\n%b\r\n" % (len(event), event)
    streamed = body(stream=True, temperature=0)
    async with saying(broken, closes=True) as engine, serving() as other:
        plan = (b"x-pdcoord-plan", encode_plan(PlanHeader(resumes=(other.address,), resume_tries_max=1)))
        # Whether its template leaves a partial answer open is asked first.
        for allowed, asked in (("10.0.0.1:8000", []), (f"{other.address}/decode", ["/tokenize"])):
            async with sidecar("--allow", allowed, before=engine) as beside:
                with contextlib.suppress(StreamError):
                    await ask(beside.address, plan, raw=streamed)
            assert [path for _, path, *_ in other.seen][:1] == asked


@pytest.mark.parametrize(
    "given",
    [
        b"{",
        b"[]",
        b'{"version":9}',
        b'{"prefills":[{"address":"x"}]}',
        b'{"prefill_deadline_ms":1e300}',
        b"\xff\xfe",
    ],
)
async def test_a_plan_that_cannot_be_read_is_refused(sidecar: Any, given: bytes) -> None:
    async with sidecar() as beside:
        status, told = await ask(beside.address, (b"x-pdcoord-plan", given))
        assert (status, told["error"]["param"]) == (400, "x-pdcoord-plan")
        assert CHAT not in [path for _, path, *_ in beside.engine.seen]


async def test_a_client_cannot_bring_a_ticket(gateway: Any, sidecar: Any, serving: Any) -> None:
    ticket = body(kv_transfer_params={"do_remote_prefill": True, "remote_host": "10.6.6.6"})
    async with serving() as engine, sidecar() as beside:
        front = await gateway(engine.address)
        assert (await ask(front, raw=ticket))[0] == 400
        await ask(beside.address, raw=ticket)
        reached = [got for *_, got in (*engine.seen, *beside.engine.seen)]
    assert [got for got in reached if b"10.6.6.6" in got] == []


async def test_an_id_that_is_no_id_is_replaced(gateway: Any, serving: Any) -> None:
    async with serving() as engine:
        front = await gateway(engine.address)
        for given in (b"a b", b"x" * 129, b"\xe4", b""):
            assert (await ask(front, (b"x-request-id", given)))[0] == 200
        ids = [dict(headers)[b"x-request-id"] for _, path, headers, _ in engine.seen if path == CHAT]
    assert len(ids) == 4
    assert all(len(each) <= 128 and each.isalnum() for each in ids)
