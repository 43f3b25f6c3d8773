"""A server is killed in mid-stream: each stream goes on elsewhere, with the tokens of an undisturbed run."""

import http.client
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
from openai import OpenAI

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300, func_only=True)]

OUTPUT_TOKENS = 700
SEEN_BEFORE = 20
"""Events that a client has before the server dies: it is in the middle."""
GREEDY: dict[str, Any] = {"model": "tiny", "max_tokens": OUTPUT_TOKENS, "temperature": 0}


@dataclass
class Stream:
    """What one client saw.

    Attributes:
        has_begun: so many events have come that the stream is in its middle.
    """

    rendered: str
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    finish_reasons: list[str] = field(default_factory=list)
    usage: Any = None
    has_begun: threading.Event = field(default_factory=threading.Event)

    def take(self, chunk: Any, text: str | None) -> None:
        self.ids.add(chunk.id)
        self.text += text or ""
        self.usage = chunk.usage or self.usage
        for choice in chunk.choices:
            self.tokens += getattr(choice, "token_ids", None) or []
            if choice.finish_reason:
                self.finish_reasons.append(choice.finish_reason)
        if len(self.text) >= SEEN_BEFORE:
            self.has_begun.set()


Call = Callable[[OpenAI, Stream], None]
# Shown, so that the text says all tokens, and goes on from where it is.
ENDLESS = {"ignore_eos": True, "skip_special_tokens": False}
# A token is a byte; of random ones most text is no character, and is generated anew.
LETTERS = {"allowed_token_ids": [*b"abcdefghijklmnopqrstuvwxyz ."]}


def completion(client: OpenAI, into: Stream, **more: Any) -> None:
    events = client.completions.create(
        **GREEDY,
        prompt=into.rendered,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=ENDLESS | more,
    )
    for chunk in events:
        into.take(chunk, chunk.choices[0].text if chunk.choices else "")


def completion_with_ids(client: OpenAI, into: Stream) -> None:
    completion(client, into, return_token_ids=True)


def chat(client: OpenAI, into: Stream, **more: Any) -> None:
    said = into.rendered.removeprefix("[user]").removesuffix("[assistant]")
    events = client.chat.completions.create(
        **GREEDY,
        messages=[{"role": "user", "content": said}],
        stream=True,
        stream_options={"include_usage": True},
        extra_body=ENDLESS | LETTERS | more,
    )
    for chunk in events:
        into.take(chunk, chunk.choices[0].delta.content if chunk.choices else "")


def chat_with_ids(client: OpenAI, into: Stream) -> None:
    chat(client, into, return_token_ids=True)


CALLS: tuple[Call, ...] = (completion, completion_with_ids, chat, chat_with_ids)


def test_the_gateway_goes_on_at_the_other_server(whole: Any, openai: OpenAI, words: Any, wait: Any) -> None:
    streams = [
        Stream(f"[user]{words.prompt(60)}[assistant]" if call in {chat, chat_with_ids} else words.prompt(80))
        for call in CALLS
    ]
    with ThreadPoolExecutor(len(CALLS)) as pool:
        running = [pool.submit(call, openai, stream) for call, stream in zip(CALLS, streams, strict=True)]
        assert streams[0].has_begun.wait(60)
        wait(whole.serving, 30, "a server that generates")
        victim = whole.serving()[0]
        for stream in streams:
            assert stream.has_begun.wait(60)
        whole.engines[victim].process.kill()
        for future in running:
            future.result(120)
    (survivor,) = {"one", "two"} - {victim}
    with OpenAI(base_url=f"http://{whole.engines[survivor].address}/v1", api_key="unused") as alone:
        for call, stream in zip(CALLS, streams, strict=True):
            undisturbed = Stream(stream.rendered)
            call(alone, undisturbed)
            check(stream, undisturbed)
    assert whole.gateway.counter("pdcoord_gateway_resumes_total", outcome="continued") >= 1


def check(stream: Stream, undisturbed: Stream) -> None:
    """The stream is one and whole, and what it says is what an engine says that nobody kills."""
    assert stream.text == undisturbed.text
    assert stream.tokens == undisturbed.tokens
    assert len(stream.ids) == 1
    assert stream.finish_reasons == ["length"]
    assert stream.usage.completion_tokens == OUTPUT_TOKENS
    assert stream.usage.prompt_tokens == undisturbed.usage.prompt_tokens
    assert stream.usage.total_tokens == undisturbed.usage.total_tokens


def test_the_sidecar_goes_on_at_the_other_pod(whole: Any, words: Any) -> None:
    """As behind Envoy: the plan names where a stream may go on."""
    prompt = words.prompt(80)
    plan = {
        "prefills": [],
        "resumes": [whole.sidecars["two"].address],
        "resume_tries_max": 2,
        "resume_age_ms_max": 600_000.0,
    }
    body = {"model": "tiny", "prompt": prompt, "stream": True, "ignore_eos": True} | GREEDY
    with ThreadPoolExecutor(1) as pool:
        begun = threading.Event()
        running = pool.submit(read_events, whole.sidecars["one"], body, json.dumps(plan), begun)
        assert begun.wait(60)
        whole.engines["one"].process.kill()
        events = running.result(120)
    undisturbed = read_events(whole.engines["two"], body, "{}", threading.Event())
    assert text_of(events) == text_of(undisturbed)
    assert len({event["id"] for event in events}) == 1
    assert [e["choices"][0]["finish_reason"] for e in events if e["choices"][0]["finish_reason"]] == [
        "length"
    ]


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(event["choices"][0]["text"] for event in events)


def read_events(sidecar: Any, body: Any, plan: str, begun: threading.Event) -> list[dict[str, Any]]:
    connection = http.client.HTTPConnection(sidecar.address, timeout=60)
    headers = {"content-type": "application/json", "x-pdcoord-plan": plan}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    response = connection.getresponse()
    assert response.status == 200, response.read()
    events: list[dict[str, Any]] = []
    for line in lines_of(response):
        if line.startswith(b"data: {"):
            events.append(json.loads(line[6:]))
        if len(events) == SEEN_BEFORE:
            begun.set()
    connection.close()
    return events


def lines_of(response: Any) -> Iterator[bytes]:
    while line := response.readline():
        yield line
