"""A fake engine as cheap as it can be: answers as vLLM does where a router looks, streams paced events."""

import argparse
import asyncio
import contextlib
from typing import cast

import httptools
import uvloop

from benchmarks.relay import sse

_METRICS = (
    b"# TYPE vllm:num_requests_running gauge\n"
    b'vllm:num_requests_running{engine="0",model_name="bench/llama"} 0.0\n'
    b"# TYPE vllm:num_requests_waiting gauge\n"
    b'vllm:num_requests_waiting{engine="0",model_name="bench/llama"} 0.0\n'
    b"# TYPE vllm:kv_cache_usage_perc gauge\n"
    b'vllm:kv_cache_usage_perc{engine="0",model_name="bench/llama"} 0.0\n'
    b"# TYPE vllm:prefix_cache_queries counter\n"
    b'vllm:prefix_cache_queries_total{engine="0",model_name="bench/llama"} 0.0\n'
    b"# TYPE vllm:prefix_cache_hits counter\n"
    b'vllm:prefix_cache_hits_total{engine="0",model_name="bench/llama"} 0.0\n'
    b"# TYPE vllm:cache_config_info gauge\n"
    b'vllm:cache_config_info{block_size="64",cache_dtype="auto",engine="0",num_gpu_blocks="32768"} 1.0\n'
)
_MODELS = b'{"object":"list","data":[{"id":"bench/llama","object":"model","max_model_len":131072}]}'
_PREFILL_ANSWER = (
    b'{"id":"cmpl-bench","object":"text_completion","model":"bench/llama",'
    b'"choices":[{"index":0,"text":"x","finish_reason":"length"}],'
    b'"usage":{"prompt_tokens":100,"completion_tokens":1,"total_tokens":101,'
    b'"prompt_tokens_details":{"cached_tokens":64}},'
    b'"kv_transfer_params":{"do_remote_prefill":true,"do_remote_decode":false,"remote_block_ids":[[1,2]],'
    b'"remote_engine_id":"bench","remote_request_id":"cmpl-bench","remote_host":"127.0.0.1","remote_port":5601,'
    b'"tp_size":1}}'
)
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)


class Engine(asyncio.Protocol):
    """One connection; a stream ends after its events or with its connection."""

    def __init__(self, *, interval_s: float, event_count: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._interval_s = interval_s
        self._event_count = event_count
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._path = b""
        self._body: list[bytes] = []
        self._left = 0
        self._due_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, _exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._transport = None

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            if self._transport is not None:
                self._transport.close()  # Some routers try HTTP/2 first.

    def on_message_begin(self) -> None:
        self._path = b""
        self._body = []

    def on_url(self, url: bytes) -> None:
        self._path += url

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        body = b"".join(self._body).replace(b" ", b"")
        if self._path == b"/metrics":
            self._answer(b"text/plain; version=0.0.4; charset=utf-8", _METRICS)
        elif b'"do_remote_decode":true' in body:
            self._answer(b"application/json", _PREFILL_ANSWER)
        elif b'"stream":true' in body:
            self._stream()
        else:
            self._answer(b"application/json", _MODELS)

    def _answer(self, kind: bytes, body: bytes) -> None:
        if self._transport is not None:
            head = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n" % (kind, len(body))
            self._transport.write(head + body)

    def _stream(self) -> None:
        if self._transport is not None:
            self._transport.write(_STREAM_HEAD)
            self._left = self._event_count
            self._due_s = self._loop.time()
            self._send_event()

    def _send_event(self) -> None:
        if self._transport is None:
            return
        if self._left == 0:
            self._transport.write(sse.LAST_CHUNKS)
            return
        self._left -= 1
        self._transport.write(sse.chunk())
        self._due_s += self._interval_s
        self._timer = self._loop.call_at(self._due_s, self._send_event)


async def main(interval_s: float, event_count: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: Engine(interval_s=interval_s, event_count=event_count), "127.0.0.1", 0, backlog=1_024
    )
    print("ready", server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--interval-ms", type=float, default=30.0)
    arguments.add_argument("--events", type=int, default=100_000)
    options = arguments.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(main(options.interval_ms / 1e3, options.events))
