"""Clients under chaos: calls of every kind from a seed, each answer held against what the model says."""

import asyncio
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from benchmarks.chaos.fleet import MODEL, SEED
from pdcoord.protocol import headers
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.openai import APIS, parse_call
from pdcoord.sim import text
from pdcoord.sim.emulator_call import render
from pdcoord.sim.tokens import answer_ids, drawn_length, read_context
from pdcoord.wire.client import Client
from pdcoord.wire.errors import ConnectError, StreamError, WireError

ANSWER_S_MAX = 90.0
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_JSON = [(b"content-type", b"application/json")]
_NOBODY_S = 0.1
_LEAVES_SHARE = 0.08
_WORDS = ("lease", "ticket", "block", "path", "queue", "batch", "stream", "vendor", "layout", "kernel")


@dataclass(frozen=True, slots=True)
class Ask:
    """One call, and what its whole answer is.

    Attributes:
        leaves_after: events after which the client goes away; None if it stays.
    """

    path: str
    body: dict[str, Any]
    text: str
    ids: tuple[int, ...]
    finish: str
    leaves_after: int | None

    @property
    def kind(self) -> str:
        shape = "chat" if self.path == CHAT else "ids" if isinstance(self.body["prompt"], list) else "text"
        return f"{shape}{'' if self.body.get('stream') else ' whole'}"


def draw_ask(rng: random.Random) -> Ask:
    """A call of any kind that can be answered."""
    prompt = f"{rng.getrandbits(48):x} " + " ".join(rng.choices(_WORDS, k=rng.randrange(5, 400)))
    path = rng.choice([CHAT, COMPLETIONS, COMPLETIONS])
    body: dict[str, Any] = {"model": MODEL, "stream": rng.random() < 0.85, "temperature": 0}
    if path == CHAT:
        body["messages"] = [{"role": "user", "content": prompt}]
        ids = text.encode(render(parse_call(APIS[path], msgspec.json.encode(body))))
    else:
        ids = text.encode(prompt)
        body["prompt"] = ids if rng.random() < 0.4 else prompt
    context = read_context(SEED, ids, 0)
    count, finish = drawn_length(context.content, 0) - context.said, "stop"
    if path == COMPLETIONS or rng.random() < 0.5:
        count, finish = rng.randrange(1, 160), "length"
        body["max_tokens"] = count
    if rng.random() < 0.5 and isinstance(body.get("prompt"), list):
        body["return_token_ids"] = True
    if rng.random() < 0.5 and body["stream"]:
        body["stream_options"] = {"include_usage": True}
    words = answer_ids(SEED, ids, count)
    said = text.decode(words)
    if rng.random() < 0.15 and count > 20:
        at = 5 * rng.randrange(10, count - 2) + 2
        body["stop"] = said[at : at + 6]
        said, finish = said[: said.index(body["stop"])], "stop"
    leaves = rng.randrange(1, 40) if rng.random() < _LEAVES_SHARE and body["stream"] else None
    return Ask(path, body, said, words, finish, leaves)


@dataclass
class Verdicts:
    """What came of all calls.

    Attributes:
        outcomes: whole, named errors by name, left, gateway-gone.
        wrong: answers that are neither right nor a named error.
        gaps_s: of every whole stream by its id: its longest silence between pieces of text, and the median.
    """

    asked: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    gaps_s: dict[str, tuple[float, float]] = field(default_factory=dict)


class Reader:
    """One stream as a client reads it."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._raw = bytearray()
        self._read = 0
        self._times: list[float] = []
        self.text = ""
        self.ids: list[int] = []
        self.finish = ""
        self.error = ""
        self.usage: Any = None
        self.is_done = False
        self.event_ids: set[str] = set()

    def feed(self, part: bytes) -> None:
        """Take what came; raises ValueError on what no client can read."""
        self._raw += part
        while (end := self._raw.find(b"\n\n", self._read)) >= 0:
            event = bytes(self._raw[self._read : end])
            self._read = end + 2
            data = b"".join(line[6:] for line in event.split(b"\n") if line.startswith(b"data: "))
            if data == b"[DONE]":
                self.is_done = True
            elif data:
                self._take(msgspec.json.decode(data))

    def _take(self, event: dict[str, Any]) -> None:
        if event.get("error") is not None:
            error = event["error"]
            self.error = str(error.get("code") or error.get("type"))
            return
        self.event_ids.add(event["id"])
        self.usage = event.get("usage") or self.usage
        for choice in event["choices"]:
            piece = choice["delta"].get("content") if "delta" in choice else choice["text"]
            if piece:
                self.text += piece
                self._times.append(time.monotonic())
            self.ids += choice.get("token_ids") or []
            if self.finish and (piece or choice["finish_reason"]):
                raise ValueError("something comes behind the finish")
            self.finish = choice["finish_reason"] or self.finish

    @property
    def count(self) -> int:
        return len(self._times)

    def gaps(self) -> tuple[float, float] | None:
        gaps = sorted(b - a for a, b in itertools.pairwise(self._times))
        return (gaps[-1], gaps[len(gaps) // 2]) if gaps else None

    def fault(self) -> str:
        """What is wrong with it; empty for a whole answer and for the beginning of one with a named error."""
        ask = self._ask
        if len(self.event_ids) > 1:
            return f"several ids: {sorted(self.event_ids)}"
        if self.error:
            if self.finish:
                return f"error {self.error} behind finish {self.finish}"
            return "" if ask.text.startswith(self.text) else self._difference()
        if not self.is_done:
            return "no end and no error"
        if self.text != ask.text:
            return self._difference()
        if self.finish != ask.finish:
            return f"finish {self.finish!r}, expected {ask.finish!r}"
        if ask.body.get("return_token_ids") and "stop" not in ask.body and tuple(self.ids) != ask.ids:
            return f"{len(self.ids)} token ids, expected the {len(ask.ids)} of the text"
        return self._usage_fault()

    def _usage_fault(self) -> str:
        ask = self._ask
        if "stream_options" not in ask.body or "stop" in ask.body:
            return ""
        if self.usage is None:
            return "no usage"
        told = self.usage["completion_tokens"]
        return "" if told == len(ask.ids) else f"usage tells {told} tokens, expected {len(ask.ids)}"

    def _difference(self) -> str:
        at = next(
            (i for i, (a, b) in enumerate(zip(self.text, self._ask.text, strict=False)) if a != b),
            min(len(self.text), len(self._ask.text)),
        )
        return f"{len(self.text)} characters, expected {len(self._ask.text)}, alike up to {at}"


_REFUSED = ("429 ", "503 ")
_REFUSED_S = 1.0
"""Whoever is refused comes back after so long, as the least Retry-After has it."""


class Clients:
    """Calls one after another until told to stop.

    Args:
        pick: a gateway to call now; None while there is none.
        is_lost: whether the gateway was killed since this time.
    """

    def __init__(
        self,
        client: Client,
        pick: Callable[[random.Random], HostPort | None],
        is_lost: Callable[[HostPort, float], bool],
    ) -> None:
        self._client = client
        self._pick = pick
        self._is_lost = is_lost
        self.verdicts = Verdicts()
        self.is_over = False
        self.idle = asyncio.Event()
        self.idle.set()
        self._under_way = 0

    async def run(self, seed: int, pause_s: float = 0.0) -> None:
        rng = random.Random(seed)
        while not self.is_over:
            gateway = self._pick(rng)
            if gateway is None:
                await asyncio.sleep(_NOBODY_S)
                continue
            outcome = await self._one(gateway, draw_ask(rng))
            if outcome.startswith(_REFUSED):
                await asyncio.sleep(_REFUSED_S)
            elif pause_s:
                await asyncio.sleep(rng.uniform(0, 2 * pause_s))

    async def _one(self, gateway: HostPort, ask: Ask) -> str:
        verdicts, begun_s = self.verdicts, time.monotonic()
        verdicts.asked += 1
        verdicts.kinds[ask.kind] += 1
        self._under_way += 1
        self.idle.clear()
        try:
            async with asyncio.timeout(ANSWER_S_MAX):
                outcome = await self._send(gateway, ask)
        except TimeoutError:
            outcome = f"WRONG no end after {ANSWER_S_MAX:g} s"
        except (ConnectError, WireError) as error:
            is_lost = self._is_lost(gateway, begun_s)
            outcome = "gateway-gone" if is_lost else f"WRONG {type(error).__name__}: {error}"
        finally:
            self._under_way -= 1
            if not self._under_way:
                self.idle.set()
        if outcome.startswith("WRONG "):
            # What a gateway that is killed had not sent out yet is cut anywhere.
            if "no end and no error" in outcome and self._is_lost(gateway, begun_s):
                outcome = "gateway-gone"
            else:
                verdicts.wrong.append(f"{outcome[6:]} ({ask.kind}, {_brief(ask.body)})")
                outcome = "wrong"
        verdicts.outcomes[outcome] += 1
        return outcome

    async def _send(self, gateway: HostPort, ask: Ask) -> str:
        body = json.dumps(ask.body).encode()
        async with await self._client.request(
            "POST", gateway, ask.path, headers=_JSON, body=body, head_timeout_s=ANSWER_S_MAX
        ) as response:
            request_id = (response.header(headers.REQUEST_ID) or b"").decode("latin-1")
            if response.status != 200 or not ask.body["stream"]:
                raw = await response.read_all(timeout_s=ANSWER_S_MAX)
                return _whole(ask, response.status, raw, request_id)
            reader = Reader(ask)
            try:
                while part := await response.read_chunk(idle_timeout_s=ANSWER_S_MAX):
                    reader.feed(part)
                    if ask.leaves_after is not None and reader.count >= ask.leaves_after:
                        return "left"
            except StreamError:
                # What goes before it may be the error that says why.
                if not reader.error:
                    raise
            except (ValueError, KeyError, TypeError) as error:
                return f"WRONG unreadable: {error} [{request_id}]"
        if fault := reader.fault():
            return f"WRONG {fault} [{request_id}]"
        if reader.error:
            return f"error event {reader.error}"
        if (gaps := reader.gaps()) is not None:
            self.verdicts.gaps_s[request_id] = gaps
        return "whole"


def _whole(ask: Ask, status: int, raw: bytes, request_id: str) -> str:
    try:
        answer = msgspec.json.decode(raw)
        if status != 200:
            error = answer.get("error", answer)
            return f"{status} {error.get('code') or error['type']}"
        (choice,) = answer["choices"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"WRONG {status} with a body that cannot be read: {error} [{request_id}]"
    said = choice["message"]["content"] if "message" in choice else choice["text"]
    if choice["finish_reason"] == "abort" and ask.text.startswith(said):
        return "aborted by the engine"
    if said == ask.text and choice["finish_reason"] == ask.finish:
        return "whole"
    return f"WRONG whole answer of {len(said)} characters, {choice['finish_reason']} [{request_id}]"


def _brief(body: dict[str, Any]) -> str:
    """A call without its prompt."""
    return json.dumps({key: value for key, value in body.items() if key not in {"prompt", "messages"}})
