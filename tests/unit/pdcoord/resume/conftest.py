"""A small engine that answers as vLLM 0.32 does, so that an answer can be cut and gone on with."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

Body = dict[str, Any]

# Any concatenation of these is cut into the same tokens again, so that a text has one count.
PIECES = (
    *(b"A", b"Bb", b"Cdef", b" the", b" ", b"\n", b"Q ", b"Z\n\n", b'"', b"\\", b"{}", b"error", b"abort"),
    *(b"\xc3", b"\xa9", b"\xe2\x82", b"\xac", b"\xf0\x9f", b"\x98", b"\x80"),
)
COMPLETES = {b"\xc3": b"\xa9", b"\xe2\x82": b"\xac", b"\xf0\x9f": b"\x98", b"\x98": b"\x80"}
FIRST_BYTE = len(PIECES)
EOS = FIRST_BYTE + 256
BROKEN = b"\xff"
CONTEXT_TOKENS = 120


def piece(token: int) -> bytes:
    if token < FIRST_BYTE:
        return PIECES[token]
    return b"" if token == EOS else bytes([token - FIRST_BYTE])


def tokens_of(data: bytes) -> list[int]:
    found = []
    at = 0
    while at < len(data):
        fits = [n for n, each in enumerate(PIECES) if data.startswith(each, at)]
        token = max(fits, key=lambda n: len(PIECES[n]), default=FIRST_BYTE + data[at])
        found.append(token)
        at += len(piece(token))
    return found


def shown(token: int) -> str:
    return piece(token).decode("utf-8", "replace")


@dataclass
class Step:
    """What an engine's loop gives the server for one event."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | None = None


@dataclass
class Engine:
    """Its next token depends on every byte before it and on nothing else.

    Attributes:
        answers: another model for each number.
        groups: how many tokens go into each event, over and over.
        line: the line end of its events.
        is_lossy: some tokens are no character.
    """

    answers: int = 0
    groups: tuple[int, ...] = (1,)
    line: bytes = b"\n"
    is_lossy: bool = False
    started: int = 0
    bodies: list[tuple[str, Body]] = field(default_factory=list)

    def count(self, raw: bytes | None) -> int | None:
        """POST /tokenize."""
        return None if raw is None else len(tokens_of(json.loads(raw)["prompt"].encode()))

    def next_token(self, context: bytes, *, may_end: bool) -> int:
        digest = hashlib.blake2b(context + bytes([self.answers % 256]), digest_size=8).digest()
        for begun, rest in COMPLETES.items():
            is_inside = context.endswith(begun) and not (
                begun == b"\x98" and not context.endswith(b"\xf0\x9f\x98")
            )
            if is_inside and not self.is_lossy:
                return PIECES.index(rest)
        if may_end and digest[0] < 8:
            return EOS
        if self.is_lossy and digest[0] > 200:
            return FIRST_BYTE + BROKEN[0]
        starts = [n for n, each in enumerate(PIECES) if each not in COMPLETES.values() or self.is_lossy]
        return starts[digest[1] % len(starts)]

    def steps(self, prompt: list[int], body: Body, limit: int) -> Iterator[Step]:
        context = b"".join(map(piece, prompt))
        start = context.decode("utf-8", "replace")
        prefix = "" if start.endswith("\ufffd") else start
        stops = body.get("stop") or []
        keeps = body.get("include_stop_str_in_output", False)
        held = 0 if keeps or not stops else max(map(len, stops)) - 1
        text, sent, generated, pending = "", 0, 0, []
        group = 0
        finish: str | None = None
        stop_reason: str | None = None
        while finish is None:
            token = self.next_token(context, may_end=generated >= body.get("min_tokens", 0))
            generated += 1
            pending.append(token)
            context += piece(token)
            if token == EOS:
                finish = "stop"
            else:
                whole = context.decode("utf-8", "replace")
                before = len(text)
                if not whole.endswith("\ufffd") and len(whole) > len(prefix):
                    text, prefix = text + whole[len(prefix) :], whole
                if generated > body.get("min_tokens", 0):
                    found = [(text.find(s, max(0, before - len(s) + 1)), s) for s in stops]
                    ends = sorted((at + len(s), s) for at, s in found if at >= 0)
                    if ends:
                        finish, stop_reason = "stop", ends[0][1]
                        text = text[: ends[0][0] - (0 if keeps else len(stop_reason))]
            if finish is None and generated >= limit:
                finish = "length"
            if finish is None and len(pending) < self.groups[group % len(self.groups)]:
                continue
            group += 1
            until = len(text) if finish else max(sent, len(text) - held)
            yield Step(text[sent:until], pending, finish, stop_reason)
            sent, pending = until, []

    def stream(self, path: str, raw: bytes) -> bytes:
        """The bytes of a whole answer."""
        body = json.loads(raw)
        self.bodies.append((path, body))
        self.started += 1
        is_chat = path == "/v1/chat/completions"
        prompt = chat_prompt(body) if is_chat else prompt_of(body["prompt"])
        limit = body.get("max_completion_tokens") if is_chat else None
        limit = body.get("max_tokens") if limit is None else limit
        limit = (CONTEXT_TOKENS if is_chat else 16) if limit is None else limit
        limit = min(limit, CONTEXT_TOKENS - len(prompt))
        head = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{self.started}",
            "object": "chat.completion.chunk" if is_chat else "text_completion",
            "created": 1_700_000_000 + self.started,
            "model": "tiny",
        }
        chunks = list(self.chunks(head, is_chat, prompt, body, limit))
        end = self.line * 2
        return b"".join(b"data: " + json.dumps(c).encode() + end for c in chunks) + b"data: [DONE]" + end

    def chunks(self, head: Body, is_chat: bool, prompt: list[int], body: Body, limit: int) -> Iterator[Body]:
        options = body.get("stream_options") or {}
        wants_ids = body.get("return_token_ids", False)
        is_continuous = options.get("continuous_usage_stats", False)

        def usage(done: int) -> Body:
            counts = {"prompt_tokens": len(prompt), "total_tokens": len(prompt) + done}
            return {"usage": counts | {"completion_tokens": done}}

        if is_chat:
            delta = {"role": "assistant", "content": ""}
            choice: Body = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
            more: Body = {"prompt_token_ids": prompt if wants_ids else None}
            yield head | {"choices": [choice]} | more | (usage(0) if is_continuous else {})
        done, offset = 0, 0
        for number, step in enumerate(self.steps(prompt, body, limit)):
            done += len(step.ids)
            choice = {"index": 0, "logprobs": None, "finish_reason": step.finish_reason}
            choice |= {"delta": {"content": step.text}} if is_chat else {"text": step.text}
            choice["token_ids"] = step.ids if wants_ids else None
            if not is_chat:
                choice["prompt_token_ids"] = prompt if wants_ids and number == 0 else None
            if step.finish_reason or not is_chat:
                choice["stop_reason"] = step.stop_reason
            if is_chat and body.get("logprobs"):
                content = [{"token": shown(t), "logprob": -0.5, "top_logprobs": []} for t in step.ids]
                choice["logprobs"] = {"content": content}
            elif not is_chat and body.get("logprobs") is not None:
                choice["logprobs"] = completion_logprobs(step.ids, offset)
                offset += sum(len(shown(t)) for t in step.ids)
            yield head | {"choices": [choice]} | (usage(done) if is_continuous else {})
        if options.get("include_usage"):
            yield head | {"choices": []} | usage(done)


def completion_logprobs(ids: list[int], offset: int) -> Body:
    offsets = []
    for token in ids:
        offsets.append(offset)
        offset += len(shown(token))
    return {
        "tokens": [shown(t) for t in ids],
        "token_logprobs": [-0.5 for _ in ids],
        "top_logprobs": [{shown(t): -0.5} for t in ids],
        "text_offset": offsets,
    }


def prompt_of(prompt: Any) -> list[int]:
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        (prompt,) = prompt
    return tokens_of(prompt.encode()) if isinstance(prompt, str) else prompt


def chat_prompt(body: Body) -> list[int]:
    """A template that trims what ends a message, as those of Llama and Gemma do."""
    is_open = body.get("continue_final_message", False)
    assert not (is_open and body.get("add_generation_prompt", True))
    *before, last = body["messages"]
    rendered = "".join(f"<{m['role']}>{m['content'].rstrip()}</s>" for m in before)
    rendered += f"<{last['role']}>{last['content'].rstrip()}" + ("" if is_open else "</s>")
    return tokens_of((rendered if is_open else rendered + "<assistant>").encode())


def read_answer(raw: bytes) -> Body:
    """What a client makes of a stream; fails where it is not one stream."""
    events = [e for e in raw.replace(b"\r\n", b"\n").split(b"\n\n") if e]
    assert raw.endswith((b"\n\n", b"\r\n\r\n")) or not raw
    assert events[-1] == b"data: [DONE]"
    assert events.count(b"data: [DONE]") == 1
    chunks = [json.loads(e.removeprefix(b"data: ")) for e in events[:-1] if e.startswith(b"data: ")]
    heads = {(c["id"], c["object"], c["created"], c["model"]) for c in chunks}
    assert len(heads) == 1
    choices = [c["choices"][0] for c in chunks if c["choices"]]
    deltas = [c.get("delta", {}) for c in choices]
    logprobs = [c["logprobs"] for c in choices if c["logprobs"]]
    finishes = [c["finish_reason"] for c in choices if c["finish_reason"]]
    assert len(finishes) == 1
    assert choices[-1]["finish_reason"]
    assert all(("delta" in choice) == ("delta" in choices[0]) for choice in choices)
    told = [
        c.get("prompt_token_ids") or c["choices"][0].get("prompt_token_ids") for c in chunks if c["choices"]
    ]
    continuous = [c["usage"] for c in chunks if c["choices"] and c.get("usage")]
    assert all(u["total_tokens"] == u["prompt_tokens"] + u["completion_tokens"] for u in continuous)
    counts = [u["completion_tokens"] for u in continuous]
    assert counts == sorted(counts)
    return {
        "head": heads.pop(),
        "text": "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in choices),
        "ids": [t for c in choices for t in c.get("token_ids") or ()],
        "finish_reason": finishes[0],
        "stop_reason": choices[-1].get("stop_reason"),
        "roles": [d["role"] for d in deltas if d.get("role")],
        "prompt_ids": [ids for ids in told if ids],
        "usage": [c["usage"] for c in chunks if not c["choices"]],
        "last_usage": continuous[-1] if continuous else None,
        "tokens": [t for each in logprobs for t in each.get("tokens") or ()]
        + [e["token"] for each in logprobs for e in each.get("content") or ()],
        "offsets": [at for each in logprobs for at in each.get("text_offset") or ()],
    }


@pytest.fixture(scope="session")
def make_engine() -> Callable[..., Engine]:
    return Engine


@pytest.fixture(scope="session")
def read() -> Callable[[bytes], Body]:
    return read_answer
