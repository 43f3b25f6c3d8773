"""How an answer's bytes pass, what is counted of them, and when silence means that a stream stands still."""

import json
from asyncio import Future
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from pdcoord.gateway.first import SIGNS_OF_LIFE
from pdcoord.gateway.streams import AGAIN_S, SOON_S, Answer, Fate, StreamWatch
from pdcoord.protocol.errors import Refusal, RefuseReason
from pdcoord.resume.continuation import Unresumable
from pdcoord.resume.splice import Seam, Splice
from pdcoord.resume.tape import Shelf, Tape
from pdcoord.wire.errors import StalledError, StreamError
from pdcoord.wire.response import Response

SSE = b"text/event-stream; charset=utf-8"
BODY = json.dumps({"model": "m", "prompt": [1, 2], "stream": True, "max_tokens": 9}).encode()
LOST = Refusal(RefuseReason.STREAM_LOST, "why")
DONE = b"data: [DONE]\n\n"


def event(text: str) -> bytes:
    chunk = {"id": "a", "object": "text_completion", "created": 1, "model": "m"}
    return b"data: " + json.dumps({**chunk, "choices": [{"index": 0, "text": text}]}).encode() + b"\n\n"


class Upstream:
    """A response whose parts come at once; the last may be an error."""

    def __init__(
        self, parts: Sequence[bytes | Exception], kind: bytes = SSE, encoding: bytes | None = None
    ) -> None:
        self.status = 200
        self.last = b""
        self.part_count = 0
        self._parts = parts
        self._headers = {b"content-type": kind, b"content-encoding": encoding}

    def header(self, name: bytes) -> bytes | None:
        return self._headers.get(name)

    async def pump(self, sink: Any, **_: object) -> None:
        for part in self._parts:
            if isinstance(part, Exception):
                raise part
            self.last = part
            self.part_count += 1
            sink(part)


@dataclass
class Client:
    """What a client got."""

    body: bytes = b""
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    is_complete: bool = False

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.headers = message["headers"]
        else:
            self.body += message["body"]
            self.is_complete = not message["more_body"]


class Writer:
    """The server's own writer, which takes no time."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def write(self, data: bytes) -> None:
        self._client.body += data


def known(*, may: bool) -> Future[bool]:
    found: Future[bool] = Future()
    found.set_result(may)
    return found


def watch(**changes: Any) -> StreamWatch:
    usual: dict[str, Any] = {
        "idle_timeout_s": 90.0,
        "silence_s_max": lambda: 10.0,
        "first_s_max": lambda: 20.0,
        "find_out": lambda: known(may=True),
        "has_output": lambda: True,
        "stands_still": lambda: None,
    }
    return StreamWatch(**{**usual, **changes})


class Rig:
    """An answer between an upstream and a client."""

    def __init__(self, parts: Sequence[bytes | Exception], *, bytes_max: int = 1 << 20, **kind: Any) -> None:
        self.upstream = cast("Response", Upstream(parts[1:], **kind))
        self.first = cast("bytes", parts[0])
        self.shelf = Shelf(1 << 20, bytes_max)
        self.client = Client()
        scope = {"path": "/v1/completions", "extensions": {"pdcoord.body": Writer(self.client)}}
        tape = Tape(self.shelf, BODY) if bytes_max else None
        self.answer = Answer(scope, self.client.send, self.upstream, tape=tape)

    async def relay(self) -> Fate:
        return await self.answer.relay(self.upstream, self.first, watch())


async def test_a_stream_that_is_kept_passes_as_it_is_and_is_counted_at_its_end() -> None:
    parts = [event("a"), event("b") + event("c")[:9], event("c")[9:], b": alive\n\n", DONE]
    rig = Rig(parts)
    assert await rig.relay() is Fate.WHOLE
    assert rig.client.body == b"".join(parts)
    assert rig.answer.output_tokens() == 3
    assert rig.answer.seems_whole()
    await rig.answer.end()
    assert rig.client.is_complete
    rig.answer.close()
    assert rig.shelf.bytes_held == 0


@pytest.mark.parametrize(
    ("broken", "fate"),
    [(StreamError("gone"), Fate.BROKEN), (StalledError("silent"), Fate.STALLED)],
)
async def test_only_whole_events_have_passed_when_a_stream_breaks(broken: Exception, fate: Fate) -> None:
    rig = Rig([event("a"), event("b")[:20], broken])
    assert await rig.relay() is fate
    assert rig.client.body == event("a")
    await rig.answer.break_off(LOST)
    assert rig.client.body == event("a") + LOST.event()
    assert not rig.client.is_complete


async def test_another_engines_stream_goes_on_where_the_first_was_cut() -> None:
    rig = Rig([event("a"), event("b")[:20], StreamError("gone")])
    await rig.relay()
    rig.answer.begin_again()
    second = cast("Response", Upstream([DONE]))
    fate = await rig.answer.relay(second, event("b"), watch(), splice=Splice(Seam(has_begun=True)))
    assert fate is Fate.WHOLE
    said = [json.loads(part[6:]) for part in rig.client.body.split(b"\n\n") if part.startswith(b"data: {")]
    assert [chunk["choices"][0]["text"] for chunk in said] == ["a", "b"]
    assert rig.answer.output_tokens() == 2
    assert rig.answer.seems_whole()


async def test_a_continuation_that_cannot_be_read_is_as_good_as_broken() -> None:
    rig = Rig([event("a"), StreamError("gone")])
    await rig.relay()
    rig.answer.begin_again()
    second = cast("Response", Upstream([DONE]))
    fate = await rig.answer.relay(second, b"data: {]\n\n", watch(), splice=Splice(Seam(has_begun=True)))
    assert fate is Fate.BROKEN
    assert rig.client.body == event("a")


async def test_past_its_bound_a_stream_is_let_go_of_and_counted_on() -> None:
    tokens = [event(str(index)) for index in range(50)]
    rig = Rig([*tokens, DONE, StreamError("gone")], bytes_max=1_500)
    assert await rig.relay() is Fate.BROKEN
    assert rig.client.body == b"".join(tokens) + DONE
    assert rig.shelf.bytes_held == 0
    assert rig.answer.output_tokens() == 50
    assert rig.answer.why_unreadable() is Unresumable.TAPE_FULL


@pytest.mark.parametrize(
    ("parts", "is_whole"),
    [
        ([event("a"), b"data: [DO", b"NE]\n\n"], True),
        ([event("a"), DONE, b": alive\n\n"], True),
        ([event("a"), b"data: [DONE]"], True),
        ([event("a")], False),
        ([event("data: [DONE]")], False),
        ([event("x" * 9_000), event("[DONE]")], False),
    ],
)
@pytest.mark.parametrize("bytes_max", [1 << 20, 0])
async def test_a_stream_is_whole_where_its_last_event_says_so(
    parts: list[bytes], bytes_max: int, *, is_whole: bool
) -> None:
    rig = Rig(parts, bytes_max=bytes_max)
    assert await rig.relay() is Fate.WHOLE
    assert rig.answer.seems_whole() is is_whole


@pytest.mark.parametrize("padding", [b"", b": alive\n\n" * 5_000])
async def test_a_token_is_seen_at_either_end_of_what_passed(padding: bytes) -> None:
    role = event("").replace(b'"text": ""', b'"delta": {"role": "assistant", "content": ""}')
    rig = Rig([role, padding or b": alive\n\n"])
    await rig.relay()
    assert not rig.answer.has_output()
    for parts in ([role, padding, event("a")], [role, event("a"), padding]):
        rig = Rig([part for part in parts if part])
        await rig.relay()
        assert rig.answer.has_output()


async def test_an_answer_ends_once() -> None:
    rig = Rig([event("a"), DONE])
    await rig.relay()
    await rig.answer.end()
    await rig.answer.break_off(LOST)
    assert (rig.client.body, rig.client.is_complete) == (event("a") + DONE, True)


async def test_what_is_not_kept_names_why() -> None:
    rig = Rig([event("a"), StreamError("gone")], bytes_max=0)
    assert await rig.relay() is Fate.BROKEN
    assert rig.answer.why_unreadable() is Unresumable.API
    assert rig.answer.output_tokens() == 1


async def test_a_length_that_was_promised_is_not_when_more_may_come() -> None:
    given = [(b"content-type", SSE), (b"content-length", b"10")]
    kept, plain = Rig([DONE]), Rig([DONE], bytes_max=0)
    for rig, expected in ((kept, given[:1]), (plain, given)):
        await rig.answer.begin(given)
        assert rig.client.headers == expected


async def test_an_engines_last_event_without_its_blank_line_reaches_the_client() -> None:
    rig = Rig([event("a"), b"data: [DONE]"])
    assert await rig.relay() is Fate.WHOLE
    assert rig.answer.seems_whole()
    await rig.answer.end()
    assert rig.client.body == event("a") + b"data: [DONE]"


@pytest.mark.parametrize("part", [b": keep-alive\n\n", b"event: ping\ndata: {}\n\n"])
def test_signs_of_life_are_no_progress(part: bytes) -> None:
    assert part.startswith(SIGNS_OF_LIFE)
    assert not watch().is_progress(part)
    assert watch().is_progress(event("a") + part)


async def test_a_stream_that_stands_still_is_given_up_once_it_was_silent_for_so_long() -> None:
    calls: list[float | None] = [10.0, 30.0, 30.0]
    made = watch(silence_s_max=lambda: calls.pop(0))
    assert made.silence_s_max(0.0) == 10.0
    assert made.silence_s_max(0.0) == 10.0, "not asked for again while tokens come"
    assert made.silence_s_max(11.0) == 30.0, "by then the endpoint has a long prompt to compute"
    assert made.silence_s_max(30.0) <= 30.0


@pytest.mark.parametrize(
    "changes",
    [
        {"silence_s_max": lambda: None},
        {"find_out": lambda: known(may=False)},
    ],
)
async def test_a_stream_that_could_not_go_on_is_waited_for(changes: Any) -> None:
    assert watch(**changes).silence_s_max(50.0) == 50.0 + AGAIN_S


async def test_a_stream_without_a_token_is_waited_for_longer_and_then_goes_elsewhere() -> None:
    made = watch(has_output=lambda: False)
    assert made.silence_s_max(11.0) == 30.0, "the prompt is perhaps being computed"
    assert made.silence_s_max(30.0) <= 30.0


async def test_only_a_stream_that_would_go_elsewhere_is_told_of() -> None:
    told: list[int] = []
    for may in (False, True):
        watch(find_out=lambda m=may: known(may=m), stands_still=lambda: told.append(1)).silence_s_max(50.0)
    assert told == [1]


async def test_it_is_found_out_once_for_each_silence_whether_a_stream_could_go_on() -> None:
    asked: list[Future[bool]] = []

    def find_out() -> Future[bool]:
        asked.append(Future())
        return asked[-1]

    made = watch(find_out=find_out)
    assert made.silence_s_max(50.0) == 50.0 + SOON_S
    assert made.silence_s_max(50.1) == 50.1 + SOON_S
    made.silence_s_max(0.0)  # A token came.
    assert made.silence_s_max(60.0) == 60.0 + SOON_S
    assert len(asked) == 2
    asked[1].set_result(True)
    assert made.silence_s_max(60.1) == 60.1
