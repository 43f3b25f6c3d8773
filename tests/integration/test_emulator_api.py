"""The API of one emulated engine, byte by byte where a coordinator could tell."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from pdcoord.sim import emulator_edge
from pdcoord.sim.emulator import EmulatedEngine, running
from pdcoord.sim.fleetfile import EmulatedFleet
from pdcoord.wire.client import Client

MODEL = "demo/tiny"
ENGINE = {
    "name": "e",
    "profile": "nvidia-h100-8b",
    "port": 0,
    "context_tokens_max": 2_048,
    "speed": {"prefill_base_ms": 0.1, "prefill_ms_per_token": 0.001, "step_base_ms": 0.5},
}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}


@dataclass
class Bench:
    client: Client
    engine: EmulatedEngine

    async def send(
        self, method: str, path: str, raw: bytes = b"", headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        async with await self.client.request(
            method,
            self.engine.address,
            path,
            headers=[(name.encode(), value.encode()) for name, value in (headers or {}).items()],
            body=raw,
            head_timeout_s=10.0,
        ) as response:
            body = await response.read_all(timeout_s=10.0)
            return response.status, {n.decode(): v.decode() for n, v in response.headers}, body

    async def post(self, path: str, body: Any) -> tuple[int, Any]:
        status, _, raw = await self.send("POST", path, json.dumps(body).encode())
        return status, json.loads(raw)


@asynccontextmanager
async def started(**fields: Any) -> AsyncIterator[Bench]:
    fleet = EmulatedFleet.model_validate_json(
        json.dumps(
            {
                "apiVersion": "pdcoord.io/v1alpha1",
                "kind": "EmulatedFleet",
                "model": MODEL,
                "engines": [{**ENGINE, **fields}],
            }
        )
    )
    async with running(fleet, fleet.engines) as ((engine,), _), Client() as client:
        yield Bench(client, engine)


async def test_each_token_is_one_event_in_one_chunk() -> None:
    async with started() as bench:
        host, _, port = bench.engine.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        raw = json.dumps({**CHAT, "stream": True, "stream_options": {"include_usage": True}}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(raw)}\r\n\r\n"
        writer.write(head.encode() + raw)
        async with asyncio.timeout(10.0):
            answer = await reader.readuntil(b"0\r\n\r\n")
        writer.close()
        chunks = []
        rest = answer.partition(b"\r\n\r\n")[2]
        while rest and not rest.startswith(b"0\r\n"):
            size, _, rest = rest.partition(b"\r\n")
            chunks.append(rest[: int(size, 16)])
            rest = rest[int(size, 16) + 2 :]
        assert all(chunk.startswith(b"data: ") and chunk.endswith(b"\n\n") for chunk in chunks)
        assert all(chunk.count(b"\n\n") == 1 for chunk in chunks)
        *events, last = [chunk.removeprefix(b"data: ").strip() for chunk in chunks]
        assert last == b"[DONE]"
        decoded = [json.loads(each) for each in events]
        assert len(decoded) == 5  # The role, three tokens, the usage.
        assert decoded[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert [each["choices"][0]["finish_reason"] for each in decoded[:4]] == [None, None, None, "length"]
        assert decoded[4]["choices"] == []
        assert decoded[4]["usage"]["completion_tokens"] == 3
        assert {each["id"] for each in decoded} == {decoded[0]["id"]}


async def test_a_request_id_is_taken_over() -> None:
    async with started() as bench:
        _, headers, raw = await bench.send(
            "POST", "/v1/chat/completions", json.dumps(CHAT).encode(), {"x-request-id": "abc-1"}
        )
        assert json.loads(raw)["id"] == "chatcmpl-abc-1"
        assert headers["x-emulated-engine"] == "e"
        leg = {"model": MODEL, "prompt": "hi", "kv_transfer_params": {"do_remote_decode": True}}
        _, _, raw = await bench.send(
            "POST", "/v1/completions", json.dumps(leg).encode(), {"x-request-id": "abc-2"}
        )
        ticket = json.loads(raw)["kv_transfer_params"]
        assert ticket["remote_request_id"].startswith("cmpl-abc-2-")
        assert set(ticket) == {
            "do_remote_prefill", "do_remote_decode", "remote_block_ids", "remote_engine_id",
            "remote_request_id", "remote_host", "remote_port", "tp_size", "dcp_size", "pp_size",
            "remote_num_tokens", "remote_blocks_expiry_time", "transfer_mode", "remote_prefill_cached_tokens",
        }  # fmt: skip


async def test_token_ids_are_returned_on_request() -> None:
    async with started() as bench:
        body = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 4, "return_token_ids": True}
        _, answer = await bench.post("/v1/completions", body)
        choice = answer["choices"][0]
        assert choice["prompt_token_ids"] == [5, 6, 7]
        assert len(choice["token_ids"]) == 4
        _, words = await bench.post("/detokenize", {"model": MODEL, "tokens": choice["token_ids"]})
        assert words == {"prompt": choice["text"]}
        raw = json.dumps({**body, "stream": True}).encode()
        _, _, stream = await bench.send("POST", "/v1/completions", raw)
        chunks = [
            json.loads(line[6:]) for line in stream.decode().split("\n\n") if line.startswith("data: {")
        ]
        pieces = [each["choices"][0] for each in chunks]
        assert [token for piece in pieces for token in piece["token_ids"]] == choice["token_ids"]
        assert [piece["prompt_token_ids"] for piece in pieces] == [[5, 6, 7], None, None, None]
        _, chat = await bench.post("/v1/chat/completions", {**CHAT, "return_token_ids": True})
        assert len(chat["choices"][0]["token_ids"]) == 3
        _, counted = await bench.post("/tokenize", {"model": MODEL, "messages": CHAT["messages"]})
        assert counted["tokens"] == chat["prompt_token_ids"]
        # A ticket may bring the ids along; then the text is not tokenised again.
        leg = {"prompt_token_ids": [1, 2, 3]}
        _, chat = await bench.post(
            "/v1/chat/completions", {**CHAT, "return_token_ids": True, "kv_transfer_params": leg}
        )
        assert chat["prompt_token_ids"] == [1, 2, 3]


async def test_usage_in_every_chunk_on_request() -> None:
    async with started() as bench:
        options = {"include_usage": True, "continuous_usage_stats": True}
        raw = json.dumps({**CHAT, "stream": True, "stream_options": options}).encode()
        _, _, stream = await bench.send("POST", "/v1/chat/completions", raw)
        chunks = [
            json.loads(line[6:]) for line in stream.decode().split("\n\n") if line.startswith("data: {")
        ]
        assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [0, 1, 2, 3, 3]


async def test_anthropic_messages_whole_and_streamed_say_the_same() -> None:
    async with started() as bench:
        body = {**CHAT, "system": "Be brief.", "max_tokens": 5}
        _, whole = await bench.post("/v1/messages", body)
        assert whole["stop_reason"] == "max_tokens"
        assert whole["usage"]["output_tokens"] == 5
        _, _, stream = await bench.send("POST", "/v1/messages", json.dumps({**body, "stream": True}).encode())
        events = [each.partition("\ndata: ") for each in stream.decode().strip().split("\n\n")]
        data = [json.loads(each[2]) for each in events]
        assert [each[0].removeprefix("event: ") for each in events] == [each["type"] for each in data]
        text = "".join(e["delta"]["text"] for e in data if e["type"] == "content_block_delta")
        assert text == whole["content"][0]["text"]
        assert data[-2]["delta"]["stop_reason"] == "max_tokens"
        assert data[-1]["type"] == "message_stop"


async def test_rerank_and_score() -> None:
    async with started() as bench:
        body = {"model": MODEL, "query": "lease", "documents": ["a", "b", "c"], "top_n": 2}
        status, answer = await bench.post("/v1/rerank", body)
        scores = [each["relevance_score"] for each in answer["results"]]
        assert status == 200
        assert len(scores) == 2
        assert scores == sorted(scores, reverse=True)
        assert answer["results"][0]["document"]["text"] in {"a", "b", "c"}
        body = {"model": MODEL, "text_1": "lease", "text_2": ["a", "b"]}
        status, answer = await bench.post("/v1/score", body)
        assert status == 200
        assert [each["index"] for each in answer["data"]] == [0, 1]
        assert all(0.0 <= each["score"] <= 1.0 for each in answer["data"])
        assert bench.engine.host.model.pool.usage == 0.0


GENERATE = "/v1/completions"


@pytest.mark.parametrize(
    ("path", "body", "status", "kind"),
    [
        (GENERATE, {"model": "other", "prompt": "x"}, 404, "NotFoundError"),
        (GENERATE, {"model": MODEL, "prompt": ""}, 400, "BadRequestError"),
        (GENERATE, {"model": MODEL, "prompt": []}, 400, "BadRequestError"),
        (GENERATE, {"model": MODEL, "prompt": [[1], []]}, 400, "BadRequestError"),
        (GENERATE, {"model": MODEL, "prompt": {"a": 1}}, 400, "BadRequestError"),
        (GENERATE, {"model": MODEL, "prompt": "x", "max_tokens": 0}, 400, "BadRequestError"),
        (GENERATE, {"model": MODEL, "prompt": "x", "max_tokens": "many"}, 400, "BadRequestError"),
        (GENERATE, {"model": MODEL, "prompt": "x", "n": 0}, 400, "BadRequestError"),
        (GENERATE, {"model": MODEL, "prompt": "x", "stop": [1]}, 400, "BadRequestError"),
        (GENERATE, {"model": MODEL, "prompt_embeds": "AAAA"}, 400, "BadRequestError"),
        (GENERATE, {"model": MODEL}, 400, "BadRequestError"),
        (GENERATE, {"model": MODEL, "prompt": [7] * 2_048}, 400, "BadRequestError"),
        (GENERATE, ["not an object"], 400, "BadRequestError"),
        ("/v1/chat/completions", {"model": MODEL, "messages": []}, 400, "BadRequestError"),
        ("/v1/chat/completions", {"model": MODEL, "messages": "hi"}, 400, "BadRequestError"),
        ("/v1/embeddings", {"model": MODEL, "input": []}, 400, "BadRequestError"),
        ("/v1/embeddings", {"model": MODEL, "input": [{"a": 1}]}, 400, "BadRequestError"),
        ("/v1/embeddings", {"model": MODEL, "input": [5] * 2_049}, 400, "BadRequestError"),
        ("/v1/rerank", {"model": MODEL, "query": 1, "documents": ["a"]}, 400, "BadRequestError"),
        ("/v1/score", {"model": MODEL, "text_1": ["a", "b"], "text_2": ["c"] * 3}, 400, "BadRequestError"),
        ("/v1/score", {"model": MODEL}, 400, "BadRequestError"),
        ("/detokenize", {"model": MODEL, "tokens": [2**40]}, 400, "BadRequestError"),
        ("/tokenize", {"model": MODEL, "prompt": [1]}, 400, "BadRequestError"),
        ("/v1/nothing", {}, 404, "NotFoundError"),
        ("/v1/models", {}, 405, "MethodNotAllowedError"),
    ],
)
async def test_bad_calls_get_the_engines_own_errors(path: str, body: Any, status: int, kind: str) -> None:
    async with started() as bench:
        got, answer = await bench.post(path, body)
        assert got == status
        error = answer["error"]
        assert (error["type"], error["code"]) == (kind, status)
        assert error["message"]
        assert set(error) == {"message", "type", "param", "code"}
        assert (await bench.post("/v1/chat/completions", CHAT))[0] == 200
        assert bench.engine.host.model.pool.usage == 0.0


async def test_malformed_json_and_a_missing_model() -> None:
    async with started() as bench:
        status, _, raw = await bench.send("POST", GENERATE, b'{"prompt": ')
        assert status == 400
        assert json.loads(raw)["error"]["code"] == 400
        # There is one model; a call that names none is for it, as in vLLM.
        assert (await bench.post(GENERATE, {"prompt": "x", "max_tokens": 1}))[0] == 200


async def test_what_a_router_asks_besides() -> None:
    async with started() as bench:
        for path in ("/health", "/ping"):
            status, _, raw = await bench.send("GET", path)
            assert (status, raw) == (200, b"")
        assert json.loads((await bench.send("GET", "/version"))[2]) == {"version": "0.32.0"}
        assert json.loads((await bench.send("GET", "/load"))[2]) == {"server_load": 0}
        await bench.post("/v1/chat/completions", CHAT)
        status, headers, raw = await bench.send("GET", "/metrics")
        assert headers["content-type"].startswith("text/plain")
        names = {line.partition("{")[0] for line in raw.decode().splitlines() if line and line[0] != "#"}
        assert {
            "vllm:num_requests_running",
            "vllm:num_requests_waiting",
            "vllm:kv_cache_usage_perc",
            "vllm:prefix_cache_queries_total",
            "vllm:prefix_cache_hits_total",
            "vllm:prompt_tokens_by_source_total",
            "vllm:cache_config_info",
            "vllm:request_success_total",
            "vllm:num_preemptions_total",
            "vllm:time_to_first_token_seconds_bucket",
            "vllm:inter_token_latency_seconds_bucket",
            "vllm:nixl_xfer_time_seconds_bucket",
            "vllm:nixl_bytes_transferred_bucket",
            "vllm:nixl_num_failed_transfers_total",
            "vllm:nixl_num_kv_expired_reqs_total",
        } <= names
        text = raw.decode()
        assert (
            'vllm:request_success_total{engine="0",finished_reason="length",model_name="demo/tiny"} 1.0'
            in text
        )
        assert 'vllm:time_to_first_token_seconds_count{engine="0",model_name="demo/tiny"} 1.0' in text
        assert 'vllm:inter_token_latency_seconds_count{engine="0",model_name="demo/tiny"} 2.0' in text


async def test_an_sglang_engine_has_its_own_names() -> None:
    async with started(engine="sglang") as bench:
        assert (await bench.post("/v1/chat/completions", CHAT))[0] == 200
        status, answer = await bench.post(GENERATE, {"model": "other", "prompt": "x"})
        assert status == 404
        assert answer["object"] == "error"
        assert (await bench.send("GET", "/health_generate"))[0] == 200
        info = json.loads((await bench.send("GET", "/server_info"))[2])
        assert info["disaggregation_mode"] == "null"
        _, _, raw = await bench.send("GET", "/metrics")
        assert b"sglang:num_running_reqs{" in raw
        assert b"sglang:token_usage{" in raw
        assert b"vllm:" not in raw


async def test_an_idle_connection_is_closed_early_as_vllm_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert emulator_edge.KEEP_ALIVE_S == 5
    monkeypatch.setattr(emulator_edge, "KEEP_ALIVE_S", 0.05)
    async with started() as bench:
        host, _, port = bench.engine.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        async with asyncio.timeout(10.0):
            await reader.readuntil(b"\r\n\r\n")
            assert await reader.read() == b""
        writer.close()


async def test_the_side_channel_refuses_what_it_cannot_read() -> None:
    async with started() as bench:
        side = bench.engine.host.side_address
        for method, path, raw, expected in (
            ("GET", "/health", b"", 200),
            ("GET", "/nothing", b"", 404),
            ("POST", "/nothing", b"{}", 404),
            ("POST", "/pull", b"{}", 400),
            ("POST", "/release", b"garbage", 400),
            ("POST", "/heartbeat", b"x" * (2 << 20), 413),
            ("POST", "/release", b'{"engine_id":"x","request_id":"y"}', 200),
            ("POST", "/pull/done", b'{"pull_id":"never opened"}', 200),
        ):
            async with await bench.client.request(
                method, side, path, body=raw, head_timeout_s=10.0
            ) as response:
                assert response.status == expected, path
                await response.read_all(timeout_s=10.0)
        bench.engine.host.model.validate()
